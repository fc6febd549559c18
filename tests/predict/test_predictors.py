"""One suite for everything that runs a model: the same pictures, thresholds and decisions.

The models are the demo's, in each form of an export and each runtime. Engines are ONNX files that
ONNX Runtime runs behind stand-ins for CUDA and TensorRT: see the top of running_double.py for what
that cannot show.
"""

from __future__ import annotations

import dataclasses
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import running_double
from made_up_engine import metadata_of
from places import ROOT
from running_double import Cuda

import simprune_deploy as sd
from simprune_deploy.common.errors import InvalidArgumentError
from simprune_deploy.common.files import write_json
from simprune_deploy.engine.engine_metadata import FileStamp, metadata_path
from simprune_deploy.onnx.dense import dense
from simprune_deploy.onnx.exported_folder import MODEL
from simprune_deploy.onnx.exporter import export_onnx
from simprune_deploy.onnx.metadata import load_graph, read_metadata
from simprune_deploy.onnx.options import ExportOptions
from simprune_deploy.onnx.variants import with_diagnostics, without_function
from simprune_deploy.predict.engine_predictor import EngineSpec
from simprune_deploy.predict.onnx_predictor import OnnxSpec
from simprune_deploy.predict.predictor import Predictor, PredictorSpec
from simprune_deploy.predict.source import ModelSource, is_export, open_source, source_of_export
from simprune_deploy.predict.torch_predictor import TorchSpec
from simprune_deploy.tuning.baselines import Baseline, BaselineSpec

DEMO = ROOT / "examples" / "fashion_mnist"
LAYERS = (1, 3)
THRESHOLD = 0.9
PATCHES = 196


@dataclasses.dataclass(frozen=True)
class Case:
    """A predictor's spec, and how near it is to PyTorch."""

    spec: PredictorSpec
    tolerance: float = 1e-4
    fixed: bool = False


@pytest.fixture(scope="module")
def model() -> Any:
    return sd.prune(sd.load(DEMO / "vit"), threshold=THRESHOLD, layers=LAYERS).eval()


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Ten pictures in [0, 1]: no whole number of the batches that any case takes."""
    with np.load(DEMO / "test_slice.npz") as data:
        return (data["images"][:10, None] / np.float32(255)).astype(np.float32)


@pytest.fixture(scope="module")
def graphs(model: Any) -> dict[str, onnx.ModelProto]:
    """The model's exports, each traced once."""
    forms = {
        "run time": ExportOptions(runtime_threshold=True, batch=(1, 4)),
        "fixed": ExportOptions(batch=(1, 4), normalize=True),
        "camera": ExportOptions(runtime_threshold=True, batch=(3, 3), input="uint8-nhwc"),
        "fp16": ExportOptions(runtime_threshold=True, batch=(1, 4), precision="fp16"),
        "bf16": ExportOptions(runtime_threshold=True, batch=(1, 4), precision="bf16"),
    }
    return {name: export_onnx(model, options) for name, options in forms.items()}


@pytest.fixture
def engine(
    graphs: dict[str, onnx.ModelProto],
    tmp_path: Path,
    stand_in: Cuda,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[[str], EngineSpec]]:
    """Return what makes a spec of stand-ins for engines of an export."""

    def made(name: str) -> EngineSpec:
        graph = graphs[name]
        metadata = read_metadata(graph)
        low, high = metadata.batch
        shape = list(metadata.image_shape)
        profile = {"images": {"min": [low, *shape], "opt": [low, *shape], "max": [high, *shape]}}
        if metadata.export["runtime_threshold"]:
            profile["threshold"] = {"min": [1], "opt": [1], "max": [high]}
        monkeypatch.setitem(sys.modules, "tensorrt", running_double.tensorrt(stand_in, profile))
        paths = {}
        forms = {"pruned": graph, "diagnosis": with_diagnostics(graph), "dense": dense(graph)}
        for of, form in forms.items():
            path = paths[of] = tmp_path / f"{of}.engine"
            path.write_bytes(form.SerializeToString())
            stamp = FileStamp("model.onnx", 1, "a" * 64)
            described = metadata_of(path, plugin=None, profile=profile, onnx=stamp, of=of)
            write_json(metadata_path(path), described.to_dict())
        return EngineSpec(paths["pruned"], metadata, showing=paths["diagnosis"], gpu="a double")

    yield made
    assert stand_in.memory == stand_in.handles == {}  # closed predictors gave everything back


