"""The forms that a prune node and its file can have, made of an exported graph."""

from __future__ import annotations

import onnx

from simprune_deploy.onnx.function_body import count_outputs
from simprune_deploy.onnx.metadata import read_metadata
from simprune_deploy.onnx.variants import function_of, prune_nodes, without_function


def counted(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy with the function whose prune nodes name every output of their layer.

    ``export`` writes those alone that the model reads.
    """
    copy = without_function(graph)
    metadata = read_metadata(graph)
    copy.functions.append(function_of(metadata, count_outputs(bool(metadata.pruning.capacities))))
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
