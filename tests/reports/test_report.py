"""What people see of a sweep: the table, the plots, the page; also in a browser."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image
from places import ROOT
from rich.console import Console
from typer.testing import CliRunner

from simprune_deploy.cli import app
from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.evaluate.classes import ClassResult
from simprune_deploy.evaluate.statistics import paired_drop, share
from simprune_deploy.reports.html import choices, render_html
from simprune_deploy.reports.plots import (
    BASELINE_COLOURS,
    OUR_COLOURS,
    bounds_of,
    costs_of,
    curves_of,
    inline_svg,
    quality_of,
    render_pareto,
)
from simprune_deploy.reports.sweep import FILES, write_reports
from simprune_deploy.reports.tables import (
    markdown_text,
    names_of,
    not_measured,
    numbers_of,
    print_sweep,
    shared_layers,
    to_csv,
    to_markdown,
)
from simprune_deploy.tuning.results import Measurement, Setting, SweepResult, load_sweep

HOSTILE = '<script>alert("x")</script>&amp;|`*[a](http://example.org)'
IMAGES = 1000
LAYERS = (1, 3, 4)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARTEFACTS = ROOT / "build" / "test-artefacts"


def cell(setting: Setting, lost: int, won: int, tokens: float, time: float | None) -> Measurement:
    """A cell with everything but the memory, consistent in itself; the dense model has 912 hits."""
    right = 912 - lost + won
    per_class = [(f"class {i}", 100, 91 - (lost - won if i == 3 else 0), 91) for i in range(9)]
    per_class.append((HOSTILE, 100, 93, 93))
    return Measurement(
        setting=setting,
        images=IMAGES,
        top1=right / IMAGES,
        top5=0.998,
        agreement=1 - (lost + won) / IMAGES,
        cosine=1 - lost / 1e4,
        worst_cosine=1 - lost / 1e3,
        tokens_processed=tokens,
        kept=tuple(196 * tokens for _ in setting.layers),
        gflops=0.35 * tokens,
        flops_share=tokens,
        padded_flops_share={1: tokens, 8: tokens + (1 - tokens) / 4, 32: (1 + tokens) / 2},
        milliseconds=time,
        dense_milliseconds=time and 3.0,
        right_only_here=won,
        right_only_dense=lost,
        classes=tuple(ClassResult(*each) for each in per_class),
    )


@pytest.fixture(scope="module")
def sweep() -> SweepResult:
    ours = [(0.95, 6, 4, 0.6), (0.9, 18, 6, 0.45), (0.8, 60, 10, 0.31), (0.7, 101, 9, 0.25)]
    cells = [cell(Setting("dense"), 0, 0, 1.0, 3.0)]
    cells += [
        cell(Setting("ours", t, LAYERS), lost, won, tokens, 1 + 2 * tokens)
        for t, lost, won, tokens in ours
    ]
    cells.append(cell(Setting("random", None, LAYERS, tokens=(90, 80, 70)), 90, 5, 0.45, None))
    cells.append(cell(Setting("tome", None, LAYERS, tokens=(90, 80, 70)), 30, 9, 0.45, 2.5))
    return SweepResult(
        model={"architecture": "vit_tiny_patch16_224", "sha256": "ab" * 32, "classes": 10},
        data={
            "source": f"folder {HOSTILE}",
            "images": IMAGES,
            "skipped": [[HOSTILE, "no picture"]],
        },
        environment={
            "backend": "torch",
            "command": "simprune-deploy sweep model.pt --data images",
            "not_measured": ["the engine: this machine has no GPU"],
        },
        cells=tuple(cells),
    )


def with_cells(sweep: SweepResult, **values: Any) -> SweepResult:
    cells = tuple(dataclasses.replace(cell, **values) for cell in sweep.cells)
    return dataclasses.replace(sweep, cells=cells)


def unlabelled(sweep: SweepResult) -> SweepResult:
    nothing = {"top1": None, "top5": None, "right_only_here": None, "right_only_dense": None}
    return with_cells(sweep, **nothing, classes=())


class Page(HTMLParser):
    """Checks that tags are balanced, and collects elements, links and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = ("href", "src", "xlink:href", "srcset", "action")
        self.references += [str(value) for name, value in attrs if name in names]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_every_file_is_written_the_same_twice(sweep: SweepResult, tmp_path: Path) -> None:
    paths = write_reports(sweep, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(FILES)
    first = {path.name: path.read_bytes() for path in paths}
    stored = tmp_path / "sweep.json"
    sweep.save(stored)
    write_reports(load_sweep(stored), tmp_path)
    assert first == {path.name: path.read_bytes() for path in paths}


def test_the_page_needs_nothing_and_believes_nobody(sweep: SweepResult) -> None:
    html = render_html(sweep)
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert all(reference.startswith("#") for reference in page.references)
    assert "default-src 'none'" in html
    # as text: the folder (in two places), the class and the file
    assert "".join(page.text).count(HOSTILE) == 4


def test_the_page_says_what_was_measured_and_what_was_not(sweep: SweepResult) -> None:
    text = " ".join(" ".join(Page(render_html(sweep)).text).split())
    for each in sweep.cells:
        assert f"{each.top1:.2%}" in text
    for fact in (*not_measured(sweep), "ab" * 32, "simprune-deploy sweep model.pt --data images"):
        assert fact in text
    assert not_measured(sweep) == [
        "speed of random 90/80/70 tokens before 1,3,4",
        "peak memory",
        "the engine: this machine has no GPU",
    ]
    assert "1 file could not be used" in text
    # 18 lost and 6 won of 1,000 images at 0.9, by hand: 1.2 points
    drop = paired_drop(18, 6, 1000)
    assert f"-1.20 (-{100 * drop.high:.2f} to -{100 * drop.low:.2f})" in text


def test_wishes_are_met_by_the_cheapest_setting_and_doubt_is_told(sweep: SweepResult) -> None:
    half, one, two = choices(sweep)
    assert (half.setting, half.sure) == ("0.95", False)  # 0.2 lost, up to 0.9 with 10 of 1,000
    assert (one.setting, one.sure) == ("0.95", True)
    assert (two.setting, two.sure) == ("0.9", False)  # 1.2 lost, but up to 2.3
    # a wish below everything measured
    worst = dataclasses.replace(sweep, cells=(sweep.cells[0], *sweep.cells[3:]))
    assert [choice.setting for choice in choices(worst)] == [None, None, None]
    # 10 of 1,000 differ at 0.95, 24 at 0.9
    assert [choice.setting for choice in choices(unlabelled(sweep))] == ["0.95", "0.95", "0.9"]


def test_plots_hold_every_curve_in_its_color(sweep: SweepResult) -> None:
    pixels = np.asarray(Image.open(io.BytesIO(render_pareto(sweep, "png"))).convert("RGB"))
    for color in (OUR_COLOURS[0], BASELINE_COLOURS["random"], BASELINE_COLOURS["tome"]):
        wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == wanted).all(-1).sum() > 20, color
    svg = render_pareto(sweep, "svg")
    ElementTree.fromstring(svg)
    assert b"<dc:date>" not in svg
    curves = {curve.label: curve for curve in curves_of(sweep.cells)}
    assert list(curves) == ["ours", "random", "tome"]
    assert [each.setting.threshold for each in curves["ours"].cells] == [0.95, 0.9, 0.8, 0.7]
    panel = inline_svg(sweep, costs_of(sweep)[0])
    assert panel.startswith("<svg ")
    assert "currentColor" in panel