CASES = {
    "torch": lambda get: Case(TorchSpec(get("model"), get("plain"))),
    "torch, as a camera's export": lambda get: Case(
        TorchSpec(get("model"), read_metadata(get("graphs")["camera"]))
    ),
    "onnx": lambda get: Case(_onnx(get, "run time")),
    "onnx, without the function": lambda get: Case(
        OnnxSpec(without_function(get("graphs")["run time"]).SerializeToString())
    ),
    "onnx, fixed threshold": lambda get: Case(_onnx(get, "fixed"), fixed=True),
    "onnx, a camera's batches of three": lambda get: Case(_onnx(get, "camera")),
    "onnx, fp16": lambda get: Case(_onnx(get, "fp16"), 0.1),
    "onnx, bf16": lambda get: Case(_onnx(get, "bf16"), 0.5),
    "engine": lambda get: Case(get("engine")("run time")),
    "engine, fixed threshold": lambda get: Case(get("engine")("fixed"), fixed=True),
    "engine, a camera's batches of three": lambda get: Case(get("engine")("camera")),
}
PRUNED = pytest.mark.parametrize("name", CASES)


def _onnx(get: Callable[[str], Any], form: str) -> OnnxSpec:
    return OnnxSpec(get("graphs")[form].SerializeToString())


@pytest.fixture
def plain(model: Any) -> Any:
    """Return the metadata of an export with nothing special."""
    return open_source(model).metadata


@pytest.fixture
def case(name: str, request: pytest.FixtureRequest) -> Case:
    return CASES[name](request.getfixturevalue)


@pytest.fixture
def opened(case: Case) -> Iterator[Predictor]:
    with case.spec.open() as predictor:
        yield predictor


@pytest.fixture(scope="module")
def by_hand(model: Any, pixels: np.ndarray) -> dict[float, tuple[np.ndarray, np.ndarray]]:
    """Outputs and kept patches from PyTorch, one image at a time, by threshold."""
    import torch

    found = {}
    images = (torch.from_numpy(pixels) - 0.286) / 0.353
    for threshold in (THRESHOLD, 0.8):
        outputs, kept = [], []
        for one in images:
            traces: list[Any] = []
            with torch.inference_mode():
                outputs.append(model(one[None], threshold=threshold, traces=traces)[0].numpy())
            kept.append([trace.kept_index.shape[1] - 1 for trace in traces])
        found[threshold] = np.stack(outputs), np.array(kept)
    return found


def agree(mine: np.ndarray, theirs: np.ndarray) -> float:
    """Return the share of rows that are the same."""
    return float((mine == theirs).reshape(len(mine), -1).all(1).mean())


@PRUNED
def test_it_answers_as_pytorch_does_image_by_image(
    case: Case, opened: Predictor, pixels: np.ndarray, by_hand: Any
) -> None:
    """Any number of images, in whatever batches the model takes; at its own threshold."""
    outputs, kept = by_hand[THRESHOLD]
    found = opened.predict(pixels, counts=True)
    assert found.records is None
    assert found.kept is not None
    assert found.kept.shape == (10, len(LAYERS))
    assert found.outputs.shape == outputs.shape
    exact = case.tolerance < 1e-3
    assert agree(found.kept, kept) >= (1.0 if exact else 0.2)
    same = (found.kept == kept).all(1)
    np.testing.assert_allclose(found.outputs[same], outputs[same], atol=case.tolerance)
    without = opened.predict(pixels)
    assert (without.kept, without.records) == (None, None)
    np.testing.assert_allclose(without.outputs, found.outputs, atol=max(1e-4, case.tolerance / 2))
    few = opened.predict(pixels[:1], counts=True)
    assert (len(few.outputs), few.kept.tolist()) == (1, found.kept[:1].tolist())  # type: ignore[union-attr]
    assert len(opened.predict(pixels[:0]).outputs) == 0


@PRUNED
def test_its_decisions_are_the_counts(opened: Predictor, pixels: np.ndarray) -> None:
    found = opened.predict(pixels, counts=True, decisions=True)
    assert found.records is not None
    assert found.kept is not None
    assert tuple(found.records) == opened.layers == LAYERS
    for column, layer in enumerate(LAYERS):
        records = found.records[layer]
        assert len(records) == len(pixels)
        heads = [len(record.heads()) - 1 for record in records]
        assert heads == found.kept[:, column].tolist()
        assert all(record.threshold == np.float32(THRESHOLD) for record in records)
        width = 1 + PATCHES if layer == 1 else None
        for record in records:
            assert width is None or record.features.shape[0] == width
            assert record.features.shape[0] == len(record.assignment) == len(record.log_size)
    counted = opened.predict(pixels, counts=True).kept
    assert agree(found.kept, counted) >= 0.8  # in 16 bits noise may turn one


