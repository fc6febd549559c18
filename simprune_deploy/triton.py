"""Model repositories for Triton Inference Server: the ONNX file or a TensorRT engine, to be served.

What the configuration must be like was read in Triton's sources (core, onnxruntime_backend,
tensorrt_backend); docs/triton.md says which parts of it a real server has taken in the tests.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simprune_deploy.bundle import GOLDEN, MODEL, read_manifest
from simprune_deploy.engine.sidecar import TENSORRT, read_sidecar
from simprune_deploy.errors import SimpruneError
from simprune_deploy.files import sha256, staged_folder

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from simprune_deploy.engine.sidecar import EngineFacts
    from simprune_deploy.onnx.metadata import Facts
    from simprune_deploy.parity.golden import Golden

REPOSITORY = "triton"
CONFIG, LABELS, WARMUP, PLUGINS = "config.pbtxt", "labels.txt", "warmup", "plugins"
ONNX = "onnx"
PLAN = "model.plan"

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
        raise SimpruneError(
            f"Triton sends batches of 1 to {high} images, and this graph takes {low} to {high}: "
            f"export with --batch 1..{high}, or with one fixed size"
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
        SimpruneError: the folder or the engine cannot be used or its proof failed, Triton cannot
            load such an engine or keep the batch range, or the place cannot be written.
    """
    from simprune_deploy.onnx.metadata import load_graph, read_facts
    from simprune_deploy.parity.verdict import ACCEPTED

    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest["verdict"] not in (*ACCEPTED, "not verified"):
        raise SimpruneError(
            f"the verdict on {folder} is {manifest['verdict']!r}, and only proven exports are "
            "served: export again, or with --no-verify if you want it all the same"
        )
    graph = load_graph(folder / MODEL)
    facts = read_facts(graph)
    check_batch(facts.batch)
    form = ONNX if engine is None else TENSORRT
    library, high = None, facts.batch[1]
    if engine is not None:
        built = _check_engine(Path(engine), manifest)
        high = _engine_batch(built, facts.batch)
        library = _check_plugin(built, Path(plugin) if plugin else None)
    elif plugin is not None:
        raise SimpruneError(f"{plugin} goes with a TensorRT engine, and the ONNX form has none")

    name = f"{_model_name(folder)}_{form}"
    place = (folder / REPOSITORY if output is None else Path(output)) / name
    golden = _read_golden(folder, graph)
    labels = _labels(facts, graph)
    config = _config(name, form, graph, facts, high, golden)
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
            _write_warmup(staging / WARMUP, config, golden)
        (staging / CONFIG).write_text(_head(facts, manifest) + render(config), encoding="utf-8")
    return TritonModel(
        path=place,
        form=form,
        max_batch_size=config["max_batch_size"],
        labels=bool(labels),
        warmup=len(config.get("model_warmup", ())),
        plugin=place / PLUGINS / library.name if library else None,
        notes=tuple(_notes(form, facts, golden, library)),
    )


def _model_name(folder: Path) -> str:
    """Return a name that is safe as a folder and in a URL, where clients write it."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", folder.resolve().name).strip("._-") or "model"


def _check_engine(engine: Path, manifest: dict[str, Any]) -> EngineFacts:
    """Refuse an engine that Triton cannot load or that is not of this export."""
    facts = read_sidecar(engine)
    if facts.flavour != TENSORRT:
        raise SimpruneError(
            f"Triton cannot load {engine.name}, an engine of {facts.title}: its backend is "
            "TensorRT's; build with TensorRT on the machine that serves, or serve the ONNX form"
        )
    if facts.of != "pruned":
        raise SimpruneError(f"{engine.name} is the {facts.of} engine: name the pruned one")
    if facts.onnx.sha256 not in [entry["sha256"] for entry in manifest["files"].values()]:
        raise SimpruneError(f"{engine} was built from another model: build it again")
    return facts


def _engine_batch(built: EngineFacts, batch: tuple[int, int]) -> int:
    """Return the largest batch of an engine, which may take less than its graph does."""
    shapes = built.profile["images"]
    low, high = shapes["min"][0], shapes["max"][0]
    if batch[0] < batch[1] and low > 1:
        raise SimpruneError(
            f"{built.engine.file} takes batches of {low} to {high} images, and Triton sends single "
            f"ones too: build it with --batch 1..{high}"
        )
    return high


def _check_plugin(built: EngineFacts, plugin: Path | None) -> Path | None:
    """Refuse a library that is not the engine's, and the lack of one."""
    name = built.engine.file
    if built.plugin is None:
        if plugin is not None:
            raise SimpruneError(f"{name} was built without the plugin: leave {plugin} out")
        return None
    if plugin is None:
        raise SimpruneError(f"{name} was built with the plugin: name its library too")
    try:
        if sha256(plugin) != built.plugin.sha256:
            raise SimpruneError(f"{plugin} is not the library that {name} was built with")
    except OSError as error:
        raise SimpruneError(f"{plugin} cannot be read: {error.strerror or error}") from error
    return plugin


