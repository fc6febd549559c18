"""TensorRT-RTX engines: really built from the demo model, on a machine without a GPU.

Where a test is about files and messages, a script takes the place of the worker process; what the
builder itself does is only ever told by the builder.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import onnx
import pytest
import timm
from onnx import TensorProto, helper
from places import ROOT
from typer.testing import CliRunner

import simprune_deploy as sd
from simprune_deploy.cli import app
from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.common.files import sha256
from simprune_deploy.engine import process
from simprune_deploy.engine import worker as engine_worker
from simprune_deploy.engine.build import BuiltEngine, EngineOptions, build_engine
from simprune_deploy.engine.builders import ahead_of_time, check_targets
from simprune_deploy.engine.engine_metadata import TENSORRT_RTX, FileStamp, read_engine_metadata
from simprune_deploy.engine.folder_engines import build_ahead
from simprune_deploy.engine.profile import optimization_profile
from simprune_deploy.engine.targets import HERE, Fact, find_targets

sys.path.insert(0, str(ROOT / "benchmarks"))

from engine_build import fused_attentions

DEMO = ROOT / "examples" / "fashion_mnist" / "vit"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1"}
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed"
)


def export(folder: Path, tokens: Any = "dynamic", **options: Any) -> Path:
    pruned = sd.prune(sd.load(str(DEMO)), threshold=0.9, layers=[1, 3, 4], tokens=tokens)
    sd.export(pruned, folder, sd.ExportOptions(**options), verify=False)
    return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an export of the demo model. It is not to be changed."""
    return export(tmp_path_factory.mktemp("engines") / "demo")


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """Return a copy of the export, to build in."""
    return Path(shutil.copytree(exported, tmp_path / "demo"))


