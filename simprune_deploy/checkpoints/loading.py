"""``model.pt`` in its many shapes, turned into a timm model (or one of ours, already pruned)."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import VisionTransformer
from torch import nn

from simprune_deploy.checkpoints import architecture as fitting
from simprune_deploy.checkpoints import formats
from simprune_deploy.checkpoints.formats import Contents, one_line
from simprune_deploy.common.errors import (
    CheckpointError,
    DestinationError,
    InvalidArgumentError,
    argument,
)
from simprune_deploy.common.files import staged_file
from simprune_deploy.common.images import fit_to_channels
from simprune_deploy.pruning.config import PruneConfig
from simprune_deploy.pruning.model import PrunedViT, describe_vit

_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
_CROP_MODES = ("center", "squash", "border")
_MOST_SHOWN = 3


@dataclass(frozen=True)
class Checkpoint:
    """A model and how it was found.

    Attributes:
        model: A timm ``VisionTransformer``, or a :class:`PrunedViT` if the file is a saved one; in
            eval mode, float32, on the CPU.
        kind: What the file is: "timm training checkpoint", "state dict", "safetensors",
            "timm hub folder", "pruned model", "timm pretrained", "pickled module", ...
        notes: What was decided, in words: "EMA weights, ...", "10 classes, from head.weight", ...
    """

    model: nn.Module
    kind: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Request:
    """What the user asks for beside the source; None leaves it to the file."""

    source: str
    arch: str | None
    size: tuple[int, int] | None
    num_classes: int | None


def load_checkpoint(
    source: str | Path,
    *,
    arch: str | None = None,
    img_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    pretrained: bool = False,
    trust_pickle: bool = False,
) -> Checkpoint:
    """Load a model from a file, a timm hub folder, or (with `pretrained`) from timm.

    Args:
        source: A path, or with `pretrained` a timm name or "hf-hub:org/name".
        arch: timm's name of the architecture, for a file that does not state it. Default: the
            file's own.
        img_size: Image size in pixels; positions are resampled. Default: the file's own.
        num_classes: The expected number of classes; 0 drops the head. Default: the file's own.
        pretrained: Take timm's own weights of the name `source`. Default False.
        trust_pickle: Unpickle whatever the file holds, which can run code. Default False.

    Raises:
        CheckpointError: it is missing, damaged, untrusted or does not fit its architecture.
        UnsupportedModelError: it is a model that cannot be pruned.
    """
    request = _Request(str(source), _known(arch), _checked_size(img_size), num_classes)
    if num_classes is not None and num_classes < 0:
        raise CheckpointError(f"{argument('num_classes')} {num_classes} must be 0 or more")
    if pretrained:
        contents = _from_timm(request)
    else:
        contents = formats.read(_existing(Path(source)), trust_pickle)
    return _assemble(contents, request)


def load(
    source: str | Path,
    *,
    arch: str | None = None,
    img_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    pretrained: bool = False,
    trust_pickle: bool = False,
) -> nn.Module:
    """Return the model of :func:`load_checkpoint`, which documents the arguments."""
    return load_checkpoint(
        source,
        arch=arch,
        img_size=img_size,
        num_classes=num_classes,
        pretrained=pretrained,
        trust_pickle=trust_pickle,
    ).model


def save(model: PrunedViT, path: str | Path, force: bool = False) -> None:
    """Write a pruned model as one file that :func:`load` takes without further arguments.

    Args:
        model: The pruned model.
        path: ".safetensors" writes safetensors; any other ending ``torch.save`` of the state dict.
        force: Replace a file that exists. Default False.

    Raises:
        SimpruneError: the file exists, cannot be written, or the model could not be built again.
    """
    if not isinstance(model, PrunedViT):
        raise InvalidArgumentError(
            f"this is a {type(model).__name__}, and save writes pruned models: prune it first"
        )
    path = Path(path)
    if path.is_dir():
        raise DestinationError(f"{path} is a folder: give the name of a file")
    if path.exists() and not force:
        raise DestinationError(
            f"{path} already exists: replace it with {argument('force', True)}, or give another "
            f"name"
        )
    if not describe_vit(model.vit)["architecture"]:
        raise CheckpointError(
            "the model has no architecture name (pretrained_cfg), so it could not be loaded "
            "again: make it with timm.create_model"
        )
    # copies, since safetensors refuses weights that share memory
    state = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
    with staged_file(path) as staging:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            state = {key: value.contiguous() for key, value in state.items()}
            save_file(state, str(staging), metadata={"format": "pt"})
        else:
            torch.save(state, staging)


# What is asked for


def _known(arch: str | None) -> str | None:
    if arch is None:
        return None
    if (known := fitting.known_architecture(arch)) is None:
        raise CheckpointError(
            f"{argument('arch')} {arch!r} is no timm architecture{_did_you_mean(arch)}"
        )
    fitting.check_family(known)
    return known


def _did_you_mean(name: str) -> str:
    close = difflib.get_close_matches(name, timm.list_models(), n=2)
    return f": did you mean {' or '.join(close)}?" if close else ": see timm.list_models()"


def _checked_size(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(side, int) and 1 <= side < 1 << 20 for side in pair):
        raise CheckpointError(
            f"{argument('img_size')} {size} is no image size: give one such as 224"
        )
    return pair[0], pair[1]


def _existing(path: Path) -> Path:
    try:
        exists = path.exists()
    except (OSError, ValueError) as error:  # too long, a null character, a folder denied
        raise CheckpointError(f"cannot read {str(path)[:200]!r}: {one_line(error)}") from error
    if exists:
        return path
    if str(path).startswith("hf-hub:") or fitting.known_architecture(str(path)):
        raise CheckpointError(
            f"the file {path} does not exist: for timm's own weights add "
            f"{argument('pretrained', True)}"
        )
    raise CheckpointError(
        f"{path} does not exist: give a checkpoint, or a timm name and "
        f"{argument('pretrained', True)}"
    )


def _from_timm(request: _Request) -> Contents:
    source = request.source
    if not source.startswith("hf-hub:"):
        if (known := fitting.known_architecture(source)) is None:
            hint = (
                f": leave {argument('pretrained', True)} out"
                if os.path.exists(source)
                else _did_you_mean(source)
            )
            raise CheckpointError(
                f"{argument('pretrained', True)} takes a timm name or hf-hub:org/name, not "
                f"{source:.200}{hint}"
            )
        fitting.check_family(known)
        source = known
    try:
        model = timm.create_model(source, pretrained=True)
    except Exception as error:  # the network, the hub and the cache each have their own
        raise CheckpointError(
            f"cannot get timm's weights of {source} ({one_line(error)}): check the name and the "
            "network, or give a checkpoint file"
        ) from error
    return formats.from_timm(model)


# From weights to a model


def _assemble(contents: Contents, request: _Request) -> Checkpoint:
    source = request.source
    state = _check_tensors(source, contents.state)
    notes = contents.notes
    _choose_head(state, request, notes)
    arch = _choose_architecture(contents, request, state)
    found = fitting.fit(state, arch, contents.model_args, request.size)
    if found.mismatches:
        raise CheckpointError(_does_not_fit(source, arch, found.mismatches, state, contents))
    notes.extend(found.notes)
    vit = found.model
    if request.size is not None:
        fitting.check_size(request.size, vit)
    # shapes agree, so no more memory is spent than the file's own weights take
    vit.load_state_dict(_to_float32(source, state, notes), strict=True, assign=True)
    vit.eval()
    _resize(vit, request.size, notes)
    _record(vit, contents.preprocessing, notes)
    model: nn.Module = vit
    if contents.pruning is not None:
        model = PrunedViT(vit, PruneConfig.from_dict(contents.pruning)).eval()
    return Checkpoint(model, contents.kind, tuple(notes))


def _choose_architecture(
    contents: Contents, request: _Request, state: dict[str, torch.Tensor]
) -> str:
    """The user's word, then the file's; a saved or downloaded model's own cannot be changed."""
    stated = fitting.known_architecture(contents.arch) if contents.arch else None
    asked = request.arch
    if asked and stated and asked.split(".")[0] != stated.split(".")[0]:
        if contents.kind in ("pruned model", "timm pretrained"):
            raise CheckpointError(
                f"{request.source} is a {stated}, not a {asked}: leave {argument('arch')} out, or "
                f"correct it"
            )
        contents.notes.append(f"architecture {asked} as asked for; the file says {stated}")
    if arch := asked or stated:
        return arch
    says = f" (it says {contents.arch!r}, which timm does not know)" if contents.arch else ""
    raise CheckpointError(
        f"{request.source} does not name its architecture{says}: add {argument('arch', 'NAME')}; "
        f"{_suggestion(fitting.suggest(state, contents.model_args))}"
    )


