"""What a checkpoint file holds, judged by its bytes and never by its name, as weights and facts."""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
from torch import nn

from simprune_deploy.checkpoints.weight_names import (
    CLASSIFIERS,
    has_classifier,
    looks_like,
    timm_names,
)
from simprune_deploy.common.errors import CheckpointError, argument
from simprune_deploy.common.transforms import PREPROCESSING
from simprune_deploy.pruning.families import check_prunable
from simprune_deploy.pruning.model import (
    EXTRA_STATE_KEY,
    PrunedViT,
    describe_vit,
    read_extra_state,
)

HUB_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
"""Weight files of a timm hub folder, best first."""

_EMA_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "params_ema", "ema")
_WEIGHT_KEYS = (
    *("state_dict", "model", "model_state", "model_state_dict", "module", "net", "network"),
    *("weights", "params"),
    # of self-distillation: the teacher is the average. Beside another model it is another one
    *("teacher", "student"),
)
_WRAPPERS = (
    *("DataParallel", "DistributedDataParallel", "OptimizedModule", "AveragedModel"),
    *("ModelEma", "ModelEmaV2", "ModelEmaV3"),
)
ALL = frozenset((*PREPROCESSING, "global_pool"))
_TIMM_ALONE = frozenset(
    (
        *("gp", "class_map", "train_split", "val_split", "eval_metric", "recovery_interval"),
        *("split_bn", "dist_bn", "no_prefetcher", "checkpoint_hist"),
    )
)
"""Names of timm's train.py for its arguments, of which those of every release have some."""
_DEEPEST = 4  # containers within containers: a pickle may hold itself
_FROM_ITS_SOURCE = "which cannot be pruned any more: give the checkpoint it was made from"

_REFUSED = {
    "torchscript": f"is a TorchScript archive, {_FROM_ITS_SOURCE}",
    "export": f"is a torch.export archive (.pt2), {_FROM_ITS_SOURCE}",
    "onnx": f"is an ONNX model, an export result {_FROM_ITS_SOURCE}",
    "bundle": f"is the folder of an export result, {_FROM_ITS_SOURCE}",
    "npz": "is a NumPy archive (JAX weights): load it with timm, and give its torch.save here",
    "hdf5": "is an HDF5 file (Keras or TensorFlow): only PyTorch and safetensors weights are read",
    "keras": "is a Keras archive: only PyTorch and safetensors weights are read",
    "tensorflow": "is a TensorFlow SavedModel: only PyTorch and safetensors weights are read",
    "lfs": "is a Git LFS pointer and not the file itself: get it with 'git lfs pull'",
    "text": "is a text file, not a checkpoint: give the weights themselves",
    "zip": "is a zip archive that torch.save did not write: give the checkpoint itself",
    "packed": "is a compressed or tar archive: unpack it and give the checkpoint inside",
    "unknown": "is not a checkpoint: its first bytes are neither PyTorch's nor safetensors'",
    "folder": "is a folder without config.json: give the file, or a folder timm saved for the hub",
}


@dataclass
class Contents:
    """What was found in a file, before any model is built.

    Attributes:
        kind: What the file is, in words.
        state: The weights by their name in the architecture.
        arch: timm's name of the architecture, where the file states it.
        model_args: Arguments for ``timm.create_model`` that the file states.
        preprocessing: Entries for ``pretrained_cfg``: mean, std, label_names, ...
        pruning: The saved pruning configuration; None if the weights are of a plain model.
        notes: What was decided on the way.
        says: Of :data:`ALL`, what the file speaks of, be it to leave timm's default.
        module: A pickled one, to hold what is built again against it.
    """

    kind: str
    state: dict[str, torch.Tensor]
    arch: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    preprocessing: dict[str, Any] = field(default_factory=dict)
    pruning: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    says: frozenset[str] = frozenset()
    module: nn.Module | None = None


