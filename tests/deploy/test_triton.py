"""Triton model repositories: held to Triton's own schema, and served by a real Triton server.

The server (tests/helpers/triton_server.py) has Triton's core and HTTP, with the Python backend in
the place of onnxruntime's. What onnxruntime's backend itself would check is checked here by its
rules.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import triton_server
from google.protobuf import text_format
from places import ROOT
from plugin_build import made
from typer.testing import CliRunner

import simprune_deploy as sd
from simprune_deploy.cli import app
from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.deploy.triton import check_batch, write_repository
from simprune_deploy.deploy.triton_config import class_names, render
from simprune_deploy.engine.engine_metadata import EngineMetadata, FileStamp, metadata_path
from simprune_deploy.onnx.metadata import load_graph, read_metadata
from simprune_deploy.parity.golden import load_golden
from simprune_deploy.reports.triton import print_model

DEMO = ROOT / "examples" / "fashion_mnist" / "vit"
SAMPLES = Path(sd.__file__).parent / "sample_images"
CLIENT = ROOT / "examples" / "triton" / "classify.py"
LAYERS = [1, 3, 4]
KINDS = ("turned", "fixed", "half")
needs_server = pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.platform != "linux",
    reason="the server comes for x86-64 Linux only",
)


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return verified exports of the demo model, with their repositories. Not to be changed."""
    folder = tmp_path_factory.mktemp("triton")
    pruned = sd.prune(sd.load(str(DEMO)), threshold=0.9, layers=LAYERS)
    options = {
        # batches of 1 to 8, a threshold for each image, outputs as long as the tokens that are left
        "turned": sd.ExportOptions(runtime_threshold=True, emit_assignments=True),
        "fixed": sd.ExportOptions(runtime_threshold=True, batch=(3, 3)),
        "half": sd.ExportOptions(precision="fp16", normalize=True),
    }
    assert tuple(options) == KINDS
    for name, each in options.items():
        assert sd.export(pruned, folder / name, each).verdict.status == "passed"  # type: ignore[union-attr]
        write_repository(folder / name)
    return {name: folder / name for name in options}


def parsed(model: Path) -> Any:
    """Parse a configuration with Triton's own schema, which refuses what it does not know."""
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    return text_format.Parse((model / "config.pbtxt").read_text(encoding="utf-8"), ModelConfig())


def served(export: Path) -> Path:
    """Return the model in the export's own repository."""
    return export / "triton" / f"{export.name}_onnx"


