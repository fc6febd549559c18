"""Parity of models with one output: by value, and by the side of zero where there are two."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from one_output import LAYERS, as_timm_takes_them, one_output_vit, pictures, plain, pruned
from onnx import numpy_helper

import simprune_deploy as sd
from simprune_deploy.common.errors import InvalidArgumentError
from simprune_deploy.common.images import ImageSet
from simprune_deploy.onnx.exporter import export_onnx
from simprune_deploy.onnx.metadata import read_metadata
from simprune_deploy.parity.checks import check_outputs, check_top1
from simprune_deploy.parity.comparison import compare_with_golden, compare_with_torch
from simprune_deploy.parity.runs import Run
from simprune_deploy.parity.tolerance import TURNED_DIFFERENCE, Tolerance, root_mean_square
from simprune_deploy.predict.answers import classes_of
from simprune_deploy.reports.visualize import _says

COUNT = 16


def images() -> ImageSet:
    pixels = as_timm_takes_them()[:COUNT].numpy()
    return ImageSet(pixels, tuple(map(str, range(COUNT))), (), "clouds")


def shifted() -> Any:
    """The model with a deviation added to its output: what is left is not all cancellation."""
    vit = copy.deepcopy(one_output_vit())
    with torch.no_grad():
        vit.head.bias += 1
    return vit


def run_of(*values: float) -> Run:
    return Run("a run", np.array(values, np.float32)[:, None], {})


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_export_is_accepted_and_a_wrong_head_is_not(precision: str) -> None:
    model = sd.prune(shifted(), threshold=0.8, layers=LAYERS)
    options = sd.ExportOptions(batch=(1, 4), precision=precision)  # type: ignore[arg-type]
    graph = export_onnx(model, options)
    verdict, golden = compare_with_torch(graph, model, images())
    assert verdict.accepted, verdict
    assert verdict.check("top1").passed
    assert verdict.check("top1").summary == (
        f"the output is on the same side of 0 on {COUNT} of {COUNT} images"
    )
    assert not [key for check in verdict.checks for key in check.numbers if "cosine" in key]
    assert "cosine" not in verdict.check("outputs").summary
    # the same decisions, and all outputs above zero: the largest of one output is still the first
    (bias,) = [each for each in graph.graph.initializer if each.name.endswith("head.bias")]
    moved = numpy_helper.to_array(bias) + np.array(4, numpy_helper.to_array(bias).dtype)
    bias.CopyFrom(numpy_helper.from_array(moved, bias.name))
    for found in (
        compare_with_torch(graph, model, images())[0],
        compare_with_golden(graph, golden),
    ):
        assert found.status == "failed"
        assert found.check("outputs").passed is False
        assert found.check("top1").passed is False


def test_the_side_of_zero_fails_except_within_the_tolerance() -> None:
    same = np.ones(3, bool)
    reference = run_of(1, -1, 2e-5)
    assert check_top1(reference, run_of(1, -1, -2e-5), same, True).passed is True  # a tie
    assert check_top1(reference, run_of(1, -1, -2e-5), same, True).numbers["ties"] == 1
    assert check_top1(reference, run_of(1, 1, 2e-5), same, True).passed is False
    assert check_top1(reference, run_of(1, 1, 2e-5), np.array([1, 0, 1], bool), True).passed is True
    one_side = check_top1(run_of(21, 35, 60), run_of(21, 35, 60), same, True)
    assert one_side.passed is None
    assert one_side.summary == "all outputs are on one side of 0: only their values were compared"
    assert check_top1(run_of(21, 35, 60), run_of(21, -35, 60), same, True).passed is False


def test_turned_images_of_16_bits_are_held_to_a_difference() -> None:
    values = [1.0, -1.0, 0.5, 2.0]
    tolerance, same = Tolerance("fp16", 3), np.array([1, 1, 1, 0], bool)
    limit = TURNED_DIFFERENCE * root_mean_square(np.array(values))
    near = check_outputs(run_of(*values), run_of(*values[:3], 2 - 0.9 * limit), same, tolerance)
    assert near.passed
    assert near.numbers["tolerance_of_turned_images"] == pytest.approx(limit)
    # of the same sign: its cosine is 1
    off = check_outputs(run_of(*values), run_of(*values[:3], 2 - 1.1 * limit), same, tolerance)
    assert not off.passed
    assert "largest difference" in off.summary
    none = np.zeros(4, bool)
    assert check_outputs(run_of(*values), run_of(*values), none, tolerance).passed
    assert not check_outputs(run_of(*values), run_of(*[-v for v in values]), none, tolerance).passed


def test_softmax_over_one_output_is_refused() -> None:
    model = sd.prune(one_output_vit(), threshold=0.8, layers=LAYERS)
    with pytest.raises(InvalidArgumentError, match=r"over one output is 1 .* logistic function"):
        export_onnx(model, sd.ExportOptions(softmax=True))


def test_the_class_of_a_row() -> None:
    rng = np.random.default_rng(0)
    several = rng.normal(size=(50, 4)).astype(np.float32)
    assert classes_of(several).tolist() == several.argmax(1).tolist()
    single = np.array([[-1], [0], [1e-7], [0.1], [3]], np.float32)
    assert classes_of(single).tolist() == [0, 0, 1, 1, 1]
    assert classes_of(single, 0.1).tolist() == [0, 0, 0, 0, 1]  # of float32's 0.1, as in PyTorch
    assert classes_of(single).dtype == np.int64


def test_a_picture_says_the_output(tmp_path: Path) -> None:
    graph: Any = export_onnx(sd.prune(one_output_vit(), threshold=1.1, layers=LAYERS))
    assert isinstance(graph, onnx.ModelProto)
    assert _says(read_metadata(graph), plain()[:1]) == f"output: {plain()[0]:.4g}"
    np.savez(tmp_path / "two.npz", images=pictures()[:2])
    shown = sd.visualize(
        pruned(0.8),
        tmp_path / "two.npz",
        output=tmp_path / "out",
    )
    wanted = [f"output: {value:.4g}" for value in plain(0.8)[:2]]
    assert [each["says"] for each in shown.numbers["pictures"]] == wanted
