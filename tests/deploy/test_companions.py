"""The companion files of an export: proven beside model.onnx, or not there; and tools on them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from places import ROOT
from typer.testing import CliRunner

import simprune_deploy as sd
from simprune_deploy.cli import app
from simprune_deploy.common.files import sha256, write_json
from simprune_deploy.onnx import companions
from simprune_deploy.onnx.exported_folder import FUSED_MODEL, INLINED_MODEL, MODEL
from simprune_deploy.onnx.fused_attention import count_fused
from simprune_deploy.onnx.metadata import load_graph, preprocessing_of, read_metadata
from simprune_deploy.onnx.variants import prune_nodes
from simprune_deploy.predict.source import source_of_export

DEMO = ROOT / "examples" / "fashion_mnist"
BOTH = {INLINED_MODEL: "inlined", FUSED_MODEL: "fused_attention"}
THRESHOLD = np.array([0.9], np.float32)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the demo's model with both companions, as the command writes it."""
    folder = tmp_path_factory.mktemp("companions") / "out"
    arguments = ["export", str(DEMO / "vit"), "--threshold", "0.9", "--layers", "1,3,4"]
    arguments += ["--runtime-threshold", "--inline", "--fused-attention", "-o", str(folder)]
    answer = CliRunner().invoke(app, arguments)
    assert answer.exit_code == 0, answer.output
    assert "fused attention" in answer.output
    return folder


@pytest.fixture(scope="module")
def garments(exported: Path) -> np.ndarray:
    """Return float32[16, 1, 28, 28]: real images, as the model takes them."""
    wanted = preprocessing_of(read_metadata(load_graph(exported / MODEL)))
    images = np.load(DEMO / "test_slice.npz")["images"][:16, None].astype(np.float32) / 255
    return np.asarray((images - wanted.mean[0]) / wanted.std[0], np.float32)