class TestConfiguration:
    @pytest.mark.parametrize("kind", KINDS)
    def test_what_the_onnxruntime_backend_checks(self, exports: dict[str, Path], kind: str) -> None:
        """The rules of ValidateInputs, ValidateOutputs, CompareDimsSupported in its sources."""
        config = parsed(served(exports[kind]))
        session = onnxruntime.InferenceSession(served(exports[kind]) / "1" / "model.onnx")
        types = {"TYPE_FP32": "tensor(float)", "TYPE_INT64": "tensor(int64)"}
        for mine, theirs, exact in (
            (config.input, session.get_inputs(), False),
            (config.output, session.get_outputs(), True),
        ):
            shapes = {each.name: each for each in theirs}
            assert {each.name for each in mine} == set(shapes)
            for each in mine:
                value = shapes[each.name]
                model = [
                    -1 if isinstance(size, (str, type(None))) else size for size in value.shape
                ]
                dims = list(each.reshape.shape if each.HasField("reshape") else each.dims)
                assert types[type_name(each.data_type)] == value.type
                if config.max_batch_size:
                    assert model[0] == -1
                    dims = [-1, *dims]
                assert len(dims) == len(model)
                for configured, real in zip(dims, model, strict=True):
                    assert configured == real or (real == -1 and not exact)

    def test_a_batch_range(self, exports: dict[str, Path]) -> None:
        model = served(exports["turned"])
        config = parsed(model)
        assert (config.name, config.backend) == ("turned_onnx", "onnxruntime")
        assert config.max_batch_size == 8
        assert config.HasField("dynamic_batching")
        images, threshold = config.input
        assert (images.name, list(images.dims)) == ("images", [1, 28, 28])
        assert not images.HasField("reshape")
        # a request says [B, 1], the graph is handed [B]
        assert (threshold.name, list(threshold.dims)) == ("threshold", [1])
        assert threshold.HasField("reshape")
        assert list(threshold.reshape.shape) == []
        assert [each.name for each in config.output] == [
            "logits", "assignment_1", "assignment_3", "assignment_4",
        ]  # fmt: skip
        assert [list(each.dims) for each in config.output] == [[10], [197], [-1], [-1]]
        (group,) = config.instance_group
        assert (group.count, type(group).Kind.Name(group.kind)) == (1, "KIND_AUTO")
        assert (model / "1" / "model.onnx").read_bytes() == (
            exports["turned"] / "model.onnx"
        ).read_bytes()

    def test_a_fixed_batch(self, exports: dict[str, Path]) -> None:
        config = parsed(served(exports["fixed"]))
        assert config.max_batch_size == 0
        assert not config.HasField("dynamic_batching")
        images, threshold = config.input
        assert list(images.dims) == [3, 1, 28, 28]
        assert (list(threshold.dims), threshold.HasField("reshape")) == ([-1], False)
        assert list(config.output[0].dims) == [3, 10]
        (warmup,) = config.model_warmup
        assert warmup.batch_size == 1
        assert list(warmup.inputs["images"].dims) == [3, 1, 28, 28]

    def test_class_names(self, exports: dict[str, Path]) -> None:
        model = served(exports["half"])
        names = json.loads((DEMO / "config.json").read_text())["label_names"]
        assert parsed(model).output[0].label_filename == "labels.txt"
        assert (model / "labels.txt").read_text(encoding="utf-8").splitlines() == names
        assert not any(each.label_filename for each in parsed(served(exports["turned"])).output[1:])
        # Triton would rank the scores of all three images as if they were one image's
        assert not parsed(served(exports["fixed"])).output[0].label_filename
        assert not (served(exports["fixed"]) / "labels.txt").exists()

    def test_one_output_has_no_names_to_choose_from(self, exports: dict[str, Path]) -> None:
        graph = load_graph(exports["half"] / "model.onnx")
        metadata = read_metadata(graph)
        assert class_names(metadata, graph)
        named = {**metadata.preprocessing, "label_names": ["defect"]}
        one = dataclasses.replace(metadata, num_classes=1, preprocessing=named)
        assert class_names(one, graph) == []

    @pytest.mark.parametrize("kind", KINDS)
    def test_warm_up_files_are_the_golden_images(self, exports: dict[str, Path], kind: str) -> None:
        model = served(exports[kind])
        config = parsed(model)
        golden = load_golden(exports[kind] / "golden.npz", LAYERS)
        arrays = {"images": golden.images, "threshold": golden.thresholds}
        batches = [each.batch_size for each in config.model_warmup]
        assert batches == ([1] if kind == "fixed" else [1, 1, 1, 1, 8])
        named = set()
        for warmup in config.model_warmup:
            assert warmup.inputs.keys() == {each.name for each in config.input}
            for name, each in warmup.inputs.items():
                data = (model / "warmup" / each.input_data_file).read_bytes()
                sent = np.frombuffer(data, "<f4").reshape(list(each.dims))
                named.add(each.input_data_file)
                index = int(each.input_data_file.rpartition("_")[2])
                whole = arrays[name][: len(sent)] if kind == "fixed" else arrays[name][index]
                np.testing.assert_array_equal(sent, np.reshape(whole, sent.shape))
        assert named == {path.name for path in (model / "warmup").iterdir()}

    def test_text(self) -> None:
        values = {"name": 'a "b" \\', "dims": [1, -1], "input": [{"x": {}}, {"y": 2}], "none": []}
        assert render(values) == (
            'name: "a \\"b\\" \\\\"\ndims: [1, -1]\n'
            "input {\n  x {\n  }\n}\ninput {\n  y: 2\n}\nnone: []\n"
        )


def type_name(number: int) -> str:
    from tritonclient.grpc.model_config_pb2 import DataType

    return str(DataType.Name(number))


@pytest.fixture(scope="session")
def server(
    exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SimpleNamespace]:
    """Run a server on all the exports' models. It starts only if every warm-up request worked."""
    made(triton_server.server_files)
    folder = tmp_path_factory.mktemp("server")
    models = {kind: triton_server.stand_in(served(path), folder / "repository")
              for kind, path in exports.items()}  # fmt: skip
    with triton_server.serving(folder / "repository", folder / "log.txt") as url:
        # what the warm-up alone did
        warmed = {kind: triton_server.batches_of(model) for kind, model in models.items()}
        yield SimpleNamespace(url=url, models=models, warmed=warmed)


