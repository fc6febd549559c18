"""The search for a threshold: what it finds, how sure it is, what it writes, what it refuses."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import ROOT
from typer.testing import CliRunner

from simprune_deploy.cli import app
from simprune_deploy.common.errors import CheckFailedError, SimpruneError
from simprune_deploy.onnx.metadata import read_metadata
from simprune_deploy.onnx.variants import prune_nodes
from simprune_deploy.parity.graph_check import check_graph
from simprune_deploy.pruning.tuned_file import read_configuration
from simprune_deploy.tuning.results import Measurement, Setting, load_sweep
from simprune_deploy.tuning.search import (
    Objective,
    drop_of,
    images_needed,
    layer_candidates,
    search,
)
from simprune_deploy.tuning.token_counts import capacity_for, size_hints

MODEL = ROOT / "examples" / "fashion_mnist" / "vit"
IMAGES = ROOT / "examples" / "fashion_mnist" / "test_slice.npz"
BASE = Setting("ours", 0.9, (3, 6, 9))
EARLY = Setting("ours", 0.9, (1, 2, 3))


def call(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


class Curve:
    """A model whose accuracy and speed follow curves that are known."""

    class _Data:
        labels: Any = np.zeros(10_000)
        path = "curve"

        def __len__(self) -> int:
            return 10_000

    def __init__(self, lost: Sequence[int], speedup: Sequence[float]) -> None:
        self.lost, self.speed, self.data = lost, speedup, Curve._Data()
        self.evaluated: list[Setting] = []

    def _cell(self, setting: Setting) -> Measurement:
        assert setting.threshold is not None
        step = 100 - round(100 * setting.threshold)
        early = setting.layers == EARLY.layers
        return Measurement(
            setting,
            images=10_000,
            top1=0.9 - self.lost[step] / 10_000,
            right_only_dense=self.lost[step] + 5,
            right_only_here=5,
            milliseconds=1 / self.speed[step],
            dense_milliseconds=1.0,
            flops_share=(0.8 if early else 1.0) / self.speed[step],
        )

    def measure(self, settings: Sequence[Setting], timed: bool = True) -> list[Measurement]:
        self.evaluated += settings
        return [Measurement(Setting("dense"), 10_000), *map(self._cell, settings)]

    def no_classes(self) -> None:
        """Its classes say something."""

    def time(self, settings: Sequence[Setting]) -> list[Measurement]:
        self.evaluated += settings
        return list(map(self._cell, settings))


steps = st.lists(st.integers(0, 40), min_size=101, max_size=101)


@given(steps, st.integers(1, 1500), st.floats(1.01, 6))
def test_it_finds_what_a_scan_of_all_thresholds_finds(
    rises: list[int], limit: int, faster: float
) -> None:
    curve = Curve(np.cumsum(rises).tolist(), (1 + np.cumsum(rises) / 400).tolist())
    cells = {
        step: curve._cell(dataclasses.replace(BASE, threshold=step / 100))
        for step in range(30, 100)
    }
    for wish, best in (
        (Objective("max-drop", limit / 10_000), min),
        (Objective("min-speedup", faster), max),
    ):
        good = [step for step, cell in cells.items() if wish.met(cell)]
        curve.evaluated = []
        if good:
            found = search(curve, wish, [BASE])  # type: ignore[arg-type]
            assert found.cell.setting.threshold == best(good) / 100
            assert wish.met(found.cell)
        else:
            with pytest.raises((CheckFailedError, SimpruneError)):
                search(curve, wish, [BASE])  # type: ignore[arg-type]
        assert len(curve.evaluated) <= 9


def test_of_two_sets_of_blocks_the_better_one_wins() -> None:
    curve = Curve(list(range(0, 303, 3)), np.linspace(1, 3, 101).tolist())
    found = search(curve, Objective("max-drop", 0.02), [BASE, EARLY])  # type: ignore[arg-type]
    assert found.cell.setting.layers == EARLY.layers  # the same drop at fewer FLOPs
    assert {cell.setting.layers for cell in found.cells} == {BASE.layers, EARLY.layers}


def test_a_wish_that_cannot_be_met_says_what_the_best_is() -> None:
    curve = Curve([45] * 101, np.linspace(1, 3, 101).tolist())
    with pytest.raises(CheckFailedError, match=r"drops 0\.45% \(0\.\d+% to 0\.6\d%\)") as caught:
        search(curve, Objective("max-drop", 0.005), [BASE])  # type: ignore[arg-type]
    needed = int(re.search(r"about ([\d,]+) images", str(caught.value))[1].replace(",", ""))  # type: ignore[index]
    cell = curve._cell(BASE)
    wish = Objective("max-drop", 0.005)
    assert needed == images_needed(cell, wish)
    scale = needed / 10_000
    larger = dataclasses.replace(
        cell,
        images=needed,
        right_only_dense=round(50 * scale),
        right_only_here=round(5 * scale),
    )
    assert drop_of(larger, 0.95).high <= 0.005
    with pytest.raises(CheckFailedError, match=r"least pruning tried, drops 0.45% .* images$"):
        search(curve, Objective("max-drop", 0.004), [BASE])  # type: ignore[arg-type]
    with pytest.raises(CheckFailedError, match=r"the fastest is 0\.3 .* 2\.40 times"):
        search(curve, Objective("min-speedup", 5), [BASE])  # type: ignore[arg-type]
    with pytest.raises(SimpruneError, match=r"10,000 images cannot show .* take 38,4\d\d or more"):
        search(curve, Objective("max-drop", 0.0001), [BASE])  # type: ignore[arg-type]
    curve.data.labels = None
    with pytest.raises(SimpruneError, match="needs labels"):
        search(curve, Objective("max-drop", 0.01), [BASE])  # type: ignore[arg-type]


counts = st.dictionaries(st.integers(1, 196), st.integers(1, 50), min_size=1, max_size=12)


@given(st.lists(counts, min_size=1, max_size=3), st.sampled_from([0.0, 0.01, 0.05, 0.1, 0.5]))
def test_capacities_are_the_smallest_that_few_images_exceed(
    layers: list[dict[int, int]], share: float
) -> None:
    kept = [Counter(layer) for layer in layers]
    found = capacity_for(kept, share)
    before = 196
    for most, layer, overflow in zip(found.tokens, kept, found.overflow, strict=True):
        values = np.repeat(list(layer), list(layer.values()))
        fitting = [k for k in range(1, 197) if (values > k).mean() <= share]
        assert most == min(before, fitting[0])
        assert overflow == pytest.approx((values > most).mean())
        before = most
    (hint, *_) = size_hints(kept, 1, 196)
    values = np.repeat(list(layers[0]), list(layers[0].values()))
    assert hint["max_tokens"] == 197
    assert (values > hint["opt_tokens"] - 1).mean() <= 0.5


def test_candidates_are_blocks_of_the_model() -> None:
    sets = layer_candidates(12, (3, 6, 9))
    assert sets[0] == (3, 6, 9)
    assert {(2, 5, 8), (4, 7, 10), (3, 6), (3,), (2, 3, 6, 9)} == set(sets[1:])
    for depth in range(2, 30):
        for layers in layer_candidates(depth, (max(1, depth // 4), depth - 1)):
            assert list(layers) == sorted(set(layers))
            assert layers[0] >= 1
            assert layers[-1] < depth


def test_the_pages_commands_run_and_the_configuration_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "tuning.md").read_text(encoding="utf-8")
    lines = re.findall(r"^simprune-deploy (.*examples/.*)$", page, re.M)
    # the page also sweeps 10,000 images that have to be downloaded
    lines = [line for line in lines if "test10k" not in line]
    # of the sweep beside fixed counts the first one has all but these
    lines = [line for line in lines if "fixed-sweep" not in line]
    kinds = ["sweep", "tune", "export", "export", "tune", "export"]
    assert [line.split()[0] for line in lines] == kinds
    for line in lines:
        code, out, err = call(*shlex.split(line))
        assert code == 0, (line, out, err)
    result = load_sweep(tmp_path / "vit-sweep" / "sweep.json")
    assert len(result.cells) == 4
    shares = [list(cell.padded_flops_share.values()) for cell in (result.cells[1], result.cells[3])]
    for told, share in zip(("63/74/78%", "42/44/46%"), shares, strict=True):
        assert told in page
        assert [float(each) for each in told[:-1].split("/")] == pytest.approx(
            [100 * each for each in share], abs=1
        )
    tuned = json.loads((tmp_path / "tuned.json").read_text())
    found = Measurement.from_dict(tuned["found"])
    assert tuned["drop"]["high"] <= 0.04
    assert tuned["pruning"]["threshold"] == found.setting.threshold
    assert len(tuned["evaluated"]) <= 8
    assert all(cell["images"] == 400 for cell in tuned["evaluated"])
    manifest = json.loads((tmp_path / "tuned" / "manifest.json").read_text())
    assert manifest["verdict"] == "passed"
    pruning = manifest["model"]["pruning"]
    assert pruning["threshold"] == found.setting.threshold
    assert pruning["layers"] == [1, 3, 4]
    hints = [each["opt_tokens"] for each in tuned["calibration"]["size_hints"]]
    graph = onnx.load(tmp_path / "tuned" / "model.onnx")
    attributes = [
        {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        for node in prune_nodes(graph)
    ]
    assert [each["opt_tokens"] for each in attributes] == hints
    assert [each["max_tokens"] for each in attributes] == [197] * 3
    assert manifest["model"]["export"]["opt_tokens"] == hints
    next(a for a in prune_nodes(graph)[1].attribute if a.name == "opt_tokens").i += 1
    assert not check_graph(graph, read_metadata(graph)).passed
    one_percent = tuned["calibration"]["tokens"][2]
    assert one_percent["share"] == 0.01
    assert max(one_percent["overflow"]) <= 0.01


def test_stored_cells_are_used_and_tokens_fixed(tmp_path: Path) -> None:
    common = ["tune", MODEL, "--data", IMAGES, "--limit", 200, "--timing", 0, "--backend", "torch"]
    common += ["--layers", "1,3,4", "--cells", tmp_path / "cells", "--json", "--max-drop", "6%"]
    code, out, err = call(*common, "-o", tmp_path / "a.json")
    assert code == 0, err
    lines = (tmp_path / "cells" / "cells.jsonl").read_text()
    code, again, err = call(*common, "-o", tmp_path / "b.json")
    assert code == 0, err
    assert (tmp_path / "cells" / "cells.jsonl").read_text() == lines
    assert json.loads(again)["found"] == json.loads(out)["found"]
    code, out, err = call(*common, "-o", tmp_path / "c.json", "--overflow", "20%")
    assert code == 0, err
    fixed = json.loads(out)
    tokens = fixed["pruning"]["tokens"]
    assert tokens == fixed["calibration"]["tokens"][-1]["tokens"]
    assert fixed["static"]["setting"]["tokens"] == tokens
    assert all(have <= most for have, most in zip(fixed["static"]["kept"], tokens, strict=True))
    assert read_configuration(tmp_path / "c.json")[0]["tokens"] == tokens
    code, _, err = call(*common, "-o", tmp_path / "c.json")
    assert code == 2
    assert "already exists" in err


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    base = ["tune", MODEL, "--data", IMAGES, "-o", tmp_path / "t.json"]
    for options, match in (
        ([], "give one wish"),
        (["--max-drop", "1%", "--min-speedup", "2"], "give one wish"),
        (["--max-drop", "-1%"], "--max-drop -1% must lie between"),
        (["--min-speedup", "0.5"], "--min-speedup 0.5 must be above 1"),
        (["--target-latency", "soon"], "write milliseconds"),
        (
            ["--max-drop", "1%", "--confidence", "100%"],
            "--confidence 100% must lie between 0 and 1",
        ),
        (["--min-speedup", "2", "--timing", "0"], "--timing 0 takes none"),
        (["--max-drop", "1%", "--limit", "100"], "100 images cannot show a drop of at most 1.00%"),
        (["--max-drop", "1%", "--no-labels"], "needs labels"),
        (["--max-drop", "1%", "--layers", "9"], "outside the model's depth"),
    ):
        code, out, err = call(*base, *options)
        assert (code, out, err.count("\n")) == (2, "", 1), (options, err)
        assert match in err, options
    assert not (tmp_path / "t.json").exists()
    for text in ("", "[]", '{"format": 2}', '{"format": 1, "pruning": {}}'):
        (tmp_path / "bad.json").write_text(text)
        code, _, err = call(
            "export", MODEL, "--config", tmp_path / "bad.json", "-o", tmp_path / "x"
        )
        assert code == 2
        assert "no configuration that `simprune-deploy tune` wrote" in err


def test_a_speed_that_cannot_be_had_fails(tmp_path: Path) -> None:
    options = ["--data", IMAGES, "--limit", 20, "--timing", 10, "--backend", "torch"]
    options += ["--layers", "1,3,4"]
    code, out, err = call("tune", MODEL, *options, "--min-speedup", 1000, "-o", tmp_path / "t.json")
    assert (code, out) == (1, "")
    assert "a speed-up of 1000 or more cannot be had: the fastest is" in err
    assert not (tmp_path / "t.json").exists()


def test_baselines_run_at_the_token_counts_of_ours(tmp_path: Path) -> None:
    options = ["--data", IMAGES, "--limit", 24, "--timing", 10, "--thresholds", "0.85"]
    options += ["--layers", "1,3,4"]
    code, out, err = call("sweep", MODEL, *options, "--compare", "--json", "-o", tmp_path / "s")
    assert code == 0, err
    sweep = json.loads(out)
    dense, ours, *others = (Measurement.from_dict(cell) for cell in sweep["cells"])
    assert [cell.setting.method for cell in others] == ["random", "redundancy", "saint", "tome"]
    assert sweep["environment"]["backend"] == "torch"
    for cell in others:
        assert cell.kept == ours.kept
        assert cell.tokens_processed == ours.tokens_processed < 1
        assert cell.cosine != ours.cosine
        assert cell.milliseconds is None
    assert any("baselines' latency" in each for each in sweep["environment"]["not_measured"])
    assert dense.speedup == 1
    code, _, err = call(
        "sweep", MODEL, *options, "--compare", "--backend", "onnxruntime", "-o", tmp_path / "t"
    )
    assert code == 2
    assert "--compare runs in PyTorch" in err
