"""float16 and bfloat16 models: types, parity checks and what they must notice, RTX engines."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from architectures import ARCHITECTURES, Architecture, build, build_pruned, photographs
from onnx import TensorProto, helper, numpy_helper
from places import ROOT

from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.onnx.exporter import ExportOptions, export_onnx, metadata_of_model
from simprune_deploy.onnx.metadata import read_metadata
from simprune_deploy.onnx.precision import (
    PRECISIONS,
    emulated,
    module_of,
    round_to,
    value_types,
    with_precision,
)
from simprune_deploy.onnx.variants import prune_nodes, with_diagnostics
from simprune_deploy.parity.comparison import compare_with_golden, compare_with_torch
from simprune_deploy.parity.golden import load_golden, save_golden
from simprune_deploy.parity.replay import replay
from simprune_deploy.parity.runs import Inputs, run
from simprune_deploy.parity.tolerance import Tolerance
from simprune_deploy.predict.torch_predictor import TorchPredictor
from simprune_deploy.pruning.model import PrunedViT, prune

DEMO = ROOT / "examples" / "fashion_mnist" / "vit"
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64

narrow = pytest.mark.parametrize("precision", ["fp16", "bf16"])
by_name = {each.what: each for each in ARCHITECTURES}
some_architectures = pytest.mark.parametrize(
    "architecture",
    [
        by_name[what]
        for what in (
            "class token",
            "packed SwiGLU",
            "attention pool of the prefix too",
            "norm of queries and keys",
            "differential attention",
            "norm of the embedding",
            "mean and maximum",
        )
    ],
    ids=lambda architecture: architecture.what.replace(" ", "-"),
)


def model_of(what: str) -> PrunedViT:
    """Return a pruned model whose extra tokens are as large as in a trained one.

    timm begins with a millionth, which is below the smallest normal number of float16.
    """
    model = build_pruned(by_name[what])
    with torch.no_grad():
        for name in ("cls_token", "reg_token"):
            if getattr(model.vit, name, None) is not None:
                getattr(model.vit, name).normal_(std=0.02)
    return model


@functools.cache
def exported(what: str, **options: Any) -> onnx.ModelProto:
    return export_onnx(model_of(what), ExportOptions(batch=(1, 4), **options))


def session(graph: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def bits(graph: onnx.ModelProto) -> dict[str, list[str]]:
    """Return the types of the float tensors that every kind of node reads."""
    types = value_types(graph)
    found: dict[str, set[str]] = {}
    for node in graph.graph.node:
        kinds = {types[name] for name in node.input if name in types}
        names = {TensorProto.DataType.Name(kind) for kind in kinds} - {"INT64", "BOOL"}
        found.setdefault(node.op_type, set()).update(names)
    return {op_type: sorted(names) for op_type, names in found.items()}


# --- types ----------------------------------------------------------------------------------------


@narrow
@some_architectures
def test_every_tensor_has_the_type_it_is_meant_to_have(
    architecture: Architecture, precision: str
) -> None:
    graph = exported(architecture.what, precision=precision)
    low = PRECISIONS[precision]
    types = value_types(graph)
    onnx.checker.check_model(graph, full_check=True)
    onnx.shape_inference.infer_shapes(graph, check_type=True, strict_mode=True)
    declared = {info.name: info.type.tensor_type.elem_type for info in graph.graph.value_info}
    assert declared.items() <= types.items()

    assert types["images"] == types["logits"] == FLOAT
    for node in prune_nodes(graph):
        kinds = [types[name] for name in (*node.input, *node.output)]
        assert kinds == [low, low, FLOAT, FLOAT, low, FLOAT]
        assert node.input[1] in declared, "the diagnostics need its type"
    for node in graph.graph.node:
        kinds = [types[name] for name in (*node.input, *node.output) if name]
        module = module_of(node)
        if node.op_type in ("Softmax", "Pow", "ReduceMean", "Sqrt", "Reciprocal"):
            assert set(kinds) - {INT64} == {FLOAT}, node.name
        elif node.op_type in ("MatMul", "Gemm", "Gelu") and module.startswith("blocks."):
            assert set(kinds) == {low}, node.name
        elif module in ("norm", "fc_norm", "head"):
            assert set(kinds) - {INT64} == {FLOAT}, node.name
        elif node.op_type == "LayerNormalization":
            assert set(kinds) == {low}, node.name
            assert all(a.i == 1 for a in node.attribute if a.name == "stash_type")
        elif node.op_type == "Cast":
            assert set(kinds) == {low, FLOAT}, node.name
    adds = [node for node in graph.graph.node if node.op_type == "Add"]
    sizes = {node.output[1] for node in prune_nodes(graph)}
    biases = {
        node.output[0]
        for node in graph.graph.node
        if node.op_type == "Unsqueeze" and node.input[0] in sizes
    }
    scores = [node for node in adds if node.input[1] in biases]
    assert scores
    assert {types[name] for node in scores for name in (*node.input, *node.output)} == {FLOAT}


@narrow
@some_architectures
def test_no_cast_undoes_another(architecture: Architecture, precision: str) -> None:
    graph = exported(architecture.what, precision=precision)
    casts = [node for node in graph.graph.node if node.op_type == "Cast"]
    made = {node.output[0] for node in casts}
    assert casts
    assert not [node.name for node in casts if node.input[0] in made]
    assert len({(node.input[0], node.attribute[0].i) for node in casts}) == len(casts)


def test_float32_is_what_it_was() -> None:
    graph = exported("class token")
    same = with_precision(graph, "fp32")
    assert same == graph
    assert set(value_types(graph).values()) <= {FLOAT, INT64}
    assert not [node for node in graph.graph.node if node.op_type == "Cast"]
    metadata = read_metadata(graph)
    assert metadata.precision == "fp32"
    assert metadata.export["log_size_in_keys"] is True
    assert metadata.rounding == {}
    old = metadata.to_dict()
    del old["export"]["precision"], old["rounding"]
    assert type(metadata).from_dict(old).precision == "fp32"


@narrow
def test_weights_of_16_bits_halve_the_file(precision: str) -> None:
    torch.manual_seed(0)
    model = prune(
        timm.create_model("vit_tiny_patch16_224", depth=6, num_classes=7, img_size=112).eval(),
        layers=[3],
    )
    wide, half = (
        len(export_onnx(model, ExportOptions(precision=each)).SerializeToString())
        for each in ("fp32", precision)
    )
    numbers = sum(each.numel() for each in model.parameters())
    # bfloat16 leaves the convolution of the embedding wide at this opset
    embedding = model.vit.patch_embed.proj.weight.numel() if precision == "bf16" else 0
    assert abs(half - wide + 2 * (numbers - embedding)) < 0.02 * wide
    assert half < (0.52 if precision == "fp16" else 0.54) * wide


def test_bfloat16_keeps_the_convolution_wide_where_the_opset_asks_for_it() -> None:
    for opset, kind in ((20, "FLOAT"), (22, "BFLOAT16")):
        graph = exported("class token", precision="bf16", opset=opset)
        assert bits(graph)["Conv"] == [kind]
    assert bits(exported("class token", precision="fp16"))["Conv"] == ["FLOAT16"]


@narrow
def test_rounding_is_that_of_numpy_and_torch(precision: str) -> None:
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    values *= np.exp2(np.random.default_rng(1).integers(-30, 14, len(values))).astype(np.float32)
    values = np.append(values, np.float32([0, -0.0, 1 + 2**-9, 1 + 3 * 2**-9, 1 + 2**-12]))
    kind = torch.float16 if precision == "fp16" else torch.bfloat16
    expected = torch.from_numpy(values).to(kind).float().numpy()
    np.testing.assert_array_equal(round_to(values, precision), expected)


@narrow
def test_weights_are_the_rounded_ones(precision: str) -> None:
    model = model_of("class token")
    graph = exported("class token", precision=precision)
    weights = {each.name: each for each in graph.graph.initializer}
    stored = weights["pos_embed"]
    assert stored.data_type == PRECISIONS[precision]
    expected = round_to(model.vit.pos_embed.detach().numpy(), precision)
    read = numpy_helper.to_array(stored).astype(np.float32)
    np.testing.assert_array_equal(read, expected)


# --- what cannot be done --------------------------------------------------------------------------


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(SimpruneError, match="'int8' is not known: use fp32, fp16 or bf16"):
        ExportOptions(precision="int8")


def test_a_weight_beyond_float16_is_refused_and_bfloat16_takes_it() -> None:
    model = model_of("class token")
    with torch.no_grad():
        model.vit.blocks[1].mlp.fc2.weight[0, 0] = 70000.0
    with pytest.raises(SimpruneError) as refusal:
        export_onnx(model, ExportOptions(precision="fp16"))
    message = str(refusal.value)
    assert "blocks.1.mlp.fc2" in message
    assert "70000" in message
    assert "65504" in message
    assert "use precision='bf16'" in message
    assert "\n" not in message
    export_onnx(model, ExportOptions(precision="bf16"))


def test_weights_too_small_for_float16_are_counted() -> None:
    model = model_of("class token")
    with torch.no_grad():
        model.vit.blocks[0].mlp.fc1.weight[0, :5] = 1e-9
    metadata = read_metadata(export_onnx(model, ExportOptions(precision="fp16")))
    others = read_metadata(exported("class token", precision="fp16")).rounding["flushed_to_zero"]
    assert metadata.rounding["flushed_to_zero"] == others + 5
    metadata = read_metadata(export_onnx(model, ExportOptions(precision="bf16")))
    assert metadata.rounding["flushed_to_zero"] == 0


def test_tokens_too_small_for_float16_fail_the_proof_and_bfloat16_takes_them() -> None:
    """Below 6e-5 float16 has fewer and fewer digits, and a normalization brings that to light."""
    model = build_pruned(by_name["norm of queries and keys"])
    assert model.vit.cls_token.abs().max() < 1e-5
    images = photographs(model, 4)
    for precision, status in (("fp16", "failed"), ("bf16", "passed in emulation")):
        graph = export_onnx(model, ExportOptions(batch=(1, 4), precision=precision))
        verdict, _ = compare_with_torch(graph, model, images)
        assert verdict.status == status, precision
        assert verdict.check("outputs").passed is (precision == "bf16")


def test_an_activation_beyond_float16_fails_the_proof() -> None:
    """One channel of the MLP grows past 65504 and is multiplied by nothing."""
    model = model_of("class token")
    with torch.no_grad():
        model.vit.blocks[0].mlp.fc1.bias[0] = 60000.0
        model.vit.blocks[0].mlp.fc1.weight[0] = 0
        model.vit.blocks[0].mlp.fc2.weight[:, 0] = 0
        model.vit.blocks[0].mlp.fc2.weight[0, 0] = 2.0
        model.vit.blocks[0].mlp.fc2.bias[0] = -60000.0
    images = photographs(model, 4)
    verdict, _ = compare_with_torch(
        export_onnx(model, ExportOptions(batch=(1, 4), precision="fp16")), model, images
    )
    check = verdict.check("range")
    assert check.passed is False
    assert "65504" in check.summary
    assert "bf16" in check.summary
    assert verdict.status == "failed"


# --- parity checks --------------------------------------------------------------------------------


@narrow
@some_architectures
def test_the_export_is_proven(architecture: Architecture, precision: str) -> None:
    model = model_of(architecture.what)
    graph = exported(architecture.what, precision=precision)
    verdict, _ = compare_with_torch(graph, model, photographs(model))
    expected = "passed" if precision == "fp16" else "passed in emulation"
    assert verdict.status == expected, verdict.reason
    assert verdict.accepted
    assert verdict.check("pruning").numbers["pruned_patches"] > 0
    outputs = verdict.check("outputs").numbers
    assert outputs["images"] == 8, "the reference is told the decisions, so all are compared"
    assert 0 < outputs["rms_difference"] <= outputs["rms_tolerance"]
    assert verdict.environment["precision"] == precision
    if precision == "bf16":
        assert verdict.check("run").passed is None
        assert "was not run" in verdict.check("run").summary
        assert "emulating" in verdict.environment["runtime"]
        assert verdict.to_dict()["skipped"][0]["check"] == "run"
    else:
        assert verdict.check("range").numbers["largest"] < 65504


@pytest.mark.parametrize(
    "options",
    [
        {"runtime_threshold": True},
        {"log_size_in_keys": True},
        {"normalize": True, "softmax": True, "emit_assignments": True},
        {"opset": 18},
        {"opset": 23},
    ],
    ids=lambda options: "-".join(options),
)
@narrow
def test_every_form_of_export_is_proven(options: dict[str, Any], precision: str) -> None:
    model = model_of("class token")
    images = photographs(model, 4)
    if options.get("normalize"):
        from simprune_deploy.common.images import Preprocessing, sample_images

        images = sample_images(Preprocessing.of_model(model), 4, normalize=False)
    graph = exported("class token", precision=precision, **options)
    verdict, _ = compare_with_torch(graph, model, images)
    assert verdict.accepted, verdict.reason


@narrow
@pytest.mark.parametrize(
    "changes",
    [{"tokens": 20}, {"reduction": "drop"}, {"selection": "redundancy", "threshold": 0.3}],
    ids=["fixed-tokens", "drop", "redundancy"],
)
def test_every_way_to_prune_is_proven(changes: dict[str, Any], precision: str) -> None:
    model = prune(model_of("class token"), **changes)
    graph = export_onnx(model, ExportOptions(batch=(1, 4), precision=precision))
    verdict, _ = compare_with_torch(graph, model, photographs(model, 4))
    assert verdict.accepted, verdict.reason


@narrow
def test_a_model_without_prune_nodes(precision: str) -> None:
    model = prune(build(by_name["class token"]), threshold=2.0, layers=[1])
    graph = export_onnx(model, ExportOptions(batch=(1, 4), precision=precision))
    assert value_types(graph)["logits"] == FLOAT
    verdict, _ = compare_with_torch(graph, model, photographs(model, 2))
    assert verdict.status == "inconclusive"
    assert verdict.check("outputs").passed


def without_log_sizes(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which attention does not see how many patches a token stands for."""
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    zero = helper.make_tensor("nothing", FLOAT, [1], [0.0])
    copy.graph.initializer.append(zero)
    sizes = {node.output[0] for node in copy.graph.node if node.name.startswith("Unsqueeze")}
    changed = 0
    for node in copy.graph.node:
        if node.op_type == "Add" and node.input[1] in sizes:
            node.input[1] = "nothing"
            changed += 1
    assert changed
    return copy