@pytest.fixture
def client(server: SimpleNamespace) -> Iterator[Any]:
    import tritonclient.http as triton

    with triton.InferenceServerClient(server.url, concurrency=8) as client:
        yield client


def inputs(**arrays: np.ndarray) -> list[Any]:
    import tritonclient.http as triton

    values = []
    for name, array in arrays.items():
        value = triton.InferInput(name, array.shape, "FP32")
        value.set_data_from_numpy(np.ascontiguousarray(array))
        values.append(value)
    return values


def alone(export: Path, image: np.ndarray, threshold: float | None = None) -> np.ndarray:
    """Return the logits of one image from ONNX Runtime, without Triton."""
    session = onnxruntime.InferenceSession(export / "model.onnx")
    feeds = {"images": image[None]}
    if threshold is not None:
        feeds["threshold"] = np.array([threshold], np.float32)
    return session.run(["logits"], feeds)[0]  # type: ignore[no-any-return]


@needs_server
class TestServed:
    def test_warm_up_ran(self, server: SimpleNamespace) -> None:
        one = {"images": [[1, 1, 28, 28]], "threshold": [[1]]}
        many = {"images": [[1, 1, 28, 28]] * 8, "threshold": [[1]] * 8}
        assert server.warmed["turned"] == [one, one, one, one, many]
        assert server.warmed["fixed"] == [{"images": [[3, 1, 28, 28]], "threshold": [[1]]}]
        assert len(server.warmed["half"]) == 5

    def test_the_server_says_what_we_wrote(self, client: Any, exports: dict[str, Path]) -> None:
        about = client.get_model_metadata("turned_onnx")
        assert about["inputs"] == [
            {"name": "images", "datatype": "FP32", "shape": [-1, 1, 28, 28]},
            {"name": "threshold", "datatype": "FP32", "shape": [-1, 1]},
        ]
        about = client.get_model_metadata("fixed_onnx")
        assert about["inputs"][1] == {"name": "threshold", "datatype": "FP32", "shape": [-1]}

    def test_golden_images(self, client: Any, exports: dict[str, Path]) -> None:
        golden = load_golden(exports["turned"] / "golden.npz", LAYERS)
        sent = inputs(images=golden.images, threshold=golden.thresholds[:, None])
        answer = client.infer("turned_onnx", sent)
        np.testing.assert_allclose(answer.as_numpy("logits"), golden.reference.outputs, atol=1e-3)
        assert answer.as_numpy("assignment_1").shape == (4, 197)

    def test_class_names_come_with_the_scores(self, client: Any, exports: dict[str, Path]) -> None:
        import tritonclient.http as triton

        golden = load_golden(exports["half"] / "golden.npz", LAYERS)
        wanted = [triton.InferRequestedOutput("logits", class_count=1)]
        answer = client.infer("half_onnx", inputs(images=golden.images), outputs=wanted)
        names = json.loads((DEMO / "config.json").read_text())["label_names"]
        for (text,), row in zip(answer.as_numpy("logits"), golden.reference.outputs, strict=True):
            assert text.decode().split(":")[1:] == [str(row.argmax()), names[row.argmax()]]

    def test_thresholds_of_requests_that_share_a_batch(
        self, client: Any, server: SimpleNamespace, exports: dict[str, Path]
    ) -> None:
        images = load_golden(exports["turned"] / "golden.npz", LAYERS).images
        wanted = [(i % 4, 0.6 + 0.08 * i) for i in range(8)]  # the last ones prune nothing
        waiting = [
            client.async_infer(
                "turned_onnx",
                inputs(images=images[i][None], threshold=np.array([[limit]], np.float32)),
            )
            for i, limit in wanted
        ]
        outputs = [each.get_result().as_numpy("logits") for each in waiting]
        sizes = [len(each["images"]) for each in triton_server.batches_of(server.models["turned"])]
        assert sizes[5:].count(8) == 1
        for (i, limit), output in zip(wanted, outputs, strict=True):
            expected = alone(exports["turned"], images[i], limit)
            np.testing.assert_allclose(output, expected, atol=1e-4)
        assert np.abs(outputs[0] - outputs[4]).max() > 0.01  # the threshold arrived

    @pytest.mark.parametrize(("thresholds", "works"), [(1, True), (3, True), (2, False)])
    def test_a_fixed_batch(
        self, client: Any, exports: dict[str, Path], thresholds: int, works: bool
    ) -> None:
        from tritonclient.utils import InferenceServerException

        images = load_golden(exports["fixed"] / "golden.npz", LAYERS).images[:3]
        limits = np.linspace(0.7, 0.9, thresholds).astype(np.float32)
        if not works:
            with pytest.raises(InferenceServerException):
                client.infer("fixed_onnx", inputs(images=images, threshold=limits))
            return
        answer = client.infer("fixed_onnx", inputs(images=images, threshold=limits))
        for i, row in enumerate(answer.as_numpy("logits")):
            session = onnxruntime.InferenceSession(exports["turned"] / "model.onnx")
            feeds = {"images": images[i][None], "threshold": limits[[i % thresholds]]}
            np.testing.assert_allclose(row, session.run(["logits"], feeds)[0][0], atol=1e-4)

    @pytest.mark.parametrize(
        ("shapes", "says"),
        [
            ({"images": (9, 1, 28, 28), "threshold": (9, 1)}, "batch-size must be <= 8"),
            ({"images": (2, 1, 28, 28), "threshold": (1, 1)}, "batch"),
            ({"images": (1, 1, 29, 28), "threshold": (1, 1)}, "unexpected shape"),
            ({"images": (1, 1, 28, 28)}, "expected 2 inputs"),
        ],
    )
    def test_wrong_requests(self, client: Any, shapes: dict[str, Any], says: str) -> None:
        from tritonclient.utils import InferenceServerException

        zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        with pytest.raises(InferenceServerException, match=says):
            client.infer("turned_onnx", inputs(**zeros))

    @pytest.mark.parametrize(
        ("kind", "arguments"), [("half", []), ("fixed", ["--threshold", "0.9", "--top", "2"])]
    )
    def test_the_example_client(
        self,
        server: SimpleNamespace,
        exports: dict[str, Path],
        capsys: pytest.CaptureFixture[str],
        kind: str,
        arguments: list[str],
    ) -> None:
        where = ["--export", str(exports[kind]), "--model", f"{kind}_onnx", "--url", server.url]
        assert example_client(str(SAMPLES), *where, *arguments) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        lines = [line.split("\t") for line in printed.out.splitlines()]
        assert [line[0] for line in lines] == sorted(path.name for path in SAMPLES.glob("*.jpg"))
        labels = json.loads((DEMO / "config.json").read_text())["label_names"]
        for picture, *found in lines:
            image = example_picture(exports[kind], picture)
            same = ("turned", 0.9) if kind == "fixed" else ("half", None)
            logits = alone(exports[same[0]], image, same[1])[0]
            assert len(found) == (2 if kind == "fixed" else 1)
            best = np.argsort(-logits)[: len(found)]
            for text, index in zip(found, best, strict=True):
                label, score = text.rsplit(" ", 1)
                assert label == labels[index]
                assert float(score) == pytest.approx(logits[index], abs=2e-3)

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["--model", "turned_onnx"], "give --threshold"),
            (["--model", "half_onnx", "--threshold", "0.9"], "leave --threshold out"),
            (["--model", "other"], "unknown model"),
            (["--model", "half_onnx", "--url", "127.0.0.1:9"], "refused"),
        ],
    )
    def test_the_example_client_says_what_is_wrong(
        self,
        server: SimpleNamespace,
        exports: dict[str, Path],
        capsys: pytest.CaptureFixture[str],
        arguments: list[str],
        says: str,
    ) -> None:
        where = ["--export", str(exports["half"]), "--url", server.url]
        assert example_client(str(SAMPLES), *where, *arguments) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1
        assert says in printed.err


