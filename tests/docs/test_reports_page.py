"""The commands of docs/reports.md run as they stand there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from places import ROOT
from typer.testing import CliRunner

from simprune_deploy.cli import app
from simprune_deploy.tuning.results import Measurement, Setting, SweepResult

PAGE = ROOT / "docs" / "reports.md"
WITH_DOWNLOADS = "real-weights/"
"""Commands on weights that `make test-real` downloads are not run here."""


def test_the_pages_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("examples", "simprune_deploy"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep-results").mkdir()
    cells = (
        Measurement(Setting("dense"), 400, top1=0.9, right_only_here=0, right_only_dense=0),
        Measurement(Setting("ours", 0.9, (1, 3)), 400, top1=0.89, tokens_processed=0.5,
             right_only_here=2, right_only_dense=6),
    )  # fmt: skip
    SweepResult({}, {"source": "images"}, {}, cells).save(tmp_path / "sweep-results/sweep.json")
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    assert len(lines) == 8
    for line in lines:
        command, *arguments = shlex.split(line, comments=True)
        assert command == "simprune-deploy"
        if WITH_DOWNLOADS in line:
            continue
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{line}\n{result.output}"
    made = {path.name for path in tmp_path.iterdir()}
    assert {"report.html", "pareto.svg", "pictures", "accuracy.xml", "accuracy.md"} <= made
