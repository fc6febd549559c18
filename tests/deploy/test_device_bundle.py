"""Bundles for devices: made from a verified export, unpacked in a clean place, every claim checked.

What needs no GPU of a bundle's README is run as it stands there, with its own wheel, without torch.
"""

from __future__ import annotations

import dataclasses
import errno
import gzip
import json
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
import pytest
from made_up_library import FACTS, elf, fatbin
from places import ROOT
from plugin_build import PLUGINS
from typer.testing import CliRunner
from wheel.wheelfile import WheelFile

import simprune_deploy as sd
from simprune_deploy.cli import app
from simprune_deploy.common.errors import RequirementError
from simprune_deploy.common.files import sha256
from simprune_deploy.deploy.bundle import library, own_wheel, texts
from simprune_deploy.deploy.bundle import packing as device_bundle
from simprune_deploy.deploy.bundle.packing import DeviceBundle, make_bundle
from simprune_deploy.engine import libraries
from simprune_deploy.engine.plugin.build import source_files
from simprune_deploy.engine.targets import Release, find_targets
from simprune_deploy.onnx.exported_folder import read_manifest
from simprune_deploy.onnx.metadata import read_metadata, write_metadata
from simprune_deploy.onnx.variants import prune_nodes, with_function
from simprune_deploy.parity import golden
from simprune_deploy.pruning.kernel_library import read_info

DEMO = ROOT / "examples" / "fashion_mnist" / "vit"
ORIN = "jetson-orin"
WHEEL = f"simprune_deploy-{sd.__version__}-py3-none-any.whl"
PREBUILT = "plugin/prebuilt/libsimprune_plugin.so"


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of two photographs: enough to verify an export, and quick."""
    folder = tmp_path_factory.mktemp("pictures")
    for picture in sorted(Path(sd.__file__).parent.glob("sample_images/*.jpg"))[:2]:
        shutil.copy(picture, folder)
    return folder


@pytest.fixture(scope="session")
def exported(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a verified export of the demo model. It is not to be changed."""
    folder = tmp_path_factory.mktemp("bundles") / "demo"
    pruned = sd.prune(sd.load(str(DEMO)), threshold=0.9, layers=[1, 3])
    assert sd.export(pruned, folder, images=pictures).verdict.status == "passed"  # type: ignore[union-attr]
    return folder


@pytest.fixture(scope="session")
def made(exported: Path) -> DeviceBundle:
    """Return a bundle for the three Orins, as source. It is not to be changed."""
    return make_bundle(exported, find_targets(ORIN))


