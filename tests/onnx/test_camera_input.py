"""``--input uint8-nhwc``: images as a camera gives them, converted and normalized in the graph."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from architectures import ARCHITECTURES, build
from cli import cli
from onnx import TensorProto, numpy_helper
from PIL import Image
from typer.testing import CliRunner

import simprune_deploy
from simprune_deploy.cli import app
from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.common.images import Preprocessing, as_uint8_nhwc, sample_images
from simprune_deploy.deploy.verification import verify
from simprune_deploy.engine.targets import find_targets
from simprune_deploy.onnx.exporter import ExportOptions
from simprune_deploy.onnx.metadata import read_metadata
from simprune_deploy.onnx.precision import value_types, with_precision
from simprune_deploy.onnx.variants import dense
from simprune_deploy.parity.comparison import compare_with_torch
from simprune_deploy.parity.golden import load_golden
from simprune_deploy.parity.graph_check import check_graph
from simprune_deploy.pruning.model import PrunedViT, prune

CLASS_TOKEN = next(each for each in ARCHITECTURES if each.what == "class token")


@pytest.fixture(scope="module")
def model() -> PrunedViT:
    return prune(build(CLASS_TOKEN), threshold=0.8, layers=(1,))


@pytest.fixture(scope="module")
def exported(model: PrunedViT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an exported folder, written by the command line. It is not to be changed."""
    place = tmp_path_factory.mktemp("camera")
    simprune_deploy.save(model, place / "model.safetensors")
    command = ["export", place / "model.safetensors", "--input", "uint8-nhwc", "--batch", "1..4"]
    answer = call(*command, "-o", place / "exported", "--json")
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout)["verdict"]["status"] == "passed"
    return place / "exported"


@pytest.fixture(scope="module")
def graph(exported: Path) -> onnx.ModelProto:
    return onnx.load(exported / "model.onnx")


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def test_every_level_comes_back() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    pixels = levels.astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(as_uint8_nhwc(pixels)[..., 0], levels[:, 0])


def test_the_pixels_are_those_that_timm_cropped(model: PrunedViT) -> None:
    from timm.data import create_transform, resolve_model_data_config

    config = {**resolve_model_data_config(model.vit), "input_size": (3, *model.image_size)}
    transform = create_transform(**config, normalize=False)
    found = sample_images(Preprocessing.of_model(model), 3, normalize=False)
    folder = Path(simprune_deploy.__file__).parent / "sample_images"
    for name, pixels in zip(found.names, as_uint8_nhwc(found.pixels), strict=True):
        expected = transform(Image.open(folder / name).convert("RGB")).numpy()
        assert expected.dtype == pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, expected.transpose(1, 2, 0))


def test_the_file_says_what_it_takes(exported: Path, graph: onnx.ModelProto) -> None:
    images = graph.graph.input[0].type.tensor_type
    assert images.elem_type == TensorProto.UINT8
    shape = [dim.dim_param or dim.dim_value for dim in images.shape.dim]
    assert shape == ["batch", 128, 128, 3]
    metadata = read_metadata(graph)
    assert metadata.takes_uint8
    assert metadata.export["normalize"] is True, "it is implied"
    (described,) = json.loads((exported / "manifest.json").read_text())["inputs"]
    assert described == {"name": "images", "dtype": "uint8", "shape": ["batch", 128, 128, 3]}
    old = metadata.to_dict()
    del old["export"]["input"]
    assert not type(metadata).from_dict(old).takes_uint8


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_cast_to_float32_alone_reads_the_images(graph: onnx.ModelProto, precision: str) -> None:
    """TensorRT's rule for uint8: an input, and converted to floats before anything else."""
    made = with_precision(graph, precision) if precision != "fp32" else graph
    readers = [node for node in made.graph.node if "images" in node.input]
    assert [node.op_type for node in readers] == ["Cast"]
    assert readers[0] == made.graph.node[0]
    types = value_types(made)
    assert types["images"] == TensorProto.UINT8
    first = next(i for i, node in enumerate(made.graph.node) if node.op_type == "Conv")
    ahead = [name for node in made.graph.node[:first] for name in node.output]
    narrow = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}.get(precision)
    wide = {types[name] for name in ahead if not name.endswith(("/as_fp16", "/as_bf16"))}
    assert wide <= {TensorProto.FLOAT, TensorProto.INT64}
    assert narrow is None or narrow in types.values()


