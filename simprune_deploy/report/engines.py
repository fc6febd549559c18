"""What the commands print of engines, for a person."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console

from simprune_deploy.report.terminal import print_facts

if TYPE_CHECKING:
    from simprune_deploy.engine.build import BuiltEngine
    from simprune_deploy.engine.sidecar import EngineFacts


def print_engines(engines: list[BuiltEngine]) -> None:
    """Print what was built, for which GPUs, and how far it was checked."""
    console = Console()
    for number, engine in enumerate(engines):
        if number:
            console.print()
        when = "was there already" if engine.cached else f"{engine.facts.seconds:.1f} s"
        size = f"{engine.facts.engine.bytes / 1e6:.1f} MB"
        facts = {"engine": f"{engine.path} ({size}, {when})", **engine_facts(engine.facts)}
        if engine.trtexec is not None:
            facts["the same with trtexec"] = engine.trtexec
        print_facts(console, facts)


def engine_facts(facts: EngineFacts) -> dict[str, Any]:
    """Return what a person wants to know of an engine."""
    names = f"{', '.join(facts.targets)} " if facts.targets else ""
    names = names or (f"{facts.gpu} " if facts.gpu else "")
    plugin = "none" if facts.of == "dense" else "none: the function in the file was compiled"
    if facts.plugin is not None:
        plugin = f"{facts.plugin.file} (SHA-256 {facts.plugin.sha256[:12]}...)"
    shapes = [
        f"{name} {_shape(each['min'])}"
        + (f" to {_shape(each['max'])}, tuned for {_shape(each['opt'])}" if _free(each) else "")
        for name, each in facts.profile.items()
    ]
    return {
        "for": f"{names}(SM {', '.join(facts.compute_capabilities)})",
        "built with": f"{facts.title}; an engine runs with this version only",
        "of": {"pruned": "the model", "dense": "the model without pruning"}.get(facts.of, facts.of),
        "precision": facts.precision,
        "plugin": plugin,
        "inputs": "; ".join(shapes),
        "workspace": f"at most {facts.workspace_mib} MiB" if facts.workspace_mib else "no limit",
        "status": facts.status,
        "checked": facts.checked,
        "not checked": facts.not_checked,
    }


def _free(shapes: dict[str, list[int]]) -> bool:
    return shapes["min"] != shapes["max"]


def _shape(sizes: list[int]) -> str:
    return "x".join(map(str, sizes))
