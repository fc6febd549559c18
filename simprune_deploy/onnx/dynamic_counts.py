"""Give every prune layer a token count of its own, in a graph that was traced with one for all.

A K that depends on the data is a symbol about which PyTorch's tracer knows nothing: it works out
every shape behind it again and again, and takes more than twice as long as for the dense model.
So the model is traced as if all prune layers kept the same number of tokens, the length of an
extra input ``slots``. That number is then read, in each stretch of the graph, from the prune node
before it, and the input leaves the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir

from simprune_deploy.onnx.function_body import OP_TYPE

SLOTS = "slots"


def separate_token_counts(model: onnx_ir.Model, layers: Sequence[int]) -> None:
    """Rewrite `model` in place; `layers` names the token dimension behind each prune node."""
    graph = model.graph
    slots = next(value for value in graph.inputs if value.name == SLOTS)
    assert slots.shape is not None
    traced = str(_symbol(slots.shape[0]))
    chain = _shape_chain(slots)
    copies: dict[tuple[int, int], onnx_ir.Value] = {}
    prune: onnx_ir.Node | None = None
    names = iter(layers)
    dimension = ""
    for node in list(graph):
        if node in chain:
            continue
        before = dimension
        if node.op_type == OP_TYPE:
            prune, dimension = node, f"tokens_{next(names)}"
            # the assignment is as long as the node's input, the rest as its output
            _rename_dimension(node.outputs[:3], traced, dimension)
            _rename_dimension(node.outputs[3:], traced, before)
        else:
            _rename_dimension(node.outputs, traced, dimension)
        for index, value in enumerate(node.inputs):
            if value is not None and value.producer() in chain:
                assert prune is not None
                node.replace_input_with(index, _copy(value, slots, prune, copies))
    _remove_unused(graph, chain)
    graph.inputs.remove(slots)


def _shape_chain(slots: onnx_ir.Value) -> set[onnx_ir.Node]:
    """Return the nodes that compute shapes from the length of `slots`."""
    chain: set[onnx_ir.Node] = set()
    values = [slots]
    while values:
        for reader, _ in values.pop().uses():
            output = reader.outputs[0]
            is_shape = reader.op_type == "Shape" or (
                output.dtype == onnx_ir.DataType.INT64 and reader.op_type != OP_TYPE
            )
            if is_shape and reader not in chain:
                chain.add(reader)
                values.append(output)
    return chain


def _copy(
    value: onnx_ir.Value,
    slots: onnx_ir.Value,
    prune: onnx_ir.Node,
    copies: dict[tuple[int, int], onnx_ir.Value],
) -> onnx_ir.Value:
    """Return `value` computed from the token count of `prune`, in nodes right behind it."""
    key = (id(value), id(prune))
    if key in copies:
        return copies[key]
    original = value.producer()
    assert original is not None
    attributes: list[Any] = list(original.attributes.values())
    if slots in original.inputs:
        inputs: list[onnx_ir.Value | None] = [prune.outputs[1]]
        attributes = [onnx_ir.AttrInt64("start", 1), onnx_ir.AttrInt64("end", 2)]
    else:
        inputs = [
            _copy(each, slots, prune, copies)
            if each is not None and _depends(each, slots)
            else each
            for each in original.inputs
        ]
    node = onnx_ir.Node(original.domain, original.op_type, inputs, attributes)
    node.metadata_props.update(original.metadata_props)
    output = node.outputs[0]
    output.name = f"{value.name}_{len(copies)}"
    output.type, output.shape = value.type, value.shape
    _insert_behind(prune, node, copies)
    copies[key] = output
    return output


def _depends(value: onnx_ir.Value, slots: onnx_ir.Value) -> bool:
    producer = value.producer()
    if producer is None:
        return False
    return slots in producer.inputs or any(
        _depends(each, slots) for each in producer.inputs if each is not None
    )


def _insert_behind(
    prune: onnx_ir.Node, node: onnx_ir.Node, copies: dict[tuple[int, int], onnx_ir.Value]
) -> None:
    """Insert behind `prune` and behind the copies that `node` reads."""
    anchor = prune
    for (_, owner), output in copies.items():
        if owner == id(prune):
            producer = output.producer()
            assert producer is not None
            anchor = producer
    assert prune.graph is not None
    prune.graph.insert_after(anchor, node)


def _rename_dimension(values: Sequence[onnx_ir.Value], traced: str, name: str) -> None:
    for value in values:
        if value.shape is not None and name:
            value.shape = onnx_ir.Shape(
                [name if str(_symbol(dim)) == traced else dim for dim in value.shape]
            )


def _symbol(dim: Any) -> Any:
    return getattr(dim, "value", dim)


def _remove_unused(graph: onnx_ir.Graph, chain: set[onnx_ir.Node]) -> None:
    left = [node for node in graph if node in chain]
    for node in reversed(left):
        assert not node.outputs[0].uses(), node
        graph.remove(node, safe=True)