def _suggestion(names: list[str]) -> str:
    if names:
        return f"shapes that fit: {', '.join(names)}"
    return "no timm ViT that can be pruned fits its shapes"


def _does_not_fit(
    source: str,
    arch: str,
    mismatches: list[str],
    state: dict[str, torch.Tensor],
    contents: Contents,
) -> str:
    shown = "; ".join(mismatches[:_MOST_SHOWN])
    more = len(mismatches) - _MOST_SHOWN
    others = fitting.suggest(state, contents.model_args, but_not=arch)
    return (
        f"{source} does not fit {arch}: {shown}{f'; and {more} more' if more > 0 else ''}; "
        f"{_suggestion(others)}: {'choose with' if others else 'check'} {argument('arch')}"
    )


def _choose_head(state: dict[str, torch.Tensor], request: _Request, notes: list[str]) -> None:
    """Hold the file's head against the number of classes asked for."""
    asked, head = request.num_classes, state.get("head.weight")
    has = 0 if head is None or head.ndim != 2 else head.shape[0]
    if asked is None or asked == has:
        return
    if asked:
        raise CheckpointError(
            f"{request.source} has a head of {has} classes, not {asked}: leave "
            f"{argument('num_classes')} out, "
            "or give 0 for features without a head"
        )
    for key in [key for key in state if key.startswith(("head.", "head_dist."))]:
        del state[key]
    notes.append(f"head of {has} classes dropped")