def read(path: Path, trust_pickle: bool) -> Contents:
    """Read a file or a hub folder.

    Raises:
        CheckpointError: it is no checkpoint, damaged, or needs `trust_pickle`.
    """
    try:
        what = _identify(path)
        if what in _REFUSED:
            raise CheckpointError(f"{path} {_REFUSED[what]}")
        if what == "hub":
            return _read_hub_folder(path, trust_pickle)
        if what == "safetensors":
            return _read_safetensors(path)
        return from_object(path, _torch_load(path, what, trust_pickle))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """Return the first line of a library's message, short enough to follow our own."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


# What it is


def _identify(path: Path) -> str:
    if path.is_dir():
        return _identify_folder(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is not a regular file: give a checkpoint")
    size = path.stat().st_size
    if size == 0:
        raise CheckpointError(f"{path} is empty: copy the checkpoint again")
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(b"PK\x03\x04"):
        return _identify_zip(path)
    if len(head) > 8 and head[8:9] == b"{":
        header = int.from_bytes(head[:8], "little")
        if header + 8 > size:
            raise CheckpointError(_damaged(path, "it ends inside its safetensors header"))
        return "safetensors"
    signatures = {
        b"\x80": "pickle",
        b"\x89HDF\r\n\x1a\n": "hdf5",
        b"\x93NUMPY": "npz",
        b"version https://git-lfs": "lfs",
        b"\x1f\x8b": "packed",
        b"\xfd7zXZ": "packed",
        b"BZh": "packed",
    }
    for signature, what in signatures.items():
        if head.startswith(signature):
            return what
    if head[257:262] == b"ustar":
        return "packed"
    # an ONNX file is a protobuf: field 1 (ir_version), then its producer, domain, graph or opset
    if re.match(rb"\x08[\x01-\x20][\x12\x1a\x22\x28\x32\x3a\x42]", head):
        return "onnx"
    printable = all(byte >= 32 or byte in b"\t\r\n\f" for byte in head)
    return "text" if printable else "unknown"


def _identify_folder(path: Path) -> str:
    if (path / "manifest.json").is_file() and any(path.glob("*.onnx")):
        return "bundle"
    if (path / "saved_model.pb").is_file():
        return "tensorflow"
    return "hub" if (path / "config.json").is_file() else "folder"


def _identify_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except OSError:
        raise
    except Exception as error:  # zipfile lets a broken directory's numbers through
        raise CheckpointError(_damaged(path, "its zip directory is missing or broken")) from error
    # torch puts everything in one folder named after the file
    names = {entry.filename.partition("/")[2] or entry.filename for entry in entries}
    if "archive_format" in names or "serialized_exported_program.json" in names:
        return "export"
    if "constants.pkl" in names and any(name.startswith("code/") for name in names):
        return "torchscript"
    if "data.pkl" in names:
        return "torch"
    if "model.weights.h5" in names:
        return "keras"
    return "npz" if all(name.endswith(".npy") for name in names) else "zip"


def _damaged(path: Path, why: str) -> str:
    return f"{path} is truncated or damaged ({why}): copy it again"


# torch.save


def _torch_load(path: Path, what: str, trust_pickle: bool) -> Any:
    if what == "torch":
        _check_archive(path)
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": not trust_pickle}
    try:
        # mapped, so that an optimizer's state is never read
        with torch.serialization.safe_globals(_safe_globals()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle's protocol, sparse tensors, storages
            return torch.load(path, mmap=what == "torch", **options)
    except OSError:
        raise
    except Exception as error:  # unpickling damaged bytes raises anything
        if not trust_pickle and (names := _refused_globals(path, error)):
            raise CheckpointError(
                f"{path} holds pickled objects ({names}), and loading them runs code from the "
                f"file: save its state_dict instead, or add {argument('trust_pickle', True)} if "
                f"you trust the file"
            ) from error
        raise CheckpointError(_damaged(path, one_line(error))) from error


def _check_archive(path: Path) -> None:
    """Compare the archive's checksums: torch does not, and one flipped bit passes unnoticed."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise CheckpointError(_damaged(path, "its records are larger than the file"))
            # all zero: written with torch.serialization.set_crc32_options(False)
            broken = archive.testzip() if any(entry.CRC for entry in entries) else None
    except (CheckpointError, OSError):
        raise
    except Exception as error:  # as above
        raise CheckpointError(_damaged(path, one_line(error))) from error
    if broken:
        raise CheckpointError(_damaged(path, f"the checksum of {broken} is wrong"))