def test_curves_of_different_layers_are_told_apart(sweep: SweepResult) -> None:
    other = [
        dataclasses.replace(each, setting=dataclasses.replace(each.setting, layers=(2,)))
        for each in sweep.cells[1:3]
    ]
    both = (*sweep.cells[:5], *other)
    curves = curves_of(both)
    assert [curve.label for curve in curves] == ["ours before 1,3,4", "ours before 2"]
    assert len({(curve.color, curve.marker) for curve in curves}) == 2
    assert len(set(names_of(both))) == len(both)


def test_numbers_that_are_shares_of_the_flops_are_called_so(sweep: SweepResult) -> None:
    def of(layers: list[int] | None) -> SweepResult:
        return dataclasses.replace(sweep, model={**sweep.model, "calibrated_layers": layers})

    assert numbers_of(sweep) is None
    assert numbers_of(of(None)) is None
    # with other layers than those calibrated there is one cosine for all
    assert numbers_of(of([2, 4])) is None
    told = numbers_of(of([1, 3, 4]))
    assert told is not None
    assert "shares of the blocks' FLOPs" in told
    file = io.StringIO()
    print_sweep(Console(file=file, width=200), of([1, 3, 4]))
    assert told in file.getvalue()
    assert "for which every layer" in render_html(of([1, 3, 4]))


