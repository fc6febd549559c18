"""What config.pbtxt says: Triton's ModelConfig as nested dicts and lists, then as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simprune_deploy.common.errors import ArtifactError
from simprune_deploy.engine.engine_metadata import TENSORRT

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from simprune_deploy.onnx.metadata import ModelMetadata
    from simprune_deploy.parity.golden import Golden

LABELS = "labels.txt"

TYPES = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "int8": "TYPE_INT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
}
"""Triton's names of the types that inputs and outputs of ours may have, by numpy's."""


class _Word(str):
    """A value that stands in the configuration without quotes: an enumeration's member."""


def class_names(metadata: ModelMetadata, graph: onnx.ModelProto) -> list[str]:
    """Return the class names for Triton's classification; none if they are not known or not usable.

    Without batches of its own Triton takes the whole output for one picture's scores, which it is
    not if the graph takes several. Of a single output it would give the one name to every picture.
    """
    names = metadata.preprocessing.get("label_names")
    if metadata.num_classes == 1:
        return []
    if not isinstance(names, list) or len(names) != metadata.num_classes:
        return []
    if graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value > 1:
        return []
    return [" ".join(str(name).split()) for name in names]


def make_config(
    name: str,
    form: str,
    graph: onnx.ModelProto,
    metadata: ModelMetadata,
    most: int,
    golden: Golden | None,
) -> dict[str, Any]:
    """Return Triton's ModelConfig as nested dicts and lists.

    Args:
        name: The model's.
        form: "onnx" or "tensorrt".
        graph: What the inputs and outputs are read from.
        metadata: What the graph says of itself.
        most: The largest batch, if the graph's batch is free.
        golden: For the warm-up; None: there is none.
    """
    from simprune_deploy.onnx.metadata import describe_value

    inputs = [describe_value(value) for value in graph.graph.input]
    outputs = [describe_value(value) for value in graph.graph.output]
    # Triton batches along a first dimension that every tensor has and that is free
    batched = all(isinstance(each["shape"][0], str) for each in (*inputs, *outputs))
    high = most if batched else 0
    config: dict[str, Any] = {
        "name": name,
        "backend": "tensorrt" if form == TENSORRT else "onnxruntime",
        "max_batch_size": high,
        "input": [_tensor(each, batched) for each in inputs],
        "output": [_tensor(each, batched) for each in outputs],
    }
    if class_names(metadata, graph):
        for each in config["output"]:
            if each["name"] == metadata.output:
                each["label_filename"] = LABELS
    if form == TENSORRT:
        config["instance_group"] = [{"count": 1, "kind": _Word("KIND_GPU")}]
    else:
        # a GPU where the server has one, else the CPU
        config["instance_group"] = [{"count": 1, "kind": _Word("KIND_AUTO")}]
    if high > 1:
        config["dynamic_batching"] = {}
    if golden is not None:
        config["model_warmup"] = _warmup(config, golden)
    return config


def _tensor(value: dict[str, Any], batched: bool) -> dict[str, Any]:
    try:
        data_type = TYPES[value["dtype"]]
    except KeyError:
        raise ArtifactError(
            f"{value['name']} is {value['dtype']}, which Triton does not serve: export again"
        ) from None
    dims = [-1 if isinstance(size, str) else size for size in value["shape"][batched:]]
    tensor = {"name": value["name"], "data_type": _Word(data_type), "dims": dims or [1]}
    if not dims:
        # one number for each image, float32[B]: requests cannot say "nothing", so they say [B, 1]
        tensor["reshape"] = {"shape": []}
    return tensor


# --- warm-up --------------------------------------------------------------------------------------


def _warmup(config: dict[str, Any], golden: Golden) -> list[dict[str, Any]]:
    """Return the warm-up requests: every golden image alone, and a full batch of the first."""

    def sample(name: str, index: int, batch: int) -> dict[str, Any]:
        inputs = [
            {
                "key": each["name"],
                "value": {
                    "data_type": each["data_type"],
                    "dims": _warmup_array(each, golden, index).shape,
                    "input_data_file": f"{each['name']}_{index}",
                },
            }
            for each in config["input"]
        ]
        return {"name": name, "batch_size": batch, "inputs": inputs}

    most = config["max_batch_size"]
    if most == 0:
        return [sample("golden images", 0, 1)]
    samples = [sample(f"golden image {i}", i, 1) for i in range(len(golden.images))]
    if most > 1:
        samples.append(sample(f"batch of {most}", 0, most))
    return samples


def _warmup_array(tensor: dict[str, Any], golden: Golden, index: int) -> np.ndarray:
    """Return what one request sends for an input, without the batch dimension if Triton adds it."""
    import numpy as np

    values = golden.thresholds if tensor["name"] == "threshold" else golden.images
    whole = tensor["dims"]
    if len(whole) < values.ndim or "reshape" in tensor:
        return np.ascontiguousarray(values[index]).reshape(whole)
    if whole == [-1]:
        return values[:1]
    # a fixed batch: as many images as it takes, the golden ones over and over
    return np.ascontiguousarray(values[np.arange(whole[0]) % len(values)]).reshape(whole)


def write_warmup(folder: Path, config: dict[str, Any], golden: Golden) -> None:
    """Write the files that the warm-up requests name: raw little-endian values."""
    folder.mkdir()
    count = len(golden.images) if config["max_batch_size"] else 1
    for tensor in config["input"]:
        for index in range(count):
            array = _warmup_array(tensor, golden, index)
            path = folder / f"{tensor['name']}_{index}"
            path.write_bytes(array.astype(array.dtype.newbyteorder("<")).tobytes())


# --- text ---------------------------------------------------------------------------------------


def render(values: dict[str, Any], indent: str = "") -> str:
    """Write nested dicts and lists in protobuf's text format."""
    lines = []
    for name, value in values.items():
        for each in value if _is_repeated_message(value) else [value]:
            if isinstance(each, dict):
                inside = render(each, indent + "  ")
                lines.append(f"{indent}{name} {{\n{inside}{indent}}}\n")
            else:
                lines.append(f"{indent}{name}: {_scalar(each)}\n")
    return "".join(lines)


def _is_repeated_message(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _scalar(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_scalar(each) for each in value)}]"
    if isinstance(value, str) and not isinstance(value, _Word):
        return json.dumps(value)
    return str(value)
