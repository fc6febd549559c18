"""The Dockerfiles, as far as can be told without a Docker engine: none runs here.

They are linted; every file, stage, extra and command that they name exists; and the steps of the
stage that needs no NVIDIA image are run, in a folder that holds what .dockerignore lets through.
"""

from __future__ import annotations

import fnmatch
import io
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from dockerfile_parse import DockerfileParser
from places import ROOT
from test_docs import all_options

FILES = ["Dockerfile", "docker/Dockerfile.jetson"]
every_file = pytest.mark.parametrize("name", FILES)


def steps(name: str) -> list[tuple[str, str]]:
    """Return a Dockerfile's instructions and their values, continued lines joined."""
    parser = DockerfileParser(fileobj=io.BytesIO((ROOT / name).read_bytes()))
    found = [(each["instruction"], each["value"]) for each in parser.structure]
    return [each for each in found if each[0] != "COMMENT"]


def stages(name: str) -> dict[str, list[tuple[str, str]]]:
    """Return the instructions of every stage, FROM first."""
    result: dict[str, list[tuple[str, str]]] = {}
    for instruction, value in steps(name):
        if instruction == "FROM":
            current = result.setdefault(value.split()[-1], [])
        elif not result:
            continue  # ARG before the first FROM
        current.append((instruction, value))
    return result


def let_through(path: str) -> bool:
    """Return whether .dockerignore lets a file into a build: its last matching line decides."""
    allowed = True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        wanted = pattern.startswith("!")
        parts = path.split("/")
        # a pattern that matches a folder holds for all that is in it
        above = ["/".join(parts[: i + 1]) for i in range(len(parts))]
        pattern = pattern.lstrip("!")
        tails = [tail for each in above for tail in (each, each.rpartition("/")[2])]
        matches = (
            any(fnmatch.fnmatchcase(tail, pattern[3:]) for tail in tails)
            if pattern.startswith("**/")
            else any(each.count("/") == pattern.count("/") and fnmatch.fnmatchcase(each, pattern)
                     for each in above)
        )  # fmt: skip
        if matches:
            allowed = wanted
    return allowed


