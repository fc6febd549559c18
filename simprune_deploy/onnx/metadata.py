"""The facts an exported file carries about itself, written and read. No torch needed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import onnx

from simprune_deploy.common.errors import ArtifactError, InvalidArgumentError
from simprune_deploy.common.images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    INTERPOLATIONS,
    Preprocessing,
    fit_to_channels,
)
from simprune_deploy.onnx.function_body import DOMAIN, DOMAIN_VERSION
from simprune_deploy.pruning.config import PruneConfig
from simprune_deploy.pruning.cost import BlockShape

METADATA_KEY = "simprune"
InputForm = Literal["float32-nchw", "uint8-nhwc"]
FLOAT32_NCHW: InputForm = "float32-nchw"
UINT8_NHWC: InputForm = "uint8-nhwc"
INPUT_FORMS = (FLOAT32_NCHW, UINT8_NHWC)
"""How a graph takes its images: [B, C, H, W], or as a camera gives them, [B, H, W, C]."""

HAS_FUNCTION = "function"
"""The key among a file's export facts that says False where the operator's function was left out;
a file with the function has no such key."""

INLINED = "inlined"
"""The key among a file's export facts that says True where the prune nodes were replaced by the
function's body; other files have no such key."""


def check_input(name: str) -> None:
    """Refuse a name that is not a form of input.

    Raises:
        SimpruneError: it is not.
    """
    if name not in INPUT_FORMS:
        raise InvalidArgumentError(f"input {name!r} is not known: use {' or '.join(INPUT_FORMS)}")


@dataclasses.dataclass(frozen=True)
class ModelMetadata:
    """What an exported model says of itself.

    Attributes:
        architecture: timm's name.
        model_args: What it was built with, beside the name.
        preprocessing: mean, std, interpolation, crop, as in timm's configurations.
        pruning: The configuration in the graph (no layers: the dense model).
        export: The export options: opset, batch, runtime_threshold, normalize, softmax, ...
        output: Name of the main output.
        num_classes: 0 if the output is features.
        num_prefix_tokens, num_patches, depth, channels: Of the model.
        image_size: Height and width in pixels.
        embed_dim, mlp_dim: Widths of a block; the MLP's as if it had two matrices.
        parameters: Number of weights.
        rounding: What 16 bits did to the weights; empty in float32.
    """

    architecture: str
    model_args: dict[str, Any]
    preprocessing: dict[str, Any]
    pruning: PruneConfig
    export: dict[str, Any]
    output: str
    num_classes: int
    num_prefix_tokens: int
    num_patches: int
    depth: int
    channels: int
    image_size: tuple[int, int]
    embed_dim: int
    mlp_dim: int
    parameters: int
    rounding: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def precision(self) -> str:
        """ "fp32", "fp16" or "bf16"; files from before there was a choice are float32."""
        return str(self.export.get("precision", "fp32"))

    @property
    def input(self) -> str:
        """The form of the images, one of INPUT_FORMS; float in files from before the choice."""
        return str(self.export.get("input", FLOAT32_NCHW))

    @property
    def takes_uint8(self) -> bool:
        return self.input == UINT8_NHWC

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """An image's shape, as the graph takes it."""
        height, width = self.image_size
        if self.takes_uint8:
            return height, width, self.channels
        return self.channels, height, width

    @property
    def image_dtype(self) -> str:
        """numpy's name of the images' type, as the graph takes them."""
        return "uint8" if self.takes_uint8 else "float32"

    @property
    def has_function(self) -> bool:
        """Whether the file brings the operator's function; without it a runtime needs a plugin."""
        return bool(self.export.get(HAS_FUNCTION, True))

    @property
    def is_inlined(self) -> bool:
        """Whether standard operators stand in the place of the prune nodes."""
        return bool(self.export.get(INLINED, False))

    @property
    def num_tokens(self) -> int:
        return self.num_prefix_tokens + self.num_patches

    @property
    def block(self) -> BlockShape:
        return BlockShape(self.embed_dim, self.mlp_dim)

    @property
    def batch(self) -> tuple[int, int]:
        low, high = self.export["batch"]
        return int(low), int(high)

    @property
    def mean(self) -> list[float]:
        return [float(value) for value in self.preprocessing["mean"]]

    @property
    def std(self) -> list[float]:
        return [float(value) for value in self.preprocessing["std"]]

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as JSON types."""
        return {
            **dataclasses.asdict(self),
            "pruning": self.pruning.to_dict(),
            "image_size": list(self.image_size),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelMetadata:
        """Build facts from :meth:`to_dict`'s result."""
        missing = {"opset", "batch", "runtime_threshold", "normalize", "softmax"} - set(
            values["export"]
        )
        if missing:
            raise KeyError(f"export options {', '.join(sorted(missing))}")
        return cls(
            **{
                **values,
                "pruning": PruneConfig.from_dict(values["pruning"]),
                "image_size": tuple(values["image_size"]),
            }
        )


