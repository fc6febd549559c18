"""The unpruned model out of a pruned graph: no tracing, no torch, so a device can do it.

Speed is compared with it, so nothing of pruning may be left that costs time: no prune nodes, no
log-sizes in attention and pooling, no shapes computed at run time that are now known.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from simprune_deploy.common.errors import ArtifactError, SimpruneError
from simprune_deploy.onnx.function_body import DOMAIN, OP_TYPE
from simprune_deploy.onnx.metadata import HAS_FUNCTION, read_metadata, write_metadata

TOKENS = "num_tokens"


def dense(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Return the unpruned model that a graph was pruned from, as a dense export would be.

    The weights, the precision and the first input and output stay; the threshold input and the
    assignment outputs go. Its facts say that it has no prune layers. A graph that prunes nowhere
    comes back as it is.

    Raises:
        SimpruneError: the graph was not made by simprune-deploy, or was changed since.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    metadata = read_metadata(copy)
    if not metadata.pruning.layers:
        return copy
    main = copy.graph
    _Unpruning(main).apply()
    main.initializer.append(
        helper.make_tensor(TOKENS, TensorProto.INT64, [1], [metadata.num_tokens])
    )
    del main.output[1:]
    del main.input[1:]
    drop_unread(main)
    _fold_shapes(main)
    _fit_reshapes(copy, metadata.num_tokens)
    del copy.functions[:]
    ours = [each for each in copy.opset_import if each.domain == DOMAIN]
    for each in ours:
        copy.opset_import.remove(each)
    export = {**metadata.export, "runtime_threshold": False, "emit_assignments": False}
    export.pop(HAS_FUNCTION, None)
    pruning = dataclasses.replace(metadata.pruning, layers=(), capacities=())
    write_metadata(copy, dataclasses.replace(metadata, pruning=pruning, export=export))
    try:
        onnx.checker.check_model(copy, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(
            f"the pruning cannot be taken out of this graph ({reason}): export the model again"
        ) from error
    return copy


class _Unpruning:
    """One pass over the nodes, in order: what reads log-sizes goes, or reads the tokens alone."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.constants = {each.name for each in graph.initializer}
        self.producers = {name: node for node in graph.node for name in node.output}
        self.log_sizes = {value.name for value in graph.input[1:]}
        """Values that are made of log-sizes and thresholds alone."""
        self.longer_keys: set[str] = set()
        """Keys that had the log-sizes as one more channel."""
        self.means: dict[str, str] = {}
        """Products of shares and tokens, and those tokens."""
        self.instead: dict[str, str] = {}
        """What to read in place of a value that is gone."""
        self.nodes: list[onnx.NodeProto] = []

    def apply(self) -> None:
        for node in list(self.graph.node):
            reads_longer_keys = any(name in self.longer_keys for name in node.input)
            for index, name in enumerate(node.input):
                node.input[index] = self.instead.get(name, name)
            if reads_longer_keys:
                self._shorten(node)
            else:
                self._place(node)
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)

    def _place(self, node: onnx.NodeProto) -> None:
        if node.op_type == OP_TYPE:
            self.instead[node.output[0]] = node.input[0]
            self.log_sizes.add(node.output[1])
        elif node.op_type == "Squeeze" and node.input[0] in self.means:
            values = [self.means[node.input[0]], node.input[1]]
            name = node.name.replace("Squeeze", "ReduceMean")
            self.nodes.append(
                helper.make_node("ReduceMean", values, node.output, name=name, keepdims=0)
            )
        elif any(name in self.means for name in node.input):
            raise _changed(node)
        elif not any(name in self.log_sizes for name in node.input):
            self.nodes.append(node)
        else:
            self._take_out(node)

    def _shorten(self, node: onnx.NodeProto) -> None:
        """Place a node that read keys with a channel more: its queries had a channel of ones."""
        if node.op_type == "Transpose":
            self.longer_keys.add(node.output[0])
        else:
            queries = self.producers.get(node.input[0])
            if node.op_type != "MatMul" or queries is None or queries.op_type != "Concat":
                raise _changed(node)
            node.input[0] = queries.input[0]
        self.nodes.append(node)

    def _take_out(self, node: onnx.NodeProto) -> None:
        """Leave a node out that reads log-sizes; its readers take the tokens that it read."""
        others = [
            name for name in node.input if name not in self.log_sizes | self.constants and name
        ]
        if node.op_type == "Shape":
            self.instead[node.output[0]] = TOKENS
        elif not others or node.op_type == "Expand":
            self.log_sizes.update(node.output)
        elif len(others) != 1:
            raise _changed(node)
        elif node.op_type in ("Add", "Where"):  # attention scores; a maximum without padding
            self.instead[node.output[0]] = others[0]
        elif node.op_type == "Concat":
            self.instead[node.output[0]] = others[0]
            self.longer_keys.add(node.output[0])
        elif node.op_type == "MatMul":
            self.means[node.output[0]] = others[0]
        else:
            raise _changed(node)


