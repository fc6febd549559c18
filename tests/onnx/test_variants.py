"""Other forms of an exported graph: without the operator's function, and with its body inlined."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from architectures import ARCHITECTURES, Architecture, build, photographs
from definition import Case, similarity_prune
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from typer.testing import CliRunner

from simprune_deploy.cli import app
from simprune_deploy.onnx.exporter import ExportOptions, export_onnx
from simprune_deploy.onnx.function_body import ATTRIBUTES, DOMAIN, NAMING_ATTRIBUTES
from simprune_deploy.onnx.metadata import METADATA_KEY, read_metadata, write_metadata
from simprune_deploy.onnx.precision import emulated, with_precision
from simprune_deploy.onnx.variants import (
    function_of,
    inlined,
    prune_nodes,
    with_diagnostics,
    with_function,
    without_function,
)
from simprune_deploy.parity.comparison import compare_with_torch
from simprune_deploy.parity.golden import save_golden
from simprune_deploy.parity.graph_check import check_graph
from simprune_deploy.pruning.model import PrunedViT, prune

by_name = {each.what: each for each in ARCHITECTURES}
CLASS_TOKEN = by_name["class token"]
DYNAMIC, FIXED = "dynamic", "fixed"

every_form = pytest.mark.parametrize(
    ("tokens", "selection", "reduction"),
    [
        (tokens, selection, reduction)
        for tokens in (DYNAMIC, FIXED)
        for selection in ("pairs", "redundancy")
        for reduction in ("merge", "drop")
    ],
)


class SimilarityPrune(OpRun):
    """The operator as a plugin would supply it: the written definition, in loops."""

    op_domain = DOMAIN

    def _run(
        self, tokens: Any, features: Any, log_size: Any, threshold: Any, **attributes: Any
    ) -> tuple[Any, ...]:
        assert sorted(attributes) == sorted([*ATTRIBUTES, *NAMING_ATTRIBUTES])
        case = Case(
            tokens.astype(np.float32),
            log_size,
            threshold,
            attributes["num_prefix_tokens"],
            attributes["selection"],
            attributes["reduction"],
            attributes["capacity"],
            attributes["multiple_of"],
            features.astype(np.float32),
        )
        result = similarity_prune(case)
        return (
            result.kept_tokens.astype(tokens.dtype),
            result.kept_log_size.astype(np.float32),
            result.kept_index,
            result.assignment,
            *([] if case.capacity else [np.array(result.kept_index.shape[1])]),
        )


def pruned(architecture: Architecture, **choices: Any) -> PrunedViT:
    values = {"threshold": 0.8, "layers": architecture.layers, **choices}
    return prune(build(architecture), **values)


@functools.cache
def traced(tokens: str, precision: str) -> onnx.ModelProto:
    if precision != "fp32":  # a pass over the float32 graph, as in the exporter
        return with_precision(traced(tokens, "fp32"), precision)
    model = pruned(CLASS_TOKEN, tokens=40 if tokens == FIXED else None)
    return export_onnx(model, ExportOptions(batch=(1, 4), runtime_threshold=True))


def in_form(
    tokens: str, selection: str, reduction: str, precision: str = "fp32"
) -> onnx.ModelProto:
    """Return the graph of an export with these choices, of which one trace shows all.

    (The choices are attributes and the function's text; that a real export has the same is
    `test_choices_are_attributes_and_the_function`.)
    """
    graph = onnx.ModelProto()
    graph.CopyFrom(traced(tokens, precision))
    metadata = read_metadata(graph)
    config = dataclasses.replace(metadata.pruning, selection=selection, reduction=reduction)
    for node in prune_nodes(graph):
        for attribute in node.attribute:
            if attribute.name in ("selection", "reduction"):
                attribute.s = str(getattr(config, attribute.name)).encode()
    metadata = dataclasses.replace(metadata, pruning=config)
    del graph.functions[:]
    graph.functions.append(function_of(metadata))
    write_metadata(graph, metadata)
    return graph


def run(graph: onnx.ModelProto, feed: dict[str, Any]) -> dict[str, Any]:
    """Run a graph in ONNX Runtime; every output by its name."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [each.name for each in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


