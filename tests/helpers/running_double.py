"""Stand-ins for a GPU: the CUDA runtime, and TensorRT's execution of an engine.

What is real: the numbers. An "engine" holds an ONNX file, and ONNX Runtime runs it on the bytes
that lie at the addresses the context was given; memory is allocated, copied and freed, with its
bounds checked; what is queued on a stream happens when somebody waits for the stream, and not
before; while a stream records, nothing runs, and nothing but a launch is allowed.

What is not, and so is never shown by a test that uses this: that CUDA and TensorRT take these calls
in this order, that an engine computes the right thing, that a graph can be recorded of one, speed.
"""

from __future__ import annotations

import ctypes
import math
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import tensorrt_rtx as real

from simprune_deploy.onnx.metadata import describe_value

OUT_OF_BOUNDS, CAPTURE_REFUSED = 700, 900
REASONS = {OUT_OF_BOUNDS: b"an illegal memory access", CAPTURE_REFUSED: b"not while recording"}


class Cuda:
    """Plays ``cuda.bindings.runtime``; `calls` are the names of what was called, in order."""

    cudaStreamNonBlocking = 1  # noqa: N815
    cudaMemcpyKind = types.SimpleNamespace(cudaMemcpyDefault=4)  # noqa: N815
    cudaStreamCaptureMode = types.SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815

    def __init__(self, version: int = 13000) -> None:
        self.version = version
        self.calls: list[str] = []
        self.memory: dict[int, Any] = {}
        self.handles: dict[int, str] = {}
        self.queue: list[Callable[[], None]] = []
        self.recording: list[Callable[[], None]] | None = None
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.fails: dict[str, int] = {}
        self.spoiled = False

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if not name.startswith("cuda") or not callable(found):
            return found

        def called(*arguments: Any) -> Any:
            self.calls.append(name)
            if name in self.fails:
                return (self.fails[name], None)
            return found(*arguments)

        return called

    def _handle(self, kind: str) -> tuple[int, int]:
        handle = 1000 + len(self.calls)
        self.handles[handle] = kind
        return 0, handle

    def _destroy(self, handle: int, kind: str) -> tuple[int]:
        assert self.handles.pop(handle) == kind
        return (0,)

    def cudaGetErrorString(self, code: int) -> tuple[int, bytes]:  # noqa: N802
        return 0, REASONS.get(code, b"some error")

    def cudaRuntimeGetVersion(self) -> tuple[int, int]:  # noqa: N802
        return 0, self.version

    def cudaMemGetInfo(self) -> tuple[int, int, int]:  # noqa: N802
        return 0, (1 << 30) - sum(map(len, self.memory.values())), 1 << 30

    def cudaMalloc(self, size: int) -> tuple[int, int]:  # noqa: N802
        buffer = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(buffer)] = buffer
        return 0, ctypes.addressof(buffer)

    def cudaFree(self, pointer: int) -> tuple[int]:  # noqa: N802
        del self.memory[pointer]
        return (0,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:  # noqa: N802
        assert flags == self.cudaStreamNonBlocking
        return self._handle("stream")

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:  # noqa: N802
        return self._destroy(stream, "stream")

    def cudaEventCreate(self) -> tuple[int, int]:  # noqa: N802
        return self._handle("event")

    def cudaEventDestroy(self, event: int) -> tuple[int]:  # noqa: N802
        return self._destroy(event, "event")

    def cudaEventRecord(self, event: int, stream: int) -> tuple[int]:  # noqa: N802
        return (CAPTURE_REFUSED if self.recording is not None else 0,)

    def cudaEventSynchronize(self, event: int) -> tuple[int]:  # noqa: N802
        return self.cudaStreamSynchronize(0)

    def cudaEventElapsedTime(self, start: int, end: int) -> tuple[int, float]:  # noqa: N802
        return 0, 1.25

    def cudaMemcpyAsync(  # noqa: N802
        self, to: int, source: int, size: int, kind: int, stream: int
    ) -> tuple[int]:
        if self.recording is not None:
            return (CAPTURE_REFUSED,)
        for pointer in (to, source):
            for start, buffer in self.memory.items():
                if start <= pointer < start + len(buffer) < pointer + size:
                    return (OUT_OF_BOUNDS,)
        if source in self.memory:
            self.queue.append(lambda: ctypes.memmove(to, source, size) and None)
        else:  # CUDA takes pageable memory before it returns
            taken = ctypes.string_at(source, size)
            self.queue.append(lambda: ctypes.memmove(to, taken, size) and None)
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:  # noqa: N802
        if self.recording is not None:
            return (CAPTURE_REFUSED,)
        for work in self.queue:
            work()
        self.queue.clear()
        return (0,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:  # noqa: N802
        self.recording, self.spoiled = [], False
        return (0,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, int | None]:  # noqa: N802
        recorded, self.recording = self.recording, None
        if self.spoiled or recorded is None:
            return CAPTURE_REFUSED, None
        code, graph = self._handle("graph")
        self.graphs[graph] = recorded
        return code, graph

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[int, int]:  # noqa: N802
        code, executable = self._handle("executable")
        self.graphs[executable] = self.graphs[graph]
        return code, executable

    def cudaGraphLaunch(self, executable: int, stream: int) -> tuple[int]:  # noqa: N802
        self.queue.extend(self.graphs[executable])
        return (0,)

    def cudaGraphDestroy(self, graph: int) -> tuple[int]:  # noqa: N802
        del self.graphs[graph]
        return self._destroy(graph, "graph")

    def cudaGraphExecDestroy(self, executable: int) -> tuple[int]:  # noqa: N802
        del self.graphs[executable]
        return self._destroy(executable, "executable")


class Device:
    """An array on the GPU, as torch would have one: what DLPack says of it, and its memory."""

    def __init__(self, cuda: Cuda, array: np.ndarray) -> None:
        array = np.ascontiguousarray(array)
        self.pointer = cuda.cudaMalloc(array.nbytes)[1]
        self.shape, self.dtype, self.nbytes = array.shape, array.dtype, array.nbytes
        self.strides: tuple[int, ...] | None = None
        ctypes.memmove(self.pointer, array.ctypes.data, array.nbytes)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def numpy(self) -> np.ndarray:
        data = ctypes.string_at(self.pointer, self.nbytes)
        return np.frombuffer(data, self.dtype).reshape(self.shape)


class View:
    """Plays cuda.core's StridedMemoryView, which asks the driver of every pointer."""

    streams: list[int] = []  # noqa: RUF012

    @classmethod
    def from_any_interface(cls, array: Device, stream_ptr: int) -> Any:
        cls.streams.append(stream_ptr)
        return types.SimpleNamespace(
            ptr=array.pointer, shape=array.shape, dtype=array.dtype, strides=array.strides
        )


def tensorrt(cuda: Cuda, profile: dict[str, Any], version: str = "10.3.0") -> types.ModuleType:
    """Return a module ``tensorrt``: enumerations, loggers and allocators are NVIDIA's own."""
    module = types.ModuleType("tensorrt")
    for name in ("ILogger", "IOutputAllocator", "TensorIOMode", "DataType", "nptype"):
        setattr(module, name, getattr(real, name))

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, data: bytes) -> Any:
            try:
                return Engine(cuda, onnx.load_from_string(data), profile, self.logger)
            except Exception:
                self.logger.log(real.ILogger.ERROR, "Serialization: the magic tag\nis wrong")
                return None

    module.Runtime, module.__version__ = Runtime, version  # type: ignore[attr-defined]
    return module


class Engine:
    """An engine: an ONNX file, and the shapes that it was built for."""

    device_memory_size_v2 = 4096

    def __init__(
        self, cuda: Cuda, graph: onnx.ModelProto, profile: dict[str, Any], logger: Any
    ) -> None:
        self.cuda, self.profile, self.logger = cuda, profile, logger
        self.session = onnxruntime.InferenceSession(
            graph.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        self.inputs = {each.name: describe_value(each) for each in graph.graph.input}
        self.outputs = {each.name: describe_value(each) for each in graph.graph.output}
        for each in self.session.get_outputs():  # a graph that shows its decisions tells no shape
            self.outputs[each.name]["shape"] = self.outputs[each.name]["shape"] or each.shape
        self.names = [*self.inputs, *self.outputs]
        self.num_io_tensors = len(self.names)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_dtype(self, name: str) -> Any:
        types_by_name = {"float32": real.float32, "int64": real.int64, "uint8": real.uint8}
        return types_by_name[{**self.inputs, **self.outputs}[name]["dtype"]]

    def get_tensor_mode(self, name: str) -> Any:
        return real.TensorIOMode.INPUT if name in self.inputs else real.TensorIOMode.OUTPUT

    def get_tensor_profile_shape(self, name: str, index: int) -> list[list[int]]:
        assert index == 0
        return [self.profile[name][which] for which in ("min", "opt", "max")]

    def create_execution_context(self) -> Any:
        return Context(self)


class Context:
    """What runs an engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.cuda = engine, engine.cuda
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.allocators: dict[str, Any] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, high = (self.engine.profile[name][which] for which in ("min", "max"))
        good = all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))
        if good:
            self.shapes[name] = shape
        else:
            self.engine.logger.log(real.ILogger.ERROR, f"{name} is outside the profile")
        return good

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        first, *rest = self.engine.outputs[name]["shape"]
        batch = first if isinstance(first, int) else self.shapes["images"][0]
        return (batch, *(size if isinstance(size, int) else -1 for size in rest))

    def get_max_output_size(self, name: str) -> int:
        most = [size if size > 0 else 197 for size in self.get_tensor_shape(name)]
        return math.prod(most) * np.dtype(self.engine.outputs[name]["dtype"]).itemsize

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address in self.cuda.memory

    def set_output_allocator(self, name: str, allocator: Any) -> bool:
        self.allocators[name] = allocator
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if self.cuda.recording is not None:
            if self.allocators:  # a size has to be read back
                self.cuda.spoiled = True
                self.engine.logger.log(real.ILogger.ERROR, "the stream is recording")
                return False
            self.cuda.recording.append(self._run)
            return True
        self.cuda.queue.append(self._run)
        if self.allocators:
            self.cuda.cudaStreamSynchronize(stream)
        return True

    def _run(self) -> None:
        feed = {
            name: np.frombuffer(
                ctypes.string_at(self.addresses[name], self._size(name)),
                self.engine.inputs[name]["dtype"],
            ).reshape(self.shapes[name])
            for name in self.engine.inputs
        }
        results = self.engine.session.run(list(self.engine.outputs), feed)
        for name, result in zip(self.engine.outputs, results, strict=True):
            pointer = self.addresses[name]
            if name in self.allocators:
                allocator = self.allocators[name]
                pointer = allocator.reallocate_output_async(name, pointer, result.nbytes, 256, 0)
                allocator.notify_shape(name, result.shape)
            assert result.nbytes <= len(self.cuda.memory[pointer])
            ctypes.memmove(pointer, np.ascontiguousarray(result).ctypes.data, result.nbytes)

    def _size(self, name: str) -> int:
        itemsize = np.dtype(self.engine.inputs[name]["dtype"]).itemsize
        return math.prod(self.shapes[name]) * itemsize
