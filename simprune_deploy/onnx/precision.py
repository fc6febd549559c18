"""A float32 graph in float16 or bfloat16: strongly typed, every change of type a Cast.

What stays in float32, in every precision:

* the image input, the normalization of pixels, and what follows the blocks: the final
  normalization, the pooling, the head, the output;
* the log-sizes, the thresholds, and the scores of attention from the log-size on to the end of
  the softmax. The operator compares in float32 whatever the tokens are;
* inside a normalization: the statistics of ``LayerNormalization`` (its ``stash_type``), and the
  whole of one that is written out in powers and roots, whose squares would overflow.

The rest, which is nearly all the work and all the large weights, is 16 bits wide.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from simprune_deploy.common.errors import InvalidArgumentError, UnsupportedModelError, argument
from simprune_deploy.onnx.function_body import OP_TYPE
from simprune_deploy.onnx.metadata import read_metadata, write_metadata
from simprune_deploy.onnx.variants import function_of

FLOAT = int(TensorProto.FLOAT)
Precision = Literal["fp32", "fp16", "bf16"]
PRECISIONS = {
    "fp32": FLOAT,
    "fp16": int(TensorProto.FLOAT16),
    "bf16": int(TensorProto.BFLOAT16),
}
LARGEST_FLOAT16 = 65504.0

FLOAT32_OPS = frozenset({"Exp", "Log", "Pow", "Reciprocal", "ReduceMean", "Softmax", "Sqrt"})
"""They overflow in 16 bits, or lose too much."""

NARROW_OPS = frozenset({"Concat", "Conv", "Gemm", "Gelu", "LayerNormalization", "MatMul"})
"""They are 16 bits wide whatever they read: sums inside them are float32 anyway."""

MOVES = frozenset(
    {"Concat", "ConstantOfShape", "Expand", "Gather", "Identity", "Reshape", "Slice", "Split"}
    | {"Squeeze", "Transpose", "Unsqueeze"}
)
"""They move numbers and round nothing."""


def check_precision(name: str) -> None:
    """Refuse a name that is not a precision.

    Raises:
        SimpruneError: it is not.
    """
    if name not in PRECISIONS:
        raise InvalidArgumentError(f"precision {name!r} is not known: use fp32, fp16 or bf16")


@dataclasses.dataclass(frozen=True)
class Rounding:
    """What happened to the weights.

    Attributes:
        weights: How many numbers became 16 bits wide.
        flushed_to_zero: How many of them were not zero before and are now.
        largest: The largest magnitude among them.
    """

    weights: int = 0
    flushed_to_zero: int = 0
    largest: float = 0.0

    def plus(self, other: Rounding) -> Rounding:
        return Rounding(
            self.weights + other.weights,
            self.flushed_to_zero + other.flushed_to_zero,
            max(self.largest, other.largest),
        )


def with_precision(graph: onnx.ModelProto, precision: str) -> onnx.ModelProto:
    """Return a copy of one of our float32 graphs in a precision.

    Its metadata says so, and what rounding did to it; its function is the one for that precision.

    Raises:
        SimpruneError: a weight is beyond float16, or `precision` is not known.
    """
    check_precision(precision)
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    if precision == "fp32":
        return copy
    metadata = read_metadata(copy)
    rounding = _Narrowing(copy, precision).apply()
    metadata = dataclasses.replace(
        metadata,
        export={**metadata.export, "precision": precision},
        rounding=dataclasses.asdict(rounding),
    )
    if copy.functions:
        del copy.functions[:]
        copy.functions.append(function_of(metadata))
    write_metadata(copy, metadata)
    return copy


def value_types(graph: onnx.ModelProto) -> dict[str, int]:
    """Return the element type of every tensor of the main graph."""
    inferred = onnx.shape_inference.infer_shapes(graph).graph
    infos = (*inferred.input, *inferred.value_info, *inferred.output)
    types = {info.name: int(info.type.tensor_type.elem_type) for info in infos}
    types.update({each.name: int(each.data_type) for each in inferred.initializer})
    return types


def module_of(node: onnx.NodeProto) -> str:
    """Return the module a node was traced in, as its name says; empty for the model itself."""
    path, separator, _ = str(node.name).partition("/")
    return path if separator else ""


class _Narrowing:
    """One pass over the nodes: choose a type for each, and cast where two types meet."""

    def __init__(self, model: onnx.ModelProto, precision: str) -> None:
        self.graph, self.precision, self.low = model.graph, precision, PRECISIONS[precision]
        self.opset = next(each.version for each in model.opset_import if not each.domain)
        self.weights = {each.name: each for each in self.graph.initializer}
        self.floats = {name for name, kind in value_types(model).items() if kind == FLOAT}
        self.log_sizes = _log_size_values(self.graph, self.floats - self.weights.keys())
        self.types: dict[str, int] = {value.name: FLOAT for value in self.graph.input}
        self.makers: dict[str, str] = {}
        self.casts: dict[tuple[str, int], str] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.weight_reads: list[tuple[onnx.NodeProto, int, int]] = []

    def apply(self) -> Rounding:
        outside = _outside_of_blocks(self.graph, self.floats)
        for index, node in enumerate(list(self.graph.node)):
            self._place(node, index in outside)
        for output in self.graph.output:
            if self.types.get(output.name) == self.low:
                self._widen_output(output.name)
        rounding = self._narrow_weights()
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        self._retype_infos()
        return rounding

    def _place(self, node: onnx.NodeProto, outside: bool) -> None:
        if node.op_type == OP_TYPE:
            for index, kind in enumerate((self.low, self.low, FLOAT, FLOAT)):
                self._read(node, index, kind)
            self.types.update({node.output[0]: self.low, node.output[1]: FLOAT})
        elif node.op_type != "Shape":
            kind = FLOAT if outside or self._stays_float32(node) else self.low
            for index, name in enumerate(node.input):
                if name in self.floats:
                    self._read(node, index, kind)
            for name in node.output:
                if name in self.floats:
                    self.types[name], self.makers[name] = kind, module_of(node)
                    _retype_attributes(node, kind)
        self.nodes.append(node)

    def _stays_float32(self, node: onnx.NodeProto) -> bool:
        """Follow float32 inputs, but only inside their module, or if they are log-sizes."""
        if node.op_type in FLOAT32_OPS or not self._takes_low(node.op_type):
            return True
        if node.op_type in NARROW_OPS:
            return False
        module = module_of(node)
        return any(name in self.log_sizes for name in (*node.input, *node.output)) or any(
            self.makers.get(name) == module and self.types[name] == FLOAT for name in node.input
        )

    @functools.cache  # noqa: B019  (lives as long as one export)
    def _takes_low(self, op_type: str) -> bool:
        """Tell whether the opset has the operator in 16 bits: Conv takes bfloat16 from 22 on."""
        schema = onnx.defs.get_schema(op_type, self.opset)
        name = "tensor(float16)" if self.precision == "fp16" else "tensor(bfloat16)"
        made = schema.outputs[0].type_str
        allowed = {each.type_param_str: each.allowed_type_strs for each in schema.type_constraints}
        return name in allowed.get(made, [])

    def _read(self, node: onnx.NodeProto, index: int, kind: int) -> None:
        name = node.input[index]
        if name in self.weights:
            self.weight_reads.append((node, index, kind))
        elif self.types[name] != kind:
            node.input[index] = self._cast(name, kind)

    def _cast(self, name: str, kind: int) -> str:
        if (name, kind) not in self.casts:
            wide = "fp32" if kind == FLOAT else self.precision
            cast = f"{name}/as_{wide}"
            self.casts[name, kind] = cast
            self.types[cast] = kind
            self.nodes.append(helper.make_node("Cast", [name], [cast], name=cast, to=kind))
        return self.casts[name, kind]

    def _widen_output(self, name: str) -> None:
        narrow = f"{name}/{self.precision}"
        for node in self.nodes:
            for values in (node.input, node.output):
                for index, value in enumerate(values):
                    if value == name:
                        values[index] = narrow
        self.types.update({narrow: self.low, name: FLOAT})
        self.nodes.append(helper.make_node("Cast", [narrow], [name], name=name, to=FLOAT))

    def _narrow_weights(self) -> Rounding:
        readers: dict[str, set[int]] = {}
        modules: dict[str, str] = {}
        for node, index, kind in self.weight_reads:
            readers.setdefault(node.input[index], set()).add(kind)
            modules.setdefault(node.input[index], module_of(node))
        rounding = Rounding()
        renamed: dict[str, str] = {}
        for name, kinds in readers.items():
            if self.low not in kinds:
                continue
            weight = self.weights[name]
            values = numpy_helper.to_array(weight)
            narrow, done = _narrow(values, self.precision, _known_as(name, modules[name]))
            rounding = rounding.plus(done)
            if kinds == {self.low}:
                weight.CopyFrom(_tensor(name, narrow, self.low))
                self.types[name] = self.low
            else:
                renamed[name] = f"{name}/{self.precision}"
                self.graph.initializer.append(_tensor(renamed[name], narrow, self.low))
        for node, index, kind in self.weight_reads:
            if kind == self.low:
                node.input[index] = renamed.get(node.input[index], node.input[index])
        return rounding

    def _retype_infos(self) -> None:
        infos = {info.name: info for info in self.graph.value_info}
        for name, info in infos.items():
            if name in self.types:
                info.type.tensor_type.elem_type = self.types[name]
        for (name, kind), cast in self.casts.items():
            if name in infos:
                info = self.graph.value_info.add()
                info.CopyFrom(infos[name])
                info.name, info.type.tensor_type.elem_type = cast, kind


def _outside_of_blocks(graph: onnx.GraphProto, floats: set[str]) -> set[int]:
    """Return the nodes ahead of the patch embedding, and behind the blocks but for a pool's."""
    nodes = list(graph.node)
    first = next(index for index, node in enumerate(nodes) if node.op_type == "Conv")
    last = max(i for i, node in enumerate(nodes) if module_of(node).startswith("blocks."))
    behind = {
        index
        for index in range(last + 1, len(nodes))
        if module_of(nodes[index]).split(".")[0] != "attn_pool"
    }
    return set(range(first)) | behind


