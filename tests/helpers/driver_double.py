"""A library with the C interface of NVIDIA's driver (cuda.h), as far as engine/gpu.py asks it.

It stands for a GPU where there is none: what follows from a GPU's name, compute capability and
driver version can be tested, and nothing that runs on it.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

SOURCE = """
#include <stdio.h>
int cuInit(unsigned flags) { (void)flags; return CODE; }
int cuDeviceGet(int* device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetName(char* name, int size, int device)
{ (void)device; snprintf(name, size, "GPU double"); return 0; }
int cuDeviceTotalMem_v2(unsigned long* bytes, int device)
{ (void)device; *bytes = 7ul << 30; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device)
{ (void)device; *value = attribute == 75 ? MAJOR : attribute == 76 ? MINOR : -1; return 0; }
int cuDriverGetVersion(int* version) { *version = CUDA; return 0; }
int cuGetErrorName(int code, const char** name)
{ *name = code == 100 ? "CUDA_ERROR_NO_DEVICE" : 0; return *name ? 0 : 1; }
"""


def driver(folder: Path, capability: tuple[int, int], code: int = 0, cuda: int = 13000) -> Path:
    """Compile the library: a GPU of that compute capability, or `code` from cuInit."""
    source = folder / "driver.c"
    source.write_text(SOURCE, encoding="utf-8")
    library = folder / f"libdriver-{capability[0]}{capability[1]}-{code}-{cuda}.so"
    values = {"CODE": code, "CUDA": cuda, "MAJOR": capability[0], "MINOR": capability[1]}
    settings = [f"-D{name}={value}" for name, value in values.items()]
    command = ["cc", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", *settings]
    subprocess.run([*command, str(source), "-o", str(library)], check=True)
    return library
