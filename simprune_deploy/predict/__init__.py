"""What runs a model on pictures."""
