"""Model repositories for Triton Inference Server: the ONNX file or a TensorRT engine, to be served.

What the configuration must be like was read in Triton's sources (core, onnxruntime_backend,
tensorrt_backend); docs/triton.md says which parts of it a real server has taken in the tests.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simprune_deploy.common.errors import ArtifactError, InvalidArgumentError, argument, spelled
from simprune_deploy.common.files import sha256, staged_folder
from simprune_deploy.deploy.triton_config import (
    LABELS,
    class_names,
    make_config,
    render,
    write_warmup,
)
from simprune_deploy.engine.build import BuiltEngine
from simprune_deploy.engine.engine_metadata import TENSORRT, EngineMetadata, read_engine_metadata
from simprune_deploy.engine.libraries import find_library
from simprune_deploy.onnx.exported_folder import GOLDEN, MODEL, check_verdict, read_manifest

if TYPE_CHECKING:
    import onnx

    from simprune_deploy.onnx.metadata import ModelMetadata
    from simprune_deploy.parity.golden import Golden

REPOSITORY = "triton"
CONFIG, WARMUP, PLUGINS = "config.pbtxt", "warmup", "plugins"
ONNX = "onnx"
PLAN = "model.plan"


@dataclasses.dataclass(frozen=True)
class TritonModel:
    """A model in a repository.

    Attributes:
        path: Its folder; the repository is the folder around it.
        form: "onnx" or "tensorrt" (an engine).
        max_batch_size: Images that Triton may put into one batch; 0 for a graph whose batch is
            fixed, which takes exactly that many.
        labels: Whether class names go with it.
        warmup: How many requests Triton runs before it says that the model is ready.
        plugin: The library that the server must be told to load, or None.
        notes: What a user should know, in sentences.
    """

    path: Path
    form: str
    max_batch_size: int
    labels: bool
    warmup: int
    plugin: Path | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as JSON types."""
        return {
            **dataclasses.asdict(self),
            "path": str(self.path),
            "plugin": str(self.plugin) if self.plugin else None,
            "notes": list(self.notes),
        }


def check_batch(batch: tuple[int, int]) -> None:
    """Refuse a batch range that Triton cannot keep.

    Raises:
        SimpruneError: it is a range that begins above 1.
    """
    low, high = batch
    if 1 < low < high:
        raise InvalidArgumentError(
            f"Triton sends batches of 1 to {high} images, and this graph takes {low} to {high}: "
            f"export with {argument('batch')} 1..{high}, or with one fixed size"
        )


def write_repository(
    folder: str | Path,
    output: str | Path | None = None,
    *,
    engine: str | Path | None = None,
    plugin: str | Path | None = None,
    force: bool = False,
) -> TritonModel:
    """Write a model of an exported folder into a Triton model repository.

    The model is called like the folder, with ``_onnx`` or ``_tensorrt`` behind it. Other models in
    the repository stay as they are.

    Args:
        folder: A folder that :func:`simprune_deploy.export` wrote.
        output: The repository. Default: the folder ``triton`` inside `folder`.
        engine: A TensorRT engine of the folder, with its metadata beside it. Default: none, the
            ONNX form.
        plugin: The plugin library that the engine was built with, if it was built with one.
        force: Replace this model if it is there already. Default False.

    Raises:
        SimpruneError: the folder or the engine cannot be used or its parity check failed, Triton
            cannot load such an engine or keep the batch range, or the place cannot be written.
    """
    from simprune_deploy.onnx.metadata import load_graph, read_metadata

    folder = Path(folder)
    manifest = read_manifest(folder)
    check_verdict(folder, manifest, "only verified exports are served")
    graph = load_graph(folder / MODEL)
    metadata = read_metadata(graph)
    check_batch(metadata.batch)
    form = ONNX if engine is None else TENSORRT
    library, high = None, metadata.batch[1]
    if engine is not None:
        built = _check_engine(Path(engine), manifest)
        high = _engine_batch(built, metadata.batch)
        library = _check_plugin(built, Path(plugin) if plugin else None)
    elif plugin is not None:
        raise InvalidArgumentError(
            f"{plugin} goes with a TensorRT engine, and the ONNX form has none"
        )

    name = f"{_model_name(folder)}_{form}"
    place = (folder / REPOSITORY if output is None else Path(output)) / name
    golden = _read_golden(folder, graph)
    labels = class_names(metadata, graph)
    config = make_config(name, form, graph, metadata, high, golden)
    with staged_folder(place, force, CONFIG) as staging:
        version = staging / "1"
        version.mkdir()
        if engine is None:
            # copied: with a hard link, whoever edits the one file in place changes the other too
            shutil.copyfile(folder / MODEL, version / MODEL)
        else:
            shutil.copyfile(engine, version / PLAN)
        if library is not None:
            (staging / PLUGINS).mkdir()
            shutil.copyfile(library, staging / PLUGINS / library.name)
        if labels:
            (staging / LABELS).write_text("\n".join(labels) + "\n", encoding="utf-8")
        if golden is not None:
            write_warmup(staging / WARMUP, config, golden)
        (staging / CONFIG).write_text(_head(metadata, manifest) + render(config), encoding="utf-8")
    return TritonModel(
        path=place,
        form=form,
        max_batch_size=config["max_batch_size"],
        labels=bool(labels),
        warmup=len(config.get("model_warmup", ())),
        plugin=place / PLUGINS / library.name if library else None,
        notes=tuple(_notes(form, metadata, golden, library)),
    )


