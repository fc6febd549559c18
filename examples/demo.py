"""The main job: export a trained ViT, verify it, and weigh what pruning gave and cost.

    make demo        (or: python examples/demo.py [-o demo-output])

The model is the Fashion-MNIST classifier of ``examples/fashion_mnist``; the images are 3,000 of
its test set. Everything runs in ONNX Runtime on the CPU. These images are grey with flat
backgrounds: they overstate how much can be pruned from photographs.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
from rich.console import Console
from rich.table import Table

from simprune_deploy.onnx.metadata import ModelMetadata, load_graph, read_metadata
from simprune_deploy.onnx.variants import diagnostic_name, with_diagnostics
from simprune_deploy.pruning.cost import spread_over_blocks

HERE = Path(__file__).parent
MODEL = HERE / "fashion_mnist" / "vit"
THRESHOLD = 0.9
CURVE = (0.95, 0.9, 0.85, 0.8, 0.7)
BATCH = 50
DENSE = 1.5  # above 1 nothing is pruned


def export(output: Path, *options: str) -> None:
    command = ["export", str(MODEL), "--normalize", "--batch", f"1..{BATCH}", "-o", str(output)]
    print("$ simprune-deploy", *command, *options, flush=True)
    subprocess.run(
        [sys.executable, "-m", "simprune_deploy", *command, "--force", *options], check=True
    )


def session(model: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    # the idle threads of one session must not spin on the cores that another is timed on
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def feed(images: np.ndarray, threshold: float | None) -> dict[str, np.ndarray]:
    feeds = {"images": images}
    if threshold is not None:
        feeds["threshold"] = np.array([threshold], np.float32)
    return feeds


def classify(
    model: onnxruntime.InferenceSession, images: np.ndarray, threshold: float | None
) -> np.ndarray:
    chunks = [images[i : i + BATCH] for i in range(0, len(images), BATCH)]
    return np.concatenate([model.run(None, feed(c, threshold))[0].argmax(1) for c in chunks])


def tokens_processed(
    shown: onnxruntime.InferenceSession,
    metadata: ModelMetadata,
    images: np.ndarray,
    threshold: float,
) -> float:
    """Return the share of tokens that the blocks saw, averaged over images."""
    layers = metadata.pruning.layers
    names = [diagnostic_name(layer, "assignment") for layer in layers]
    shares = []
    for i in range(0, len(images), BATCH):
        found = shown.run(names, feed(images[i : i + BATCH], threshold))
        for kept in zip(*(assignment.max(1) + 1 for assignment in found), strict=True):
            blocks = spread_over_blocks(metadata.num_tokens, layers, kept, metadata.depth)
            shares.append(np.mean(blocks) / metadata.num_tokens)
    return float(np.mean(shares))


def latencies(
    models: dict[float | None, onnxruntime.InferenceSession], images: np.ndarray, rounds: int
) -> dict[float | None, float]:
    """Return the median milliseconds an image takes at batch 1, all settings in turn."""
    times: dict[float | None, list[float]] = {setting: [] for setting in models}
    for index in range(rounds):
        for setting, model in models.items():
            one = images[index % len(images)][None]
            start = time.perf_counter()
            model.run(None, feed(one, setting))
            times[setting].append(time.perf_counter() - start)
    return {setting: statistics.median(found) * 1e3 for setting, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--images", type=int, default=3000, help="test images to classify")
    parser.add_argument("--rounds", type=int, default=150, help="runs that the times are of")
    args = parser.parse_args()
    console = Console(width=100)
    console.rule("1. export the pruned model and verify it")
    export(args.output / "pruned", "--threshold", str(THRESHOLD), "--runtime-threshold")
    console.rule("2. export the dense model, to compare with")
    export(args.output / "dense", "--threshold", str(DENSE), "--no-verify")

    console.rule(f"3. both on {args.images:,} test images of Fashion-MNIST")
    with np.load(HERE / "fashion_mnist" / "test_slice.npz") as data:
        images = data["images"][:, None].astype(np.float32) / 255
        images, labels = images[: args.images], data["labels"][: args.images]
    graph = load_graph(args.output / "pruned" / "model.onnx")
    metadata = read_metadata(graph)
    pruned, shown = (session(g.SerializeToString()) for g in (graph, with_diagnostics(graph)))
    dense = session((args.output / "dense" / "model.onnx").read_bytes())
    answers = {None: classify(dense, images, None)}
    answers |= {threshold: classify(pruned, images, threshold) for threshold in CURVE}
    milliseconds = latencies(
        {None: dense} | dict.fromkeys(CURVE, pruned), images, rounds=args.rounds
    )

    table = Table(
        "model", "accuracy", "same as dense", "tokens processed", "ms an image", "speed-up"
    )
    for setting, classes in answers.items():
        share = (
            1.0 if setting is None else tokens_processed(shown, metadata, images[:1000], setting)
        )
        table.add_row(
            "dense" if setting is None else f"pruned at {setting}",
            f"{(classes == labels).mean():.2%}",
            f"{(classes == answers[None]).mean():.2%}",
            f"{share:.0%}",
            f"{milliseconds[setting]:.2f}",
            f"{milliseconds[None] / milliseconds[setting]:.2f}x",
        )
    console.print(table)
    console.print(f"pruned model  {args.output / 'pruned' / 'model.onnx'}", highlight=False)
    console.print(f"its parity check     {args.output / 'pruned' / 'parity.json'}", highlight=False)
    console.print(f"dense model   {args.output / 'dense' / 'model.onnx'}", highlight=False)


if __name__ == "__main__":
    main()