@pytest.fixture(scope="session")
def unpacked(made: DeviceBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bundle unpacked by tar in a clean folder. It is not to be changed."""
    place = tmp_path_factory.mktemp("device")
    subprocess.run(["tar", "-xzf", str(made.archive)], cwd=place, check=True)
    return place / "demo-jetson-orin"


@pytest.fixture(scope="session")
def unverified(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what `export --no-verify --target` says in JSON of a bundle for two devices."""
    output = tmp_path_factory.mktemp("unverified") / "vit"
    call = ("export", DEMO, "--layers", "1", "-o", output, "--no-verify")
    code, out, err = run(*call, "--target", "jetson-thor,orin-nx", "--json")
    assert (code, err) == (0, "")
    return dict(json.loads(out))


@pytest.fixture
def folder(unpacked: Path, tmp_path: Path) -> Path:
    """Return a copy of the bundle, to harm."""
    return Path(shutil.copytree(unpacked, tmp_path / "bundle"))


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": "300"})
    return result.exit_code, result.stdout, result.stderr


def refusal(*arguments: object) -> str:
    code, out, err = run(*arguments)
    assert (code, out) == (2, ""), err
    (line,) = err.splitlines()
    return line.removeprefix("error: ")


def a_library(path: Path, machine: int = 183, sms: str = "87,110", **metadata: Any) -> Path:
    """A library of ours for a machine that is not at hand."""
    given = {**FACTS, "version": sd.__version__, "architectures": sms, **metadata}
    code = fatbin(*((2, int(sm), 0) for sm in sms.split(",")))
    path.write_bytes(elf(machine, given, code))
    return path


class TestClaims:
    """Each claim of the manifest, held against the files."""

    def test_the_manifest_names_every_file_with_its_hash(self, unpacked: Path) -> None:
        files = read_manifest(unpacked)["files"]
        assert names_in(unpacked) == {*files, "manifest.json"}
        for name, entry in files.items():
            path = unpacked / name
            assert entry == {"bytes": path.stat().st_size, "sha256": sha256(path)}
        assert {"model.onnx", "model-plugin.onnx", "golden.npz", "parity.json", WHEEL} <= {*files}

    def test_archive_and_folder_are_the_same(self, made: DeviceBundle, unpacked: Path) -> None:
        assert made.folder.name == "demo-jetson-orin"
        assert made.archive.name == "demo-jetson-orin.tar.gz"
        assert names_in(made.folder) == names_in(unpacked)
        for name in names_in(unpacked):
            assert (made.folder / name).read_bytes() == (unpacked / name).read_bytes()
            assert os.access(unpacked / name, os.X_OK) == name.endswith(".sh")

    def test_what_was_exported_is_there_unchanged(self, exported: Path, unpacked: Path) -> None:
        before, after = read_manifest(exported), read_manifest(unpacked)
        for name in before["files"]:
            assert (exported / name).read_bytes() == (unpacked / name).read_bytes()
        for name in ("verdict", "model", "inputs", "outputs", "source", "versions", "created"):
            assert after[name] == before[name]
        assert (before["format"], after["format"]) == (1, 2)

    def test_every_release_gets_the_model_without_the_function(self, made: DeviceBundle) -> None:
        targets = {each["name"]: each for each in made.manifest["bundle"]["targets"]}
        assert set(targets) == {"jetson-orin-nano", "jetson-orin-nx", "jetson-agx-orin"}
        agx = targets["jetson-agx-orin"]
        assert (agx["sm"], agx["cpu"]) == ("87", "aarch64")
        taken = {each["tensorrt"]: each["model"] for each in agx["releases"]}
        assert taken == dict.fromkeys(["10.3", "10.16.2", "11.4.1"], "model-plugin.onnx")
        assert all(each["library"] is None for each in agx["releases"])

    def test_the_stripped_model_is_the_model_without_its_function(self, unpacked: Path) -> None:
        model = onnx.load(unpacked / "model.onnx")
        stripped = onnx.load(unpacked / "model-plugin.onnx")
        assert len(model.functions) == 1
        assert not stripped.functions
        assert len(prune_nodes(stripped)) == 2
        assert with_function(stripped).SerializeToString() == model.SerializeToString()

    def test_what_was_checked_and_what_was_not(self, made: DeviceBundle, unpacked: Path) -> None:
        about = made.manifest["bundle"]
        parity = json.loads((unpacked / "parity.json").read_text(encoding="utf-8"))
        found = {each["what"]: each["found"] for each in about["checked"]}
        assert set(found) == {"model.onnx", "model-plugin.onnx"}
        assert found["model.onnx"].startswith(f"{parity['status']}, ")
        assert parity["environment"]["runtime"] in found["model.onnx"]
        assert about["engine"] == "built on the device; nothing of this bundle was run on a GPU"
        assert [each.split(":")[0] for each in about["not_checked"]] == [
            "model-plugin.onnx",
            "plugin/source",
        ]
        readme = (unpacked / "README.md").read_text(encoding="utf-8")
        for text in (*found.values(), *about["not_checked"], about["engine"]):
            assert text in readme

    def test_the_wheel_is_the_simprune_deploy_that_runs(self, unpacked: Path) -> None:
        running = own_wheel.package_files()
        with WheelFile(unpacked / WHEEL) as wheel:
            assert wheel.testzip() is None  # holds every file against RECORD
            inside = {name for name in wheel.namelist() if name.startswith("simprune_deploy/")}
            assert inside == set(running)
            for name in inside:
                assert wheel.read(name) == running[name].read_bytes()
            about = metadata.PathDistribution(  # type: ignore[arg-type]
                __import__("zipfile").Path(wheel, f"simprune_deploy-{sd.__version__}.dist-info/")
            )
            assert about.version == sd.__version__
            assert about.requires == metadata.distribution("simprune-deploy").requires
        assert "simprune_deploy/engine/plugin/source/src/launch_cuda.cu" in running
        assert not [name for name in running if "__pycache__" in name or "/tests/" in name]

    def test_the_plugins_sources_are_all_there(self, unpacked: Path) -> None:
        source = unpacked / "plugin" / "source"
        assert names_in(source) == set(source_files())
        for name in names_in(source):
            assert (source / name).read_bytes() == (PLUGINS / name).read_bytes()

    def test_the_same_again_is_the_same_bytes(
        self, exported: Path, made: DeviceBundle, tmp_path: Path
    ) -> None:
        (tmp_path / "later").mkdir()
        again = make_bundle(
            exported, find_targets(ORIN), output=tmp_path / "later" / "demo-jetson-orin"
        )
        assert again.archive.read_bytes() == made.archive.read_bytes()
        with tarfile.open(made.archive) as tar:
            entries = tar.getmembers()
        assert [each.name for each in entries] == sorted(
            (each.name for each in entries), key=lambda name: name.split("/")
        )
        for entry in entries:
            assert (entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname) == (
                0,
                0,
                0,
                "",
                "",
            )
            assert entry.isfile() or entry.isdir()

    def test_a_target_with_a_newer_tensorrt_gets_it_too(
        self, exported: Path, tmp_path: Path
    ) -> None:
        made = make_bundle(exported, find_targets("igx-thor"), output=tmp_path / "thor")
        assert (made.folder / "model-plugin.onnx").is_file()
        (target,) = made.manifest["bundle"]["targets"]
        assert [each["model"] for each in target["releases"]] == ["model-plugin.onnx"]
        readme = (made.folder / "README.md").read_text(encoding="utf-8")
        assert re.findall("--onnx=(.*?) ", readme) == ["model-plugin.onnx"]

    def test_a_graph_of_one_batch_has_no_shapes_in_trtexecs_line(self, exported: Path) -> None:
        graph = onnx.load(exported / "model.onnx")
        metadata = read_metadata(graph)
        assert "Shapes" in texts._trtexec(graph, "model.onnx", plugin=True)
        graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
        export = {**metadata.export, "batch": [2, 2]}
        write_metadata(graph, dataclasses.replace(metadata, export=export))
        assert "Shapes" not in texts._trtexec(graph, "model.onnx", plugin=True)

    def test_a_system_that_is_too_old_is_told(self, exported: Path, tmp_path: Path) -> None:
        made = make_bundle(exported, find_targets("igx-orin"), output=tmp_path / "igx")
        (target,) = made.manifest["bundle"]["targets"]
        assert [each["model"] for each in target["releases"]] == [None, "model-plugin.onnx"]
        assert target["sm"] is None
        assert "architectures=${1:-}" in (made.folder / "plugin" / "build.sh").read_text()
        assert "this TensorRT is too old" in (made.folder / "README.md").read_text()

    def test_an_export_that_was_not_verified_says_so(self, unverified: dict[str, Any]) -> None:
        made = Path(unverified["bundle"]["folder"])
        manifest = read_manifest(made)
        about = manifest["bundle"]
        assert manifest["verdict"] == "not verified"
        assert (
            "model.onnx: it was never compared with PyTorch, and never run" in about["not_checked"]
        )
        assert [each["what"] for each in about["checked"]] == ["model-plugin.onnx"]
        readme = (made / "README.md").read_text(encoding="utf-8")
        assert "nothing to compare with" in readme
        assert "verify . --engine" not in readme


@pytest.fixture(scope="module")
def device(
    unpacked: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Install the bundle's wheel into a clean environment; return what runs commands there."""
    home = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    command = [*pip, "install", "--quiet", "--no-deps", "-r", "requirements.txt"]
    done = subprocess.run(command, cwd=unpacked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (site,) = home.glob("lib/python*/site-packages")
    # the packages it needs are borrowed; ours is not among them, and torch cannot be imported
    borrowed = Path(onnx.__file__).parents[1]
    (site / "borrowed.pth").write_text(f"{borrowed}\n")
    (site / "sitecustomize.py").write_text(
        "import sys\n"
        "for name in ('torch', 'timm', 'onnxscript', 'safetensors'):\n"
        "    sys.modules[name] = None\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"COLUMNS": "200", "PATH": f"{home / 'bin'}:{os.environ['PATH']}"}

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            arguments, cwd=unpacked, env=environment, capture_output=True, text=True
        )

    where = call("python", "-c", "import simprune_deploy; print(simprune_deploy.__file__)")
    assert where.stdout.startswith(str(site)), where.stdout + where.stderr
    return call


class TestOnTheDevice:
    """The README's steps that need no GPU, in a Python that has neither our checkout nor torch."""

    def test_the_readmes_commands(self, device: Any, unpacked: Path) -> None:
        readme = (unpacked / "README.md").read_text(encoding="utf-8")
        assert "tar -xzf demo-jetson-orin.tar.gz && cd demo-jetson-orin\n" in readme
        assert "pip install -r requirements.txt " in readme
        commands = re.findall(r"^(simprune-deploy [^#\n]*?) *#", readme, re.M)
        assert [command.split()[1] for command in commands] == ["build", "verify", "bench"]
        (line,) = re.findall(r"^trtexec .*$", readme, re.M)
        for part in (
            "--onnx=model-plugin.onnx",
            "--dynamicPlugins=plugin/libsimprune_plugin.so",
            "--stronglyTyped",
            "--maxShapes=images:8x1x28x28",
        ):
            assert part in line.split()
        assert (
            "Nothing counts the plugin layers of this engine: `model-plugin.onnx` leaves" in readme
        )
        for command in ("--help", "build --help", "verify --help", "bench --help"):
            done = device("simprune-deploy", *command.split())
            assert done.returncode == 0, done.stderr

    def test_verify(self, device: Any) -> None:
        done = device("simprune-deploy", "verify", ".", "--json")
        assert done.returncode == 0, done.stderr
        verdict = json.loads(done.stdout)
        assert verdict["status"] == "passed"
        assert verdict["checks"]["pruning"]["passed"]
        assert verdict["inputs"]["source"] == "golden cases"

    def test_inspect(self, device: Any) -> None:
        done = device("simprune-deploy", "inspect", ".", "--json")
        assert done.returncode == 0, done.stderr
        metadata = json.loads(done.stdout)
        assert metadata["kind"] == "device bundle"
        assert metadata["verdict"] == "passed"
        assert metadata["targets"] == ["jetson-orin-nano", "jetson-orin-nx", "jetson-agx-orin"]
        assert metadata["files"]["plugin/source"] > 100_000
        assert not [name for name in metadata["files"] if name.startswith("plugin/source/")]

    def test_the_plugin_is_compiled_by_its_script(
        self, device: Any, unpacked: Path, tensorrt_headers: Path, tmp_path: Path
    ) -> None:
        """On this machine's processor; the GPU code is the device's."""
        if shutil.which("nvcc") is None or shutil.which("cmake") is None:
            reason = "no nvcc or no cmake"
            pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
        script = unpacked / "plugin" / "build.sh"
        built = tmp_path / "libsimprune_plugin.so"
        done = device("env", f"TENSORRT_INCLUDE={tensorrt_headers}", str(script), "", str(built))
        assert done.returncode == 0, done.stdout + done.stderr
        info = read_info(built)
        assert (info.machine, info.device_code.sms) == (platform.machine(), ("87",))
        done = device("simprune-deploy", "plugin", "info", str(built), "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["sha256"] == sha256(built)
        assert names_in(tmp_path) == {built.name}

    def test_the_script_says_what_is_missing(self, unpacked: Path, tmp_path: Path) -> None:
        script = unpacked / "plugin" / "build.sh"

        def call() -> subprocess.CompletedProcess[str]:
            command = ["/bin/sh", str(script), "87", str(tmp_path / "lib.so")]
            path = f"{tmp_path / 'bin'}"
            environment = {"PATH": path, "TMPDIR": str(tmp_path / "tmp")}
            return subprocess.run(command, env=environment, capture_output=True, text=True)

        (tmp_path / "bin").mkdir()
        (tmp_path / "tmp").mkdir()
        for tool in ("dirname", "mktemp", "rm", "sed", "grep", "cat", "cp", "mv"):
            (tmp_path / "bin" / tool).symlink_to(shutil.which(tool) or "")
        done = call()
        assert done.returncode == 2
        assert done.stderr == "error: no cmake found: sudo apt-get install cmake\n"
        cmake = tmp_path / "bin" / "cmake"
        cmake.write_text('#!/bin/sh\necho "-- TensorRT headers: none, so"\necho "$@" >&2\n')
        cmake.chmod(0o755)
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.write_text("#!/bin/sh\n")
        nvcc.chmod(0o755)
        done = call()
        assert done.returncode == 2
        assert "no TensorRT headers (NvInferRuntime.h) found: sudo apt-get" in done.stderr
        cmake.write_text('#!/bin/sh\necho "CMake Error: $*"\nexit 1\n')
        done = call()
        assert done.returncode == 2
        assert "-DCMAKE_CUDA_ARCHITECTURES=87-real" in done.stderr
        assert "cmake cannot configure the build" in done.stderr
        assert not (tmp_path / "lib.so").exists()
        assert list((tmp_path / "tmp").iterdir()) == []


class TestLibrary:
    def test_the_library_that_was_compiled_for_jetson(
        self, exported: Path, jetson_library: Path, tmp_path: Path
    ) -> None:
        """CUDA 13's on JetPack 7; JetPack 6 has CUDA 12.6 and compiles its own."""
        made = make_bundle(
            exported, find_targets(ORIN), output=tmp_path / "b", plugin=jetson_library
        )
        info = read_info(made.folder / PREBUILT)
        about = made.manifest["bundle"]
        assert about["library"]["sha256"] == info.sha256 == read_info(jetson_library).sha256
        assert about["library"]["path"] == PREBUILT
        assert (info.machine, info.device_code.sms) == ("aarch64", ("87", "110"))
        nano = about["targets"][0]["releases"]
        major = info.cuda.split(".")[0] if info.cuda else ""
        expected = {"13": [None, PREBUILT], "12": [PREBUILT, PREBUILT]}[major]
        assert [each["library"] for each in nano] == expected
        assert f"{PREBUILT}: not loaded and not run" in about["not_checked"]
        readme = (made.folder / "README.md").read_text(encoding="utf-8")
        assert f"A compiled plugin is in this bundle: `{PREBUILT}`" in readme
        assert libraries.PREBUILT.as_posix() == PREBUILT  # where `build` looks
        assert run("verify", made.folder)[0] == 0

    @pytest.mark.parametrize(
        ("target", "changes", "says"),
        [
            (ORIN, {"machine": 62}, "is for x86_64, and jetson-orin-nano is aarch64: build one"),
            (ORIN, {"sms": "86,110"}, "is SM 87: build it with --arch 87"),
            ("jetson-thor", {"sms": "87"}, "is SM 110: build it with --arch 110"),
            (ORIN, {"kind": "kernels"}, "has no TensorRT plugin in it (kernels)"),
            (ORIN, {"version": "9.9.9"}, "is of version 9.9.9, and this is"),
            ("igx-orin", {}, "its compute capability is unknown"),
            ("igx-thor", {"cuda": "14.0.1"}, "IGX Linux stack has CUDA 13.0, which is older"),
            ("rtx-turing", {"sms": "75"}, "is for aarch64, and rtx-turing is x86_64"),
        ],
    )
    def test_libraries_that_cannot_work_there(
        self, exported: Path, tmp_path: Path, target: str, changes: dict[str, Any], says: str
    ) -> None:
        path = a_library(tmp_path / "lib.so", **changes)
        output = tmp_path / "out"
        call = ("bundle", exported, "--target", target, "--plugin", path, "-o", output)
        assert says in refusal(*call)
        assert names_in(tmp_path) == {"lib.so"}

    def test_files_that_are_no_library(self, exported: Path, tmp_path: Path) -> None:
        (tmp_path / "text").write_text("text")
        call = ("bundle", exported, "--target", ORIN, "-o", tmp_path / "out", "--plugin")
        assert "is not a shared library" in refusal(*call, tmp_path / "text")
        assert "does not exist" in refusal(*call, tmp_path / "nothing")

    @pytest.mark.parametrize(
        ("own", "there", "runs"),
        [
            ("12.6.68", "12.6", True),
            ("12.2.140", "12.6", True),
            ("12.8.93", "12.6", True),
            ("12.6.68", "13.2", True),
            ("13.0.88", "12.6", False),
            ("13.0.88", None, None),
        ],
    )
    def test_cuda_versions(
        self, tmp_path: Path, own: str, there: str | None, runs: bool | None
    ) -> None:
        info = read_info(a_library(tmp_path / "lib.so", cuda=own))
        fit = library.fit(info, Release("a system", there, "10.3", ("a test",)))
        assert fit.runs is runs
        assert "a system" in fit.why


class TestBadInput:
    def test_a_changed_file(self, folder: Path) -> None:
        with (folder / "plugin" / "source" / "version.txt").open("a") as file:
            file.write("x")
        for command in ("verify", "inspect"):
            assert "is not the file that was exported" in refusal(command, folder)

    def test_a_missing_file(self, folder: Path) -> None:
        (folder / "plugin" / "build.sh").unlink()
        assert "plugin/build.sh is missing" in refusal("verify", folder)

    def test_a_newer_format(self, folder: Path) -> None:
        self.change(folder, lambda manifest: manifest.update(format=3, files="of another kind"))
        line = refusal("inspect", folder)
        assert "has format 3, and this version reads up to 2: update simprune-deploy" in line

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("format", "2"),
            ("format", 0),
            ("files", [1]),
            ("files", {"model.onnx": {"bytes": 1}}),
            ("bundle", None),
        ],
    )
    def test_a_damaged_manifest(self, folder: Path, key: str, value: Any) -> None:
        def change(manifest: dict[str, Any]) -> None:
            if value is None:
                del manifest[key]
            else:
                manifest[key] = value

        self.change(folder, change)
        assert "export again" in refusal("verify", folder)

    @pytest.mark.parametrize(
        "name",
        ["../secret", "/etc/hostname", "plugin/../../secret", "a\\b", "", ".", "a//b", "x\n"],
    )
    def test_a_path_out_of_the_folder(self, folder: Path, name: str) -> None:
        secret = folder.parent / "secret"
        secret.write_text("secret")
        stamp = {"bytes": secret.stat().st_size, "sha256": sha256(secret)}
        self.change(folder, lambda manifest: manifest["files"].update({name: stamp}))
        assert "which is not below its folder: do not use it" in refusal("verify", folder)

    def test_a_link_out_of_the_folder(self, folder: Path) -> None:
        model = folder / "model.onnx"
        model.rename(folder.parent / "elsewhere.onnx")
        model.symlink_to(folder.parent / "elsewhere.onnx")
        assert "is a link out of its folder" in refusal("verify", folder)

    def test_a_file_in_place_of_the_folder(self, folder: Path) -> None:
        line = refusal("bundle", folder / "model.onnx", "--target", ORIN)
        assert "model.onnx is a file: give the folder" in line

    def test_golden_cases_that_are_none(
        self, exported: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (folder / "golden.npz").write_text("junk")
        line = refusal("verify", folder / "model.onnx")
        assert line.endswith("holds no golden cases for this model: File is not a zip file")
        assert "pickle" not in line
        monkeypatch.setattr(golden, "LARGEST", 1000)
        shutil.copy(exported / "golden.npz", folder)
        assert "and at most 1000 are read" in refusal("verify", folder / "model.onnx")

    def test_a_huge_manifest(self, folder: Path) -> None:
        with (folder / "manifest.json").open("r+") as file:
            file.truncate((1 << 24) + 1)
        assert "is damaged" in refusal("verify", folder)

    def test_an_archive_that_is_cut_short(self, made: DeviceBundle, tmp_path: Path) -> None:
        data = made.archive.read_bytes()
        (tmp_path / "cut.tar.gz").write_bytes(data[: len(data) // 2])
        done = subprocess.run(
            ["tar", "-xzf", "cut.tar.gz"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode != 0
        line = refusal("verify", tmp_path / "demo-jetson-orin")
        assert "is not the file that was exported" in line or "is missing" in line
        with pytest.raises(EOFError):
            gzip.decompress((tmp_path / "cut.tar.gz").read_bytes())

    def test_a_bundle_in_place_of_its_export(self, exported: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(exported, tmp_path / "copy"))
        line = refusal("bundle", copy, "--target", ORIN, "-o", copy, "--force")
        assert "which this is made of" in line
        assert names_in(copy) == names_in(exported)

    @pytest.mark.parametrize("about", [{"targets": 5}, {"targets": [{}]}])
    def test_a_damaged_description(self, folder: Path, about: Any) -> None:
        self.change(folder, lambda manifest: manifest.update(bundle=about))
        assert "says of the bundle is damaged" in refusal("inspect", folder)

    def test_a_bundle_of_a_bundle(self, unpacked: Path, tmp_path: Path) -> None:
        line = refusal("bundle", unpacked, "--target", ORIN, "-o", tmp_path / "out")
        assert "is a bundle already" in line

    @pytest.mark.parametrize(
        ("target", "says"),
        [
            ("rtx-ada", "rtx-ada: its engine is built on this machine"),
            ("jetson-orin,rtx", "rtx-ampere: its engine is built on this machine"),
            ("jetson-orinn", "did you mean jetson-orin"),
            ("", "--target is empty"),
        ],
    )
    def test_targets(self, exported: Path, tmp_path: Path, target: str, says: str) -> None:
        assert says in refusal("bundle", exported, "--target", target, "-o", tmp_path / "out")
        assert names_in(tmp_path) == set()

    @pytest.mark.parametrize("verdict", ["failed", "inconclusive"])
    def test_what_is_not_proven_gets_no_bundle(
        self, exported: Path, tmp_path: Path, verdict: str
    ) -> None:
        copy = Path(shutil.copytree(exported, tmp_path / "copy"))
        self.change(copy, lambda manifest: manifest.update(verdict=verdict))
        assert "bundles are made of verified exports" in refusal("bundle", copy, "--target", ORIN)
        assert [path.name for path in tmp_path.iterdir()] == ["copy"]

    def test_no_exported_folder(self, tmp_path: Path) -> None:
        line = refusal("bundle", tmp_path / "nothing", "--target", ORIN)
        assert "holds no manifest.json" in line

    def test_what_is_there_is_replaced_only_with_force(
        self, exported: Path, tmp_path: Path
    ) -> None:
        call = ("bundle", exported, "--target", "orin-nx", "-o", tmp_path / "out")
        (tmp_path / "out.tar.gz").write_text("mine")
        assert "out.tar.gz already exists: replace it with --force" in refusal(*call)
        assert names_in(tmp_path) == {"out.tar.gz"}
        code, out, err = run(*call, "--force", "--json")
        assert (code, err) == (0, "")
        said = json.loads(out)
        assert said["archive"]["sha256"] == sha256(tmp_path / "out.tar.gz")
        assert said["manifest"]["verdict"] == "passed"
        assert f"{tmp_path / 'out'} already exists" in refusal(*call)
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "file").write_text("mine")
        line = refusal(*call[:-1], tmp_path / "mine", "--force")
        assert "holds no manifest.json, so it is not a result of this tool" in line
        another = Path(shutil.copytree(exported, tmp_path / "another"))
        line = refusal(*call[:-1], another, "--force")
        assert "is an exported folder and no bundle" in line
        assert names_in(another) == names_in(exported)

    @pytest.mark.parametrize("step", ["write_own_wheel", "write_archive", "write_texts"])
    def test_no_space(
        self, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
    ) -> None:
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(device_bundle, step, full)
        line = refusal("bundle", exported, "--target", ORIN, "-o", tmp_path / "out")
        assert "no space left to write" in line
        assert list(tmp_path.iterdir()) == []

    def test_an_interrupt_leaves_nothing(
        self, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(device_bundle, "write_archive", stop)
        with pytest.raises(KeyboardInterrupt):
            make_bundle(exported, find_targets(ORIN), output=tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_an_installation_without_metadata(
        self, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        call = ("bundle", exported, "--target", ORIN, "-o", tmp_path / "out")
        monkeypatch.setattr(own_wheel, "DISTRIBUTION", "simprune-deploy-that-is-not-there")
        assert "without having been installed" in refusal(*call)
        monkeypatch.undo()
        monkeypatch.setattr(own_wheel, "__version__", "9.9.9")
        assert "and runs as 9.9.9: install it again" in refusal(*call)
        monkeypatch.undo()
        monkeypatch.setattr(own_wheel, "EXTRAS", ("cpu", "telepathy"))
        assert "older than its code (no extra telepathy): install it again" in refusal(*call)
        monkeypatch.undo()
        monkeypatch.setitem(sys.modules, "wheel.wheelfile", None)
        assert "pip install 'simprune-deploy[bundle]'" in refusal(*call)
        monkeypatch.undo()
        monkeypatch.setitem(sys.modules, "jinja2", None)
        assert "pip install 'simprune-deploy[bundle]'" in refusal(*call)
        assert list(tmp_path.iterdir()) == []

    def change(self, folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text(encoding="utf-8"))
        change(manifest)
        path.write_text(json.dumps(manifest), encoding="utf-8")


class TestCommandLine:
    def test_what_a_person_is_shown(self, exported: Path, tmp_path: Path) -> None:
        code, out, err = run("bundle", exported, "--target", "agx-orin", "-o", tmp_path / "out")
        assert (code, err) == (0, "")
        for text in (
            f"{tmp_path / 'out.tar.gz'} (",
            "JetPack 6.1 or 6.2: model-plugin.onnx, the plugin is compiled there",
            "JetPack 7.2.2 or later: model-plugin.onnx",
            "verdict          passed",
            "nothing of this bundle was run on a GPU",
            "tar -xzf out.tar.gz, then its README.md",
        ):
            assert text in out
        # what the export has is kept, and what it costs is said
        assert out.splitlines()[-1] == (
            "the model is float32, and TensorRT fuses no float32 attention: to have it fused, "
            "export again with --precision fp16"
        )
        manifest = read_manifest(tmp_path / "out")
        assert manifest["model"]["export"]["precision"] == "fp32"
        mode = (tmp_path / "out" / "plugin" / "build.sh").stat().st_mode
        assert mode & stat.S_IXUSR

    def test_export_makes_the_bundle_after_the_proof(self, unverified: dict[str, Any]) -> None:
        assert "engines" not in unverified
        made = Path(unverified["bundle"]["folder"])
        assert made.name == "vit-jetson-orin-nx-jetson-agx-thor"
        assert made.parent == Path(unverified["output"]).parent
        # nobody asked for a precision, and a Jetson's TensorRT wants 16 bits
        assert unverified["manifest"]["model"]["export"]["precision"] == "fp16"
        assert unverified["precision_note"] == (
            "precision: float16, because TensorRT, which builds the engine of jetson-orin-nx, "
            "jetson-agx-thor, fuses no float32 attention; --precision fp32 for float32"
        )
        assert unverified["bundle"]["advice"] == ""
        export = ("export", DEMO, "-o", unverified["output"])
        assert "vit already exists" in refusal(*export, "--target", "orin-nx,jetson-thor")

    def test_export_refuses_before_it_loads_the_model(self, tmp_path: Path) -> None:
        (tmp_path / "vit-jetson-orin.tar.gz").write_text("mine")
        call = ("export", tmp_path / "no.pt", "-o", tmp_path / "vit", "--target", ORIN)
        assert "vit-jetson-orin.tar.gz already exists" in refusal(*call)
        assert names_in(tmp_path) == {"vit-jetson-orin.tar.gz"}

    def test_an_export_that_is_not_proven_gets_none(self, pictures: Path, tmp_path: Path) -> None:
        """Above 1 nothing is pruned, which shows nothing."""
        call = ("export", DEMO, "--layers", "1", "-o", tmp_path / "vit", "--threshold", "1.5")
        code, out, _ = run(*call, "--images", pictures, "--target", ORIN)
        assert code == 1
        assert "no bundle was made: the parity check did not pass" in out
        assert [path.name for path in tmp_path.iterdir()] == ["vit"]
        said = [line for line in out.splitlines() if line.startswith("precision: ")]
        assert len(said) == 1
        assert said[0].startswith("precision: float16, because TensorRT, which builds the engine")
        assert said[0].endswith("; --precision fp32 for float32")

    @pytest.mark.parametrize(
        ("targets", "asked", "precision"),
        [
            (("rtx-ada", ORIN), None, "fp16"),  # one file for both: the device decides
            (("rtx-ada",), None, "fp32"),
            ((ORIN,), "fp32", "fp32"),
        ],
    )
    def test_a_device_among_the_targets_chooses_float16_unless_a_precision_is_asked_for(
        self, targets: tuple[str, ...], asked: Any, precision: str, pictures: Path, tmp_path: Path
    ) -> None:
        if "rtx-ada" in targets:
            pytest.importorskip("tensorrt_rtx")
        # above 1 nothing is pruned, the parity check does not pass, and nothing is built
        result = sd.export(
            DEMO,
            tmp_path / "vit",
            sd.ExportOptions(precision=asked),
            threshold=1.5,
            layers=[1],
            images=pictures,
            targets=targets,
        )
        assert result.manifest["model"]["export"]["precision"] == precision
        in_keys = precision == "fp32"
        assert result.manifest["model"]["export"]["log_size_in_keys"] is in_keys
        chosen = precision == "fp16"
        assert bool(result.precision_note) is chosen
        assert (f"{result.folder}\nprecision: float16, because" in str(result)) is chosen
        assert "precision='fp32' for float32" in result.precision_note or not chosen

    def test_an_export_stays_when_its_bundle_cannot_be_made(
        self, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pruned = sd.prune(sd.load(str(DEMO)), threshold=0.9, layers=[1, 3])
        folder = tmp_path / "vit"
        monkeypatch.setitem(sys.modules, "jinja2", None)
        with pytest.raises(RequirementError, match="jinja2, which writes the README") as raised:
            sd.export(pruned, folder, images=pictures, targets="orin-nx")
        assert f"the export in {folder} is complete; `simprune-deploy bundle {folder}" in str(
            raised.value
        )
        assert [path.name for path in tmp_path.iterdir()] == ["vit"]
        assert read_manifest(folder)["verdict"] == "passed"
