"""Calibration: what it runs is what the model runs, and what it finds spends what was asked for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

import simprune_deploy as sd
from simprune_deploy.common.errors import InvalidArgumentError, UnsupportedModelError
from simprune_deploy.common.images import Preprocessing
from simprune_deploy.pruning.calibrated_curve import FLOOR, CalibratedCurve
from simprune_deploy.pruning.calibration import (
    HELD_OUT_FROM,
    Calibrated,
    calibrate,
)
from simprune_deploy.pruning.calibrator import Calibrator, Candidate, OnAverage
from simprune_deploy.pruning.config import FEATURES
from simprune_deploy.pruning.model import PrunedViT, PruneTrace, prune

FASHION = Path(__file__).parents[2] / "examples" / "fashion_mnist"


@pytest.fixture(scope="module")
def vit() -> torch.nn.Module:
    return sd.load(FASHION / "vit").eval()


@pytest.fixture(scope="module")
def images(vit: torch.nn.Module) -> torch.Tensor:
    with np.load(FASHION / "test_slice.npz") as data:
        levels = data["images"][:HELD_OUT_FROM, None].astype(np.float32)
    return torch.from_numpy(Preprocessing.of_model(vit).normalize(levels / 255))


@pytest.fixture(scope="module")
def calibrated(vit: torch.nn.Module, images: torch.Tensor) -> Calibrated:
    return calibrate(vit, images, 0.6, features="tokens", layers=[1, 2, 3, 4])


def test_the_calibrator_runs_what_the_model_runs(
    vit: torch.nn.Module, images: torch.Tensor
) -> None:
    calibrator = Calibrator(vit, images[:4])
    for features in FEATURES:
        candidate = Candidate(features, (0.0, 1.0, 2.0, 0.0, 1.0, 0.0))
        left = calibrator.left_at(candidate, 0.6)
        found = calibrator.run(candidate, range(4), OnAverage(left, FLOOR * left[-1]))
        assert found.tolerances is not None
        curve = CalibratedCurve((0.6,), (found.tolerances.layers,), (left,))
        model = prune(
            vit,
            threshold=0.6,
            layers=candidate.layers,
            place="inside",
            features=features,
            curve=curve,
        ).eval()
        with torch.inference_mode():
            dense = vit(images[:4])
            for image in range(4):
                traces: list[PruneTrace] = []
                output = model(images[image][None], traces=traces)
                kept = [each.kept_index.shape[1] - model.num_prefix_tokens for each in traces]
                assert kept == found.kept[image].tolist()
                loss = 1 - torch.cosine_similarity(output[0].double(), dense[image].double(), dim=0)
                assert found.losses[image] == pytest.approx(float(loss), abs=1e-6)
        again = calibrator.run(candidate, range(4), found.tolerances)
        np.testing.assert_array_equal(again.kept, found.kept)


def test_a_share_of_the_flops_is_met(calibrated: Calibrated) -> None:
    assert calibrated.calibration.flops.mean() == pytest.approx(0.6, abs=0.01)
    assert calibrated.held_out is not None
    assert len(calibrated.held_out.losses) == HELD_OUT_FROM // 2
    assert calibrated.held_out.flops.mean() == pytest.approx(0.6, abs=0.1)
    curve = calibrated.config.curve
    assert curve is not None
    assert 0.6 in curve.shares
    # more tolerant where less is spent
    sums = [sum(row) for row in curve.tolerances]
    assert sums == sorted(sums, reverse=True)


def test_the_number_of_a_calibrated_model_moves_along_its_curve(
    vit: torch.nn.Module, images: torch.Tensor, calibrated: Calibrated
) -> None:
    model = PrunedViT(vit, calibrated.config).eval()

    def kept(threshold: float | torch.Tensor | None) -> list[int]:
        traces: list[PruneTrace] = []
        with torch.inference_mode():
            model(images[:2], threshold=threshold, traces=traces)
        return [int((each.assignment.amax(1) + 1).sum()) for each in traces]

    assert kept(None) == kept(0.6) == kept(torch.tensor([0.6, 0.6]))
    totals = [sum(kept(share)) for share in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)]
    assert totals == sorted(totals)
    assert totals[0] < totals[-2]
    with torch.inference_mode():
        for nothing in (1.0, 2.0, torch.tensor([float("nan")])):
            assert torch.equal(model(images[:2], threshold=nothing), vit(images[:2]))


def test_an_image_does_not_depend_on_its_batch(
    vit: torch.nn.Module, images: torch.Tensor, calibrated: Calibrated
) -> None:
    model = PrunedViT(vit, calibrated.config).eval()
    with torch.inference_mode():
        together = model(images[:6])
        alone = torch.cat([model(image[None]) for image in images[:6]])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


def test_what_is_chosen_lost_least_on_its_own_pictures_at_equal_cost(
    vit: torch.nn.Module, images: torch.Tensor
) -> None:
    few = images[:6]
    free = calibrate(vit, few, 0.6)
    assert free.held_out is None
    assert free.evaluated > 10
    calibrator = Calibrator(vit, few)
    layers = free.config.layers
    weights = tuple(float(block in layers) for block in range(calibrator.depth))
    own = calibrator.cost_of_layers(Candidate(free.config.features, weights), None)
    for features in FEATURES:
        alike = Candidate(features, (1.0,) * 6)
        more = calibrator.cost_of_layers(alike, None) - own
        left = calibrator.left_at(alike, 0.6 - more)
        found = calibrator.run(alike, range(6), OnAverage(left, FLOOR * left[-1]))
        assert free.calibration.losses.mean() < 1.2 * found.losses.mean()


def test_the_curve_travels_with_the_weights(
    vit: torch.nn.Module, calibrated: Calibrated, tmp_path: Path
) -> None:
    model = PrunedViT(vit, calibrated.config)
    sd.save(model, tmp_path / "pruned.pt")
    loaded = sd.load(tmp_path / "pruned.pt")
    assert isinstance(loaded, PrunedViT)
    assert loaded.config == calibrated.config


def test_other_layers_need_another_calibration(
    vit: torch.nn.Module, calibrated: Calibrated
) -> None:
    model = PrunedViT(vit, calibrated.config)
    assert prune(model, threshold=0.8).config == dataclasses.replace(model.config, threshold=0.8)
    with pytest.raises(InvalidArgumentError, match="calibrated with other layers"):
        prune(model, layers=[1, 2])
    plain = prune(model, layers=[1, 2], threshold=0.85).config
    assert plain.curve is None
    assert plain.threshold == 0.85


def test_what_cannot_be_calibrated_is_refused(vit: torch.nn.Module, images: torch.Tensor) -> None:
    for share in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(InvalidArgumentError, match=r"outside \(0, 1\)"):
            calibrate(vit, images, share)
    with pytest.raises(InvalidArgumentError, match=r"cannot be reached: .* are left"):
        calibrate(vit, images, 0.05)
    with pytest.raises(InvalidArgumentError, match="3 pictures are too few"):
        calibrate(vit, images[:3], 0.6)
    with pytest.raises(InvalidArgumentError, match="give the same output"):
        calibrate(vit, images[:1].expand(8, -1, -1, -1), 0.6)
    with pytest.raises(InvalidArgumentError, match="layer_cost"):
        calibrate(vit, images, 0.6, layer_cost=0.5)


def test_a_model_without_halves_is_refused(images: torch.Tensor) -> None:
    import timm

    parallel = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, block_fn=_parallel_block()
    )
    pictures = torch.rand(4, 3, 32, 32)
    with pytest.raises(UnsupportedModelError, match="no blocks that can be pruned inside"):
        calibrate(parallel.eval(), pictures, 0.6)


def _parallel_block() -> type[torch.nn.Module]:
    from timm.models.vision_transformer import ParallelScalingBlock

    return ParallelScalingBlock
