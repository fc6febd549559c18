"""Loading an engine with either TensorRT, and what TensorRT calls back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from simprune_deploy.common.errors import ArtifactError
from simprune_deploy.engine.tensors import Shape


def load(runtime: Any, errors: list[str], path: Path, title: str) -> Any:
    """Deserialize an engine file.

    Raises:
        SimpruneError: TensorRT does not take it, with its reason.
    """
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise ArtifactError(f"{title} does not load {path}: {reason(errors)}")
    return engine


def make_context(trt: Any, engine: Any, cuda_graph: bool) -> tuple[Any, bool]:
    """Return an execution context, or None, and whether it records CUDA graphs by itself.

    TensorRT-RTX does, if it is asked to; recording its streams from outside would take engines
    that were built for that.
    """
    if not cuda_graph or not hasattr(trt, "CudaGraphStrategy"):
        return engine.create_execution_context(), False
    config = engine.create_runtime_config()
    config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    return engine.create_execution_context(config), True


def reason(errors: list[str]) -> str:
    """Return the first of TensorRT's errors, which the others follow from."""
    return errors[0][:300] if errors else "it gave no reason"


def make_allocator(trt: Any, pointer: int, size: int) -> Any:
    """Return what TensorRT asks for memory of an output, once it knows how much it needs."""

    class Allocator(trt.IOutputAllocator):
        def __init__(self) -> None:
            super().__init__()
            self.shape: Shape = ()

        def reallocate_output_async(
            self, name: str, memory: int, wanted: int, alignment: int, stream: int
        ) -> int | None:
            return pointer if wanted <= size else None

        def reallocate_output(
            self, name: str, memory: int, wanted: int, alignment: int
        ) -> int | None:
            return pointer if wanted <= size else None

        def notify_shape(self, name: str, shape: Any) -> None:
            self.shape = tuple(shape)

    return Allocator()