def _log_size_values(graph: onnx.GraphProto, activations: set[str]) -> set[str]:
    """Return the values that are made of log-sizes and thresholds alone, and the first log-sizes.

    Thresholds come from outside (an input, or constants), and from how many tokens are left.
    """
    found = {value.name for value in graph.input[1:]}
    for node in graph.node:
        if node.op_type == OP_TYPE:
            found.update((node.input[2], node.output[1]))
            continue
        read = [name for name in node.input if name in activations]
        if read and all(name in found for name in read):
            found.update(name for name in node.output if name in activations)
    return found


def _retype_attributes(node: onnx.NodeProto, kind: int) -> None:
    for attribute in node.attribute:
        if node.op_type == "ConstantOfShape" and attribute.name == "value":
            values = numpy_helper.to_array(attribute.t).astype(np.float32)
            attribute.t.CopyFrom(_tensor("", values, kind))
        elif node.op_type == "Cast" and attribute.name == "to":
            attribute.i = kind


def _known_as(name: str, module: str) -> str:
    """Return a name that a person knows; the tracer's own for a weight it turned is a number."""
    return f"a weight of {module}" if name.startswith("val_") and module else f"the weight {name}"


def _narrow(values: np.ndarray, precision: str, what: str) -> tuple[np.ndarray, Rounding]:
    """Round float32 values to 16 bits, as float32."""
    with np.errstate(over="ignore"):
        narrow = round_to(values, precision)
    sizes = np.abs(values)
    largest = float(sizes.max(initial=0.0))
    if not np.isfinite(narrow).all():
        end, remedy = (
            (f"float16 ends at {LARGEST_FLOAT16:.0f}", argument("precision", "bf16"))
            if precision == "fp16"
            else ("bfloat16 ends at 3.39e38", argument("precision", "fp32"))
        )
        raise UnsupportedModelError(
            f"{what} holds {values.flat[sizes.argmax()]:g}, and {end}: use {remedy}"
        )
    flushed = int(((narrow == 0) & (values != 0)).sum())
    return narrow, Rounding(int(values.size), flushed, largest)


