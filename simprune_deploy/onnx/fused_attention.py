"""Every block's attention as one ``com.microsoft.MultiHeadAttention``, for ONNX Runtime on a GPU.

In an exported graph an attention is MatMul, Softmax, MatMul over [B, heads, N, D / heads], with the
queries scaled before, and the log-sizes of the keys, where there are any, added to the scores or
carried as one more channel of queries and keys. ONNX Runtime's own optimizer does not recognize it.
"""

from __future__ import annotations

import dataclasses

import onnx
from onnx import TensorProto, helper, numpy_helper

from simprune_deploy.common.errors import UnsupportedModelError, argument
from simprune_deploy.onnx.dense import drop_unread
from simprune_deploy.onnx.metadata import read_metadata
from simprune_deploy.onnx.precision import module_of

DOMAIN, OP_TYPE = "com.microsoft", "MultiHeadAttention"
HEADS_LAST, KEYS_TURNED, KEYS_TURNED_OF_ROWS = [0, 2, 1, 3], [0, 1, 3, 2], [0, 2, 3, 1]


def with_fused_attention(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which the attention of every block is one MultiHeadAttention node.

    Float32 and float16 graphs, pruned or not. The log-sizes become an ``attention_bias``
    T[B, 1, N, N], which the blocks behind one prune layer share; an attention that pools the tokens
    behind the blocks stays as it is.

    Raises:
        SimpruneError: the attention of a block is none that this node computes, or the graph was
            not made by simprune-deploy.
    """
    metadata = read_metadata(graph)
    if metadata.precision == "bf16":
        raise UnsupportedModelError(
            f"{argument('fused_attention', True)} is for fp32 and fp16, and the model is bf16: "
            f"export it with {argument('precision', 'fp16')}"
        )
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    rewriting = _Rewriting(copy.graph)
    behind = _end_of_blocks(copy.graph)
    softmaxes = [node for node in list(copy.graph.node)[:behind] if node.op_type == "Softmax"]
    found = [each for each in map(rewriting.match, softmaxes) if each is not None]
    wanted = max(len(softmaxes), metadata.depth)
    if len(found) < wanted:
        raise UnsupportedModelError(
            f"{len(found)} of the {wanted} attentions in the blocks of this model are what "
            f"{OP_TYPE} computes: export it without {argument('fused_attention')}"
        )
    rewriting.apply(found)
    drop_unread(copy.graph)
    if DOMAIN not in {entry.domain for entry in copy.opset_import}:
        copy.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    onnx.checker.check_model(copy, full_check=True)
    return copy


def count_fused(graph: onnx.ModelProto) -> int:
    """Return how many MultiHeadAttention nodes a graph has."""
    return sum(node.op_type == OP_TYPE and node.domain == DOMAIN for node in graph.graph.node)


def _end_of_blocks(graph: onnx.GraphProto) -> int:
    blocks = [i for i, node in enumerate(graph.node) if module_of(node).startswith("blocks.")]
    return max(blocks, default=-1) + 1


@dataclasses.dataclass(frozen=True)
class _Attention:
    """One attention that was found.

    Attributes:
        query, key, value: [B, heads, N, width of a head], the queries not yet scaled.
        key_of_rows: The keys are [B, N, heads, width of a head] instead.
        scale: What the queries are multiplied by.
        bias: float32[B, 1, 1, N], added to the scores; empty: none is.
        last: The node that gives [B, N, D], heads side by side.
    """

    query: str
    key: str
    value: str
    key_of_rows: bool
    scale: float
    bias: str
    last: onnx.NodeProto


class _Rewriting:
    """The graph, who makes and who reads its values, and what has been added to it."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.makers = {name: node for node in graph.node for name in node.output}
        self.weights = {each.name: each for each in graph.initializer}
        self.infos = {info.name: info for info in graph.value_info}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.nodes: list[onnx.NodeProto] = []
        self.made: set[str] = set()
        """The first outputs of the nodes that attentions share."""

    # --- finding ----------------------------------------------------------------------------------

    def match(self, softmax: onnx.NodeProto) -> _Attention | None:
        """Return the attention around a Softmax, or None if it is of another kind."""
        scores = self._made_by("MatMul", self._before_casts(softmax.input[0]))
        bias = ""
        if scores is None:
            added = self._made_by("Add", self._before_casts(softmax.input[0]))
            scores = added and self._made_by("MatMul", self._before_casts(added.input[0]))
            bias = added.input[1] if added else ""
        turned = scores and self._made_by("Transpose", scores.input[1])
        product = self._only_reader("MatMul", self._behind_casts(softmax.output[0]))
        side_by_side = product and self._only_reader("Transpose", product.output[0], HEADS_LAST)
        last = side_by_side and self._only_reader("Reshape", side_by_side.output[0])
        if not (scores and turned and product and last) or _axis(softmax) not in (-1, 3):
            return None
        query, key, perm = scores.input[0], turned.input[0], list(turned.attribute[0].ints)
        if perm not in (KEYS_TURNED, KEYS_TURNED_OF_ROWS):
            return None
        longer, longer_query = self._made_by("Concat", key), self._made_by("Concat", query)
        if longer and longer_query and not bias:
            query, key = longer_query.input[0], longer.input[0]
            bias = self._log_sizes(longer.input[1], longer_query.input[1])
            if not bias:
                return None
        query, scale = self._unscaled(query)
        of_rows = perm == KEYS_TURNED_OF_ROWS
        found = _Attention(query, key, product.input[1], of_rows, scale, bias, last)
        return found if self._has_its_shapes(found) else None

    def _unscaled(self, query: str) -> tuple[str, float]:
        """Return the queries before they are multiplied by a number, and that number, else 1."""
        scaled = self._made_by("Mul", query)
        scale = self._number(scaled.input[1]) if scaled else None
        return (scaled.input[0], scale) if scaled and scale is not None else (query, 1.0)

    def _log_sizes(self, of_keys: str, of_queries: str) -> str:
        """Return the log-sizes [B, 1, 1, N] that are a channel of the keys, beside one of ones."""
        expanded = self._made_by("Expand", self._before_casts(of_keys))
        column = expanded and self._made_by("Transpose", expanded.input[0], KEYS_TURNED)
        filled = self._made_by("ConstantOfShape", of_queries)
        if not column or not filled or not filled.attribute:
            return ""
        ones = bool((numpy_helper.to_array(filled.attribute[0].t) == 1).all())
        return str(column.input[0]) if ones else ""

    def _has_its_shapes(self, found: _Attention) -> bool:
        shapes = [self._shape(name) for name in (found.query, found.key, found.value)]
        rows = self._shape(found.last.output[0])
        if any(len(shape) != 4 for shape in shapes) or len(rows) != 3:
            return False
        if found.key_of_rows:
            shapes[1] = [shapes[1][axis] for axis in HEADS_LAST]
        of_heads = {(shape[1], shape[3]) for shape in shapes}
        heads, width = of_heads.pop()
        whole = isinstance(heads, int) and isinstance(width, int) and heads * width == rows[2]
        one_row = not found.bias or self._shape(found.bias)[1:3] == [1, 1]
        return whole and not of_heads and one_row

    def _made_by(
        self, op_type: str, value: str, perm: list[int] | None = None
    ) -> onnx.NodeProto | None:
        return _of_kind(self.makers.get(value), op_type, perm)

    def _only_reader(
        self, op_type: str, value: str, perm: list[int] | None = None
    ) -> onnx.NodeProto | None:
        readers = self.readers.get(value, [])
        return _of_kind(readers[0] if len(readers) == 1 else None, op_type, perm)

    def _before_casts(self, value: str) -> str:
        while cast := self._made_by("Cast", value):
            value = cast.input[0]
        return value

    def _behind_casts(self, value: str) -> str:
        while cast := self._only_reader("Cast", value):
            value = cast.output[0]
        return value

    def _number(self, name: str) -> float | None:
        weight = self.weights.get(name)
        values = None if weight is None else numpy_helper.to_array(weight)
        return float(values.item()) if values is not None and values.size == 1 else None

    def _shape(self, name: str) -> list[int | str]:
        info = self.infos.get(name)
        turned = self._made_by("Transpose", name)
        if info is None and turned:  # the exporter does not say the shape of every one
            shape = self._shape(turned.input[0])
            return [shape[axis] for axis in turned.attribute[0].ints] if shape else []
        if info is None:
            return []
        dims = info.type.tensor_type.shape.dim
        return [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in dims]

    # --- rewriting --------------------------------------------------------------------------------

    def apply(self, found: list[_Attention]) -> None:
        """Put a MultiHeadAttention into the place of each attention's last node."""
        by_last = {each.last.output[0]: each for each in found}
        for node in list(self.graph.node):
            attention = by_last.get(node.output[0])
            if attention is None:
                self.nodes.append(node)
            else:
                self._place(attention)
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)

    def _place(self, found: _Attention) -> None:
        kind = self.infos[found.last.output[0]].type.tensor_type.elem_type
        inputs = [
            self._rows(found.query, found),
            self._rows(found.key, found, of_rows=found.key_of_rows),
            self._rows(found.value, found),
        ]
        if found.bias:
            inputs += ["", "", self._square(found.bias, kind)]
        self.nodes.append(
            helper.make_node(
                OP_TYPE,
                inputs,
                [found.last.output[0]],
                name=f"{found.last.output[0]}/{OP_TYPE}",
                domain=DOMAIN,
                num_heads=self._shape(found.query)[1],
                scale=found.scale,
            )
        )

    def _rows(self, value: str, found: _Attention, of_rows: bool = False) -> str:
        """Return [B, heads, N, width] as [B, N, D]: what it was made of, where that is all.

        With `of_rows` the value is [B, N, heads, width].
        """
        like = self.infos[found.last.output[0]]
        dim = self._shape(like.name)[2]
        split = self._made_by("Split", value)
        if split is not None and _axis(split) == 1 and not of_rows:
            parts = list(split.output)
            flat = self._flat(self._turned_back(split.input[0]))
            if flat and self._shape(flat)[2] == len(parts) * int(dim):
                rows = [f"{name}/rows" for name in parts]
                count = len(parts)
                self._shared("Split", [flat], rows, like, axis=2, num_outputs=count)
                return rows[parts.index(value)]
        by_token = value if of_rows else self._turned_back(value)
        flat = self._flat(by_token)
        if flat and self._shape(flat)[2] == dim:
            return flat
        if not by_token:
            names = [f"{value}/turned"]
            by_token = self._shared("Transpose", [value], names, None, perm=HEADS_LAST)
        shape = self._constant("rows_shape", [0, 0, dim])
        return self._shared("Reshape", [by_token, shape], [f"{value}/rows"], like)

    def _turned_back(self, value: str) -> str:
        """Return the [B, N, heads, width] of which a value is the Transpose; empty: it is none."""
        turned = self._made_by("Transpose", value, HEADS_LAST)
        return str(turned.input[0]) if turned else ""

    def _flat(self, value: str) -> str:
        """Return the [B, N, ...] of which a value is the Reshape; empty: it is none."""
        shaped = self._made_by("Reshape", value)
        return str(shaped.input[0]) if shaped and len(self._shape(shaped.input[0])) == 3 else ""

    def _square(self, bias: str, kind: int) -> str:
        """Return log-sizes [B, 1, 1, N] as the bias [B, 1, N, N] of every query."""
        at = f"{bias}/square"
        narrow = bias
        if kind != TensorProto.FLOAT:
            narrow = self._shared("Cast", [bias], [f"{bias}/narrow"], None, to=kind)
        images = self._shared("Shape", [bias], [f"{at}/images"], None, start=0, end=2)
        tokens = self._shared("Shape", [bias], [f"{at}/tokens"], None, start=3, end=4)
        shape = self._shared("Concat", [images, tokens, tokens], [f"{at}/shape"], None, axis=0)
        known = self._shape(bias)
        info = helper.make_tensor_value_info(at, kind, [*known[:2], known[3], known[3]])
        return self._shared("Expand", [narrow, shape], [at], info)

    def _shared(
        self,
        op_type: str,
        inputs: list[str],
        outputs: list[str],
        info: onnx.ValueInfoProto | None,
        **attributes: object,
    ) -> str:
        """Add a node unless it is there already; `info` is what its outputs are like."""
        if outputs[0] not in self.made:
            self.made.add(outputs[0])
            node = helper.make_node(op_type, inputs, outputs, name=outputs[0], **attributes)
            self.nodes.append(node)
            for name in outputs if info is not None else ():
                added = self.graph.value_info.add()
                added.CopyFrom(info)
                added.name = name
        return outputs[0]

    def _constant(self, name: str, values: list[int | str]) -> str:
        if name not in self.weights:
            tensor = helper.make_tensor(name, TensorProto.INT64, [len(values)], values)
            self.graph.initializer.append(tensor)
            self.weights[name] = tensor
        return name


def _of_kind(
    node: onnx.NodeProto | None, op_type: str, perm: list[int] | None = None
) -> onnx.NodeProto | None:
    if node is None or node.op_type != op_type:
        return None
    return node if perm is None or list(node.attribute[0].ints) == perm else None


def _axis(node: onnx.NodeProto) -> int:
    return next((int(each.i) for each in node.attribute if each.name == "axis"), -1)
