"""The command line from end to end: what it writes, prints and answers, and what it refuses.

What needs a process of its own (exit codes as the shell sees them, the two streams, signals, a
Python without torch) runs in one; the rest runs in this process and shares one export.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from cli import cli
from onnx import helper, numpy_helper
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import simprune_deploy
from simprune_deploy.cli import app
from simprune_deploy.common.files import sha256

ARCH = "vit_tiny_patch16_224"
SHAPE = {"img_size": 32, "patch_size": 4, "depth": 3, "embed_dim": 48, "num_heads": 3}
PATCHES, CLASSES = 64, 5
FILES = {"model.onnx", "manifest.json", "parity.json", "golden.npz"}
SAMPLES = Path(simprune_deploy.__file__).parent / "sample_images"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1"}

WITHOUT_TORCH = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "timm", "torchvision", "onnxscript"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
from simprune_deploy.cli import main
main()
"""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a command gave back."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def start(*arguments: object, code: str = "", cwd: Path | None = None) -> subprocess.Popen[str]:
    """Start the command line in a process; `code` replaces its entry point."""
    entry = ["-c", code] if code else ["-m", "simprune_deploy"]
    return subprocess.Popen(
        [sys.executable, *entry, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=ENVIRONMENT,
        # a test run in the background may have been told to ignore Ctrl-C, and would pass that on
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def shell(*arguments: object, code: str = "", cwd: Path | None = None) -> Answer:
    """Run the command line in a process of its own."""
    process = start(*arguments, code=code, cwd=cwd)
    out, err = process.communicate(timeout=120)
    return Answer(process.returncode, out, err)


def call(*arguments: object) -> Answer:
    """Run the command line in this process; an error that it did not expect is raised."""
    result = CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Answer(result.exit_code, result.stdout, result.stderr)


def one_line(answer: Answer) -> str:
    """Check that a command refused with one line on stderr, and return the line."""
    assert answer.code == 2, answer
    assert answer.out == ""
    lines = answer.err.splitlines()
    assert len(lines) == 1, answer.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in lines[0]
    return lines[0]


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Return everything below a folder, hidden or not, with sizes and times."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    } | {path.relative_to(folder).as_posix(): (0, 0) for path in folder.rglob("*") if path.is_dir()}


@pytest.fixture(scope="session")
def vit() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(ARCH, num_classes=CLASSES, **SHAPE).eval()


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory, vit: torch.nn.Module) -> Path:
    """Return a checkpoint that says all of itself: a pruned model, before blocks 1 and 2."""
    path = tmp_path_factory.mktemp("source") / "tiny.safetensors"
    simprune_deploy.save(simprune_deploy.prune(vit, threshold=0.85, layers=[1, 2]), path)
    return path


@pytest.fixture(scope="session")
def first_export(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Answer]:
    """Export once, from a shell, and share the folder. It is not to be changed."""
    folder = tmp_path_factory.mktemp("exported") / "new" / "tiny-pruned"
    return folder, shell("export", source, "-o", folder)


@pytest.fixture(scope="session")
def exported(first_export: tuple[Path, Answer]) -> Path:
    return first_export[0]


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    """Return a copy of the exported folder, to be tampered with."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return an empty current folder in which a refused command must leave nothing."""
    folder = tmp_path / "workplace"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    assert tree(folder) == {}


@pytest.fixture
def no_tracing(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the graph of the shared export in place of tracing another."""
    graph = onnx.load(exported / "model.onnx")
    monkeypatch.setattr("simprune_deploy.onnx.exporter.export_onnx", lambda *_: graph)


def session_of(folder: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        folder / "model.onnx", options, providers=["CPUExecutionProvider"]
    )


def attributes_of(folder: Path) -> list[dict[str, Any]]:
    """Return the attributes of the prune nodes."""
    graph = onnx.load(folder / "model.onnx").graph
    return [
        {each.name: helper.get_attribute_value(each) for each in node.attribute}
        for node in graph.node
        if node.domain == "simprune"
    ]


def rewrite_hashes(folder: Path) -> None:
    """Make a tampered folder's manifest agree with its files."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name, metadata in manifest["files"].items():
        metadata["sha256"] = sha256(folder / name)
    path.write_text(json.dumps(manifest))


def change_model(folder: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    path = folder / "model.onnx"
    graph = onnx.load(path)
    change(graph)
    onnx.save(graph, path)
    return path


def change_golden(folder: Path, **changes: Any) -> Path:
    with np.load(folder / "golden.npz") as file:
        arrays = {name: file[name] for name in file.files}
    for name, change in changes.items():
        arrays[name] = change(arrays[name])
    np.savez_compressed(folder / "golden.npz", **arrays)
    return folder / "model.onnx"


def change_weight(graph: onnx.ModelProto, name: str, change: Callable[[Any], Any]) -> None:
    weight = next(each for each in graph.graph.initializer if each.name == name)
    value = np.asarray(change(numpy_helper.to_array(weight)), np.float32)
    weight.CopyFrom(numpy_helper.from_array(value, name))


def change_facts(graph: onnx.ModelProto, **changes: Any) -> None:
    entry = graph.metadata_props[0]
    entry.value = json.dumps({**json.loads(entry.value), **changes})


class TestShell:
    def test_export_writes_a_proven_folder(self, first_export: tuple[Path, Answer]) -> None:
        folder, answer = first_export
        assert answer.code == 0, answer.err
        assert answer.err == ""
        assert answer.out.rstrip().endswith("verdict: passed")
        for check in ("outputs", "top1", "decisions", "batch invariance", "pruning"):
            assert check in answer.out
        assert {path.name for path in folder.iterdir()} == FILES
        assert os.listdir(folder.parent) == [folder.name]

    def test_help_imports_nothing_heavy(self) -> None:
        code = (
            "import sys\nfrom simprune_deploy.cli import main\ntry:\n    main()\n"
            "except SystemExit as end:\n"
            "    heavy = {'torch', 'timm', 'onnx', 'onnxruntime', 'polygraphy', 'numpy'}\n"
            "    print('loaded', sorted(heavy & set(sys.modules)), end.code)"
        )
        for arguments in (["--help"], ["export", "--help"]):
            answer = shell(*arguments, code=code)
            assert answer.out.rstrip().endswith("loaded [] 0"), answer
            assert answer.err == ""

    def test_version(self) -> None:
        answer = shell("--version")
        assert answer == Answer(0, f"simprune-deploy {simprune_deploy.__version__}\n", "")

    def test_no_command_shows_the_commands(self) -> None:
        answer = shell()
        for command in ("export", "verify", "inspect", "models", "doctor"):
            assert command in answer.out + answer.err

    def test_refusal_is_one_line_on_stderr(self, tmp_path: Path) -> None:
        answer = shell("export", "missing.pt", "-o", "out", "--threshold", "nan", cwd=tmp_path)
        assert "threshold nan is not a number" in one_line(answer)
        assert tree(tmp_path) == {}

    def test_debug_shows_the_traceback(self, tmp_path: Path) -> None:
        answer = shell("--debug", "export", "missing.pt", "--threshold", "3", cwd=tmp_path)
        assert answer.code == 2
        assert "Traceback" in answer.err

    def test_unknown_option_is_an_error_of_use(self, tmp_path: Path) -> None:
        answer = shell("export", "x.pt", "--tresholds", "1", cwd=tmp_path)
        assert answer.code == 2
        assert answer.out == ""
        assert "Traceback" not in answer.err

    def test_golden_cases_verify_without_torch(self, exported: Path) -> None:
        answer = shell("verify", exported, "--json", code=WITHOUT_TORCH)
        assert answer.code == 0, answer.err
        assert answer.err == ""
        assert answer.json["status"] == "passed"
        assert answer.json["checks"]["decisions"]["decisions"] > 0

    def test_inspect_and_doctor_without_torch(self, exported: Path) -> None:
        answer = shell("inspect", exported, "--json", code=WITHOUT_TORCH)
        assert answer.code == 0, answer.err
        assert answer.json["architecture"] == ARCH
        answer = shell("doctor", "--json", code=WITHOUT_TORCH)
        assert "Traceback" not in answer.err
        assert {"healthy", "findings"} <= set(answer.json)

    def test_export_without_torch_names_the_doctor(self, source: Path, tmp_path: Path) -> None:
        answer = shell("export", source, code=WITHOUT_TORCH, cwd=tmp_path)
        line = one_line(answer)
        assert "torch" in line or "timm" in line
        assert "simprune-deploy doctor" in line
        assert tree(tmp_path) == {}

    @pytest.mark.parametrize("stage", ["tracing", "writing"])
    def test_interrupt_leaves_nothing(
        self, stage: str, source: Path, exported: Path, tmp_path: Path
    ) -> None:
        """Ctrl-C ends the run without files, folders or a traceback."""
        begun = "print('begun', flush=True); import time; time.sleep(60)"
        preludes = {
            # into the real tracing, after it began
            "tracing": "import simprune_deploy.onnx.exporter as e\ntrace = e._trace\n"
            "def stop(*a): print('begun', flush=True); trace(*a); trace(*a); return trace(*a)\n"
            "e._trace = stop",
            "writing": "import onnx, simprune_deploy.onnx.exporter as e\n"
            "import simprune_deploy.deploy.export as b\n"
            f"graph = onnx.load({str(exported / 'model.onnx')!r})\n"
            "e.export_onnx = lambda *a: graph\n"
            f"def stop(*a): {begun}\nb.write_json = stop",
        }
        code = preludes[stage] + "\nfrom simprune_deploy.cli import main; main()"
        process = start("export", source, "-o", "deep/out", "--no-verify", code=code, cwd=tmp_path)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            if stage == "writing":
                assert [path for path in tree(tmp_path) if path.endswith("model.onnx")]
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode not in (0, None)
        assert "Traceback" not in out + err
        assert tree(tmp_path) == {}


class TestExport:
    def test_files_describe_the_model(self, exported: Path) -> None:
        manifest = json.loads((exported / "manifest.json").read_text())
        assert manifest["verdict"] == "passed"
        assert set(manifest["files"]) == FILES - {"manifest.json"}
        for name, metadata in manifest["files"].items():
            assert metadata["sha256"] == sha256(exported / name)
            assert metadata["bytes"] == (exported / name).stat().st_size
        assert manifest["model"]["architecture"] == ARCH
        assert manifest["model"]["pruning"]["layers"] == [1, 2]
        (images,), (logits,) = manifest["inputs"], manifest["outputs"]
        batch = images["shape"][0]
        assert images == {"name": "images", "dtype": "float32", "shape": [batch, 3, 32, 32]}
        assert logits == {"name": "logits", "dtype": "float32", "shape": [batch, CLASSES]}
        assert manifest["versions"]["simprune-deploy"] == simprune_deploy.__version__
        parity = json.loads((exported / "parity.json").read_text())
        assert parity["status"] == "passed"
        assert parity["checks"]["pruning"]["pruned_patches"] > 0
        with np.load(exported / "golden.npz") as golden:
            assert golden["images"].shape[1:] == (3, 32, 32)
            assert golden["output"].shape == (len(golden["images"]), CLASSES)

    def test_batch_dimension_has_its_name(self, exported: Path) -> None:
        metadata = call("inspect", exported, "--json").json
        assert metadata["inputs"] == ["images float32[batch, 3, 32, 32]"]
        assert metadata["outputs"] == [f"logits float32[batch, {CLASSES}]"]

    def test_graph_is_valid_and_says_what_it_is(self, exported: Path) -> None:
        graph = onnx.load(exported / "model.onnx")
        onnx.checker.check_model(graph, full_check=True)
        nodes = [node.name for node in graph.graph.node]
        assert len(set(nodes)) == len(nodes)
        assert [each.key for each in graph.metadata_props] == ["simprune"]
        assert len(graph.functions) == 1
        text = str(exported.parent)
        assert text.encode() not in (exported / "model.onnx").read_bytes()

    def test_batches_that_were_not_traced(self, exported: Path) -> None:
        session = session_of(exported)
        images = np.random.default_rng(0).random((5, 3, 32, 32), dtype=np.float32)
        together = session.run(None, {"images": images})[0]
        alone = [session.run(None, {"images": images[i : i + 1]})[0][0] for i in range(5)]
        np.testing.assert_allclose(together, alone, atol=1e-5)

    def test_runtime_threshold(self, source: Path, tmp_path: Path) -> None:
        folder = tmp_path / "out"
        answer = call(
            *("export", source, "-o", folder, "--runtime-threshold", "--emit-assignments"),
            *("--multiple-of", 8, "--batch", "1..4", "--opset", 18, "--json"),
        )
        assert answer.code == 0, answer
        assert answer.err == ""
        result = answer.json
        assert result["output"] == str(folder)
        assert result["verdict"]["status"] == "passed"
        names = [each["name"] for each in result["manifest"]["inputs"]]
        assert names == ["images", "threshold"]
        names = [each["name"] for each in result["manifest"]["outputs"]]
        assert names == ["logits", "assignment_1", "assignment_2"]
        assert onnx.load(folder / "model.onnx").opset_import[0].version == 18
        session = session_of(folder)
        images = np.load(folder / "golden.npz")["images"][:2]
        _, kept_all, _ = session.run(None, {"images": images, "threshold": np.float32([1.5])})
        assert np.array_equal(kept_all, np.tile(np.arange(PATCHES + 1), (2, 1)))
        _, mixed, left = session.run(None, {"images": images, "threshold": np.float32([1.5, -1])})
        assert mixed[0].max() == PATCHES
        assert mixed[1].max() == PATCHES // 2
        assert left.shape[1] % 8 == 0 or left.shape[1] == PATCHES + 1
        assert call("verify", folder).code == 0

    def test_fixed_tokens(self, source: Path, tmp_path: Path) -> None:
        folder = tmp_path / "out"
        answer = call(
            *("export", source, "-o", folder, "--tokens", 16, "--batch", 3, "--opset", 23),
            *("--normalize", "--softmax"),
        )
        assert answer.code == 0, answer
        assert [each["capacity"] for each in attributes_of(folder)] == [32, 16]
        model = onnx.load(folder / "model.onnx")
        assert model.opset_import[0].version == 23
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["inputs"][0]["shape"] == [3, 3, 32, 32]
        assert manifest["outputs"] == [
            {"name": "probabilities", "dtype": "float32", "shape": [3, CLASSES]}
        ]
        golden = np.load(folder / "golden.npz")
        assert 0 <= golden["images"].min() <= golden["images"].max() <= 1
        assert golden["assignment_2"].max() <= 16
        probabilities = session_of(folder).run(None, {"images": golden["images"][:3]})[0]
        np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)

    def test_every_choice_at_once(self, source: Path, vit: torch.nn.Module, tmp_path: Path) -> None:
        pictures = tmp_path / "pictures"
        pictures.mkdir()
        for path in sorted(SAMPLES.glob("*.jpg"))[:2]:
            shutil.copy(path, pictures)
        (pictures / "broken.jpg").write_bytes(b"no picture")
        folder = tmp_path / "out"
        answer = call(
            *("export", source, "-o", folder, "--layers", "0,2", "--tokens", "40,20"),
            *("--selection", "redundancy", "--reduction", "drop", "--no-proportional-attention"),
            *("--place", "inside", "--features", "keys"),
            *("--threshold", 0.3, "--images", pictures),
        )
        assert answer.code == 0, answer
        assert "skipped broken.jpg" in answer.out
        assert [each["capacity"] for each in attributes_of(folder)] == [40, 20]
        for each in attributes_of(folder):
            assert (each["selection"], each["reduction"]) == (b"redundancy", b"drop")
        config = json.loads((folder / "manifest.json").read_text())["model"]["pruning"]
        assert config == {
            **{"threshold": 0.3, "layers": [0, 2], "selection": "redundancy", "reduction": "drop"},
            **{"proportional_attention": False, "capacities": [40, 20], "multiple_of": 1},
            **{"place": "inside", "features": "keys", "curve": None},
        }
        assert "prunes inside blocks" in answer.out
        inspected = call("inspect", folder, "--json").json
        assert inspected["prune_nodes"] == ["prune_inside_block_0", "prune_inside_block_2"]
        assert inspected["pruning"] == config
        parity = json.loads((folder / "parity.json").read_text())
        assert sorted(parity["inputs"]["images"]) == sorted(
            path.name for path in pictures.iterdir() if path.name != "broken.jpg"
        )
        golden = np.load(folder / "golden.npz")
        model = simprune_deploy.prune(
            vit,
            **{"threshold": 0.3, "layers": [0, 2], "tokens": [40, 20], "selection": "redundancy"},
            **{"place": "inside", "features": "keys"},
            reduction="drop",
            proportional_attention=False,
        )
        with torch.inference_mode():
            expected = model(torch.from_numpy(golden["images"])).numpy()
        np.testing.assert_allclose(golden["output"], expected, atol=1e-5)

    def test_no_verify_and_force(
        self, no_tracing: None, source: Path, exported: Path, tmp_path: Path
    ) -> None:
        folder = Path(shutil.copytree(exported, tmp_path / "out"))
        (folder / "stray.txt").write_text("of an earlier run")
        answer = call("export", source, "-o", folder, "--force", "--no-verify", "--json")
        assert answer.code == 0, answer
        assert answer.json["verdict"] is None
        assert answer.json["manifest"]["verdict"] == "not verified"
        assert {path.name for path in folder.iterdir()} == {"model.onnx", "manifest.json"}
        assert os.listdir(tmp_path) == ["out"]
        assert "without golden cases" in one_line(call("verify", folder))

    def test_no_verify_says_so(self, no_tracing: None, source: Path, tmp_path: Path) -> None:
        answer = call("export", source, "-o", tmp_path / "out", "--no-verify")
        assert answer.code == 0
        assert "not verified" in answer.out

    def test_default_name_and_an_empty_folder(
        self,
        no_tracing: None,
        source: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "tiny-pruned").mkdir()
        assert call("export", source, "--no-verify").code == 0
        assert (tmp_path / "tiny-pruned" / "model.onnx").is_file()

    @pytest.mark.parametrize(
        ("threshold", "reason"), [(1.5, "no prune layers"), (1.0, "nothing was pruned")]
    )
    def test_nothing_pruned_is_not_proven(
        self, threshold: float, reason: str, source: Path, tmp_path: Path
    ) -> None:
        folder = tmp_path / "out"
        options = ("--threshold", threshold, "--layers", "1", "--batch", "2", "--json")
        answer = call("export", source, "-o", folder, *options)
        assert answer.code == 1
        assert answer.json["verdict"]["status"] == "inconclusive"
        assert reason in answer.json["verdict"]["reason"]
        assert json.loads((folder / "manifest.json").read_text())["verdict"] == "inconclusive"
        answer = call("verify", folder)
        assert answer.code == 1
        assert answer.out.rstrip().endswith("verdict: inconclusive")


class TestVerify:
    @pytest.mark.parametrize("name", ["", "model.onnx"])
    def test_golden_cases(self, exported: Path, name: str) -> None:
        answer = call("verify", exported / name)
        assert answer.code == 0, answer
        assert answer.err == ""
        assert answer.out.rstrip().endswith("verdict: passed")
        assert "golden cases" in answer.out

    def test_reference(self, exported: Path, source: Path) -> None:
        answer = call("verify", exported, "--reference", source, "--json")
        assert answer.code == 0, answer
        assert answer.json["status"] == "passed"
        assert len(answer.json["inputs"]["images"]) == 8

    def test_another_reference_fails(self, exported: Path, tmp_path: Path) -> None:
        torch.manual_seed(1)
        other = timm.create_model(ARCH, num_classes=CLASSES, **SHAPE).eval()
        simprune_deploy.save(simprune_deploy.prune(other), tmp_path / "other.pt")
        answer = call("verify", exported, "--reference", tmp_path / "other.pt", "--json")
        assert answer.code == 1
        assert answer.json["status"] == "failed"
        assert answer.json["checks"]["outputs"]["passed"] is False

    @pytest.mark.parametrize("name", sorted(FILES - {"manifest.json"}))
    def test_changed_file(self, copy: Path, name: str) -> None:
        with (copy / name).open("ab") as file:
            file.write(b"\0")
        line = one_line(call("verify", copy))
        assert f"{name} is not the file that was exported: its SHA-256 differs" in line
        assert name in one_line(call("inspect", copy))

    @pytest.mark.parametrize("name", sorted(FILES))
    def test_missing_file(self, copy: Path, name: str) -> None:
        (copy / name).unlink()
        assert name in one_line(call("verify", copy))

    @pytest.mark.parametrize(
        ("weight", "change"),
        [
            ("head.weight", lambda value: value * 1.02),
            ("blocks.0.attn.qkv.bias", lambda value: value + 0.05),
            ("pos_embed", lambda value: value * 1.1),
            ("threshold", lambda value: value + 0.01),
        ],
    )
    def test_changed_weights_fail(
        self, copy: Path, weight: str, change: Callable[[Any], Any]
    ) -> None:
        path = change_model(copy, lambda graph: change_weight(graph, weight, change))
        answer = call("verify", path)
        assert answer.code == 1, answer
        assert answer.out.rstrip().endswith("verdict: failed")
        rewrite_hashes(copy)
        assert call("verify", copy, "--json").json["status"] == "failed"

    @pytest.mark.parametrize(
        ("output", "index", "name"),
        [
            ("slots_weighted", 1, "slots_own"),  # a patch takes in itself, not those that went
            ("even_without_slot", 0, "even_padding"),  # what goes is kept as well
            ("slot_rows", 2, "dest"),  # slots are filled with other tokens
        ],
    )
    def test_changed_body_fails(self, copy: Path, output: str, index: int, name: str) -> None:
        def change(graph: onnx.ModelProto) -> None:
            node = next(n for n in graph.functions[0].node if output in n.output)
            node.input[index] = name

        answer = call("verify", change_model(copy, change), "--json")
        assert answer.code == 1
        assert answer.json["status"] == "failed"

    def test_padding_that_is_attended_to_fails(self, copy: Path) -> None:
        def change(graph: onnx.ModelProto) -> None:
            graph.graph.initializer.append(numpy_helper.from_array(np.float32(0), "no_mask"))
            for node in [n for n in graph.graph.node if n.op_type == "Unsqueeze"]:
                if node.input[0].endswith("/kept_log_size"):
                    name, node.output[0] = node.output[0], f"{node.output[0]}/masked"
                    unmasked = helper.make_node("Max", [node.output[0], "no_mask"], [name])
                    graph.graph.node.insert(list(graph.graph.node).index(node) + 1, unmasked)

        answer = call("verify", change_model(copy, change), "--json")
        assert answer.code == 1
        assert answer.json["checks"]["batch_invariance"]["passed"] is False

    def test_changed_golden_decisions_fail(self, copy: Path) -> None:
        def other_slot(assignment: Any) -> Any:
            assignment[0, -1] = 1 if assignment[0, -1] != 1 else 2
            return assignment

        answer = call("verify", change_golden(copy, assignment_1=other_slot), "--json")
        assert answer.code == 1
        assert answer.json["status"] == "failed"
        assert answer.json["checks"]["decisions"]["unexplained_differences"] == 1

    def test_changed_golden_outputs_fail(self, copy: Path) -> None:
        path = change_golden(copy, output=lambda output: output + 0.001)
        answer = call("verify", path, "--json")
        assert answer.code == 1
        assert answer.json["checks"]["outputs"]["passed"] is False
        path = change_golden(copy, output=lambda output: output * np.nan)
        assert call("verify", path).code == 1

    @pytest.mark.parametrize("kind", ["missing", "text", "empty", "cut", "checkpoint", "foreign"])
    def test_no_target(self, kind: str, exported: Path, source: Path, tmp_path: Path) -> None:
        path = tmp_path / "model.onnx"
        if kind == "text":
            path.write_text("hello")
        elif kind == "empty":
            path.touch()
        elif kind == "cut":
            path.write_bytes((exported / "model.onnx").read_bytes()[:50_000])
        elif kind == "checkpoint":
            path = source
        elif kind == "foreign":
            graph = onnx.load(exported / "model.onnx")
            del graph.metadata_props[:]
            onnx.save(graph, path)
        assert path.name in (line := one_line(call("verify", path))) or "metadata" in line

    def test_folder_that_is_none_of_ours(self, tmp_path: Path) -> None:
        assert "holds no manifest.json" in one_line(call("verify", tmp_path))

    @pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"format": 1, "files": 3}'])
    def test_damaged_manifest(self, copy: Path, text: str) -> None:
        (copy / "manifest.json").write_text(text)
        assert "manifest.json is damaged" in one_line(call("verify", copy))
        assert "manifest.json is damaged" in one_line(call("inspect", copy))

    def test_newer_manifest(self, copy: Path) -> None:
        manifest = json.loads((copy / "manifest.json").read_text())
        (copy / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
        assert "update simprune-deploy" in one_line(call("verify", copy))

    def test_images_need_a_reference(self, exported: Path) -> None:
        assert "--reference" in one_line(call("verify", exported, "--images", SAMPLES))

    def test_golden_of_another_shape(self, copy: Path) -> None:
        path = change_golden(copy, images=lambda images: images[:, :, :16])
        assert "the model takes" in one_line(call("verify", path))

    def test_golden_that_is_no_archive(self, copy: Path) -> None:
        (copy / "golden.npz").write_bytes(b"no archive")
        assert "golden.npz" in one_line(call("verify", copy / "model.onnx"))


def decisions_in_padded_batches_shuffled(graph: onnx.ModelProto) -> None:
    """Reverse the tokens of every image that shares its batch with a longer one."""
    main = graph.graph
    for name, value in {"last": [-1], "reverse": [-1], "end": [-99999], "along": [1]}.items():
        main.initializer.append(numpy_helper.from_array(np.int64(value), f"shuffle_{name}"))
    main.initializer.append(numpy_helper.from_array(np.int64([2]), "shuffle_two"))
    main.initializer.append(numpy_helper.from_array(np.int64([99999]), "shuffle_stop"))
    main.initializer.append(numpy_helper.from_array(np.float32([-1e4]), "shuffle_pad"))
    prune = next(node for node in main.node if node.name == "prune_before_block_1")
    at = list(main.node).index(prune) + 1
    tokens, prune.output[0] = prune.output[0], "shuffle_tokens"
    nodes = [
        helper.make_node(
            "Slice",
            ["shuffle_tokens", "shuffle_last", "shuffle_end", "shuffle_along", "shuffle_reverse"],
            ["shuffle_turned"],
        ),
        helper.make_node(
            "Slice",
            [prune.output[1], "shuffle_last", "shuffle_stop", "shuffle_along"],
            ["shuffle_last_size"],
        ),
        helper.make_node("Equal", ["shuffle_last_size", "shuffle_pad"], ["shuffle_flat"]),
        helper.make_node("Unsqueeze", ["shuffle_flat", "shuffle_two"], ["shuffle_padded"]),
        helper.make_node("Where", ["shuffle_padded", "shuffle_turned", "shuffle_tokens"], [tokens]),
    ]
    for offset, node in enumerate(nodes):
        main.node.insert(at + offset, node)


class TestVerdict:
    """A wrong model must not be called verified."""

    def test_model_that_is_wrong_in_padded_batches(
        self, copy: Path, source: Path, tmp_path: Path
    ) -> None:
        path = change_model(copy, decisions_in_padded_batches_shuffled)
        pictures = tmp_path / "pictures"
        pictures.mkdir()
        # the first keeps the most patches, so that it alone is right
        for order, name in enumerate(("gravel", "coffee", "astronaut")):
            shutil.copy(SAMPLES / f"{name}.jpg", pictures / f"{order}.jpg")
        answer = call("verify", path, "--reference", source, "--images", pictures, "--json")
        checks = answer.json["checks"]
        wrong = checks["outputs"]["largest_difference_of_turned_images"]
        if wrong < 10 * checks["outputs"]["tolerance"]:
            pytest.skip("the pictures no longer make the graph wrong")
        assert checks["decisions"]["passed"] is False
        assert answer.json["status"] != "passed"

    @pytest.mark.parametrize("change", ["prefix", "multiple", "comparison", "threshold"])
    def test_graph_that_is_not_what_it_says(self, change: str, copy: Path) -> None:
        def apply(graph: onnx.ModelProto) -> None:
            prune = [node for node in graph.graph.node if node.domain == "simprune"][-1]
            attributes = {each.name: each for each in prune.attribute}
            if change == "prefix":
                attributes["num_prefix_tokens"].i = 0
            elif change == "multiple":
                attributes["multiple_of"].i = 4
            elif change == "comparison":
                node = next(n for n in graph.functions[0].node if "goes" in n.output)
                assert node.op_type == "GreaterOrEqual"
                node.op_type = "Greater"
            else:
                change_weight(graph, "threshold", lambda value: value + 1e-6)

        assert call("verify", change_model(copy, apply), "--json").json["status"] != "passed"

    @pytest.mark.parametrize("change", ["threshold", "layers", "runtime", "width", "classes"])
    def test_metadata_that_is_wrong(self, change: str, copy: Path) -> None:
        metadata = json.loads(onnx.load(copy / "model.onnx").metadata_props[0].value)
        changes = {
            "threshold": {"pruning": {**metadata["pruning"], "threshold": 0.2}},
            "layers": {"pruning": {**metadata["pruning"], "layers": [1]}},
            "runtime": {"export": {**metadata["export"], "runtime_threshold": True}},
            "width": {"embed_dim": 10**9},
            "classes": {"num_classes": 0},
        }[change]
        path = change_model(copy, lambda graph: change_facts(graph, **changes))
        assert call("verify", path).code != 0

    def test_one_picture_still_makes_a_batch(
        self, exported: Path, source: Path, tmp_path: Path
    ) -> None:
        shutil.copy(SAMPLES / "cat.jpg", tmp_path)
        answer = call("verify", exported, "--reference", source, "--images", tmp_path, "--json")
        invariance = answer.json["checks"]["batch_invariance"]["passed"]
        assert invariance is True or answer.json["status"] != "passed"


class TestOtherCommands:
    def test_inspect_folder(self, exported: Path) -> None:
        metadata = call("inspect", exported, "--json").json
        assert metadata["kind"] == "exported folder"
        assert metadata["verdict"] == "passed"
        assert metadata["prune_nodes"] == ["prune_before_block_1", "prune_before_block_2"]
        assert metadata["inputs"][0].startswith("images float32[")
        text = call("inspect", exported)
        assert text.code == 0
        assert text.err == ""
        assert ARCH in text.out

    def test_inspect_onnx(self, exported: Path) -> None:
        metadata = call("inspect", exported / "model.onnx", "--json").json
        assert metadata["kind"] == "ONNX model"
        assert metadata["num_patches"] == PATCHES
        assert metadata["pruning"]["threshold"] == 0.85

    def test_inspect_checkpoint(self, source: Path) -> None:
        metadata = call("inspect", source, "--json").json
        assert metadata["kind"] == "pruned model"
        assert metadata["architecture"] == ARCH
        assert metadata["num_patches"] == PATCHES
        assert metadata["pruning"]["layers"] == [1, 2]
        assert ARCH in call("inspect", source).out

    @pytest.mark.parametrize("kind", ["missing", "text", "empty folder"])
    def test_inspect_refuses(self, kind: str, tmp_path: Path) -> None:
        path = tmp_path / "thing"
        if kind == "text":
            path.write_text("hello")
        elif kind == "empty folder":
            path.mkdir()
        assert "thing" in one_line(call("inspect", path))

    def test_models(self) -> None:
        result = call("models", "vit_tiny_patch16_224", "--json").json
        (row,) = result["prunable"]
        assert (row["name"], row["num_patches"], row["num_prefix_tokens"]) == (ARCH, 196, 1)
        assert result["refused"] == {}
        assert "196" in call("models", ARCH).out

    def test_models_that_cannot_be_pruned(self) -> None:
        result = call("models", "eva02_tiny*", "--json").json
        assert result["prunable"] == []
        assert all("rotary" in reason for reason in result["refused"].values())
        assert "cannot be pruned" in call("models", "resnet18").out

    def test_models_without_a_match(self) -> None:
        assert "no timm architecture matches" in one_line(call("models", "nothing_like_it"))

    def test_doctor(self) -> None:
        answer = call("doctor", "--json")
        assert answer.code == 0
        assert answer.json["healthy"] is True
        assert call("doctor").code == 0

    def test_errors_with_json_leave_stdout_empty(self, tmp_path: Path) -> None:
        for command in ("export", "verify", "inspect"):
            one_line(call(command, tmp_path / "missing", "--json"))


class TestBadOptions:
    """Refused before any work, or with little; nothing is written."""

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--threshold", "nan"], "not a number"),
            (["--threshold", "3"], "outside [-1, 2]"),
            (["--threshold", "-2"], "outside [-1, 2]"),
            (["--threshold", "inf"], "outside [-1, 2]"),
            (["--layers", "7"], "it has blocks 0 to 2"),
            (["--layers=-1"], "it has blocks 0 to 2"),
            (["--layers", "2,1"], "must ascend"),
            (["--layers", "1,1"], "must ascend"),
            (["--layers", ""], "--layers"),
            (["--layers", "one"], "--layers"),
            (["--tokens", "65"], "between 16 and 64"),
            (["--tokens", "0"], "between 16 and 64"),
            (["--tokens", "15"], "or more layers"),
            (["--tokens", "40,50"], "prune layer 2 cannot leave 50 of the 40"),
            (["--tokens", "10,10"], "prune layer 1 cannot leave 10 of the 64"),
            (["--tokens", "40,30,20"], "3 token counts for 2 prune layers"),
            (["--tokens", "30,20,10"], "3 token counts for 2 prune layers"),
            (["--features", "keys"], "add --place inside, or take --features tokens"),
            (["--tokens", "many"], "--tokens"),
            (["--tokens", "16", "--multiple-of", "8"], "exclude each other"),
            (["--multiple-of", "0"], "must be 1 or more"),
            (["--batch", "8..1"], "8..1 is not a range"),
            (["--batch", "0"], "is not a range"),
            (["--batch", "-3"], "is not a range"),
            (["--batch", "1.."], "--batch"),
            (["--batch", "many"], "--batch"),
            (["--opset", "99"], "opset 99 is outside [18, 23]"),
            (["--opset", "17"], "opset 17 is outside [18, 23]"),
            (["--img-size", "0"], "--img-size"),
            (["--img-size", "3"], "--img-size"),
            (["--images", "nowhere"], "nowhere does not exist"),
            (["--images", "nowhere", "--no-verify"], "drop one"),
            (["--arch", "vit_small_patch16_224"], "is a vit_tiny_patch16_224"),
            (["--arch", "vit_tiny_patch16_225"], "did you mean"),
            (["--arch", "resnet50"], "cannot be pruned"),
            (["--arch", "eva02_tiny_patch14_224"], "rotary"),
        ],
    )
    def test_refused(self, options: list[str], words: str, source: Path, workplace: Path) -> None:
        assert words in one_line(call("export", source, "-o", "deep/out", *options))

    @pytest.mark.parametrize(
        "options",
        [["--threshold", "much"], ["--opset", "new"], ["--multiple-of", "x"], ["--nonsense"]],
    )
    def test_options_that_do_not_parse(
        self, options: list[str], source: Path, workplace: Path
    ) -> None:
        answer = call("export", source, *options)
        assert answer.code == 2
        assert answer.out == ""
        assert options[0] in answer.err

    @pytest.mark.parametrize(
        ("option", "choices"),
        [
            ("--selection", "'pairs', 'redundancy'"),
            ("--reduction", "'merge', 'drop'"),
            ("--place", "'before', 'inside'"),
            ("--features", "'tokens', 'keys', 'mean-keys'"),
        ],
    )
    def test_choices(self, option: str, choices: str) -> None:
        assert (
            f"'{option}': 'best' is not one of {choices}" in cli("export", "x", option, "best").line
        )

    def test_pretrained_name_that_cannot_be_pruned(self, workplace: Path) -> None:
        assert "convolutional" in one_line(call("export", "resnet50", "--pretrained"))
        assert "--pretrained" in one_line(call("export", ARCH))

    def test_folders_without_usable_pictures(
        self, source: Path, workplace: Path, tmp_path: Path
    ) -> None:
        pictures = tmp_path / "pictures"
        pictures.mkdir()
        line = one_line(call("export", source, "--images", pictures))
        assert "holds no pictures" in line
        (pictures / "a.jpg").write_bytes(b"no picture")
        line = one_line(call("export", source, "--images", pictures))
        assert "none of the 1 pictures" in line


