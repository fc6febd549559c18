"""The model that is swept: a checkpoint in PyTorch, or an exported graph."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.tune.results import OURS, Setting

if TYPE_CHECKING:
    import onnx

    from simprune_deploy.onnx.metadata import ModelMetadata
    from simprune_deploy.pruning.model import PrunedViT


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model, and what is known of it.

    Attributes:
        source: What the user gave.
        metadata: Input, preprocessing, shape and classes; of a checkpoint, as an export would say.
        sha256: Of the weights (checkpoint) or of the ONNX file.
        model: Of a checkpoint; None for an export.
        graph: Of an export; None for a checkpoint.
    """

    source: str
    metadata: ModelMetadata
    sha256: str
    model: PrunedViT | None = None
    graph: onnx.ModelProto | None = None

    @property
    def runtime_threshold(self) -> bool:
        """Whether one graph serves every threshold."""
        return self.graph is None or bool(self.metadata.export["runtime_threshold"])

    @property
    def setting(self) -> Setting:
        """The setting that an export was made with."""
        pruning = self.metadata.pruning
        return Setting(
            OURS,
            pruning.threshold,
            pruning.layers,
            pruning.selection,
            pruning.reduction,
            pruning.capacities or None,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what a report says of the model."""
        metadata = self.metadata
        return {
            "architecture": metadata.architecture or "(unnamed)",
            "source": self.source,
            "kind": "exported graph" if self.graph is not None else "checkpoint",
            "sha256": self.sha256,
            "image_size": list(metadata.image_size),
            "num_classes": metadata.num_classes,
            "num_patches": metadata.num_patches,
            "num_prefix_tokens": metadata.num_prefix_tokens,
            "depth": metadata.depth,
            "parameters": metadata.parameters,
            "precision": metadata.precision,
            "proportional_attention": metadata.pruning.proportional_attention,
            "multiple_of": metadata.pruning.multiple_of,
        }


def subject_of_model(source: str, model: Any) -> Subject:
    """Return a checkpoint's model, pruned or not, as the subject of a sweep."""
    from simprune_deploy.onnx.exporter import ExportOptions, metadata_of_model
    from simprune_deploy.pruning.model import prune

    pruned = prune(model)
    pruned.eval()
    digest = hashlib.sha256()
    for name, tensor in sorted(pruned.vit.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return Subject(
        source, metadata_of_model(pruned, ExportOptions()), digest.hexdigest(), model=pruned
    )


def subject_of_export(path: Path) -> Subject:
    """Return an exported folder, or the ONNX file of one, as the subject of a sweep.

    Raises:
        SimpruneError: it is damaged, or prunes nowhere.
    """
    from simprune_deploy.common.files import sha256
    from simprune_deploy.onnx.exported_folder import MODEL, read_manifest
    from simprune_deploy.onnx.metadata import load_graph, read_metadata

    file = path
    if path.is_dir():
        read_manifest(path)
        file = path / MODEL
    graph = load_graph(file)
    metadata = read_metadata(graph)
    if not metadata.pruning.layers:
        raise SimpruneError(f"{path} is a dense model without prune layers: sweep its checkpoint")
    return Subject(str(path), metadata, sha256(file), graph=graph)


def is_export(path: Path) -> bool:
    """Tell an exported folder or ONNX file from a checkpoint."""
    from simprune_deploy.onnx.exported_folder import MANIFEST

    return (path / MANIFEST).is_file() or (path.is_file() and path.suffix == ".onnx")