def _safe_globals() -> list[Any]:
    """The classes beside tensors that training scripts save, none of which can run code."""
    scalar = np.float64(0).__reduce__()[0]
    kinds = (np.float16, np.float32, np.float64, np.int32, np.int64, np.bool_)
    return [
        argparse.Namespace,
        np.dtype,
        *(type(np.dtype(kind)) for kind in kinds),
        (scalar, "numpy._core.multiarray.scalar"),
        (scalar, "numpy.core.multiarray.scalar"),  # as NumPy 1 names it
        # a path of the other operating system cannot be built: all become pure ones
        *(
            (pathlib.PureWindowsPath if "Windows" in name else pathlib.PurePosixPath, module + name)
            for module in ("pathlib.", "pathlib._local.")
            for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
        ),
    ]


def _refused_globals(path: Path, error: Exception) -> str:
    """Return the first names that weights_only refuses, or "" if that was not the trouble."""
    names: list[str] = re.findall(r"GLOBAL ([\w.]+)", str(error))
    try:
        with torch.serialization.safe_globals(_safe_globals()):
            names += torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # only the zip format can be asked; the message has one name at least
        pass
    return ", ".join(list(dict.fromkeys(names))[:3])


def from_object(path: Path | str, loaded: Any) -> Contents:
    """Find the weights in what torch.load returned, or in a module."""
    notes: list[str] = []
    header: dict[str, Any] = {}
    kind = "state dict"
    for _ in range(_DEEPEST):
        key = _container(loaded)
        if key is None:
            break
        header = header or dict(loaded)
        for name in CLASSIFIERS:
            beside = loaded.get(name)
            if isinstance(beside, Mapping) and any(map(torch.is_tensor, beside.values())):
                raise CheckpointError(
                    f"{path} holds a {name!r} beside {key!r}: save both as one state_dict"
                )
        kind = "timm training checkpoint" if "arch" in header else "training checkpoint"
        if key in _EMA_KEYS:
            notes.append(f"EMA weights, from {key}")
        elif key in ("teacher", "student"):
            notes.append(f"weights of the {key}")
        loaded = loaded[key]
    if isinstance(loaded, nn.Module):
        return _from_module(path, loaded, notes)
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(loaded).__name__} and no weights: "
            "give a state_dict or a training checkpoint"
        )
    contents = Contents(kind, _named_tensors(path, loaded), notes=notes)
    _read_header(path, header, contents)
    _strip(path, contents)
    return contents


def _container(loaded: Any) -> str | None:
    """Return the key that holds the weights; None if `loaded` is the weights themselves."""
    if not isinstance(loaded, Mapping):
        return None
    inside = (torch.Tensor, nn.Module, Mapping)
    for key in (*_EMA_KEYS, *_WEIGHT_KEYS):
        value = loaded.get(key)
        if key in ("teacher", "student") and isinstance(value, Mapping) and has_classifier(value):
            raise CheckpointError(
                "the file holds a teacher or a student with a classifier, and does not say which "
                "one is meant: save the state_dict of one"
            )
        if isinstance(value, nn.Module):
            return key
        if isinstance(value, Mapping) and any(isinstance(item, inside) for item in value.values()):
            return key
    return None


def _named_tensors(path: Path | str, loaded: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    if not any(isinstance(value, torch.Tensor) for value in loaded.values()):
        found = ", ".join(map(str, list(loaded)[:5])) or "nothing"
        raise CheckpointError(
            f"{path} holds no weights (found: {found}): give a state_dict or a training checkpoint"
        )
    names = {str(name): None for name in loaded}
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{path} is no plain state dict: its entry {name!r} is a "
                f"{type(value).__name__}, not a tensor; "
                f"{looks_like(names) or 'save model.state_dict()'}"
            )
    return dict(loaded)


