"""What rivals.py measured, read again: losses at equal measured speed-up, and a plot of them.

    python experiments/rival_results.py docs/method/rivals-photographs-224.csv

writes ``rivals-photographs-224.svg`` beside it. Between two settings of a method that were measured
the logarithm of its mean loss is taken to grow linearly with the speed-up; nothing is extrapolated.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tracks import run

from simprune_deploy.common.errors import DataError
from simprune_deploy.common.files import staged_file

OURS = "ours"
REFERENCE = "tome"
RESAMPLES = 2000
STYLES = {
    OURS: ("#c1272d", "o"),
    "tome": ("#1f4e79", "s"),
    "tome, decreasing": ("#6fa8dc", "s"),
    "pitome": ("#38761d", "^"),
    "atm": ("#b45f06", "D"),
    "saint": ("#7f6000", "v"),
    "random": ("#888888", "x"),
}


@dataclasses.dataclass(frozen=True)
class Method:
    """A method at all settings that were timed, by ascending speed-up.

    Attributes:
        name: As in the table; all files of ours are one method.
        speedups: float64[s], measured, over the unpruned model.
        losses: float64[s, n], of each image.
    """

    name: str
    speedups: np.ndarray
    losses: np.ndarray

    def at(self, speedup: float, images: np.ndarray) -> np.ndarray | None:
        """Return the mean loss of images at a speed-up; None outside what was measured.

        Args:
            speedup: Wanted.
            images: int64[..., m], their numbers: a mean for each row.
        """
        found = self._between(speedup)
        if found is None:
            return None
        low, part = found
        first, second = (np.log(self.losses[at][images].mean(-1)) for at in (low, low + 1))
        return np.asarray(np.exp(first + part * (second - first)))

    def worst_at(self, speedup: float) -> float | None:
        """Return the largest loss of an image at a speed-up; None outside what was measured."""
        found = self._between(speedup)
        if found is None:
            return None
        low, part = found
        first, second = (np.log(np.maximum(self.losses[at], 1e-6)) for at in (low, low + 1))
        return float(np.exp(first + part * (second - first)).max())

    def _between(self, speedup: float) -> tuple[int, float] | None:
        if len(self.speedups) < 2 or not self.speedups[0] <= speedup <= self.speedups[-1]:
            return None
        low = min(int(np.searchsorted(self.speedups, speedup, "right")), len(self.speedups) - 1) - 1
        left, right = self.speedups[low : low + 2]
        return low, (speedup - left) / (right - left)


def methods_of(rows: Iterable[dict[str, str]]) -> dict[str, Method]:
    """Return the methods of a table that were timed."""
    timed = [row for row in rows if row["speedup"]]

    def name(row: dict[str, str]) -> str:
        return OURS if row["method"].startswith(OURS) else row["method"]

    found = {}
    for each, group in itertools.groupby(sorted(timed, key=name), key=name):
        ordered = sorted(group, key=lambda row: float(row["speedup"]))
        losses = [[float(loss) for loss in row["losses"].split()] for row in ordered]
        speedups = np.array([float(row["speedup"]) for row in ordered])
        found[each] = Method(each, speedups, np.array(losses))
    return found


def ratio(method: Method, other: Method, speedup: float) -> tuple[float, float, float] | None:
    """Return how many times the other's mean loss a method has, and the bounds of 95 % of that.

    Paired: both of the same resampled images. None if one of them was not measured there.
    """
    count = method.losses.shape[1]
    every = np.arange(count)
    draws = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    mine, its = method.at(speedup, every), other.at(speedup, every)
    drawn, its_drawn = method.at(speedup, draws), other.at(speedup, draws)
    if mine is None or its is None or drawn is None or its_drawn is None:
        return None
    low, high = np.quantile(drawn / its_drawn, [0.025, 0.975])
    return float(mine / its), float(low), float(high)


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table.

    Raises:
        DataError: it is missing, or nothing in it was timed.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if not any(row.get("speedup") for row in rows):
        raise DataError(f"nothing in {path} was timed: run rivals.py with rounds")
    return rows


def draw(methods: dict[str, Method], path: Path) -> None:
    """Draw the mean losses over the measured speed-ups."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "rivals"
    figure, axes = pyplot.subplots(figsize=(7.5, 4.5))
    for name, (color, marker) in STYLES.items():
        if (found := methods.get(name)) is None:
            continue
        width = 2.4 if name == OURS else 1.3
        means = found.losses.mean(1)
        axes.plot(found.speedups, means, color=color, marker=marker, linewidth=width, label=name)
    axes.set_yscale("log")
    axes.set_xlabel("measured speed-up over the unpruned model (ONNX Runtime, one thread)")
    axes.set_ylabel("1000 x (1 - cosine), mean")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    figure.tight_layout()
    with staged_file(path) as staging:
        figure.savefig(staging, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path, help="CSV file of rivals.py")
    args = parser.parse_args()
    draw(methods_of(read(args.table)), args.table.with_suffix(".svg"))


if __name__ == "__main__":
    sys.exit(run(main))
