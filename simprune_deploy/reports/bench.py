"""What ``bench`` prints for a person."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from simprune_deploy.common.errors import argument, spelled
from simprune_deploy.evaluate.timing import LEVEL
from simprune_deploy.reports.terminal import print_facts

MUCH_GIVEN_BACK = 1 / 3
"""Of what an image alone saves: beyond this share padding is worth a sentence."""


def print_benchmark(report: dict[str, Any]) -> None:
    """Print what was timed, on what, and how it went."""
    console = Console()
    print_facts(console, _what(report))
    console.print()
    _print_times(console, report["models"])
    console.print()
    _print_memory(console, report["models"])
    for line in _notes(report):
        console.print(escape(line), highlight=False, soft_wrap=True)


def _what(report: dict[str, Any]) -> dict[str, Any]:
    model, inputs, plan = report["model"], report["inputs"], report["plan"]
    height, width = model["image_size"]
    environment = {
        name.replace("_", " "): value
        for name, value in report["environment"].items()
        if name not in ("backend", "note") and value is not None
    }
    return {
        "model": f"{model['architecture']}, {height}x{width}, {model['precision']}, "
        f"verdict: {model['verdict']}",
        **environment,
        **report["machine"],
        "images": f"{inputs['images']} from {inputs['source']}, batch {inputs['batch']}",
        "runs": f"{plan['blocks']} blocks of {plan['runs_a_block']} of each model, in turn, after "
        f"{plan['warm_up']} to warm up",
    }


def _print_times(console: Console, models: list[dict[str, Any]]) -> None:
    on_gpu = any(row["gpu_ms"] for row in models)
    names = ("mean", "p50", "p90", "p99")
    table = _table("milliseconds", *names, "images/s", *(["GPU alone"] if on_gpu else []))
    for row in models:
        cells = [f"{row['latency_ms'][name]:.3f}" for name in names]
        cells.append(f"{row['images_per_second']:.1f}")
        if on_gpu:
            cells.append(f"{row['gpu_ms']['mean']:.3f}" if row["gpu_ms"] else "")
        table.add_row(row["name"], *cells)
    console.print(table, highlight=False)
    console.print()
    table = _table("over dense", "speed-up", f"{LEVEL} % interval", "allowed", "reached", "tokens")
    for row in models:
        for what in ("speedup", "gpu_speedup"):
            if row.get(what):
                name = row["name"] + (", GPU alone" if what == "gpu_speedup" else "")
                table.add_row(name, *_speedup(row[what], row["tokens"]))
    console.print(table, highlight=False)


def _speedup(found: dict[str, Any], tokens: dict[str, Any]) -> list[str]:
    ratio, low, high = (found[name] for name in ("ratio", "low", "high"))
    cells = [f"{ratio:.2f}x", "unknown" if low is None else f"{low:.2f}..{high:.2f}"]
    if "unknown" in tokens:
        return [*cells, "unknown", "", "unknown"]
    allowed = tokens["allowed_speedup"]
    return [*cells, f"{allowed:.2f}x", f"{ratio / allowed:.0%}", f"{tokens['processed_share']:.0%}"]


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, no_wrap=True, justify="right" if number else "left")
    return table


def _print_memory(console: Console, models: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in models for name in row["memory_bytes"]))
    if not names:
        console.print("memory: unknown on this system", style="dim")
        return
    table = _table("memory in MB", *names)
    for row in models:
        found = row["memory_bytes"]
        table.add_row(
            row["name"], *(f"{found[name] / 1e6:.1f}" if name in found else "" for name in names)
        )
    console.print(table, highlight=False)


def _padding(name: str, padded: dict[str, Any]) -> list[str]:
    """Say what batches take, and where they give back much of what an image alone saves."""
    shares = padded["flops_share"]
    texts = " / ".join(f"{share:.0%}" for share in shares.values())
    lines = [f"{name}: FLOPs at batch {' / '.join(shares)}: {texts}"]
    if padded["given_back"] > MUCH_GIVEN_BACK:
        lines.append(
            spelled(
                f"{name}: batches of {padded['batch']} give back {padded['given_back']:.0%} of "
                f"what an image alone saves: export fixed counts with {argument('tokens')}, or "
                "run smaller batches"
            )
        )
    return lines


def _layer_cost(cost: dict[str, Any]) -> str:
    share, low, high = (
        # a rounded -0.0 would be printed with its sign
        None if cost[name] is None else f"{round(cost[name], 3) + 0.0:.1%}"
        for name in ("share", "low", "high")
    )
    within = "" if low is None else f" ({low} to {high})"
    return f"a prune layer costs {share}{within} of the dense model's time here"


def _notes(report: dict[str, Any]) -> list[str]:
    rows = [row for row in report["models"] if "speedup" in row]
    lines = [""]
    for row in rows:
        tokens = row["tokens"]
        if "unknown" in tokens:
            lines.append(f"{row['name']}: tokens unknown: {tokens['unknown']}")
            continue
        kept = ", ".join(f"{count:g} from block {layer}" for layer, count in tokens["kept"].items())
        lines.append(f"{row['name']}: tokens of {tokens['before']}, mean over the batches: {kept}")
        if tokens["padded"] is not None:
            lines += _padding(row["name"], tokens["padded"])
        if row["layer_cost"] is not None:
            lines.append(f"{row['name']}: {_layer_cost(row['layer_cost'])}")
    lines.append(
        "speed-up: the median over the blocks; allowed: dense FLOPs over pruned, without the "
        "pruning's own work; tokens: the share that the blocks process"
    )
    if any(row["tokens"].get("padded") for row in rows):
        lines.append(
            "FLOPs: of the blocks, as a share of the dense model's, in batches of these images: "
            "each layer is padded to the image of its batch that keeps the most"
        )
    if any(row["speedup"]["low"] is None for row in rows):
        lines.append(spelled(f"too few blocks for an interval: raise {argument('iterations')}"))
    if report["machine_was_busy"]:
        lines.append(
            "note: the machine was busy before this began, so the times are not its best; the "
            "speed-ups compare what ran side by side"
        )
    if "note" in report["environment"]:
        lines.append(f"note: {report['environment']['note']}")
    lines += [f"skipped {name}: {reason}" for name, reason in report["inputs"]["skipped"]]
    if report["trtexec"]:
        lines.append("the same with trtexec:")
        lines += report["trtexec"]
    return lines
