"""Sweeps: what is counted, stored, gone on with, and refused."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from cli import cli
from hypothesis import given
from hypothesis import strategies as st
from places import ROOT
from typer.testing import CliRunner

import simprune_deploy as sd
from simprune_deploy.cli import app
from simprune_deploy.cli.grids import parse_layer_sets, parse_thresholds, parse_token_sets
from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.evaluate.datasets import DataOptions, DataSet, open_data
from simprune_deploy.evaluate.memory import growth_in
from simprune_deploy.onnx.exporter import ExportOptions, export_onnx
from simprune_deploy.onnx.variants import (
    diagnostic_name,
    kept_name,
    with_diagnostics,
    with_kept_counts,
    without_function,
)
from simprune_deploy.parity.tolerance import cosines
from simprune_deploy.predict.source import ModelSource, source_of_model
from simprune_deploy.tuning.grid import THRESHOLDS, Grid, settings_for
from simprune_deploy.tuning.results import OURS, Measurement, Setting, load_sweep
from simprune_deploy.tuning.sweep import LocalRunner, SweepOptions, start_sweep
from simprune_deploy.tuning.sweep_runtimes import configured, runtime_of
from simprune_deploy.tuning.tallies import (
    DENSE_SETTING,
    Models,
    Shard,
    ShardResult,
    Tally,
    rank,
    tally,
    total,
)
from simprune_deploy.tuning.timing import time_settings

MODEL = ROOT / "examples" / "fashion_mnist" / "vit"
IMAGES = ROOT / "examples" / "fashion_mnist" / "test_slice.npz"
LAYERS = (1, 3, 4)
HIGH, LOW = Setting("ours", 0.9, LAYERS), Setting("ours", 0.8, LAYERS)
COUNT = 48


@pytest.fixture(scope="module")
def source() -> ModelSource:
    return source_of_model(str(MODEL), sd.prune(sd.load(MODEL), layers=LAYERS))


@pytest.fixture(scope="module")
def data(source: ModelSource) -> DataSet:
    return open_data(IMAGES, source.metadata, DataOptions(limit=COUNT))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export whose threshold is chosen at run time, with normalization in the graph."""
    folder = tmp_path_factory.mktemp("exported") / "pruned"
    options = ExportOptions(runtime_threshold=True, normalize=True, batch=(1, 16))
    sd.export(sd.prune(sd.load(MODEL), layers=LAYERS), folder, options, verify=False)
    return folder