def preprocessing_of(metadata: ModelMetadata) -> Preprocessing:
    """Return what an exported model wants of pictures, from what it says of itself."""
    known = metadata.preprocessing
    height, width = metadata.image_size
    interpolation = known.get("interpolation")
    return Preprocessing(
        channels=metadata.channels,
        height=height,
        width=width,
        mean=fit_to_channels("mean", known.get("mean") or IMAGENET_MEAN, metadata.channels),
        std=fit_to_channels("std", known.get("std") or IMAGENET_STD, metadata.channels),
        interpolation=interpolation if interpolation in INTERPOLATIONS else "bicubic",
        crop_pct=float(known.get("crop_pct") or 0.875),
        crop_mode=known.get("crop_mode") or "center",
    )


def write_metadata(graph: onnx.ModelProto, metadata: ModelMetadata) -> None:
    """Put the metadata into the graph's metadata, in place of what was there."""
    del graph.metadata_props[:]
    entry = graph.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, json.dumps(metadata.to_dict())


def read_metadata(graph: onnx.ModelProto) -> ModelMetadata:
    """Read what :func:`write_metadata` wrote.

    Raises:
        SimpruneError: the model was not made by simprune-deploy, or not by this version of it, or
            its facts are damaged.
    """
    for entry in graph.metadata_props:
        if entry.key == METADATA_KEY:
            _check_operator_version(graph)
            try:
                return ModelMetadata.from_dict(json.loads(entry.value))
            except InvalidArgumentError as error:
                raise ArtifactError(
                    f"the ONNX model's pruning is not of version {DOMAIN_VERSION} of the operator "
                    f"({error}): export the model again"
                ) from error
            except (ValueError, KeyError, TypeError) as error:
                raise ArtifactError(f"the ONNX model's metadata is damaged: {error}") from error
    raise ArtifactError(
        "the ONNX model was not made by simprune-deploy: it has no metadata of ours"
    )


def _check_operator_version(graph: onnx.ModelProto) -> None:
    for entry in graph.opset_import:
        if entry.domain != DOMAIN or entry.version == DOMAIN_VERSION:
            continue
        if entry.version > DOMAIN_VERSION:
            raise ArtifactError(
                f"the ONNX model has version {entry.version} of the operator, and this "
                f"simprune-deploy knows {DOMAIN_VERSION}: update simprune-deploy"
            )
        raise ArtifactError(
            f"the ONNX model was exported before version {DOMAIN_VERSION} of the operator: export "
            "the model again"
        )


def describe_value(value: onnx.ValueInfoProto) -> dict[str, Any]:
    """Return name, numpy dtype and shape (numbers, or names of dynamic dimensions) of a value."""
    tensor = value.type.tensor_type
    return {
        "name": value.name,
        "dtype": onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name,
        "shape": [dim.dim_param or dim.dim_value for dim in tensor.shape.dim],
    }


def load_graph(path: Path) -> onnx.ModelProto:
    """Read an ONNX file.

    Raises:
        SimpruneError: it is missing, or not an ONNX model.
    """
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(path, format="protobuf")
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist") from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}") from error
    except DecodeError:
        raise ArtifactError(f"{path} is not an ONNX model, or is damaged") from None
    if not graph.graph.node:
        raise ArtifactError(f"{path} is not an ONNX model, or is damaged")
    return graph
