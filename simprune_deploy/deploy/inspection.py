"""What a file or folder is, as names and JSON values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from simprune_deploy.checkpoints.options import CheckpointOptions
from simprune_deploy.common.errors import ArtifactError, SimpruneError
from simprune_deploy.engine import ENGINE_SUFFIX
from simprune_deploy.onnx.exported_folder import (
    DEVICE_FORMAT,
    KINDS,
    MANIFEST,
    MODEL,
    PARITY,
    PLUGIN_SOURCE,
    read_manifest,
)

FITS = "fits this machine"


def inspect(
    target: str | Path, checkpoint: CheckpointOptions | None = None, **fields: Any
) -> dict[str, Any]:
    """Describe an exported folder, an ONNX file of ours, an engine, or a checkpoint.

    Args:
        target: Its path; of a checkpoint with ``pretrained`` its name.
        checkpoint: How a checkpoint is loaded. Default None: `fields` say it.
        fields: Those of :class:`CheckpointOptions`, by name.

    Raises:
        SimpruneError: it is none of these, or damaged.
    """
    path, options = Path(target), checkpoint or CheckpointOptions(**fields)
    if options.pretrained:
        return _describe_checkpoint(target, options)
    if not _exists(path):
        raise ArtifactError(f"{path} does not exist: give an export, an engine, or a checkpoint")
    if path.name == "sweep.json" or (path / "sweep.json").is_file():
        raise ArtifactError(f"{path} is a sweep: `simprune-deploy report {path}` shows it")
    if path.is_dir() and (path / MANIFEST).is_file():
        manifest = read_manifest(path)
        return {
            "kind": KINDS[manifest["format"]],
            "verdict": manifest["verdict"],
            **_describe_checks(path, manifest),
            **(_describe_bundle(manifest) if manifest["format"] == DEVICE_FORMAT else {}),
            **_describe_graph(path / MODEL),
            "files": _sizes(manifest["files"]),
            "versions": manifest["versions"],
            **_describe_engines(path),
        }
    if path.is_file() and path.suffix == ENGINE_SUFFIX:
        from simprune_deploy.engine.inventory import examine_engine

        return {"kind": "engine", **examine_engine(path).to_dict()}
    if path.is_file() and _looks_like_onnx(path):
        return {"kind": "ONNX model", **_describe_graph(path)}
    return _describe_checkpoint(target, options)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError) as error:  # too long, a null character, a folder denied
        why = getattr(error, "strerror", None) or error
        raise ArtifactError(f"cannot read {str(path)[:200]!r}: {why}") from error


def _sizes(files: dict[str, Any]) -> dict[str, int]:
    """Return the sizes of the files; the plugin's sources count as one."""
    sizes: dict[str, int] = {}
    for name, entry in files.items():
        shown = PLUGIN_SOURCE if name.startswith(f"{PLUGIN_SOURCE}/") else name
        sizes[shown] = sizes.get(shown, 0) + int(entry["bytes"])
    return sizes


def _describe_checks(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the answers of the parity check, if the folder has them."""
    if PARITY not in manifest["files"]:
        return {}
    answers = {True: "yes", False: "no", None: "not asked"}
    try:
        checks = json.loads((folder / PARITY).read_text(encoding="utf-8"))["checks"]
        return {"checks": {name: answers[each["passed"]] for name, each in checks.items()}}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{folder / PARITY} is damaged ({error!r}): export again") from error


def _describe_bundle(manifest: dict[str, Any]) -> dict[str, Any]:
    try:
        about = manifest["bundle"]
        return {
            "targets": [str(target["name"]) for target in about["targets"]],
            "engine": str(about["engine"]),
            "checked": [f"{each['what']}: {each['found']}" for each in about["checked"]],
            "not_checked": [str(each) for each in about["not_checked"]],
        }
    except (KeyError, TypeError) as error:
        raise ArtifactError(
            f"what {MANIFEST} says of the bundle is damaged ({error!r}): copy the bundle again"
        ) from error


def _describe_engines(folder: Path) -> dict[str, Any]:
    from simprune_deploy.engine.inventory import engines_in

    engines = {}
    for each in engines_in(folder):
        layers = f"; the plugin runs {each.metadata.counted}" if each.metadata else ""
        engines[each.path.name] = (each.problem or FITS) + layers
    return {"engines": engines} if engines else {}


def _looks_like_onnx(path: Path) -> bool:
    # field 1 of a ModelProto, the IR version, comes first: tag 8, then a small number
    with path.open("rb") as file:
        head = file.read(2)
    return len(head) == 2 and head[0] == 8 and 3 <= head[1] <= 32


def _describe_graph(path: Path) -> dict[str, Any]:
    from simprune_deploy.onnx.metadata import load_graph, read_metadata
    from simprune_deploy.onnx.variants import prune_nodes

    graph = load_graph(path)
    metadata = read_metadata(graph)
    return {
        **metadata.to_dict(),
        "precision": metadata.precision,
        "inputs": [_signature(value) for value in graph.graph.input],
        "outputs": [_signature(value) for value in graph.graph.output],
        "nodes": len(graph.graph.node),
        "prune_nodes": [node.name for node in prune_nodes(graph)],
    }


def _signature(value: Any) -> str:
    from simprune_deploy.onnx.metadata import describe_value

    metadata = describe_value(value)
    return f"{metadata['name']} {metadata['dtype']}[{', '.join(map(str, metadata['shape']))}]"


def _describe_checkpoint(target: str | Path, options: CheckpointOptions) -> dict[str, Any]:
    from simprune_deploy.checkpoints.loading import load_checkpoint
    from simprune_deploy.pruning.families import check_prunable
    from simprune_deploy.pruning.model import PrunedViT, describe_vit, prune

    checkpoint = load_checkpoint(target, options)
    model = checkpoint.model
    is_pruned = isinstance(model, PrunedViT)
    try:
        check_prunable(getattr(model, "vit", model))
    except SimpruneError as error:
        return {"kind": checkpoint.kind, "notes": list(checkpoint.notes), "prunable": str(error)}
    pruned = prune(model)
    height, width = pruned.image_size
    return {
        "kind": checkpoint.kind,
        "notes": list(checkpoint.notes),
        "assumed": list(checkpoint.assumed),
        **describe_vit(pruned.vit),
        "parameters": sum(p.numel() for p in pruned.parameters()),
        "num_classes": int(pruned.vit.num_classes),
        "image_size": [height, width],
        "channels": pruned.channels,
        "num_patches": pruned.num_patches,
        "num_prefix_tokens": pruned.num_prefix_tokens,
        "depth": len(pruned.vit.blocks),
        "pruning": pruned.config.to_dict() if is_pruned else None,
        "auto_layers": list(prune(pruned.vit, layers="auto").config.layers),
    }
