"""What ONNX Runtime runs of the demo model, fixed and dynamic: nodes, and sizes read from the data.

    python benchmarks/run_time_nodes.py

Graphs as ONNX Runtime's optimizer leaves them on a CPU. On a GPU every node is a launch, and a size
that is read from the data is a copy to the host for which everything waits.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx
import onnxruntime

import simprune_deploy as sd
from simprune_deploy.onnx.exporter import export_onnx
from simprune_deploy.onnx.variants import dense, prune_nodes

DEMO = Path(__file__).parents[1] / "examples" / "fashion_mnist" / "vit"

SIZES = {
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "OneHot": (1,),
    "Pad": (1,),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Slice": (1, 2, 4),
    "Split": (1,),
    "Tile": (1,),
    "TopK": (1,),
}
"""Inputs that the size of an output is read from, on the host."""

HOST_KNOWS = ("Shape", "Size")
SHAPES = ("Shape", "ConstantOfShape")
"""Sizes that are computed as the model runs."""


def optimized(graph: onnx.ModelProto) -> onnx.GraphProto:
    """Return what ONNX Runtime runs of a model, once it has optimized it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(path)
        options.log_severity_level = 3
        content = graph.SerializeToString()
        onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        return onnx.load(path).graph


def sizes_read_from_data(graph: onnx.GraphProto) -> list[str]:
    """Return the values that are computed from the images and that a size is read from."""
    makers = {name: node for node in graph.node for name in node.output}
    images = {value.name for value in graph.input}

    def from_data(name: str) -> bool:
        node = makers.get(name)
        if node is None:
            return name in images
        return node.op_type not in HOST_KNOWS and any(map(from_data, node.input))

    return sorted(
        {
            node.input[index]
            for node in graph.node
            for index in SIZES.get(node.op_type, ())
            if index < len(node.input) and from_data(node.input[index])
        }
    )


def main() -> None:
    print("| tokens | batch | nodes | more than dense, a layer | of shapes | sizes read, a layer |")
    print("|---|---|---|---|---|---|")
    vit = sd.load(DEMO)
    for tokens in ("dynamic", 60):
        for batch in ((1, 8), (1, 1)):
            pruned = sd.prune(vit, threshold=0.85, layers=[1, 3, 4], tokens=tokens)
            exported = export_onnx(pruned, sd.ExportOptions(batch=batch))
            graph, layers = optimized(exported), len(prune_nodes(exported))
            more = (len(graph.node) - len(optimized(dense(exported)).node)) / layers
            shapes = sum(node.op_type in SHAPES for node in graph.node)
            name = "1..8" if batch == (1, 8) else "1"
            reads = len(sizes_read_from_data(graph)) / layers
            print(
                f"| {tokens} | {name} | {len(graph.node)} | {more:.0f} | {shapes} | {reads:g} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
