"""Other forms of an exported graph, made from it without tracing again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx
import onnx.inliner
from onnx import TensorProto, helper, numpy_helper

from simprune_deploy.common.errors import ArtifactError, InvalidArgumentError
from simprune_deploy.onnx.dense import dense, drop_unread
from simprune_deploy.onnx.function_body import (
    DOMAIN,
    NUM_READ,
    NUM_SHOWN,
    OP_TYPE,
    OUTPUTS,
    BodyVariant,
    build_function,
    count_outputs,
)
from simprune_deploy.onnx.metadata import (
    HAS_FUNCTION,
    INLINED,
    ModelMetadata,
    read_metadata,
    write_metadata,
)
from simprune_deploy.onnx.names import prune_output_name
from simprune_deploy.pruning.config import PAD_LOG_SIZE

__all__ = [
    "DIAGNOSTICS",
    "dense",
    "diagnostic_name",
    "inlined",
    "kept_name",
    "layer_of",
    "prune_nodes",
    "pruned_layers",
    "set_size_hints",
    "with_diagnostics",
    "with_function",
    "with_kept_counts",
    "with_log_size_in_keys",
    "without_function",
]

DIAGNOSTICS = ("features", "log_size", "kept_index", "assignment")
"""What a prune layer read and decided; :func:`diagnostic_name` names them as graph outputs."""


def diagnostic_name(layer: int, what: str) -> str:
    """Return the name of a diagnostic output, such as ``diagnosis_3/features``."""
    return f"diagnosis_{layer}/{what}"


def with_diagnostics(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy that also outputs what every prune layer read and decided."""
    copy = _copy(graph)
    main = copy.graph
    if prune_nodes(copy):
        metadata = read_metadata(copy)
        _name_outputs(copy, NUM_SHOWN)
        if metadata.has_function:
            del copy.functions[:]
            copy.functions.append(function_of(metadata, NUM_SHOWN))
    for node in prune_nodes(copy):
        layer = layer_of(node)
        values = (node.input[1], node.input[2], node.output[2], node.output[3])
        for what, value in zip(DIAGNOSTICS, values, strict=True):
            name = diagnostic_name(layer, what)
            kind = TensorProto.FLOAT if what == "log_size" else TensorProto.INT64
            if what == "features":
                kind = _element_type(copy, value)
            if kind == TensorProto.BFLOAT16:  # numpy has none: float32 holds the same numbers
                kind = TensorProto.FLOAT
                show = helper.make_node("Cast", [value], [name], name=name, to=kind)
            else:
                show = helper.make_node("Identity", [value], [name], name=name)
            main.node.append(show)
            main.output.append(helper.make_tensor_value_info(name, kind, None))
    return copy


def kept_name(layer: int) -> str:
    """Return the name of the output that :func:`with_kept_counts` adds for a prune layer."""
    return f"kept_before_{layer}"


