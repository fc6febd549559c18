"""Sweeps and tuning of models with one output: sides of the cut, movement, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from one_output import labels, one_output_vit, plain, write_checkpoint, write_data
from timm.models import save_for_hf
from typer.testing import CliRunner

from simprune_deploy.cli import app
from simprune_deploy.evaluate.statistics import paired_drop
from simprune_deploy.reports.html import render_html
from simprune_deploy.tuning.results import load_sweep
from simprune_deploy.tuning.tallies import COSINE_STEPS, Tally, rank, tally, total

THRESHOLDS = (0.8, 0.2)


def call(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def swept(folder: Path, *arguments: object) -> dict[str, Any]:
    code, out, err = call("sweep", *arguments, "--timing", 0, "-o", folder, "--json")
    assert code == 0, err
    answer: dict[str, Any] = json.loads(out)
    return answer


@pytest.mark.parametrize(("backend", "cut"), [("onnxruntime", None), ("torch", 0.4)])
def test_cells_are_what_numpy_says(
    backend: str, cut: float | None, checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    asked = [] if cut is None else ["--cut", cut]
    limits = ",".join(map(str, THRESHOLDS))
    answer = swept(tmp_path / "out", checkpoint, "--data", data, "--backend", backend,
                   "--thresholds", limits, *asked)  # fmt: skip
    edge, dense = np.float32(cut or 0), plain()
    assert answer["environment"]["cut"] == edge
    spread = dense.astype(float).std()
    for cell, threshold in zip(answer["cells"], (None, *THRESHOLDS), strict=True):
        found = plain(threshold)
        right, was_right = (found > edge) == labels(), (dense > edge) == labels()
        assert cell["top1"] == right.mean()
        assert cell["agreement"] == ((found > edge) == (dense > edge)).mean()
        assert (cell["top5"], cell["cosine"], cell["worst_cosine"]) == (None, None, None)
        assert cell["right_only_here"] == (right & ~was_right).sum()
        assert cell["right_only_dense"] == (was_right & ~right).sum()
        apart = np.abs(found.astype(float) - dense) / spread
        assert cell["moved"] == pytest.approx(apart.mean(), rel=1e-3, abs=1e-6)
        assert cell["worst_moved"] == pytest.approx(apart.max(), rel=1e-3, abs=1e-5)
    assert answer["cells"][2]["agreement"] < 0.95


def test_people_see_movement_in_place_of_the_cosine(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    code, out, _ = call("sweep", checkpoint, "--data", data, "--backend", "torch", "--timing", 0,
                        "--thresholds", "0.2", "-o", folder)  # fmt: skip
    head = out.splitlines()[0]
    assert code == 0
    for title in ("top-1", "as dense", "moved", "most moved"):
        assert title in head
    assert "cosine" not in head
    assert "not measured: cosine: a single output has none" in out
    assert "one output: above 0 is one class, at or below it the other" in out
    rows = list(csv.DictReader((folder / "sweep.csv").read_text().splitlines()))
    assert float(rows[1]["moved"]) > 0.1
    assert "most moved" in (folder / "sweep.md").read_text()
    page = render_html(load_sweep(folder / "sweep.json"))
    assert "mean distance of the output from the dense model" in page
    # other cells do not belong to it
    code, _, err = call("sweep", checkpoint, "--data", data, "--backend", "torch", "--timing", 0,
                        "--thresholds", "0.2", "-o", folder, "--resume", "--cut", 1)  # fmt: skip
    assert code == 2
    assert "was swept with another cut (0.0, now 1.0)" in err


def test_one_side_alone_has_no_accuracy_and_no_agreement(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    common = (checkpoint, "--data", data, "--backend", "torch", "--thresholds", "0.2")
    answer = swept(tmp_path / "out", *common, "--cut", -50)
    for cell in answer["cells"]:
        assert (cell["top1"], cell["agreement"], cell["right_only_dense"]) == (None, None, None)
        assert cell["classes"] == []
    assert answer["cells"][1]["moved"] > 0.1
    (why,) = [w for w in answer["environment"]["not_measured"] if w.startswith("classes")]
    assert "all 240 outputs are above -50" in why
    assert "set --cut between them" in why
    page = render_html(load_sweep(tmp_path / "out" / "sweep.json"))
    assert "mean distance to the dense output" in page
    assert "accuracy: all single outputs are on one side of the cut" in page
    # labels that say so are an answer
    same = write_data(tmp_path, labels=np.ones_like(labels()))
    answer = swept(tmp_path / "ones", checkpoint, "--data", same, *common[3:], "--cut", -50)
    assert [(cell["top1"], cell["agreement"]) for cell in answer["cells"]] == [(1, 1), (1, 1)]


def test_tuning_holds_the_drop_of_sides(data: Path, tmp_path: Path) -> None:
    vit = tmp_path / "vit"
    save_for_hf(one_output_vit(), vit, model_args={
        "img_size": 32, "patch_size": 4, "depth": 3, "embed_dim": 48, "num_heads": 4})  # fmt: skip
    common = ("tune", vit, "--data", data, "--backend", "torch", "--layers", "1,2", "--timing", 0,
              "--reduction", "drop")  # fmt: skip
    code, out, err = call(*common, "--max-drop", "4%", "-o", tmp_path / "t.json", "--json")
    assert code == 0, err
    answer = json.loads(out)
    assert len(answer["evaluated"]) > 2
    was_right = (plain() > 0) == labels()
    highs = {}
    for cell in answer["evaluated"]:
        threshold = cell["setting"]["threshold"]
        right = (plain(threshold) > 0) == labels()
        lost, won = int((was_right & ~right).sum()), int((right & ~was_right).sum())
        assert cell["top1"] == right.mean()
        assert (cell["right_only_dense"], cell["right_only_here"]) == (lost, won)
        highs[threshold] = paired_drop(lost, won, len(right)).high
    chosen = answer["pruning"]["threshold"]
    assert chosen > 0.3  # where a check that cannot fail would end
    assert highs[chosen] <= 0.04
    assert any(high > 0.04 for high in highs.values())
    assert answer["drop"]["high"] == pytest.approx(highs[chosen])
    code, _, err = call(*common, "--max-drop", "4%", "-o", tmp_path / "u.json", "--cut", 50)
    assert code == 2
    assert "--max-drop is of classes, and all 240 outputs are at or below 50" in err


def test_a_cut_is_for_one_output(tmp_path: Path) -> None:
    demo = Path(__file__).parents[2] / "examples" / "fashion_mnist"
    for command in (("sweep",), ("tune", "--max-drop", "5%")):
        code, out, err = call(*command, demo / "vit", "--data", demo / "test_slice.npz", "--limit",
                              100, "--cut", 0, "-o", tmp_path / "out")  # fmt: skip
        assert (code, out) == (2, "")
        assert "--cut 0.0 is for models with one output, and this one gives 10 classes" in err


@given(
    st.lists(st.tuples(*[st.floats(-1e4, 1e4, width=32)] * 2, st.integers(0, 1)), min_size=1),
    st.integers(1, 5),
    st.sampled_from([-1.0, 0.0, 0.1, 3.5]),
)
def test_tallies_of_single_outputs_add_up(
    rows: list[tuple[float, float, int]], size: int, cut: float
) -> None:
    mine, theirs = (np.array([[row[i]] for row in rows], np.float32) for i in (0, 1))
    wanted = np.array([row[2] for row in rows])
    kept = np.zeros((len(rows), 0), np.int64)
    parts = [slice(at, at + size) for at in range(0, len(rows), size)]
    added = total(tally(mine[p], theirs[p], kept[p], wanted[p], cut) for p in parts)
    whole = tally(mine, theirs, kept, wanted, cut)
    assert added == whole == Tally.from_dict(json.loads(json.dumps(whole.to_dict())))
    edge = np.float32(cut)
    assert whole.above == (mine > edge).sum()
    assert whole.agree == ((mine > edge) == (theirs > edge)).sum()
    assert whole.right == ((mine[:, 0] > edge) == wanted).sum()
    assert whole.deviation == pytest.approx(mine.astype(float).std(), rel=1e-6, abs=1e-6)
    apart = np.abs(mine.astype(float) - theirs)
    assert whole.moved / COSINE_STEPS == pytest.approx(apart.sum(), abs=1e-6)
    assert whole.most_moved == apart.max()
    assert (whole.cosines, whole.worst_cosine) == (0, 1.0)
    assert (rank(mine, wanted, cut) == 0).tolist() == ((mine[:, 0] > edge) == wanted).tolist()
