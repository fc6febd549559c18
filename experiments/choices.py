"""What the choices of ours are worth, at equal numbers of tokens: a table for one track.

    python experiments/choices.py fashion layers
    python experiments/choices.py photographs spread --weights real-weights

``selection`` varies what goes, what becomes of it and the attention; ``layers`` the blocks before
which it happens; ``spread`` adds a term that keeps patches spread over the image (variants.py).

Every variant is compared with the default (pairs, merge, proportional attention, three layers at
the quarters of the depth) where both process the same mean share of tokens. The thresholds for
about those shares are found on some of the images, all images are run at them, and between them,
and the unpruned model, quality is interpolated. The 95 % interval is that of a bootstrap which
draws the same images for both.
Writes ``GROUP-TRACK.csv`` into docs/method, or the folder of ``-o``.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

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
from variants import SpreadViT

import simprune_deploy as sd
from simprune_deploy.pruning.model import PrunedViT, PruneTrace
from simprune_deploy.tuning.baselines import kept_counts

GROUPS = ("selection", "layers", "spread")
PROBES = (0.995, 0.98, 0.95, 0.9, 0.8, 0.65, 0.45, 0.25)
"""Thresholds that are tried on some of the images."""

SHARES = {"fashion": (0.6, 0.5, 0.45), "photographs": (0.8, 0.65, 0.5)}
"""Of tokens processed, where variants are compared."""

AROUND = {
    "fashion": (0.75, 0.62, 0.54, 0.48, 0.44),
    "photographs": (0.9, 0.78, 0.66, 0.54, 0.42),
}
"""Shares near which all images are run."""

EVERY = {"fashion": 10, "photographs": 4}
"""Thresholds are tried on every so manieth image."""
IMAGES = {"fashion": 500, "photographs": 28}
LAYERS = {
    "fashion": ("0", "1", "2", "3", "1,2", "1,3", "2,4", "2,3,4", "1,2,3,4,5"),
    "photographs": ("1", "3", "6", "1,4", "3,6", "1,2,3", "4,7,10", "2,4,6,8,10"),
}
DEFAULT = "default"


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to prune, apart from the threshold.

    Attributes:
        name: For the table.
        options: For ``sd.prune``.
        spread: The weight and the reach of the place in the similarity; None: not in it.
    """

    name: str
    options: dict[str, object] = dataclasses.field(default_factory=dict)
    spread: tuple[float, float] | None = None

    def model(self, track: Track, threshold: float) -> PrunedViT:
        options = {"layers": quarters(track.vit), **self.options}
        model = sd.prune(track.vit, threshold=threshold, **options)
        if self.spread:
            model = SpreadViT(model.vit, model.config, *self.spread)
        return model.eval()


def variants(track: str, group: str) -> list[Variant]:
    """Return the default, then every variant of a group."""
    found = [Variant(DEFAULT)]
    if group == "selection":
        pairs = [("pairs", "drop"), ("redundancy", "merge"), ("redundancy", "drop")]
        for selection, reduction in pairs:
            options = {"selection": selection, "reduction": reduction}
            found.append(Variant(f"{selection} + {reduction}", options))
        for reduction in ("merge", "drop"):
            options = {"reduction": reduction, "proportional_attention": False}
            found.append(Variant(f"pairs + {reduction}, plain attention", options))
    elif group == "layers":
        for layers in LAYERS[track]:
            blocks = [int(layer) for layer in layers.split(",")]
            found.append(Variant(layers, {"layers": blocks}))
    else:
        for weight in (0.1, 0.3):
            for reach in (2.0, 5.0):
                found.append(Variant(f"weight {weight}, reach {reach:g}", {}, (weight, reach)))
    return found


@torch.inference_mode()
def measure(track: Track, variant: Variant, threshold: float) -> Measured:
    """Run a variant on all images of the track."""
    outputs, counts = [], []
    model = variant.model(track, threshold)
    for chunk in track.images.split(track.batch):
        traces: list[PruneTrace] = []
        outputs.append(model(chunk, traces=traces))
        counts.append(kept_counts(traces, model.num_prefix_tokens))
    return summarize(track, torch.cat(outputs), tokens_share(model, torch.cat(counts)))


