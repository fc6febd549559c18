"""TensorRT engines for the GPU of the machine: as far as a machine without either can show.

``tensorrt_double`` stands for TensorRT and ``driver_double`` for the driver; each says at its top
what it cannot show. The plugin's library, its GPU code, the graphs and NVIDIA's parser are real.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import operator_forms
import pytest
import running_double
import tensorrt_double
from driver_double import driver
from places import ROOT
from tensorrt_double import read_record
from tensorrt_wheels import installed_lean, installed_rtx
from typer.testing import CliRunner

import simprune_deploy as sd
from simprune_deploy.cli import app
from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.common.files import sha256
from simprune_deploy.engine import cuda, flavours, gpu, libraries
from simprune_deploy.engine.build import STRIPPED, TIMING_CACHE
from simprune_deploy.engine.engine_metadata import FileStamp, read_engine_metadata
from simprune_deploy.engine.folder_engines import build_here
from simprune_deploy.onnx import variants
from simprune_deploy.onnx.function_body import DOMAIN, DOMAIN_VERSION
from simprune_deploy.onnx.metadata import load_graph, read_metadata
from simprune_deploy.onnx.variants import prune_nodes, with_diagnostics, without_function
from simprune_deploy.predict import engine_predictor
from simprune_deploy.predict.onnx_predictor import open_session
from simprune_deploy.pruning.kernel_library import read_info

DEMO = ROOT / "examples" / "fashion_mnist" / "vit"
VERSIONS = ["10.3.0", "10.7.0", "10.14.1", "10.16.2", "11.4.1"]
pytest.importorskip("tensorrt_rtx")


def export(folder: Path, **options: Any) -> Path:
    pruned = sd.prune(sd.load(str(DEMO)), threshold=0.9, layers=[1, 3, 4])
    sd.export(pruned, folder, sd.ExportOptions(**options))
    return folder


def write_model(folder: Path, graph: onnx.ModelProto) -> None:
    """Put another model into an exported folder, as if it had been exported so."""
    (folder / "model.onnx").write_bytes(graph.SerializeToString())
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    entry = manifest["files"]["model.onnx"]
    entry["sha256"] = sha256(folder / "model.onnx")
    entry["bytes"] = (folder / "model.onnx").stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a verified export with a run-time threshold. It is not to be changed."""
    return export(tmp_path_factory.mktemp("here") / "demo", runtime_threshold=True)


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """Return a copy of the export, to build in."""
    return Path(shutil.copytree(exported, tmp_path / "demo"))


