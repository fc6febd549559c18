"""The documentation's examples run, and name only options that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main
from places import ROOT
from typer.testing import CliRunner

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
    assert names["logits"].shape == (1, 10)  # type: ignore[attr-defined]


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
    for default in ("0.85", "auto", "cover", "merge", "dynamic", "1..8"):
        assert f"[default: {default}]" in said


def test_every_option_is_documented() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert {"export", "plugin build", "plugin info"} <= all_options().keys()
    for command, flags in all_options().items():
        assert f"\n## {command}\n" in text
        section = text.split(f"\n## {command}\n")[1].split("\n## ")[0]
        for flag in flags:
            assert f"`{flag}" in section or f" {flag}`" in section or f"{flag}" in section, flag


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
