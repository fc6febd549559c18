"""The portable ONNX body against the PyTorch operator, and what compilers ask of its text."""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from definition import (
    EXACT_THRESHOLDS,
    PAD,
    REDUCTIONS,
    SELECTIONS,
    Case,
    Result,
    exact_case,
    random_case,
    reduce_tokens,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from simprune_deploy.onnx.function_body import (
    ATTRIBUTES,
    DOMAIN,
    DOMAIN_VERSION,
    INPUTS,
    MAX_OPSET,
    MIN_OPSET,
    OP_TYPE,
    OUTPUTS,
    BodyVariant,
    build_function,
    count_outputs,
)
from simprune_deploy.parity.decisions import float_noise, violation
from simprune_deploy.predict.records import PruneRecord
from simprune_deploy.pruning.config import PruneConfig
from simprune_deploy.pruning.operator import similarity_prune

REPRODUCIBLE = settings(deadline=None, derandomize=True, database=None)
DIM = 16
PREFIXES = (0, 1, 4)
VARIANTS = [
    BodyVariant(selection, reduction, fixed, prefix, DIM, num_outputs=count_outputs(fixed))
    for selection in SELECTIONS
    for reduction in REDUCTIONS
    for fixed in (False, True)
    for prefix in PREFIXES
]
OPSETS = range(MIN_OPSET, MAX_OPSET + 1)


def describe(variant: BodyVariant) -> str:
    capacity = "fixed" if variant.fixed_capacity else "dynamic"
    return f"{variant.selection}-{variant.reduction}-{capacity}-{variant.num_prefix_tokens}"


WITHOUT_PADDING = [each for each in VARIANTS if each.fixed_capacity and each.selection == "pairs"]
"""A model with fixed counts has no padding, and the body for it none of the steps."""
with_padding = pytest.mark.parametrize(
    "variant", [each for each in VARIANTS if each not in WITHOUT_PADDING], ids=describe
)
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=describe)


def attributes_of(case: Case) -> dict[str, Any]:
    """The node's attributes, all of them, as the exporter writes them."""
    values = {**case.attributes, "opt_tokens": 100, "max_tokens": 100}
    assert sorted(values) == list(ATTRIBUTES)
    return values


def build_model(
    nodes: list[dict[str, Any]],
    opset: int = 20,
    kind: int = TensorProto.FLOAT,
    num_tokens: int | str = "tokens",
    dim: int = DIM,
    batch: int | str = "batch",
    num_outputs: int | None = None,
) -> onnx.ModelProto:
    """A model of one prune node, or of several in a chain, and the function they call.

    Its outputs are the last node's. Every dimension is dynamic unless it is given as a number.
    """
    first = nodes[0]
    variant = BodyVariant(
        first["selection"],
        first["reduction"],
        first["capacity"] > 0,
        first["num_prefix_tokens"],
        dim,
        first["multiple_of"],
        kind == TensorProto.FLOAT,
        num_outputs or count_outputs(first["capacity"] > 0),
    )
    names = OUTPUTS[: variant.num_outputs]
    floats = TensorProto.FLOAT
    inputs = [
        helper.make_tensor_value_info("tokens", kind, [batch, num_tokens, dim]),
        helper.make_tensor_value_info(
            "features", kind, [batch, num_tokens, dim if num_tokens != "tokens" else "features"]
        ),
        helper.make_tensor_value_info("log_size", floats, [batch, num_tokens]),
        helper.make_tensor_value_info("threshold", floats, ["thresholds"]),
    ]
    chain = []
    read = list(INPUTS)
    for position, attributes in enumerate(nodes):
        last = position == len(nodes) - 1
        written = list(names) if last else [f"{name}_{position}" for name in names]
        chain.append(
            helper.make_node(
                OP_TYPE, read, written, name=f"prune_{position}", domain=DOMAIN, **attributes
            )
        )
        read = [written[0], written[0], written[1], "threshold"]
    kept = first["num_prefix_tokens"] + nodes[-1]["capacity"] if first["capacity"] else "kept"
    outputs = [
        helper.make_tensor_value_info("kept_tokens", kind, [batch, kept, dim]),
        helper.make_tensor_value_info("kept_log_size", floats, [batch, kept]),
        helper.make_tensor_value_info("kept_index", TensorProto.INT64, [batch, kept]),
        helper.make_tensor_value_info("assignment", TensorProto.INT64, [batch, None]),
        helper.make_tensor_value_info("num_kept", TensorProto.INT64, []),
    ][: variant.num_outputs]
    return helper.make_model(
        helper.make_graph(chain, "prunes", inputs, outputs),
        functions=[build_function(variant, opset)],
        opset_imports=[
            helper.make_opsetid("", opset),
            helper.make_opsetid(DOMAIN, DOMAIN_VERSION),
        ],
        ir_version=10,
    )


