"""Names a person can follow in Netron, and no traces of the machine that exported the file."""

from __future__ import annotations

import ast
import collections

import onnx

from simprune_deploy.onnx.function_body import OP_TYPE, OUTPUTS
from simprune_deploy.pruning.config import PruneConfig

_SCOPES_KEY = "pkg.torch.onnx.name_scopes"
_MODULE_PREFIXES = ("model.vit.", "model.")


def prune_node_name(place: str, layer: int) -> str:
    """Return the name of the prune node at `place` ("before", "inside") of a block."""
    return f"prune_{place}_block_{layer}"


def prune_output_name(layer: int, meaning: str) -> str:
    """Return the name of a prune node's output, such as ``prune_3/kept_tokens``."""
    return f"prune_{layer}/{meaning}"


def make_readable(
    graph: onnx.ModelProto, config: PruneConfig, first_dimensions: dict[str, str]
) -> None:
    """Rename nodes, weights, prune outputs and token dimensions in place.

    A node is named after its module and operator (``blocks.0.attn.qkv/MatMul``), a prune node
    after its block (``prune_before_block_3``, ``prune_inside_block_3``), its outputs
    ``prune_3/kept_tokens`` and so on, and the token count it leaves is the dimension ``tokens_3``. `first_dimensions` names the first
    dimension of inputs, where it is dynamic. What the tracer attached to the
    nodes goes: it holds file paths and stack traces.
    """
    main = graph.graph
    prunes = [node for node in main.node if node.op_type == OP_TYPE]
    values = _weight_names(main)
    dimensions: dict[str, str] = {}
    for value in main.input:
        dim = value.type.tensor_type.shape.dim[0]
        if dim.dim_param and value.name in first_dimensions:
            dimensions[dim.dim_param] = first_dimensions[value.name]
    shapes = {info.name: info.type.tensor_type.shape.dim for info in main.value_info}
    public = {value.name for value in main.output}
    for node, layer in zip(prunes, config.layers, strict=True):
        node.name = prune_node_name(config.place, layer)
        kept = shapes.get(node.output[0])
        if kept is not None and kept[1].dim_param:
            dimensions[kept[1].dim_param] = f"tokens_{layer}"
        for value, meaning in zip(node.output, OUTPUTS, strict=False):
            if value not in public:
                values[value] = prune_output_name(layer, meaning)
    _name_nodes(main)
    _rename_values(main, values)
    _rename_dimensions(main, dimensions)
    _strip(graph)


def _weight_names(graph: onnx.GraphProto) -> dict[str, str]:
    names = {}
    for initializer in graph.initializer:
        for prefix in _MODULE_PREFIXES:
            if initializer.name.startswith(prefix):
                names[initializer.name] = initializer.name.removeprefix(prefix)
                break
    return names


def _name_nodes(graph: onnx.GraphProto) -> None:
    seen: collections.Counter[str] = collections.Counter()
    for node in graph.node:
        if node.op_type == OP_TYPE:
            continue
        scope = _module_of(node)
        name = f"{scope}/{node.op_type}" if scope else node.op_type
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"


def _module_of(node: onnx.NodeProto) -> str:
    """Return the path of the module a node was traced in, such as ``blocks.0.attn.qkv``."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES_KEY:
            scopes = ast.literal_eval(entry.value)
            # the last scope is the operation; the one before it the module it belongs to
            path = scopes[-2] if len(scopes) > 1 else ""
            for prefix in _MODULE_PREFIXES:
                path = path.removeprefix(prefix)
            return "" if path in ("model", "_empty_nn_module_stack_from_metadata_hook") else path
    return ""


def _rename_values(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    for node in graph.node:
        for values in (node.input, node.output):
            for index, value in enumerate(values):
                values[index] = names.get(value, value)
    for named in (*graph.initializer, *graph.value_info):
        named.name = names.get(named.name, named.name)


def _rename_dimensions(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    for info in (*graph.value_info, *graph.input, *graph.output):
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]


def _strip(graph: onnx.ModelProto) -> None:
    main = graph.graph
    main.name = "pruned_vit"
    for holder in (main, *main.node, *main.value_info, *main.input, *main.output):
        holder.doc_string = ""
        del holder.metadata_props[:]
    for initializer in main.initializer:
        initializer.doc_string = ""
        del initializer.metadata_props[:]
