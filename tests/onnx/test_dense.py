"""The unpruned model taken out of a pruned graph, held to a dense export of the same model."""

from __future__ import annotations

import collections
import dataclasses
import functools
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from architectures import ARCHITECTURES, build, photographs

from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.onnx.exporter import ExportOptions, export_onnx
from simprune_deploy.onnx.metadata import read_metadata
from simprune_deploy.onnx.precision import with_precision
from simprune_deploy.onnx.variants import (
    dense,
    prune_nodes,
    with_log_size_in_keys,
    without_function,
)
from simprune_deploy.parity.graph_check import check_graph
from simprune_deploy.pruning.model import prune

by_name = {each.what: each for each in ARCHITECTURES}
OPSETS = {
    "class token": 20,
    "no class token": 18,
    "distillation token": 18,
    "registers and LayerScale": 20,
    "mean and maximum": 20,
    "attention pool of the prefix too": 20,
}
PLAIN: dict[str, Any] = {"batch": (1, 4), "log_size_in_keys": False}


@functools.cache
def pruned_graph(what: str, tokens: int | None = None) -> onnx.ModelProto:
    """Return an export whose log-sizes are added to the scores."""
    model = prune(build(by_name[what]), threshold=0.8, layers=by_name[what].layers, tokens=tokens)
    return export_onnx(model, ExportOptions(opset=OPSETS[what], **PLAIN))


@functools.cache
def dense_export(what: str) -> onnx.ModelProto:
    return export_onnx(
        prune(build(by_name[what]), layers=()), ExportOptions(opset=OPSETS[what], **PLAIN)
    )


def run(graph: onnx.ModelProto, pixels: Any) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (output,) = session.run(None, {"images": pixels})
    return output


def operators(graph: onnx.ModelProto) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in graph.graph.node)


def shapes(graph: onnx.ModelProto) -> dict[str, list[int | str]]:
    return {
        info.name: [dim.dim_value or dim.dim_param for dim in info.type.tensor_type.shape.dim]
        for info in graph.graph.value_info
    }


def hold(graph: onnx.ModelProto, expected: onnx.ModelProto, pixels: Any) -> None:
    """Check that `graph`, unpruned, is as good as the dense export."""
    before = graph.SerializeToString()
    actual = dense(graph)
    assert graph.SerializeToString() == before
    assert operators(actual) == operators(expected)
    assert len(actual.graph.initializer) <= len(expected.graph.initializer) + 4
    assert not prune_nodes(actual)
    assert not actual.functions
    assert [each.name for each in actual.graph.input] == ["images"]
    assert list(actual.graph.output) == list(expected.graph.output)
    assert {each.domain for each in actual.opset_import} == {""}
    for name, shape in shapes(actual).items():
        assert "" not in shape, name
        assert set(shape) <= {"batch", *[each for each in shape if isinstance(each, int)]}, name
    metadata = read_metadata(actual)
    assert metadata.pruning.layers == metadata.pruning.capacities == ()
    assert check_graph(actual, metadata).passed
    np.testing.assert_allclose(run(actual, pixels), run(expected, pixels), rtol=1e-5, atol=1e-6)
    assert dense(actual) == actual


@pytest.mark.parametrize("what", OPSETS)
def test_it_is_the_dense_export(what: str) -> None:
    graph, expected = pruned_graph(what), dense_export(what)
    pixels = photographs(build(by_name[what]), 3).pixels
    assert prune_nodes(graph)
    hold(graph, expected, pixels)
    hold(with_log_size_in_keys(graph), expected, pixels)
    hold(with_precision(graph, "fp16"), with_precision(expected, "fp16"), pixels)


def test_the_log_sizes_leave_the_keys_in_16_bits_too() -> None:
    graph, expected = pruned_graph("class token"), dense_export("class token")
    pixels = photographs(build(by_name["class token"]), 3).pixels
    keyed = with_log_size_in_keys(graph)
    hold(with_precision(keyed, "fp16"), with_precision(expected, "fp16"), pixels)
    assert operators(dense(with_precision(keyed, "bf16"))) == operators(
        with_precision(expected, "bf16")
    )


def test_fixed_token_counts_go_out_of_every_shape() -> None:
    what = "attention pool of the prefix too"
    graph, expected = pruned_graph(what, tokens=40), dense_export(what)
    pixels = photographs(build(by_name[what]), 3).pixels
    hold(graph, expected, pixels)
    hold(with_log_size_in_keys(graph), expected, pixels)


def test_what_belongs_to_pruning_leaves_inputs_and_outputs() -> None:
    """Every option at once, a fixed batch, and a file without the function."""
    model = build(by_name["class token"])
    options = ExportOptions(
        batch=(2, 2), runtime_threshold=True, emit_assignments=True, softmax=True, normalize=True
    )
    pruned = prune(
        model, threshold=0.8, layers=(0, 1), proportional_attention=False, reduction="drop"
    )
    graph = without_function(export_onnx(pruned, options))
    assert len(graph.graph.input) == 2
    assert len(graph.graph.output) == 3
    expected = export_onnx(
        prune(model, layers=()), dataclasses.replace(options, runtime_threshold=False)
    )
    hold(graph, expected, photographs(model, 2).pixels * 0.1 + 0.5)
    metadata = read_metadata(dense(graph))
    assert metadata.export["runtime_threshold"] is metadata.export["emit_assignments"] is False
    assert metadata.has_function


def test_a_graph_that_was_changed_is_refused() -> None:
    graph = onnx.ModelProto()
    graph.CopyFrom(pruned_graph("class token"))
    sizes = prune_nodes(graph)[0].output[1]
    reader = next(node for node in graph.graph.node if node.op_type == "Unsqueeze")
    assert reader.input[0] == sizes
    scores = next(node for node in graph.graph.node if reader.output[0] in node.input)
    scores.op_type = "Mul"
    with pytest.raises(SimpruneError, match="reads the log-sizes"):
        dense(graph)
