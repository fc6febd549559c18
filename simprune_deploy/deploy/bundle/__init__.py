"""What is shipped to a device that builds its own engine; packing.py puts it together."""