@narrow
def test_a_wrong_graph_fails_though_the_tolerance_is_wide(precision: str) -> None:
    """On trained weights: on random ones attention is even, and sizes mean little."""
    import simprune_deploy as sd

    model = prune(sd.load(DEMO), threshold=0.85, layers=[1, 3])
    images = photographs(model)
    graph = export_onnx(model, ExportOptions(batch=(1, 4), precision=precision))
    good, _ = compare_with_torch(graph, model, images)
    assert good.accepted, good.reason
    bad, _ = compare_with_torch(without_log_sizes(graph), model, images)
    assert bad.check("outputs").passed is False
    assert bad.status == "failed"


@narrow
def test_a_file_of_another_precision_than_it_says_fails(precision: str) -> None:
    model = model_of("class token")
    graph = onnx.ModelProto()
    graph.CopyFrom(exported("class token", precision=precision))
    entry = next(each for each in graph.metadata_props if each.key == "simprune")
    metadata = json.loads(entry.value)
    for claim in {"fp32", "fp16", "bf16", "fp8"} - {precision}:
        metadata["export"]["precision"] = claim
        entry.value = json.dumps(metadata)
        verdict, _ = compare_with_torch(graph, model, photographs(model, 2))
        assert verdict.status == "failed", claim
        assert verdict.check("graph").passed is False
        assert verdict.check("outputs").passed is None