def with_kept_counts(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy that also outputs how many tokens every image kept, int64[B] a prune layer."""
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    main = copy.graph
    limit = helper.make_tensor("padding_limit", TensorProto.FLOAT, [], [PAD_LOG_SIZE / 2])
    axes = helper.make_tensor("token_axis", TensorProto.INT64, [1], [1])
    main.initializer.extend([limit, axes])
    for node in prune_nodes(copy):
        name = kept_name(layer_of(node))
        steps: tuple[tuple[str, list[str], dict[str, int]], ...] = (
            ("Greater", [node.output[1], limit.name], {}),
            ("Cast", [f"{name}/greater"], {"to": TensorProto.INT64}),
            ("ReduceSum", [f"{name}/cast", axes.name], {"keepdims": 0}),
        )
        for op_type, inputs, attributes in steps:
            output = name if op_type == "ReduceSum" else f"{name}/{op_type.lower()}"
            made = helper.make_node(op_type, inputs, [output], name=output, **attributes)
            main.node.append(made)
        main.output.append(helper.make_tensor_value_info(name, TensorProto.INT64, None))
    return copy


def layer_of(node: onnx.NodeProto) -> int:
    """Return the block that a prune node runs before or inside; its name says it.

    Raises:
        SimpruneError: the node has another name than the exporter gave it.
    """
    prefix, _, number = node.name.rpartition("_")
    if prefix not in ("prune_before_block", "prune_inside_block") or not number.isdigit():
        raise ArtifactError(f"the prune node {node.name!r} was renamed: export the model again")
    return int(number)


def prune_nodes(graph: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the graph's prune nodes, in order."""
    return [node for node in graph.graph.node if node.op_type == OP_TYPE]


def pruned_layers(graph: onnx.ModelProto) -> list[int]:
    """Return the blocks before or inside which the graph prunes, in order."""
    return [layer_of(node) for node in prune_nodes(graph)]


def without_function(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy for a runtime that has a plugin for the operator: TensorRT.

    The function is left out, since up to 10.6 it would win, and each node names all the outputs
    that the plugin has, since from 10.6 on fewer are refused: every TensorRT takes the plugin, or
    nothing. Other runtimes cannot run the copy. Its metadata says that it has no function;
    :func:`with_function` undoes this. A graph that prunes nowhere has no function and stays as it
    is.

    Raises:
        SimpruneError: the graph was not made by simprune-deploy.
    """
    copy = _copy(graph)
    metadata = read_metadata(copy)
    if metadata.pruning.layers and metadata.has_function:
        del copy.functions[:]
        _name_outputs(copy, count_outputs(bool(metadata.pruning.capacities)))
        write_metadata(
            copy, dataclasses.replace(metadata, export={**metadata.export, HAS_FUNCTION: False})
        )
    return copy


def with_function(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Return the copy that :func:`without_function` was given, byte for byte.

    Outputs of prune nodes that were read since, as decisions are to be shown, stay.

    Raises:
        SimpruneError: the graph was not made by simprune-deploy.
    """
    copy = _copy(graph)
    metadata = read_metadata(copy)
    if not metadata.has_function:
        export = {name: value for name, value in metadata.export.items() if name != HAS_FUNCTION}
        metadata = dataclasses.replace(metadata, export=export)
        read = {name for node in copy.graph.node for name in node.input}
        read |= {value.name for value in copy.graph.output}
        outputs = num_outputs(metadata)
        for node in prune_nodes(copy):  # decisions that are shown stay
            outputs = max(outputs, *(i + 1 for i, name in enumerate(node.output) if name in read))
        for node in prune_nodes(copy):
            del node.output[outputs:]
        copy.functions.append(function_of(metadata, outputs))
        write_metadata(copy, metadata)
    return copy


def inlined(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in standard operators alone, for tools that take no functions.

    The function's body stands in each prune node's place, without what nobody reads of it, and
    every constant is a tensor: optimizers turn a ``value_float`` into float64. What a prune layer
    left keeps its name, ``prune_3/kept_log_size``. The metadata says that the file is inlined. A
    graph that prunes nowhere stays as it is.

    Raises:
        SimpruneError: the graph was not made by simprune-deploy.
    """
    metadata = read_metadata(graph)
    if not metadata.pruning.layers:
        return _copy(graph)
    flat = onnx.inliner.inline_local_functions(with_function(graph))
    for node in flat.graph.node:
        if node.op_type == "Constant":
            _make_tensor(node)
    drop_unread(flat.graph)
    for entry in [each for each in flat.opset_import if each.domain == DOMAIN]:
        flat.opset_import.remove(entry)
    write_metadata(flat, dataclasses.replace(metadata, export={**metadata.export, INLINED: True}))
    onnx.checker.check_model(flat, full_check=True)
    return flat


def _make_tensor(constant: onnx.NodeProto) -> None:
    """Let a Constant hold a tensor in place of a number or a list of numbers."""
    (attribute,) = constant.attribute
    kinds = {"value_int": "int64", "value_float": "float32"}
    kind = kinds.get(str(attribute.name).removesuffix("s"))
    if kind is not None:
        values = np.array(helper.get_attribute_value(attribute), kind)
        attribute.CopyFrom(helper.make_attribute("value", numpy_helper.from_array(values)))


def set_size_hints(graph: onnx.ModelProto, hints: Sequence[int]) -> None:
    """Let every prune node, and the metadata, say how many tokens usually stay, in place.

    Args:
        graph: An exported graph.
        hints: ``ExportOptions.opt_tokens``: one number for each prune node, with the prefix tokens.

    Raises:
        SimpruneError: they are not so many, or one is out of its range.
    """
    nodes, metadata = prune_nodes(graph), read_metadata(graph)
    low, high = metadata.num_prefix_tokens + 1, metadata.num_tokens
    if len(hints) != len(nodes) or not all(low <= hint <= high for hint in hints):
        raise InvalidArgumentError(
            f"the size hints {', '.join(map(str, hints))} must be {len(nodes)} numbers of tokens "
            f"from {low} to {high}, one for each prune layer"
        )
    for node, hint in zip(nodes, hints, strict=True):
        next(each for each in node.attribute if each.name == "opt_tokens").i = int(hint)
    export = {**metadata.export, "opt_tokens": [int(hint) for hint in hints]}
    write_metadata(graph, dataclasses.replace(metadata, export=export))


def _name_outputs(graph: onnx.ModelProto, count: int) -> None:
    """Let every prune node name at least `count` outputs, in place."""
    for node in prune_nodes(graph):
        for meaning in OUTPUTS[len(node.output) : count]:
            node.output.append(prune_output_name(layer_of(node), meaning))


def num_outputs(metadata: ModelMetadata) -> int:
    """Return how many outputs a prune node of a file with the function names."""
    return NUM_SHOWN if metadata.export.get("emit_assignments") else NUM_READ


def function_of(metadata: ModelMetadata, outputs: int | None = None) -> onnx.FunctionProto:
    """Return the operator's function for a graph; it computes `outputs`, or what a file reads."""
    variant = BodyVariant.of(
        metadata.pruning,
        metadata.num_prefix_tokens,
        metadata.embed_dim,
        metadata.precision,
        outputs or num_outputs(metadata),
    )
    return build_function(variant, int(metadata.export["opset"]))


def _copy(graph: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    return copy


def _element_type(graph: onnx.ModelProto, value: str) -> int:
    for info in graph.graph.value_info:
        if info.name == value:
            return int(info.type.tensor_type.elem_type)
    return int(TensorProto.FLOAT)


def with_log_size_in_keys(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy whose attention reads the log-sizes as one more channel of the keys.

    ``q.k + b`` is ``[q, 1].[k, b]``: the same sum without a pass over the heads x N x K scores,
    which on a CPU costs as much as the softmax. GPU kernels that fuse attention want the plain
    form, with an additive mask and an unchanged head dimension.
    """
    copy = _copy(graph)
    main = copy.graph
    producers = {output: node for node in main.node for output in node.output}
    readers: dict[str, int] = {}
    for node in main.node:
        for value in node.input:
            readers[value] = readers.get(value, 0) + 1
    biases = _attention_biases(main)
    rewritten: list[onnx.NodeProto] = []
    columns: set[str] = set()
    gone: set[str] = set()
    for node in main.node:
        if node.op_type != "Add" or node.input[1] not in biases:
            rewritten.append(node)
            continue
        scores = producers.get(node.input[0])
        keys = producers.get(scores.input[1]) if scores is not None else None
        if (
            scores is None
            or keys is None
            or scores.op_type != "MatMul"
            or keys.op_type != "Transpose"
            or list(keys.attribute[0].ints) != [0, 1, 3, 2]
            or readers[scores.output[0]] != 1
            or readers[keys.output[0]] != 1
        ):
            rewritten.append(node)
            continue
        rewritten.remove(scores)
        rewritten.remove(keys)
        gone.update((scores.output[0], keys.output[0]))
        rewritten.extend(_scores_with_bias(node, scores, keys, columns))
    del main.node[:]
    main.node.extend(rewritten)
    left = [info for info in main.value_info if info.name not in gone]
    del main.value_info[:]
    main.value_info.extend(left)
    if columns:
        main.initializer.append(helper.make_tensor("one_channel", TensorProto.INT64, [1], [1]))
    return copy


def _attention_biases(graph: onnx.GraphProto) -> set[str]:
    """Return the values [B, 1, 1, K] that are added to attention scores."""
    log_sizes = {node.output[1] for node in graph.node if node.op_type == OP_TYPE}
    biases: set[str] = set()
    for node in graph.node:
        if node.op_type in ("Unsqueeze", "Clip", "Min", "Reshape", "Cast") and (
            node.input[0] in log_sizes or node.input[0] in biases
        ):
            biases.add(node.output[0])
    return biases


def _scores_with_bias(
    add: onnx.NodeProto, scores: onnx.NodeProto, keys: onnx.NodeProto, columns: set[str]
) -> list[onnx.NodeProto]:
    bias, query, key = add.input[1], scores.input[0], keys.input[0]
    at = scores.name
    column = f"{bias}/as_key_channel"
    nodes = []
    if column not in columns:
        columns.add(column)
        nodes.append(
            helper.make_node("Transpose", [bias], [column], name=column, perm=[0, 1, 3, 2])
        )

    def named(op_type: str, inputs: list[str], what: str, **attributes: object) -> str:
        name = f"{at}/{what}"
        nodes.append(helper.make_node(op_type, inputs, [name], name=name, **attributes))
        return name

    key_rows = named("Shape", [key], "key_rows", start=0, end=3)
    key_shape = named("Concat", [key_rows, "one_channel"], "key_channel_shape", axis=0)
    key_channel = named("Expand", [column, key_shape], "key_channel")
    longer_key = named("Concat", [key, key_channel], "key_with_log_size", axis=3)
    turned = named("Transpose", [longer_key], "key_turned", perm=[0, 1, 3, 2])
    query_rows = named("Shape", [query], "query_rows", start=0, end=3)
    query_shape = named("Concat", [query_rows, "one_channel"], "query_channel_shape", axis=0)
    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    query_channel = named("ConstantOfShape", [query_shape], "query_channel", value=one)
    longer_query = named("Concat", [query, query_channel], "query_with_one", axis=3)
    nodes.append(
        helper.make_node("MatMul", [longer_query, turned], [add.output[0]], name=scores.name)
    )
    return nodes
