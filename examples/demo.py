"""Export a trained ViT, compare it with PyTorch, and weigh what pruning gave and cost.

    make demo        (or: python examples/demo.py [-o demo-output])

The model is the Fashion-MNIST classifier of ``examples/fashion_mnist``; the images are 3,000 of
its test set. Everything runs in ONNX Runtime on the CPU. These images are gray with flat
backgrounds: they overstate how much can be pruned from photographs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import simprune_deploy as sd

DATA = Path(__file__).parent / "fashion_mnist"
THRESHOLD = 0.9
CURVE = (0.95, 0.9, 0.85, 0.8, 0.7)
BATCH = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--images", type=int, default=3000, help="test images to classify")
    parser.add_argument("--rounds", type=int, default=200, help="runs that the times are of")
    args = parser.parse_args()
    exported = args.output / "pruned"

    print("1. export the pruned model, and compare it with PyTorch", flush=True)
    result = sd.export(
        DATA / "vit",
        exported,
        sd.ExportOptions(runtime_threshold=True, normalize=True, batch=(1, BATCH)),
        threshold=THRESHOLD,
        force=True,
    )
    for check in result.verdict.checks:
        print(f"   {check.name}: {check.summary}")
    print(f"   parity check: {result.verdict.status}")

    print(f"2. pruned beside dense, on {args.images:,} test images of Fashion-MNIST", flush=True)
    measured = sd.sweep(
        exported,
        DATA / "test_slice.npz",
        thresholds=CURVE,
        limit=args.images,
        batch=BATCH,
        timing=args.rounds,
        output=args.output / "sweep",
        force=True,
    )
    table = args.output / "sweep" / "table.md"
    sd.report(measured, table)
    print(f"\n{table.read_text(encoding='utf-8')}")

    print(f"the model            {exported / 'model.onnx'}")
    print(f"its parity check     {exported / 'parity.json'}")
    print(f"what was measured    {args.output / 'sweep' / 'sweep.json'}")


if __name__ == "__main__":
    main()
