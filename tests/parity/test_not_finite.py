"""NaN and infinity anywhere in a comparison are a finding that is reported, in JSON too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from typer.testing import CliRunner

from simprune_deploy.cli import app
from simprune_deploy.parity.verdict import Check


def run(*arguments: Any) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    return result.exit_code, " ".join(result.output.split())


def saved(folder: Path, bias: float, *blocks: int) -> Path:
    """A model whose residual stream grows by `bias` in one channel in each of these blocks."""
    torch.manual_seed(0)
    model: Any = timm.create_model("test_vit", img_size=32, num_classes=5).eval()
    with torch.no_grad():
        for block in blocks:
            model.blocks[block].mlp.fc2.bias[3] = bias
    torch.save(model.state_dict(), folder / "model.pth")
    return folder / "model.pth"


@pytest.mark.parametrize(
    ("blocks", "layers", "read"), [((0, 1), "1,3", True), ((0, 1), "1", False),
                                   ((3, 4), "1,3", False)], ids=str
)  # fmt: skip
def test_float16_that_ends_anywhere_is_a_verdict_that_names_bfloat16(
    tmp_path: Path, blocks: tuple[int, ...], layers: str, read: bool
) -> None:
    """Each bias fits float16, and their sum in the residual stream does not.

    A prune layer behind it reads infinity; elsewhere a CPU goes on in float32.
    """
    path = saved(tmp_path, 40_000, *blocks)
    common = ("export", path, "--arch", "test_vit", "--layers", layers, "--threshold", 0.9)
    code, output = run(*common, "--precision", "fp16", "-o", tmp_path / "fp16")
    assert code == 1, output
    assert "verdict: failed" in output
    assert "use --precision bf16" in output
    report = json.loads((tmp_path / "fp16" / "parity.json").read_text(), parse_constant=pytest.fail)
    assert report["status"] == "failed"
    failed = {
        name: check["summary"] for name, check in report["checks"].items() if not check["passed"]
    }
    assert "leaves float16" in failed["range"]
    assert ("NaN or infinity" in failed.get("outputs", "")) is read
    assert ("NaN or infinity" in failed.get("decisions", "")) is read
    code, output = run(*common, "--precision", "bf16", "-o", tmp_path / "bf16")
    assert "NaN" not in output


def test_a_model_whose_own_outputs_are_not_finite(tmp_path: Path) -> None:
    path = saved(tmp_path, 3e38, 0, 1)
    common = (path, "--arch", "test_vit", "--layers", 1)
    code, output = run("export", *common, "-o", tmp_path / "out", "--json")
    assert code == 1
    report = json.loads(output, parse_constant=pytest.fail)
    checks = report["verdict"]["checks"]
    assert "PyTorch's own float32 is not finite" in checks["outputs"]["summary"]
    assert checks["top1"]["passed"] is False
    data = tmp_path / "data.npz"
    images = np.random.default_rng(0).integers(0, 255, (8, 32, 32, 3), dtype=np.uint8)
    np.savez(data, images=images, labels=np.arange(8) % 5)
    for command in (
        ("sweep", *common, "--data", data, "--timing", 0, "-o", tmp_path / "sweep"),
        ("verify", tmp_path / "out", "--data", data, "--min-agreement", "90%"),
    ):
        code, output = run(*command)
        assert code == 2
        assert "hold NaN or infinity" in output
    assert not (tmp_path / "sweep" / "sweep.json").exists()


def test_numbers_of_a_check_are_json_whatever_they_are() -> None:
    check = Check(
        "outputs", False, "", {"a": float("nan"), "b": [1.0, float("inf")], "c": {"d": 2}}
    )
    assert check.numbers == {"a": None, "b": [1.0, None], "c": {"d": 2}}
    json.dumps(check.numbers, allow_nan=False)