def _from_module(path: Path | str, module: nn.Module, notes: list[str]) -> Contents:
    """Take a pickled module apart, so that it is built anew by the timm at hand."""
    while type(module).__name__ in _WRAPPERS and (inner := list(module.children())):
        module = inner[0]
    if isinstance(module, PrunedViT):
        contents = Contents("pickled module", dict(module.state_dict()), notes=notes)
        _strip(path, contents)
        contents.kind = "pickled module"
        return contents
    if not getattr(module, "dynamic_img_size", False):  # which is built anew without it
        check_prunable(module)
    contents = Contents(
        "pickled module", dict(module.state_dict()), notes=notes, **_describe(module), module=module
    )
    # what is as timm has it for the name may never have been thought of
    default = timm.get_pretrained_cfg(contents.arch or "")
    own = contents.preprocessing
    touched = {
        key
        for key in PREPROCESSING
        if key in own and own[key] != plain(getattr(default, key, None))
    }
    contents.says = frozenset(touched | {"global_pool"})
    return contents


def _describe(module: nn.Module) -> dict[str, Any]:
    facts = describe_vit(module)
    return {
        "arch": facts["architecture"] or None,
        "model_args": facts["model_args"],
        "preprocessing": facts["preprocessing"],
        # a module carries its configuration; what is not in it is timm's default for it
        "says": ALL,
    }


def from_timm(module: nn.Module) -> Contents:
    """Take a model with timm's own weights apart, so that it is built with a fixed size."""
    return Contents("timm pretrained", dict(module.state_dict()), **_describe(module))


def _read_header(path: Path | str, header: dict[str, Any], contents: Contents) -> None:
    """Take the architecture and its arguments from a training checkpoint's `arch` and `args`."""
    args = header.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    args = plain(dict(args)) if isinstance(args, Mapping) else {}
    for name in (header.get("arch"), args.get("model")):
        if isinstance(name, str) and contents.arch is None:
            contents.arch = name
    stated = {
        "num_classes": args.get("num_classes"),
        "in_chans": args.get("in_chans"),
        "global_pool": args.get("gp"),
        "img_size": args.get("img_size"),
    }
    size = args.get("input_size")
    if isinstance(size, (list, tuple)) and len(size) == 3:
        stated["in_chans"], stated["img_size"] = size[0], list(size[1:])
    elif isinstance(size, int):  # DeiT's spelling
        stated["img_size"] = stated["img_size"] or size
    if isinstance(kwargs := args.get("model_kwargs"), Mapping):
        stated.update(kwargs)
    contents.model_args = {key: value for key, value in stated.items() if value is not None}
    contents.preprocessing = {key: args[key] for key in PREPROCESSING if args.get(key)}
    # timm's train.py writes all of them, and None or "" where it took the architecture's
    contents.says = frozenset(key for key in PREPROCESSING if key in args)
    if "crop_pct" in args:
        contents.says |= {"crop_mode"}  # younger than the others
    if "gp" in args:
        contents.says |= {"global_pool"}
    if order := _class_order(header, args):
        contents.preprocessing["class_order"] = order


def _class_order(header: Mapping[str, Any], args: Mapping[str, Any]) -> str | None:
    """Return what numbered the classes of a model that timm's train.py trained; None: unknown.

    Many scripts write `arch` (PyTorch's ImageNet example, MoCo), or arguments named after timm's
    (DeiT, MAE), and read their folders with torchvision. timm's alone writes an `arch` that is its
    argument `model`, beside arguments that no other has.
    """
    model = args.get("model")
    if not isinstance(model, str) or header.get("arch") != model or not _TIMM_ALONE & set(args):
        return None
    if args.get("class_map"):
        return f"class map {args['class_map']}"
    reader, _, name = str(args.get("dataset") or "").lower().partition("/")
    if reader == "torch":
        return "torchvision" if name in ("folder", "image_folder") else None
    return "timm" if reader not in ("hfds", "hfids", "tfds", "wds") else None


