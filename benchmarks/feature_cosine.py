"""How far pruning moves a model's output: cosine to the unpruned one, by threshold.

    python benchmarks/feature_cosine.py MODEL --images DIR [--img-size 224]

In PyTorch, image by image. The share of tokens is what the blocks process, over all blocks.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import simprune_deploy as sd
from simprune_deploy.common.images import Preprocessing, load_folder
from simprune_deploy.pruning.cost import spread_over_blocks
from simprune_deploy.pruning.model import PruneTrace


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--layers", default="3,6,9")
    parser.add_argument("--thresholds", default="0.9,0.85,0.8,0.7")
    args = parser.parse_args()
    layers = [int(layer) for layer in args.layers.split(",")]
    vit = sd.load(args.model, img_size=args.img_size)
    images = torch.from_numpy(load_folder(args.images, Preprocessing.of_model(vit)).pixels)
    dense = torch.cat([vit(image) for image in images.split(1)])
    table = Table("threshold", "tokens processed", "cosine: mean", "worst", "images")
    for threshold in map(float, args.thresholds.split(",")):
        pruned = sd.prune(vit, threshold=threshold, layers=layers)
        cosines, shares = [], []
        for image, feature in zip(images.split(1), dense, strict=True):
            traces: list[PruneTrace] = []
            output = pruned(image, traces=traces)
            cosines.append(float(torch.cosine_similarity(output[0], feature, dim=0)))
            kept = [trace.kept_index.shape[1] for trace in traces]
            blocks = spread_over_blocks(pruned.num_tokens, layers, kept, len(pruned.vit.blocks))
            shares.append(np.mean(blocks) / pruned.num_tokens)
        table.add_row(
            f"{threshold:.2f}",
            f"{np.mean(shares):.0%}",
            f"{np.mean(cosines):.4f}",
            f"{min(cosines):.4f}",
            str(len(images)),
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