@PRUNED
def test_thresholds_are_one_or_one_an_image_or_fixed(
    case: Case, opened: Predictor, pixels: np.ndarray, by_hand: Any
) -> None:
    assert opened.fixed_threshold == case.fixed
    if case.fixed:
        same = opened.predict(pixels[:2], threshold=THRESHOLD).outputs
        np.testing.assert_array_equal(same, opened.predict(pixels[:2]).outputs)
        with pytest.raises(InvalidArgumentError, match=r"fixed at 0\.9: export with runtime_thr"):
            opened.predict(pixels[:2], threshold=0.8)
        with pytest.raises(InvalidArgumentError, match=r"fixed at 0\.9"):
            opened.prepare(opened.to_inputs(pixels[: opened.batch[0]]), 0.8)
        return
    lower = opened.predict(pixels, threshold=0.8, counts=True)
    assert lower.kept is not None
    exact = case.tolerance < 1e-3
    assert agree(lower.kept, by_hand[0.8][1]) >= (1.0 if exact else 0.2)
    own = opened.predict(pixels, counts=True)
    each = np.where(np.arange(10) % 2, THRESHOLD, 0.8).astype(np.float32)
    mixed = opened.predict(pixels, threshold=each, counts=True, decisions=True)
    assert mixed.kept is not None
    assert own.kept is not None
    wanted = np.where((np.arange(10) % 2)[:, None], own.kept, lower.kept)
    assert agree(mixed.kept, wanted) >= (1.0 if exact else 0.8)
    assert mixed.records is not None
    assert [record.threshold for record in mixed.records[1]] == each.tolist()


@PRUNED
def test_an_image_does_not_depend_on_its_company(
    case: Case, opened: Predictor, pixels: np.ndarray
) -> None:
    images = opened.to_inputs(pixels)
    forward = opened.answer(images, counts=True)
    low, high = opened.batch
    size = min(max(low, 2), high)
    order = [[9, 0, 9][:size] if size > 1 else [9], *([i] * size for i in range(9))]
    mixed = opened.answer(images, counts=True, batches=order)
    assert forward.kept is not None
    assert mixed.kept is not None
    assert agree(mixed.kept, forward.kept) >= (1.0 if case.tolerance < 1e-3 else 0.8)
    same = (mixed.kept == forward.kept).all(1)
    limit = max(1e-4, case.tolerance / 2)
    np.testing.assert_allclose(mixed.outputs[same], forward.outputs[same], atol=limit)


@PRUNED
def test_a_prepared_batch_can_be_run_again_and_again(opened: Predictor, pixels: np.ndarray) -> None:
    threshold = None if opened.fixed_threshold else 0.85
    images = opened.to_inputs(pixels[: opened.batch[0]])
    prepared = opened.prepare(images, threshold)
    taken = [opened.run(prepared) for _ in range(3)]
    gpu = opened.runtime.name == "TensorRT"
    assert all(isinstance(each, float) if gpu else each is None for each in taken)


@PRUNED
def test_it_can_be_closed_twice_and_says_what_it_is(case: Case, pixels: np.ndarray) -> None:
    predictor = case.spec.open()
    predictor.predict(pixels[:3], decisions=True)
    predictor.close()
    predictor.close()
    runtime = predictor.runtime
    assert runtime.name in ("PyTorch", "ONNX Runtime", "TensorRT")
    assert runtime.title.startswith(f"{runtime.name} {runtime.version} ({runtime.device}")
    assert predictor.form == "pruned"
    assert predictor.decides_elsewhere == (runtime.name == "TensorRT")


@PRUNED
def test_its_spec_travels(case: Case, pixels: np.ndarray) -> None:
    """To another process, as a sweep's workers and the memory probe need it."""
    travelled = pickle.loads(pickle.dumps(case.spec))
    assert travelled.key == case.spec.key
    with case.spec.open() as here, travelled.open() as there:
        mine, theirs = (each.predict(pixels[:3], counts=True) for each in (here, there))
    np.testing.assert_array_equal(mine.outputs, theirs.outputs)
    np.testing.assert_array_equal(mine.kept, theirs.kept)


