"""Ours, calibrated on the half of a track that calibrates, exported for rivals.py to measure.

    python experiments/ours.py photographs --pixels 224 -o real-weights/ours-224

Each share of the FLOPs is calibrated and exported as `simprune-deploy export --flops` does it, for
one image, into a folder of its own; the arguments that let them join rivals.py are printed. With
``--one-curve`` only the first share is calibrated for, and the others are points of its curve.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch
from tracks import TRACKS, load_halves, run

import simprune_deploy as sd
from simprune_deploy.pruning.calibration import calibrate
from simprune_deploy.pruning.config import FEATURES, PruneConfig
from simprune_deploy.pruning.model import PrunedViT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("track", choices=TRACKS)
    parser.add_argument("--pixels", type=int, default=224, help="of a photograph; default 224")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.85, 0.75, 0.65, 0.55, 0.5])
    parser.add_argument("--images", type=int, default=1000, help="of Fashion-MNIST; default 1000")
    parser.add_argument("--calibrate", type=int, default=40, help="pictures, at most; default 40")
    parser.add_argument("--features", choices=FEATURES, help="default: best")
    parser.add_argument(
        "--one-curve", action="store_true", help="calibrate for the first share alone"
    )
    parser.add_argument("--weights", type=Path, default=Path("real-weights"))
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of folders")
    args = parser.parse_args()
    first, _ = load_halves(args.track, args.weights, args.pixels, args.images)
    step = -(-len(first.images) // args.calibrate)
    arguments = []
    config: PruneConfig | None = None
    for share in args.shares:
        if config is None or not args.one_curve:
            found = calibrate(
                first.vit,
                first.images[::step],
                share,
                features=args.features,
                hold_out=False,  # rivals.py holds out the other half
            )
            config = found.config
            print(f"{share}: {found}", flush=True)
        model = PrunedViT(first.vit, dataclasses.replace(config, threshold=share))
        folder = args.output / f"{share:g}"
        pictures = args.weights / "photographs" if args.track == "photographs" else None
        options = sd.ExportOptions(batch=(1, 1))
        result = sd.export(model, folder, options, images=pictures, force=True)
        print(f"{folder}: {result.verdict}", flush=True)
        arguments.append(f"--ours 'ours, {share:g}={folder}'")
    print(" ".join(arguments))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(run(main))
