"""`make demo` does its job: exports, verifies, and shows a table of real measurements."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from places import ROOT


def test_demo_proves_its_model_and_weighs_it(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), "-o", str(tmp_path)]
    done = subprocess.run(
        [*command, "--images", "400", "--rounds", "5"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    verdict = json.loads((tmp_path / "pruned" / "parity.json").read_text())
    assert verdict["status"] == "passed"
    rows = re.findall(r"^\| (dense|[\d.]+) \| ([\d.]+)% \|", done.stdout, re.M)
    accuracy = {name: float(value) for name, value in rows}
    assert accuracy["dense"] > 85
    assert accuracy["0.9"] > accuracy["dense"] - 3
    assert f"{tmp_path / 'pruned' / 'model.onnx'}" in done.stdout.replace("\n", "")
