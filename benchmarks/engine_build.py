"""How long TensorRT-RTX engines take to build, and how large they are. Needs no GPU.

    python benchmarks/engine_build.py                 # the demo model
    python benchmarks/engine_build.py --vit-small     # and a ViT-S/16, random weights

Random weights are good enough here: the builder's work and the engine's size depend on the graph.
Nothing is run and nothing is verified.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import timm

import simprune_deploy as sd
from simprune_deploy.engine.folder_engines import build_ahead
from simprune_deploy.engine.targets import find_targets

DEMO = Path(__file__).parents[1] / "examples" / "fashion_mnist" / "vit"
TARGETS = ("rtx-ada", "rtx,dgx-spark")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vit-small", action="store_true")
    arguments = parser.parse_args()
    print("| model | tokens | targets | ONNX MB | engine MB | seconds |")
    print("|---|---|---|---|---|---|")
    measure("demo ViT, 0.69 M parameters, 196 patches", DEMO, [1, 3, 4], 60)
    if arguments.vit_small:
        vit = timm.create_model("vit_small_patch16_224", pretrained=False).eval()
        measure("ViT-S/16, 22 M parameters, 196 patches", vit, [3, 6, 9], 98)


def measure(title: str, source: object, layers: list[int], tokens: int) -> None:
    for kept in ("dynamic", tokens):
        vit = sd.load(str(source)) if isinstance(source, Path) else source
        pruned = sd.prune(vit, layers=layers, threshold=0.85, tokens=kept)
        with tempfile.TemporaryDirectory() as folder:
            sd.export(pruned, Path(folder) / "model", verify=False)
            for names in TARGETS:
                (engine,) = build_ahead(Path(folder) / "model", find_targets(names))
                onnx = (Path(folder) / "model" / "model.onnx").stat().st_size
                print(
                    f"| {title} | {kept} | {names} | {onnx / 1e6:.1f} "
                    f"| {engine.metadata.engine.bytes / 1e6:.1f} "
                    f"| {engine.metadata.seconds:.1f} |"
                )
                sys.stdout.flush()


if __name__ == "__main__":
    main()
