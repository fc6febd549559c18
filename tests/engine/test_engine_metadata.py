"""The metadata beside an engine: what is refused, and in which words."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from driver_double import driver
from made_up_engine import metadata_of

from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.common.files import write_json
from simprune_deploy.common.versions import same_version
from simprune_deploy.engine import gpu
from simprune_deploy.engine.compatibility import Here, check_fits, misfit
from simprune_deploy.engine.engine_metadata import metadata_path, read_engine_metadata

ORIN = Here("tensorrt", "10.3.0", (8, 7), "12.6", "b" * 64)


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """Return an engine file with its metadata; its bytes are not looked at by anyone here."""
    path = tmp_path / "model.engine"
    path.write_bytes(b"an engine's bytes")
    write_json(metadata_path(path), metadata_of(path).to_dict())
    return path


def test_what_was_written_is_read_again(engine: Path) -> None:
    assert read_engine_metadata(engine) == metadata_of(engine)


def test_an_engine_may_be_renamed_with_its_metadata(engine: Path) -> None:
    metadata_path(engine).rename(engine.with_name("other.engine.json"))
    assert (
        read_engine_metadata(engine.rename(engine.with_name("other.engine"))).engine.file
        == engine.name
    )


class TestRefused:
    def refused(self, engine: Path, says: str) -> None:
        with pytest.raises(SimpruneError, match=says) as raised:
            read_engine_metadata(engine)
        assert "\n" not in str(raised.value)

    def test_no_engine(self, engine: Path) -> None:
        engine.unlink()
        self.refused(engine, "model.engine does not exist: `simprune-deploy build`")

    def test_no_metadata(self, engine: Path) -> None:
        metadata_path(engine).unlink()
        self.refused(engine, "json is missing: .*build it again")

    def test_a_changed_engine(self, engine: Path) -> None:
        engine.write_bytes(b"An engine's bytes")
        self.refused(engine, "is not the engine that was built: its SHA-256 differs")
        assert read_engine_metadata(engine, check_hash=False).precision == "fp16"

    @pytest.mark.parametrize(
        ("number", "says"),
        [
            (4, "has format 4, .* update simprune-deploy"),
            (2, "built before version 2 of the operator: export the model again, and build"),
        ],
    )
    def test_another_format(self, engine: Path, number: int, says: str) -> None:
        metadata_path(engine).write_text(json.dumps({"format": number}), encoding="utf-8")
        self.refused(engine, says)

    @pytest.mark.parametrize(
        "text", ["", "[1", "[]", "null", '{"format": 3}', '{"format": "x"}', "[" * 100_000]
    )
    def test_no_json_of_ours(self, engine: Path, text: str) -> None:
        metadata_path(engine).write_text(text, encoding="utf-8")
        self.refused(engine, "is damaged")

    def test_not_text(self, engine: Path) -> None:
        metadata_path(engine).write_bytes(b"\xff\xfe")
        self.refused(engine, "is damaged")

    def test_too_large(self, engine: Path) -> None:
        metadata_path(engine).write_text(" " * (2 << 20), encoding="utf-8")
        self.refused(engine, "is damaged .*2097152 bytes")

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("flavour", "tensorflow"),
            ("of", "nothing"),
            ("version", "10\n3"),
            ("gpu", "\x1b[31m"),
            ("status", None),
            ("compute_capabilities", []),
            ("compute_capabilities", ["8"]),
            ("compute_capabilities", 5),
            ("targets", [7]),
            ("onnx", None),
            ("onnx", {"file": "../model.onnx", "bytes": 1, "sha256": "0"}),
            ("onnx", {"file": "model.onnx"}),
            ("plugin", "libsimprune_plugin.so"),
            ("profile", {"images": {"min": [1]}}),
            ("profile", {"images": {"min": [-1], "opt": [1], "max": [1]}}),
            ("profile", None),
            ("profile", {}),
            ("profile", {"images": {"min": [1], "opt": [1], "max": [1]}, "\x1b[2J": {}}),
            ("cuda", "twelve"),
            ("versions", {"polygraphy": "\x1b[2J"}),
            ("versions", 5),
            ("workspace_mib", "64"),
            ("prune_layers", -1),
            ("plugin_layers", None),
            ("plugin_layers", True),
            ("seconds", None),
        ],
    )
    def test_a_value_of_the_wrong_kind(self, engine: Path, name: str, value: Any) -> None:
        values = {**metadata_of(engine).to_dict(), name: value}
        metadata_path(engine).write_text(json.dumps(values), encoding="utf-8")
        self.refused(engine, "is damaged")


class TestFits:
    def test_the_machine_it_was_built_on(self, engine: Path) -> None:
        check_fits(read_engine_metadata(engine), ORIN)

    def test_the_sentence(self, engine: Path) -> None:
        thor = Here("tensorrt", "11.4.1", (11, 0), "13.2", "b" * 64)
        with pytest.raises(SimpruneError) as raised:
            check_fits(read_engine_metadata(engine), thor)
        assert str(raised.value) == (
            "model.engine was built for SM 8.7 with TensorRT 10.3.0; this is SM 11.0 with 11.4.1: "
            "run `simprune-deploy build FOLDER`"
        )

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"compute_capability": (8, 6)}, "this is SM 8.6 with 10.3.0"),
            ({"version": "10.4.0"}, "this is SM 8.7 with 10.4.0"),
            ({"version": None}, "TensorRT is not installed here"),
            ({"compute_capability": None}, "no GPU was found here"),
            ({"flavour": "tensorrt-rtx"}, "and TensorRT-RTX cannot load it"),
            ({"cuda": "11.8"}, "and CUDA 12.6; this driver knows CUDA 11.8"),
            ({"plugin": None}, "no library was found: name it"),
            ({"plugin": "c" * 64}, "built with another libsimprune_plugin.so"),
        ],
    )
    def test_another_machine(self, engine: Path, changes: dict[str, Any], says: str) -> None:
        problem = misfit(read_engine_metadata(engine), dataclasses.replace(ORIN, **changes))
        assert problem is not None
        assert says in problem

    def test_what_does_not_matter(self, engine: Path) -> None:
        metadata = read_engine_metadata(engine)
        assert misfit(metadata, dataclasses.replace(ORIN, cuda="13.0")) is None
        assert misfit(metadata, dataclasses.replace(ORIN, version="10.3.0.30")) is None
        bare = dataclasses.replace(metadata, plugin=None)
        assert misfit(bare, dataclasses.replace(ORIN, plugin="c" * 64)) is None

    def test_a_portable_engine_fits_all_its_gpus(self, engine: Path) -> None:
        metadata = metadata_of(
            engine,
            flavour="tensorrt-rtx",
            version="1.7.1",
            compute_capabilities=("8.9", "12.1"),
            targets=("rtx-ada", "dgx-spark"),
            plugin=None,
            gpu=None,
            cuda=None,
        )
        here = Here("tensorrt-rtx", "1.7.1", (12, 1), "13.0")
        assert misfit(metadata, here) is None
        problem = misfit(metadata, dataclasses.replace(here, compute_capability=(12, 0)))
        assert problem is not None
        assert problem.endswith("run `simprune-deploy build FOLDER --target rtx-ada,dgx-spark`")

    @pytest.mark.parametrize(
        ("one", "other", "same"),
        [
            ("10.3.0", "10.3.0.30", True),
            ("10.3.0.26", "10.3.0.30", False),
            ("10.3.0", "10.13.0", False),
        ],
    )
    def test_versions(self, one: str, other: str, same: bool) -> None:
        assert same_version(one, other) is same


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "DRIVER", "libno-such-driver.so.1")
    with pytest.raises(gpu.NoGpuError, match=r"^no GPU was found: .*not installed here$"):
        gpu.find_gpu()


@pytest.mark.parametrize("code", [0, 100, 4])
def test_what_a_driver_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(gpu, "DRIVER", str(driver(tmp_path, (8, 7), code, 12060)))
    if code == 0:
        assert gpu.find_gpu() == gpu.Gpu("GPU double", (8, 7), "12.6", 7 << 30)
        return
    said = {100: "CUDA_ERROR_NO_DEVICE", 4: "error 4"}[code]
    with pytest.raises(gpu.NoGpuError, match=f"^no GPU was found: the driver says {said}$"):
        gpu.find_gpu()