def example_client(*arguments: str) -> int:
    """Run the example's main() in this process, which has torch and timm loaded already."""
    spec = importlib.util.spec_from_file_location("classify", CLIENT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(CLIENT), *arguments])
        return int(module.main())


def example_picture(export: Path, name: str) -> np.ndarray:
    """Return a sample photograph as the export's model takes it, loaded without the client."""
    from simprune_deploy.common.images import Preprocessing, sample_images

    metadata = read_metadata(load_graph(export / "model.onnx"))
    model = sd.load(str(DEMO))
    images = sample_images(
        Preprocessing.of_model(model), normalize=not metadata.export["normalize"]
    )
    return images.pixels[images.names.index(name)]  # type: ignore[no-any-return]


class TestEngineForm:
    """Files and refusals: the engine here is a few bytes, and nothing says that it would run."""

    @pytest.fixture
    def export(self, exports: dict[str, Path], tmp_path: Path) -> Path:
        folder = Path(shutil.copytree(exports["turned"], tmp_path / "a model, turned"))
        (folder / "engines").mkdir()
        (folder / "engines" / "model.engine").write_bytes(b"an engine")
        (tmp_path / "libsimprune_plugin.so").write_bytes(b"a library")
        return folder

    def engine(self, export: Path, **changes: Any) -> Path:
        """Write an engine's metadata, changed as wanted."""
        engine = export / "engines" / "model.engine"
        metadata = EngineMetadata(
            flavour="tensorrt",
            version="11.4.1",
            compute_capabilities=("8.9",),
            targets=(),
            gpu="NVIDIA GeForce RTX 4090",
            cuda="13.4",
            plugin=None,
            onnx=FileStamp.of(export / "model.onnx"),
            of="pruned",
            precision="fp32",
            profile={"images": {"min": [1], "opt": [1], "max": [8]}},
            workspace_mib=None,
            prune_layers=3,
            plugin_layers=3,
            engine=FileStamp.of(engine),
            status="made up for this test",
            checked="nothing",
            not_checked="everything",
            versions={},
            seconds=0.0,
            created="2026-11-24T00:00:00+00:00",
        )
        metadata = dataclasses.replace(metadata, **changes)
        metadata_path(engine).write_text(json.dumps(metadata.to_dict()))
        return engine

    def test_with_the_plugin(self, export: Path, tmp_path: Path) -> None:
        library = tmp_path / "libsimprune_plugin.so"
        engine = self.engine(export, plugin=FileStamp.of(library))
        model = write_repository(export, tmp_path / "repository", engine=engine, plugin=library)
        config = parsed(model.path)
        assert (config.name, config.backend) == ("a_model_turned_tensorrt", "tensorrt")
        assert model.path == tmp_path / "repository" / config.name
        assert config.max_batch_size == 8
        (group,) = config.instance_group
        assert type(group).Kind.Name(group.kind) == "KIND_GPU"
        assert (model.path / "1" / "model.plan").read_bytes() == b"an engine"
        assert not (model.path / "1" / "model.onnx").exists()
        assert model.plugin == model.path / "plugins" / "libsimprune_plugin.so"
        assert model.plugin.read_bytes() == b"a library"
        assert any("--backend-config=tensorrt,plugins=" in note for note in model.notes)

    def test_without_it(self, export: Path, tmp_path: Path) -> None:
        model = write_repository(export, tmp_path / "repository", engine=self.engine(export))
        assert model.plugin is None
        assert not (model.path / "plugins").exists()

    def test_the_batches_are_the_engines(self, export: Path, tmp_path: Path) -> None:
        def profile(low: int, high: int) -> dict[str, Any]:
            return {"images": {"min": [low], "opt": [low], "max": [high]}}

        engine = self.engine(export, profile=profile(1, 4))
        assert write_repository(export, tmp_path / "repository", engine=engine).max_batch_size == 4
        engine = self.engine(export, profile=profile(4, 4))
        self.refused(export, r"takes batches of 4 to 4 .* batch 1\.\.4", engine)

    def test_an_engine_of_tensorrt_rtx(self, export: Path) -> None:
        engine = self.engine(export, flavour="tensorrt-rtx", version="1.7.1")
        says = r"Triton cannot load model.engine, an engine of TensorRT-RTX 1\.7\.1: .* ONNX form"
        self.refused(export, says, engine)

    def test_what_does_not_belong_together(self, export: Path, tmp_path: Path) -> None:
        library = tmp_path / "libsimprune_plugin.so"
        other = FileStamp("other", 1, "0" * 64)
        self.refused(export, "built from another model", self.engine(export, onnx=other))
        self.refused(export, "SHA-256 differs", self.engine(export, engine=other))
        self.refused(export, "the dense engine", self.engine(export, of="dense"))
        with_plugin = self.engine(export, plugin=other)
        self.refused(export, "name its library too", with_plugin)
        self.refused(export, "not the library", with_plugin, plugin=library)
        self.refused(export, "cannot be read", with_plugin, plugin=tmp_path / "nowhere.so")
        self.refused(export, "built without the plugin", self.engine(export), plugin=library)
        self.refused(export, "goes with a TensorRT engine", None, plugin=library)
        metadata_path(with_plugin).unlink()
        self.refused(export, "is missing", with_plugin)

    def refused(self, export: Path, says: str, engine: Path | None, **more: Any) -> None:
        place = export.parent / "refused"
        with pytest.raises(SimpruneError, match=says) as caught:
            write_repository(export, place, engine=engine, **more)
        assert "\n" not in str(caught.value)
        assert not place.exists()


