"""Turn all 10,000 test images of Fashion-MNIST into one file that ``sweep --data`` takes.

Data: Debian's package ``dataset-fashion-mnist`` (Expat license)::

    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb data
    python examples/fashion_mnist/to_npz.py data/usr/share/datasets/fashion-mnist test10k.npz
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from train import CLASSES, read_idx


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with the gzipped IDX files")
    parser.add_argument("output", type=Path, help="the .npz file to write")
    args = parser.parse_args()
    np.savez_compressed(
        args.output,
        images=read_idx(args.data / "t10k-images-idx3-ubyte.gz"),
        labels=read_idx(args.data / "t10k-labels-idx1-ubyte.gz"),
        classes=np.array(CLASSES),
    )


if __name__ == "__main__":
    main()
