"""A sweep as curves: accuracy over speed-up, tokens and GFLOPs.

The same sweep gives the same bytes. matplotlib is imported where it is used, and never asked for a
display.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from simprune_deploy.evaluate.statistics import share
from simprune_deploy.reports.tables import drop_of
from simprune_deploy.tuning.results import DENSE, OURS, Measurement, SweepResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#24292f"
"""The color of text and axes; an inlined plot takes the page's in its place."""

# Okabe and Ito's colors, which most color-blind people can tell apart, on white and on black
OUR_COLOURS = ("#0072b2", "#009e73", "#56b4e9", "#8c6bb1")
BASELINE_COLOURS = {
    "random": "#999999",
    "redundancy": "#7f4f24",
    "saint": "#e69f00",
    "tome": "#d55e00",
}
OTHER_COLOUR = "#cc79a7"
MARKERS = "oDs^vPX"
LABELLED_POINTS = 12
"""With more thresholds than this their labels would cover one another."""


@dataclasses.dataclass(frozen=True)
class Measure:
    """A number of a cell that can be an axis.

    Attributes:
        key: A short name.
        label: Of the axis.
        value: The number, or None.
        percent: Whether it is a share.
        more_is_better: Which way the better settings lie.
    """

    key: str
    label: str
    value: Callable[[Measurement], float | None]
    percent: bool = False
    more_is_better: bool = True


COSTS = (
    Measure("speed-up", "speed-up over the dense model", lambda cell: cell.speedup),
    Measure("tokens", "tokens processed", lambda cell: cell.tokens_processed, True, False),
    Measure("gflops", "GFLOPs of the blocks, one image", lambda cell: cell.gflops, False, False),
)
QUALITIES = (
    Measure("accuracy", "top-1 accuracy", lambda cell: cell.top1, True),
    Measure("agreement", "same class as the dense model", lambda cell: cell.agreement, True),
    Measure("cosine", "mean cosine to the dense output", lambda cell: cell.cosine),
    Measure(
        "moved",
        "mean distance to the dense output, in its standard deviations",
        lambda cell: cell.moved,
        more_is_better=False,
    ),
)


def costs_of(result: SweepResult) -> list[Measure]:
    """Return the measures of cost that the sweep has for more than one setting."""
    return [cost for cost in COSTS if sum(cost.value(c) is not None for c in result.cells) > 1]


def quality_of(result: SweepResult) -> Measure:
    """Return the best measure of quality that the sweep has: the first of :data:`QUALITIES`."""
    for quality in QUALITIES:
        if sum(quality.value(cell) is not None for cell in result.cells) > 1:
            return quality
    return QUALITIES[-1]


def bounds_of(cell: Measurement, quality: Measure) -> tuple[float, float] | None:
    """Return a cell's 95 % confidence bounds of `quality`, where the counts are known.

    An accuracy's are those of its difference to the dense model's, over the same images.
    """
    value = quality.value(cell)
    if value is None or cell.setting.method == DENSE:
        return None
    if quality.key == "accuracy" and (drop := drop_of(cell)) is not None:
        dense = value + drop.estimate
        return dense - drop.high, dense - drop.low
    if quality.key == "agreement":
        found = share(round(value * cell.images), cell.images)
        return found.low, found.high
    return None


def render_pareto(result: SweepResult, kind: str) -> bytes:
    """Return all panels beside each other as a file; `kind` is "png" or "svg"."""
    return _render(result, costs_of(result), kind)


def inline_svg(result: SweepResult, cost: Measure) -> str:
    """Return one panel as an SVG element for a page; its ink is the page's text color."""
    svg = _render(result, [cost], "svg", transparent=True).decode("utf-8")
    element = svg[svg.index("<svg") :]
    title = f"{quality_of(result).label} over {cost.label}"
    head, rest = element.split(">", 1)
    return f'{head} role="img" aria-label="{title}">{rest}'.replace(INK, "currentColor")


def _render(
    result: SweepResult, costs: Sequence[Measure], kind: str, transparent: bool = False
) -> bytes:
    with _style():
        figure = _draw(result, costs)
        file = io.BytesIO()
        # the date, and the version of matplotlib, would make equal sweeps differ
        metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
        figure.savefig(file, format=kind, metadata=metadata, transparent=transparent)
    return file.getvalue()


@contextlib.contextmanager
def _style() -> Iterator[None]:
    import matplotlib
    from matplotlib import style

    settings = {
        "svg.hashsalt": "simprune",
        "savefig.dpi": 150,
        "font.family": "DejaVu Sans",  # comes with matplotlib: the same everywhere
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#8b949e",
        "grid.alpha": 0.25,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
    }
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    with matplotlib.rc_context(), style.context("default", after_reset=True):
        matplotlib.rcParams.update({**settings, **dict.fromkeys(inked, INK)})
        yield