class TestFiles:
    def test_replaced_only_with_force_and_alone(
        self, exports: dict[str, Path], tmp_path: Path
    ) -> None:
        (tmp_path / "other").mkdir()
        first = write_repository(exports["half"], tmp_path)
        (first.path / "mine").touch()
        with pytest.raises(SimpruneError, match="force=True"):
            write_repository(exports["half"], tmp_path)
        assert (first.path / "mine").exists()
        write_repository(exports["half"], tmp_path, force=True)
        assert not (first.path / "mine").exists()
        assert sorted(os.listdir(tmp_path)) == ["half_onnx", "other"]

    def test_a_folder_that_is_not_ours_is_not_replaced(
        self, exports: dict[str, Path], tmp_path: Path
    ) -> None:
        (tmp_path / "half_onnx").mkdir()
        (tmp_path / "half_onnx" / "thesis.tex").touch()
        with pytest.raises(SimpruneError, match="not a result of this tool"):
            write_repository(exports["half"], tmp_path, force=True)

    def test_the_exports_own_files_stay(self, exports: dict[str, Path]) -> None:
        assert sd.verify(exports["half"]).status == "passed"

    @pytest.mark.parametrize("verdict", ["failed", "inconclusive"])
    def test_what_is_not_proven_is_not_served(
        self, exports: dict[str, Path], tmp_path: Path, verdict: str
    ) -> None:
        folder = Path(shutil.copytree(exports["half"], tmp_path / "copy"))
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, "verdict": verdict}))
        with pytest.raises(SimpruneError, match=f"'{verdict}'"):
            write_repository(folder, tmp_path / "repository")

    def test_batches_that_triton_would_not_keep(self) -> None:
        for fine in ((1, 8), (1, 1), (4, 4)):
            check_batch(fine)
        with pytest.raises(SimpruneError, match=r"batch 1\.\.8"):
            check_batch((2, 8))


