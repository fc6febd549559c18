"""Engines: the GPUs they are for, and TensorRT-RTX's builder. Nothing heavy is imported here."""