def _draw(result: SweepResult, costs: Sequence[Measure]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # not pyplot: that would look for a display, and keep every figure
    figure = Figure(figsize=(4.6 * len(costs), 3.7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    quality = quality_of(result)
    for axes, cost in zip(panels, costs, strict=True):
        _draw_panel(axes, result, cost, quality, legend=axes is panels[0])
    panels[0].set_ylabel(quality.label)
    return figure


def _draw_panel(
    axes: Axes, result: SweepResult, cost: Measure, quality: Measure, legend: bool
) -> None:
    from matplotlib.ticker import PercentFormatter

    for curve in curves_of(result.cells):
        points = [
            (x, y, cell)
            for cell in curve.cells
            if (x := cost.value(cell)) is not None and (y := quality.value(cell)) is not None
        ]
        # from little to much pruning, whatever noise does to the times
        points.sort(key=lambda point: -point[2].tokens_processed)
        axes.plot(
            [x for x, _, _ in points],
            [y for _, y, _ in points],
            linestyle=curve.line,
            color=curve.color,
            marker=curve.marker,
            label=curve.label,
            markersize=5,
            linewidth=1.4,
            zorder=curve.order,
        )
        for x, y, cell in points:
            if bounds := bounds_of(cell, quality):
                axes.vlines(x, *bounds, color=curve.color, alpha=0.45, linewidth=1.1)
            if curve.labelled and len(points) <= LABELLED_POINTS:
                axes.annotate(
                    f"{cell.setting.threshold:g}",
                    (x, y),
                    textcoords="offset points",
                    xytext=(5, 4),
                    fontsize=7,
                )
    x, y = cost.value(result.dense), quality.value(result.dense)
    if x is not None and y is not None:
        axes.plot([x], [y], "*", color=INK, markersize=12, label="dense", zorder=5)
        axes.axhline(y, color=INK, linewidth=0.7, linestyle=":", zorder=1)
    axes.set_xlabel(cost.label)
    if cost.percent:
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if quality.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    if not cost.more_is_better:
        axes.invert_xaxis()  # cheaper stands at the right in every panel
    if not quality.more_is_better and not axes.yaxis_inverted():
        axes.invert_yaxis()  # and better at the top; the panels share this axis
    axes.margins(x=0.08)
    if legend:
        axes.legend(loc="lower left", fontsize=8)


@dataclasses.dataclass(frozen=True)
class Curve:
    """Settings that differ only in how much they prune.

    Attributes:
        label: For the legend.
        cells: Its settings.
        color, marker, line: How it looks.
        order: Later curves lie on top.
        labelled: Whether its points get their thresholds.
    """

    label: str
    cells: list[Measurement]
    color: str
    marker: str
    line: str
    order: int
    labelled: bool


def curves_of(cells: Sequence[Measurement]) -> list[Curve]:
    """Return the curves of a sweep, ours first; the dense model is none."""
    groups: dict[tuple[Any, ...], list[Measurement]] = {}
    for cell in cells:
        setting = cell.setting
        if setting.method == DENSE:
            continue
        # only of ours is it a choice whether token counts are fixed
        fixed = setting.method == OURS and setting.tokens is not None
        key = (setting.method, setting.layers, setting.place, tuple(setting.form), fixed)
        groups.setdefault(key, []).append(cell)
    layers_differ = len({key[1:3] for key in groups}) > 1
    seen: dict[str, int] = {}
    curves = []
    for position, (key, members) in enumerate(sorted(groups.items(), key=_ours_first)):
        method, layers, place, form, fixed = key
        number = seen[method] = seen.get(method, -1) + 1
        parts = [method, *form]
        if fixed:
            parts.append("fixed tokens")
        if layers_differ:
            parts.append(f"{place} {','.join(map(str, layers))}")
        color = BASELINE_COLOURS.get(method, OTHER_COLOUR)
        curves.append(
            Curve(
                label=" ".join(parts),
                cells=members,
                color=OUR_COLOURS[number % len(OUR_COLOURS)] if method == OURS else color,
                marker=MARKERS[position % len(MARKERS)],
                line="-" if method == OURS else "--",
                order=4 if position == 0 else 3,
                labelled=position == 0 and all(c.setting.threshold is not None for c in members),
            )
        )
    return curves


def _ours_first(group: tuple[tuple[Any, ...], list[Measurement]]) -> tuple[Any, ...]:
    method, layers, place, form, fixed = group[0]
    # the operator's default before its other forms, then the baselines by name
    return (method != OURS, method, bool(form), layers, place, form, fixed)