def test_settings_inside_blocks_are_told_from_those_before(sweep: SweepResult) -> None:
    inside = [
        dataclasses.replace(each, setting=dataclasses.replace(each.setting, place="inside"))
        for each in sweep.cells[1:3]
    ]
    assert shared_layers(inside) == "pruned inside blocks 1,3,4"
    assert shared_layers(sweep.cells) == "pruned before blocks 1,3,4"
    assert names_of(inside) == names_of(sweep.cells[1:3])
    both = (*sweep.cells[:5], *inside)
    assert shared_layers(both) is None
    assert len(set(names_of(both))) == len(both)
    assert [curve.label for curve in curves_of(both)] == ["ours before 1,3,4", "ours inside 1,3,4"]


def test_bars_are_intervals(sweep: SweepResult) -> None:
    accuracy, at_09 = quality_of(sweep), sweep.cells[2]
    drop = paired_drop(18, 6, IMAGES)
    assert bounds_of(at_09, accuracy) == pytest.approx((0.912 - drop.high, 0.912 - drop.low))
    agreement = quality_of(unlabelled(sweep))
    assert agreement.key == "agreement"
    found = share(976, IMAGES)
    assert bounds_of(at_09, agreement) == (found.low, found.high)
    assert bounds_of(sweep.dense, accuracy) is None


def test_a_sweep_of_features_is_shown_by_cosine(sweep: SweepResult) -> None:
    features = with_cells(unlabelled(sweep), agreement=None, milliseconds=None)
    assert quality_of(features).key == "cosine"
    assert [cost.key for cost in costs_of(features)] == ["tokens", "gflops"]
    text = "".join(Page(render_html(features)).text)
    assert "In short" not in text
    assert "accuracy: the images have no labels" in text
    assert "top-1" not in to_markdown(features)


def test_csv_has_all_digits_and_the_bounds(sweep: SweepResult) -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(sweep))))
    assert [row["name"] for row in rows] == [each.setting.name for each in sweep.cells]
    assert float(rows[2]["tokens_processed"]) == 0.45
    assert float(rows[2]["drop_high"]) == paired_drop(18, 6, IMAGES).high
    assert rows[5]["milliseconds"] == ""
    batches = [float(rows[2][f"flops_share_at_{batch}"]) for batch in (1, 8, 32)]
    assert batches == list(sweep.cells[2].padded_flops_share.values())


def test_what_batches_take_is_one_column(sweep: SweepResult, tmp_path: Path) -> None:
    head, _, *rows = to_markdown(sweep).splitlines()
    column = [title.strip() for title in head.split("|")].index("FLOPs at 1/8/32")
    assert [row.split("|")[column].strip() for row in rows[:3]] == [
        "100/100/100%",
        "60/70/80%",
        "45/59/72%",
    ]
    # a sweep of an earlier version has no such numbers, and says nothing of them
    sweep.save(tmp_path / "sweep.json")
    stored = json.loads((tmp_path / "sweep.json").read_text(encoding="utf-8"))
    for each in stored["cells"]:
        del each["padded_flops_share"]
    (tmp_path / "sweep.json").write_text(json.dumps(stored), encoding="utf-8")
    earlier = load_sweep(tmp_path / "sweep.json")
    assert "FLOPs at" not in to_markdown(earlier)
    assert "FLOPs at" not in render_html(earlier)
    assert list(csv.DictReader(io.StringIO(to_csv(earlier))))[2]["flops_share_at_8"] == ""