@narrow
def test_golden_cases_prove_it_again(precision: str, tmp_path: Path) -> None:
    model = model_of("class token")
    graph = exported("class token", precision=precision)
    _, golden = compare_with_torch(graph, model, photographs(model))
    save_golden(tmp_path / "golden.npz", golden)
    read = load_golden(tmp_path / "golden.npz", [0, 1])
    assert "with the runtime's decisions" in read.reference.name
    verdict = compare_with_golden(graph, read)
    assert verdict.status == ("passed" if precision == "fp16" else "passed in emulation")
    far = dataclasses.replace(read.reference, outputs=read.reference.outputs + np.float32(0.5))
    assert compare_with_golden(graph, dataclasses.replace(read, reference=far)).status == "failed"


def test_decisions_are_judged_on_the_features_that_were_seen() -> None:
    """Features of 16 bits give other similarities; the judge reads those, so it stays as strict."""
    model = model_of("class token")
    graph = exported("class token", precision="fp16")
    shown = session(with_diagnostics(graph))
    pixels = photographs(model).pixels
    names = [value.name for value in shown.get_outputs()]
    found = dict(zip(names, shown.run(None, {"images": pixels[:4]}), strict=True))
    assert found["diagnosis_0/features"].dtype == np.float16
    verdict, _ = compare_with_torch(graph, model, photographs(model))
    decisions = verdict.check("decisions").numbers
    assert decisions["largest_violation"] <= decisions["float_noise"] < 2e-6