def plain(value: Any) -> Any:
    """Return NumPy and torch numbers as Python's, within lists and dicts too."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, torch.Tensor):
        dense = value.layout is torch.strided and not (value.is_meta or value.is_quantized)
        return value.tolist() if dense and value.numel() < 100 else None
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


def _strip(path: Path | str, contents: Contents) -> None:
    """Take off the wrappers' prefixes, and the configuration of a saved pruned model."""
    saved = [key for key in contents.state if key.endswith(EXTRA_STATE_KEY)]
    contents.state = state = timm_names(str(path), contents.state, contents.notes)
    extra = state.pop(EXTRA_STATE_KEY, None)
    if extra is None:
        if saved:
            raise CheckpointError(
                f"{path} holds a pruned model ({saved[0]}) beside other weights: "
                "save the pruned model's own state_dict"
            )
        return
    facts = read_extra_state(extra)
    try:
        arch, args = facts["architecture"], dict(facts["model_args"])
        pruning, preprocessing = dict(facts["pruning"]), dict(facts["preprocessing"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the saved pruning configuration is damaged") from error
    contents.kind = "pruned model"
    contents.state = {key.removeprefix("vit."): value for key, value in state.items()}
    contents.arch, contents.model_args = str(arch) or None, args
    contents.pruning, contents.preprocessing = pruning, preprocessing
    contents.says = ALL


# safetensors, and folders with it


def _read_safetensors(path: Path) -> Contents:
    from safetensors import safe_open

    try:
        # safetensors' own signature says its names are bytes
        with safe_open(str(path), framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except OSError:
        raise
    except Exception as error:  # SafetensorError, or what a broken header leads to
        raise CheckpointError(_damaged(path, one_line(error))) from error
    contents = Contents("safetensors", _named_tensors(path, state))
    contents.arch = metadata.get("architecture")
    _strip(path, contents)
    return contents


def _read_hub_folder(folder: Path, trust_pickle: bool) -> Contents:
    from timm.models._hub import load_model_config_from_path

    config = _read_config(folder / "config.json")
    if "architecture" not in config and "architecture" not in config.get("pretrained_cfg", {}):
        written = "transformers" if "model_type" in config else "another program"
        raise CheckpointError(
            f"{folder} was not saved by timm (config.json, by {written}, names no "
            "'architecture'): save the model with timm.models.save_for_hf"
        )
    try:
        cfg, arch, args = load_model_config_from_path(folder)
        arch, args, cfg = str(arch), dict(args), dict(cfg)
    except Exception as error:  # timm trusts the file's layout
        raise CheckpointError(f"{folder}/config.json is damaged: {one_line(error)}") from error
    found = [folder / name for name in HUB_WEIGHTS if (folder / name).is_file()]
    if not found:
        raise CheckpointError(f"{folder} has no weights beside config.json ({HUB_WEIGHTS[0]})")
    contents = read(found[0], trust_pickle)
    wanted = (*PREPROCESSING, "label_names", "label_descriptions", "class_order")
    if contents.pruning is None:
        contents.kind, contents.arch, contents.model_args = "timm hub folder", arch, args
        contents.model_args.setdefault("global_pool", config.get("global_pool"))
        contents.preprocessing = {key: cfg[key] for key in wanted if cfg.get(key) is not None}
        # timm builds the model of these arguments, so what they leave out is its default
        contents.says = frozenset((*contents.preprocessing, "global_pool"))
        if "crop_pct" in contents.says:
            contents.says |= {"crop_mode"}  # younger than the others
    contents.notes.append(f"weights from {found[0].name}")
    return contents


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {one_line(error)}") from error
    if not isinstance(config, dict) or not isinstance(config.get("pretrained_cfg", {}), dict):
        raise CheckpointError(f"{path} is damaged: it is no JSON object of a timm model")
    return cast("dict[str, Any]", config)