def _model_name(folder: Path) -> str:
    """Return a name that is safe as a folder and in a URL, where clients write it."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", folder.resolve().name).strip("._-") or "model"


def _check_engine(engine: Path, manifest: dict[str, Any]) -> EngineMetadata:
    """Refuse an engine that Triton cannot load or that is not of this export."""
    metadata = read_engine_metadata(engine)
    if metadata.flavour != TENSORRT:
        raise ArtifactError(
            f"Triton cannot load {engine.name}, an engine of {metadata.title}: its backend is "
            "TensorRT's; build with TensorRT on the machine that serves, or serve the ONNX form"
        )
    if metadata.of != "pruned":
        raise InvalidArgumentError(
            f"{engine.name} is the {metadata.of} engine: name the pruned one"
        )
    if metadata.onnx.sha256 not in [entry["sha256"] for entry in manifest["files"].values()]:
        raise ArtifactError(f"{engine} was built from another model: build it again")
    return metadata


def _engine_batch(built: EngineMetadata, batch: tuple[int, int]) -> int:
    """Return the largest batch of an engine, which may take less than its graph does."""
    shapes = built.profile["images"]
    low, high = shapes["min"][0], shapes["max"][0]
    if batch[0] < batch[1] and low > 1:
        raise ArtifactError(
            f"{built.engine.file} takes batches of {low} to {high} images, and Triton sends single "
            f"ones too: build it with {argument('batch')} 1..{high}"
        )
    return high


def _check_plugin(built: EngineMetadata, plugin: Path | None) -> Path | None:
    """Refuse a library that is not the engine's, and the lack of one."""
    name = built.engine.file
    if built.plugin is None:
        if plugin is not None:
            raise InvalidArgumentError(f"{name} was built without the plugin: leave {plugin} out")
        return None
    if plugin is None:
        raise InvalidArgumentError(f"{name} was built with the plugin: name its library too")
    try:
        if sha256(plugin) != built.plugin.sha256:
            raise ArtifactError(f"{plugin} is not the library that {name} was built with")
    except OSError as error:
        raise ArtifactError(f"{plugin} cannot be read: {error.strerror or error}") from error
    return plugin


def _read_golden(folder: Path, graph: onnx.ModelProto) -> Golden | None:
    """Return the golden cases, None for an export without parity check."""
    from simprune_deploy.onnx.metadata import describe_value
    from simprune_deploy.onnx.variants import pruned_layers
    from simprune_deploy.parity.golden import load_golden

    if not (folder / GOLDEN).is_file():
        return None
    golden = load_golden(folder / GOLDEN, pruned_layers(graph))
    wanted = describe_value(graph.graph.input[0])["dtype"]
    if golden.images.dtype != wanted:
        raise ArtifactError(
            f"the golden images in {folder} are {golden.images.dtype}, and the graph takes "
            f"{wanted}: export again"
        )
    return golden


def _head(metadata: ModelMetadata, manifest: dict[str, Any]) -> str:
    return (
        f"# Written by simprune-deploy {manifest['versions']['simprune-deploy']} for "
        f"{' '.join(metadata.architecture.split()) or 'a model'}; verdict: {manifest['verdict']}.\n"
        "# An image's result does not depend on its batch. Its time may: a batch carries as many\n"
        "# tokens as its fullest image. A wait for fuller batches is yours to choose:\n"
        "# dynamic_batching { max_queue_delay_microseconds: ... }\n"
    )


def _notes(
    form: str, metadata: ModelMetadata, golden: Golden | None, library: Path | None
) -> list[str]:
    notes = []
    if golden is None:
        notes.append(
            spelled(f"no warm-up: the export has no golden images ({argument('verify', False)})")
        )
    if form == ONNX and metadata.precision == "bf16":
        notes.append(
            "ONNX Runtime's CPU provider has no bfloat16 kernels: on a server without a GPU this "
            "model does not load; on one with a GPU it was not tried"
        )
    if metadata.export["runtime_threshold"]:
        notes.append("every request sends a threshold: float32, one for each image")
    if library is not None:
        notes.append(
            f"start the server with --backend-config=tensorrt,plugins=.../{PLUGINS}/{library.name} "
            "and SIMPRUNE_REGISTER=1 in its environment"
        )
    return notes


def serve_engine(
    folder: str | Path,
    engine: BuiltEngine,
    *,
    plugin: str | Path | None = None,
    force: bool = False,
) -> TritonModel:
    """Write an engine that :func:`build_here` gave into the folder's Triton repository.

    Args:
        folder: The exported folder.
        engine: Its engine.
        plugin: The library, as it was given to :func:`build_here`. Default: looked for as there.
        force: Replace the model if it is there already. Default False.

    Raises:
        SimpruneError: Triton cannot serve the engine, or the repository cannot be written.
    """
    from simprune_deploy.deploy.triton import write_repository

    folder = Path(folder)
    library = None
    if engine.metadata.plugin is not None:
        library = find_library(folder, Path(plugin) if plugin is not None else None)
    return write_repository(folder, engine=engine.path, plugin=library, force=force)
