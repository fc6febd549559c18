"""TensorRT's size hints are what the pictures of the parity check keep."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from places import ROOT

import simprune_deploy as sd
from simprune_deploy.common.images import Preprocessing, load_as_taken
from simprune_deploy.onnx.metadata import read_metadata
from simprune_deploy.onnx.variants import prune_nodes
from simprune_deploy.parity.usual_tokens import mean_of_largest
from simprune_deploy.pruning.model import PrunedViT, PruneTrace

DEMO = ROOT / "examples" / "fashion_mnist" / "vit"


def hints_of(folder: Path) -> list[int]:
    """Return the attribute of every prune node, after metadata and manifest were held to it."""
    graph = onnx.load(folder / "model.onnx")
    found = [
        {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}["opt_tokens"]
        for node in prune_nodes(graph)
    ]
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert read_metadata(graph).export == manifest["model"]["export"]
    return found


def kept_by_image(model: PrunedViT) -> np.ndarray[Any, Any]:
    """Return int64[layers, images]: tokens that PyTorch keeps of the pictures that come along."""
    taken = Preprocessing.of_model(model)
    pictures = load_as_taken(None, taken, graph_normalizes=False, uint8=False)
    kept = []
    for image in torch.from_numpy(pictures.pixels):  # alone, so that there is no padding
        traces: list[PruneTrace] = []
        with torch.inference_mode():
            model.eval()(image[None], traces=traces)
        kept.append([trace.kept_index.shape[1] for trace in traces])
    return np.array(kept).T


@pytest.fixture(scope="module")
def model() -> PrunedViT:
    return sd.prune(sd.load(str(DEMO)), threshold=0.9, layers=[1, 3])


def test_the_attributes_are_the_mean_of_what_the_pictures_keep(
    model: PrunedViT, deciding_demo: Path
) -> None:
    """Its threshold is an input, and the check runs at others too: those do not count."""
    kept = kept_by_image(model)
    assert kept.shape == (2, 8)
    assert len({*kept[0]}) > 1, "the pictures differ"
    hints = hints_of(deciding_demo)
    assert hints == [math.ceil(row.mean()) for row in kept]
    assert all(hint < 197 for hint in hints)
    manifest = json.loads((deciding_demo / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["model"]["export"]["opt_tokens"] == hints


def test_a_fixed_batch_is_tuned_for_its_largest_image(model: PrunedViT, tmp_path: Path) -> None:
    """As large as the picture that keeps most, where the batch holds all of them."""
    rounded = sd.prune(model, multiple_of=8)
    sd.export(rounded, tmp_path / "out", sd.ExportOptions(batch=(8, 8)))
    largest = kept_by_image(model).max(1)
    assert hints_of(tmp_path / "out") == [math.ceil(count / 8) * 8 for count in largest]


def test_fixed_counts_stay(model: PrunedViT, tmp_path: Path) -> None:
    """(So do hints that `tune` gives: tests/tuning/test_tune.py.)"""
    result = sd.export(sd.prune(model, tokens=[150, 99]), tmp_path / "fixed")
    assert hints_of(tmp_path / "fixed") == [151, 100]
    assert result.manifest["model"]["export"]["opt_tokens"] == []


def test_without_the_check_there_is_a_guess_and_no_number_in_the_facts(
    model: PrunedViT, tmp_path: Path
) -> None:
    result = sd.export(model, tmp_path / "out", verify=False)
    assert result.manifest["model"]["export"]["opt_tokens"] == []
    assert all(1 < hint < 197 for hint in hints_of(tmp_path / "out"))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_the_mean_of_the_largest_is_over_all_choices(size: int) -> None:
    counts = [40, 7, 7, 12, 25]
    choices = list(itertools.combinations(counts, min(size, len(counts))))
    assert mean_of_largest(counts, size) == math.ceil(sum(map(max, choices)) / len(choices))