@functools.cache
def session(
    attributes: tuple[tuple[str, Any], ...], opset: int, kind: int, dim: int
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    model = build_model([dict(attributes)], opset, kind, dim=dim)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def run_onnx(case: Case, opset: int = 20, half: bool = False) -> Result:
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    runner = session(tuple(attributes_of(case).items()), opset, kind, case.tokens.shape[2])
    wide = np.float16 if half else np.float32
    features = case.tokens if case.features is None else case.features
    feed = {
        "tokens": case.tokens.astype(wide),
        "features": features.astype(wide),
        "log_size": case.log_size,
        "threshold": case.threshold,
    }
    found = runner.run(None, feed)
    kept_tokens, kept_log_size, kept_index, assignment = found[:4]
    if not case.capacity:
        assert found[4].shape == ()
        assert found[4] == kept_tokens.shape[1]
    assert kept_tokens.dtype == feed["tokens"].dtype
    assert kept_log_size.dtype == np.float32
    assert kept_index.dtype == assignment.dtype == np.int64
    return Result(kept_tokens.astype(np.float64), kept_log_size, kept_index, assignment)


def run_torch(case: Case, half: bool = False) -> Result:
    kind = torch.float16 if half else torch.float32
    tokens = torch.from_numpy(case.tokens).to(kind)
    features = tokens if case.features is None else torch.from_numpy(case.features).to(kind)
    outputs = similarity_prune(
        tokens,
        features,
        torch.from_numpy(case.log_size),
        torch.from_numpy(case.threshold),
        **case.attributes,
    )
    kept_tokens, *others = outputs
    return Result(kept_tokens.double().numpy(), *(output.numpy() for output in others))


def assert_same(actual: Result, expected: Result, tolerance: float = 1e-6) -> None:
    np.testing.assert_array_equal(actual.kept_index, expected.kept_index)
    np.testing.assert_array_equal(actual.assignment, expected.assignment)
    np.testing.assert_allclose(actual.kept_tokens, expected.kept_tokens, rtol=0, atol=tolerance)
    np.testing.assert_allclose(actual.kept_log_size, expected.kept_log_size, rtol=0, atol=2e-6)


def assert_right(case: Case, actual: Result) -> None:
    """Every decision within float noise; tokens and sizes as they follow from the decisions."""
    config = PruneConfig(
        layers=(0,),
        selection=case.selection,  # type: ignore[arg-type]
        capacities=(case.capacity,) if case.capacity else (),
    )
    for image in range(len(case.tokens)):
        record = PruneRecord(
            features=(case.tokens if case.features is None else case.features)[image],
            log_size=case.log_size[image],
            threshold=float(case.threshold[image if len(case.threshold) > 1 else 0]),
            kept_index=actual.kept_index[image],
            assignment=actual.assignment[image],
        )
        wrong_by = violation(record, config, case.capacity, case.prefix)
        assert wrong_by <= float_noise(record.features.shape[1])
    follows = reduce_tokens(
        case.tokens,
        case.log_size,
        actual.kept_index,
        actual.assignment,
        case.reduction,
        case.prefix,
    )
    largest = 1 + np.abs(case.tokens).max()
    np.testing.assert_allclose(actual.kept_tokens, follows.kept_tokens, rtol=0, atol=1e-6 * largest)
    np.testing.assert_allclose(actual.kept_log_size, follows.kept_log_size, rtol=0, atol=2e-6)


def case_of(variant: BodyVariant, seed: int, **changes: Any) -> Case:
    """An exact case of a variant; capacities from few values, so that sessions are few."""
    rng = np.random.default_rng([seed, 1])
    fixed = variant.fixed_capacity
    patches = changes.get("patches", int(rng.choice([9, 14]) if fixed else rng.integers(6, 26)))
    values: dict[str, Any] = {
        "batch": int(rng.integers(1, 5)),
        "patches": patches,
        "prefix": variant.num_prefix_tokens,
        "capacity": int(rng.choice([patches // 2, patches * 3 // 4])) if fixed else 0,
        "multiple_of": 1 if fixed else int(rng.choice([1, 8])),
        "per_image_threshold": bool(rng.integers(2)),
        "dim": DIM,
    }
    if fixed and variant.selection == "pairs":
        values["padding"] = "none"
    return exact_case(
        seed,
        selection=variant.selection,
        reduction=variant.reduction,
        **{**values, **changes},
    )


SEEDS = st.integers(0, 2**32 - 1)


# --- decisions and tokens -------------------------------------------------------------------------


@settings(REPRODUCIBLE, max_examples=1200)
@given(st.sampled_from(VARIANTS), SEEDS)
def test_exact_data_gives_what_pytorch_gives(variant: BodyVariant, seed: int) -> None:
    case = case_of(variant, seed)
    assert_same(run_onnx(case), run_torch(case))


@settings(REPRODUCIBLE, max_examples=300)
@given(st.sampled_from(VARIANTS), SEEDS)
def test_exact_data_gives_what_the_definition_says(variant: BodyVariant, seed: int) -> None:
    case = case_of(variant, seed, batch=2, patches=10)
    assert_same(run_onnx(case), case.expected())


@settings(REPRODUCIBLE, max_examples=800)
@given(st.sampled_from(VARIANTS), SEEDS, st.sampled_from([0.0, 0.1, 0.4, 1.0]))
def test_random_data_is_decided_right_within_float_noise(
    variant: BodyVariant, seed: int, spread: float
) -> None:
    drawn = case_of(variant, seed)
    case = random_case(
        seed,
        batch=len(drawn.tokens),
        patches=drawn.tokens.shape[1] - drawn.prefix,
        spread=spread,
        **{name: getattr(drawn, name) for name in ("prefix", "selection", "reduction")},
        capacity=drawn.capacity,
        multiple_of=drawn.multiple_of,
        **({"padding": "none"} if variant in WITHOUT_PADDING else {}),
    )
    assert_right(case, run_onnx(case))


@every_variant
@pytest.mark.parametrize("threshold", EXACT_THRESHOLDS)
def test_every_threshold_with_its_ties(variant: BodyVariant, threshold: float) -> None:
    for seed in range(2):
        case = case_of(variant, seed, threshold=threshold)
        assert_same(run_onnx(case), run_torch(case))


@every_variant
@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset(variant: BodyVariant, opset: int) -> None:
    for seed in range(3):
        case = case_of(variant, seed, multiple_of=1)
        assert_same(run_onnx(case, opset), run_torch(case))


@every_variant
def test_half_precision_tokens(variant: BodyVariant) -> None:
    for seed in range(15):
        case = case_of(variant, seed)
        assert_same(run_onnx(case, half=True), run_torch(case, half=True), 2.0**-10)


@every_variant
@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_an_image_does_not_depend_on_the_others_in_its_batch(
    variant: BodyVariant, batch: int
) -> None:
    padding = "none" if variant in WITHOUT_PADDING else "tail"
    case = case_of(variant, batch, batch=batch, padding=padding)
    together = run_onnx(case)
    for image in range(batch):
        if case.prefix == 0 and (case.log_size[image] <= PAD / 2).all():
            continue
        alone = run_onnx(case.image(image))
        slots = alone.kept_index.shape[1]
        np.testing.assert_array_equal(alone.assignment[0], together.assignment[image])
        np.testing.assert_array_equal(alone.kept_index[0], together.kept_index[image, :slots])
        np.testing.assert_allclose(
            alone.kept_tokens[0], together.kept_tokens[image, :slots], rtol=0, atol=1e-6
        )


@with_padding
def test_an_image_of_padding_alone_keeps_its_prefix(variant: BodyVariant) -> None:
    for seed in range(10):
        case = case_of(variant, seed, batch=3, padding="none")
        case.log_size[1, case.prefix :] = PAD
        actual = run_onnx(case)
        assert_same(actual, run_torch(case))
        assert (actual.assignment[1, case.prefix :] == -1).all()
        assert (actual.kept_log_size[1, case.prefix :] == PAD).all()


@with_padding
@pytest.mark.parametrize("multiple_of", [1, 8])
def test_a_batch_of_padding_alone_keeps_its_prefix(variant: BodyVariant, multiple_of: int) -> None:
    case = case_of(variant, 4, padding="none", multiple_of=multiple_of)
    case.log_size[:, case.prefix :] = PAD
    assert_same(run_onnx(case), case.expected())


@every_variant
def test_nothing_is_pruned_at_a_threshold_that_is_not_a_number(variant: BodyVariant) -> None:
    case = case_of(variant, 1, padding="none", patches=9, capacity=9 * variant.fixed_capacity)
    case = dataclasses.replace(case, threshold=np.full_like(case.threshold, np.nan))
    actual = run_onnx(case)
    assert_same(actual, case.expected())
    np.testing.assert_array_equal(
        actual.kept_tokens[:, case.prefix :], case.tokens[:, case.prefix :]
    )


@pytest.mark.parametrize("prefix", range(8))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_prefix(prefix: int, reduction: str) -> None:
    """The body treats none, one and more prefix tokens apart, and odd numbers and even ones.

    They are copies of the first patch, which would go to them, and they to others, if they could.
    """
    for seed in range(25):
        case = exact_case(
            seed,
            batch=3,
            patches=1 + seed % 9,
            prefix=prefix,
            reduction=reduction,
            multiple_of=(1, 8)[seed % 2],
            dim=DIM,
        )
        case.tokens[:, :prefix] = case.tokens[:, prefix:][:, :1]
        assert_same(run_onnx(case), case.expected())


@every_variant
def test_a_prefix_token_keeps_its_slot_whatever_its_size(variant: BodyVariant) -> None:
    """Even one that padding's size marks; what the token then becomes is undefined."""
    padding = "none" if variant in WITHOUT_PADDING else "tail"
    for seed in range(5):
        case = case_of(variant, seed, batch=3, padding=padding)
        case.log_size[1, : case.prefix // 2 + 1][: case.prefix] = PAD
        actual, expected = run_onnx(case), run_torch(case)
        np.testing.assert_array_equal(actual.kept_index, expected.kept_index)
        np.testing.assert_array_equal(actual.assignment, expected.assignment)
        np.testing.assert_allclose(actual.kept_log_size, expected.kept_log_size, rtol=0, atol=2e-6)
        patches = actual.kept_tokens[:, case.prefix :], expected.kept_tokens[:, case.prefix :]
        np.testing.assert_allclose(*patches, rtol=0, atol=1e-6)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("threshold", [-np.inf, -5.0, 5.0, np.inf])
def test_thresholds_out_of_range(prefix: int, threshold: float) -> None:
    for patches in (1, 2, 7):
        case = exact_case(
            3, patches=patches, prefix=prefix, threshold=threshold, padding="none", dim=DIM
        )
        case.log_size[-1, prefix + 1 :] = PAD
        assert_same(run_onnx(case), case.expected())


@pytest.mark.parametrize("patches", [7, 8])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_what_padding_is(prefix: int, patches: int) -> None:
    """Whatever is not larger than half of PAD, to the bit; here of the last patch."""
    half = np.float32(PAD / 2)
    above, below = np.nextafter(half, np.float32([0, -np.inf]))
    last = prefix + patches - 1
    for log_size, is_valid in ((-200.0, True), (above, True), (half, False), (below, False)):
        case = exact_case(5, patches=patches, prefix=prefix, threshold=2.0, padding="none", dim=DIM)
        case.log_size[:, -1] = log_size
        actual = run_onnx(case)
        assert (actual.assignment[:, -1] == (last if is_valid else -1)).all()
        assert actual.kept_index.shape[1] == last + is_valid


@every_variant
def test_zero_vectors(variant: BodyVariant) -> None:
    for threshold in (-1.0, 0.0, 0.5):
        case = case_of(variant, 6, padding="none", threshold=threshold)
        case.tokens[0] = 0
        case.tokens[-1, case.prefix + 1 :: 2] = 0
        assert_same(run_onnx(case), run_torch(case))


@with_padding
def test_one_patch(variant: BodyVariant) -> None:
    capacity = 1 if variant.fixed_capacity else 0
    for threshold in (-1.0, 0.0, 1.0, 2.0):
        case = case_of(
            variant, 7, patches=1, capacity=capacity, threshold=threshold, padding="none"
        )
        actual = run_onnx(case)
        assert_same(actual, run_torch(case))
        np.testing.assert_array_equal(actual.kept_tokens, case.tokens)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("prefix", [0, 3])
def test_a_threshold_above_one_is_the_identity(prefix: int, selection: str, reduction: str) -> None:
    for threshold in (1.5, 2.0):
        case = random_case(
            8,
            prefix=prefix,
            selection=selection,
            reduction=reduction,
            threshold=threshold,
            padding="none",
        )
        actual = run_onnx(case)
        # a token is multiplied by its size and divided by it again
        close = {"rtol": 1e-6, "atol": 0.0}
        np.testing.assert_allclose(actual.kept_tokens, case.tokens, **close)
        np.testing.assert_allclose(actual.kept_log_size, case.log_size, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(
            actual.kept_index, np.tile(np.arange(case.log_size.shape[1]), (2, 1))
        )
        np.testing.assert_array_equal(actual.assignment, actual.kept_index)


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("patches", [2, 3, 8, 11])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_every_capacity(selection: str, patches: int, prefix: int) -> None:
    for capacity in range(max(1, patches // 2), patches + 1):
        case = exact_case(
            capacity,
            patches=patches,
            prefix=prefix,
            selection=selection,
            capacity=capacity,
            dim=DIM,
            padding="none",
        )
        actual = run_onnx(case)
        assert actual.kept_index.shape[1] == prefix + capacity
        assert_same(actual, run_torch(case))


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("multiple_of", [2, 3, 16, 100])
def test_every_multiple(multiple_of: int, prefix: int) -> None:
    for seed in range(10):
        case = exact_case(seed, patches=14, prefix=prefix, multiple_of=multiple_of, dim=DIM)
        actual = run_onnx(case)
        assert actual.kept_index.shape[1] in {*range(0, 200, multiple_of), 14 + prefix}
        assert_same(actual, run_torch(case))


def test_many_patches_of_an_image() -> None:
    for threshold in (0.3, 0.6, 0.9):
        case = random_case(
            9, batch=2, patches=196, spread=0.5, threshold=threshold, padding="none", dim=48
        )
        assert_right(case, run_onnx(case))


# --- the text of the body -------------------------------------------------------------------------


def small_attributes(variant: BodyVariant) -> dict[str, Any]:
    return {
        "capacity": 9 if variant.fixed_capacity else 0,
        "max_tokens": 17,
        "multiple_of": 1,
        "num_prefix_tokens": variant.num_prefix_tokens,
        "opt_tokens": 12,
        "reduction": variant.reduction,
        "selection": variant.selection,
    }


@every_variant
@pytest.mark.parametrize("opset", OPSETS)
def test_checker_and_strict_shape_inference_pass(variant: BodyVariant, opset: int) -> None:
    model = build_model([small_attributes(variant)], opset, num_tokens=17)
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(
        model, check_type=True, strict_mode=True, data_prop=True
    )
    assert [output.name for output in inferred.graph.output] == list(OUTPUTS[: variant.num_outputs])


@every_variant
def test_the_body_is_plain_standard_onnx(variant: BodyVariant) -> None:
    """No control flow, no name twice, no constant that an optimizer would make a float64."""
    for outputs in (2, 4, variant.num_outputs):
        function = build_function(dataclasses.replace(variant, num_outputs=outputs), 20)
        nodes = list(function.node)
        written = [*function.input, *(name for node in nodes for name in node.output)]
        assert "" not in written
        assert len(written) == len(set(written))
        assert len({node.name for node in nodes} - {""}) == len(nodes)
        assert {node.domain for node in nodes} == {""}
        assert list(function.attribute) == list(ATTRIBUTES)
        assert not {node.op_type for node in nodes} & {"Loop", "If", "Scan"}
        constants = [node for node in nodes if node.op_type == "Constant"]
        kinds = {attribute.name for node in constants for attribute in node.attribute}
        assert kinds <= {"value", "value_int"}


def nodes_at_run_time(model: onnx.ModelProto, path: Path) -> list[str]:
    """The operators that ONNX Runtime runs for a model, once it has optimized it."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize(("fixed", "batch", "most"), [(False, "batch", 45), (True, 2, 41)])
@pytest.mark.parametrize("prefix", [0, 1, 4, 5])
@pytest.mark.parametrize(
    ("runtime_threshold", "half"), [(False, False), (True, False), (False, True), (True, True)]
)
def test_few_nodes_are_left_at_run_time(
    fixed: bool,
    batch: int | str,
    most: int,
    prefix: int,
    runtime_threshold: bool,
    half: bool,
    tmp_path: Path,
) -> None:
    """Every node is a launch on a GPU. With fixed shapes none of them computes a shape."""
    variant = BodyVariant("pairs", "merge", fixed, prefix, DIM)
    model = build_model(
        [{**small_attributes(variant), "capacity": 12 if fixed else 0}],
        num_tokens=17 + prefix if fixed else "tokens",
        batch=batch,
        num_outputs=2,
        kind=TensorProto.FLOAT16 if half else TensorProto.FLOAT,
    )
    most += 4 * half - (fixed and prefix == 1)
    if runtime_threshold:
        most += 3 * (not fixed)
    else:
        model.graph.input.remove(model.graph.input[-1])
        constant = helper.make_tensor("threshold", TensorProto.FLOAT, [1], [0.9])
        model.graph.initializer.append(constant)
    found = nodes_at_run_time(model, tmp_path / "optimized.onnx")
    assert len(found) <= most, collections.Counter(found)
    if fixed:
        assert not {"Shape", "ConstantOfShape", "Loop", "If"} & set(found)


def test_layers_share_what_is_made_of_a_threshold_at_run_time(tmp_path: Path) -> None:
    """So that with three layers no model takes more than 50 nodes a layer."""
    layers = [small_attributes(BodyVariant("pairs", "merge", False, 5, DIM))] * 3
    for kind, body in ((TensorProto.FLOAT, 45), (TensorProto.FLOAT16, 49)):
        model = build_model(layers, num_outputs=2, kind=kind)
        found = nodes_at_run_time(model, tmp_path / "optimized.onnx")
        assert len(found) <= 3 * body + 3 <= 3 * 50, collections.Counter(found)


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed"
)
@every_variant
def test_tensorrt_rtx_builds_a_chain_of_two(variant: BodyVariant) -> None:
    """For SM 8.6, on a machine with or without a GPU."""
    import tensorrt_rtx as trt

    first = small_attributes(variant)
    second = {**first, "capacity": 7 if variant.fixed_capacity else 0}
    model = build_model([first, second], num_tokens=17, dim=8)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse(model.SerializeToString())
    assert parsed, [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    profile = builder.create_optimization_profile()
    profile.set_shape("tokens", (1, 17, 8), (2, 17, 8), (4, 17, 8))
    profile.set_shape("features", (1, 17, 8), (2, 17, 8), (4, 17, 8))
    profile.set_shape("log_size", (1, 17), (2, 17), (4, 17))
    profile.set_shape("threshold", (1,), (1,), (4,))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    assert engine.nbytes > 0
