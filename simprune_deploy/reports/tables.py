"""A sweep as a table: for the terminal, as CSV and as Markdown. Light: rich only."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from simprune_deploy.evaluate.statistics import Interval, paired_drop
from simprune_deploy.pruning.cost import BATCHES
from simprune_deploy.tuning.results import DENSE, OURS, Measurement, SweepResult

if TYPE_CHECKING:
    from rich.console import Console

PADDED = f"FLOPs at {'/'.join(map(str, BATCHES))}"
"""The column that says what batches take of the dense model's FLOPs."""

MISSING = "-"
"""What a table says where nothing was measured."""


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of the table; it is left out where no setting has a value for it.

    Attributes:
        title: Its heading.
        value: The number of a cell, or None.
        text: The number for people.
    """

    title: str
    value: Callable[[Measurement], float | None]
    text: Callable[[float], str]


def percent(value: float) -> str:
    """Return 0.9023 as "90.23%"."""
    return f"{value:.2%}"


def points(value: float) -> str:
    """Return a difference of shares in percentage points, with its sign: "-1.20"."""
    return f"{100 * value:+.2f}" if round(100 * value, 2) else "0.00"


def drop_of(cell: Measurement) -> Interval | None:
    """Return how much lower than the dense model's the accuracy is; None without labels."""
    if cell.right_only_here is None or cell.right_only_dense is None:
        return None
    return paired_drop(cell.right_only_dense, cell.right_only_here, cell.images)


def _change(cell: Measurement) -> float | None:
    drop = drop_of(cell)
    return None if drop is None or cell.setting.method == DENSE else -drop.estimate


COLUMNS = (
    Column("top-1", lambda cell: cell.top1, percent),
    Column("change", _change, points),
    Column("top-5", lambda cell: cell.top5, percent),
    Column("as dense", lambda cell: cell.agreement, percent),
    Column("cosine", lambda cell: cell.cosine, "{:.4f}".format),
    Column("worst", lambda cell: cell.worst_cosine, "{:.4f}".format),
    Column("moved", lambda cell: cell.moved, "{:.3f}".format),
    Column("most moved", lambda cell: cell.worst_moved, "{:.3f}".format),
    Column("tokens", lambda cell: cell.tokens_processed, "{:.0%}".format),
    Column("GFLOPs", lambda cell: cell.gflops, "{:.3g}".format),
    Column(PADDED, lambda cell: cell.padded_flops_share.get(1), "{:.0%}".format),
    Column("ms", lambda cell: cell.milliseconds, "{:.2f}".format),
    Column("speed-up", lambda cell: cell.speedup, "{:.2f}x".format),
    Column("peak MB", lambda cell: cell.peak_memory and cell.peak_memory / 1e6, "{:,.0f}".format),
)

LEGEND = {
    "change": "percentage points of top-1 to the dense model, with the 95% confidence interval "
    "over the same images",
    "as dense": "images with the dense model's class",
    "cosine": "mean cosine of the output to the dense model's",
    "worst": "the smallest such cosine",
    "moved": "mean distance of the output from the dense model's, in standard deviations of the "
    "dense model's over these images",
    "most moved": "the largest such distance",
    "tokens": "mean share of the dense model's tokens over all blocks",
    "GFLOPs": "of the blocks, for one image",
    PADDED: "of the blocks, as a share of the dense model's, in batches of so many of these "
    "images: each layer is padded to the image of its batch that keeps the most",
    "speed-up": "against the dense model, timed in turn with it",
}
"""What the headings mean."""


DISPENSABLE = (
    "top-5",
    "worst",
    "most moved",
    "peak MB",
    "cosine",
    "GFLOPs",
    "ms",
    "as dense",
    PADDED,
)
"""What a narrow terminal leaves out, in this order."""


def columns_of(cells: Sequence[Measurement]) -> list[Column]:
    """Return the columns for which something was measured."""
    return [column for column in COLUMNS if any(column.value(cell) is not None for cell in cells)]


def names_of(cells: Sequence[Measurement]) -> list[str]:
    """Return the settings' names, without the layers if these are the same everywhere."""
    shared, names = _shared(cells), [cell.setting.name for cell in cells]
    if shared is None:
        return names
    place, layers = shared
    same = f" {place} {layers}"
    return [f" {name}".replace(same, "", 1).strip() or name for name in names]


def shared_layers(cells: Sequence[Measurement]) -> str | None:
    """Return the sentence that :func:`names_of` leaves out of the names, or None."""
    shared = _shared(cells)
    return f"pruned {shared[0]} blocks {shared[1]}" if shared else None


def numbers_of(result: SweepResult) -> str | None:
    """Return what the settings' numbers are where they are no cosines, as a sentence, or None."""
    layers = result.model.get("calibrated_layers")
    settings = [cell.setting for cell in result.cells if cell.setting.threshold is not None]
    # elsewhere than where it was calibrated a model has one threshold for all layers
    if layers is None or any(list(each.layers) != layers for each in settings):
        return None
    return "settings: shares of the blocks' FLOPs, for which every layer's threshold is calibrated"


def _shared(cells: Sequence[Measurement]) -> tuple[str, str] | None:
    """Return the place and the blocks of all settings, if they are the same."""
    settings = [cell.setting for cell in cells if cell.setting.method != DENSE]
    found = {(each.place, ",".join(map(str, each.layers))) for each in settings}
    return found.pop() if len(found) == 1 else None