@PRUNED
def test_the_dense_form_prunes_nothing(
    case: Case, pixels: np.ndarray, model: Any, tmp_path: Path
) -> None:
    import torch

    images = (torch.from_numpy(pixels) - 0.286) / 0.353
    with torch.inference_mode():
        wanted = model.vit(images).numpy()
    changes: dict[str, Any] = {"form": "dense"}
    if isinstance(case.spec, EngineSpec):
        changes |= {"engine": tmp_path / "dense.engine", "showing": None}
    spec = dataclasses.replace(case.spec, **changes)  # type: ignore[type-var]
    assert spec.key != case.spec.key
    with spec.open() as predictor:
        assert (predictor.form, predictor.layers) == ("dense", ())
        found = predictor.predict(pixels, threshold=0.5, counts=True, decisions=True)
        assert found.kept is not None
        assert (found.kept.shape, found.records) == ((10, 0), {})
        np.testing.assert_allclose(found.outputs, wanted, atol=case.tolerance)
        predictor.run(predictor.prepare(predictor.to_inputs(pixels[: predictor.batch[0]])))


def test_what_differs_from_the_file_is_noted(graphs: dict[str, onnx.ModelProto]) -> None:
    stripped = OnnxSpec(without_function(graphs["bf16"]).SerializeToString()).open()
    assert stripped.runtime.notes == ("emulating bfloat16", "function put back")
    assert OnnxSpec(graphs["fp16"].SerializeToString()).open().runtime.notes == ()


@pytest.mark.parametrize("rule", ["random", "redundancy", "saint", "tome"])
def test_a_baseline_keeps_what_ours_keeps(
    rule: str, model: Any, plain: Any, pixels: np.ndarray, by_hand: Any
) -> None:
    spec = BaselineSpec(model, plain, Baseline(rule), "demo")
    with spec.open() as predictor, pickle.loads(pickle.dumps(spec)).open() as there:
        found = predictor.predict(pixels, threshold=0.8, counts=True, decisions=True)
        np.testing.assert_array_equal(found.kept, by_hand[0.8][1])
        own = predictor.predict(pixels, counts=True)
        np.testing.assert_array_equal(own.kept, by_hand[THRESHOLD][1])
        theirs = there.predict(pixels, threshold=0.8)
    np.testing.assert_allclose(found.outputs, theirs.outputs, atol=1e-5)
    assert np.abs(found.outputs - by_hand[0.8][0]).max() > 1e-3  # another rule, another answer
    assert found.records is not None
    assert tuple(found.records) == LAYERS


class TestSource:
    def test_a_folder_and_its_files_are_one_model(self, deciding_demo: Path) -> None:
        folder, file = (source_of_export(each) for each in (deciding_demo, deciding_demo / MODEL))
        assert folder.sha256 == file.sha256
        assert folder.metadata == file.metadata
        assert folder.folder == file.folder == deciding_demo
        assert (folder.kind, folder.runtime_threshold) == ("exported graph", True)
        assert folder.manifest is not None
        assert file.manifest is None
        assert is_export(deciding_demo)
        assert is_export(deciding_demo / MODEL)
        assert not is_export(DEMO / "vit")

    def test_a_file_without_the_function_runs(self, deciding_demo: Path, tmp_path: Path) -> None:
        """As bundles have it for TensorRT before 10.7."""
        path = tmp_path / "model-plugin.onnx"
        onnx.save(without_function(load_graph(deciding_demo / MODEL)), path)
        image = np.zeros((1, 1, 28, 28), np.float32)
        with source_of_export(path).spec().open() as stripped:
            mine = stripped.predict(image).outputs
        with source_of_export(deciding_demo).spec().open() as whole:
            np.testing.assert_array_equal(mine, whole.predict(image).outputs)

    def test_a_checkpoint_is_a_source_by_its_path_or_its_model(self) -> None:
        by_path = open_source(DEMO / "vit")
        by_model = open_source(sd.load(DEMO / "vit"))
        assert by_path.sha256 == by_model.sha256
        assert (by_path.kind, by_path.metadata.pruning.layers) == ("checkpoint", ())
        assert open_source(DEMO / "vit", prune=True).metadata.pruning.layers
        assert open_source(by_path) is by_path
        assert isinstance(by_path, ModelSource)

    def test_options_of_checkpoints_are_refused_for_exports(self, deciding_demo: Path) -> None:
        with pytest.raises(
            InvalidArgumentError, match=r"arch: for checkpoints, and .*, an export, is given"
        ):
            open_source(deciding_demo, sd.CheckpointOptions(arch="vit_tiny_patch16_224"))

    def test_a_changed_file_is_refused(self, deciding_demo: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(deciding_demo, tmp_path / "demo"))
        with (folder / MODEL).open("ab") as file:
            file.write(b"x")
        with pytest.raises(sd.SimpruneError, match="its SHA-256 differs"):
            source_of_export(folder)