def _check_tensors(source: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Refuse what is no dense floating-point tensor, before its values are touched."""
    for name, tensor in state.items():
        if (trouble := _trouble(tensor)) and not name.endswith("num_batches_tracked"):
            raise CheckpointError(
                f"{source}: {name} is {trouble}: give the weights as float32, float16 or bfloat16"
            )
    return dict(state)


def _trouble(tensor: torch.Tensor) -> str:
    if tensor.is_quantized:
        return "quantized"
    if tensor.layout is not torch.strided:
        return f"sparse ({str(tensor.layout).removeprefix('torch.')})"
    if tensor.is_meta:
        return "without values (on the meta device)"
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        return f"of type {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return "a view of fewer values than it shows"
    return ""


def _to_float32(
    source: str, state: dict[str, torch.Tensor], notes: list[str]
) -> dict[str, torch.Tensor]:
    """Copy the weights out of the (mapped) file, as float32, and refuse NaN and infinities."""
    result: dict[str, torch.Tensor] = {}
    broken: list[str] = []
    kinds: set[str] = set()
    for name, tensor in state.items():
        if tensor.is_floating_point():
            kinds.add(str(tensor.dtype).removeprefix("torch."))
            result[name] = tensor.detach().to(torch.float32, copy=True).contiguous()
            if not bool(torch.isfinite(result[name]).all()):
                broken.append(name)
        else:
            result[name] = tensor.detach().clone()
    if broken:
        more = f" and {len(broken) - _MOST_SHOWN} more" if len(broken) > _MOST_SHOWN else ""
        raise CheckpointError(
            f"{source}: {', '.join(broken[:_MOST_SHOWN])}{more} holds NaN or infinite values: "
            "the training diverged or the file is damaged, give an earlier checkpoint"
        )
    if others := sorted(kinds - {"float32"}):
        notes.append(f"{', '.join(others)} weights converted to float32")
    return result


def _resize(vit: VisionTransformer, size: tuple[int, int] | None, notes: list[str]) -> None:
    old = tuple(vit.patch_embed.img_size)
    if size is None or size == old:
        return
    with torch.no_grad():
        vit.set_input_size(img_size=size)
    notes.append(f"resampled from {old[0]}x{old[1]} to {size[0]}x{size[1]} pixels")


# What the model says of itself


def _record(vit: Any, preprocessing: dict[str, Any], notes: list[str]) -> None:
    """Make pretrained_cfg and _model_args describe this model, not timm's default of the name."""
    size = [int(side) for side in vit.patch_embed.img_size]
    vit._model_args = {
        **vit._model_args,
        "num_classes": vit.num_classes,
        "in_chans": vit.in_chans,
        "global_pool": vit.global_pool,
        "img_size": size,
    }
    cfg = vit.pretrained_cfg
    if cfg.get("num_classes") != vit.num_classes:
        # timm's names are for the classes of its own weights
        for key in ("label_names", "label_descriptions"):
            cfg.pop(key, None)
    cfg["num_classes"] = vit.num_classes
    cfg["input_size"] = (vit.in_chans, *size)
    for key in ("url", "file", "hf_hub_id", "source", "test_input_size", "min_input_size"):
        cfg.pop(key, None)
    cfg.update(_usable(preprocessing, vit.num_classes, notes))
    for key in ("mean", "std"):
        cfg[key] = _per_channel(key, cfg.get(key), vit.in_chans, notes)


def _usable(values: dict[str, Any], num_classes: int, notes: list[str]) -> dict[str, Any]:
    """Keep the entries that hold at inference, and fit the model."""
    kept = {key: value for key, value in values.items() if value is not None}
    choices = {"interpolation": _INTERPOLATIONS, "crop_mode": _CROP_MODES}
    for key, known in choices.items():
        if key in kept and kept[key] not in known:
            notes.append(f"{key} {kept.pop(key)!r} left out: it is for training only")
    names = kept.get("label_names")
    if names is not None and (not isinstance(names, (list, tuple)) or len(names) != num_classes):
        kept.pop("label_names")
        kept.pop("label_descriptions", None)
        notes.append(f"label names left out: they are not for {num_classes} classes")
    crop = kept.get("crop_pct")
    if crop is not None and (not isinstance(crop, (int, float)) or not 0 < crop <= 10):
        raise CheckpointError(f"the checkpoint states crop_pct={crop!r:.60}, which is no share")
    return kept


def _per_channel(key: str, value: Any, channels: int, notes: list[str]) -> tuple[float, ...]:
    numbers = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not all(isinstance(number, (int, float)) for number in numbers) or not numbers:
        raise CheckpointError(f"the checkpoint states {key}={value!r:.60}, which is no color")
    try:
        fitted = fit_to_channels(key, numbers, channels)
    except InvalidArgumentError as error:
        raise CheckpointError(f"the checkpoint states {key}={value!r:.60}: {error}") from None
    if len(numbers) != channels and len(set(numbers)) > 1:
        notes.append(f"{key} averaged over {len(numbers)} channels, for {channels}")
    return fitted