def tracked() -> list[str]:
    """Return the files of the tree, as git knows them."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


@every_file
def test_lint(name: str) -> None:
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, ROOT / name], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_lint_finds_something(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM python\nRUN cd /tmp && pip install numpy\n")
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, bad], capture_output=True, text=True)
    assert done.returncode == 1
    assert "DL3006" in done.stdout


@every_file
def test_images_are_pinned_and_stages_exist(name: str) -> None:
    defaults = {}
    known: list[str] = []
    for instruction, value in steps(name):
        if instruction == "ARG":
            key, _, default = value.partition("=")
            assert default, f"{key} has no default"
            if not known:
                defaults[key] = default
        if instruction == "FROM":
            image, separator, stage = value.partition(" AS ")
            assert separator
            used = re.fullmatch(r"\$\{(\w+)\}", image)
            if used:
                assert re.search(r":[\w.-]*\d[\w.-]*$", defaults[used[1]]), "no version"
            else:
                assert image in known
            known.append(stage)
        source = re.match(r"--from=(\S+) ", value)
        if instruction == "COPY" and source:
            assert source[1] in known[:-1]


@every_file
def test_what_is_copied_is_there_and_not_ignored(name: str) -> None:
    files = tracked()
    copied = [value for instruction, value in steps(name) if instruction == "COPY"]
    assert len(copied) > 4
    for value in copied:
        if value.startswith("--from="):
            continue
        for source in value.split()[:-1]:
            inside = [each for each in files if each == source or each.startswith(f"{source}/")]
            assert inside, f"{source} is not in the tree"
            assert any(let_through(each) for each in inside), f"{source} is ignored"
            if (ROOT / source).is_file():
                assert let_through(source)


def test_a_build_gets_nothing_but_the_project() -> None:
    through = {each for each in tracked() if let_through(each)}
    for name in ("simprune_deploy/py.typed", "plugins/src/tensorrt_plugin.cpp", "constraints.txt"):
        assert name in through
    tops = {name.split("/")[0] for name in through}
    assert tops == {
        "LICENSE", "README.md", "constraints.txt", "docker", "plugins", "pyproject.toml",
        "simprune_deploy",
    }  # fmt: skip
    for name in (
        ".git/config", ".env", "plugins/tests/headers.txt", "tests/docs/test_docker.py",
        "build/x.so",
        "simprune_deploy/__pycache__/a.pyc", "model.pt", ".venv/bin/python", "docker/secret",
    ):  # fmt: skip
        assert not let_through(name), name


@every_file
def test_commands_exist(name: str) -> None:
    options = all_options()
    named = []
    for instruction, value in steps(name):
        if instruction == "RUN":
            named += re.findall(r"simprune-deploy ((?:plugin )?[a-z]+)([^&\n]*)", value)
        if instruction == "CMD":
            named.append((re.fullmatch(r'\["(\w+)"\]', value)[1], ""))  # type: ignore[index]
    assert {command for command, _ in named} == {"doctor", "plugin build"}
    for command, rest in named:
        assert set(re.findall(r"(?<!\S)(--[a-z-]+)", rest)) <= options[command]


@every_file
def test_packages_are_installed_as_pinned(name: str) -> None:
    runs = [value for instruction, value in steps(name) if instruction == "RUN"]
    installs = [each for value in runs for each in re.findall(r"pip install [^&]*", value)]
    assert len(installs) > 2
    for install in installs:
        # our wheel alone, or one package whose version is a build argument
        exempt = "--no-deps" in install or "${" in install
        assert exempt or "constraints.txt" in install, install


@every_file
def test_what_runs_is_not_root_and_holds_no_secret(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(r"(?i)password|token|secret|\.netrc|api_?key", text)
    every = stages(name)
    assert not any(instruction == "ADD" for instruction, _ in steps(name))
    for stage in {"cpu", "export", "runtime"} & set(every):
        users = [value for instruction, value in every[stage] if instruction == "USER"]
        assert users == ["10001:10001"], stage
        after = every[stage][[i for i, _ in every[stage]].index("USER") + 1 :]
        assert not any(instruction in ("RUN", "COPY") for instruction, _ in after)


def test_jetson_names_what_the_project_requires() -> None:
    """Its Python (3.10) cannot read pyproject.toml by itself, so the list is written out."""
    text = (ROOT / "docker" / "Dockerfile.jetson").read_text(encoding="utf-8")
    block = text.split("constraints.txt \\\n")[1].split("&&")[0]
    listed = set(block.replace("\\", "").split()) - {"cmake"}
    assert listed == {re.split(r"[<>=]", each)[0] for each in printed_requirements("cpu")}


def printed_requirements(*extras: str) -> list[str]:
    if sys.version_info < (3, 11):
        pytest.skip("the images' Python is 3.12; tomllib begins with 3.11")
    command = [sys.executable, str(ROOT / "docker" / "requirements.py"), *extras]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_requirements() -> None:
    assert any(each.startswith("torch>=") for each in printed_requirements("export"))
    assert not any(each.startswith("torch") for each in printed_requirements("cpu"))
    with pytest.raises(subprocess.CalledProcessError) as caught:
        printed_requirements("cpu", "gpus")
    assert caught.value.stderr == "error: pyproject.toml has no extra gpus\n"


def test_the_wheel_stage_runs(tmp_path: Path) -> None:
    """Its RUN steps are run as they stand, in other folders, by this Python."""
    printed_requirements()  # skips where the image's Python has more than this one
    context = tmp_path / "src"
    for each in filter(let_through, tracked()):
        (context / each).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / each, context / each)
    commands = [value for each, value in stages("Dockerfile")["wheel"] if each == "RUN"]
    assert len(commands) == 2
    dist = tmp_path / "dist"
    environment: dict[str, Any] = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    for command in commands:
        done = subprocess.run(
            ["sh", "-ec", command.replace("/dist", str(dist))],
            cwd=context,
            env={**environment, "HOME": str(tmp_path), "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    for listed in ("cpu.txt", "export.txt", "gpu.txt", "plain.txt"):
        assert "onnx>=" in (dist / listed).read_text()
    (wheel,) = dist.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "simprune_deploy/cli/__init__.py",
        "simprune_deploy/engine/plugin/source/CMakeLists.txt",
        "simprune_deploy/engine/plugin/source/src/tensorrt_register.cpp",
        "simprune_deploy/engine/targets.json",
    ):
        assert name in names
    assert not any("source/tests/" in name for name in names)
    # and what is in it starts, beside the packages of this environment
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    for arguments in (["--version"], ["plugin", "build", "--help"]):
        done = subprocess.run(
            [sys.executable, "-m", "simprune_deploy", *arguments],
            cwd=tmp_path,
            env={**environment, "PYTHONPATH": str(installed)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
