"""What a person sees of an export."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console

from simprune_deploy.reports.terminal import print_facts, print_verdict

if TYPE_CHECKING:
    from simprune_deploy.deploy.export import ExportResult


def print_export(result: ExportResult) -> None:
    """Print what was exported, and the verdict on it."""
    console = Console()
    facts = result.manifest["model"]
    pruning, usual = facts["pruning"], facts["export"]["opt_tokens"]
    print_facts(
        console,
        {
            "model": facts["architecture"] or "(unnamed)",
            "checkpoint": "; ".join(result.checkpoint),
            f"prunes {pruning['place']} blocks": pruning["layers"],
            "compares": pruning["features"],
            **_thresholds(pruning),
            "precision": facts["export"]["precision"],
            "patches kept": pruning["capacities"] or "as many as the image needs",
            **({"tokens TensorRT tunes for": usual} if usual else {}),
            "written": ", ".join(
                f"{result.folder / name} ({entry['bytes'] / 1e6:.1f} MB)"
                for name, entry in result.manifest["files"].items()
                if name.endswith(".onnx")
            ),
        },
    )
    if result.calibrated is not None:
        console.print(f"calibrated: {result.calibrated}", highlight=False, markup=False)
    if result.precision_note:
        console.print(result.precision_note, highlight=False, markup=False, soft_wrap=True)
    for each in result.assumed:
        console.print(each, style="yellow", highlight=False, markup=False)
    console.print()
    if result.verdict is None:
        console.print("verdict: [yellow]not verified[/yellow] (--no-verify)", highlight=False)
    else:
        print_verdict(console, result.verdict)


def _thresholds(pruning: dict[str, Any]) -> dict[str, Any]:
    if pruning["curve"] is None:
        return {"threshold": pruning["threshold"]}
    return {"thresholds": f"calibrated, for {pruning['threshold']:.0%} of the blocks' FLOPs"}
