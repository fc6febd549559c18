"""A pruned model becomes the folder that ships: model, manifest, verdict and golden cases."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.common.files import check_destination, sha256, staged_folder, write_json
from simprune_deploy.common.progress import Progress, silent
from simprune_deploy.common.versions import __version__, package_version
from simprune_deploy.onnx.exported_folder import FORMAT, GOLDEN, MANIFEST, MODEL, PARITY

if TYPE_CHECKING:
    import onnx

    from simprune_deploy.common.images import ImageSet
    from simprune_deploy.onnx.exporter import ExportOptions
    from simprune_deploy.parity.verdict import Verdict
    from simprune_deploy.pruning.model import PrunedViT


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """An exported folder.

    Attributes:
        folder: Where it is.
        manifest: What ``manifest.json`` says.
        verdict: The parity check's, or None if it was not asked for.
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
    progress: Progress = silent,
) -> ExportResult:
    """Export a pruned model to a folder and compare the result with it.

    Args:
        model: From :func:`simprune_deploy.prune`.
        output: The folder to write. It appears whole, or not at all.
        options: The graph's form. Default: :class:`ExportOptions`'s defaults.
        images: Folder of pictures for the parity check. Default: photographs that come along.
        verify: Run the parity check. Default True.
        force: Replace an earlier result. Default False.
        source: What to say of the checkpoint in the manifest.
        progress: Called with a word on each step.

    Returns:
        The folder and the verdict. A verdict other than "passed" raises nothing: look at
        ``result.verdict.status``.

    Raises:
        SimpruneError: the destination, the options or the images cannot be used.
    """
    from simprune_deploy.onnx.exporter import ExportOptions, export_onnx
    from simprune_deploy.parity.comparison import compare_with_torch
    from simprune_deploy.parity.golden import save_golden

    options = options or ExportOptions()
    folder = Path(output)
    check_destination(folder, force, MANIFEST)
    _check_finite(model)
    # pictures first: a wrong folder should not cost the user an export
    pictures = load_pictures(model, images, options.normalize, options.input) if verify else None
    progress("tracing and translating to ONNX")
    graph = export_onnx(model, options)
    verdict, golden = None, None
    if pictures is not None:
        verdict, golden = compare_with_torch(graph, model, pictures, progress)
    progress("writing")
    with staged_folder(folder, force, MANIFEST) as staging:
        (staging / MODEL).write_bytes(graph.SerializeToString())
        if verdict is not None and golden is not None:
            write_json(staging / PARITY, verdict.to_dict())
            save_golden(staging / GOLDEN, golden)
        manifest = _manifest(graph, staging, verdict, source or {})
        write_json(staging / MANIFEST, manifest)
    return ExportResult(folder, manifest, verdict)


def load_pictures(
    model: PrunedViT, images: str | Path | None, graph_normalizes: bool, form: str
) -> ImageSet:
    """Load pictures as the graph takes them."""
    from simprune_deploy.common.images import (
        Preprocessing,
        as_uint8_nhwc,
        load_folder,
        sample_images,
    )
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
    from simprune_deploy.onnx.metadata import describe_value, read_metadata

    packages = ("torch", "timm", "onnx", "onnxscript", "onnxruntime", "polygraphy")
    return {
        "format": FORMAT,
        "verdict": verdict.status if verdict else "not verified",
        "model": read_metadata(graph).to_dict(),
        "inputs": [describe_value(value) for value in graph.graph.input],
        "outputs": [describe_value(value) for value in graph.graph.output],
        "source": source,
        "versions": {
            "simprune-deploy": __version__,
            **{name: package_version(name) for name in packages},
        },
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in sorted(folder.iterdir())
        },
    }