@pytest.mark.parametrize("reduction", ["merge", "drop"])
def test_with_its_own_decisions_pytorch_gives_its_own_answer(reduction: str) -> None:
    model = prune(model_of("class token"), reduction=reduction)
    pixels = photographs(model, 4).pixels
    limits = np.full(4, model.config.threshold, np.float32)
    inputs = Inputs(pixels, limits, (1, 4))
    metadata = metadata_of_model(model, ExportOptions())
    own = run(TorchPredictor(model, metadata), inputs, inputs.mixed())
    replayed = replay(model, metadata, own, inputs, "replayed")
    np.testing.assert_allclose(replayed.outputs, own.outputs, rtol=0, atol=1e-6)
    for layer in (0, 1):
        for mine, theirs in zip(replayed.records[layer], own.records[layer], strict=True):
            assert mine.same_decisions(theirs)


@narrow
def test_the_emulation_holds_numbers_of_16_bits_only(precision: str) -> None:
    graph = exported("class token", precision=precision)
    model = emulated(graph, precision)
    types, low = value_types(graph), PRECISIONS[precision]
    names = [n for node in graph.graph.node for n in node.output if types.get(n) == low]
    for name in names:
        model.graph.output.append(helper.make_tensor_value_info(name, FLOAT, None))
    pixels = photographs(model_of("class token"), 2).pixels
    shown = session(model)
    values = shown.run(names, {"images": pixels})
    for name, value in zip(names, values, strict=True):
        np.testing.assert_array_equal(round_to(value, precision), value, err_msg=name)
    if precision == "fp16":
        (real,) = session(graph).run(["logits"], {"images": pixels})
        (alike,) = shown.run(["logits"], {"images": pixels})
        limit = Tolerance("fp16", 2).largest(real)
        np.testing.assert_allclose(alike, real, rtol=0, atol=limit)