def run(graph: onnx.ModelProto | Path, images: np.ndarray, batch: int = 8) -> np.ndarray:
    """Return ONNX Runtime's logits."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    file = str(graph) if isinstance(graph, Path) else graph.SerializeToString()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    feeds = [images[row : row + batch] for row in range(0, len(images), batch)]
    found = [session.run(None, {"images": each, "threshold": THRESHOLD})[0] for each in feeds]
    return np.concatenate(found)


# --- in the folder --------------------------------------------------------------------------------


def test_both_are_in_the_folder_with_their_proof(exported: Path) -> None:
    manifest = json.loads((exported / "manifest.json").read_text())
    parity = json.loads((exported / "parity.json").read_text())
    described = sd.inspect(exported)
    for name, check in BOTH.items():
        assert manifest["files"][name]["sha256"] == sha256(exported / name)
        assert parity["checks"][check]["passed"] is True
        assert described["checks"][check] == "yes"
        assert name in described["files"]
    proof = parity["checks"]
    assert proof["inlined"]["layers_with_sizes"] == [1, 3, 4]
    assert proof["inlined"]["outputs"]["images"] == proof["outputs"]["images"] == 16
    assert proof["fused_attention"]["attentions"] == 6
    assert proof["fused_attention"]["decisions"]["decisions"] > 5000
    assert not prune_nodes(load_graph(exported / INLINED_MODEL))
    assert count_fused(load_graph(exported / FUSED_MODEL)) == 6
    options = read_metadata(load_graph(exported / MODEL)).export
    assert not {"inline", "fused_attention"} & options.keys(), "they are of other files"


def test_they_give_the_models_logits_for_real_images(exported: Path, garments: np.ndarray) -> None:
    expected = run(exported / MODEL, garments)
    np.testing.assert_array_equal(run(exported / INLINED_MODEL, garments), expected)
    np.testing.assert_allclose(run(exported / FUSED_MODEL, garments), expected, rtol=0, atol=1e-5)


def test_verify_asks_again(exported: Path, tmp_path: Path) -> None:
    verdict = sd.verify(exported)
    assert verdict.status == "passed"
    assert verdict.check("inlined").passed
    assert verdict.check("fused_attention").passed
    # of the bare file nothing is known but itself
    assert {check.name for check in sd.verify(exported / MODEL).checks}.isdisjoint(BOTH.values())
    # the fused file has prune nodes, and so is compared with PyTorch's answers by itself
    assert sd.verify(exported / FUSED_MODEL).status == "passed"
    with pytest.raises(sd.ArtifactError, match=r"shows no decisions.* give model\.onnx"):
        sd.verify(exported / INLINED_MODEL)


def sharper(graph: onnx.ModelProto) -> None:
    """Let one attention scale its queries by a little more."""
    node = [each for each in graph.graph.node if each.op_type == "MultiHeadAttention"][2]
    next(each for each in node.attribute if each.name == "scale").f *= 1.01


def lower(graph: onnx.ModelProto) -> None:
    """Let one layer fold patches that are a little less alike."""
    node = [each for each in graph.graph.node if each.name.startswith("GreaterOrEqual_goes")][1]
    (limit,) = (each for each in graph.graph.node if node.input[1] in each.output)
    limit.output[0] = "as_it_was"
    place = list(graph.graph.node).index(node)
    less = onnx.helper.make_tensor("less", onnx.TensorProto.FLOAT, [], [0.05])
    graph.graph.initializer.append(less)
    graph.graph.node.insert(
        place, onnx.helper.make_node("Sub", ["as_it_was", "less"], [node.input[1]], name="lower")
    )


@pytest.mark.parametrize(("name", "change"), [(FUSED_MODEL, sharper), (INLINED_MODEL, lower)])
def test_one_that_differs_fails_the_verdict(
    exported: Path, tmp_path: Path, name: str, change: Callable[[onnx.ModelProto], None]
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(exported, folder)
    graph = load_graph(folder / name)
    change(graph)
    onnx.save(graph, folder / name)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name]["sha256"] = sha256(folder / name)
    write_json(folder / "manifest.json", manifest)
    verdict = sd.verify(folder)
    assert [check.name for check in verdict.checks if check.passed is False] == [BOTH[name]]
    assert verdict.status == "failed"


def test_one_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = companions.with_fused_attention

    def wrong(graph: onnx.ModelProto) -> onnx.ModelProto:
        made = fused(graph)
        sharper(made)
        return made

    monkeypatch.setattr(companions, "with_fused_attention", wrong)
    out = tmp_path / "out"
    arguments = ["export", str(DEMO / "vit"), "--layers", "1", "--fused-attention", "-o", str(out)]
    assert CliRunner().invoke(app, arguments).exit_code == 1
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["verdict"] == "failed"
    assert FUSED_MODEL not in manifest["files"]
    assert not (out / FUSED_MODEL).exists()
    assert (out / MODEL).exists()


def test_without_the_proof_there_are_none(tmp_path: Path) -> None:
    for name in ("inline", "fused_attention"):
        options = sd.ExportOptions(**{name: True})  # type: ignore[arg-type]
        with pytest.raises(sd.InvalidArgumentError, match=rf"{name}=True .* verify=False"):
            sd.ExportRequest("nowhere", options=options, verify=False)


def test_a_bundle_leaves_them_out(exported: Path, tmp_path: Path) -> None:
    made = sd.bundle(exported, ["jetson-orin"], output=tmp_path / "bundle")
    assert MODEL in made.manifest["files"]
    assert not BOTH.keys() & made.manifest["files"].keys()
    assert not [name for name in BOTH if (made.folder / name).exists()]


def test_bench_times_both_models_with_fused_attention(exported: Path) -> None:
    arguments = ["bench", str(exported), "--backend", "onnxruntime", "--fused-attention"]
    arguments += ["--iterations", "1", "--warm-up", "0", "--threads", "1", "--json"]
    answer = CliRunner().invoke(app, arguments)
    assert answer.exit_code == 0, answer.output
    report = json.loads(answer.stdout)
    assert report["environment"]["attention"] == "fused: com.microsoft.MultiHeadAttention"
    assert "compared with nothing" in report["environment"]["note"]
    assert [row["name"] for row in report["models"]] == ["dense", "pruned"]
    for form in ("pruned", "dense"):
        with source_of_export(exported).spec(form, fused=True).open() as predictor:
            assert "attention fused" in predictor.runtime.notes
            assert count_fused(predictor.graph) == 6  # type: ignore[attr-defined]
    with pytest.raises(sd.InvalidArgumentError, match="fused_attention is for backend='onnxr"):
        sd.BenchRequest(exported, fused_attention=True)


# --- tools ----------------------------------------------------------------------------------------


def slimmed(file: Path) -> onnx.ModelProto:
    import onnxslim

    return onnxslim.slim(onnx.load(file))


def simplified(file: Path) -> onnx.ModelProto:
    import onnxsim

    graph, same = onnxsim.simplify(onnx.load(file))
    assert same
    return graph


@pytest.mark.parametrize("name", [MODEL, INLINED_MODEL])
@pytest.mark.parametrize("tool", [slimmed, simplified])
def test_simplifiers(
    exported: Path, garments: np.ndarray, tool: Callable[[Path], onnx.ModelProto], name: str
) -> None:
    made = tool(exported / name)
    expected = run(exported / MODEL, garments)
    np.testing.assert_allclose(run(made, garments), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("opset", [20, 21, 22, 23])
def test_the_version_converter(exported: Path, garments: np.ndarray, opset: int) -> None:
    from onnx import version_converter

    made = version_converter.convert_version(onnx.load(exported / INLINED_MODEL), opset)
    assert [entry.version for entry in made.opset_import if not entry.domain] == [opset]
    onnx.checker.check_model(made, full_check=True)
    expected = run(exported / MODEL, garments)
    np.testing.assert_allclose(run(made, garments), expected, rtol=0, atol=1e-5)


def test_what_the_version_converter_cannot(exported: Path) -> None:
    """docs/tools.md says so: where this fails, the page is out of date."""
    from onnx import version_converter

    for opset in (18, 19):
        with pytest.raises(RuntimeError, match=r"No Adapter .* for ConstantOfShape"):
            version_converter.convert_version(onnx.load(exported / INLINED_MODEL), opset)
    assert not version_converter.convert_version(onnx.load(exported / MODEL), 21).functions


def test_dynamic_quantization(exported: Path, garments: np.ndarray, tmp_path: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    for name in (MODEL, INLINED_MODEL):
        quantize_dynamic(exported / name, tmp_path / name)
        assert (tmp_path / name).stat().st_size < 0.4 * (exported / name).stat().st_size
        made, expected = run(tmp_path / name, garments), run(exported / MODEL, garments)
        assert (made.argmax(1) == expected.argmax(1)).mean() >= 15 / 16
        assert np.abs(made - expected).max() < 0.1 * np.abs(expected).max()


def test_openvino(exported: Path, garments: np.ndarray) -> None:
    import openvino

    core = openvino.Core()
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = core.compile_model(core.read_model(exported / INLINED_MODEL), "CPU", hints)
    made = compiled({"images": garments[:8], "threshold": THRESHOLD})[0]
    expected = run(exported / MODEL, garments[:8])
    np.testing.assert_allclose(made, expected, rtol=0, atol=1e-4)
    with pytest.raises(RuntimeError, match=r"simprune\.SimilarityPrune"):
        core.compile_model(core.read_model(exported / MODEL), "CPU", hints)
