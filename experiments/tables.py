"""Write the tables of docs/method.md from the CSV files beside it.

    python experiments/tables.py

A table stands between ``<!-- table: FILE ... -->`` and ``<!-- end -->``, where ``...`` is a measure
("cosine", "accuracy", "loss") and for the rivals "rivals" (at equal FLOPs) or "speedups" (at equal
measured speed-up). ``--check`` only compares, and fails if a number in the page is not that of its
file.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from pathlib import Path

import numpy as np
from rival_results import OURS, methods_of, ratio
from tracks import RESULTS

TABLE = re.compile(r"(<!-- table: (\S+) (.*?) -->\n).*?(<!-- end -->)", re.S)
SPEEDUPS = (1.25, 1.5, 1.75, 2.0)
Rows = list[dict[str, str]]


def choices(rows: Rows, measure: str) -> list[list[str]]:
    """A line for every variant, a column for every share of tokens: gain with its interval."""
    rows = [row for row in rows if row["measure"] == measure]
    shares = list(dict.fromkeys(row["tokens"] for row in rows))
    lines = [["variant", *(f"{float(share):.0%} of tokens" for share in shares)]]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        found = [row for row in rows if row["variant"] == variant]
        if variant == "default":
            cells = [number(row["value"], measure) for row in found]
        else:
            cells = [difference(row, "gain", measure) for row in found]
        lines.append([variant, *cells])
    return lines


def losses(rows: Rows, measure: str) -> list[list[str]]:
    """A line for every method, a column for every share of FLOPs: mean, median, worst loss."""
    targets = sorted({row["target"] for row in rows}, key=float, reverse=True)
    lines = [["method", *(f"{float(target):.0%} of the FLOPs" for target in targets)]]
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        each = sorted(map(float, row["losses"].split()))
        middle = (each[(len(each) - 1) // 2] + each[len(each) // 2]) / 2
        text = (
            f"{float(row[measure]):.1f}, {middle:.1f}, {each[-1]:.0f} at {float(row['flops']):.3f}"
        )
        name = "ours" if row["method"].startswith("ours") else row["method"]
        cells = found.setdefault(name, {})  # of ours several may be nearest to one share
        cells[row["target"]] = "; ".join(filter(None, [cells.get(row["target"]), text]))
    lines += [[name, *(cells.get(each, "-") for each in targets)] for name, cells in found.items()]
    return lines


def parts(rows: Rows, measure: str) -> list[list[str]]:
    """A line for every form and feature, a column for every share: mean and worst loss."""
    shares = list(dict.fromkeys(row["share"] for row in rows))
    lines = [["tolerance", "compared", *(f"{float(share):.0%} of the FLOPs" for share in shares)]]
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        text = f"{float(row[measure]):.1f}, worst {float(row[f'{measure} worst']):.0f}"
        found.setdefault((row["tolerance"], row["features"]), []).append(text)
    return lines + [[*name, *cells] for name, cells in found.items()]


def at_speedups(rows: Rows, measure: str) -> list[list[str]]:
    """A line for every method, a column for every speed-up: mean and worst loss, and ours' part.

    The loss of ours over the method's, with its interval; an asterisk if it does not hold 1.
    """
    methods = methods_of(rows)
    lines = [["method", *(f"{speedup:g}x" for speedup in SPEEDUPS)]]
    order = dict.fromkeys([OURS, *(row["method"] for row in rows)])
    for method in (methods[name] for name in order if name in methods):
        lines.append([method.name])
        for speedup in SPEEDUPS:
            mean = method.at(speedup, np.arange(method.losses.shape[1]))
            worst = method.worst_at(speedup)
            text = "-" if mean is None or worst is None else loss_text(float(mean), worst)
            if method.name != OURS and (part := ratio(methods[OURS], method, speedup)):
                middle, low, high = part
                sure = " *" if low > 1 or high < 1 else ""
                text += f"; ours {middle:.2f} ({low:.2f} to {high:.2f}){sure}"
            lines[-1].append(text)
    return [line for line in lines if set(line[1:]) != {"-"}]


def loss_text(mean: float, worst: float) -> str:
    return f"{mean:.{1 if mean >= 1 else 2}f}, worst {worst:.{0 if worst >= 10 else 1}f}"


def number(text: str, measure: str) -> str:
    return f"{float(text):.1%}" if measure == "accuracy" else f"{float(text):.4f}"


def difference(row: dict[str, str], key: str, measure: str) -> str:
    """Write a difference and its interval; an asterisk if the interval does not hold zero."""
    values = [row[key], row[f"{key} low"], row[f"{key} high"]]
    if "" in values:
        return "not reached"
    middle, low, high = map(float, values)
    sure = " *" if low > 0 or high < 0 else ""
    if measure == "accuracy":
        return f"{middle:+.1%} ({low:+.1%} to {high:+.1%}){sure}"
    return f"{middle:+.4f} ({low:+.4f} to {high:+.4f}){sure}"


def make_table(folder: Path, name: str, what: str) -> str:
    with (folder / name).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    measure, _, form = what.rpartition(" ") if " " in what else (what, "", "")
    makers = {
        "": choices,
        "rivals": losses,
        "speedups": at_speedups,
        "parts": parts,
    }
    maker = makers[form]
    head, *lines = maker(rows, measure)
    rule = ["---"] * len(head)
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *lines))


def filled(page: str, folder: Path) -> str:
    """Return the page with every table made anew."""

    def table(match: re.Match[str]) -> str:
        return match[1] + make_table(folder, match[2], match[3]) + match[4]

    return TABLE.sub(table, page)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", type=Path, default=RESULTS.parent / "method.md")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args()
    before = args.page.read_text(encoding="utf-8")
    after = filled(before, args.results)
    if args.check:
        return int(before != after)
    args.page.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
