"""Ours against the baselines at the same token counts: a table and a figure.

    python experiments/curves.py fashion
    python experiments/curves.py photographs --weights real-weights

At every threshold ours (pairs, merge, three layers at the quarters of the depth) says how many
patches each image keeps after each prune layer, and every baseline keeps just as many of the same
image at the same layer. Only
"tome, fixed" and "ours, fixed" keep as many of every image, the mean of ours at each layer. Writes
``curves-TRACK.csv`` and ``curves-TRACK.svg`` into docs/method, or the folder of ``-o``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tracks import (
    RESULTS,
    TRACKS,
    Measured,
    Track,
    bootstrap,
    load_track,
    quarters,
    run,
    steps,
    summarize,
    tokens_share,
    write_csv,
)

import simprune_deploy as sd
from simprune_deploy.common.files import staged_file
from simprune_deploy.evaluate.statistics import paired_drop
from simprune_deploy.pruning.model import PrunedViT, PruneTrace
from simprune_deploy.reports.plots import render_pareto
from simprune_deploy.tuning.baselines import Baseline, kept_counts
from simprune_deploy.tuning.results import DENSE, OURS, Measurement, Setting, SweepResult

BASELINES = {
    "random": Baseline("random"),
    "redundancy": Baseline("redundancy"),
    "saint": Baseline("saint"),
    "tome": Baseline("tome"),
    "saint, keys": Baseline("saint", features="keys"),
    "tome, keys": Baseline("tome", features="keys"),
}
THRESHOLDS = {"fashion": "0.95,0.9,0.85,0.8,0.7", "photographs": "0.9,0.85,0.8,0.7,0.6"}
IMAGES = {"fashion": 1000, "photographs": 28}


@torch.inference_mode()
def measure(track: Track, model: PrunedViT) -> dict[str, Measured]:
    """Run ours and, at its token counts, every baseline; then what keeps a fixed number.

    That is, of every image, the mean of ours at each layer: ToMe as it was published, and ours with
    `tokens` (above a threshold of 1 only they decide).
    """
    outputs: dict[str, list[torch.Tensor]] = {OURS: [], **{name: [] for name in BASELINES}}
    found = []
    chunks = track.images.split(track.batch)
    for chunk in steps(chunks, f"threshold {model.config.threshold}"):
        traces: list[PruneTrace] = []
        outputs[OURS].append(model(chunk, traces=traces))
        found.append(kept_counts(traces, model.num_prefix_tokens))
        for name, baseline in BASELINES.items():
            outputs[name].append(baseline.run(model, chunk, found[-1]).outputs)
    counts = torch.cat(found)
    tokens = tokens_share(model, counts)
    measured = {name: summarize(track, torch.cat(each), tokens) for name, each in outputs.items()}
    fixed = counts.double().mean(0).round().long().expand_as(counts)
    parts = zip(chunks, fixed.split(track.batch), strict=True)
    tome = torch.cat([Baseline("tome").run(model, *part).outputs for part in parts])
    static = sd.prune(model, threshold=2.0, tokens=fixed[0].tolist()).eval()
    ours = torch.cat([static(chunk) for chunk in chunks])
    share = tokens_share(model, fixed)
    measured |= {"tome, fixed": summarize(track, tome, share)}
    measured |= {"ours, fixed": summarize(track, ours, share)}
    return measured


def to_row(threshold: float, name: str, found: Measured, ours: Measured) -> dict[str, Any]:
    """One line of the CSV; `lead` is ours minus this one, with its 95 % interval."""
    difference = ours.cosine - found.cosine
    low, high = bootstrap(lambda chosen: difference[chosen].mean(), len(difference))
    row: dict[str, Any] = {
        "threshold": threshold,
        "method": name,
        "images": len(found.cosine),
        "tokens": round(float(found.tokens.mean()), 4),
        "cosine": round(float(found.cosine.mean()), 5),
        "worst cosine": round(float(found.cosine.min()), 5),
        "cosine lead": round(float(difference.mean()), 5),
        "cosine lead low": round(float(low), 5),
        "cosine lead high": round(float(high), 5),
    }
    if found.right is not None and ours.right is not None and found.same is not None:
        only_ours = int((ours.right & ~found.right).sum())
        only_other = int((found.right & ~ours.right).sum())
        lead = paired_drop(only_ours, only_other, len(found.right))
        row |= {
            "accuracy": round(float(found.right.mean()), 4),
            "agreement": round(float(found.same.mean()), 4),
            "accuracy lead": round(lead.estimate, 4),
            "accuracy lead low": round(lead.low, 4),
            "accuracy lead high": round(lead.high, 4),
        }
    return row


def draw(rows: Sequence[dict[str, Any]], layers: tuple[int, ...], dense: float | None) -> bytes:
    """Draw the rows as a sweep's report would; SVG.

    Args:
        rows: Of the CSV file.
        layers: The blocks before which they prune.
        dense: The unpruned model's accuracy, or None without labels.
    """
    cells = [Measurement(Setting(DENSE), images=0, top1=dense, cosine=1.0)]
    for row in rows:
        if row["method"].endswith(", keys"):
            continue
        accuracy = None if dense is None else float(row["accuracy"])
        method, _, fixed = row["method"].partition(", ")
        if method == OURS:  # drawn as `--tokens` is in a sweep's report
            setting = Setting(OURS, float(row["threshold"]), layers, tokens=() if fixed else None)
        else:
            setting = Setting(row["method"], float(row["threshold"]), layers)
        measured = {"cosine": float(row["cosine"]), "tokens_processed": float(row["tokens"])}
        cells.append(Measurement(setting, int(row["images"]), top1=accuracy, **measured))
    return render_pareto(SweepResult({}, {}, {}, tuple(cells)), "svg")


def print_rows(rows: list[dict[str, Any]], title: str) -> None:
    quality = "accuracy" if "accuracy" in rows[0] else "cosine"
    table = Table("threshold", "tokens", "method", quality, "ours minus it", "95 %", title=title)
    for row in rows:
        lead = "" if row["method"] == OURS else f"{row[f'{quality} lead']:+.4f}"
        bounds = f"{row[f'{quality} lead low']:+.4f} .. {row[f'{quality} lead high']:+.4f}"
        table.add_row(
            str(row["threshold"]),
            f"{row['tokens']:.1%}",
            str(row["method"]),
            f"{row[quality]:.4f}",
            lead,
            bounds if lead else "",
        )
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("track", choices=TRACKS)
    parser.add_argument("--images", type=int, help="how many; default 1000, or 28 photographs")
    parser.add_argument("--thresholds", help="of ours, separated by commas")
    parser.add_argument("--weights", type=Path, default=Path("real-weights"))
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    track = load_track(args.track, args.images or IMAGES[args.track], args.weights)
    rows: list[dict[str, Any]] = []
    layers: tuple[int, ...] = ()
    for threshold in map(float, (args.thresholds or THRESHOLDS[args.track]).split(",")):
        model = sd.prune(track.vit, threshold=threshold, layers=quarters(track.vit))
        layers, found = model.config.layers, measure(track, model)
        rows += [to_row(threshold, name, each, found[OURS]) for name, each in found.items()]
    args.output.mkdir(parents=True, exist_ok=True)
    write_csv(args.output / f"curves-{track.name}.csv", rows)
    dense = summarize(track, track.dense, np.ones(len(track.dense))).right
    with staged_file(args.output / f"curves-{track.name}.svg") as staging:
        staging.write_bytes(draw(rows, layers, None if dense is None else float(dense.mean())))
    accuracy = "" if dense is None else f", unpruned accuracy {dense.mean():.2%}"
    print_rows(rows, f"{track.name}: {len(track.images)} images{accuracy}")


if __name__ == "__main__":
    sys.exit(run(main))
