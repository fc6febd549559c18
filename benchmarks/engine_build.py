"""TensorRT-RTX engines: seconds to build, size, and how many attentions are fused. Needs no GPU.

    python benchmarks/engine_build.py                 # the demo model
    python benchmarks/engine_build.py --vit-small     # and a ViT-S/16, random weights

Random weights are good enough here: the builder's work and the engine's size depend on the graph.
Nothing is run and nothing is verified.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

import onnx
import timm

import simprune_deploy as sd
from simprune_deploy.engine.folder_engines import build_ahead
from simprune_deploy.engine.targets import find_targets

DEMO = Path(__file__).parents[1] / "examples" / "fashion_mnist" / "vit"
ONE, FOUR = ("rtx-ada",), ("rtx-ada", "rtx,dgx-spark")
FORMS = (
    ("fp32", False, ONE),
    ("fp32", True, ONE),
    ("fp16", False, FOUR),
    ("fp16", True, ONE),
    ("bf16", False, ONE),
)
"""Precision, whether the log-sizes are in the keys (the default in fp32 alone), targets."""

KERNEL_CALL = re.compile(rb'\{ name=(\w+) [^\n]*? layers="([^"\n]*)"')
"""A call in the text of the program that an engine of TensorRT-RTX 1.7 holds: the kernel's name,
and the layers of the network that it computes."""
SOFTMAX_OF = re.compile(rb"\[ONNX Layer: (\w*Softmax\w*)\]")
FUSED = b"_gemm_mha"
"""How the names of the kernels begin that compute a whole attention."""


def fused_attentions(engine: Path, model: Path) -> tuple[int, int]:
    """Return how many of a model's attentions an engine has fused, and how many there are.

    A kernel that two layers of equal shapes share is called twice, and counts twice. An attention
    counts if no kernel but a fused one has its softmax.

    Args:
        engine: Of TensorRT-RTX.
        model: What it was built from: one softmax a block.

    Raises:
        ValueError: the engine's program does not name every softmax of the model, so that nothing
            can be counted.
    """
    nodes = onnx.load(model, load_external_data=False).graph.node
    softmaxes = {node.name for node in nodes if node.op_type == "Softmax"}
    seen: dict[str, set[bool]] = {name: set() for name in softmaxes}
    for kernel, layers in KERNEL_CALL.findall(engine.read_bytes()):
        for name in SOFTMAX_OF.findall(layers):
            seen[name.decode()].add(kernel.startswith(FUSED))
    if unseen := sorted(name for name, kinds in seen.items() if not kinds):
        raise ValueError(f"{engine} names no kernel of {', '.join(unseen)}")
    return sum(kinds == {True} for kinds in seen.values()), len(softmaxes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vit-small", action="store_true")
    arguments = parser.parse_args()
    print("| model | form | tokens | targets | fused attentions | ONNX MB | engine MB | s |")
    print("|---|---|---|---|---|---|---|---|")
    measure("demo ViT, 0.69 M parameters, 196 patches", DEMO, [1, 3, 4], 60)
    if arguments.vit_small:
        vit = timm.create_model("vit_small_patch16_224", pretrained=False).eval()
        measure("ViT-S/16, 22 M parameters, 196 patches", vit, [3, 6, 9], 98)


def measure(title: str, source: object, layers: list[int], tokens: int) -> None:
    vit = sd.load(str(source)) if isinstance(source, Path) else source
    for precision, in_keys, targets in FORMS:
        form = f"{precision}, log-sizes {'in the keys' if in_keys else 'added'}"
        options = sd.ExportOptions(precision=precision, log_size_in_keys=in_keys)
        for kept in ("dynamic", tokens):
            pruned = sd.prune(vit, layers=layers, threshold=0.85, tokens=kept)
            with tempfile.TemporaryDirectory() as made:
                folder = Path(made) / "model"
                sd.export(pruned, folder, options, verify=False)
                for names in targets:
                    print(f"| {title} | {form} | {kept} | {names} | {row(folder, names)} |")
                    sys.stdout.flush()


def row(folder: Path, names: str) -> str:
    """Build an engine and return what is told of it: fused attentions, sizes, seconds."""
    (engine,) = build_ahead(folder, find_targets(names))
    model = folder / "model.onnx"
    fused, attentions = fused_attentions(engine.path, model)
    return (
        f"{fused} of {attentions} | {model.stat().st_size / 1e6:.1f} "
        f"| {engine.metadata.engine.bytes / 1e6:.1f} | {engine.metadata.seconds:.1f}"
    )


if __name__ == "__main__":
    main()
