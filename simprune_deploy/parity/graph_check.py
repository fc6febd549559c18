"""Is the graph what its own description says? Images may not show a slip that reading does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from simprune_deploy.common.versions import __version__
from simprune_deploy.onnx.function_body import NAMING_ATTRIBUTES, OP_TYPE, count_outputs
from simprune_deploy.onnx.metadata import ModelMetadata
from simprune_deploy.onnx.names import prune_node_name
from simprune_deploy.onnx.precision import PRECISIONS, module_of, value_types
from simprune_deploy.onnx.variants import function_of, num_outputs, prune_nodes
from simprune_deploy.parity.verdict import Check


def check_graph(graph: onnx.ModelProto, metadata: ModelMetadata) -> Check:
    """Hold nodes, attributes, function, thresholds, inputs and outputs against the metadata."""
    slips = [*_prune_slips(graph, metadata), *_threshold_slips(graph, metadata)]
    slips += [*_signature_slips(graph, metadata), *_body_slips(graph, metadata)]
    slips += [*_precision_slips(graph, metadata), *_naming_slips(graph, metadata)]
    numbers: dict[str, Any] = {"prune_nodes": len(prune_nodes(graph)), "slips": slips}
    if slips:
        return Check("graph", False, f"the graph contradicts its description: {slips[0]}", numbers)
    count = len(metadata.pruning.layers)
    return Check(
        "graph", True, f"{count} prune nodes, their body and thresholds are as described", numbers
    )


def _prune_slips(graph: onnx.ModelProto, metadata: ModelMetadata) -> Iterator[str]:
    config = metadata.pruning
    nodes = prune_nodes(graph)
    expected = [prune_node_name(config.place, layer) for layer in config.layers]
    if [node.name for node in nodes] != expected:
        yield f"its prune nodes are {[node.name for node in nodes]}, not {expected}"
        return
    dims = {info.name: info.type.tensor_type.shape.dim for info in graph.graph.value_info}
    for position, node in enumerate(nodes):
        found = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        wanted = {
            "num_prefix_tokens": metadata.num_prefix_tokens,
            "selection": config.selection.encode(),
            "reduction": config.reduction.encode(),
            "capacity": config.capacity_of(position),
            "multiple_of": config.multiple_of,
        }
        if hints := metadata.export.get("opt_tokens"):
            wanted["opt_tokens"] = hints[position]
        for name, value in wanted.items():
            if found.get(name) != value:
                yield f"{node.name} has {name} {found.get(name)!r}, not {value!r}"
        if position and node.input[2] != nodes[position - 1].output[1]:
            yield f"{node.name} does not read the log-sizes of the prune node before it"
        shape = dims.get(node.input[0])
        if shape is not None and len(shape) and shape[-1].dim_value != metadata.embed_dim:
            yield f"its tokens have {shape[-1].dim_value} channels, not {metadata.embed_dim}"


def _naming_slips(graph: onnx.ModelProto, metadata: ModelMetadata) -> Iterator[str]:
    """Hold every prune node to what TensorRT finds the plugin by, and to the outputs of its form.

    TensorRT wants all that its layer has; a function computes those that are named, read or not.
    """
    if metadata.has_function:
        wanted, form = num_outputs(metadata), "what the model reads"
    else:
        wanted = count_outputs(bool(metadata.pruning.capacities))
        form = "all that TensorRT's layer has"
    for node in prune_nodes(graph):
        found = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        for name, value in NAMING_ATTRIBUTES.items():
            if name not in found:
                yield f"{node.name} has no {name}, which is to be {value!r}"
            elif found[name] != value.encode():
                yield f"{node.name} has {name} {found[name]!r}, not {value.encode()!r}"
        named = [name for name in node.output if name]
        if len(node.output) != wanted or len(named) != wanted:
            yield f"{node.name} names {len(named)} outputs, not {wanted}: {form}"


def _threshold_slips(graph: onnx.ModelProto, metadata: ModelMetadata) -> Iterator[str]:
    runtime = bool(metadata.export["runtime_threshold"])
    if runtime != ("threshold" in [value.name for value in graph.graph.input]):
        yield f"it has {'no' if runtime else 'a'} threshold input"
        return
    config = metadata.pruning
    calibrated = config.curve is not None
    constants = {each.name: each for each in graph.graph.initializer}
    of_input = _made_of(graph, "threshold")
    for position, node in enumerate(prune_nodes(graph)):
        name = node.input[3]
        if runtime:
            if name not in (of_input if calibrated else {"threshold"}):
                yield f"{node.name} does not read the threshold input"
        elif calibrated and position and not config.capacities:
            continue  # it is made of what an image has left
        else:
            # the others are of images with all their patches
            wanted = np.array([config.layer_threshold(position, config.threshold, 1.0)], np.float32)
            found = numpy_helper.to_array(constants[name]) if name in constants else None
            near = 4 * float(np.spacing(1 + np.abs(wanted[0]))) if calibrated else 0.0
            if found is None or found.shape != (1,) or not abs(found[0] - wanted[0]) <= near:
                yield f"{node.name} has another threshold than {wanted[0]:g}"


def _made_of(graph: onnx.ModelProto, name: str) -> set[str]:
    """Return the values that are made of a value, itself among them, without any pruning."""
    found = {name}
    for node in graph.graph.node:
        if node.op_type != OP_TYPE and found.intersection(node.input):
            found.update(node.output)
    return found


def _signature_slips(graph: onnx.ModelProto, metadata: ModelMetadata) -> Iterator[str]:
    images = graph.graph.input[0].type.tensor_type
    dims = images.shape.dim
    low, high = metadata.batch
    kind = onnx.helper.tensor_dtype_to_np_dtype(images.elem_type).name
    if kind != metadata.image_dtype:
        yield f"its images are {kind}, not {metadata.image_dtype}"
    if [dim.dim_value for dim in dims[1:]] != list(metadata.image_shape):
        yield "its images have another size"
    if (dims[0].dim_value != low) if low == high else bool(dims[0].dim_value):
        yield f"its batch is not {low}..{high}"
    output = graph.graph.output[0]
    if output.name != metadata.output or (metadata.num_classes > 0) == (output.name == "features"):
        yield f"its output is {output.name}, not {metadata.output}"
    width = output.type.tensor_type.shape.dim[-1].dim_value
    if metadata.num_classes and width != metadata.num_classes:
        yield f"it has {width} classes, not {metadata.num_classes}"


def _precision_slips(graph: onnx.ModelProto, metadata: ModelMetadata) -> Iterator[str]:
    """Hold the tokens' and the weights' types against the precision that the file claims."""
    wanted = PRECISIONS.get(metadata.precision)
    if wanted is None:
        yield f"its precision {metadata.precision!r} is not known"
        return
    kinds = {int(each.data_type) for each in graph.graph.initializer}
    if metadata.precision == "fp32" and not kinds & set(PRECISIONS.values()) - {wanted}:
        return
    name_of = onnx.TensorProto.DataType.Name
    types = value_types(graph)
    floats = graph.graph.input[1:] if metadata.takes_uint8 else graph.graph.input
    for value in (*floats, graph.graph.output[0]):
        if types[value.name] != onnx.TensorProto.FLOAT:
            yield f"its {value.name} is {name_of(types[value.name])}, not FLOAT"
    for node in prune_nodes(graph):
        for name, kind in zip(node.input, (wanted, wanted, PRECISIONS["fp32"]), strict=False):
            if types[name] != kind:
                yield f"{node.name} reads {name} as {name_of(types[name])}, not {name_of(kind)}"
    others = set(PRECISIONS.values()) - {wanted, PRECISIONS["fp32"]}
    for name, kind in types.items():
        if kind in others:
            yield f"{name} is {name_of(kind)} in a model of precision {metadata.precision}"
            return
    inside = {name for node in graph.graph.node if _is_block_product(node) for name in node.input}
    for name in sorted(inside & types.keys()):
        if types[name] != wanted:
            yield f"{name} is multiplied as {name_of(types[name])}, not {name_of(wanted)}"
            return


def _is_block_product(node: onnx.NodeProto) -> bool:
    return node.op_type in ("MatMul", "Gemm") and module_of(node).startswith("blocks.")


def _body_slips(graph: onnx.ModelProto, metadata: ModelMetadata) -> Iterator[str]:
    functions = list(graph.functions)
    if not metadata.pruning.layers:
        if functions:
            yield "it has a function, and prunes nowhere"
        return
    opset = next(entry.version for entry in graph.opset_import if not entry.domain)
    if opset != metadata.export["opset"]:
        yield f"its opset is {opset}, not {metadata.export['opset']}"
        return
    if not metadata.has_function:
        if functions:
            yield "it has a function, and says that it has none"
        return
    if len(functions) != 1 or functions[0] != function_of(metadata):
        made_by = graph.producer_version
        hint = "" if made_by == __version__ else f" (made by {made_by}, this is {__version__})"
        yield f"its function body is not the operator's{hint}: export again"
