"""Exporting and verifying a ViT-S beside a plain ``torch.onnx.export`` of the dense model.

    python benchmarks/export_time.py [--arch vit_small_patch16_224] [--rounds 3]

Both run in one process, in turn; the weights are random, which changes no time here. The plain
export is what a user without this tool would call: timm's model, dynamo, a dynamic batch. Then
the two dense ONNX files race in ONNX Runtime.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import timm
import torch
from rich.console import Console
from rich.table import Table

import simprune_deploy as sd
from simprune_deploy.onnx.exporter import export_onnx, quiet_exporter


def plain_export(vit: torch.nn.Module, size: int) -> onnx.ModelProto:
    with quiet_exporter():
        program = torch.onnx.export(
            vit,
            (torch.zeros(2, 3, size, size),),
            dynamo=True,
            opset_version=20,
            dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
            input_names=["images"],
            verbose=False,
        )
    return program.model_proto


def race(models: dict[str, onnx.ModelProto], size: int, rounds: int) -> dict[str, float]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    sessions = {
        name: onnxruntime.InferenceSession(
            graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        for name, graph in models.items()
    }
    images = np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(rounds):
        for name, session in sessions.items():
            start = time.perf_counter()
            session.run(None, {"images": images})
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) * 1e3 for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="vit_small_patch16_224")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    vit = timm.create_model(args.arch).eval()
    size = vit.patch_embed.img_size[0]
    pruned = sd.prune(vit, threshold=0.9)
    plain_export(vit, size)  # the first call imports the exporter
    plain, ours = [], []
    with tempfile.TemporaryDirectory() as folder:
        for index in range(args.rounds):
            start = time.perf_counter()
            graph = plain_export(vit, size)
            middle = time.perf_counter()
            result = sd.export(pruned, Path(folder) / str(index))
            ours.append(time.perf_counter() - middle)
            plain.append(middle - start)
    status = result.verdict.status if result.verdict else "not verified"
    ratio = statistics.median(b / a for a, b in zip(plain, ours, strict=True))
    console = Console(width=100)
    table = Table("what", "seconds")
    table.add_row("plain torch.onnx.export, dense", f"{statistics.median(plain):.1f}")
    table.add_row(
        f"ours, pruned, with its parity check ({status})", f"{statistics.median(ours):.1f}"
    )
    table.add_row("ratio", f"{ratio:.2f}")
    console.print(table)
    dense = export_onnx(sd.prune(vit, threshold=1.5))
    times = race({"plain": graph, "ours": dense}, size, 40)
    table = Table("dense model in ONNX Runtime", "ms at batch 1")
    table.add_row("plain torch.onnx.export", f"{times['plain']:.1f}")
    table.add_row("ours", f"{times['ours']:.1f}")
    table.add_row("ratio", f"{times['ours'] / times['plain']:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