def test_it_computes_what_the_float_path_computes(
    model: PrunedViT, exported: Path, graph: onnx.ModelProto
) -> None:
    import torch

    preprocessing = Preprocessing.of_model(model)
    normalized = sample_images(preprocessing, 4).pixels
    camera = as_uint8_nhwc(sample_images(preprocessing, 4, normalize=False).pixels)
    session = onnxruntime.InferenceSession(
        exported / "model.onnx", providers=["CPUExecutionProvider"]
    )
    (actual,) = session.run(None, {"images": camera})
    with torch.inference_mode():
        expected = model(torch.from_numpy(normalized)).numpy()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
    plain = onnxruntime.InferenceSession(
        dense(graph).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    with torch.inference_mode():
        expected = model.vit(torch.from_numpy(normalized)).numpy()
    np.testing.assert_allclose(plain.run(None, {"images": camera})[0], expected, rtol=0, atol=1e-5)


def test_golden_cases_are_camera_images_and_verify_runs_them(exported: Path) -> None:
    golden = load_golden(exported / "golden.npz", [1])
    assert golden.images.dtype == np.uint8
    assert golden.images.shape[1:] == (128, 128, 3)
    assert verify(exported).status == "passed"


def test_verify_against_the_checkpoint(model: PrunedViT, exported: Path) -> None:
    assert verify(exported, reference=model).status == "passed"


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_16_bits_are_proven(model: PrunedViT, graph: onnx.ModelProto, precision: str) -> None:
    pictures = sample_images(Preprocessing.of_model(model), 4, normalize=False)
    camera = dataclasses.replace(pictures, pixels=as_uint8_nhwc(pictures.pixels))
    verdict, _ = compare_with_torch(with_precision(graph, precision), model, camera)
    assert verdict.check("graph").passed, verdict.reason
    assert verdict.check("outputs").passed, verdict.reason


def test_another_scale_fails_the_proof(exported: Path, tmp_path: Path) -> None:
    changed = onnx.load(exported / "model.onnx")
    (scale,) = [
        each
        for each in changed.graph.initializer
        if not each.dims and numpy_helper.to_array(each) == 255
    ]
    scale.CopyFrom(numpy_helper.from_array(np.float32(256), scale.name))
    onnx.save(changed, tmp_path / "model.onnx")
    shutil.copy(exported / "golden.npz", tmp_path)
    assert verify(tmp_path / "model.onnx").status == "failed"


def test_the_graph_check_wants_the_input_that_the_facts_name(graph: onnx.ModelProto) -> None:
    metadata = read_metadata(graph)
    assert check_graph(graph, metadata).passed
    export = {**metadata.export, "input": "float32-nchw"}
    check = check_graph(graph, dataclasses.replace(metadata, export=export))
    assert check.passed is False
    assert "its images are uint8, not float32" in check.summary


def test_float_images_are_refused(model: PrunedViT, graph: onnx.ModelProto) -> None:
    pictures = sample_images(Preprocessing.of_model(model), 2)
    with pytest.raises(SimpruneError, match=r"float32\[3, 128, 128\].* uint8\[128, 128, 3\]"):
        compare_with_torch(graph, model, pictures)


def test_an_unknown_form_is_refused(tmp_path: Path) -> None:
    line = cli("export", "model.pt", "--input", "uint8", "-o", tmp_path / "out").line
    assert "'--input': 'uint8' is not one of 'float32-nchw', 'uint8-nhwc'" in line
    with pytest.raises(SimpruneError, match="'uint8' is not known"):
        ExportOptions(input="uint8")


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed"
)
def test_tensorrt_rtx_builds_it(graph: onnx.ModelProto, tmp_path: Path) -> None:
    """The float16 form, by the very worker that `export --target` uses."""
    from simprune_deploy.engine.build import build_engine
    from simprune_deploy.engine.builders import ahead_of_time

    path = tmp_path / "model.onnx"
    onnx.save(with_precision(graph, "fp16"), path)
    engine = build_engine(path, ahead_of_time(find_targets("rtx-ada"))[0])
    assert engine.path.stat().st_size > 0
    assert engine.metadata.profile["images"]["max"] == [4, 128, 128, 3]
