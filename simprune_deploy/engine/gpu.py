"""The GPU of this machine, as its driver describes it. Light: the driver's own C functions.

No package of Python is needed for this, so that ``build`` and ``inspect`` can tell what is there
before anything else has to work.
"""

from __future__ import annotations

import ctypes
import dataclasses

from simprune_deploy.common.errors import SimpruneError

DRIVER = "libcuda.so.1"
_COMPUTE_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU: the first one, which is what TensorRT uses.

    Attributes:
        name: As the driver calls it.
        compute_capability: Major and minor number.
        cuda: The newest CUDA version that its driver knows, such as "12.6".
        memory: In bytes; on a Jetson, shared with the processor.
    """

    name: str
    compute_capability: tuple[int, int]
    cuda: str
    memory: int

    @property
    def sm(self) -> str:
        """The compute capability as architectures are named: "87"."""
        return f"{self.compute_capability[0]}{self.compute_capability[1]}"


class NoGpuError(SimpruneError):
    """There is no GPU, or its driver does not work; the message says which."""


def find_gpu() -> Gpu:
    """Ask the driver for the first GPU (of those that CUDA_VISIBLE_DEVICES leaves).

    Raises:
        NoGpuError: there is none.
    """
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        raise NoGpuError(
            f"no GPU was found: NVIDIA's driver ({DRIVER}) is not installed here"
        ) from None

    def ask(function: str, *arguments: object) -> None:
        code = getattr(driver, function)(*arguments)
        if code != 0:
            raise NoGpuError(f"no GPU was found: the driver says {_error_name(driver, code)}")

    ask("cuInit", 0)
    device, number, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    memory = ctypes.c_size_t()
    ask("cuDeviceGet", ctypes.byref(device), 0)
    ask("cuDeviceGetName", name, len(name), device)
    ask("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    capability = []
    for attribute in _COMPUTE_CAPABILITY:
        ask("cuDeviceGetAttribute", ctypes.byref(number), attribute, device)
        capability.append(number.value)
    ask("cuDriverGetVersion", ctypes.byref(number))
    return Gpu(
        name=name.value.decode("utf-8", "replace"),
        compute_capability=(capability[0], capability[1]),
        cuda=f"{number.value // 1000}.{number.value % 1000 // 10}",
        memory=memory.value,
    )


def _error_name(driver: ctypes.CDLL, code: int) -> str:
    text = ctypes.c_char_p()
    driver.cuGetErrorName(code, ctypes.byref(text))
    return text.value.decode() if text.value else f"error {code}"