def _read_golden(folder: Path, graph: onnx.ModelProto) -> Golden | None:
    """Return the golden cases, None for an export without proof."""
    from simprune_deploy.onnx.metadata import describe_value
    from simprune_deploy.onnx.variants import pruned_layers
    from simprune_deploy.parity.golden import load_golden

    if not (folder / GOLDEN).is_file():
        return None
    golden = load_golden(folder / GOLDEN, pruned_layers(graph))
    wanted = describe_value(graph.graph.input[0])["dtype"]
    if golden.images.dtype != wanted:
        raise SimpruneError(
            f"the golden images in {folder} are {golden.images.dtype}, and the graph takes "
            f"{wanted}: export again"
        )
    return golden


def _labels(facts: Facts, graph: onnx.ModelProto) -> list[str]:
    """Return the class names for Triton's classification; none if they are not known or not usable.

    Without batches of its own Triton takes the whole output for one picture's scores, which it is
    not if the graph takes several.
    """
    names = facts.preprocessing.get("label_names")
    if not isinstance(names, list) or len(names) != facts.num_classes:
        return []
    if graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value > 1:
        return []
    return [" ".join(str(name).split()) for name in names]


def _config(
    name: str,
    form: str,
    graph: onnx.ModelProto,
    facts: Facts,
    most: int,
    golden: Golden | None,
) -> dict[str, Any]:
    """Return Triton's ModelConfig as nested dicts and lists."""
    from simprune_deploy.onnx.metadata import describe_value

    inputs = [describe_value(value) for value in graph.graph.input]
    outputs = [describe_value(value) for value in graph.graph.output]
    # Triton batches along a first dimension that every tensor has and that is free
    batched = all(isinstance(each["shape"][0], str) for each in (*inputs, *outputs))
    high = most if batched else 0
    config: dict[str, Any] = {
        "name": name,
        "backend": "onnxruntime" if form == ONNX else "tensorrt",
        "max_batch_size": high,
        "input": [_tensor(each, batched) for each in inputs],
        "output": [_tensor(each, batched) for each in outputs],
    }
    if _labels(facts, graph):
        for each in config["output"]:
            if each["name"] == facts.output:
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
        raise SimpruneError(
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


def _write_warmup(folder: Path, config: dict[str, Any], golden: Golden) -> None:
    """Write the files that the warm-up requests name: raw little-endian values."""
    folder.mkdir()
    count = len(golden.images) if config["max_batch_size"] else 1
    for tensor in config["input"]:
        for index in range(count):
            array = _warmup_array(tensor, golden, index)
            path = folder / f"{tensor['name']}_{index}"
            path.write_bytes(array.astype(array.dtype.newbyteorder("<")).tobytes())


# --- text -----------------------------------------------------------------------------------------


def _head(facts: Facts, manifest: dict[str, Any]) -> str:
    return (
        f"# Written by simprune-deploy {manifest['versions']['simprune-deploy']} for "
        f"{' '.join(facts.architecture.split()) or 'a model'}; verdict: {manifest['verdict']}.\n"
        "# An image's result does not depend on its batch. Its time may: a batch carries as many\n"
        "# tokens as its fullest image. A wait for fuller batches is yours to choose:\n"
        "# dynamic_batching { max_queue_delay_microseconds: ... }\n"
    )


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


def _notes(form: str, facts: Facts, golden: Golden | None, library: Path | None) -> list[str]:
    notes = []
    if golden is None:
        notes.append("no warm-up: the export has no golden images (--no-verify)")
    if form == ONNX and facts.precision == "bf16":
        notes.append(
            "ONNX Runtime's CPU provider has no bfloat16 kernels: on a server without a GPU this "
            "model does not load; on one with a GPU it was not tried"
        )
    if facts.export["runtime_threshold"]:
        notes.append("every request sends a threshold: float32, one for each image")
    if library is not None:
        notes.append(
            f"start the server with --backend-config=tensorrt,plugins=.../{PLUGINS}/{library.name} "
            "and SIMPRUNE_REGISTER=1 in its environment"
        )
    return notes
