"""TensorRT's size hints are what the pictures of the parity check keep, and what they would keep
is held against fixed counts."""

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


def pictures_of(model: PrunedViT) -> torch.Tensor:
    """Return float32[images, C, H, W]: the pictures that come along."""
    taken = Preprocessing.of_model(model)
    return torch.from_numpy(load_as_taken(None, taken, graph_normalizes=False, uint8=False).pixels)


def kept_by_image(model: PrunedViT) -> np.ndarray[Any, Any]:
    """Return int64[layers, images]: tokens that PyTorch keeps of the pictures that come along."""
    kept = []
    for image in pictures_of(model):  # alone, so that there is no padding
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


@pytest.fixture(scope="module")
def fixed(model: PrunedViT) -> PrunedViT:
    """Between the fewest and the most that the pictures keep at its threshold, at both layers."""
    return sd.prune(model, tokens=[125, 90])


@pytest.fixture(scope="module")
def exported(fixed: PrunedViT, tmp_path_factory: pytest.TempPathFactory) -> sd.ExportResult:
    options = sd.ExportOptions(runtime_threshold=True)
    return sd.export(fixed, tmp_path_factory.mktemp("fixed") / "out", options)


def test_fixed_counts_are_their_own_hints(exported: sd.ExportResult) -> None:
    """(Hints that `tune` gives stay too: tests/tuning/test_tune.py.)"""
    assert hints_of(exported.folder) == [126, 91]
    assert exported.manifest["model"]["export"]["opt_tokens"] == []


def test_the_verdict_says_where_fixed_counts_overrule_the_threshold(
    fixed: PrunedViT, exported: sd.ExportResult
) -> None:
    traces: list[PruneTrace] = []
    pictures = pictures_of(fixed)
    with torch.inference_mode():
        fixed.eval()(pictures, traces=traces)
    wanted = {}
    for trace, most in zip(traces, fixed.config.capacities, strict=True):
        patches = torch.nn.functional.normalize(trace.features[:, 1:].double(), dim=2)
        best = (patches[:, ::2] @ patches[:, 1::2].transpose(1, 2)).amax(2)
        stay = patches.shape[1] - (best >= 0.9).sum(1)
        wanted[str(trace.layer)] = int((stay > most).sum())
    assert any(0 < each < len(pictures) for each in wanted.values()), wanted

    assert exported.verdict is not None
    check = exported.verdict.check("pruning")
    assert exported.verdict.status == "passed"
    # its threshold is an input, and every picture ran at another one too: that is not counted
    assert check.numbers["overruled"] == {"threshold": 0.9, "images": 8, "by_layer": wanted}
    said = ", ".join(f"{found} of 8 at block {layer}" for layer, found in wanted.items())
    line = "the fixed counts remove patches less alike than the threshold of 0.9 in so many images"
    assert check.summary.endswith(f"; {line}: {said}")
    stored = json.loads((exported.folder / "parity.json").read_text(encoding="utf-8"))
    assert stored["checks"]["pruning"]["overruled"] == check.numbers["overruled"]
    golden = sd.verify(exported.folder).check("pruning")
    assert "in so many images" in golden.summary
    assert golden.numbers["overruled"]["images"] <= 4


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
