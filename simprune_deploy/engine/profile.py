"""The shapes that an engine takes: the graph's own, narrowed to what the user wants."""

from __future__ import annotations

from typing import TYPE_CHECKING

from simprune_deploy.common.errors import (
    ArtifactError,
    InvalidArgumentError,
    argument,
)
from simprune_deploy.engine.engine_metadata import Profile

if TYPE_CHECKING:
    import onnx


def optimization_profile(
    graph: onnx.ModelProto,
    batch: tuple[int, int],
    wish: tuple[int, int] | None = None,
    opt_batch: int | None = None,
) -> Profile:
    """Return the shapes an engine takes and the one it is tuned for.

    A run-time threshold is one number for all images, or one for each.

    Args:
        graph: The exported graph.
        batch: The smallest and the largest batch that it takes.
        wish: A part of that range. Default: all of it.
        opt_batch: The batch to tune for. Default: the smallest.

    Raises:
        SimpruneError: an input has a free dimension that is not its first, or the wish is outside
            what the graph takes.
    """
    low, high = wish or batch
    if not batch[0] <= low <= high <= batch[1]:
        raise InvalidArgumentError(
            f"{argument('batch')} {low}..{high} is outside {batch[0]}..{batch[1]}, which the graph "
            f"takes: "
            f"choose from that range, or export again with another {argument('batch')}"
        )
    opt = low if opt_batch is None else opt_batch
    if not low <= opt <= high:
        raise InvalidArgumentError(
            f"{argument('opt_batch')} {opt} is outside the batches {low}..{high}"
        )
    profile: Profile = {}
    for value in graph.graph.input:
        dims = list(value.type.tensor_type.shape.dim)
        if any(dim.dim_param or dim.dim_value < 1 for dim in dims[1:]):
            raise ArtifactError(
                f"the ONNX input {value.name!r} has a free dimension beside the batch, which "
                "engines cannot take: export again"
            )
        fixed = [dim.dim_value for dim in dims[1:]]
        if dims and (dims[0].dim_param or dims[0].dim_value < 1):
            first = (1, 1, high) if value.name == "threshold" else (low, opt, high)
        else:
            first = (dims[0].dim_value,) * 3 if dims else (0, 0, 0)
        profile[value.name] = {
            which: ([size, *fixed] if dims else [])
            for which, size in zip(("min", "opt", "max"), first, strict=True)
        }
    return profile


def free_inputs(graph: onnx.ModelProto) -> set[str]:
    """Return the inputs with a free dimension: those whose shapes a builder has to be told."""
    return {
        value.name
        for value in graph.graph.input
        if any(dim.dim_param or dim.dim_value < 1 for dim in value.type.tensor_type.shape.dim)
    }


def batch_of(profile: Profile) -> tuple[int, int]:
    """Return the smallest and the largest batch of a profile."""
    images = profile["images"]
    return images["min"][0], images["max"][0]