def _changed(node: onnx.NodeProto) -> SimpruneError:
    return ArtifactError(
        f"the node {node.name!r} ({node.op_type}) reads the log-sizes in a way that exports do "
        "not have: export the model again"
    )


def _fold_shapes(graph: onnx.GraphProto) -> None:
    """Make constants of the shapes that are known now, -1 for a dynamic batch, as exports have."""
    constants = {each.name: each for each in graph.initializer}
    shapes = {name for node in graph.node if node.op_type == "Shape" for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in list(graph.node):
        unknown = [name for name in node.input if name not in constants]
        if node.op_type != "Concat" or len(unknown) == len(node.input) or len(unknown) > 1:
            continue
        whole_numbers = all(
            constants[name].data_type == TensorProto.INT64
            for name in node.input
            if name in constants
        )
        only_reshapes = all(each.op_type == "Reshape" for each in readers[node.output[0]])
        if whole_numbers and (not unknown or (unknown[0] in shapes and only_reshapes)):
            parts = [
                numpy_helper.to_array(constants[name]) if name in constants else [-1]
                for name in node.input
            ]
            values = np.concatenate(parts).astype(np.int64)
            graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
            graph.node.remove(node)


def drop_unread(graph: onnx.GraphProto) -> None:
    """Drop what no output depends on, in place: nodes, weights, and what is said of them."""
    read = {value.name for value in graph.output}
    nodes = []
    for node in reversed(graph.node):
        if read.intersection(node.output):
            read.update(node.input)
            nodes.append(node)
    made = {name for node in nodes for name in node.output}
    weights = [each for each in graph.initializer if each.name in read]
    infos = [info for info in graph.value_info if info.name in made]
    for field, left in (
        (graph.node, nodes[::-1]),
        (graph.initializer, weights),
        (graph.value_info, infos),
    ):
        del field[:]
        field.extend(left)


def _fit_reshapes(model: onnx.ModelProto, num_tokens: int) -> None:
    """Write the number of tokens into shapes that no longer fit, and into the tensors' infos.

    With fixed token counts the shapes are constants. A reshape of tokens has them on axis 1.
    """
    graph = model.graph
    constants = {each.name: each for each in graph.initializer}
    while True:
        shapes = _inferred_shapes(model)
        for node in graph.node:
            if node.op_type != "Reshape" or node.input[1] not in constants:
                continue
            wanted = numpy_helper.to_array(constants[node.input[1]])
            batch, *found = shapes.get(node.input[0], [None, None])
            sizes = [size for size in found if size is not None]
            if len(sizes) < len(found) or math.prod(sizes) == math.prod(wanted[1:].tolist()):
                continue
            if wanted[0] not in (-1, batch) or len(wanted) < 3:
                continue
            fitting = wanted.copy()
            fitting[1] = num_tokens
            if math.prod(sizes) != math.prod(fitting[1:].tolist()):
                raise _changed(node)
            name = f"{node.name}/shape"
            graph.initializer.append(numpy_helper.from_array(fitting, name))
            constants[name] = graph.initializer[-1]
            node.input[1] = name
            break
        else:
            break
    for info in graph.value_info:
        dims = info.type.tensor_type.shape.dim
        for dim, size in zip(dims, shapes.get(info.name, []), strict=False):
            if size is not None:
                dim.dim_value = size
    drop_unread(graph)


def _inferred_shapes(model: onnx.ModelProto) -> dict[str, list[int | None]]:
    """Infer every tensor's shape, without the weights, which would be copied."""
    main = model.graph
    small = [each for each in main.initializer if each.data_type == TensorProto.INT64]
    weights = [
        helper.make_tensor_value_info(each.name, each.data_type, list(each.dims))
        for each in main.initializer
        if each.data_type != TensorProto.INT64
    ]
    outputs = [
        helper.make_tensor_value_info(each.name, each.type.tensor_type.elem_type, None)
        for each in main.output
    ]
    skeleton = helper.make_model(
        helper.make_graph(main.node, "shapes", [*main.input, *weights], outputs, small),
        opset_imports=model.opset_import,
        ir_version=model.ir_version,
    )
    inferred = onnx.shape_inference.infer_shapes(skeleton, data_prop=True).graph
    return {
        info.name: [
            int(dim.dim_value) if dim.HasField("dim_value") else None
            for dim in info.type.tensor_type.shape.dim
        ]
        for info in (*inferred.input, *inferred.value_info, *inferred.output)
    }
