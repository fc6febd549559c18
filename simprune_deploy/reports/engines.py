"""What the commands print of engines, for a person."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console

from simprune_deploy.reports.terminal import print_facts

if TYPE_CHECKING:
    from simprune_deploy.engine.build import BuiltEngine
    from simprune_deploy.engine.engine_metadata import EngineMetadata


def print_engines(engines: list[BuiltEngine]) -> None:
    """Print what was built, for which GPUs, and how far it was checked."""
    console = Console()
    for number, engine in enumerate(engines):
        if number:
            console.print()
        when = "was there already" if engine.cached else f"{engine.metadata.seconds:.1f} s"
        size = f"{engine.metadata.engine.bytes / 1e6:.1f} MB"
        metadata = {"engine": f"{engine.path} ({size}, {when})", **engine_facts(engine.metadata)}
        if engine.trtexec is not None:
            metadata["the same with trtexec"] = engine.trtexec
        print_facts(console, metadata)


def engine_facts(metadata: EngineMetadata) -> dict[str, Any]:
    """Return what a person wants to know of an engine."""
    names = f"{', '.join(metadata.targets)} " if metadata.targets else ""
    names = names or (f"{metadata.gpu} " if metadata.gpu else "")
    plugin = "none" if metadata.of == "dense" else "none: the function in the file was compiled"
    if metadata.plugin is not None:
        plugin = f"{metadata.plugin.file} (SHA-256 {metadata.plugin.sha256[:12]}...)"
    shapes = [
        f"{name} {_shape(each['min'])}"
        + (f" to {_shape(each['max'])}, tuned for {_shape(each['opt'])}" if _free(each) else "")
        for name, each in metadata.profile.items()
    ]
    return {
        "for": f"{names}(SM {', '.join(metadata.compute_capabilities)})",
        "built with": f"{metadata.title}; an engine runs with this version only",
        "of": {"pruned": "the model", "dense": "the model without pruning"}.get(
            metadata.of, metadata.of
        ),
        "precision": metadata.precision,
        "plugin": plugin,
        "plugin layers": f"{metadata.counted}, as counted in the parsed network",
        "inputs": "; ".join(shapes),
        "workspace": f"at most {metadata.workspace_mib} MiB"
        if metadata.workspace_mib
        else "no limit",
        "status": metadata.status,
        "checked": metadata.checked,
        "not checked": metadata.not_checked,
    }


def _free(shapes: dict[str, list[int]]) -> bool:
    return shapes["min"] != shapes["max"]


def _shape(sizes: list[int]) -> str:
    return "x".join(map(str, sizes))
