"""Accuracy of the demo's model in every precision, on the same test images.

    python benchmarks/precision_accuracy.py

float32 and float16 are the exported files in ONNX Runtime on the CPU; bfloat16, for which that has
no kernels, is a float32 graph that rounds to bfloat16 behind every operator.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnxruntime

import simprune_deploy as sd
from simprune_deploy.common.images import Preprocessing
from simprune_deploy.onnx.exporter import ExportOptions, export_onnx
from simprune_deploy.onnx.precision import PRECISIONS, emulated

DEMO = Path(__file__).parents[1] / "examples" / "fashion_mnist"


def main() -> None:
    """Print a row of the table in docs/precision.md for every precision."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--images", type=int, default=3000, help="at most 3000")
    arguments = parser.parse_args()

    model = sd.prune(sd.load(DEMO / "vit"), threshold=arguments.threshold)
    preprocessing = Preprocessing.of_model(model)
    data = np.load(DEMO / "test_slice.npz")
    grey = data["images"][: arguments.images].astype(np.float32) / 255
    labels = data["labels"][: arguments.images]
    pixels = ((grey - preprocessing.mean[0]) / preprocessing.std[0])[:, None].astype(np.float32)

    reference = None
    print("| precision | file bytes | accuracy | top-1 as in float32 |\n|---|---|---|---|")
    for precision in PRECISIONS:
        graph = export_onnx(model, ExportOptions(batch=(1, 50), precision=precision))
        size = len(graph.SerializeToString())
        if precision == "bf16":
            graph = emulated(graph, precision)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        chunks = [pixels[i : i + 50] for i in range(0, len(pixels), 50)]
        logits = np.concatenate([session.run(["logits"], {"images": each})[0] for each in chunks])
        winners = logits.argmax(1)
        reference = winners if reference is None else reference
        accuracy, agreement = (winners == labels).mean(), (winners == reference).mean()
        print(f"| {precision} | {size:,} | {accuracy:.2%} | {agreement:.2%} |", flush=True)


if __name__ == "__main__":
    main()
