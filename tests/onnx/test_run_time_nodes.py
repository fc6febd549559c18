"""What ONNX Runtime runs of a whole model: what its host has to wait for on a GPU, and what not."""

from __future__ import annotations

import sys
from typing import Any

import onnx
import pytest
from architectures import ARCHITECTURES, build
from places import ROOT

from simprune_deploy.onnx.exporter import ExportOptions, export_onnx
from simprune_deploy.pruning.model import prune

sys.path.insert(0, str(ROOT / "benchmarks"))

from run_time_nodes import optimized, sizes_read_from_data

CLASS_TOKEN = next(each for each in ARCHITECTURES if each.what == "class token")
INSIDE = {"place": "inside", "features": "keys"}

NO_CAPTURE = {"Shape", "ConstantOfShape", "Loop", "If", "Scan", "NonZero", "Unique", "Compress"}
"""What a CUDA graph cannot hold: control flow, sizes of the data, and sizes computed as it runs."""


def at_run_time(batch: tuple[int, int], precision: Any, **choices: Any) -> onnx.GraphProto:
    """Return what ONNX Runtime runs of an exported model."""
    model = prune(build(CLASS_TOKEN), threshold=0.8, layers=CLASS_TOKEN.layers, **choices)
    return optimized(export_onnx(model, ExportOptions(batch=batch, precision=precision)))


@pytest.mark.parametrize(("precision", "choices"), [("fp32", {}), ("fp16", INSIDE)])
def test_with_fixed_counts_and_a_fixed_batch_nothing_hinders_a_cuda_graph(
    precision: str, choices: dict[str, Any]
) -> None:
    graph = at_run_time((2, 2), precision, tokens=40, **choices)
    assert not NO_CAPTURE & {node.op_type for node in graph.node}
    assert sizes_read_from_data(graph) == []
    assert any(node.op_type == "TopK" for node in graph.node), "it prunes"


@pytest.mark.parametrize(
    ("precision", "batch", "choices"), [("fp32", (1, 4), {}), ("fp16", (2, 2), INSIDE)]
)
def test_with_dynamic_counts_one_number_a_layer_is_read_from_the_data(
    precision: str, batch: tuple[int, int], choices: dict[str, Any]
) -> None:
    graph = at_run_time(batch, precision, **choices)
    assert not NO_CAPTURE - {"Shape", "ConstantOfShape"} & {node.op_type for node in graph.node}
    assert len(sizes_read_from_data(graph)) == len(CLASS_TOKEN.layers) == 2