class TestBadCheckpoints:
    @pytest.fixture
    def weights(self, vit: torch.nn.Module, tmp_path: Path) -> Path:
        path = tmp_path / "weights.pt"
        torch.save(vit.state_dict(), path)
        return path

    @pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
    def test_truncated(self, weights: Path, share: float, workplace: Path) -> None:
        data = weights.read_bytes()
        weights.write_bytes(data[: int(len(data) * share)])
        assert "weights.pt" in one_line(call("export", weights, "--arch", ARCH))

    def test_truncated_safetensors(self, source: Path, tmp_path: Path, workplace: Path) -> None:
        path = tmp_path / "cut.safetensors"
        path.write_bytes(source.read_bytes()[:-100])
        assert "cut.safetensors" in one_line(call("export", path))

    def test_corrupted(self, weights: Path, workplace: Path) -> None:
        data = bytearray(weights.read_bytes())
        middle = len(data) // 2
        data[middle : middle + 64] = bytes(255 - byte for byte in data[middle : middle + 64])
        weights.write_bytes(data)
        assert "damaged" in one_line(call("export", weights, "--arch", ARCH))

    def test_missing(self, workplace: Path) -> None:
        assert "missing.pt does not exist" in one_line(call("export", "missing.pt"))

    def test_junk(self, tmp_path: Path, workplace: Path) -> None:
        path = tmp_path / "junk.pt"
        path.write_bytes(np.random.default_rng(0).bytes(3000))
        assert "not a checkpoint" in one_line(call("export", path))

    def test_no_architecture(self, weights: Path, workplace: Path) -> None:
        assert "--arch" in one_line(call("export", weights))

    def test_wrong_architecture(self, weights: Path, workplace: Path) -> None:
        line = one_line(call("export", weights, "--arch", "vit_small_patch16_224"))
        assert "cls_token is 1x1x48 in the file and 1x1x384 in the model" in line

    def test_pickle_with_code(self, tmp_path: Path, workplace: Path) -> None:
        mark = tmp_path / "ran"

        class Payload:
            def __reduce__(self) -> Any:
                return os.mkdir, (str(mark),)

        path = tmp_path / "payload.pt"
        for write in (torch.save, lambda value, to: to.write_bytes(pickle.dumps(value))):
            write({"state_dict": Payload()}, path)
            assert "payload.pt" in one_line(call("export", path, "--arch", ARCH))
            assert not mark.exists()

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_that_are_no_numbers(
        self, value: float, source: Path, tmp_path: Path, workplace: Path
    ) -> None:
        state = load_file(source)
        state["vit.blocks.1.mlp.fc1.weight"][0, 0] = value
        save_file(state, tmp_path / "diverged.safetensors", {"format": "pt"})
        line = one_line(call("export", tmp_path / "diverged.safetensors"))
        assert "blocks.1.mlp.fc1.weight" in line
        assert "NaN" in line

    def test_weights_that_are_no_numbers_in_python(
        self, vit: torch.nn.Module, workplace: Path
    ) -> None:
        model = deepcopy(vit)
        with torch.no_grad():
            model.head.bias[0] = float("nan")
        with pytest.raises(simprune_deploy.SimpruneError, match=r"head\.bias"):
            simprune_deploy.export(simprune_deploy.prune(model), workplace / "out")

    def test_result_of_an_export(self, exported: Path, workplace: Path) -> None:
        assert "cannot be pruned any more" in one_line(call("export", exported))
        assert "cannot be pruned any more" in one_line(call("export", exported / "model.onnx"))


