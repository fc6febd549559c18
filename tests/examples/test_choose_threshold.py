"""The example that chooses a threshold finds one, and its model keeps what was asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from places import ROOT


def test_a_threshold_is_found_exported_and_checked(tmp_path: Path) -> None:
    script = ROOT / "examples" / "choose_threshold.py"
    done = subprocess.run(
        [sys.executable, str(script), "-o", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    tuned = json.loads((tmp_path / "tuned.json").read_text(encoding="utf-8"))
    assert 0.3 <= tuned["pruning"]["threshold"] < 1
    manifest = json.loads((tmp_path / "exported" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["model"]["pruning"]["threshold"] == tuned["pruning"]["threshold"]
    assert "parity check: passed" in done.stdout
    assert "accuracy on 1,000 images: passed" in done.stdout
