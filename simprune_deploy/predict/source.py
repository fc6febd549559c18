"""What a user names as a model, resolved once: a checkpoint's model, or an export of ours."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from simprune_deploy.checkpoints.options import CheckpointOptions, for_checkpoints
from simprune_deploy.common.errors import ArtifactError, InvalidArgumentError, argument
from simprune_deploy.common.files import sha256
from simprune_deploy.common.transforms import PREPROCESSING
from simprune_deploy.onnx.exported_folder import MANIFEST, MODEL, read_manifest
from simprune_deploy.onnx.metadata import ModelMetadata, load_graph, read_metadata

if TYPE_CHECKING:
    import onnx

    from simprune_deploy.predict.predictor import Form, PredictorSpec, Provider
    from simprune_deploy.pruning.model import PrunedViT


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model, and what is known of it.

    Attributes:
        name: What the user gave.
        metadata: Input, preprocessing, shape and classes; of a checkpoint, as an export would say.
        model: Of a checkpoint; None for an export.
        graph: Of an export, as the file has it; None for a checkpoint.
        file: The ONNX file of an export; None for a checkpoint.
        manifest: Of an exported folder; None without one.
    """

    name: str
    metadata: ModelMetadata
    model: PrunedViT | None = None
    graph: onnx.ModelProto | None = None
    file: Path | None = None
    manifest: dict[str, Any] | None = None

    @property
    def kind(self) -> Literal["exported graph", "checkpoint"]:
        return "checkpoint" if self.graph is None else "exported graph"

    @property
    def folder(self) -> Path | None:
        """The folder of an export: its golden cases, engines and plugin are there."""
        return None if self.file is None else self.file.parent

    @property
    def runtime_threshold(self) -> bool:
        """Whether one graph serves every threshold."""
        return self.graph is None or bool(self.metadata.export["runtime_threshold"])

    @functools.cached_property
    def sha256(self) -> str:
        """Of the weights (checkpoint) or of the ONNX file."""
        if self.model is not None:
            from simprune_deploy.predict.torch_predictor import sha256_of_weights

            return sha256_of_weights(self.model)
        assert self.file is not None
        return sha256(self.file)

    def spec(
        self,
        form: Form = "pruned",
        *,
        provider: Provider = "cpu",
        threads: int | None = None,
        keep_memory: bool = True,
        fused: bool = False,
    ) -> PredictorSpec:
        """Return what opens the model where it is at home: PyTorch, or ONNX Runtime.

        Args:
            form: Default "pruned".
            provider, threads, keep_memory, fused: Of ONNX Runtime; see
                :class:`simprune_deploy.predict.onnx_predictor.OnnxSpec`.
        """
        if self.model is not None:
            from simprune_deploy.predict.torch_predictor import TorchSpec

            return TorchSpec(self.model, self.metadata, form)
        from simprune_deploy.predict.onnx_predictor import OnnxSpec

        assert self.graph is not None
        graph = self.graph.SerializeToString()
        return OnnxSpec(graph, form, provider, threads, keep_memory, fused)


def source_of_model(name: str, model: Any) -> ModelSource:
    """Return a checkpoint's model, pruned or not, as a source.

    Args:
        name: What the user called it.
        model: A timm model, which prunes nowhere, or a pruned one.
    """
    from simprune_deploy.onnx.exporter import ExportOptions, metadata_of_model
    from simprune_deploy.pruning.config import PruneConfig
    from simprune_deploy.pruning.model import PrunedViT

    pruned = model if isinstance(model, PrunedViT) else PrunedViT(model, PruneConfig())
    pruned.eval()
    return ModelSource(name, metadata_of_model(pruned, ExportOptions()), model=pruned)


def source_of_export(path: Path) -> ModelSource:
    """Return an exported folder, or an ONNX file of one, as a source.

    Args:
        path: The folder, whose files are checked against its manifest, or the file.

    Raises:
        SimpruneError: it is damaged, or was not made by simprune-deploy.
    """
    manifest, file = None, path
    if path.is_dir():
        manifest, file = read_manifest(path), path / MODEL
    graph = load_graph(file)
    metadata = read_metadata(graph)
    if metadata.is_inlined:
        raise ArtifactError(
            f"{file} shows no decisions, since it has no prune nodes: give {MODEL}, or the folder"
        )
    return ModelSource(str(path), metadata, graph=graph, file=file, manifest=manifest)


def open_source(
    model: Any, options: CheckpointOptions | None = None, *, prune: bool = False
) -> ModelSource:
    """Return whatever names a model as a source.

    Args:
        model: A path of an export, a checkpoint's (or a name to download, with
            ``options.pretrained``), a timm or pruned model, or a source.
        options: How a checkpoint is loaded. Default: :class:`CheckpointOptions`'s defaults.
        prune: Give a model that prunes nowhere the default prune layers. Default False.

    Raises:
        SimpruneError: it cannot be read, or the options are for checkpoints and it is none.
    """
    if isinstance(model, ModelSource):
        return model
    options = options or CheckpointOptions()
    name = "the model"
    if isinstance(model, (str, Path)):
        name = str(model)
        if not options.pretrained and is_export(Path(model)):
            if options.given:
                raise for_checkpoints(options, f"{model}, an export,")
            return source_of_export(Path(model))
        from simprune_deploy.checkpoints.loading import load_checkpoint

        model = load_checkpoint(name, options).model
    elif options.given:
        raise for_checkpoints(options)
    if prune:
        from simprune_deploy.pruning.model import prune as with_prune_layers

        model = with_prune_layers(model)
    return source_of_model(name, model)


def as_exported(options: CheckpointOptions, metadata: ModelMetadata) -> CheckpointOptions:
    """Return how the checkpoint of an export is loaded, to be compared with the export.

    What the user does not say is as the export says it: the architecture, its arguments, the image
    size, the pooling, and how pictures are prepared.
    """
    if said_of_pictures := [argument(name) for name in options.preprocessing]:
        raise InvalidArgumentError(
            f"{', '.join(said_of_pictures)}: the export says how its pictures are prepared, and "
            "its checkpoint is fed the same: leave out, or export again"
        )
    height, width = metadata.image_size
    pooling = metadata.model_args.get("global_pool")
    said = {**metadata.preprocessing, "global_pool": pooling, "arch": metadata.architecture or None}
    names = ("arch", "global_pool", *PREPROCESSING)
    left = {name: said[name] for name in names if name not in options.given and said.get(name)}
    return dataclasses.replace(
        options,
        **left,
        img_size=height if height == width else (height, width),
        model_kwargs={**_shape_arguments(metadata), **options.model_kwargs},
    )


def _shape_arguments(metadata: ModelMetadata) -> dict[str, Any]:
    """Return the arguments that the model was built with, but for what the weights say best."""
    own = ("img_size", "num_classes", "in_chans", "global_pool")
    return {name: value for name, value in metadata.model_args.items() if name not in own}


def is_export(path: Path) -> bool:
    """Tell an exported folder or ONNX file from a checkpoint."""
    return (path / MANIFEST).is_file() or (path.is_file() and path.suffix == ".onnx")
