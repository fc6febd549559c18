"""The CUDA kernels and the TensorRT plugin of ``plugins/``: building, reading and calling them."""

LIBRARY_VARIABLE = "SIMPRUNE_LIBRARY"
"""The environment variable that names the library whose kernels take torch's CUDA tensors."""

ABI_VERSION = 1
"""The version of the C interface (``plugins/include/simprune.h``) that this package speaks."""
