"""Pruned beside dense in ONNX Runtime on the CPU: what the token counts allow, what is reached.

    python benchmarks/onnxruntime_speed.py MODEL [--img-size 224,518] [--batch 1,8]

For every image size and batch, dense and pruned run in turn in one process, with the same number
of threads. Two questions:

* reached: the measured speed-up over the speed-up that the token counts allow by FLOPs. Allowed =
  dense FLOPs / pruned FLOPs, both ``embed + sum over blocks of 2 n (4 D^2 + 2 D H) + 4 n^2 D``
  with the n that each block really saw (padding of a batch included). The prune layers' own work
  is not in it: it counts against what is reached.
* overhead: what each prune layer adds to the dense forward at a threshold that prunes nothing.

Times are medians; the spread between runs of the same machine is a few percent.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from rich.console import Console
from rich.table import Table

import simprune_deploy as sd
from simprune_deploy.common.images import Preprocessing, load_folder, sample_images
from simprune_deploy.onnx.exporter import export_onnx
from simprune_deploy.onnx.metadata import read_metadata
from simprune_deploy.onnx.variants import diagnostic_name, with_diagnostics
from simprune_deploy.pruning.cost import allowed_speedup, spread_over_blocks

NOTHING_PRUNED = 1.1


def session(graph: onnx.ModelProto, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # the idle threads of one session must not spin on the cores that another is timed on
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(
        graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def in_turn(calls: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Time each call once a round, so that a slow spell of the machine hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--arch")
    parser.add_argument("--img-size", default="224,518")
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--thresholds", default="0.9,0.8,0.7")
    parser.add_argument("--layers", default="3,6,9")
    parser.add_argument("--images", type=Path, help="pictures; default: those that come along")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    layers = [int(layer) for layer in args.layers.split(",")]
    table = Table(
        "pixels", "batch", "threshold", "tokens", "dense ms", "pruned ms",
        "speed-up", "allowed", "reached", "per prune layer",
    )  # fmt: skip
    for size in map(int, args.img_size.split(",")):
        vit = sd.load(args.model, arch=args.arch, img_size=size)
        pruned = sd.prune(vit, layers=layers)
        graph = export_onnx(pruned, sd.ExportOptions(runtime_threshold=True))
        dense = session(export_onnx(sd.prune(vit, threshold=NOTHING_PRUNED)), args.threads)
        sparse = session(graph, args.threads)
        shown = session(with_diagnostics(graph), args.threads)
        metadata = read_metadata(graph)
        preprocessing = Preprocessing.of_model(vit)
        pictures = (
            load_folder(args.images, preprocessing) if args.images else sample_images(preprocessing)
        )
        embed = 2 * metadata.channels * size * size * metadata.embed_dim
        for batch in map(int, args.batch.split(",")):
            rounds = max(3, args.rounds // (1 if size * batch < 1000 else 3))
            images = np.resize(pictures.pixels, (batch, *pictures.pixels.shape[1:]))
            for threshold in (NOTHING_PRUNED, *map(float, args.thresholds.split(","))):
                feed = {"images": images, "threshold": np.array([threshold], np.float32)}
                counts = [
                    float(shown.run([diagnostic_name(layer, "kept_index")], feed)[0].shape[1])
                    for layer in layers
                ]
                by_block = spread_over_blocks(metadata.num_tokens, layers, counts, metadata.depth)
                times = in_turn(
                    {
                        "dense": partial(dense.run, None, {"images": images}),
                        "pruned": partial(sparse.run, None, feed),
                    },
                    rounds,
                )
                slow, fast = (statistics.median(times[name]) for name in ("dense", "pruned"))
                speedup = statistics.median(
                    a / b for a, b in zip(times["dense"], times["pruned"], strict=True)
                )
                nothing = threshold == NOTHING_PRUNED
                allowed = allowed_speedup(metadata.block, metadata.num_tokens, by_block, embed)
                table.add_row(
                    str(size), str(batch), f"{threshold}",
                    f"{sum(by_block) / len(by_block) / metadata.num_tokens:.2f}",
                    f"{slow * 1e3:.1f}", f"{fast * 1e3:.1f}", f"{speedup:.2f}", f"{allowed:.2f}",
                    "" if nothing else f"{speedup / allowed:.2f}",
                    f"{(1 / speedup - 1) / len(layers):.1%}" if nothing else "",
                )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
