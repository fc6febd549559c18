"""The documentation's examples run, and name only options that exist."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
from places import ROOT
from typer.testing import CliRunner

import simprune_deploy as sd
from simprune_deploy.cli import app

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def python_examples(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(r"<!-- test: python -->\n```python\n(.*?)```", text, re.S)


def test_readme_examples_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    examples = python_examples(ROOT / "README.md")
    assert len(examples) == 2
    names: dict[str, object] = {}
    for example in examples:
        exec(compile(example, "README.md", "exec"), names)
    assert names["result"].verdict.status == "passed"  # type: ignore[attr-defined]
    assert names["bundle"].archive.name == "exported-jetson-orin.tar.gz"  # type: ignore[attr-defined]
    assert names["logits"].shape == (1, 10)  # type: ignore[attr-defined]


def test_the_python_pages_examples_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    examples = python_examples(ROOT / "docs" / "python.md")
    assert len(examples) == 3
    names: dict[str, Any] = {}
    printed = []
    for example in examples:
        exec(compile(example, "python.md", "exec"), names)
        printed.append(capsys.readouterr().out)
    assert "verdict: passed" in printed[0]
    assert "precision: float16, because TensorRT, which builds the engine of" in printed[0]
    assert "vit-jetson-orin.tar.gz" in printed[0]
    assert "of the tokens, top-1" in printed[1]
    assert printed[1].splitlines()[-1] == names["found"].report.status == "passed"
    assert printed[2] == "vit already exists: replace it with force=True, or give output='DIR'\n"


def test_the_exporting_pages_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = python_examples(ROOT / "docs" / "exporting.md")
    exec(compile(example, "exporting.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "interpolation bicubic, crop_pct 0.95, crop_mode center (timm's default" in printed
    assert "'token', timm's default for test_vit, assumed" in printed


def test_the_tools_pages_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    (example,) = python_examples(ROOT / "docs" / "tools.md")
    exec(compile(example, "tools.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("beside model.onnx: largest output difference 0.00e+00")
    assert printed[1].startswith("6 attentions in one node each")
    assert printed[2] == "passed"


def test_the_python_page_has_the_whole_interface() -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    for name in sd.__all__:
        value = getattr(sd, name)
        if inspect.isfunction(value):
            assert f"`sd.{name}(" in page, name
        elif isinstance(value, type) and issubclass(value, sd.SimpruneError):
            assert name in page


def all_options() -> dict[str, set[str]]:
    """The options of every command, by its name: "export", "plugin build"."""
    options = {}
    waiting = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    while waiting:
        name, command = waiting.popitem()
        if hasattr(command, "commands"):
            waiting |= {f"{name} {inner}": each for inner, each in command.commands.items()}
            continue
        flags = {flag for p in command.params for flag in (*p.opts, *p.secondary_opts)}
        options[name] = {flag for flag in flags if flag.startswith("-")}
    return options


def commands_in(page: Path) -> list[str]:
    blocks = re.findall(r"```(?:bash)?\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    return [line for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_only_commands_and_options_that_exist(page: Path) -> None:
    options = all_options()
    for line in commands_in(page):
        match = re.match(r"(?:\$ )?simprune-deploy ((?:plugin )?[a-z]+)(.*)", line)
        if match:
            command, rest = match.groups()
            assert command in options, line
            used = set(re.findall(r"(?<!\S)(--[a-z-]+)", rest.split("#")[0]))
            assert used <= options[command], line


def test_help_shows_the_defaults_that_it_tells() -> None:
    said = CliRunner().invoke(app, ["export", "--help"]).stdout
    said = " ".join(said.replace("│", " ").split())  # the table breaks lines
    for default in ("0.85", "auto", "pairs", "merge", "dynamic", "1..8"):
        assert f"[default: {default}]" in said


def test_every_option_is_documented() -> None:
    """The page is what Typer makes of the commands: `make docs` writes it again."""
    page = ROOT / "docs" / "options.md"
    text = page.read_text(encoding="utf-8")
    command = [sys.executable, "-m", "typer", "simprune_deploy.cli", "utils", "docs"]
    command += ["--name", "simprune-deploy", "--title", "Every command and option"]
    made = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert made.stdout.strip() == text.strip(), "run `make docs`"
    assert {"export", "plugin build", "plugin info"} <= all_options().keys()
    for name, flags in all_options().items():
        heading = f"# `simprune-deploy {name}`\n"
        assert heading in text
        section = text.split(heading)[1].split("\n## ")[0].split("\n### ")[0]
        for flag in flags:
            assert re.search(rf"[`, /]{flag}[ `,]", section), f"{name} {flag}"


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_sources_that_pages_name_exist() -> None:
    named = re.compile(
        r"(?:simprune_deploy|tests|benchmarks|experiments|examples|tools)/[\w/]+\.(?:py|cpp|json)\b"
    )
    pages = [*PAGES, ROOT / "plugins" / "README.md", *(ROOT / "examples").rglob("README.md")]
    found = [(page.name, path) for page in pages for path in named.findall(page.read_text("utf-8"))]
    assert len(found) > 20
    for page, path in found:
        assert (ROOT / path).exists(), f"{page}: {path}"
