"""What the parts of calibration are worth: features, and how a tolerance falls with an image.

    python experiments/parts.py photographs -o docs/method

Every combination prunes inside all blocks, the same part of the patches in each, with tolerances
found on the half of a track that calibrates, and aimed at a share of the FLOPs there; the numbers
are of the other half, and of both together. *alike*: the same thresholds for every image;
*falling*: the tolerance falls with the share of its patches that an image has left, to none;
*floor*: to next to none at 0.8 of what images have left on average in the end, as the product does.
Writes ``parts-TRACK.csv``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tracks import RESULTS, TRACKS, load_halves, run, write_csv

from simprune_deploy.pruning.calibrated_curve import FLOOR
from simprune_deploy.pruning.calibrator import Calibrator, Candidate, OnAverage, Pass
from simprune_deploy.pruning.config import FEATURES, Features

NONE = -1e9
"""A floor so far below that all images have the same part of a tolerance."""

CLOSE = 0.003
TRIES = 4


def floors(left: tuple[float, ...]) -> dict[str, float]:
    return {"alike": NONE, "falling": 0.0, "floor": FLOOR * left[-1]}


def aimed(
    calibrator: Calibrator, candidate: Candidate, images: list[int], share: float, form: str
) -> Pass:
    """Return the run whose images take about that share of the FLOPs on average."""
    aim = share
    for _ in range(TRIES):
        left = calibrator.left_at(candidate, aim)
        found = calibrator.run(candidate, images, OnAverage(left, floors(left)[form]))
        short = share - float(found.flops.mean())
        if abs(short) < CLOSE:
            break
        aim = min(max(aim + short, 0.01), 0.999)
    return found


def to_row(share: float, form: str, features: Features, seen: Pass, unseen: Pass) -> dict[str, Any]:
    row: dict[str, Any] = {"share": share, "tolerance": form, "features": features}
    both = np.concatenate([seen.losses, unseen.losses])
    parts = {"held out": unseen.losses, "both": both}
    for name, losses in parts.items():
        row |= {
            name: round(1000 * losses.mean(), 3),
            f"{name} worst": round(1000 * losses.max(), 2),
        }
    return {**row, "held out flops": round(float(unseen.flops.mean()), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("track", choices=TRACKS)
    parser.add_argument("--pixels", type=int, default=224, help="of a photograph; default 224")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.77, 0.65, 0.52])
    parser.add_argument("--images", type=int, default=200, help="of Fashion-MNIST; default 200")
    parser.add_argument("--weights", type=Path, default=Path("real-weights"))
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    halves = load_halves(args.track, args.weights, args.pixels, args.images)
    calibrator = Calibrator(halves[0].vit, torch.cat([half.images for half in halves]))
    first = len(halves[0].images)
    known, others = list(range(first)), list(range(first, len(calibrator.tokens)))
    rows = []
    for share in args.shares:
        for form in floors((1.0,)):
            for features in FEATURES:
                candidate = Candidate(features, (1.0,) * calibrator.depth)
                seen = aimed(calibrator, candidate, known, share, form)
                assert seen.tolerances is not None
                unseen = calibrator.run(candidate, others, seen.tolerances)
                rows.append(to_row(share, form, features, seen, unseen))
    table = Table(*rows[0], title=f"{args.track}: {first} and {len(others)} images")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=120).print(table)
    write_csv(args.output / f"parts-{args.track}.csv", rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(run(main))