class TestBadDestinations:
    @pytest.fixture(autouse=True)
    def _quick(self, no_tracing: None) -> None:
        """No export is traced here, should a check be missing."""

    def test_exists(self, source: Path, copy: Path) -> None:
        before = tree(copy.parent)
        assert "--force" in one_line(call("export", source, "-o", copy))
        assert tree(copy.parent) == before

    @pytest.mark.parametrize("force", [[], ["--force"]])
    def test_file(self, source: Path, tmp_path: Path, force: list[str]) -> None:
        path = tmp_path / "out"
        path.write_text("mine")
        assert "is not a folder" in one_line(call("export", source, "-o", path, *force))
        assert "is not a folder" in one_line(call("export", source, "-o", path / "x", *force))
        assert path.read_text() == "mine"
        assert os.listdir(tmp_path) == ["out"]

    def test_force_spares_what_is_not_ours(self, source: Path, tmp_path: Path) -> None:
        folder = tmp_path / "photos"
        folder.mkdir()
        (folder / "a.txt").write_text("mine")
        line = one_line(call("export", source, "-o", folder, "--force"))
        assert "is not a result of this tool" in line
        assert tree(tmp_path).keys() == {"photos", "photos/a.txt"}

    def test_force_spares_what_the_result_is_made_of(self, tmp_path: Path) -> None:
        for name in ("manifest.json", "model.safetensors"):
            (tmp_path / name).write_text("{}")
        checkpoint = tmp_path / "model.safetensors"
        line = one_line(call("export", checkpoint, "-o", tmp_path, "--force"))
        assert "which this is made of" in line
        assert checkpoint.exists()

    def test_force_spares_links(self, source: Path, copy: Path, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(copy)
        assert "give another one" in one_line(
            call("export", source, "-o", tmp_path / "link", "--force")
        )
        assert (copy / "model.onnx").is_file()

    @pytest.mark.skipif(
        not hasattr(os, "geteuid") or os.geteuid() == 0,
        reason="root may write anywhere; the next test simulates it",
    )
    def test_parent_not_writable(self, source: Path, tmp_path: Path) -> None:
        tmp_path.chmod(0o555)
        try:
            line = one_line(call("export", source, "-o", tmp_path / "deep" / "out"))
        finally:
            tmp_path.chmod(0o755)
        assert "is not writable" in line
        assert tree(tmp_path) == {}

    def test_parent_that_says_it_is_not_writable(
        self, source: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def access(path: Any, mode: int, **_: Any) -> bool:
            return not mode & os.W_OK

        monkeypatch.setattr("simprune_deploy.common.files.os.access", access)
        assert "is not writable" in one_line(call("export", source, "-o", "deep/out"))

    def test_parent_that_refuses_late(
        self, source: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: Any, **__: Any) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr("simprune_deploy.common.files.tempfile.mkdtemp", refuse)
        line = one_line(call("export", source, "-o", "deep/out", "--no-verify"))
        assert "Permission denied" in line

    @pytest.mark.parametrize("what", ["model", "golden", "manifest"])
    def test_disk_full(
        self, what: str, source: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        writer = {
            "model": "pathlib.Path.write_bytes",
            "golden": "numpy.savez_compressed",
            "manifest": "simprune_deploy.deploy.export.sha256",
        }[what]
        monkeypatch.setattr(writer, full)
        assert "no space left" in one_line(call("export", source, "-o", "deep/out"))

    def test_disk_full_keeps_the_earlier_result(
        self, source: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = tree(copy.parent)

        def full(path: Path, data: bytes) -> int:
            with path.open("wb") as file:
                file.write(data[:1000])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("pathlib.Path.write_bytes", full)
        line = one_line(call("export", source, "-o", copy, "--force", "--no-verify"))
        assert "no space left" in line
        assert tree(copy.parent) == before

    def test_name_too_long(self, source: Path, workplace: Path) -> None:
        one_line(call("export", source, "-o", "x" * 300, "--no-verify"))


class TestDamagedResults:
    """A damaged or foreign part of a result gets a line, not a traceback."""

    @pytest.mark.parametrize("entry", [3, {}])
    def test_manifest_entry(self, copy: Path, entry: Any) -> None:
        manifest = json.loads((copy / "manifest.json").read_text())
        manifest["files"]["model.onnx"] = entry
        (copy / "manifest.json").write_text(json.dumps(manifest))
        one_line(call("verify", copy))

    def test_manifest_without_verdict(self, copy: Path) -> None:
        manifest = json.loads((copy / "manifest.json").read_text())
        del manifest["verdict"]
        (copy / "manifest.json").write_text(json.dumps(manifest))
        one_line(call("inspect", copy))

    def test_manifest_as_model(self, exported: Path) -> None:
        one_line(call("verify", exported / "manifest.json"))

    def test_golden_with_flipped_bytes(self, copy: Path) -> None:
        data = bytearray((copy / "golden.npz").read_bytes())
        data[3000:3050] = bytes(255 - byte for byte in data[3000:3050])
        (copy / "golden.npz").write_bytes(data)
        one_line(call("verify", copy / "model.onnx"))

    @pytest.mark.parametrize("columns", [slice(0, 3), 0])
    def test_golden_output_of_another_shape(self, copy: Path, columns: Any) -> None:
        path = change_golden(copy, output=lambda output: output[:, columns])
        one_line(call("verify", path))

    def test_golden_decisions_of_another_type(self, copy: Path) -> None:
        one_line(call("verify", change_golden(copy, assignment_1=lambda a: a.astype(float))))

    def test_metadata_without_batch(self, copy: Path) -> None:
        one_line(call("verify", change_model(copy, lambda g: change_facts(g, export={}))))

    def test_prune_node_with_another_name(self, copy: Path) -> None:
        def change(graph: onnx.ModelProto) -> None:
            next(n for n in graph.graph.node if n.domain == "simprune").name = "renamed"

        one_line(call("verify", change_model(copy, change)))

    def test_without_the_function(self, copy: Path) -> None:
        def change(graph: onnx.ModelProto) -> None:
            del graph.functions[:]

        answer = call("verify", change_model(copy, change), "--json")
        assert answer.code == 1
        assert answer.json["status"] == "failed"
        assert "function body" in answer.json["reason"]

    def test_prune_layer_taken_out(self, copy: Path) -> None:
        def change(graph: onnx.ModelProto) -> None:
            gone = [node for node in graph.graph.node if node.domain == "simprune"][-1]
            names = dict(zip(gone.output[:2], gone.input[:2], strict=True))
            for node in graph.graph.node:
                for index, name in enumerate(node.input):
                    node.input[index] = names.get(name, name)
            graph.graph.node.remove(gone)

        answer = call("verify", change_model(copy, change))
        assert answer.code in (1, 2)
