"""Is the exported model the PyTorch model? Checks, and their verdict."""