def rows_of(
    cells: Sequence[Measurement], columns: Sequence[Column] | None = None
) -> list[list[str]]:
    """Return the table's rows as text: the setting's name, then a field for each column."""
    shown = columns_of(cells) if columns is None else columns
    return [
        [name, *(_field(column, cell) for column in shown)]
        for name, cell in zip(names_of(cells), cells, strict=True)
    ]


def _field(column: Column, cell: Measurement) -> str:
    value = column.value(cell)
    if value is None:
        return MISSING
    text = column.text(value)
    if column.title == "change" and (drop := drop_of(cell)) is not None:
        # of an accuracy that fell by 1 with bounds 0.4 and 1.6, the change is -1 (-1.6 to -0.4)
        text += f" ({points(-drop.high)} to {points(-drop.low)})"
    if column.title == PADDED:
        shares = [share for _, share in sorted(cell.padded_flops_share.items())]
        text = f"{'/'.join(f'{100 * share:.0f}' for share in shares)}%"
    return text


def print_sweep(console: Console, result: SweepResult) -> None:
    """Print the table, what its headings mean, and what was not measured."""
    from rich.markup import escape
    from rich.table import Table

    def say(text: str, style: str = "dim") -> None:
        console.print(escape(text), style=style, highlight=False, soft_wrap=True)

    columns, left_out = _fitting(result.cells, console.width)
    table = Table(box=None, pad_edge=False)
    table.add_column("setting", overflow="fold")
    for column in columns:
        table.add_column(column.title, justify="right", no_wrap=True)
    for cell, row in zip(result.cells, rows_of(result.cells, columns), strict=True):
        table.add_row(*map(escape, row), style="" if cell.setting.method == OURS else "dim")
    console.print(table)
    if same := shared_layers(result.cells):
        say(same)
    if what := numbers_of(result):
        say(what)
    for title in (column.title for column in columns):
        if title in LEGEND:
            say(f"{title}: {LEGEND[title]}")
    if left_out:
        say(f"left out in this narrow terminal: {', '.join(left_out)}")
    if skipped := result.data.get("skipped", ()):
        name, reason = skipped[0]
        more = f", and {len(skipped) - 1} more" if len(skipped) > 1 else ""
        say(f"skipped {name} ({reason}){more}", "yellow")
    for sentence in not_measured(result):
        say(f"not measured: {sentence}", "yellow")


def _fitting(cells: Sequence[Measurement], width: int) -> tuple[list[Column], list[str]]:
    """Return the columns that fit beside the names, and the titles of those that do not."""
    columns, left_out = columns_of(cells), []
    for title in DISPENSABLE:
        rows = [["setting", *(column.title for column in columns)], *rows_of(cells, columns)]
        if sum(max(map(len, field)) + 2 for field in zip(*rows, strict=True)) <= width:
            break
        left_out += [column.title for column in columns if column.title == title]
        columns = [column for column in columns if column.title != title]
    return columns, left_out


def not_measured(result: SweepResult) -> list[str]:
    """Return what the sweep has no numbers for, in words."""
    outputs = result.model.get("num_classes")
    labelled = result.data.get("labels")
    why = "the model has no classes" if outputs == 0 else "the images have no labels"
    one = "all single outputs are on one side of the cut"
    absent = {
        f"accuracy: {one if labelled and outputs == 1 else why}": lambda cell: cell.top1,
        f"agreement: {one if outputs == 1 else 'the model has no classes'}": lambda cell: (
            cell.agreement
        ),
        f"cosine{': a single output has none' if outputs == 1 else ''}": lambda cell: cell.cosine,
        "GFLOPs": lambda cell: cell.gflops,
        "speed": lambda cell: cell.speedup,
        "peak memory": lambda cell: cell.peak_memory,
    }
    sentences = []
    for what, value in absent.items():
        without = [cell.setting.name for cell in result.cells if value(cell) is None]
        if len(without) == len(result.cells):
            sentences.append(what)
        elif without:
            sentences.append(f"{what.split(':')[0]} of {', '.join(without)}")
    return [*sentences, *map(str, result.environment.get("not_measured", ()))]


def to_csv(result: SweepResult) -> str:
    """Return one line for each setting, with all digits and the bounds of the change."""
    records = [_record(cell) for cell in result.cells]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _record(cell: Measurement) -> dict[str, Any]:
    values = cell.to_dict()
    setting, padded = values.pop("setting"), values.pop("padded_flops_share")
    del values["classes"]
    drop = drop_of(cell)
    record = {"name": cell.setting.name, **setting, **values}
    for batch in BATCHES:
        record[f"flops_share_at_{batch}"] = padded.get(str(batch))
    record["drop"] = drop and drop.estimate
    record["drop_low"] = drop and drop.low
    record["drop_high"] = drop and drop.high
    return {
        name: "/".join(f"{each:g}" for each in value) if isinstance(value, (list, tuple)) else value
        for name, value in record.items()
    }


def to_markdown(result: SweepResult) -> str:
    """Return the table for a page or a comment."""
    columns = columns_of(result.cells)
    return markdown_table(["setting", *(column.title for column in columns)], rows_of(result.cells))


def markdown_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], alignment: str = "---:"
) -> str:
    """Return a Markdown table; all columns but the first are aligned, by default to the right."""
    lines = [head, ["---", *[alignment] * (len(head) - 1)]]
    lines += [[markdown_text(field) for field in row] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def markdown_text(text: str) -> str:
    """Return text that Markdown shows as it is: names from outside must not become markup."""
    one_line = " ".join(text.split())
    return re.sub(r"([\\`*_{}\[\]<>#|~!&@])", r"\\\1", one_line)
