"""Attention as one node of ONNX Runtime: the same numbers, or an error.

Every kind of model is held to it in test_architectures.py.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from architectures import ARCHITECTURES, build, photographs

from simprune_deploy.common.errors import SimpruneError, UnsupportedModelError
from simprune_deploy.onnx.exporter import ExportOptions, export_onnx
from simprune_deploy.onnx.fused_attention import count_fused, with_fused_attention
from simprune_deploy.onnx.precision import with_precision
from simprune_deploy.onnx.variants import dense, without_function
from simprune_deploy.pruning.model import prune

(CLASS_TOKEN,) = (each for each in ARCHITECTURES if each.what == "class token")
INSIDE = {"place": "inside", "features": "keys"}
FORMS: list[tuple[dict[str, Any], dict[str, Any]]] = [  # how it is pruned, how it is exported
    ({}, {}),
    ({"tokens": 40}, {"opset": 18, "batch": 1}),
    (INSIDE, {"log_size_in_keys": False}),
]


@functools.cache
def traced(pruning: tuple[Any, ...], options: tuple[Any, ...]) -> onnx.ModelProto:
    choices: dict[str, Any] = {"threshold": 0.8, "layers": CLASS_TOKEN.layers, **dict(pruning)}
    model = prune(build(CLASS_TOKEN), **choices)
    return export_onnx(model, ExportOptions(**{"batch": (1, 4), **dict(options)}))


def exported(
    pruning: dict[str, Any] | None = None, options: dict[str, Any] | None = None
) -> onnx.ModelProto:
    return traced(tuple((pruning or {}).items()), tuple((options or {}).items()))


def run(graph: onnx.ModelProto, count: int = 3) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    batch = session.get_inputs()[0].shape[0]
    pixels = photographs(build(CLASS_TOKEN), 4).pixels[: batch if isinstance(batch, int) else count]
    return np.asarray(session.run(None, {"images": pixels})[0])


@pytest.mark.parametrize(("pruning", "options"), FORMS)
def test_every_attention_is_one_node_and_the_numbers_are_the_same(
    pruning: dict[str, Any], options: dict[str, Any]
) -> None:
    graph = exported(pruning, options)
    before = graph.SerializeToString()
    for form in (graph, dense(graph)):
        fused = with_fused_attention(form)
        assert count_fused(fused) == 2
        assert not [node for node in fused.graph.node if node.op_type == "Softmax"]
        assert not [node for node in fused.graph.node if "query_with_one" in node.name]
        np.testing.assert_allclose(run(fused), run(form), rtol=0, atol=1e-6)
    assert np.abs(run(graph) - run(dense(graph))).max() > 1e-3, "something was pruned"
    assert graph.SerializeToString() == before


def test_log_sizes_are_the_bias_where_there_are_any() -> None:
    fused = with_fused_attention(exported(*FORMS[2]))
    first, second = (node for node in fused.graph.node if node.op_type == "MultiHeadAttention")
    assert (len(first.input), len(second.input)) == (3, 6), "the first block sees no log-sizes"
    infos = {info.name: info for info in fused.graph.value_info}
    dims = infos[second.input[5]].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["batch", 1, "tokens_0", "tokens_0"]
    for node in (first, second):
        attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        assert attributes == {"num_heads": 4, "scale": pytest.approx(12**-0.5)}


def test_queries_keys_and_values_are_the_parts_of_one_product() -> None:
    """Not turned, which would cost what the fusion gains."""
    fused = with_fused_attention(exported())
    kinds = [node.op_type for node in fused.graph.node]
    assert kinds.count("Split") == 2
    assert kinds.count("Transpose") == 1, "the patch embedding's"


def test_float16_files_have_attention_in_float16() -> None:
    graph = with_precision(exported(), "fp16")
    fused = with_fused_attention(graph)
    infos = {info.name: info.type.tensor_type.elem_type for info in fused.graph.value_info}
    nodes = [node for node in fused.graph.node if node.op_type == "MultiHeadAttention"]
    read = [infos[name] for node in nodes for name in node.input if name]
    assert read == [onnx.TensorProto.FLOAT16] * (4 + 4)
    np.testing.assert_allclose(run(fused), run(graph), rtol=0, atol=2e-3)


def test_a_file_without_the_function_is_fused_too() -> None:
    fused = with_fused_attention(without_function(exported()))
    assert count_fused(fused) == 2
    assert not fused.functions


def test_attention_of_another_kind_is_an_error_that_counts() -> None:
    graph = onnx.ModelProto()
    graph.CopyFrom(exported())
    softmax = next(node for node in graph.graph.node if node.op_type == "Softmax")
    next(each for each in softmax.attribute if each.name == "axis").i = 2
    with pytest.raises(UnsupportedModelError, match="1 of the 2 attentions"):
        with_fused_attention(graph)


def test_bfloat16_is_refused() -> None:
    with pytest.raises(SimpruneError, match="fused_attention=True is for fp32 and fp16"):
        ExportOptions(fused_attention=True, precision="bf16")
    with pytest.raises(SimpruneError, match="the model is bf16"):
        with_fused_attention(with_precision(exported(), "bf16"))