def call(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def one_line(answer: tuple[int, str, str]) -> str:
    code, out, err = answer
    assert (code, out, err.count("\n")) == (2, "", 1), answer
    return err


def measured(
    source: ModelSource, data: DataSet, folder: Path, settings: Sequence[Setting], **options: Any
) -> list[Measurement]:
    backend = runtime_of(options.pop("backend", "torch"), source, 16)
    wanted = SweepOptions(16, options.pop("timing", 0))
    return start_sweep(source, data, backend, folder, wanted, **options).measure(settings)


ByHand = dict[Setting, tuple[np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def by_hand(data: DataSet) -> ByHand:
    """Outputs and kept patches of every image from PyTorch, one image at a time."""
    vit = sd.load(MODEL)
    assert data.labels is not None
    found = {}
    pixels = np.concatenate([b.pixels for b in data.batches(0, len(data), 7)])
    images = (torch.from_numpy(pixels) - 0.286) / 0.353
    with torch.inference_mode():
        found[DENSE_SETTING] = torch.cat([vit(one[None]) for one in images]).numpy(), np.empty(0)
        for setting in (HIGH, LOW):
            model = sd.prune(vit, threshold=setting.threshold, layers=LAYERS).eval()
            outputs, kept = [], []
            for one in images:
                traces: list[Any] = []
                outputs.append(model(one[None], traces=traces))
                kept.append([t.kept_index.shape[1] - 1 for t in traces])
            found[setting] = torch.cat(outputs).numpy(), np.array(kept)
    return found


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_cells_say_what_a_loop_over_single_images_says(
    backend: str,
    source: ModelSource,
    data: DataSet,
    by_hand: ByHand,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exports = []

    def counted(model: Any, options: Any) -> Any:
        exports.append(model.config)
        return export_onnx(model, options)

    monkeypatch.setattr("simprune_deploy.onnx.exporter.export_onnx", counted)
    runner = Shards()
    cells = measured(source, data, tmp_path / "s", [HIGH, LOW], backend=backend, runner=runner)
    # one graph serves all thresholds, and every shard runs once
    assert len(exports) == (backend == "onnxruntime")
    assert Counter(runner.done) == {(0, each): 1 for each in (DENSE_SETTING, HIGH, LOW)}
    assert [cell.setting for cell in cells] == [DENSE_SETTING, HIGH, LOW]
    labels, dense = data.labels, by_hand[DENSE_SETTING][0]
    assert labels is not None
    dense_right = dense.argmax(1) == labels
    for cell in cells:
        outputs, kept = by_hand[cell.setting]
        right = outputs.argmax(1) == labels
        assert cell.images == COUNT
        assert cell.top1 == pytest.approx(right.mean(), abs=1e-12)
        in_five = [label in row.argsort()[-5:] for row, label in zip(outputs, labels, strict=True)]
        assert cell.top5 == pytest.approx(np.mean(in_five), abs=1e-12)
        assert cell.agreement == pytest.approx((outputs.argmax(1) == dense.argmax(1)).mean())
        assert cell.cosine == pytest.approx(cosines(outputs, dense).mean(), abs=1e-5)
        assert cell.worst_cosine == pytest.approx(cosines(outputs, dense).min(), abs=1e-4)
        assert cell.right_only_here == (right & ~dense_right).sum()
        assert cell.right_only_dense == (dense_right & ~right).sum()
        assert sum(each.images for each in cell.classes) == COUNT
        assert sum(each.right for each in cell.classes) == right.sum()
        if cell.setting != DENSE_SETTING:
            # a float's noise may turn a decision or two
            assert cell.kept == pytest.approx(kept.mean(0), abs=0.05)
            blocks = np.stack([np.full(COUNT, 196), *[kept[:, i] for i in (0, 0, 1, 2, 2)]], 1) + 1
            assert cell.tokens_processed == pytest.approx(blocks.mean() / 197, rel=1e-3)
            flops = 2 * blocks * 12 * 96**2 + 4 * blocks**2 * 96
            assert cell.gflops == pytest.approx(flops.sum(1).mean() / 1e9, rel=1e-3)
            dense_flops = 6 * (2 * 197 * 12 * 96**2 + 4 * 197**2 * 96)
            assert cell.flops_share == pytest.approx(flops.sum(1).mean() / dense_flops, rel=1e-3)
            assert cell.padded_flops_share[1] == pytest.approx(cell.flops_share)
            # of the images in order of a block's cost, the i-th is a batch's largest that often
            flops.sort(axis=0)
            for batch, share in cell.padded_flops_share.items():
                often = np.diff((np.arange(COUNT + 1) / COUNT) ** batch)
                assert share == pytest.approx(often @ flops.sum(1) / dense_flops, rel=1e-2)
    assert [each.padded_flops_share for each in cells[:1]] == [{1: 1.0, 8: 1.0, 32: 1.0}]
    assert all(
        each.padded_flops_share[1] < each.padded_flops_share[8] < each.padded_flops_share[32] < 1
        for each in cells[1:]
    )


def test_counts_of_the_graph_are_the_decisions_of_the_graph(exported: Path) -> None:
    import onnx

    graph = onnx.load(exported / "model.onnx")
    with np.load(IMAGES) as arrays:
        images = arrays["images"][:9, None].astype(np.float32) / 255
    feeds = {"images": images, "threshold": np.linspace(0.5, 1.1, 9, dtype=np.float32)}
    counting, shown = (
        onnxruntime.InferenceSession(g.SerializeToString(), providers=["CPUExecutionProvider"])
        for g in (with_kept_counts(graph), with_diagnostics(graph))
    )
    for layer in LAYERS:
        (counts,) = counting.run([kept_name(layer)], feeds)
        (assignment,) = shown.run([diagnostic_name(layer, "assignment")], feeds)
        assert counts.tolist() == (assignment.max(1) + 1).tolist()


class Shards(LocalRunner):
    """Runs shards and remembers them; stops like Ctrl-C after some."""

    def __init__(self, stop_after: int = 10**9) -> None:
        self.done: list[tuple[int, Setting]] = []
        self.dense_given: list[bool] = []
        self.stop_after = stop_after

    def run(
        self, models: Models, data: DataSet, batch: int, shards: Sequence[Shard]
    ) -> Iterator[ShardResult]:
        for shard in shards:
            if len(self.done) >= self.stop_after:
                raise KeyboardInterrupt
            (result,) = super().run(models, data, batch, [shard])
            self.done += [(shard.number, setting) for setting in shard.settings]
            self.dense_given.append(shard.dense is not None)
            yield result


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simprune_deploy.tuning.sweep.SHARD_IMAGES", 16)


def test_an_interrupted_sweep_goes_on_where_it_was(
    source: ModelSource, data: DataSet, tmp_path: Path, small_shards: None
) -> None:
    whole = measured(source, data, tmp_path / "whole", [HIGH, LOW])
    first, second, third = Shards(stop_after=3), Shards(), Shards()
    with pytest.raises(KeyboardInterrupt):
        measured(source, data, tmp_path / "s", [HIGH, LOW], runner=first)
    # as a kill in the middle of a write leaves it
    with (tmp_path / "s" / "cells.jsonl").open("a") as file:
        file.write('{"setting": {"method": "ours", "thr')
    cells = measured(source, data, tmp_path / "s", [HIGH, LOW], runner=second, resume=True)
    assert cells == whole
    assert len(first.done) == 3
    assert Counter(first.done + second.done) == Counter(
        {(shard, each): 1 for shard in range(3) for each in (DENSE_SETTING, HIGH, LOW)}
    )
    # another setting later runs alone, beside the stored outputs of the dense model
    more = dataclasses.replace(HIGH, threshold=0.7)
    cells = measured(source, data, tmp_path / "s", [more, LOW], runner=third, resume=True)
    assert third.done == [(shard, more) for shard in range(3)]
    assert third.dense_given == [True] * 3
    assert cells[2] == whole[2]
    for file in (tmp_path / "s" / "dense").iterdir():
        file.unlink()  # the dense model runs again, and is not counted again
    fourth = Shards()
    again = dataclasses.replace(HIGH, threshold=0.75)
    cells = measured(source, data, tmp_path / "s", [again], runner=fourth, resume=True)
    assert fourth.dense_given == [False] * 3
    assert cells[0] == whole[0]


def test_what_changed_is_not_gone_on_with(
    source: ModelSource, data: DataSet, tmp_path: Path
) -> None:
    folder = tmp_path / "s"
    measured(source, data, folder, [HIGH])

    def refused(match: str, model: ModelSource = source, pictures: DataSet = data) -> None:
        with pytest.raises(SimpruneError, match=match) as caught:
            measured(model, pictures, folder, [HIGH], resume=True)
        assert "\n" not in str(caught.value)

    changed = sd.load(MODEL)
    changed.get_parameter("head.bias").data[0] += 1
    refused(
        "was swept with another model", model=source_of_model("x", sd.prune(changed, layers=LAYERS))
    )
    other = open_data(IMAGES, source.metadata, DataOptions(limit=COUNT - 1))
    refused("was swept with another data", pictures=other)
    with pytest.raises(SimpruneError, match="already exists: go on with resume=True"):
        measured(source, data, folder, [HIGH])
    text = (folder / "cells.jsonl").read_text()
    (folder / "cells.jsonl").write_text(text.replace('"shard": 0', '"shard": "zero"'))
    refused("cannot be continued .* force=True")
    measured(source, data, folder, [HIGH], force=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(SimpruneError, match=r"holds no cells\.jsonl"):
        measured(source, data, tmp_path / "mine", [HIGH], force=True)


def test_feature_models_and_unlabelled_data_have_no_accuracy(
    source: ModelSource, tmp_path: Path
) -> None:
    vit = sd.load(MODEL)
    vit.reset_classifier(0)  # type: ignore[operator]
    features = source_of_model("features", sd.prune(vit, layers=LAYERS))
    data = open_data(IMAGES, features.metadata, DataOptions(limit=16))
    dense, cell = measured(features, data, tmp_path / "a", [LOW])
    assert (cell.top1, cell.top5, cell.agreement, cell.classes) == (None, None, None, ())
    assert cell.cosine is not None
    assert 0 < cell.cosine < 1 == dense.cosine
    data = open_data(IMAGES, source.metadata, DataOptions(limit=16, labels=False))
    _, cell = measured(source, data, tmp_path / "b", [LOW])
    assert (cell.top1, cell.right_only_here, cell.classes) == (None, None, ())
    assert cell.agreement is not None


def test_fixed_tokens_and_other_rules(source: ModelSource, data: DataSet, tmp_path: Path) -> None:
    fixed = dataclasses.replace(HIGH, tokens=(98, 60, 40))
    redundancy = dataclasses.replace(HIGH, selection="redundancy", reduction="drop", threshold=0.4)
    _, *cells = measured(source, data, tmp_path / "s", [fixed, redundancy, HIGH])
    assert cells[0].kept == (98, 60, 40)
    assert len({cell.tokens_processed for cell in cells}) == 3
    alone, *batches = cells[0].padded_flops_share.values()
    assert batches == [alone, alone]
    assert alone == pytest.approx(cells[0].flops_share)


def test_outputs_that_are_no_numbers_stop_it(tmp_path: Path, source: ModelSource) -> None:
    vit = sd.load(MODEL)
    vit.get_parameter("head.bias").data[3] = float("nan")
    broken = source_of_model("broken", sd.prune(vit, layers=LAYERS))
    data = open_data(IMAGES, broken.metadata, DataOptions(limit=8))
    with pytest.raises(SimpruneError, match=r"NaN or infinity \(dense\)"):
        measured(broken, data, tmp_path / "s", [LOW])


outputs = st.lists(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=6, max_size=6), min_size=2, max_size=8
)


@given(outputs, st.data())
def test_a_sum_of_parts_is_the_whole(rows: list[list[float]], draw: st.DataObject) -> None:
    count = len(rows)
    left = np.array(rows, np.float32) + 0.25
    right = left[draw.draw(st.permutations(range(count)))]
    labels = np.array(draw.draw(st.lists(st.integers(0, 5), min_size=count, max_size=count)))
    kept = np.array(draw.draw(st.lists(st.integers(1, 9), min_size=count, max_size=count)))[:, None]
    cut = draw.draw(st.integers(1, count - 1))
    parts = [
        tally(left[part], right[part], kept[part], labels[part])
        for part in (slice(cut), slice(cut, None))
    ]
    whole = tally(left, right, kept, labels)
    stored = [Tally.from_dict(json.loads(json.dumps(part.to_dict()))) for part in parts]
    assert total(stored) == total(stored[::-1]) == whole
    assert (rank(left, labels) == 0).tolist() == (left.argmax(1) == labels).tolist()


class Recorded:
    """A predictor, and what opens it; notes its calls."""

    def __init__(self, setting: Setting, calls: list[Setting]) -> None:
        self.setting, self.calls = setting, calls
        self.key = f"recorded {setting.name}"

    def open(self) -> Any:
        return self

    def to_inputs(self, pixels: np.ndarray) -> np.ndarray:
        return pixels

    def prepare(self, images: np.ndarray, threshold: float | None) -> np.ndarray:
        assert threshold == self.setting.threshold
        return images

    def run(self, prepared: np.ndarray) -> None:
        self.calls.append(self.setting)

    def close(self) -> None: ...


def test_settings_are_timed_in_turn_with_the_dense_model() -> None:
    calls: list[Setting] = []
    dense, high, low = (Recorded(each, calls) for each in (DENSE_SETTING, HIGH, LOW))
    images = np.zeros((80, 1, 2, 2), np.float32)
    models = Models(dense, {HIGH: high, LOW: low})
    found = time_settings(models, [DENSE_SETTING, HIGH, LOW], images)
    assert found.keys() == {DENSE_SETTING, HIGH, LOW}
    assert found[HIGH].dense_milliseconds == found[DENSE_SETTING].milliseconds > 0
    for timing in (found[HIGH], found[LOW]):
        assert timing.images == 80
        assert timing.speedup_low is not None
        assert timing.speedup_high is not None
        assert timing.speedup_low <= timing.speedup_high
    calls = calls[9:]  # after the warm-up; a turn begins with a run that is not timed
    turns = [calls[i : i + 11] for i in range(0, len(calls), 11)]
    assert all(len(set(turn)) == 1 for turn in turns)
    order = [turn[0] for turn in turns]
    assert [set(order[i : i + 3]) for i in range(0, 24, 3)] == [{DENSE_SETTING, HIGH, LOW}] * 8
    assert order[0] != order[3] != order[6]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_peak_memory_is_what_a_run_adds() -> None:
    grown = growth_in(lambda: np.ones(64 << 17).sum())
    assert grown is not None
    assert 60 << 20 < grown < 80 << 20
    small = growth_in(lambda: None)
    assert small is not None
    assert small < 1 << 20


def test_thresholds_are_ranges_or_lists() -> None:
    assert parse_thresholds("0.95:0.6:0.05") == THRESHOLDS
    assert parse_thresholds("0.6:0.7:0.05") == (0.6, 0.65, 0.7)
    assert parse_thresholds("0.9,0.9,.8") == (0.9, 0.8)
    for text in ("a", "0.9:0.8", "0.9:0.8:0", "0.9:0.8:0.1,0.2", "nan", "0.9:0.6:0.000001"):
        with pytest.raises(SimpruneError):
            parse_thresholds(text)
    with pytest.raises(SimpruneError, match="outside"):
        Grid(parse_thresholds("3"))


def test_a_grid_is_all_combinations_without_repeats() -> None:
    grid = Grid(
        parse_thresholds("0.9,0.8"),
        parse_layer_sets("auto;2,4,6,8,10;2,5"),
        ("pairs", "redundancy"),
        ("merge",),
        parse_token_sets("dynamic;60"),
    )
    settings = grid.settings(12, 196)
    assert len(settings) == len(set(settings)) == 2 * 2 * 2 * 2
    assert Setting("ours", 0.8, (2, 5), "redundancy", "merge", (108, 60)) in settings
    for wrong in (
        Grid(layers=((3, 12),)),
        Grid(layers=((5, 3),)),
        Grid(selections=("pair",)),
        Grid(reductions=("merge", "")),
        Grid(tokens=(500,)),
        Grid(tokens=((60, 50),)),
        Grid(tokens=(5,)),
    ):
        with pytest.raises(SimpruneError):
            wrong.settings(12, 196)
    for parse, text in ((parse_layer_sets, "3;x"), (parse_token_sets, "60;x")):
        with pytest.raises(SimpruneError, match="is not understood: write"):
            parse(text)


def test_the_command_writes_and_prints_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    # not the test runner's own
    monkeypatch.setattr(sys, "argv", ["somewhere/simprune-deploy", "sweep", "a model"])
    options = ["--data", IMAGES, "--limit", 48, "--timing", 10, "--layers", "1,3,4", "-o", folder]
    code, out, err = call("sweep", MODEL, "--thresholds", "0.9,0.8", *options)
    assert code == 0, err
    assert "0.9" in out
    assert "classes matched by name" in out
    result = load_sweep(folder / "sweep.json")
    assert [cell.setting.threshold for cell in result.cells] == [None, 0.9, 0.8]
    assert result.environment["command"] == "simprune-deploy sweep 'a model'"
    assert "not verified" in result.environment["graphs"]
    for cell in result.cells:
        assert cell.milliseconds is not None
        assert cell.milliseconds > 0
        if sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK):
            assert cell.peak_memory is not None
            assert cell.peak_memory > 1 << 20  # eight images' attention alone takes 3.7 MB
    with (folder / "sweep.csv").open() as file:
        assert [row["threshold"] for row in csv.DictReader(file)] == ["", "0.9", "0.8"]
    # the same again computes nothing and says the same
    code, out, err = call("sweep", MODEL, "--thresholds", "0.9,0.8", *options, "--resume", "--json")
    assert code == 0, err
    assert [Measurement.from_dict(cell) for cell in json.loads(out)["cells"]] == list(result.cells)


def test_a_checkpoint_that_was_saved_pruned_keeps_what_is_not_asked_for() -> None:
    asked: dict[str, Any] = {"thresholds": (0.9, 0.8)}
    pruned = sd.prune(sd.load(str(MODEL)), layers=[1], reduction="drop")
    source = source_of_model("saved", pruned)
    usual = Setting(OURS, 0.9, (1,), "pairs", "drop")
    both = [usual, dataclasses.replace(usual, threshold=0.8)]
    assert settings_for(source, asked) == both
    (found, _) = settings_for(source, {**asked, "layers": ((2,),), "reductions": ("merge",)})
    assert found == Setting(OURS, 0.9, (2,), "pairs", "merge")
    fixed = source_of_model("saved", sd.prune(pruned, tokens=100))
    assert settings_for(fixed, asked)[0].tokens == (100,)
    assert settings_for(fixed, {**asked, "tokens": (None,)}) == both
    by_keys = source_of_model("saved", sd.prune(pruned, place="inside", features="mean-keys"))
    inside = [dataclasses.replace(each, place="inside", features="mean-keys") for each in both]
    assert settings_for(by_keys, asked) == inside
    plain = [dataclasses.replace(each, features="tokens") for each in inside]
    assert settings_for(by_keys, {**asked, "features": "tokens"}) == plain
    assert settings_for(source, {**asked, "place": "inside"}) == plain
    with pytest.raises(SimpruneError, match=r"features='mean-keys'.*features='tokens'"):
        settings_for(by_keys, {**asked, "place": "before"})


def test_settings_say_where_they_prune_and_by_what() -> None:
    setting = Setting(OURS, 0.9, (1, 3))
    names = {
        "0.9 before 1,3": {},
        "0.9 inside 1,3": {"place": "inside"},
        "0.9 inside 1,3 by keys": {"place": "inside", "features": "keys"},
        "0.9 before 1,3 pairs+drop": {"reduction": "drop"},
        "0.9 inside 1,3 redundancy+merge by mean-keys": {
            "place": "inside",
            "features": "mean-keys",
            "selection": "redundancy",
        },
        "tome 0.9 inside 1,3": {"method": "tome", "place": "inside", "features": "keys"},
    }
    for name, values in names.items():
        changed = dataclasses.replace(setting, **values)
        assert changed.name == name
        assert Setting.from_dict(changed.to_dict()) == changed
    older = setting.to_dict()
    del older["place"], older["features"]
    assert Setting.from_dict(older) == setting


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_layers_inside_blocks_are_counted_and_cost_what_they_do(
    backend: str, source: ModelSource, data: DataSet, tmp_path: Path
) -> None:
    setting = Setting(OURS, 0.8, LAYERS, place="inside", features="mean-keys")
    assert source.model is not None
    model = configured(source.model, setting).eval()
    traces: list[Any] = []
    with torch.inference_mode():
        (batch,) = data.batches(0, COUNT, COUNT, [])
        model((torch.from_numpy(batch.pixels) - 0.286) / 0.353, traces=traces)
    kept = np.stack([trace.assignment.amax(1).numpy() for trace in traces], 1)
    _, cell = measured(source, data, tmp_path / "s", [setting], backend=backend)
    assert cell.kept == pytest.approx(kept.mean(0), abs=0.05)
    mlp = np.stack([np.full(COUNT, 196), *[kept[:, i] for i in (0, 0, 1, 2, 2)]], 1) + 1
    attention = np.concatenate([np.full((COUNT, 1), 197), mlp[:, :-1]], 1)
    flops = 8 * attention * 96**2 + 4 * attention**2 * 96 + 16 * mlp * 96**2
    assert cell.gflops == pytest.approx(flops.sum(1).mean() / 1e9, rel=1e-3)
    processed = (mlp.mean() + attention.mean()) / 2 / 197
    assert cell.tokens_processed == pytest.approx(processed, rel=1e-3)


def test_an_export_is_swept_as_it_is(
    exported: Path, tmp_path: Path, data: DataSet, by_hand: ByHand
) -> None:
    """And so is its file without the function."""
    common = ["--data", IMAGES, "--limit", COUNT, "--timing", 0, "--json"]
    code, out, _ = call("sweep", exported, *common, "--thresholds", "0.9,0.8", "-o", tmp_path / "s")
    assert code == 0
    cells = [Measurement.from_dict(cell) for cell in json.loads(out)["cells"]]
    assert json.loads(out)["environment"]["graphs"] == "the exported file"
    assert json.loads(out)["environment"]["batch"] == 16
    assert data.labels is not None
    for cell in cells:
        assert cell.top1 == pytest.approx(
            (by_hand[cell.setting][0].argmax(1) == data.labels).mean()
        )
    file = tmp_path / "model-plugin.onnx"
    onnx.save(without_function(onnx.load(exported / "model.onnx")), file)
    code, out, _ = call("sweep", file, *common, "--thresholds", "0.9,0.8", "-o", tmp_path / "f")
    assert code == 0
    found = [Measurement.from_dict(cell) for cell in json.loads(out)["cells"]]
    assert [(each.setting, each.top1) for each in found] == [
        (each.setting, each.top1) for each in cells
    ]
    error = one_line(call("sweep", exported, *common[:-1], "--layers", "2", "-o", tmp_path / "t"))
    assert "the layers of" in error
    assert "sweep the checkpoint" in error
    error = one_line(
        call("sweep", exported, *common[:-1], "--backend", "torch", "-o", tmp_path / "t")
    )
    assert "give the checkpoint" in error


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    base = ["sweep", MODEL, "--data", IMAGES, "-o", tmp_path / "s"]
    for options, match in (
        (["--thresholds", "high"], "--thresholds 'high' is not understood"),
        (["--layers", "9"], "layer 9 is outside the model's depth"),
        (["--selection", "best"], "selection 'best' is unknown"),
        (["--backend", "tpu"], "'tpu' is not one of 'onnxruntime', 'torch', 'engine'"),
        (["--backend", "engine"], "export it first, with --runtime-threshold"),
        (["--batch", "0"], "--batch 0 must be 1 or more"),
        (["--timing", "-1"], "--timing -1 must be 0"),
        (["--limit", "0"], "--limit 0 must be 1"),
        (["--max-unreadable", "few"], "'few' is not a share"),
        (["--resume", "--force"], "give one"),
        (["--classes", tmp_path / "none.txt"], "none.txt cannot be read"),
    ):
        assert match in cli(*base, *options).line, options
    assert "does not exist" in one_line(call("sweep", MODEL, "--data", tmp_path / "none"))
    assert not (tmp_path / "s").exists()


def test_too_many_unreadable_pictures_stop_it(tmp_path: Path) -> None:
    from PIL import Image

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    with np.load(IMAGES) as arrays:
        for index, image in enumerate(arrays["images"][:20]):
            Image.fromarray(image).save(pictures / f"{index}.png")
    (pictures / "3.png").write_bytes(b"no picture")
    base = ["sweep", MODEL, "--data", pictures, "--timing", 0, "--thresholds", "0.9"]
    base += ["--backend", "torch", "-o", tmp_path / "s"]
    error = one_line(call(*base))
    assert "1 of 20 pictures cannot be read (3.png: not a picture), more than the 1.00%" in error
    code, out, _ = call(*base, "--max-unreadable", "5%", "--resume", "--json")
    assert code == 0
    assert json.loads(out)["data"]["skipped"] == [["3.png", "not a picture"]]
    assert {cell["images"] for cell in json.loads(out)["cells"]} == {19}


def test_small_batches_and_few_pictures_can_be_timed(tmp_path: Path) -> None:
    fixed = tmp_path / "fixed"
    options = ExportOptions(batch=(4, 4))
    pruned = sd.prune(sd.load(MODEL), threshold=0.85, layers=LAYERS)
    sd.export(pruned, fixed, options, verify=False)
    common = ["--data", IMAGES, "--limit", 3, "--timing", 5, "--json"]
    code, out, err = call("sweep", fixed, *common, "-o", tmp_path / "a")
    assert code == 0, err
    sweep = json.loads(out)
    dense, cell = (Measurement.from_dict(each) for each in sweep["cells"])
    assert cell.setting == Setting("ours", 0.85, LAYERS)
    assert cell.tokens_processed < dense.tokens_processed == 1
    assert dense.milliseconds is not None
    assert sweep["environment"]["timing"].startswith("batch 4, ")
    error = one_line(
        call("sweep", fixed, *common[:-1], "--thresholds", "0.9", "-o", tmp_path / "b")
    )
    assert "fixed at 0.85" in error
    small = ["--backend", "torch", "--batch", 2, "--thresholds", "0.9", "--layers", "1,3,4"]
    small += ["-o", tmp_path / "c"]
    code, out, err = call("sweep", MODEL, *common, *small)
    assert code == 0, err
    assert "a batch of 2 adds" in json.loads(out)["environment"]["timing"]
