"""What the commands print for a person, with rich. Results go to stdout, progress to stderr."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from simprune_deploy.common.progress import silent

if TYPE_CHECKING:
    from simprune_deploy.deploy.doctor import Finding
    from simprune_deploy.engine.targets import Targets
    from simprune_deploy.parity.verdict import Verdict
    from simprune_deploy.pruning.families import PrunableModel
    from simprune_deploy.pruning.kernel_library import LibraryInfo

MARKS = {True: "[green]yes[/green]", False: "[red]no[/red]", None: "[dim]not asked[/dim]"}
COLOURS = {
    "passed": "green",
    "passed in emulation": "yellow",
    "failed": "red",
    "inconclusive": "yellow",
}


@contextlib.contextmanager
def progress(enabled: bool = True) -> Iterator[Callable[[str], None]]:
    """Show the step that runs, on stderr; nothing where that is not a terminal."""
    console = Console(stderr=True)
    if not enabled or not console.is_terminal:
        yield silent
        return
    with console.status("starting") as status:
        yield lambda step: status.update(step)


def print_verdict(console: Console, verdict: Verdict) -> None:
    """Print the checks as a table and the status below it."""
    table = Table("check", "passed", "what was found", box=None, pad_edge=False)
    for check in verdict.checks:
        table.add_row(check.name.replace("_", " "), MARKS[check.passed], escape(check.summary))
    console.print(table)
    against = f"{verdict.environment['runtime']} against {verdict.environment['reference']}"
    console.print(f"{against}, on {_source(verdict.inputs)}", style="dim", highlight=False)
    for name, reason in verdict.inputs["skipped"]:
        console.print(f"skipped {escape(name)}: {escape(reason)}", style="yellow")
    console.print(f"verdict: [bold {COLOURS[verdict.status]}]{verdict.status}[/]", highlight=False)


def _source(inputs: dict[str, Any]) -> str:
    images = inputs["images"]
    count = images if isinstance(images, int) else len(images)
    return f"{inputs['source']} ({count} images)"


def print_facts(console: Console, facts: dict[str, Any]) -> None:
    """Print names and values, one a line; nested values are joined."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(overflow="fold")  # a path is no use with its end cut off
    for name, value in facts.items():
        table.add_row(name, escape(_text(value)), style=None)
    console.print(table)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(each)}" for name, each in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(each) for each in value) if value else "none"
    return str(value)


def library_facts(info: LibraryInfo) -> dict[str, Any]:
    """Return what a person wants to know of a built library."""
    kinds = {
        "plugin": "TensorRT plugin and CUDA kernels",
        "kernels": "CUDA kernels, without the TensorRT plugin",
        "host": "the kernels compiled for the CPU, for tests",
    }
    facts: dict[str, Any] = {
        "file": f"{info.path} ({info.bytes / 1e6:.1f} MB)",
        "kind": kinds.get(info.kind, info.kind),
        "version": f"{info.version} (C interface {info.abi})",
        "machine": info.machine,
        "GPU code": str(info.device_code),
        "CUDA": info.cuda or "none",
        "TensorRT headers": info.tensorrt_headers or "none",
    }
    if info.device_code.sms != info.architectures:
        facts["GPU code asked for"] = f"SM {', '.join(info.architectures) or 'none'}"
    if info.tensorrt_headers:
        facts["TensorRT plugin"] = (
            f"{info.operator}, version {info.operator_version}, namespace {info.namespace!r}"
        )
        facts["fields"] = info.fields
    return facts


def print_models(rows: list[PrunableModel], refused: list[tuple[str, str]], named: bool) -> None:
    """Print the prunable architectures; the refused ones with reasons if they were asked for."""
    console = Console()
    if rows:
        table = Table(
            "architecture", "image", "patches", "prefix", "blocks", "width", "pooling", box=None
        )
        for row in rows:
            height, width = row.image_size
            table.add_row(
                row.name,
                f"{height}x{width}",
                str(row.num_patches),
                str(row.num_prefix_tokens),
                str(row.depth),
                str(row.embed_dim),
                row.pooling,
            )
        console.print(table)
    if named:
        for name, reason in refused:
            console.print(f"{name} cannot be pruned: {reason}", style="yellow", highlight=False)
    elif refused:
        console.print(
            f"{len(refused)} other architectures cannot be pruned; name one to see why",
            style="dim",
            highlight=False,
        )


def print_findings(findings: list[Finding]) -> None:
    """Print what the doctor found, with the remedy below what needs one."""
    console = Console()
    colors = {"ok": "green", "optional": "dim"}
    table = Table("what", "state", "version", "needed for", box=None, pad_edge=False)
    for each in findings:
        color = colors.get(each.state, "red")
        table.add_row(
            escape(each.name),
            f"[{color}]{each.state}[/]",
            escape(each.version or ""),
            each.needed_for,
        )
    console.print(table)
    for each in findings:
        if each.remedy and each.state != "ok":
            # what is there and does not work needs a reason; what is missing does not
            why = f"{each.detail}: " if each.detail and each.state not in colors else ""
            console.print(escape(f"{each.name}: {why}{each.remedy}"), highlight=False)


def print_targets(known: Targets) -> None:
    """Print the targets as a table, then what each carries with the documents that say so."""
    console = Console()
    table = Table("target", "SM", "runs", "engine is built", "pays", box=None, pad_edge=False)
    for target in known.targets:
        names = ("compute_capability", "flavour", "build", "precisions")
        table.add_row(target.name, *(escape(str(target.facts[name])) for name in names))
    console.print(table, highlight=False)
    for name, members in known.groups.items():
        console.print(f"{name} stands for {', '.join(members)}.", highlight=False)
    numbers: dict[str, int] = {}
    for target in known.targets:
        parts = []
        for name, fact in target.facts.items():
            for source in fact.sources:
                numbers.setdefault(source, len(numbers) + 1)
            marks = ",".join(str(numbers[source]) for source in fact.sources)
            label = f"{name.replace('_', ' ').replace('tensorrt', 'TensorRT')}: {fact}"
            parts.append(f"{label} [{marks}]" if marks else label)
        names_too = f" (or {', '.join(target.aliases)})" if target.aliases else ""
        console.print(f"\n[bold]{target.name}[/bold]{names_too}: {target.title}", highlight=False)
        console.print(escape("; ".join(parts) + "."), highlight=False)
        if target.notes:
            console.print(escape(" ".join(target.notes)), highlight=False)
    console.print()
    for source, number in numbers.items():
        console.print(escape(f"[{number}] {source}"), style="dim", highlight=False)
    console.print(f"Compared with these on {known.checked}.", style="dim", highlight=False)
