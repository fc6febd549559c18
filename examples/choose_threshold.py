"""Find the threshold that keeps the accuracy asked for, export the model with it, and check it.

    python examples/choose_threshold.py [-o chosen] [--max-drop 0.04]

``tune`` looks for the most pruning whose accuracy *surely* drops by no more, so it wants many
images: with the 400 here nothing under 2 points can be shown.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import simprune_deploy as sd

DATA = Path(__file__).parent / "fashion_mnist"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("chosen"))
    parser.add_argument("--max-drop", type=float, default=0.04, help="of top-1, as a share (0.04)")
    parser.add_argument("--images", type=int, default=400, help="to look for it on (400)")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    configuration = args.output / "tuned.json"
    tuned = sd.tune(
        DATA / "vit",
        DATA / "test_slice.npz",
        max_drop=args.max_drop,
        limit=args.images,
        timing=0,
        output=configuration,
        force=True,
    )
    print(f"threshold {tuned.pruning['threshold']}, before blocks {tuned.pruning['layers']}")

    result = sd.export(DATA / "vit", args.output / "exported", config=configuration, force=True)
    print(f"parity check: {result.verdict.status}")

    check = sd.check_accuracy(
        args.output / "exported", data=DATA / "test_slice.npz", max_drop=args.max_drop, limit=1000
    )
    print(f"accuracy on 1,000 images: {'passed' if check.passed else 'failed'}")


if __name__ == "__main__":
    main()