# --- the command line -----------------------------------------------------------------------------


def simprune(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "simprune_deploy", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@narrow
def test_the_demo_model_from_export_to_verify(precision: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = simprune(
        *("export", DEMO, "--layers", "1,3,4", "--precision", precision, "-o", out, "--json")
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    expected = "passed" if precision == "fp16" else "passed in emulation"
    assert answer["verdict"]["status"] == answer["manifest"]["verdict"] == expected
    assert answer["manifest"]["model"]["export"]["precision"] == precision
    assert answer["manifest"]["inputs"][0]["dtype"] == "float32"
    assert answer["manifest"]["outputs"][0]["dtype"] == "float32"
    shown = simprune("inspect", out, "--json")
    assert json.loads(shown.stdout)["export"]["precision"] == precision
    again = simprune("verify", out)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stderr == ""
    assert expected in again.stdout
    assert ("was not run" in " ".join(again.stdout.split())) == (precision == "bf16")
    full = simprune("verify", out, "--reference", DEMO, "--json")
    assert full.returncode == 0, full.stderr
    assert json.loads(full.stdout)["status"] == expected


def test_a_bad_precision_is_one_line(tmp_path: Path) -> None:
    done = simprune("export", DEMO, "--precision", "half", "-o", tmp_path / "out")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "'--precision': 'half' is not one of 'fp32', 'fp16', 'bf16'" in line
    assert not (tmp_path / "out").exists()


# --- TensorRT-RTX ---------------------------------------------------------------------------------


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed"
)
@narrow
@pytest.mark.parametrize("fixed", [False, True], ids=["dynamic", "fixed"])
def test_tensorrt_rtx_builds_it_strongly_typed(precision: str, fixed: bool) -> None:
    """For SM 8.6, 8.9 and 12.0, on a machine with or without a GPU."""
    import tensorrt_rtx as trt

    model: PrunedViT = model_of("class token")
    if fixed:
        model = prune(model, tokens=20)
    options = ExportOptions(batch=(1, 4), precision=precision, runtime_threshold=not fixed)
    graph = export_onnx(model, options)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse(graph.SerializeToString())
    assert parsed, [parser.get_error(i).desc() for i in range(parser.num_errors)]
    assert network.get_input(0).dtype == network.get_output(0).dtype == trt.float32
    config = builder.create_builder_config()
    architectures = [
        trt.ComputeCapability.SM86,
        trt.ComputeCapability.SM89,
        trt.ComputeCapability.SM120,
    ]
    config.num_compute_capabilities = len(architectures)
    for index, each in enumerate(architectures):
        config.set_compute_capability(each, index)
    profile = builder.create_optimization_profile()
    profile.set_shape("images", (1, 3, 128, 128), (2, 3, 128, 128), (4, 3, 128, 128))
    if not fixed:
        profile.set_shape("threshold", (1,), (1,), (4,))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    assert engine.nbytes > 0