def run_with_the_definition(graph: onnx.ModelProto, feed: dict[str, Any]) -> dict[str, Any]:
    """Run a graph in ONNX's reference evaluator, which knows our operator as the definition."""
    evaluator = ReferenceEvaluator(graph, new_ops=[SimilarityPrune])
    return dict(zip(evaluator.output_names, evaluator.run(None, feed), strict=True))


# --- without the function -------------------------------------------------------------------------


def test_choices_are_attributes_and_the_function() -> None:
    model = pruned(CLASS_TOKEN, tokens=40, selection="redundancy", reduction="drop")
    graph = export_onnx(model, ExportOptions(batch=(1, 4), runtime_threshold=True))
    assert in_form(FIXED, "redundancy", "drop") == graph


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@every_form
def test_a_stripped_file_with_the_operator_supplied_gives_the_same(
    tokens: str, selection: str, reduction: str, precision: str
) -> None:
    whole = in_form(tokens, selection, reduction, precision)
    stripped = without_function(whole)
    assert len(whole.functions) == 1
    assert not stripped.functions
    onnx.checker.check_model(stripped, full_check=True)
    limits = {"pairs": [0.8, 0.7, 0.9], "redundancy": [0.5, 0.6, 0.4]}[selection]
    pixels = photographs(pruned(CLASS_TOKEN), 4).pixels[1:]
    feed = {"images": pixels, "threshold": np.array(limits, np.float32)}
    shown = [with_diagnostics(whole), with_diagnostics(stripped)]
    if precision == "fp16":  # both round behind every operator, and sum in float32
        shown = [emulated(each, precision) for each in shown]
    expected, actual = run(shown[0], feed), run_with_the_definition(shown[1], feed)
    assert actual.keys() == expected.keys()
    room = {"fp32": 1e-6, "fp16": 2e-3}[precision]
    for name, value in actual.items():
        assert value.dtype == expected[name].dtype, name
        if value.dtype == np.int64:
            np.testing.assert_array_equal(value, expected[name], err_msg=name)
        else:
            scale = np.abs(expected[name]).max()
            np.testing.assert_allclose(
                value, expected[name], rtol=room, atol=room * scale, err_msg=name
            )
    slots = [set(row) for row in expected["diagnosis_1/assignment"].tolist()]
    assert any(len(each - {-1}) < 60 for each in slots), "something was pruned"


@every_form
def test_the_function_comes_back_byte_for_byte(tokens: str, selection: str, reduction: str) -> None:
    whole = in_form(tokens, selection, reduction)
    before = whole.SerializeToString()
    stripped = without_function(whole)
    assert whole.SerializeToString() == before
    assert not read_metadata(stripped).has_function
    assert with_function(stripped).SerializeToString() == before
    assert with_function(whole).SerializeToString() == before
    assert without_function(stripped).SerializeToString() == stripped.SerializeToString()


def test_the_function_of_a_16_bit_file_comes_back_byte_for_byte() -> None:
    whole = traced(DYNAMIC, "fp16")
    assert with_function(without_function(whole)).SerializeToString() == whole.SerializeToString()


def test_a_graph_that_prunes_nowhere_has_no_function_to_strip() -> None:
    graph = export_onnx(pruned(CLASS_TOKEN, threshold=2.0), ExportOptions(batch=(1, 4)))
    assert not graph.functions
    assert without_function(graph) == with_function(graph) == graph


def test_the_graph_check_wants_the_function_exactly_where_the_facts_say_so() -> None:
    whole = traced(DYNAMIC, "fp32")
    stripped = without_function(whole)
    assert check_graph(whole, read_metadata(whole)).passed
    assert check_graph(stripped, read_metadata(stripped)).passed
    lost, extra = (
        check_graph(stripped, read_metadata(whole)),
        check_graph(whole, read_metadata(stripped)),
    )
    assert lost.passed is extra.passed is False
    assert "function body is not the operator's" in lost.summary
    assert "it has a function, and says that it has none" in extra.summary


Break = Callable[[onnx.NodeProto], None]