def round_to(values: np.ndarray, precision: str) -> np.ndarray:
    """Return float32 values rounded to the nearest of a precision, ties to even, as float32."""
    if precision == "fp32":
        return values
    if precision == "fp16":
        return values.astype(np.float16).astype(np.float32)
    bits = np.asarray(values, np.float32, order="C").view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isfinite(values), rounded.view(np.float32), values)


def _tensor(name: str, values: np.ndarray, kind: int) -> onnx.TensorProto:
    """Make a tensor of values that are exact in its type."""
    tensor = TensorProto(name=name, data_type=kind, dims=values.shape)
    if kind == PRECISIONS["bf16"]:
        bits = np.asarray(values, np.float32, order="C").view(np.uint32) >> 16
        tensor.raw_data = bits.astype("<u2").tobytes()
    else:
        tensor.raw_data = values.astype("<f2" if kind == PRECISIONS["fp16"] else "<f4").tobytes()
    return tensor


def emulated(graph: onnx.ModelProto, precision: str) -> onnx.ModelProto:
    """Return a float32 graph that computes what a 16-bit graph computes, number for number.

    Every 16-bit tensor is held in float32 and rounded to 16 bits behind the operator that makes
    it: what a kernel does that sums in float32. Runtimes without 16-bit kernels can run it, and
    a tensor beyond float16 shows as infinity, which a runtime that widens float16 would hide.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    main, low = copy.graph, PRECISIONS[precision]
    narrow = {name for name, kind in value_types(graph).items() if kind == low}
    for weight in main.initializer:
        if weight.name in narrow:
            weight.CopyFrom(_tensor(weight.name, _to_float32(weight), FLOAT))
    nodes: list[onnx.NodeProto] = []
    for node in main.node:
        nodes.extend(_rounded(node, narrow, low))
    del main.node[:]
    main.node.extend(nodes)
    for info in (*main.value_info, *main.output):
        if info.name in narrow:
            info.type.tensor_type.elem_type = FLOAT
    return copy


def _rounded(node: onnx.NodeProto, narrow: set[str], low: int) -> Iterator[onnx.NodeProto]:
    made = [name for name in node.output if name in narrow]
    if made:
        _retype_attributes(node, FLOAT)
    if node.op_type == "Cast":
        if made:
            (name,) = made
            between = f"{name}/narrow"
            yield helper.make_node("Cast", [node.input[0]], [between], name=between, to=low)
            yield helper.make_node("Cast", [between], [name], name=name, to=FLOAT)
            return
        if node.input[0] in narrow:
            node = helper.make_node("Identity", node.input, node.output, name=node.name)
    yield node
    if node.op_type in MOVES:
        return
    for index, name in enumerate(node.output):
        if name in narrow:
            wide, between = f"{name}/wide", f"{name}/narrow"
            node.output[index] = wide
            yield helper.make_node("Cast", [wide], [between], name=between, to=low)
            yield helper.make_node("Cast", [between], [name], name=f"{name}/rounded", to=FLOAT)


def _to_float32(weight: onnx.TensorProto) -> np.ndarray:
    if weight.data_type == PRECISIONS["bf16"]:
        bits = np.frombuffer(weight.raw_data, "<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(tuple(weight.dims))
    return numpy_helper.to_array(weight).astype(np.float32)


def with_ranges(graph: onnx.ModelProto, precision: str) -> tuple[onnx.ModelProto, list[str]]:
    """Return an emulated graph whose one output is the largest magnitude of each narrow tensor.

    Also returns the names of those tensors, in the order of the output.
    """
    copy = emulated(graph, precision)
    main = copy.graph
    low = PRECISIONS[precision]
    kinds = value_types(graph)
    names = [
        name
        for node in graph.graph.node
        for name in node.output
        if kinds.get(name) == low and node.op_type not in MOVES
    ]
    columns = []
    one = helper.make_tensor("range/one", TensorProto.INT64, [1], [1])
    main.initializer.append(one)
    for name in names:
        steps = [f"{name}/range_{step}" for step in ("size", "largest", "column")]
        main.node.append(helper.make_node("Abs", [name], steps[:1], name=steps[0]))
        main.node.append(
            helper.make_node("ReduceMax", steps[:1], steps[1:2], name=steps[1], keepdims=0)
        )
        main.node.append(
            helper.make_node("Reshape", [steps[1], one.name], steps[2:], name=steps[2])
        )
        columns.append(steps[2])
    main.node.append(helper.make_node("Concat", columns, ["ranges"], name="ranges", axis=0))
    del main.output[:]
    main.output.append(helper.make_tensor_value_info("ranges", FLOAT, [len(names)]))
    return copy, names