Machine = Callable[..., None]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Return what makes this a machine with a TensorRT and a GPU, both doubles."""
    monkeypatch.delenv("SIMPRUNE_LIBRARY", raising=False)
    real = sys.modules.get("tensorrt")

    def become(version: str, capability: tuple[int, int] = (8, 7)) -> None:
        place = str(tensorrt_double.install(tmp_path, version))
        monkeypatch.syspath_prepend(place)
        monkeypatch.setenv("PYTHONPATH", place, prepend=":")
        # not through monkeypatch, which would put an earlier double back
        sys.modules.pop("tensorrt", None)
        monkeypatch.setattr(gpu, "DRIVER", str(driver(tmp_path, capability)))

    yield become
    sys.modules.pop("tensorrt", None)
    if real is not None:
        sys.modules["tensorrt"] = real


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def refused(says: str, *arguments: object) -> None:
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert says in result.stderr


class TestBuild:
    @pytest.mark.parametrize("version", VERSIONS)
    def test_what_the_builder_is_asked(
        self, machine: Machine, folder: Path, plugin_library: Path, version: str
    ) -> None:
        machine(version)
        result = call(
            *("build", folder, "--plugin", plugin_library, "--json"),
            *("--batch", "2..4", "--opt-batch", "4", "--workspace", "64"),
        )
        assert (result.exit_code, result.stderr) == (0, "")
        (engine,) = json.loads(result.stdout)["engines"]
        path = folder / "engines" / "model-trt-sm87.engine"
        assert Path(engine["path"]) == path
        asked = read_record(path)
        assert asked["version"] == version
        assert asked["strong_typing_flag"] is (version < "11")
        assert asked["operator"] == "plugin"
        assert asked["plugins"] == [sha256(plugin_library)]
        assert asked["inputs"] == {"images": ["FLOAT", -1, 1, 28, 28], "threshold": ["FLOAT", -1]}
        assert asked["outputs"] == {"logits": ["FLOAT", -1, 10]}
        assert asked["tf32"] is False
        assert asked["workspace"] == 64 << 20
        assert asked["profiles"] == 1

        metadata = read_engine_metadata(path)
        assert (metadata.flavour, metadata.version) == ("tensorrt", version)
        assert (metadata.gpu, metadata.cuda) == ("GPU double", "13.0")
        assert (metadata.compute_capabilities, metadata.targets) == (("8.7",), ())
        assert metadata.plugin == FileStamp.of(plugin_library)
        assert (metadata.prune_layers, metadata.plugin_layers) == (3, 3)
        assert metadata.onnx == FileStamp.of(folder / "model.onnx")
        assert metadata.profile == {
            "images": {"min": [2, 1, 28, 28], "opt": [4, 1, 28, 28], "max": [4, 1, 28, 28]},
            "threshold": {"min": [1], "opt": [1], "max": [4]},
        }
        assert metadata.status == "built, not run"
        assert metadata.workspace_mib == 64

    @pytest.mark.parametrize("version", VERSIONS)
    def test_the_parser_gets_the_file_without_the_function(
        self, machine: Machine, folder: Path, plugin_library: Path, version: str
    ) -> None:
        """It stays in ``engines``, so that trtexec can be given it."""
        machine(version)
        engine = build_here(folder, plugin=plugin_library)
        left = onnx.load(folder / "engines" / STRIPPED)
        assert left == without_function(load_graph(folder / "model.onnx"))
        assert f"--onnx={folder / 'engines' / STRIPPED}" in str(engine.trtexec)

    def test_a_folder_that_brings_that_file(
        self, machine: Machine, folder: Path, plugin_library: Path
    ) -> None:
        machine("10.16.2")
        (folder / STRIPPED).write_bytes(
            without_function(load_graph(folder / "model.onnx")).SerializeToString()
        )
        engine = build_here(folder, plugin=plugin_library)
        assert not (folder / "engines" / STRIPPED).exists()
        assert f"--onnx={folder / STRIPPED}" in str(engine.trtexec)
        assert read_record(engine.path)["operator"] == "plugin"

    def test_a_folder_that_brings_another_models_file(
        self, machine: Machine, folder: Path, plugin_library: Path
    ) -> None:
        machine("10.16.2")
        graph = load_graph(folder / "model.onnx")
        graph.graph.initializer[0].raw_data = bytes(len(graph.graph.initializer[0].raw_data))
        (folder / STRIPPED).write_bytes(without_function(graph).SerializeToString())
        before = names_in(folder)
        says = f"{folder / STRIPPED} is not model.onnx without its function, so the two are of "
        refused(
            f"{says}different exports: copy the bundle again",
            *("build", folder, "--plugin", plugin_library),
        )
        assert names_in(folder) == before

    def test_the_library_that_came_along(
        self, machine: Machine, folder: Path, plugin_library: Path
    ) -> None:
        machine("11.4.1")
        came_along = folder / libraries.PREBUILT
        came_along.parent.mkdir(parents=True)
        shutil.copy(plugin_library, came_along)
        assert build_here(folder).metadata.plugin == FileStamp.of(plugin_library)

    def test_without_the_plugin(self, machine: Machine, folder: Path) -> None:
        machine("10.14.1")
        result = call("build", folder, "--no-plugin")
        assert result.exit_code == 0, result.stderr
        path = folder / "engines" / "model-trt-sm87.engine"
        assert read_record(path)["operator"] == "function"
        assert read_record(path)["plugins"] == []
        metadata = read_engine_metadata(path)
        assert (metadata.plugin, metadata.prune_layers, metadata.plugin_layers) == (None, 3, 0)
        assert "0 of 3 prune layers, as counted in the parsed network" in result.stdout
        assert "--dynamicPlugins" not in result.stdout

    def test_the_unpruned_model(self, machine: Machine, folder: Path) -> None:
        """It needs no plugin, and none is looked for."""
        machine("10.3.0")
        engine = build_here(folder, of="dense")
        assert engine.path.name == "model-dense-trt-sm87.engine"
        asked = read_record(engine.path)
        assert (asked["operator"], asked["plugins"]) == ("none", [])
        assert asked["inputs"] == {"images": ["FLOAT", -1, 1, 28, 28]}
        assert (engine.metadata.of, engine.metadata.plugin, engine.trtexec) == ("dense", None, None)
        assert engine.metadata.counted == "0 of 0 prune layers"
        assert not list((folder / "engines").glob("*.onnx"))

    def test_the_timing_cache_is_kept_and_used(
        self, machine: Machine, folder: Path, plugin_library: Path
    ) -> None:
        machine("10.14.1")
        first = build_here(folder, plugin=plugin_library)
        assert read_record(first.path)["timing_cache"] == ""
        assert (folder / "engines" / TIMING_CACHE).read_bytes() == b"timed by 10.14.1"
        force = sd_options(force=True)
        again = build_here(folder, plugin=plugin_library, options=force)
        assert read_record(again.path)["timing_cache"] == "timed by 10.14.1"
        (folder / "engines" / TIMING_CACHE).write_bytes(b"timed by 8.6.1")
        other = build_here(folder, plugin=plugin_library, options=force)
        assert read_record(other.path)["timing_cache"] == ""
        assert (folder / "engines" / TIMING_CACHE).read_bytes() == b"timed by 10.14.1"
        assert names_in(folder / "engines") == {
            "model-trt-sm87.engine",
            "model-trt-sm87.engine.json",
            STRIPPED,
            TIMING_CACHE,
        }

    def test_the_same_is_not_built_again(
        self, machine: Machine, folder: Path, plugin_library: Path, tmp_path: Path
    ) -> None:
        machine("10.14.1")
        assert not build_here(folder, plugin=plugin_library).cached
        assert build_here(folder, plugin=plugin_library).cached
        assert not build_here(folder, use_plugin=False).cached
        machine("11.4.1")
        assert not build_here(folder, use_plugin=False).cached

    def test_progress(self, machine: Machine, folder: Path, plugin_library: Path) -> None:
        machine("11.4.1")
        said: list[str] = []
        build_here(folder, plugin=plugin_library, progress=said.append)
        assert said == ["building for SM 8.7", "building for SM 8.7: Tactic selection"]


def sd_options(**values: Any) -> Any:
    from simprune_deploy.engine.build import EngineOptions

    return EngineOptions(**values)


class TestTrtexec:
    def line(self, folder: Path, library: Path, **options: Any) -> list[str]:
        line = build_here(folder, plugin=library, options=sd_options(**options)).trtexec
        assert line is not None
        return line.split()

    def test_10(self, machine: Machine, folder: Path, plugin_library: Path) -> None:
        machine("10.14.1")
        engines = folder / "engines"
        assert self.line(folder, plugin_library, workspace_mib=512, opt_batch=2) == [
            "trtexec",
            f"--onnx={engines / STRIPPED}",
            f"--saveEngine={engines / 'model-trt-sm87.engine'}",
            f"--dynamicPlugins={plugin_library}",
            "--stronglyTyped",
            "--noTF32",
            "--minShapes=images:1x1x28x28,threshold:1",
            "--optShapes=images:2x1x28x28,threshold:1",
            "--maxShapes=images:8x1x28x28,threshold:8",
            "--memPoolSize=workspace:512",
            f"--timingCacheFile={engines / TIMING_CACHE}",
            "--skipInference",
        ]

    def test_11_is_always_strongly_typed(
        self, machine: Machine, folder: Path, plugin_library: Path
    ) -> None:
        machine("11.4.1")
        line = self.line(folder, plugin_library)
        assert "--stronglyTyped" not in line
        assert not any("memPoolSize" in each for each in line)

    def test_a_batch_of_one_size_where_the_graph_takes_several(
        self, machine: Machine, folder: Path, plugin_library: Path
    ) -> None:
        """trtexec takes 1 for what it is not told."""
        machine("10.14.1")
        line = self.line(folder, plugin_library, batch=(4, 4))
        for which, most in (("min", 1), ("opt", 1), ("max", 4)):
            assert f"--{which}Shapes=images:4x1x28x28,threshold:{most}" in line

    def test_a_graph_of_one_batch_has_no_profile(
        self, machine: Machine, tmp_path: Path, plugin_library: Path
    ) -> None:
        """trtexec refuses shapes for a graph whose inputs have no free dimension."""
        machine("10.14.1")
        line = self.line(export(tmp_path / "fixed", batch=(2, 2)), plugin_library)
        assert not any("Shapes" in each for each in line)


class TestMisread:
    """Files that a parser would take otherwise than was asked: none of them becomes an engine."""

    def given(self, change: Callable[[onnx.ModelProto], onnx.ModelProto]) -> None:
        """Let the build give the parser a changed form of the file."""
        without = variants.without_function
        self.monkeypatch.setattr(variants, "without_function", lambda g: change(without(g)))

    @pytest.fixture(autouse=True)
    def patching(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def given_with_function(
        self, change: Callable[[onnx.ModelProto], onnx.ModelProto] = lambda graph: graph
    ) -> None:
        """Let the build give the parser a form of the file with the function."""
        counted = operator_forms.counted
        self.monkeypatch.setattr(variants, "without_function", lambda g: change(counted(g)))

    def refused(self, folder: Path, says: str, *arguments: object) -> None:
        before = names_in(folder)
        refused(says, "build", folder, *arguments)
        assert names_in(folder) == before

    @pytest.mark.parametrize("version", ["10.3.0", "10.16.2", "11.4.1"])
    def test_the_function_in_the_plugins_place(
        self, machine: Machine, folder: Path, plugin_library: Path, version: str
    ) -> None:
        machine(version)
        self.given_with_function(operator_forms.unmarked)
        self.refused(
            folder,
            f"the ONNX parser of TensorRT {version} made 0 plugin layers of the 3 prune layers in "
            "model-plugin.onnx, so no engine was built: update simprune-deploy, or compile the "
            "function in place of the plugin (--no-plugin)",
            *("--plugin", plugin_library),
        )

    @pytest.mark.parametrize("version", ["10.7.0", "10.14.1", "10.16.2", "11.4.1"])
    def test_a_marked_node_is_the_plugin_all_the_same(
        self, machine: Machine, folder: Path, plugin_library: Path, version: str
    ) -> None:
        machine(version)
        self.given_with_function()
        assert build_here(folder, plugin=plugin_library).metadata.plugin_layers == 3

    @pytest.mark.parametrize("version", ["10.7.0", "10.14.1", "10.16.2", "11.4.1"])
    def test_a_node_that_does_not_name_every_output(
        self, machine: Machine, folder: Path, plugin_library: Path, version: str
    ) -> None:
        machine(version)
        self.given(operator_forms.uncounted)
        self.refused(
            folder,
            "expected output size is 5, actual output size is 4.; the file is of another version "
            "of the operator: export the model again",
            *("--plugin", plugin_library),
        )

    @pytest.mark.parametrize("version", VERSIONS)
    def test_a_version_that_the_library_has_not(
        self, machine: Machine, folder: Path, plugin_library: Path, version: str
    ) -> None:
        """As the node of an earlier export looks for it."""
        machine(version)
        self.given(operator_forms.unversioned)
        self.refused(
            folder,
            'Plugin not found, are the plugin name, version, and namespace correct?"; no library '
            "with SimilarityPrune, version 2, is loaded: make one with `simprune-deploy plugin "
            "build` and name it (--plugin)",
            *("--plugin", plugin_library),
        )

    def test_more_plugin_layers_than_prune_layers(
        self, machine: Machine, folder: Path, plugin_library: Path
    ) -> None:
        """The function was asked for, and a library had registered its plugin by itself."""
        machine("11.4.1")
        place = Path(sys.path[0]) / "tensorrt.py"
        registers = f"get_plugin_registry().load_library({str(plugin_library)!r})\n"
        place.write_text(place.read_text(encoding="utf-8") + registers, encoding="utf-8")
        self.refused(
            folder,
            "; a plugin was taken for the function that was to be compiled: unset "
            "SIMPRUNE_REGISTER",
            "--no-plugin",
        )

    def test_a_library_of_another_version_of_the_operator(
        self, machine: Machine, folder: Path, plugin_library: Path, tmp_path: Path
    ) -> None:
        machine("10.14.1")
        data = plugin_library.read_bytes()
        other = tmp_path / "other.so"
        other.write_bytes(data.replace(b'"operator_version": "2"', b'"operator_version": "9"'))
        assert other.read_bytes() != data
        self.refused(
            folder,
            f"does not take the plugin of {other}, or it is not SimilarityPrune, version 2: build "
            "it here with `simprune-deploy plugin build`",
            *("--plugin", other),
        )

    def test_a_file_from_before_this_version(
        self, machine: Machine, folder: Path, plugin_library: Path
    ) -> None:
        machine("10.14.1")
        write_model(folder, before_this_version(load_graph(folder / "model.onnx")))
        says = f"the ONNX model was exported before version {DOMAIN_VERSION} of the operator: "
        self.refused(folder, f"{says}export the model again", "--plugin", plugin_library)
        refused(says, "inspect", folder)


def before_this_version(graph: onnx.ModelProto) -> onnx.ModelProto:
    for entry in graph.opset_import:
        if entry.domain == DOMAIN:
            entry.version = DOMAIN_VERSION - 1
    return graph


class TestRefused:
    @pytest.mark.parametrize("version", ["unknown", "", None])
    def test_a_tensorrt_whose_version_is_not_known(
        self, machine: Machine, folder: Path, version: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        machine("10.3.0")
        import tensorrt  # type: ignore[import-not-found,unused-ignore]

        monkeypatch.setattr(tensorrt, "__version__", version)
        refused(
            f"tensorrt has no version that is known (it says {str(version)!r})", "build", folder
        )

    def test_no_tensorrt(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        refused("tensorrt, which builds and runs the engines, is not installed", "build", folder)

    def test_a_jetson_is_told_what_it_needs(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        monkeypatch.setattr(flavours, "on_jetson", lambda: True)
        refused("nvidia-jetpack, and a virtual environment made with --system", "build", folder)

    def test_too_old(self, machine: Machine, folder: Path) -> None:
        machine("8.5.2")
        refused(
            "TensorRT 8.5.2 is too old: engines of this project begin with 10.0", "build", folder
        )

    def test_no_gpu(self, machine: Machine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        machine("10.3.0")
        monkeypatch.setattr(gpu, "DRIVER", "libno-such-driver.so.1")
        refused("no GPU was found: NVIDIA's driver", "build", folder)

    def test_no_library_and_no_compiler(
        self, machine: Machine, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        machine("10.3.0")

        def none() -> None:
            raise SimpruneError("no nvcc was found")

        monkeypatch.setattr(libraries, "find_nvcc", none)
        before = names_in(folder)
        says = "the plugin's library is missing, and cannot be built here: no nvcc was found; name "
        says += "one with --plugin, or build it elsewhere with `simprune-deploy plugin build "
        says += f"-o {folder}"
        refused(says, "build", folder)
        assert names_in(folder) == before

    def test_a_library_that_is_not_there(self, machine: Machine, folder: Path) -> None:
        machine("10.3.0")
        refused("does not exist", "build", folder, "--plugin", folder / "no.so")

    def test_a_library_without_the_plugin(
        self, machine: Machine, folder: Path, host_library: Path
    ) -> None:
        machine("10.3.0")
        refused("no TensorRT plugin in it (host)", "build", folder, "--plugin", host_library)

    def test_a_library_without_code_for_the_gpu(
        self, machine: Machine, folder: Path, plugin_library: Path
    ) -> None:
        machine("10.3.0", (7, 0))
        refused(
            "and the GPU here (GPU double) is SM 70: `simprune-deploy plugin build -o",
            "build",
            folder,
            "--plugin",
            plugin_library,
        )

    def test_a_library_of_a_newer_cuda(
        self,
        machine: Machine,
        folder: Path,
        plugin_library: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """As one that was compiled with CUDA 13 is on JetPack 6."""
        machine("10.3.0")
        monkeypatch.setattr(gpu, "DRIVER", str(driver(tmp_path, (8, 7), cuda=12060)))
        assert str(read_info(plugin_library).cuda).startswith("13.")
        says = "and the driver here knows CUDA 12.6: `simprune-deploy plugin build"
        refused(says, "build", folder, "--plugin", plugin_library)
        came_along = folder / libraries.PREBUILT
        came_along.parent.mkdir(parents=True)
        shutil.copy(plugin_library, came_along)

        def none() -> None:
            raise SimpruneError("no nvcc was found")

        monkeypatch.setattr(libraries, "find_nvcc", none)
        refused("cannot be built here: no nvcc was found", "build", folder)

    def test_a_library_for_another_processor(
        self, machine: Machine, folder: Path, plugin_library: Path, tmp_path: Path
    ) -> None:
        machine("10.3.0")
        data = bytearray(plugin_library.read_bytes())
        data[18:20] = (183).to_bytes(2, "little")  # e_machine: aarch64
        (tmp_path / "other.so").write_bytes(data)
        refused(
            "is for aarch64, and this machine is",
            "build",
            folder,
            "--plugin",
            tmp_path / "other.so",
        )

    def test_a_library_of_another_interface(
        self, machine: Machine, folder: Path, plugin_library: Path, tmp_path: Path
    ) -> None:
        machine("10.3.0")
        data = plugin_library.read_bytes()
        assert data.count(b'"abi": 2,') + data.count(b'"abi":2,') == 1
        other = data.replace(b'"abi": 2,', b'"abi": 9,').replace(b'"abi":2,', b'"abi":9,')
        (tmp_path / "other.so").write_bytes(other)
        refused("has C interface 9", "build", folder, "--plugin", tmp_path / "other.so")

    def test_a_folder_of_a_newer_version(self, machine: Machine, folder: Path) -> None:
        machine("10.3.0")
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        text = json.dumps({**manifest, "format": 99})
        (folder / "manifest.json").write_text(text, encoding="utf-8")
        refused("update simprune-deploy", "build", folder)

    def test_what_the_parser_does_not_take(
        self, machine: Machine, exported: Path, folder: Path, plugin_library: Path
    ) -> None:
        """NVIDIA's own parser, and its own words."""
        machine("10.14.1")
        graph = load_graph(exported / "model.onnx")
        graph.graph.node[-1].op_type = "NoSuchOperator"
        write_model(folder, graph)
        before = names_in(folder)
        refused(
            "TensorRT cannot build model-plugin.onnx for SM 8.7: ",
            "build",
            folder,
            "--plugin",
            plugin_library,
        )
        assert names_in(folder) == before

    def test_export_with_an_engine_checks_first(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        out = tmp_path / "out"
        refused("not installed", "export", tmp_path / "no.pt", "--engine", "-o", out)

    @pytest.mark.parametrize(("capability", "precision"), [((7, 5), "bf16")])
    def test_a_precision_that_the_gpu_lacks(
        self,
        machine: Machine,
        tmp_path: Path,
        plugin_library: Path,
        monkeypatch: pytest.MonkeyPatch,
        capability: tuple[int, int],
        precision: str,
    ) -> None:
        machine("10.3.0", capability)
        monkeypatch.setenv("SIMPRUNE_LIBRARY", str(plugin_library))
        refused(
            "SM 7.5 has no bfloat16",
            "export",
            tmp_path / "no.pt",
            "--engine",
            "--precision",
            precision,
            "-o",
            tmp_path / "out",
        )


class TestTriton:
    """The engine form of a Triton repository; no server here can load it."""

    def test_build(self, machine: Machine, folder: Path, plugin_library: Path) -> None:
        machine("11.4.1", (8, 9))
        build = ("build", folder, "--plugin", plugin_library, "--batch", "1..4", "--triton")
        result = call(*build, "--json")
        assert (result.exit_code, result.stderr) == (0, "")
        answer = json.loads(result.stdout)
        (engine,), (model,) = answer["engines"], answer["triton"]
        place = folder / "triton" / "demo_tensorrt"
        assert (model["path"], model["form"]) == (str(place), "tensorrt")
        assert model["max_batch_size"] == 4
        assert sha256(place / "1" / "model.plan") == engine["engine"]["sha256"]
        assert sha256(place / "plugins" / plugin_library.name) == sha256(plugin_library)
        refused("already exists", *build)
        again = call(*build, "--force")
        assert again.exit_code == 0, again.stderr
        assert "SIMPRUNE_REGISTER=1" in again.stdout

    def test_without_the_plugin(self, machine: Machine, folder: Path) -> None:
        machine("11.4.1", (8, 9))
        result = call("build", folder, "--no-plugin", "--triton")
        assert result.exit_code == 0, result.stderr
        assert not (folder / "triton" / "demo_tensorrt" / "plugins").exists()

    def test_not_for_tensorrt_rtx(self, folder: Path) -> None:
        refused("Triton cannot load", "build", folder, "--target", "rtx-ada", "--triton")
        assert not (folder / "engines").exists()


def test_export_with_an_engine(
    machine: Machine, tmp_path: Path, plugin_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine("11.4.1", (8, 9))
    monkeypatch.setenv("SIMPRUNE_LIBRARY", str(plugin_library))
    out = tmp_path / "out"
    result = call(
        *("export", DEMO, "--layers", "1", "--no-verify", "--precision", "fp16", "-o", out),
        *("--engine", "--triton"),
    )
    assert result.exit_code == 0, result.stderr
    assert names_in(out / "triton") >= {"out_onnx/1/model.onnx", "out_tensorrt/1/model.plan"}
    assert "model-trt-sm89.engine" in result.stdout
    assert read_engine_metadata(out / "engines" / "model-trt-sm89.engine").precision == "fp16"


@pytest.mark.parametrize(
    ("sm", "runs"), [("87", True), ("89", True), ("70", False), ("103", True), ("88", False)]
)
def test_which_gpus_a_library_is_for(plugin_library: Path, sm: str, runs: bool) -> None:
    """88 is a later 8.x, but a Jetson's code and others' are not exchanged; 103 runs 100's."""
    info = read_info(plugin_library)
    expected = runs or (sm == "88" and "86" in info.device_code.sms)
    assert info.device_code.runs_on(sm) is expected


REGISTER = """
import importlib, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2]) if sys.argv[2] else None
trt = importlib.import_module(sys.argv[1])
from simprune_deploy.engine import flavours
flavours.load_plugin(trt, "tensorrt", Path(sys.argv[3]))
print("taken", trt.__version__, flush=True)
import os; os._exit(0)  # a runtime that could not be made crashes where Python would delete it
"""


@pytest.mark.parametrize("version", ["rtx", "10.16.1", "11.0.0", "11.4.0"])
def test_nvidias_registries_take_the_plugin(version: str, plugin_library: Path) -> None:
    """load_plugin on the real registry; TensorRT-RTX's is the same code, and takes it too."""
    if version == "rtx":
        installed_rtx()
        module, place = "tensorrt_rtx", ""
    else:
        module, place = "tensorrt_lean_bindings", str(installed_lean(version))
    command = [sys.executable, "-c", REGISTER, module, place, str(plugin_library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("taken"), done.stderr


def test_tensorrt_rtx_never_gets_the_plugin(plugin_library: Path) -> None:
    with pytest.raises(SimpruneError, match="takes no plugins"):
        flavours.load_plugin(None, "tensorrt-rtx", plugin_library)


def test_polygraphy_cannot_change_its_flavour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(flavours.RTX_VARIABLE, "0")
    import polygraphy.config

    monkeypatch.setattr(polygraphy.config, "USE_TENSORRT_RTX", False)
    with pytest.raises(SimpruneError, match="POLYGRAPHY_USE_TENSORRT_RTX=1 before the program"):
        flavours.choose_for_polygraphy("tensorrt-rtx")
    flavours.choose_for_polygraphy("tensorrt")


class TestVerify:
    """The parity check with engines; ONNX Runtime runs what the engines were built of."""

    @pytest.fixture
    def run_by_onnxruntime(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        """Let ONNX Runtime run in the place of engines; return how it is to go wrong."""
        wrong: dict[str, Any] = {}

        class Double:
            """Plays engine.loaded_engine.Engine."""

            def __init__(self, path: Path, plugin: Path | None, cuda_graph: bool = False) -> None:
                self.metadata = read_engine_metadata(path)
                graph = load_graph(path.parent.parent / "model.onnx")
                if self.metadata.of == "diagnosis":
                    graph = with_diagnostics(graph)
                harm = wrong.get(self.metadata.of)
                if harm is not None:
                    harm(graph)
                self.session = open_session(graph.SerializeToString())
                self.inputs = {each.name: each for each in self.session.get_inputs()}

            def run(self, feed: dict[str, Any]) -> dict[str, Any]:
                names = [each.name for each in self.session.get_outputs()]
                return dict(zip(names, self.session.run(names, feed), strict=True))

            def close(self) -> None: ...

        monkeypatch.setattr(engine_predictor, "Engine", Double)
        return wrong

    @pytest.fixture
    def built(self, machine: Machine, folder: Path, plugin_library: Path) -> Path:
        machine("10.14.1")
        (folder / "plugin").mkdir()
        shutil.copy(plugin_library, folder / "plugin")
        build_here(folder, options=sd_options(batch=(1, 4)))
        return folder

    def test_golden_cases(self, built: Path, run_by_onnxruntime: dict[str, Any]) -> None:
        result = call("verify", built, "--engine", "--json")
        assert (result.exit_code, result.stderr) == (0, "")
        verdict = json.loads(result.stdout)
        assert verdict["status"] == "passed"
        assert verdict["checks"]["same_engine"]["alike"] == 4
        engine = built / "engines" / "model-trt-sm87.engine"
        environment = verdict["environment"]
        assert environment["runtime"] == "TensorRT 10.14.1 on GPU double (SM 8.7), " + engine.name
        assert environment["gpu"] == "GPU double (SM 8.7)"
        assert environment["engine"] == {"file": engine.name, "sha256": sha256(engine)}
        assert environment["plugin"]["sha256"] == sha256(built / "plugin" / libraries.LIBRARY)
        assert environment["decisions_from"].startswith("model-diagnosis-trt-sm87.engine: a second")
        metadata = read_engine_metadata(engine.with_name("model-diagnosis-trt-sm87.engine"))
        assert (metadata.of, metadata.profile) == (
            "diagnosis",
            read_engine_metadata(engine).profile,
        )
        assert read_record(engine.with_name("model-diagnosis-trt-sm87.engine"))[
            "outputs"
        ].keys() >= {
            "logits",
            "diagnosis_1/features",
            "diagnosis_4/assignment",
        }
        assert [each.name for each in (built / "engines").glob("*.onnx")] == [STRIPPED]

    def test_an_engine_by_its_name(self, built: Path, run_by_onnxruntime: dict[str, Any]) -> None:
        engine = built / "engines" / "model-trt-sm87.engine"
        result = call("verify", engine)
        assert result.exit_code == 0, result.stderr
        assert "TensorRT 10.14.1 on GPU double" in " ".join(result.stdout.split())
        refused(
            "engine of another form of the model (diagnosis)",
            "verify",
            engine.with_name("model-diagnosis-trt-sm87.engine"),
        )

    def test_against_pytorch(self, built: Path, run_by_onnxruntime: dict[str, Any]) -> None:
        engine = built / "engines" / "model-trt-sm87.engine"
        result = call("verify", engine, "--reference", DEMO, "--json")
        assert result.exit_code == 0, result.stderr
        verdict = json.loads(result.stdout)
        assert verdict["status"] == "passed"
        assert verdict["checks"]["outputs"]["images"] == 16

    def test_a_wrong_engine(self, built: Path, run_by_onnxruntime: dict[str, Any]) -> None:
        """Both engines give other outputs than PyTorch."""
        run_by_onnxruntime["pruned"] = run_by_onnxruntime["diagnosis"] = shift_the_head
        verdict = sd.verify(built, engine=True)
        assert verdict.status == "failed"
        assert verdict.check("outputs").passed is False
        assert verdict.check("same_engine").passed is True

    def test_engines_that_disagree(self, built: Path, run_by_onnxruntime: dict[str, Any]) -> None:
        """The decisions that are shown are then not those of the engine that ships."""
        run_by_onnxruntime["pruned"] = shift_the_head
        verdict = sd.verify(built, engine=True)
        assert verdict.status == "failed"
        assert verdict.check("same_engine").passed is False
        assert verdict.check("same_engine").numbers["alike"] == 0

    def test_a_wrong_threshold(self, built: Path, run_by_onnxruntime: dict[str, Any]) -> None:
        run_by_onnxruntime["diagnosis"] = run_by_onnxruntime["pruned"] = prune_less
        verdict = sd.verify(built, engine=True)
        assert verdict.status == "failed"
        assert verdict.check("decisions").passed is False

    def test_what_the_runtime_says_is_one_line(
        self, built: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The runtime does not take the engine."""
        double = running_double.Cuda()
        monkeypatch.setattr(cuda, "_bindings", lambda: double)

        class Runtime:
            def __init__(self, logger: Any) -> None:
                self.logger = logger

            def deserialize_cuda_engine(self, data: bytes) -> None:
                self.logger.log(self.logger.ERROR, "Serialization: the magic tag\nis wrong")

        monkeypatch.setattr(sys.modules["tensorrt"], "Runtime", Runtime)
        refused(
            "model-trt-sm87.engine: Serialization: the magic tag is wrong",
            "verify",
            built,
            "--engine",
        )

    def test_another_gpu(
        self, built: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(gpu, "DRIVER", str(driver(tmp_path, (8, 9))))
        says = "was built for SM 8.7 with TensorRT 10.14.1; this is SM 8.9 with 10.14.1: run"
        refused(says, "verify", built, "--engine")
        refused(says, "verify", built / "engines" / "model-trt-sm87.engine")

    def test_no_gpu(self, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu, "DRIVER", "libno-such-driver.so.1")
        refused("no GPU was found here", "verify", built, "--engine")

    def test_another_plugin(self, built: Path, tmp_path: Path) -> None:
        library = tmp_path / "other.so"
        library.write_bytes((built / "plugin" / libraries.LIBRARY).read_bytes() + b"x")
        refused(
            "was built with another libsimprune_plugin.so",
            "verify",
            built,
            "--engine",
            "--plugin",
            library,
        )
        (built / "plugin" / libraries.LIBRARY).unlink()
        refused("no library was found: name it", "verify", built, "--engine")

    def test_a_changed_engine(self, built: Path) -> None:
        with (built / "engines" / "model-trt-sm87.engine").open("ab") as file:
            file.write(b"x")
        refused("is not the engine that was built", "verify", built, "--engine")

    def test_no_engine(self, folder: Path) -> None:
        refused("has no engines: `simprune-deploy build", "verify", folder, "--engine")
        refused("--plugin is for engines", "verify", folder, "--plugin", "x.so")

    def test_inspect(self, built: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        engine = built / "engines" / "model-trt-sm87.engine"
        metadata = json.loads(call("inspect", engine, "--json").stdout)
        assert (metadata["kind"], metadata["of"], metadata["version"]) == (
            "engine",
            "pruned",
            "10.14.1",
        )
        assert (metadata["fits_this_machine"], metadata["problem"]) == (True, None)
        assert (metadata["plugin_layers"], metadata["prune_layers"]) == (3, 3)
        folder = json.loads(call("inspect", built, "--json").stdout)
        assert folder["engines"] == {
            engine.name: "fits this machine; the plugin runs 3 of 3 prune layers"
        }
        monkeypatch.setattr(gpu, "DRIVER", str(driver(tmp_path, (8, 9))))
        metadata = json.loads(call("inspect", engine, "--json").stdout)
        assert metadata["fits_this_machine"] is False
        assert "this is SM 8.9" in metadata["problem"]
        assert "this is SM 8.9" in call("inspect", built).stdout


def shift_the_head(graph: onnx.ModelProto) -> None:
    """Change the outputs by 0.1: add it to the bias of the last layer."""
    last = next(n for n in reversed(graph.graph.node) if read_metadata(graph).output in n.output)
    bias = next(i for i in graph.graph.initializer if i.name in last.input and len(i.dims) == 1)
    values = onnx.numpy_helper.to_array(bias) + np.float32(0.1)
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))


def prune_less(graph: onnx.ModelProto) -> None:
    """Let the first prune layer use another threshold than it was given."""
    (constant,) = [onnx.numpy_helper.from_array(np.float32([0.99]), "wrong_threshold")]
    graph.graph.initializer.append(constant)
    prune_nodes(graph)[0].input[3] = "wrong_threshold"