def without_attribute(name: str) -> Break:
    def broken(node: onnx.NodeProto) -> None:
        node.attribute.remove(next(each for each in node.attribute if each.name == name))

    return broken


def with_text(name: str, text: bytes) -> Break:
    def broken(node: onnx.NodeProto) -> None:
        next(each for each in node.attribute if each.name == name).s = text

    return broken


def one_output_less(node: onnx.NodeProto) -> None:
    del node.output[-1:]


def one_output_more(node: onnx.NodeProto) -> None:
    node.output.append("one/too/many")


def last_output_without_a_name(node: onnx.NodeProto) -> None:
    node.output[-1] = ""


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (without_attribute("plugin_version"), "has no plugin_version, which is to be '2'"),
        (with_text("plugin_version", b"1"), "has plugin_version b'1', not b'2'"),
        (without_attribute("plugin_namespace"), "has no plugin_namespace, which is to be ''"),
        (with_text("plugin_namespace", b"other"), "has plugin_namespace b'other', not b''"),
        (one_output_less, "names {less} outputs, not {wanted}: {form}"),
        (one_output_more, "names {more} outputs, not {wanted}: {form}"),
        (last_output_without_a_name, "names {less} outputs, not {wanted}: {form}"),
    ],
)
@pytest.mark.parametrize(
    ("tokens", "in_tensorrt", "wanted"),
    [(DYNAMIC, False, 2), (FIXED, False, 2), (DYNAMIC, True, 5), (FIXED, True, 4)],
)
def test_the_graph_check_names_the_node_that_tensorrt_would_misread(
    tokens: str, in_tensorrt: bool, wanted: int, break_it: Break, said: str
) -> None:
    graph = onnx.ModelProto()
    graph.CopyFrom(traced(tokens, "fp32"))
    if in_tensorrt:
        graph = without_function(graph)
    assert check_graph(graph, read_metadata(graph)).passed
    node = prune_nodes(graph)[1]
    break_it(node)
    check = check_graph(graph, read_metadata(graph))
    form = "all that TensorRT's layer has" if in_tensorrt else "what the model reads"
    line = said.format(less=wanted - 1, more=wanted + 1, wanted=wanted, form=form)
    assert check.passed is False
    assert check.summary == f"the graph contradicts its description: {node.name} {line}"
    assert len(check.numbers["slips"]) == 1


def test_a_proof_of_a_stripped_file_says_what_ran(tmp_path: Path) -> None:
    model = pruned(CLASS_TOKEN)
    stripped = without_function(traced(DYNAMIC, "fp32"))
    verdict, golden = compare_with_torch(stripped, model, photographs(model))
    assert verdict.status == "passed", verdict.reason
    assert "function put back" in verdict.environment["runtime"]
    skipped = {each["check"]: each["why"] for each in verdict.to_dict()["skipped"]}
    assert "none was run here" in skipped["plugin"]

    onnx.save(stripped, tmp_path / "model.onnx")
    save_golden(tmp_path / "golden.npz", golden)
    answer = CliRunner().invoke(app, ["verify", str(tmp_path / "model.onnx"), "--json"])
    assert answer.exit_code == 0, answer.output
    again = json.loads(answer.stdout)
    assert again["status"] == "passed"
    assert [each["check"] for each in again["skipped"]] == ["plugin"]

    without_attribute("plugin_version")(prune_nodes(stripped)[0])  # in it no version but 1 is found
    onnx.save(stripped, tmp_path / "model.onnx")
    answer = CliRunner().invoke(app, ["verify", str(tmp_path / "model.onnx"), "--json"])
    assert answer.exit_code == 1, answer.output
    broken = json.loads(answer.stdout)
    assert broken["status"] == "failed"
    assert "prune_before_block_0 has no plugin_version" in broken["reason"]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_proof_of_a_stripped_16_bit_file_says_what_ran(precision: str) -> None:
    model = pruned(CLASS_TOKEN)
    stripped = without_function(traced(DYNAMIC, precision))
    verdict, _ = compare_with_torch(stripped, model, photographs(model, 4))
    assert verdict.check("outputs").passed, verdict.reason
    assert verdict.check("plugin").passed is None


