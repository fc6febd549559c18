"""An engine's inputs and outputs, and which arrays it takes. No GPU is needed to say."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from simprune_deploy.common.errors import InvalidArgumentError, argument

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An input or output of an engine.

    Attributes:
        name: Its name.
        dtype: As in numpy.
        smallest, largest: The shapes that an input takes. Empty for an output.
    """

    name: str
    dtype: np.dtype[Any]
    smallest: Shape = ()
    largest: Shape = ()


def tensors_of(trt: Any, engine: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a TensorRT engine's inputs, with the shapes of its first profile, and outputs."""
    inputs, outputs = {}, {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        dtype = np.dtype(trt.nptype(engine.get_tensor_dtype(name)))
        if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
            low, _, high = (tuple(each) for each in engine.get_tensor_profile_shape(name, 0))
            inputs[name] = Tensor(name, dtype, low, high)
        else:
            outputs[name] = Tensor(name, dtype)
    return inputs, outputs


def check_inputs(tensors: Sequence[Tensor], given: Mapping[str, tuple[Shape, Any]]) -> None:
    """Refuse inputs that an engine does not take.

    Args:
        tensors: Its inputs; the first one has the batch.
        given: By name, shape and dtype.

    Raises:
        SimpruneError: one is missing, unknown, of another type, or of a shape outside the profile.
    """
    names = [tensor.name for tensor in tensors]
    if set(names) != set(given):
        raise InvalidArgumentError(
            f"the inputs {', '.join(given) or 'none'} were given, and the engine takes "
            f"{', '.join(names)}"
        )
    for tensor in tensors:
        shape, dtype = given[tensor.name]
        if dtype != tensor.dtype:
            raise InvalidArgumentError(
                f"{tensor.name} is {dtype}, and the engine takes {tensor.dtype}"
            )
        ranges = list(zip(tensor.smallest, tensor.largest, strict=True))
        if len(shape) != len(ranges) or shape[1:] != tensor.largest[1:]:
            wanted = ", ".join(f"{a}" if a == b else f"{a}..{b}" for a, b in ranges)
            raise InvalidArgumentError(
                f"{tensor.name} is {list(shape)}, and the engine takes [{wanted}]"
            )
        if shape and not ranges[0][0] <= shape[0] <= ranges[0][1]:
            low, high = ranges[0]
            raise InvalidArgumentError(
                f"{shape[0]} rows of {tensor.name} are outside {low}..{high}, which the engine was "
                f"built for: split the batch, or export with another {argument('batch')} and build "
                f"again"
            )
    batch = given[names[0]][0][:1]
    for name in names[1:]:
        rows = given[name][0][:1]
        if rows not in ((), (1,), batch):
            raise InvalidArgumentError(
                f"{name} has {rows[0]} values for {batch[0]} images: give one, or one for each"
            )