class TestCommandLine:
    def export(self, tmp_path: Path, *arguments: str) -> Any:
        command = [
            "export",
            str(DEMO),
            "--layers",
            "1,3,4",
            "-o",
            str(tmp_path / "demo"),
            "--triton",
        ]
        return CliRunner().invoke(app, [*command, *arguments])

    def test_export(self, tmp_path: Path) -> None:
        answer = self.export(tmp_path, "--no-verify", "--json")
        assert answer.exit_code == 0, answer.output
        (model,) = json.loads(answer.stdout)["triton"]
        assert model["path"] == str(tmp_path / "demo" / "triton" / "demo_onnx")
        assert (model["form"], model["max_batch_size"], model["warmup"]) == ("onnx", 8, 0)
        assert "no warm-up" in model["notes"][0]
        assert not parsed(Path(model["path"])).model_warmup
        assert not (Path(model["path"]) / "warmup").exists()

    def test_nothing_is_said_to_be_served(
        self, exports: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for kind, batches in (("turned", "1 to 8 images"), ("fixed", "a request is a whole batch")):
            print_model(write_repository(exports[kind], tmp_path))
            text = " ".join(capsys.readouterr().out.split())
            assert batches in text
            assert "written, not served" in text
            assert "tritonserver" in text
            assert "every request sends a threshold" in text

    def test_refused_before_the_model_is_loaded(self, tmp_path: Path) -> None:
        answer = CliRunner().invoke(app, ["export", "nothing.pt", "--triton", "--batch", "2..8"])
        assert answer.exit_code == 2
        assert "--batch 1..8" in answer.output

    def test_not_proven(self, tmp_path: Path) -> None:
        answer = self.export(tmp_path, "--threshold", "2")
        assert answer.exit_code == 1
        assert "no Triton repository was written: the parity check did not pass" in answer.output
        assert not (tmp_path / "demo" / "triton").exists()