def test_files_from_before_there_was_a_choice_have_the_function() -> None:
    graph = onnx.ModelProto()
    graph.CopyFrom(traced(DYNAMIC, "fp32"))
    (entry,) = graph.metadata_props
    assert entry.key == METADATA_KEY
    assert "function" not in json.loads(entry.value)["export"]
    assert read_metadata(graph).has_function


# --- inlined --------------------------------------------------------------------------------------


def feed_of(selection: str) -> dict[str, Any]:
    limits = {"pairs": [0.8, 0.7, 0.9], "redundancy": [0.5, 0.6, 0.4]}[selection]
    pixels = photographs(pruned(CLASS_TOKEN), 4).pixels[1:]
    return {"images": pixels, "threshold": np.array(limits, np.float32)}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@every_form
def test_an_inlined_file_is_the_same_model_in_standard_operators(
    tokens: str, selection: str, reduction: str, precision: str
) -> None:
    whole = in_form(tokens, selection, reduction, precision)
    before = whole.SerializeToString()
    flat = inlined(whole)
    assert whole.SerializeToString() == before
    assert not flat.functions
    assert {node.domain for node in flat.graph.node} == {""}
    assert [entry.domain for entry in flat.opset_import] == [""]
    assert list(flat.graph.input) == list(whole.graph.input)
    assert list(flat.graph.output) == list(whole.graph.output)
    feed = feed_of(selection)
    for name, value in run(flat, feed).items():
        np.testing.assert_array_equal(value, run(whole, feed)[name])


@every_form
def test_an_inlined_file_is_tidy(tokens: str, selection: str, reduction: str) -> None:
    flat = inlined(in_form(tokens, selection, reduction))
    main = flat.graph
    made = [name for node in main.node for name in node.output]
    assert len(made) == len(set(made))
    names = [node.name for node in main.node]
    assert len(names) == len(set(names))
    read = {name for node in main.node for name in node.input}
    read |= {value.name for value in main.output}
    assert not [node.name for node in main.node if not read.intersection(node.output)]
    assert {each.name for each in main.initializer} <= read
    constants = [node for node in main.node if node.op_type == "Constant"]
    assert {attribute.name for node in constants for attribute in node.attribute} == {"value"}
    # what the file says of its values is what they are
    assert {info.name for info in main.value_info} <= set(made)
    shows = onnx.ModelProto()
    shows.CopyFrom(flat)
    del shows.graph.output[:]
    shows.graph.output.extend(main.value_info)
    sizes: dict[str, int] = {}
    for info in main.value_info:
        assert info.type.tensor_type.HasField("shape"), info.name
    for name, value in run(shows, feed_of(selection)).items():
        (said,) = (info.type.tensor_type for info in main.value_info if info.name == name)
        assert onnx.helper.tensor_dtype_to_np_dtype(said.elem_type) == value.dtype, name
        assert len(said.shape.dim) == value.ndim, name
        for dim, size in zip(said.shape.dim, value.shape, strict=True):
            known = dim.dim_value or sizes.setdefault(dim.dim_param, size)
            assert known == size, (name, dim)


def test_a_graph_that_prunes_nowhere_is_inlined_as_it_is() -> None:
    graph = export_onnx(pruned(CLASS_TOKEN, threshold=2.0), ExportOptions(batch=(1, 4)))
    assert inlined(graph) == graph


def test_onnxslim_takes_fixed_counts_in_the_inlined_form_only() -> None:
    """docs/tools.md says so; test_companions.py has the other tools, on real images."""
    import onnxslim

    whole = in_form(FIXED, "pairs", "merge")
    feed = feed_of("pairs")
    expected = run(whole, feed)["logits"]
    made = onnxslim.slim(inlined(whole))
    # with fixed counts nothing reads the threshold, and onnxslim drops the input
    assert [value.name for value in made.graph.input] == ["images"]
    found = run(made, {"images": feed["images"]})["logits"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    with pytest.raises(Exception, match="Number of actual parameters"):
        run(onnxslim.slim(whole), feed)
