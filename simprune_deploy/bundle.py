"""The folder that ships: model, manifest with hashes, verdict and golden cases."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import simprune_deploy
from simprune_deploy.engine import ENGINE_SUFFIX
from simprune_deploy.errors import SimpruneError
from simprune_deploy.files import check_destination, sha256, staged_folder, write_json

if TYPE_CHECKING:
    import onnx

    from simprune_deploy.images import ImageSet
    from simprune_deploy.onnx.exporter import ExportOptions
    from simprune_deploy.parity.backends import Backend
    from simprune_deploy.parity.verdict import Verdict
    from simprune_deploy.pruning.model import PrunedViT

MODEL, MANIFEST, PARITY, GOLDEN = "model.onnx", "manifest.json", "parity.json", "golden.npz"
PLUGIN_SOURCE = "plugin/source"
FORMAT, DEVICE_FORMAT = 1, 2
KINDS = {FORMAT: "exported folder", DEVICE_FORMAT: "device bundle"}
"""What the formats of a manifest are of; a later one is of a newer version."""

LARGEST_MANIFEST = 1 << 24

Progress = Callable[[str], None]


def _silent(step: str) -> None:
    """Ignore progress."""


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """An exported folder.

    Attributes:
        folder: Where it is.
        manifest: What ``manifest.json`` says.
        verdict: The proof's, or None if it was not asked for.
    """

    folder: Path
    manifest: dict[str, Any]
    verdict: Verdict | None


def export(
    model: PrunedViT,
    output: str | Path,
    options: ExportOptions | None = None,
    *,
    images: str | Path | None = None,
    verify: bool = True,
    force: bool = False,
    source: dict[str, Any] | None = None,
    progress: Progress = _silent,
) -> ExportResult:
    """Export a pruned model to a folder and prove the result equal to it.

    Args:
        model: From :func:`simprune_deploy.prune`.
        output: The folder to write. It appears whole, or not at all.
        options: The graph's form. Default: :class:`ExportOptions`'s defaults.
        images: Folder of pictures for the proof. Default: photographs that come along.
        verify: Run the proof. Default True.
        force: Replace an earlier result. Default False.
        source: What to say of the checkpoint in the manifest.
        progress: Called with a word on each step.

    Returns:
        The folder and the verdict. A verdict other than "proven" raises nothing: look at
        ``result.verdict.status``.

    Raises:
        SimpruneError: the destination, the options or the images cannot be used.
    """
    from simprune_deploy.onnx.exporter import ExportOptions, export_onnx
    from simprune_deploy.parity.golden import save_golden
    from simprune_deploy.parity.proof import prove_against_torch

    options = options or ExportOptions()
    folder = Path(output)
    check_destination(folder, force, MANIFEST)
    _check_finite(model)
    # pictures first: a wrong folder should not cost the user an export
    pictures = _pictures(model, images, options.normalize, options.input) if verify else None
    progress("tracing and translating to ONNX")
    graph = export_onnx(model, options)
    verdict, golden = None, None
    if pictures is not None:
        verdict, golden = prove_against_torch(graph, model, pictures, progress)
    progress("writing")
    with staged_folder(folder, force, MANIFEST) as staging:
        (staging / MODEL).write_bytes(graph.SerializeToString())
        if verdict is not None and golden is not None:
            write_json(staging / PARITY, verdict.to_dict())
            save_golden(staging / GOLDEN, golden)
        manifest = _manifest(graph, staging, verdict, source or {})
        write_json(staging / MANIFEST, manifest)
    return ExportResult(folder, manifest, verdict)


def _pictures(
    model: PrunedViT, images: str | Path | None, graph_normalizes: bool, form: str
) -> ImageSet:
    """Load pictures as the graph takes them."""
    from simprune_deploy.images import Preprocessing, as_uint8_nhwc, load_folder, sample_images
    from simprune_deploy.onnx.metadata import UINT8_NHWC

    preprocessing = Preprocessing.of_model(model)
    normalize = not graph_normalizes
    if images is None:
        found = sample_images(preprocessing, normalize=normalize)
    else:
        found = load_folder(Path(images), preprocessing, normalize=normalize)
    if form == UINT8_NHWC:
        return dataclasses.replace(found, pixels=as_uint8_nhwc(found.pixels))
    return found


def _check_finite(model: PrunedViT) -> None:
    import torch

    for name, tensor in model.vit.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise SimpruneError(f"the weight {name} holds NaN or infinity: train or load it again")


def _manifest(
    graph: onnx.ModelProto, folder: Path, verdict: Verdict | None, source: dict[str, Any]
) -> dict[str, Any]:
    from simprune_deploy.onnx.metadata import describe_value, read_facts
    from simprune_deploy.parity.versions import package_version

    packages = ("torch", "timm", "onnx", "onnxscript", "onnxruntime", "polygraphy")
    return {
        "format": FORMAT,
        "verdict": verdict.status if verdict else "not verified",
        "model": read_facts(graph).to_dict(),
        "inputs": [describe_value(value) for value in graph.graph.input],
        "outputs": [describe_value(value) for value in graph.graph.output],
        "source": source,
        "versions": {
            "simprune-deploy": simprune_deploy.__version__,
            **{name: package_version(name) for name in packages},
        },
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in sorted(folder.iterdir())
        },
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a folder's manifest and check that its files are the ones it was made with.

    Args:
        folder: An exported folder, or a device's bundle unpacked.

    Raises:
        SimpruneError: it is no result of ours, of a newer format, or a file was changed.
    """
    path = folder / MANIFEST
    try:
        if path.stat().st_size > LARGEST_MANIFEST:
            raise ValueError(f"more than {LARGEST_MANIFEST} bytes")
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = manifest["format"]
        if not isinstance(found, int):
            raise TypeError(f"format {found!r}")
        # of a newer one nothing else is known
        hashes = {
            name: str(entry["sha256"])
            for name, entry in (dict(manifest["files"]) if found in KINDS else {}).items()
        }
        for name in ("verdict", "versions", "model") if found in KINDS else ():
            manifest[name]
        if found == DEVICE_FORMAT:
            manifest["bundle"]
    except FileNotFoundError:
        raise SimpruneError(
            f"{folder} holds no {MANIFEST}: give a folder that `simprune-deploy export` wrote"
        ) from None
    except NotADirectoryError:
        raise SimpruneError(
            f"{folder} is a file: give the folder that `simprune-deploy export` wrote"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SimpruneError(f"{path} is damaged ({error!r}): export again") from error
    if found not in KINDS:
        newest = max(KINDS)
        raise SimpruneError(
            f"{path} has format {found}, and this version reads up to {newest}: "
            f"{'update simprune-deploy' if found > newest else 'export again'}"
        )
    for name, expected in hashes.items():
        file = _file_inside(folder, name)
        if not file.is_file():
            raise SimpruneError(f"{file} is missing: copy the folder again, or export again")
        if sha256(file) != expected:
            raise SimpruneError(f"{file} is not the file that was exported: its SHA-256 differs")
    return dict(manifest)


def _file_inside(folder: Path, name: str) -> Path:
    """Return a file that a manifest names; it must lie in the folder, also through links."""
    parts = PurePosixPath(name).parts
    sound = parts and name == "/".join(parts) and name.isprintable() and "\\" not in name
    if not sound or ".." in parts or PurePosixPath(name).is_absolute():
        raise SimpruneError(
            f"{folder / MANIFEST} names the file {name!r}, which is not below its folder: "
            "do not use it"
        )
    file = folder / name
    if not file.resolve().is_relative_to(folder.resolve()):
        raise SimpruneError(f"{file} is a link out of its folder: copy the file itself")
    return file


def verify(
    target: str | Path,
    *,
    reference: PrunedViT | None = None,
    images: str | Path | None = None,
    engine: bool = False,
    plugin: str | Path | None = None,
    progress: Progress = _silent,
) -> Verdict:
    """Prove an exported model again, here and now.

    Args:
        target: A folder that :func:`export` wrote, its ONNX file, or one of its engines.
        reference: The PyTorch model to compare with. Default: the golden cases beside the file,
            for which torch need not be installed.
        images: Folder of pictures, only with a reference. Default: photographs that come along.
        engine: Run the folder's engine for the GPU of this machine in place of ONNX Runtime.
            Default False; an engine as target is always run.
        plugin: The library of the plugin that is in the engine. Default: looked for as
            :func:`build_here` does.
        progress: Called with a word on each step.

    Raises:
        SimpruneError: the target is damaged, there is nothing to compare it with, or the engine
            does not fit this machine.
    """
    target = Path(target)
    if not target.exists():
        raise SimpruneError(f"{target} does not exist: give an exported folder or its model.onnx")
    if reference is None and images is not None:
        raise SimpruneError(
            "--images needs --reference: golden cases hold PyTorch's answers to their own images "
            "only"
        )
    backend = None
    if engine or target.suffix == ENGINE_SUFFIX:
        from simprune_deploy.engines import choose_backend

        backend, target = choose_backend(target, plugin, progress)
    elif plugin is not None:
        raise SimpruneError("--plugin is for engines: add --engine")
    return _verify(target, reference, images, backend, progress)


def _verify(
    target: Path,
    reference: PrunedViT | None,
    images: str | Path | None,
    backend: Backend | None,
    progress: Progress,
) -> Verdict:
    from simprune_deploy.onnx.metadata import load_graph, read_facts
    from simprune_deploy.onnx.variants import pruned_layers
    from simprune_deploy.parity.golden import load_golden
    from simprune_deploy.parity.proof import prove_against_golden, prove_against_torch

    path = target
    if target.is_dir():
        read_manifest(target)
        path = target / MODEL
    graph = load_graph(path)
    facts = read_facts(graph)
    if reference is None:
        golden = load_golden(path.parent / GOLDEN, pruned_layers(graph))
        return prove_against_golden(graph, golden, progress, backend)
    pictures = _pictures(reference, images, bool(facts.export["normalize"]), facts.input)
    return prove_against_torch(graph, reference, pictures, progress, backend)[0]
