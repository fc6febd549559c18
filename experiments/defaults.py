"""Which layers, place and features do best under one threshold for all: a table for both tracks.

    python experiments/defaults.py

For whoever calibrates nothing: every candidate is a rule of the depth alone. Its threshold is
sought until the images process about the wished share of the dense model's FLOPs on average, all
images of the track at once: all 74 photographs, and the first 300 of Fashion-MNIST. The loss is
1000 x (1 - cosine of the output to the dense model's). ``mean`` is the mean loss at the wished
share, and ``mean at cost`` where the share and the prune layers' own work together are what was
wished; both are interpolated, in the loss's logarithm, between the settings that were run.
``median`` and ``worst`` are of the setting with the ``threshold`` and the ``FLOPs`` of the row.
Writes ``defaults.csv`` into the folder of ``-o``; the photographs take most of an hour.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tracks import TRACKS, Track, load_halves, run, steps, write_csv

import simprune_deploy as sd
from simprune_deploy.pruning import cost
from simprune_deploy.pruning.calibrator import LAYER_COST
from simprune_deploy.pruning.model import PrunedViT, PruneTrace
from simprune_deploy.tuning.baselines import kept_counts

SHARES = (0.75, 0.65, 0.55)
NEAR = 0.004
"""How far from the wished share of the FLOPs a setting may end."""
RUNS = 10
"""Thresholds that are tried for a share, at most."""
START = 0.85
STRICT, LAX = (1.0, 1.0), (0.0, 0.3)
"""Thresholds between which is sought, and the shares taken for theirs until a run says better."""

RULES: dict[str, tuple[float, ...]] = {
    "quarters": (1 / 4, 2 / 4, 3 / 4),
    "sixths": (1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6),
    "early five": (1 / 12, 2 / 12, 4 / 12, 6 / 12, 8 / 12),
    "odd twelfths": (1 / 12, 3 / 12, 5 / 12, 7 / 12, 9 / 12, 11 / 12),
    "five of odd twelfths": (1 / 12, 3 / 12, 5 / 12, 7 / 12, 9 / 12),
    "all but the first": tuple(i / 12 for i in range(1, 12)),
}
"""Where a rule's layers are, as parts of the depth: of 12 blocks, quarters are 3, 6 and 9."""

CANDIDATES = (
    ("quarters", "before", "tokens"),
    ("sixths", "before", "tokens"),
    ("early five", "before", "tokens"),
    ("odd twelfths", "before", "tokens"),
    ("all but the first", "before", "tokens"),
    ("quarters", "inside", "tokens"),
    ("sixths", "inside", "tokens"),
    ("early five", "inside", "tokens"),
    ("five of odd twelfths", "inside", "tokens"),
    ("odd twelfths", "inside", "tokens"),
    ("early five", "inside", "tokens+keys"),
    ("odd twelfths", "inside", "tokens+keys"),
)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One default, apart from the threshold."""

    rule: str
    place: str
    features: str

    def layers(self, depth: int) -> list[int]:
        """Return the rule's blocks, never the first: rounded down, as "auto" does."""
        found = (int(depth * part + 1e-9) for part in RULES[self.rule])
        return sorted({min(max(1, block), depth - 1) for block in found})

    def model(self, track: Track, threshold: float) -> PrunedViT:
        return sd.prune(
            track.vit,
            threshold=threshold,
            layers=self.layers(len(track.vit.blocks)),
            place=self.place,
            features=self.features,
        ).eval()


@dataclasses.dataclass(frozen=True)
class Point:
    """A candidate at one threshold: the mean share of the FLOPs, and every image's loss."""

    threshold: float
    share: float
    losses: np.ndarray


@torch.inference_mode()
def measure(track: Track, candidate: Candidate, threshold: float) -> Point:
    """Run all images of the track at one threshold."""
    model = candidate.model(track, threshold)
    config, depth, total = model.config, len(model.vit.blocks), model.num_tokens
    outputs, counts = [], []
    for chunk in track.images.split(track.batch):
        traces: list[PruneTrace] = []
        outputs.append(model(chunk, traces=traces))
        counts.append(kept_counts(traces, model.num_prefix_tokens) + model.num_prefix_tokens)
    shares = []
    for kept in torch.cat(counts).tolist():
        tokens = cost.spread_over_blocks(total, config.layers, kept, depth, config.place)
        shares.append(cost.flops_share(model.block_shape, total, tokens))
    cosine = torch.cosine_similarity(torch.cat(outputs).double(), track.dense.double(), dim=1)
    return Point(threshold, float(np.mean(shares)), 1000 * (1 - cosine.numpy()))


