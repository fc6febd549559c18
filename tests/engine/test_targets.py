"""The targets file, the names `--target` takes, and the command that prints them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import resources
from typing import Any

import pytest
from typer.testing import CliRunner

from simprune_deploy.cli import app
from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.common.versions import version_numbers
from simprune_deploy.engine.targets import (
    FACTS,
    HERE,
    ON_DEVICE,
    find_targets,
    load_targets,
    short_names,
)

RAW = json.loads(
    resources.files("simprune_deploy.engine").joinpath("targets.json").read_text(encoding="utf-8")
)
TARGETS = load_targets().targets
every_target = pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)


def test_every_kind_of_edge_gpu_is_there() -> None:
    names = {target.name for target in TARGETS}
    assert names >= {
        *("jetson-orin-nano", "jetson-orin-nx", "jetson-agx-orin", "jetson-agx-thor"),
        *("igx-orin", "igx-thor", "dgx-spark", "rtx-ampere", "rtx-ada", "rtx-blackwell"),
    }


@every_target
def test_a_fact_has_a_source_or_is_unknown(target) -> None:
    assert tuple(target.facts) == FACTS
    for name, fact in target.facts.items():
        assert (fact.value is None) == (not fact.sources), name
        assert fact.value is None or fact.value, name


@every_target
def test_values_are_of_their_kind(target) -> None:
    facts = target.facts
    assert facts["build"].value in (HERE, ON_DEVICE)
    assert facts["flavour"].value in ("tensorrt", "tensorrt-rtx")
    capability = facts["compute_capability"].value
    assert capability is None or re.fullmatch(r"\d+\.\d", capability)
    assert facts["cpu"].value in ("x86_64", "aarch64")
    assert set(facts["precisions"].value or []) <= {"fp32", "fp16", "bf16"}
    assert target.title
    assert all(note.endswith(".") for note in target.notes)


@every_target
def test_what_is_built_here_is_of_tensorrt_rtx_and_has_a_capability(target) -> None:
    assert target.built_here == (target.facts["flavour"].value == "tensorrt-rtx")
    if target.built_here:
        assert target.compute_capability is not None


def test_sources_are_documents_and_all_are_used() -> None:
    stated: list[Any] = []
    for entry in RAW["targets"]:
        stated += [*entry["facts"].values(), *entry.get("releases", ())]
    used = {source for each in stated for source in each["source"]}
    assert used == set(RAW["sources"])
    for text in RAW["sources"].values():
        assert ", " in text or text.startswith("tried here: ")
        assert "://" not in text
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", RAW["checked"])


@every_target
def test_releases_are_what_the_facts_say(target) -> None:
    assert target.built_here <= (not target.releases)
    for release in target.releases:
        assert release.system in str(target.facts["system"])
        assert release.cuda is None or f"(CUDA {release.cuda})" in str(target.facts["system"])
        assert release.sources
        if release.tensorrt:
            said = f"{release.tensorrt} ({release.system})"
            assert said in str(target.facts["tensorrt"])
            assert release.oldest_tensorrt is not None
    versions = [release.oldest_tensorrt for release in target.releases if release.tensorrt]
    assert versions == sorted(versions)


def test_what_each_jetpack_carries() -> None:
    known = {
        (target.name, release.system): (release.cuda, release.tensorrt)
        for target in TARGETS
        for release in target.releases
    }
    for name in ("jetson-orin-nano", "jetson-orin-nx", "jetson-agx-orin"):
        assert known[name, "JetPack 6.1 or 6.2"] == ("12.6", "10.3")
        assert known[name, "JetPack 7.2"] == ("13.2", "10.16.2")
    assert known["jetson-agx-thor", "JetPack 7.1"] == ("13.0", "10.13")


def test_versions_are_read_from_texts() -> None:
    assert version_numbers("10.16 or later") == (10, 16)
    with pytest.raises(ValueError, match="is no version"):
        version_numbers("latest")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("orin-nano,orin-nx,agx-orin", ["jetson-orin"]),
        ("jetson-thor,jetson-orin", ["jetson-orin", "jetson-agx-thor"]),
        ("orin-nano", ["jetson-orin-nano"]),
        ("rtx,igx-thor", ["rtx", "igx-thor"]),
    ],
)
def test_short_names(text: str, names: list[str]) -> None:
    assert short_names(find_targets(text)) == names


def test_names_aliases_and_groups_are_distinct() -> None:
    names = [target.name for target in TARGETS]
    names += [alias for target in TARGETS for alias in target.aliases]
    names += list(load_targets().groups)
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in names)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("rtx-ada", ["rtx-ada"]),
        ("rtx-ada,dgx-spark", ["rtx-ada", "dgx-spark"]),
        (" RTX-Ada , gb10 ", ["rtx-ada", "dgx-spark"]),
        ("ada,rtx-ada,ada", ["rtx-ada"]),
        ("rtx", ["rtx-ampere", "rtx-ada", "rtx-blackwell"]),
        ("blackwell,rtx", ["rtx-blackwell", "rtx-ampere", "rtx-ada"]),
        ("jetson-orin", ["jetson-orin-nano", "jetson-orin-nx", "jetson-agx-orin"]),
    ],
)
def test_lists_aliases_and_groups_are_resolved(text: str, found: list[str]) -> None:
    assert [target.name for target in find_targets(text)] == found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rtx-adda", "did you mean rtx-ada"),
        ("jetson-agx-orinn", "did you mean jetson-agx-orin"),
        ("rtx-ada,xyzzy", "unknown target 'xyzzy': `simprune-deploy targets` lists"),
        ("rtx-ada,,gb10", "has an empty name"),
        ("", "is empty"),
        (" , ", "is empty"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(text: str, says: str) -> None:
    with pytest.raises(SimpruneError, match=re.escape(says)):
        find_targets(text)


def test_facts_that_decide_something() -> None:
    capabilities = {target.name: target.compute_capability for target in TARGETS}
    assert capabilities["jetson-orin-nano"] == (8, 7)
    assert capabilities["jetson-agx-thor"] == (11, 0)
    assert capabilities["dgx-spark"] == (12, 1)
    assert capabilities["igx-orin"] is None
    assert str(next(t for t in TARGETS if t.name == "igx-orin").facts["memory"]) == "unknown"


def test_the_table_names_every_target_source_and_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    result = CliRunner().invoke(app, ["targets"])
    assert result.exit_code == 0, result.output
    for target in TARGETS:
        assert f"{target.name} " in result.output
        for note in target.notes:
            assert note in result.output
        for fact in target.facts.values():
            assert str(fact) in result.output
            assert all(source in result.output for source in fact.sources)
    assert "rtx stands for rtx-ampere, rtx-ada, rtx-blackwell." in result.output


def test_json_is_json_and_nothing_else() -> None:
    result = CliRunner().invoke(app, ["targets", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == load_targets().to_dict()
    assert result.stderr == ""


def test_a_wrong_option_is_one_line_and_exit_code_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "simprune_deploy", "targets", "--jsn"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["targets", "--json"], ["targets", "--help"]])
def test_the_command_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom simprune_deploy.cli import app\n"
        f"app({arguments!r}, standalone_mode=False)\n"
        "heavy = {'torch', 'timm', 'onnx', 'numpy', 'polygraphy', 'tensorrt_rtx', 'onnxruntime'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
