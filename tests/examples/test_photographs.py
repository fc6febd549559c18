"""The table of photographs, and how they are taken out of packages; nothing is downloaded."""

from __future__ import annotations

import hashlib
import importlib
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from places import ROOT

import simprune_deploy as sd


@pytest.fixture
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        yield importlib.import_module("real_weights")
    finally:
        sys.path.remove(str(ROOT / "examples"))
        sys.modules.pop("real_weights", None)


def test_every_photograph_is_pinned_once(script: ModuleType) -> None:
    rows = script.listed_photographs("all")
    assert len(rows) == 66
    for key in ("name", "path", "sha256"):
        assert len({row[key] for row in rows}) == 66
    assert all(re.fullmatch(r"[0-9a-f]{64}", row["sha256"]) and row["license"] for row in rows)
    imagenet = script.listed_photographs("imagenet")
    assert {row["package"] for row in imagenet} == {"foolbox==3.3.4"}
    assert len(imagenet) == 20


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="dpkg-deb is Debian's")
def test_photographs_come_out_of_wheels_and_debian_packages(
    script: ModuleType, tmp_path: Path
) -> None:
    with zipfile.ZipFile(tmp_path / "a_wheel-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("a/one.jpg", b"one")
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        "Package: some\nVersion: 1\nArchitecture: all\nMaintainer: nobody\nDescription: none\n"
    )
    (tree / "usr").mkdir()
    (tree / "usr" / "two.jpg").write_bytes(b"two")
    script.subprocess.run(
        ["dpkg-deb", "--build", str(tree), str(tmp_path / "some_1_all.deb")],
        check=True,
        capture_output=True,
    )
    rows = [
        {"name": name, "package": package, "path": path, "sha256": hashlib.sha256(what).hexdigest()}
        for name, package, path, what in (
            ("one.jpg", "a-wheel==1.0", "a/one.jpg", b"one"),
            ("two.jpg", "some", "usr/two.jpg", b"two"),
        )
    ]
    assert script.read_photographs(rows, tmp_path) == {"one.jpg": b"one", "two.jpg": b"two"}
    other = [{**rows[0], "sha256": "0" * 64}]
    with pytest.raises(sd.SimpruneError, match=r"a/one\.jpg of a-wheel==1\.0 has SHA-256 "):
        script.read_photographs(other, tmp_path)
    with pytest.raises(sd.SimpruneError, match=r"usr/three\.jpg of some cannot be read"):
        script.read_photographs([{**rows[1], "path": "usr/three.jpg"}], tmp_path)
