"""The CI examples run, as they stand there, on the demo's data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from places import ROOT

EXAMPLES = ROOT / "examples" / "ci"
IMAGES = 400
"""Of 3,000, for the time they take; fewer than 381 cannot show a drop of at most 1 %."""


def read(name: str) -> dict[Any, Any]:
    return dict(yaml.safe_load((EXAMPLES / name).read_text(encoding="utf-8")))


def commands(scripts: list[str]) -> list[str]:
    """Every call of simprune-deploy in shell scripts."""
    lines = [line.strip() for script in scripts for line in script.splitlines()]
    return [line for line in lines if line.startswith("simprune-deploy ")]


def github_steps() -> dict[str, str]:
    """The GitHub workflow's scripts by the names of their steps."""
    steps = read("github-actions.yml")["jobs"]["accuracy"]["steps"]
    return {step["name"]: step["run"] for step in steps if "run" in step}


@pytest.fixture
def shell(tmp_path: Path) -> Any:
    """Return what runs a script as a CI server does: stop at the first error, its variables set."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    program = tmp_path / "bin" / "simprune-deploy"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m simprune_deploy "$@"\n')
    program.chmod(0o755)
    variables = read("github-actions.yml")["env"]
    environment = {
        **os.environ,
        **variables,
        "IMAGES": str(IMAGES),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
    }

    def run(script: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", script],
            cwd=tmp_path,
            env={**environment, **more},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def test_the_github_workflow_runs(shell: Any, tmp_path: Path) -> None:
    steps = github_steps()
    for name in ("Export and verify", "Compare with the dense model"):
        done = shell(steps[name])
        assert done.returncode == 0, done.stdout + done.stderr
    assert "accuracy check: passed" in done.stdout
    assert ElementTree.parse(tmp_path / "accuracy.xml").getroot().get("failures") == "0"
    first = shell(steps["Compare with main's last answers"])
    assert "nothing was compared" in first.stdout
    stored = shell(steps["Store main's answers"])
    assert "saved accuracy-baseline.json" in stored.stdout, stored.stderr
    again = shell(steps["Compare with main's last answers"])
    assert again.returncode == 0, again.stdout + again.stderr
    assert "accuracy check: passed" in again.stdout
    assert shell(steps["Summary"]).returncode == 0
    summary = (tmp_path / "summary.md").read_text()
    assert summary.count("### Accuracy check: passed") == 2

    # what the workflow is for: had main been right on every image, this model would be stopped
    baseline = tmp_path / "accuracy-baseline.json"
    values = json.loads(baseline.read_text())
    with np.load(ROOT / "examples" / "fashion_mnist" / "test_slice.npz") as data:
        values["winners"] = data["labels"][np.arange(IMAGES) * 3000 // IMAGES].tolist()
    baseline.write_text(json.dumps(values))
    stopped = shell(steps["Compare with main's last answers"])
    assert stopped.returncode == 1, stopped.stdout + stopped.stderr
    assert "accuracy check: failed" in stopped.stdout


def test_the_gitlab_job_runs_the_same_commands() -> None:
    job = read("gitlab-ci.yml")["accuracy"]
    ours, theirs = commands(job["script"]), commands(list(github_steps().values()))
    assert len(ours) == 4
    assert sorted(ours) == sorted(theirs)
    workflow = read("github-actions.yml")
    assert job["variables"] == workflow["env"]
    assert job["before_script"] == [github_steps()["Install"]]
    junit = job["artifacts"]["reports"]["junit"]
    assert junit == ["accuracy.xml", "baseline.xml"]
    for script in job["script"]:
        subprocess.run(["bash", "-n", "-c", script], check=True)


@pytest.mark.parametrize("name", ["github-actions.yml", "gitlab-ci.yml"])
def test_every_file_that_is_published_is_written(name: str) -> None:
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    for file in ("accuracy.xml", "accuracy.md", "baseline.xml", "baseline.md"):
        assert text.count(file) >= 2
