"""CUDA from Python, as much of it as running an engine takes; through NVIDIA's cuda-bindings."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from simprune_deploy.common.errors import InvalidArgumentError, RequirementError, SimpruneError
from simprune_deploy.engine.gpu import find_gpu

INSTALL = "pip install 'simprune-deploy[engine]'"
LEGACY_DEFAULT_STREAM = 1
"""How DLPack writes stream 0."""

_CPU, _PINNED = 1, 3  # DLPack's numbers for memory that the processor reads


class CudaError(SimpruneError):
    """A call of CUDA failed; the message names the call and CUDA's reason."""


def call(function: str, *arguments: Any) -> Any:
    """Call a function of the CUDA runtime and return what it gives.

    Raises:
        CudaError: CUDA says no.
        SimpruneError: cuda-bindings is not installed.
    """
    cuda = _bindings()
    code, *values = getattr(cuda, function)(*arguments)
    if int(code) != 0:
        raise CudaError(f"{function} failed: {_reason(cuda, code)}")
    return values[0] if len(values) == 1 else values


def constant(name: str) -> Any:
    """Return a constant or an enumeration of the CUDA runtime."""
    return getattr(_bindings(), name)


def check_bindings() -> None:
    """Refuse cuda-bindings of another CUDA than the driver's, which fail with a riddle.

    Raises:
        SimpruneError: there is no GPU, cuda-bindings is missing, or made for a newer CUDA.
    """
    driver = int(find_gpu().cuda.split(".")[0])
    version = int(call("cudaRuntimeGetVersion"))
    if version // 1000 > driver:
        raise RequirementError(
            f"cuda-bindings is for CUDA {version // 1000}, and the driver here knows CUDA "
            f"{driver}: pip install 'cuda-bindings<{driver + 1}'"
        )


@dataclasses.dataclass(frozen=True)
class View:
    """Memory that an array owns, wherever it is.

    Attributes:
        pointer: Its address.
        shape, dtype: As in numpy.
        owner: Keeps the memory alive.
    """

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: Any


def view(name: str, array: Any, stream: int, *, writable: bool = False) -> View:
    """Return the memory of a numpy array, of a torch tensor or of any array that speaks DLPack.

    Memory on a GPU is ordered behind what its owner has queued for it: work on `stream` comes
    later.

    Args:
        name: What the array is, for messages.
        array: With its rows one after the other in memory, if it is on a GPU or written to.
        stream: The handle of the stream that uses it.
        writable: Whether it will be written to. Default False.

    Raises:
        SimpruneError: it is none of these, or its memory has gaps.
    """
    if not isinstance(array, np.ndarray):
        if not hasattr(array, "__dlpack_device__"):
            raise InvalidArgumentError(
                f"{name} is a {type(array).__name__}, and engines take numpy arrays, torch "
                "tensors and other arrays with __dlpack__"
            )
        if int(array.__dlpack_device__()[0]) not in (_CPU, _PINNED):
            return _device_view(name, array, stream)
        array = _exported(name, lambda: np.from_dlpack(array))
    if writable and not (array.flags.c_contiguous and array.flags.writeable):
        raise InvalidArgumentError(
            f"{name} cannot be written in one piece: give a new, contiguous array"
        )
    array = np.ascontiguousarray(array)
    return View(array.ctypes.data, array.shape, array.dtype, array)


def _device_view(name: str, array: Any, stream: int) -> View:
    try:
        from cuda.core.utils import StridedMemoryView
    except ImportError:
        raise RequirementError(
            f"cuda-core, for arrays on the GPU, is not installed: {INSTALL}"
        ) from None
    pointer = stream or LEGACY_DEFAULT_STREAM
    found = _exported(name, lambda: StridedMemoryView.from_any_interface(array, stream_ptr=pointer))
    shape = tuple(int(size) for size in found.shape)
    if found.strides is not None and not _is_packed(shape, found.strides):
        raise InvalidArgumentError(f"{name} has gaps in its memory: make it contiguous first")
    return View(int(found.ptr), shape, np.dtype(found.dtype), found)


def _exported(name: str, export: Callable[[], Any]) -> Any:
    """Let an array hand out its memory; each library has its own ways to refuse."""
    try:
        return export()
    except (BufferError, RuntimeError, TypeError, ValueError, AssertionError) as error:
        why = " ".join(str(error).split())
        raise InvalidArgumentError(f"{name} does not hand out its memory: {why}") from error


def _is_packed(shape: tuple[int, ...], strides: Sequence[int]) -> bool:
    """Whether an array with these strides, in elements, has no gaps."""
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def new_stream(stack: contextlib.ExitStack) -> int:
    """Return the handle of a stream that does not wait for stream 0; `stack` destroys it."""
    stream = int(call("cudaStreamCreateWithFlags", constant("cudaStreamNonBlocking")))
    stack.callback(_release, "cudaStreamDestroy", stream)
    return stream


def new_event(stack: contextlib.ExitStack) -> Any:
    """Return an event that takes the time; `stack` destroys it."""
    event = call("cudaEventCreate")
    stack.callback(_release, "cudaEventDestroy", event)
    return event


def new_buffer(stack: contextlib.ExitStack, size: int) -> int:
    """Return the address of `size` bytes on the GPU, at least 1; `stack` frees them."""
    pointer = int(call("cudaMalloc", max(size, 1)))
    stack.callback(_release, "cudaFree", pointer)
    return pointer


def copy(to: int, source: int, size: int, stream: int) -> None:
    """Queue a copy of `size` bytes; CUDA sees from the addresses where they are."""
    kind = constant("cudaMemcpyKind").cudaMemcpyDefault
    call("cudaMemcpyAsync", to, source, size, kind, stream)


class Graph:
    """Launches that are recorded once and then replayed as one."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._recorded: Any = None
        stack.callback(self.forget)

    def launch(self, stream: int, launches: Callable[[], None]) -> None:
        """Replay what was recorded; record it if nothing was."""
        if self._recorded is None:
            self._record(stream, launches)
        call("cudaGraphLaunch", self._recorded, stream)

    def forget(self) -> None:
        """Drop what was recorded, because it no longer holds."""
        if self._recorded is not None:
            _release("cudaGraphExecDestroy", self._recorded)
            self._recorded = None

    def _record(self, stream: int, launches: Callable[[], None]) -> None:
        # TensorRT does at the first launch what a new shape left to do; that cannot be recorded
        launches()
        call("cudaStreamSynchronize", stream)
        mode = constant("cudaStreamCaptureMode").cudaStreamCaptureModeThreadLocal
        call("cudaStreamBeginCapture", stream, mode)
        try:
            launches()
        except BaseException:
            with contextlib.suppress(CudaError):
                call("cudaStreamEndCapture", stream)  # a stream that records takes no other work
            raise
        graph = call("cudaStreamEndCapture", stream)
        try:
            self._recorded = call("cudaGraphInstantiate", graph, 0)
        finally:
            _release("cudaGraphDestroy", graph)


def _release(function: str, handle: Any) -> None:
    """Give something back; an error has no taker here, least of all when Python ends."""
    with contextlib.suppress(SimpruneError):
        call(function, handle)


def _bindings() -> Any:
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise RequirementError(
            f"cuda-bindings, through which engines run, does not load ({error}): {INSTALL}"
        ) from None


def _reason(cuda: Any, code: Any) -> str:
    said, text = cuda.cudaGetErrorString(code)
    return text.decode() if int(said) == 0 and text else str(code)
