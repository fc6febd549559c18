"""A sweep as one HTML page that needs nothing else: no network, no scripts.

The page is the template ``templates/sweep.html.j2``; here is what it shows. Names of files and
classes come from outside: jinja2 escapes everything but the plots, which are made here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from simprune_deploy.common.versions import __version__
from simprune_deploy.evaluate.statistics import PAIRED_METHOD, SHARE_METHOD, share
from simprune_deploy.reports.plots import costs_of, inline_svg, quality_of
from simprune_deploy.reports.tables import (
    LEGEND,
    columns_of,
    drop_of,
    names_of,
    not_measured,
    numbers_of,
    percent,
    points,
    rows_of,
    shared_layers,
)
from simprune_deploy.tuning.results import OURS, Measurement, SweepResult

MOST_CLASSES, MOST_SKIPPED = 30, 100
"""Longer lists are cut, and the page says so."""

DROPS = (0.005, 0.01, 0.02)
AGREEMENTS = (0.99, 0.98, 0.95)
"""The wishes that the page answers first: drops of accuracy, or agreement without labels."""

APART = {"command", "not_measured", "skipped"}
"""Keys of the sweep's facts that have a section of their own."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """The cheapest of our settings that meets a wish.

    Attributes:
        wish: In words.
        setting: Its name; None if no setting meets the wish.
        found: What was measured, in words.
        sure: Whether the confidence interval meets the wish too.
    """

    wish: str
    setting: str | None = None
    found: str = ""
    sure: bool = False


@dataclasses.dataclass(frozen=True)
class ClassRow:
    """One class: its name, images, the dense model's accuracy, and a change for each setting."""

    name: str
    images: int
    dense: str
    changes: list[tuple[str, str]]


def render_html(result: SweepResult) -> str:
    """Return the page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("simprune_deploy.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    columns = columns_of(result.cells)
    classes, class_settings, class_count = _classes(result)
    skipped = [(str(name), str(why)) for name, why in result.data.get("skipped", ())]
    return environment.get_template("sweep.html.j2").render(
        version=__version__,
        architecture=result.model.get("architecture", "a model"),
        images=result.dense.images,
        source=result.data.get("source", "unnamed images"),
        choices=choices(result),
        plots=[Markup(inline_svg(result, cost)) for cost in costs_of(result)],
        quality=quality_of(result).label,
        titles=[column.title for column in columns],
        legend=[(c.title, LEGEND[c.title]) for c in columns if c.title in LEGEND],
        rows=[
            (cell.setting.method, row)
            for cell, row in zip(result.cells, rows_of(result.cells), strict=True)
        ],
        layers=shared_layers(result.cells),
        numbers=numbers_of(result),
        classes=classes,
        class_settings=class_settings,
        class_count=class_count,
        facts=[
            ("model", _facts(result.model)),
            ("images", _facts(result.data)),
            ("run", _facts(result.environment)),
        ],
        skipped=skipped[:MOST_SKIPPED],
        skipped_count=len(skipped),
        not_measured=not_measured(result),
        command=result.environment.get("command"),
        paired=PAIRED_METHOD,
        share=SHARE_METHOD,
        has_labels=quality_of(result).key == "accuracy",
    )


def choices(result: SweepResult) -> list[Choice]:
    """Return the cheapest of our settings for a few wishes; none where nothing can be wished."""
    quality = quality_of(result).key
    if quality == "accuracy":
        return [_choice_by_drop(result, limit) for limit in DROPS]
    if quality == "agreement":
        return [_choice_by_agreement(result, limit) for limit in AGREEMENTS]
    return []


def _choice_by_drop(result: SweepResult, limit: float) -> Choice:
    wish = f"at most {100 * limit:g} points of accuracy lost"
    meeting = [
        (cell, drop)
        for cell in result.cells
        if cell.setting.method == OURS
        and (drop := drop_of(cell)) is not None
        and drop.estimate <= limit
    ]
    if not meeting:
        return Choice(wish)
    cell, drop = min(meeting, key=lambda pair: pair[0].tokens_processed)
    interval = f"{points(-drop.estimate)} points ({points(-drop.high)} to {points(-drop.low)})"
    return Choice(wish, _name(result, cell), f"{_cost(cell)}, {interval}", drop.high <= limit)


def _choice_by_agreement(result: SweepResult, limit: float) -> Choice:
    wish = f"at least {limit:.0%} as the dense model"
    meeting = [
        cell
        for cell in result.cells
        if cell.setting.method == OURS and cell.agreement is not None and cell.agreement >= limit
    ]
    if not meeting:
        return Choice(wish)
    cell = min(meeting, key=lambda each: each.tokens_processed)
    agreement = cell.agreement or 0.0
    bounds = share(round(agreement * cell.images), cell.images)
    interval = f"{percent(agreement)} ({percent(bounds.low)} to {percent(bounds.high)})"
    return Choice(wish, _name(result, cell), f"{_cost(cell)}, {interval}", bounds.low >= limit)


def _name(result: SweepResult, cell: Measurement) -> str:
    return names_of(result.cells)[result.cells.index(cell)]


def _cost(cell: Measurement) -> str:
    tokens = f"{cell.tokens_processed:.0%} of the tokens"
    return f"{cell.speedup:.2f}x as fast, {tokens}" if cell.speedup is not None else tokens


def _classes(result: SweepResult) -> tuple[list[ClassRow], list[str], int]:
    """Return the classes that change most in our settings, and the settings' names."""
    cells = [c for c in result.cells if c.setting.method == OURS and c.classes]
    names = [name for name, c in zip(names_of(result.cells), result.cells, strict=True)
             if any(c is each for each in cells)]  # fmt: skip
    if not cells:
        return [], [], 0
    dense = cells[0].classes
    changes = {
        position: [
            (cell.classes[position].right - each.dense_right) / each.images for cell in cells
        ]
        for position, each in enumerate(dense)
        if each.images
    }
    # the largest change first, losses before gains
    order = sorted(changes, key=lambda at: (-max(map(abs, changes[at])), min(changes[at])))
    rows = [
        ClassRow(
            name=dense[at].name,
            images=dense[at].images,
            dense=percent(dense[at].dense_right / dense[at].images),
            changes=[(points(change), _heat(change)) for change in changes[at]],
        )
        for at in order[:MOST_CLASSES]
    ]
    return rows, names, len(changes)


def _heat(change: float) -> str:
    """Return the class of a table field by how much was lost or won."""
    steps = sum(abs(change) >= limit for limit in (0.01, 0.03, 0.08))
    return f"{'loss' if change < 0 else 'gain'}{steps}" if steps else ""


def _facts(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (name.replace("_", " "), _text(value))
        for name, value in values.items()
        if name not in APART and value is not None
    ]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(each)}" for name, each in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(each) for each in value) or "none"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)