@pytest.fixture(scope="session")
def portable(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> BuiltEngine:
    """Return one engine for four GPUs, really built. It is not to be changed."""
    copy = Path(shutil.copytree(exported, tmp_path_factory.mktemp("portable") / "demo"))
    (engine,) = build_ahead(copy, find_targets("rtx,dgx-spark"))
    return engine


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> Path:
    """Put a script in the worker's place; it finds its request in `request`."""
    script = tmp_path / "worker.py"
    head = "import json, os, signal, sys, time\nrequest = json.load(sys.stdin)\n"
    script.write_text(head + code, encoding="utf-8")
    monkeypatch.setattr(process, "WORKER", [sys.executable, str(script)])
    return script


ANSWER = """
open(request["output"], "wb").write(os.urandom(64))
answer = {"status": "built by a script", "checked": "nothing", "polygraphy": "0"}
answer["plugin_layers"] = request["plugin_layers"]
print("simprune:answer", json.dumps(answer))
"""


@needs_rtx
class TestRealBuilds:
    def test_one_engine_for_four_gpus(self, portable: BuiltEngine) -> None:
        metadata = portable.metadata
        assert portable.path.name == "model-rtx-sm86-sm89-sm120-sm121.engine"
        assert not portable.cached
        assert json.loads(portable.metadata_path.read_text(encoding="utf-8")) == metadata.to_dict()
        assert read_engine_metadata(portable.path) == metadata
        assert metadata.compute_capabilities == ("8.6", "8.9", "12.0", "12.1")
        assert metadata.targets == ("rtx-ampere", "rtx-ada", "rtx-blackwell", "dgx-spark")
        model = portable.path.parent.parent / "model.onnx"
        assert metadata.onnx == FileStamp.of(model)
        assert metadata.engine == FileStamp.of(portable.path)
        assert metadata.engine.bytes > model.stat().st_size
        assert (metadata.flavour, metadata.of, metadata.precision) == (
            "tensorrt-rtx",
            "pruned",
            "fp32",
        )
        assert (metadata.gpu, metadata.cuda, metadata.plugin, portable.trtexec) == (None,) * 4
        assert (metadata.prune_layers, metadata.plugin_layers) == (3, 0)
        assert metadata.profile == {
            "images": {"min": [1, 1, 28, 28], "opt": [1, 1, 28, 28], "max": [8, 1, 28, 28]}
        }
        assert names_in(portable.path.parent) == {portable.path.name, portable.metadata_path.name}

    def test_nothing_is_said_to_be_verified(self, portable: BuiltEngine) -> None:
        text = portable.metadata_path.read_text(encoding="utf-8")
        assert portable.metadata.status.startswith("built, not run")
        assert "outputs" in portable.metadata.not_checked
        assert not {"verified", "passed"} & set(text.replace('"', " ").split())

    def test_one_engine_for_each(self, folder: Path) -> None:
        engines = build_ahead(folder, find_targets("rtx-ada,gb10"), per_target=True)
        assert [each.path.name for each in engines] == [
            "model-rtx-sm89.engine",
            "model-rtx-sm121.engine",
        ]
        assert [each.metadata.targets for each in engines] == [("rtx-ada",), ("dgx-spark",)]

    def test_fixed_tokens_a_fixed_batch_and_a_runtime_threshold(self, tmp_path: Path) -> None:
        options = {"batch": (2, 2), "runtime_threshold": True, "precision": "fp16"}
        made = export(tmp_path / "fixed", tokens=60, **options)
        (engine,) = build_ahead(made, find_targets("rtx,dgx-spark"))
        assert engine.metadata.precision == "fp16"
        assert fused_attentions(engine.path, made / "model.onnx") == (6, 6)
        profile = engine.metadata.profile
        assert profile["images"]["min"] == profile["images"]["max"] == [2, 1, 28, 28]
        assert profile["threshold"] == {"min": [1], "opt": [1], "max": [2]}

    @pytest.mark.parametrize("of", ["dense", "diagnosis"])
    def test_the_other_forms_of_a_model(self, tmp_path: Path, of: str) -> None:
        """What the verdict and the comparison on a device need, in bfloat16."""
        made = export(tmp_path / "bf16", precision="bf16", runtime_threshold=True)
        (builder,) = ahead_of_time(find_targets("rtx-blackwell"))
        options = EngineOptions(batch=(2, 4), opt_batch=3, workspace_mib=512)
        engine = build_engine(made / "model.onnx", builder, options, of=of)
        assert engine.path.name == f"model-{of}-rtx-sm120.engine"
        assert (engine.metadata.of, engine.metadata.precision) == (of, "bf16")
        assert engine.metadata.profile["images"]["opt"] == [3, 1, 28, 28]
        assert ("threshold" in engine.metadata.profile) == (of == "diagnosis")
        assert fused_attentions(engine.path, made / "model.onnx") == (6, 6)
        assert names_in(engine.path.parent) == {engine.path.name, engine.metadata_path.name}

    def test_a_full_size_vit_with_three_prune_layers(self, tmp_path: Path) -> None:
        """Random weights: what is built and how large it is depends on the graph alone."""
        vit = timm.create_model("vit_small_patch16_224", pretrained=False).eval()
        pruned = sd.prune(vit, threshold=0.85, layers=[3, 6, 9])
        sd.export(pruned, tmp_path / "s", sd.ExportOptions(precision="fp16"), verify=False)
        (engine,) = build_ahead(tmp_path / "s", find_targets("rtx,dgx-spark"))
        assert engine.metadata.profile["images"]["max"] == [8, 3, 224, 224]
        assert engine.path.stat().st_size > (tmp_path / "s" / "model.onnx").stat().st_size
        assert fused_attentions(engine.path, tmp_path / "s" / "model.onnx") == (12, 12)

    @pytest.mark.parametrize(("precision", "tokens"), [("fp16", "dynamic"), ("bf16", 60)])
    def test_in_16_bits_every_attention_is_fused(
        self, tmp_path: Path, precision: str, tokens: Any
    ) -> None:
        """(Other forms are counted in the tests beside this one.)"""
        made = export(tmp_path / "demo", tokens, precision=precision)
        (engine,) = build_ahead(made, find_targets("rtx-ada"))
        assert fused_attentions(engine.path, made / "model.onnx") == (6, 6)

    def test_in_float32_no_attention_is_fused(self, portable: BuiltEngine) -> None:
        """Why a target with TensorRT chooses float16 where nobody asks for a precision."""
        model = portable.path.parent.parent / "model.onnx"
        assert fused_attentions(portable.path, model) == (0, 6)

    def test_what_an_engine_does_not_name_is_not_counted(
        self, portable: BuiltEngine, tmp_path: Path
    ) -> None:
        silent = tmp_path / "silent.engine"
        silent.write_bytes(
            portable.path.read_bytes().replace(b"Layer: Softmax_4", b"Layer: Hardmax")
        )
        model = portable.path.parent.parent / "model.onnx"
        with pytest.raises(ValueError, match=r"names no kernel of Softmax_4$"):
            fused_attentions(silent, model)

    def test_progress_names_the_builders_phases(self, folder: Path) -> None:
        said: list[str] = []
        build_ahead(folder, find_targets("rtx-ada"), progress=said.append)
        assert said[0] == "building for SM 8.9"
        assert len(said) > 3
        assert all(line.startswith("building for SM 8.9") for line in said)

    def test_what_the_builder_refuses_is_told_in_its_own_words(self, folder: Path) -> None:
        """SM 7.5 has no float32 matrix products; the targets file keeps it from the builder."""
        (turing,) = find_targets("rtx-turing")
        facts = {**turing.facts, "build": Fact(HERE, ("a test",))}
        before = names_in(folder)
        with pytest.raises(SimpruneError, match="FP32 GEMM is not supported") as raised:
            build_ahead(folder, [dataclasses.replace(turing, facts=facts)])
        assert str(raised.value).startswith("TensorRT-RTX cannot build model.onnx for SM 7.5: ")
        assert names_in(folder) == before

    def test_a_node_that_the_parser_does_not_know(self, folder: Path) -> None:
        model = onnx.load(folder / "model.onnx")
        model.graph.node[-1].op_type = "NoSuchOperator"
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(SimpruneError, match="NoSuchOperator"):
            build_engine(folder / "model.onnx", ahead_of_time(find_targets("rtx-ada"))[0])

    @pytest.mark.parametrize("harm", ["cut", "size", "table", "mark"])
    def test_a_damaged_engine_is_noticed(self, portable: BuiltEngine, harm: str) -> None:
        trt: Any = importlib.import_module("tensorrt_rtx")
        data = portable.path.read_bytes()
        assert engine_worker.check_engine(trt, TENSORRT_RTX, data)[0].startswith("built, not run")
        at = {"size": 20, "table": 100, "mark": 0}
        damaged = bytearray(data[:-1] if harm == "cut" else data)
        if harm in at:
            damaged[at[harm]] ^= 1
        with pytest.raises(RuntimeError, match="cannot be read back"):
            engine_worker.check_engine(trt, TENSORRT_RTX, bytes(damaged))


@pytest.mark.parametrize(("limit", "told"), [(64, True), (None, False)])
def test_a_workspace_that_is_too_small(limit: int | None, told: bool, monkeypatch: Any) -> None:
    said = "[E] Error Code 4: no implementation within workspace limit"
    monkeypatch.setattr(process, "WORKER", [sys.executable, "-c", f"print({said!r})"])
    request = {"flavour": "tensorrt", "model": "m.onnx", "workspace_mib": limit}
    with pytest.raises(SimpruneError, match="within workspace limit") as raised:
        process.run_worker(request, "SM 8.7", Path("m.engine"), print)
    hint = "workspace_mib=64 may be too small: raise it, or leave it out"
    assert str(raised.value).endswith(hint) is told


OTHER: dict[str, Any] = {
    "version": "1.6.0",
    "profile": {"images": {"min": [1], "opt": [1], "max": [1]}},
    "targets": ["rtx-ada"],
    "compute_capabilities": ["8.9"],
    "format": 1,
    "onnx": {"file": "model.onnx", "bytes": 1, "sha256": "0" * 64},
    "of": "dense",
    "precision": "fp16",
    "workspace_mib": 100,
    "plugin": {"file": "libsimprune_plugin.so", "bytes": 1, "sha256": "0" * 64},
}
"""By fact, another value than the engine's of the test."""


@needs_rtx
class TestCache:
    TARGETS = "rtx-ada,dgx-spark"

    @pytest.fixture
    def built(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BuiltEngine:
        worker(tmp_path, monkeypatch, ANSWER)
        return self.build(folder)

    def build(self, folder: Path, names: str = TARGETS, **options: Any) -> BuiltEngine:
        (engine,) = build_ahead(folder, find_targets(names), **options)
        return engine

    def test_the_same_is_not_built_again(self, built: BuiltEngine, folder: Path) -> None:
        before = built.path.stat()
        again = self.build(folder)
        assert again.cached
        assert again.metadata == built.metadata
        assert built.path.stat().st_mtime_ns == before.st_mtime_ns

    def test_the_order_of_targets_does_not_matter(self, built: BuiltEngine, folder: Path) -> None:
        assert self.build(folder, "dgx-spark,rtx-ada").cached

    def test_force_builds_again(self, built: BuiltEngine, folder: Path) -> None:
        again = self.build(folder, options=EngineOptions(force=True))
        assert not again.cached
        assert again.metadata.engine.sha256 != built.metadata.engine.sha256

    @pytest.mark.parametrize("change", OTHER)
    def test_built_from_something_else(self, built: BuiltEngine, folder: Path, change: str) -> None:
        built.metadata_path.write_text(
            json.dumps({**built.metadata.to_dict(), change: OTHER[change]}), encoding="utf-8"
        )
        assert not self.build(folder).cached
        assert self.build(folder).cached

    @pytest.mark.parametrize("harm", ["engine changed", "engine gone", "no metadata", "no JSON"])
    def test_damaged_or_half_there(self, built: BuiltEngine, folder: Path, harm: str) -> None:
        if harm == "engine changed":
            built.path.write_bytes(built.path.read_bytes() + b"x")
        elif harm == "engine gone":
            built.path.unlink()
        elif harm == "no metadata":
            built.metadata_path.unlink()
        else:
            built.metadata_path.write_text("[1", encoding="utf-8")
        assert not self.build(folder).cached
        assert self.build(folder).cached

    def test_another_target_is_another_engine(self, built: BuiltEngine, folder: Path) -> None:
        other = self.build(folder, "rtx-ada")
        assert not other.cached
        assert other.path != built.path
        assert self.build(folder).cached

    def test_the_manifest_stays_as_it_was(
        self, built: BuiltEngine, folder: Path, exported: Path
    ) -> None:
        assert sha256(folder / "manifest.json") == sha256(exported / "manifest.json")
        assert built.path.parent == folder / "engines"


@needs_rtx
class TestFailures:
    @pytest.mark.parametrize(
        ("code", "says"),
        [
            ("os.kill(os.getpid(), signal.SIGKILL)", "ended by SIGKILL: it may have run out of"),
            ("os.kill(os.getpid(), signal.SIGSEGV)", "the builder was ended by SIGSEGV"),
            ("sys.exit(7)", r"it gave no reason \(exit code 7\)"),
            ("print('[E] first')\nprint('[E] the reason')\nsys.exit(1)", "the reason$"),
            (
                "open(request['output'], 'wb').write(b'half')\n"
                "print('simprune:answer', json.dumps({'errno': 28, 'error': 'x'}))",
                "no space left to write .*model-rtx-sm89.engine: free some",
            ),
        ],
    )
    def test_one_line_and_nothing_half_written(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, says: str
    ) -> None:
        worker(tmp_path, monkeypatch, code)
        before = names_in(folder)
        with pytest.raises(SimpruneError, match=says):
            build_ahead(folder, find_targets("rtx-ada"))
        assert names_in(folder) == before

    def test_an_earlier_engine_survives(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        worker(tmp_path, monkeypatch, ANSWER)
        (engine,) = build_ahead(folder, find_targets("rtx-ada"))
        worker(tmp_path, monkeypatch, "sys.exit(1)")
        before = names_in(folder)
        with pytest.raises(SimpruneError, match="cannot build"):
            build_ahead(folder, find_targets("rtx-ada"), options=EngineOptions(force=True))
        assert names_in(folder) == before
        assert sha256(engine.path) == engine.metadata.engine.sha256

    def test_the_worker_reports_a_full_disk(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        def full(request: dict[str, Any]) -> dict[str, Any]:
            raise OSError(errno.ENOSPC, "No space left on device")

        (tmp_path / "request").write_text("{}", encoding="utf-8")
        monkeypatch.setattr(engine_worker, "build", full)
        with (tmp_path / "request").open() as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            assert engine_worker.main() == 1
        answer = json.loads(capsys.readouterr().out.removeprefix("simprune:answer "))
        assert answer["errno"] == errno.ENOSPC

    def test_interrupted(self, folder: Path) -> None:
        before = names_in(folder)
        process = subprocess.Popen(
            [sys.executable, "-m", "simprune_deploy", "build", str(folder), "--target", "rtx"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        deadline = time.monotonic() + 60
        while not (started := children.read_text().split()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert started, "no worker was started"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out) == (130, ""), err
        assert names_in(folder) == before
        assert not Path(f"/proc/{started[0]}").exists()


class TestRefusedBeforeAnyWork:
    @pytest.mark.parametrize(
        "names", ["jetson-orin-nano", "rtx-ada,jetson-agx-thor", "igx-thor", "rtx-turing"]
    )
    def test_targets_that_build_on_the_device(self, names: str) -> None:
        with pytest.raises(SimpruneError, match="built on the device") as raised:
            check_targets(find_targets(names))
        assert "`simprune-deploy bundle FOLDER --target " in str(raised.value)

    def test_tensorrt_rtx_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
        with pytest.raises(SimpruneError, match=r"not installed: pip install tensorrt-rtx$"):
            check_targets(find_targets("rtx-ada"))

    def test_tensorrt_rtx_is_too_old(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = types.ModuleType("tensorrt_rtx")
        module.__version__ = "1.0.0"  # type: ignore[attr-defined]
        module.ComputeCapability = types.SimpleNamespace(SM89=89)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", module)
        assert check_targets(find_targets("rtx-ada")) == "1.0.0"
        with pytest.raises(SimpruneError, match=r"not know SM 12\.1: pip install .* --upgrade"):
            check_targets(find_targets("rtx-ada,dgx-spark"))

    def test_a_capability_that_is_unknown(self) -> None:
        (orin,) = find_targets("igx-orin")
        facts = {**orin.facts, "build": Fact(HERE, ("a test",))}
        with pytest.raises(SimpruneError, match="compute capability is unknown"):
            check_targets([dataclasses.replace(orin, facts=facts)])


class TestProfile:
    def graph(self, **shapes: list[int | str]) -> onnx.ModelProto:
        values = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in shapes.items()
        ]
        return helper.make_model(helper.make_graph([], "g", values, []))

    def test_the_batch_range_is_the_graphs_own(self) -> None:
        profile = optimization_profile(self.graph(images=["batch", 3, 8, 8]), (2, 6))
        assert profile == {
            "images": {"min": [2, 3, 8, 8], "opt": [2, 3, 8, 8], "max": [6, 3, 8, 8]}
        }

    def test_a_threshold_is_one_number_or_one_for_each_image(self) -> None:
        graph = self.graph(images=["batch", 3, 8, 8], threshold=["thresholds"])
        profile = optimization_profile(graph, (2, 6))
        assert profile["threshold"] == {"min": [1], "opt": [1], "max": [6]}

    def test_another_free_dimension_is_refused(self) -> None:
        with pytest.raises(SimpruneError, match="'images' has a free dimension"):
            optimization_profile(self.graph(images=["batch", 3, "height", 8]), (1, 8))


def shell(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "simprune_deploy", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )


@needs_rtx
class TestCommandLine:
    def test_a_new_user_exports_builds_and_verifies(self, tmp_path: Path) -> None:
        folder = tmp_path / "out"
        done = shell("export", DEMO, "--layers", "1,3,4", "--target", "rtx-ada", "-o", folder)
        assert done.returncode == 0, done.stderr
        for text in ("verdict: passed", "model-rtx-sm89.engine", "built, not run"):
            assert text in done.stdout
        again = shell("build", folder, "--target", "rtx-ada", "--json")
        assert again.returncode == 0
        assert again.stderr == ""
        (engine,) = json.loads(again.stdout)["engines"]
        assert engine["cached"]
        assert Path(engine["path"]) == folder / "engines" / "model-rtx-sm89.engine"
        assert shell("verify", folder).returncode == 0

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["--target", "rtx-adda"], "did you mean rtx-ada"),
            (["--target", "jetson-orin"], "built on the device"),
            (["--target", ""], "--target is empty"),
            (["--per-target"], "name the targets"),
            (["--target", "rtx-ada", "--plugin", "x.so"], "takes no plugins"),
            (["--target", "rtx-ada", "--no-plugin"], "takes no plugins"),
            (["--plugin", "x.so", "--no-plugin"], "contradict each other"),
            (["--target", "rtx-ada", "--batch", "1..9"], "outside 1..8"),
            (["--target", "rtx-ada", "--batch", "2..4", "--opt-batch", "1"], "outside the batches"),
            (["--target", "rtx-ada", "--batch", "few"], "is not understood"),
            (["--target", "rtx-ada", "--workspace", "0"], "not between 1 and"),
        ],
    )
    def test_bad_calls(self, folder: Path, arguments: list[str], says: str) -> None:
        before = names_in(folder)
        result = CliRunner().invoke(app, ["build", str(folder), *arguments])
        assert (result.exit_code, result.stdout) == (2, "")
        assert len(result.stderr.splitlines()) == 1
        assert says in result.stderr
        assert names_in(folder) == before

    @pytest.mark.parametrize("verdict", ["failed", "inconclusive"])
    def test_what_is_not_proven_gets_no_engine(self, folder: Path, verdict: str) -> None:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        text = json.dumps({**manifest, "verdict": verdict})
        (folder / "manifest.json").write_text(text, encoding="utf-8")
        self.refused(folder, f"'{verdict}', and engines are built of verified exports")

    def test_a_changed_model(self, folder: Path) -> None:
        with (folder / "model.onnx").open("ab") as file:
            file.write(b"x")
        self.refused(folder, "is not the file that was exported")

    def test_no_exported_folder(self, tmp_path: Path) -> None:
        self.refused(tmp_path, "holds no manifest.json")
        self.refused(tmp_path / "nothing", "holds no manifest.json")

    def test_a_file_where_the_engines_go(self, folder: Path) -> None:
        (folder / "engines").write_text("mine", encoding="utf-8")
        self.refused(folder, "cannot write")
        assert (folder / "engines").read_text(encoding="utf-8") == "mine"

    def refused(self, folder: Path, says: str) -> None:
        before = names_in(folder) if folder.exists() else set()
        result = CliRunner().invoke(app, ["build", str(folder), "--target", "rtx-ada"])
        assert (result.exit_code, result.stdout) == (2, "")
        assert len(result.stderr.splitlines()) == 1
        assert says in result.stderr
        assert (names_in(folder) if folder.exists() else set()) == before

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["--target", "rtx-adda"], "did you mean rtx-ada"),
            (["--per-target"], "name the targets"),
        ],
    )
    def test_export_refuses_before_it_loads_the_model(
        self, tmp_path: Path, arguments: list[str], says: str
    ) -> None:
        call = ["export", str(tmp_path / "no.pt"), "-o", str(tmp_path / "out"), *arguments]
        result = CliRunner().invoke(app, call)
        assert result.exit_code == 2
        assert says in result.stderr
        assert names_in(tmp_path) == set()

    def test_export_stays_when_its_engine_cannot_be_built(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        worker(tmp_path, monkeypatch, "print('[E] too hard')\nsys.exit(1)")
        out = tmp_path / "out"
        call = ["export", str(DEMO), "--layers", "1", "--no-verify", "--target", "rtx", "-o", out]
        result = CliRunner().invoke(app, list(map(str, call)))
        assert result.exit_code == 2
        assert "too hard" in result.stderr
        assert f"the export in {out} is complete" in result.stderr
        assert names_in(out) == {"model.onnx", "manifest.json"}

    def test_export_with_json(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        worker(tmp_path, monkeypatch, ANSWER)
        result = self.export(tmp_path, "--no-verify", "--json", "--per-target", "--target", "rtx")
        assert (result.exit_code, result.stderr) == (0, "")
        engines = json.loads(result.stdout)["engines"]
        assert [each["compute_capabilities"] for each in engines] == [["8.6"], ["8.9"], ["12.0"]]
        assert all(Path(each["path"]).is_file() for each in engines)

    def test_export_that_is_not_proven_builds_none(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Above 1 nothing is pruned, which shows nothing."""
        worker(tmp_path, monkeypatch, ANSWER)
        result = self.export(tmp_path, "--threshold", "1.5", "--target", "rtx-ada")
        assert result.exit_code == 1
        assert "no engine was built: the parity check did not pass" in result.stdout
        assert not (tmp_path / "out" / "engines").exists()

    def export(self, tmp_path: Path, *arguments: str) -> Any:
        call = ["export", str(DEMO), "--layers", "1", "-o", str(tmp_path / "out"), *arguments]
        return CliRunner().invoke(app, call)
