"""The forms that a prune node and its file can have, made of an exported graph."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from simprune_deploy.onnx.function_body import OP_TYPE
from simprune_deploy.onnx.variants import prune_nodes

NAMING = {"plugin_version": "2", "plugin_namespace": ""}
"""The attributes by which a parser looks the plugin up."""

NUM_KEPT = "num_kept"


def as_exported(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy whose prune nodes are marked and name every output of their layer."""
    copy = _copy(graph)
    for node in prune_nodes(copy):
        there = {attribute.name for attribute in node.attribute}
        wanted = {name: value for name, value in NAMING.items() if name not in there}
        node.attribute.extend(helper.make_attribute(*each) for each in wanted.items())
        if is_dynamic(node) and not any(node.output[4:]):
            del node.output[4:]
            node.output.append(f"{node.output[3].rpartition('/')[0]}/{NUM_KEPT}")
            value = helper.make_tensor_value_info(node.output[4], TensorProto.INT64, [])
            copy.graph.value_info.append(value)
    for function in copy.functions:
        if any(map(is_dynamic, prune_nodes(copy))) and len(function.output) == 4:
            _count_in_function(function)
    return copy


def unmarked(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy whose prune nodes say nothing of a plugin but the version, which they must."""
    return _without(graph, "plugin_namespace")


def unversioned(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy whose prune nodes do not name the plugin's version."""
    return _without(graph, "plugin_version")


def uncounted(graph: onnx.ModelProto, empty: bool = False) -> onnx.ModelProto:
    """Return a copy whose prune nodes do not name their last output, or name it by ``""``."""
    copy = _copy(graph)
    for node in prune_nodes(copy):
        if len(node.output) == 5:
            del node.output[4]
            node.output.extend([""] if empty else [])
    return copy


def is_dynamic(node: onnx.NodeProto) -> bool:
    """Whether the number of tokens that a prune node keeps depends on the images."""
    return not any(each.name == "capacity" and each.i > 0 for each in node.attribute)


def _count_in_function(function: onnx.FunctionProto) -> None:
    assert function.name == OP_TYPE
    one = helper.make_node("Shape", ["kept_index"], ["num_kept_vector"], start=1, end=2)
    function.node.append(one)
    function.node.append(helper.make_node("Squeeze", ["num_kept_vector"], [NUM_KEPT]))
    function.output.append(NUM_KEPT)


def _without(graph: onnx.ModelProto, name: str) -> onnx.ModelProto:
    copy = _copy(graph)
    for node in prune_nodes(copy):
        left = [attribute for attribute in node.attribute if attribute.name != name]
        del node.attribute[:]
        node.attribute.extend(left)
    return copy


def _copy(graph: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    return copy