def settle(track: Track, candidate: Candidate, share: float, points: list[Point]) -> Point | None:
    """Return the candidate where it takes about this share of the FLOPs; add all runs to `points`.

    False position, and halving in every third run, since shares are a steep function of thresholds
    near 1. None: it cannot take as few.
    """
    for number in range(RUNS):
        known = [STRICT, *((point.threshold, point.share) for point in points), LAX]
        above = min((each for each in known if each[1] >= share), key=lambda each: each[0])
        below = max((each for each in known if each[1] < share), key=lambda each: each[0])
        part = (above[1] - share) / (above[1] - below[1]) if number % 3 < 2 else 0.5
        first = START if not points else above[0] + part * (below[0] - above[0])
        points.append(measure(track, candidate, first))
        if abs(points[-1].share - share) <= NEAR:
            return points[-1]
    return None


def mean_at(points: list[Point], share: float) -> float | str:
    """Return the mean loss at a share of the FLOPs; empty beyond what was run."""
    ordered = sorted(points, key=lambda point: point.share)
    shares = [point.share for point in ordered]
    if not shares[0] <= share <= shares[-1]:
        return ""
    losses = np.log([max(1e-6, point.losses.mean()) for point in ordered])
    return round(float(np.exp(np.interp(share, shares, losses))), 3)


def compare(track: Track, candidate: Candidate) -> list[dict[str, object]]:
    """Return a row for every share of the FLOPs."""
    layers = candidate.layers(depth := len(track.vit.blocks))
    extra = LAYER_COST * len(layers) * 12 / depth  # a part of a forward pass of 12 blocks
    points: list[Point] = []
    settled = [settle(track, candidate, share, points) for share in SHARES]
    if settled[-1]:  # a little beyond, so that the cheapest share has neighbours on both sides
        settle(track, candidate, SHARES[-1] - extra, points)
    rows = []
    for share, found in zip(SHARES, settled, strict=True):
        row: dict[str, object] = {
            "track": track.name,
            "images": len(track.images),
            "rule": candidate.rule,
            "place": candidate.place,
            "features": candidate.features,
            "layers": " ".join(map(str, layers)),
            "wished": share,
        }
        row |= {
            "FLOPs": "" if found is None else round(found.share, 4),
            "threshold": "" if found is None else round(found.threshold, 4),
            "mean": mean_at(points, share),
            "median": "" if found is None else round(float(np.median(found.losses)), 3),
            "worst": "" if found is None else round(float(found.losses.max()), 2),
            "mean at cost": mean_at(points, share - extra),
        }
        rows.append(row)
    return rows


def join(halves: tuple[Track, Track]) -> Track:
    """Return both halves of a track as one."""
    first, second = halves
    images = torch.cat([first.images, second.images])
    dense = torch.cat([first.dense, second.dense])
    return dataclasses.replace(first, images=images, labels=None, dense=dense)


def print_rows(rows: list[dict[str, object]]) -> None:
    shown = [name for name in rows[0] if name not in ("images", "track")]
    table = Table(*shown, title=f"{rows[0]['track']}: {rows[0]['images']} images")
    for row in rows:
        table.add_row(*(str(row[name]) for name in shown))
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tracks", nargs="+", choices=TRACKS, default=TRACKS)
    parser.add_argument("--images", type=int, default=300, help="of Fashion-MNIST; default 300")
    parser.add_argument("--weights", type=Path, default=Path("real-weights"))
    parser.add_argument("-o", "--output", type=Path, default=Path())
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    for name in args.tracks:
        track = join(load_halves(name, args.weights, images=args.images))
        seen: set[tuple[object, ...]] = set()
        found = []
        for choice in steps(CANDIDATES, name):
            candidate = Candidate(*choice)
            same = (*candidate.layers(len(track.vit.blocks)), *choice[1:])
            if same not in seen:  # of six blocks some rules are the same
                seen.add(same)
                found += compare(track, candidate)
        print_rows(found)
        rows += found
    args.output.mkdir(parents=True, exist_ok=True)
    write_csv(args.output / "defaults.csv", rows)


if __name__ == "__main__":
    sys.exit(run(main))