def thresholds_for(track: Track, variant: Variant, shares: Sequence[float]) -> list[float]:
    """Return the thresholds at which some images process about these shares of their tokens."""
    few = track.every(EVERY[track.name])
    found = [measure(few, variant, probe).tokens.mean() for probe in reversed(PROBES)]
    return sorted(set(np.interp(shares, np.maximum.accumulate(found), PROBES[::-1]).tolist()))


def quality(found: Measured, name: str) -> np.ndarray:
    return found.cosine if name == "cosine" or found.right is None else found.right.astype(float)


def at_shares(
    curve: Sequence[Measured], name: str, shares: Sequence[float], chosen: np.ndarray
) -> np.ndarray:
    """Return the mean quality of the chosen images where the mean share of tokens is `shares`.

    NaN where the thresholds do not reach.
    """
    tokens = np.array([found.tokens[chosen].mean() for found in curve])
    values = np.array([quality(found, name)[chosen].mean() for found in curve])
    order = tokens.argsort()
    return np.interp(shares, tokens[order], values[order], left=np.nan, right=np.nan)


def compare(
    variant: Variant,
    curve: Sequence[Measured],
    default: Sequence[Measured],
    shares: Sequence[float],
) -> list[dict[str, object]]:
    """Return a row for every share of tokens and measure of quality."""
    images = len(curve[0].tokens)
    rows = []
    for name in ("cosine", *(["accuracy"] if curve[0].right is not None else [])):

        def gain(chosen: np.ndarray, name: str = name) -> np.ndarray:
            return at_shares(curve, name, shares, chosen) - at_shares(default, name, shares, chosen)

        everything = np.arange(images)
        values = at_shares(curve, name, shares, everything)
        middle, (low, high) = gain(everything), bootstrap(gain, images)
        for i, share in enumerate(shares):
            rows.append(
                {
                    "variant": variant.name,
                    "images": images,
                    "tokens": share,
                    "measure": name,
                    "value": rounded(values[i]),
                    "gain": rounded(middle[i]),
                    "gain low": rounded(low[i]),
                    "gain high": rounded(high[i]),
                }
            )
    return rows


def rounded(value: float) -> float | str:
    return "" if np.isnan(value) else round(float(value), 5)


def print_rows(rows: list[dict[str, object]], title: str) -> None:
    table = Table("variant", "measure", "tokens", "value", "gain", "95 %", title=title)
    for row in rows:
        known = row["gain low"] != ""
        bounds = f"{row['gain low']:+.4f} .. {row['gain high']:+.4f}" if known else ""
        gain = f"{row['gain']:+.4f}" if row["gain"] != "" else "not reached"
        names = (str(row["variant"]), str(row["measure"]), f"{row['tokens']:.0%}")
        table.add_row(*names, str(row["value"]), gain, bounds)
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("track", choices=TRACKS)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--images", type=int, help="how many; default 500, or 28 photographs")
    parser.add_argument("--weights", type=Path, default=Path("real-weights"))
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    track = load_track(args.track, args.images or IMAGES[args.track], args.weights)
    rows: list[dict[str, object]] = []
    default: list[Measured] = []
    for variant in steps(variants(track.name, args.group), "variants"):
        thresholds = thresholds_for(track, variant, AROUND[track.name])
        curve = [measure(track, variant, threshold) for threshold in thresholds]
        curve.append(summarize(track, track.dense, np.ones(len(track.dense))))
        default = default or curve
        rows += compare(variant, curve, default, SHARES[track.name])
    args.output.mkdir(parents=True, exist_ok=True)
    write_csv(args.output / f"{args.group}-{track.name}.csv", rows)
    print_rows(rows, f"{track.name}: {len(track.images)} images, gain over the default")


if __name__ == "__main__":
    sys.exit(run(main))
