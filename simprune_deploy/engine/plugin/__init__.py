"""The library with the CUDA kernels and the TensorRT plugin of ``plugins/``: building it."""