@given(st.text())
def test_markdown_shows_names_as_they_are(name: str) -> None:
    html = MarkdownIt().enable("table").render(f"x {markdown_text(name + HOSTILE)}")
    assert re.findall(r"<(?!/?p>)[a-z]", html) == []


@pytest.mark.parametrize("width", [60, 80, 140, 200])
def test_the_table_fits_the_terminal(sweep: SweepResult, width: int) -> None:
    file = io.StringIO()
    print_sweep(Console(file=file, width=width), sweep)
    table = file.getvalue().split("pruned before")[0].splitlines()
    assert len(table) == 1 + len(sweep.cells) or width < 80  # names are folded, never cut off
    assert all(len(line) <= width and "…" not in line for line in table)
    for title in ("setting", "top-1", "tokens"):
        assert title in table[0]
    assert (width < 140) == ("left out in this narrow terminal: top-5" in file.getvalue())


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": "150"})


def test_report_remakes_everything_from_the_stored_sweep(
    sweep: SweepResult, tmp_path: Path
) -> None:
    sweep.save(tmp_path / "sweep.json")
    shown = call("report", tmp_path)
    assert shown.exit_code == 0, shown.output
    assert "-1.20" in shown.stdout
    for name in FILES:
        written = call("report", tmp_path / "sweep.json", "-o", tmp_path / name)
        assert written.exit_code == 0, written.output
        assert f"wrote {tmp_path / name}" in written.stdout.replace("\n", "")
    assert (tmp_path / "report.html").read_text() == render_html(sweep)
    again = call("report", tmp_path, "-o", tmp_path / "report.html")
    assert (again.exit_code, "--force" in again.stderr) == (2, True)
    assert call("report", tmp_path, "-o", tmp_path / "report.html", "--force").exit_code == 0
    answer = call("report", tmp_path, "--json")
    assert json.loads(answer.stdout) == json.loads((tmp_path / "sweep.json").read_text())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        ("{", "holds no sweep of ours"),
        ('{"format": 99}', "format 99"),
        ("[]", "holds no sweep of ours"),
    ],
)
def test_what_is_no_sweep_is_refused(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "sweep.json").write_text(content)
    refused = call("report", tmp_path / "sweep.json", "-o", tmp_path / "report.html")
    assert refused.exit_code == 2
    assert words in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert not (tmp_path / "report.html").exists()


def test_other_endings_are_refused(sweep: SweepResult, tmp_path: Path) -> None:
    sweep.save(tmp_path / "sweep.json")
    refused = call("report", tmp_path, "-o", tmp_path / "report.pdf")
    assert refused.exit_code == 2
    assert ".html, .png, .svg, .csv, .md" in refused.stderr
    with pytest.raises(SimpruneError, match="cannot write"):
        write_reports(sweep, tmp_path / "missing")


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        reason = "no chromium: apt-get install chromium"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return found


SCREENS = {"wide": (1280, 2600, False), "phone": (500, 3600, False), "dark": (1280, 2600, True)}


@pytest.mark.parametrize("screen", SCREENS)
def test_the_page_in_a_browser(
    sweep: SweepResult, tmp_path: Path, browser: str, screen: str
) -> None:
    """Screenshots for people are kept in build/test-artefacts; the test looks for the contents."""
    width, height, dark = SCREENS[screen]
    page, picture = tmp_path / "report.html", tmp_path / f"report-{screen}.png"
    page.write_text(render_html(sweep), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               f"--user-data-dir={tmp_path / 'profile'}", "--hide-scrollbars",
               f"--window-size={width},{height}", f"--screenshot={picture}"]  # fmt: skip
    if dark:
        command.append("--blink-settings=preferredColorScheme=0")
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert picture.exists(), done.stderr
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    shutil.copy(picture, ARTEFACTS / picture.name)
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert pixels.shape == (height, width, 3)
    assert (pixels[5, 5] < 64).all() if dark else (pixels[5, 5] > 240).all()
    ours = [int(OUR_COLOURS[0][i : i + 2], 16) for i in (1, 3, 5)]
    assert (np.abs(pixels - ours).sum(-1) < 12).sum() > 200  # the plot is drawn
    # nothing runs out of the page at the right: the margin is empty
    assert (pixels[:, -8:] == pixels[5, 5]).all()
