"""The scripts behind docs/method.md run, and the page's numbers are those of its files."""

from __future__ import annotations

import csv
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from places import ROOT

import simprune_deploy as sd

SCRIPTS = ROOT / "experiments"
RESULTS = ROOT / "docs" / "method"
NAMES = ("tracks", "variants", "choices", "rival_results", "tables")


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The scripts as modules; few resamples are enough to see that they work."""
    sys.path.insert(0, str(SCRIPTS))
    threads = torch.get_num_threads()
    try:
        modules = {name: importlib.import_module(name) for name in NAMES}
        modules["tracks"].RESAMPLES = 50  # type: ignore[attr-defined]
        yield modules
    finally:
        sys.path.remove(str(SCRIPTS))
        for name in NAMES:
            sys.modules.pop(name, None)
        torch.set_num_threads(threads)


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    return module.main()


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("group", ["selection", "layers", "spread"])
def test_choices(
    scripts: dict[str, ModuleType], group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = scripts["choices"]
    every = choices.variants("fashion", group)
    few = [every[0], every[-1]]
    monkeypatch.setattr(choices, "variants", lambda track, group: few)
    run(choices, monkeypatch, "fashion", group, "--images", "10", "-o", str(tmp_path))
    name = f"{group}-fashion.csv"
    rows, shown = read(tmp_path / name), read(RESULTS / name)
    assert rows[0].keys() == shown[0].keys()
    assert [row["variant"] for row in rows[::6]] == [variant.name for variant in few]
    assert list(dict.fromkeys(row["variant"] for row in shown)) == [v.name for v in every]
    assert all(float(row["gain"]) == 0 for row in rows[:6])
    assert any(row["gain"] not in ("", "0.0") for row in rows[6:])


def test_losses_at_a_speedup_lie_between_those_measured(
    scripts: dict[str, ModuleType], tmp_path: Path
) -> None:
    results = scripts["rival_results"]
    measured = {
        "tome": {"1.2": [1, 3], "1.6": [4, 12]},
        "ours, 0.7": {"1.3": [1, 1]},
        "ours, 0.5": {"1.7": [4, 4]},
        "atc": {"": [5, 5]},
    }
    rows = [
        {"method": name, "speedup": speedup, "losses": " ".join(map(str, losses))}
        for name, settings in measured.items()
        for speedup, losses in settings.items()
    ]
    methods = results.methods_of(rows)
    assert list(methods) == ["ours", "tome"]  # what was not timed has no speed-up
    every = np.arange(2)
    assert methods["tome"].at(1.2, every) == pytest.approx(2)
    assert methods["tome"].at(1.4, every) == pytest.approx(4)
    assert methods["tome"].at(1.6, every) == pytest.approx(8)
    assert methods["tome"].worst_at(1.4) == pytest.approx(6)
    assert methods["tome"].at(1.61, every) is None
    assert methods["ours"].at(1.25, every) is None
    middle, low, high = results.ratio(methods["ours"], methods["tome"], 1.5)
    assert middle == pytest.approx(2 / (2**0.5 * 4))
    assert low < middle < high
    assert results.ratio(methods["ours"], methods["tome"], 1.7) is None
    results.draw(methods, tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_bytes()
    assert b"<svg" in drawn
    results.draw(methods, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_bytes() == drawn


def test_missing_weights_are_one_line(
    scripts: dict[str, ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["photographs", "layers", "--weights", str(tmp_path), "-o", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["choices", *options])
    assert scripts["tracks"].run(scripts["choices"].main) == 2
    shown = capsys.readouterr().err
    assert "is missing: run `python examples/real_weights.py" in shown
    assert not (tmp_path / "out").exists()


def test_photographs_are_halved_by_their_bytes_alone(
    scripts: dict[str, ModuleType], tmp_path: Path
) -> None:
    tracks = scripts["tracks"]
    files = [tmp_path / f"{number}.jpg" for number in range(7)]
    for number, file in enumerate(files):
        file.write_bytes(bytes([number]))
    first, second = tracks.halves_of(files)
    assert [path.name for path in first] == ["3.jpg", "6.jpg", "2.jpg", "5.jpg"]
    assert sorted(first + second) == files
    assert tracks.halves_of(files[::-1]) == (first, second)
    with pytest.raises(sd.SimpruneError, match=r"66 of 66 photographs are missing .*imagenet_00"):
        tracks.photographs(tmp_path)


def test_fashion_is_halved_image_by_image(scripts: dict[str, ModuleType]) -> None:
    first, second = scripts["tracks"].load_halves("fashion", ROOT, images=40)
    assert len(first.images) == len(second.images) == len(second.labels) == 20
    whole = scripts["tracks"].load_track("fashion", 4, ROOT).images
    torch.testing.assert_close(first.images[:2], whole[::2], rtol=0, atol=0)
    torch.testing.assert_close(second.images[:2], whole[1::2], rtol=0, atol=0)


def test_without_weight_the_spread_variant_is_the_operator(
    scripts: dict[str, ModuleType],
) -> None:
    track = scripts["tracks"].load_track("fashion", 6, ROOT)
    model = sd.prune(track.vit, threshold=0.8).eval()
    spread = scripts["variants"].SpreadViT
    with torch.inference_mode():
        ours = model(track.images)
        none = spread(model.vit, model.config, 0.0, 3.0).eval()(track.images)
        some = spread(model.vit, model.config, 0.3, 3.0).eval()(track.images)
    torch.testing.assert_close(none, ours, rtol=0, atol=1e-3)
    assert not torch.allclose(some, ours, atol=1e-2)


def test_places_have_the_similarity_of_their_distance(scripts: dict[str, ModuleType]) -> None:
    places = scripts["variants"].place_features(4, 5, 2.0).numpy()
    for a in range(20):
        for b in range(20):
            square = (a // 5 - b // 5) ** 2 + (a % 5 - b % 5) ** 2
            assert abs(places[a] @ places[b] - np.exp(-square / 8)) < 1e-5


def test_the_pages_tables_are_those_of_its_files(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = scripts["tables"]
    assert run(tables, monkeypatch, "--check") == 0
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    used = {match[1] for match in tables.TABLE.findall(text)}
    assert used == {path.name for path in RESULTS.glob("*.csv")}
    page = tmp_path / "page.md"
    page.write_text(text.replace("0.9", "0.8"), encoding="utf-8")
    assert run(tables, monkeypatch, "--check", "--page", str(page)) == 1
    assert run(tables, monkeypatch, "--page", str(page)) is not None
    assert run(tables, monkeypatch, "--check", "--page", str(page)) == 0
