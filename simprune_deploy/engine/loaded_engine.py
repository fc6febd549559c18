"""Run an engine: arrays in, arrays out, on a CUDA stream, replayed as a CUDA graph if wanted.

For a program that uses an engine. The parity check and the builds go through Polygraphy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from simprune_deploy.common.errors import (
    ArtifactError,
    InvalidArgumentError,
    SimpruneError,
    ToolFailedError,
    argument,
)
from simprune_deploy.engine import cuda, flavours
from simprune_deploy.engine.builders import this_machine
from simprune_deploy.engine.compatibility import check_fits
from simprune_deploy.engine.engine_metadata import read_engine_metadata
from simprune_deploy.engine.loading import load, make_allocator, make_context, reason
from simprune_deploy.engine.tensors import Shape, check_inputs, tensors_of


@dataclasses.dataclass(frozen=True)
class Memory:
    """What an engine takes of the GPU's memory, in bytes.

    Attributes:
        scratch: For what lies between its layers, as TensorRT says.
        arrays: Our buffers for its inputs and outputs.
        taken: By how much the free memory fell while it was loaded: weights, code, scratch,
            buffers. What other programs did meanwhile is in it.
    """

    scratch: int
    arrays: int
    taken: int


class Engine:
    """A TensorRT or TensorRT-RTX engine, loaded and ready to run. Not for several threads at once.

    Args:
        path: The engine file; its metadata lies beside it.
        plugin: The plugin's library, if the engine has the plugin in it. Default None.
        stream: The handle of a CUDA stream to run on, such as
            ``torch.cuda.current_stream().cuda_stream``. Default: a stream of its own.
        cuda_graph: Record the launches once for each new input shape, then replay them. For
            engines with fixed token counts (``--tokens K``), and unpruned ones; TensorRT-RTX,
            which records by itself, leaves out what it cannot record. Default False.

    Attributes:
        metadata: What the metadata says.
        inputs, outputs: The engine's tensors, by name.
        memory: What it takes.

    Raises:
        SimpruneError: it does not fit this machine, or cannot be loaded.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        plugin: str | Path | None = None,
        stream: int | None = None,
        cuda_graph: bool = False,
    ) -> None:
        if cuda_graph and stream is not None and stream in (0, cuda.LEGACY_DEFAULT_STREAM):
            raise InvalidArgumentError(
                "a CUDA graph cannot be recorded on stream 0: give another stream"
            )
        path = Path(path)
        library = Path(plugin) if plugin is not None else None
        self.metadata = read_engine_metadata(path)
        check_fits(self.metadata, this_machine(self.metadata.flavour, library))
        cuda.check_bindings()
        trt = flavours.load_module(self.metadata.flavour)
        if self.metadata.plugin is not None and library is not None:
            flavours.load_plugin(trt, self.metadata.flavour, library)
        free = cuda.call("cudaMemGetInfo")[0]
        with contextlib.ExitStack() as stack:
            self._stream = cuda.new_stream(stack) if stream is None else stream
            self._waits = stream is None  # nobody else can wait on a stream of our own
            self._errors: list[str] = []
            self._logger = flavours.error_logger(trt, self._errors)
            self._runtime = trt.Runtime(self._logger)
            self._engine = load(self._runtime, self._errors, path, self.metadata.title)
            context, records_itself = make_context(trt, self._engine, cuda_graph)
            self._context = self._checked("no context", context)
            self._start, self._end = cuda.new_event(stack), cuda.new_event(stack)
            self._graph = cuda.Graph(stack) if cuda_graph and not records_itself else None
            self._shapes: dict[str, Shape] = {}
            self.inputs, self.outputs = tensors_of(trt, self._engine)
            self._buffers = self._bind(stack)
            self._allocators = self._bind_unknown_sizes(trt)
            self._resources = stack.pop_all()
        # without close() the memory goes with the object
        self._finalizer = weakref.finalize(self, self._resources.close)
        self.memory = Memory(
            scratch=flavours.device_memory(self._engine),
            arrays=sum(size for _, size in self._buffers.values()),
            taken=free - cuda.call("cudaMemGetInfo")[0],
        )

    def run(
        self, inputs: Mapping[str, Any], outputs: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Run the engine on numpy arrays, torch tensors or other arrays with ``__dlpack__``.

        Args:
            inputs: By name, in the dtypes of :attr:`inputs`: ``images``, and ``threshold`` if
                the export has one.
            outputs: Arrays to write results into, by name; on the GPU or not. Default: none.

        Returns:
            The outputs, by name: the arrays given for them, or new numpy arrays. On a stream of
            the engine's own they are there on return. On a stream that was given, results on the
            GPU are queued, and numpy results are there.

        Raises:
            SimpruneError: an array does not fit, or TensorRT or CUDA fails.
        """
        if not self._finalizer.alive:
            raise ArtifactError("the engine is closed: load it again")
        self._errors.clear()
        given = {name: cuda.view(name, array, self._stream) for name, array in inputs.items()}
        shapes = {name: (each.shape, each.dtype) for name, each in given.items()}
        check_inputs(list(self.inputs.values()), shapes)
        self._set_shapes({name: shape for name, (shape, _) in shapes.items()})
        results, targets = self._targets(outputs or {})
        for name, each in given.items():
            cuda.copy(self._buffers[name][0], each.pointer, _bytes(each), self._stream)
        cuda.call("cudaEventRecord", self._start, self._stream)
        self._launch()
        cuda.call("cudaEventRecord", self._end, self._stream)
        if self._allocators:  # the sizes are known when the work is done
            cuda.call("cudaStreamSynchronize", self._stream)
            for name, allocator in self._allocators.items():
                results[name] = np.empty(allocator.shape, self.outputs[name].dtype)
                targets[name] = cuda.view(name, results[name], self._stream, writable=True)
        for name, each in targets.items():
            cuda.copy(each.pointer, self._buffers[name][0], _bytes(each), self._stream)
        if self._waits or any(isinstance(each.owner, np.ndarray) for each in targets.values()):
            cuda.call("cudaStreamSynchronize", self._stream)
        return results

    @property
    def milliseconds(self) -> float:
        """How long the GPU worked on the last run, copies apart, by CUDA's events; waits for it."""
        cuda.call("cudaEventSynchronize", self._end)
        return float(cuda.call("cudaEventElapsedTime", self._start, self._end))

    def close(self) -> None:
        """Wait for the GPU and give back what the engine took of it."""
        if self._finalizer.alive:
            with contextlib.suppress(SimpruneError):
                cuda.call("cudaStreamSynchronize", self._stream)
            self._context = self._engine = self._runtime = None
            self._finalizer()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _set_shapes(self, shapes: dict[str, Shape]) -> None:
        if shapes == self._shapes:
            return
        self._shapes = {}
        for name, shape in shapes.items():
            self._checked(f"no shape {list(shape)}", self._context.set_input_shape(name, shape))
        self._shapes = shapes
        if self._graph is not None:
            self._graph.forget()

    def _bind(self, stack: contextlib.ExitStack) -> dict[str, tuple[int, int]]:
        """Give every tensor memory for its largest shape, once: graphs keep the addresses."""
        self._set_shapes({name: tensor.largest for name, tensor in self.inputs.items()})
        buffers = {}
        for name, tensor in {**self.inputs, **self.outputs}.items():
            size = (
                math.prod(tensor.largest) * tensor.dtype.itemsize
                if name in self.inputs
                else int(self._context.get_max_output_size(name))
            )
            buffers[name] = (cuda.new_buffer(stack, size), size)
            self._checked(
                f"no address of {name}", self._context.set_tensor_address(name, buffers[name][0])
            )
        return buffers

    def _bind_unknown_sizes(self, trt: Any) -> dict[str, Any]:
        """Outputs whose size depends on the images tell it while they are computed."""
        allocators = {}
        for name in self.outputs:
            if -1 in tuple(self._context.get_tensor_shape(name)):
                allocators[name] = make_allocator(trt, *self._buffers[name])
                self._context.set_output_allocator(name, allocators[name])
        return allocators

    def _targets(self, outputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, cuda.View]]:
        """Return the arrays that results go into, and their memory."""
        for name in outputs:
            if name not in self.outputs or name in self._allocators:
                known = ", ".join(name for name in self.outputs if name not in self._allocators)
                raise InvalidArgumentError(f"the output {name} cannot be written to: give {known}")
        results, targets = {}, {}
        for name, tensor in self.outputs.items():
            if name in self._allocators:
                continue
            shape = tuple(self._context.get_tensor_shape(name))
            array = outputs[name] if name in outputs else np.empty(shape, tensor.dtype)
            target = cuda.view(name, array, self._stream, writable=True)
            if (target.shape, target.dtype) != (shape, tensor.dtype):
                raise InvalidArgumentError(
                    f"the array for {name} is {target.dtype}{list(target.shape)}, and the engine "
                    f"gives {tensor.dtype}{list(shape)}"
                )
            results[name], targets[name] = array, target
        return results, targets

    def _launch(self) -> None:
        if self._graph is None:
            self._enqueue()
            return
        try:
            self._graph.launch(self._stream, self._enqueue)
        except SimpruneError as error:
            raise ArtifactError(
                f"no CUDA graph can be recorded of this engine: {error}; they need token counts "
                f"that do not depend on the image (export with {argument('tokens', 'K')})"
            ) from error

    def _enqueue(self) -> None:
        self._checked("it does not run", self._context.execute_async_v3(self._stream))

    def _checked(self, what: str, result: Any) -> Any:
        """Return what TensorRT gave; raise with its own last error if that is a no."""
        if result is None or result is False:
            raise ToolFailedError(f"{self.metadata.title}, {what}: {reason(self._errors)}")
        return result


def _bytes(view: cuda.View) -> int:
    return math.prod(view.shape) * view.dtype.itemsize
