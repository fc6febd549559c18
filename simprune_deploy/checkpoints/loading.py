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
from simprune_deploy.checkpoints.options import CheckpointOptions, assumptions
from simprune_deploy.checkpoints.preprocessing import record
from simprune_deploy.checkpoints.weight_names import looks_like, plain_head, some
from simprune_deploy.common.errors import (
    CheckpointError,
    DestinationError,
    InvalidArgumentError,
    argument,
)
from simprune_deploy.common.files import staged_file
from simprune_deploy.pruning.config import PruneConfig
from simprune_deploy.pruning.model import PrunedViT, describe_vit

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
        assumed: What neither the file nor the user says, in sentences.
    """

    model: nn.Module
    kind: str
    notes: tuple[str, ...]
    assumed: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Request:
    """What the user asks for beside the source."""

    source: str
    arch: str | None
    size: tuple[int, int] | None
    num_classes: int | None
    options: CheckpointOptions

    @property
    def model_args(self) -> dict[str, Any]:
        """The arguments of ``timm.create_model`` that were given."""
        pool = {"global_pool": self.options.global_pool} if self.options.global_pool else {}
        return {**self.options.model_kwargs, **pool}


def load_checkpoint(
    source: str | Path,
    options: CheckpointOptions | None = None,
    *,
    num_classes: int | None = None,
    **fields: Any,
) -> Checkpoint:
    """Load a model from a file, a timm hub folder, or (with ``pretrained``) from timm.

    Args:
        source: A path, or with ``pretrained`` a timm name or "hf-hub:org/name".
        options: How it is loaded. Default None: `fields` say it.
        num_classes: The expected number of classes; 0 drops the head. Default: the file's own.
        fields: Those of :class:`CheckpointOptions`, by name.

    Raises:
        CheckpointError: it is missing, damaged, untrusted or does not fit its architecture.
        UnsupportedModelError: it is a model that cannot be pruned.
        TypeError: options are given and fields beside them, or a field is unknown.
    """
    if options is None:
        options = CheckpointOptions(**fields)
    elif fields:
        raise TypeError(f"options are given: say {', '.join(fields)} in them")
    arch, size = _known(options.arch), _checked_size(options.img_size)
    request = _Request(str(source), arch, size, num_classes, options)
    if num_classes is not None and num_classes < 0:
        raise CheckpointError(f"{argument('num_classes')} {num_classes} must be 0 or more")
    if options.pretrained:
        contents = _from_timm(request)
    else:
        contents = formats.read(_existing(Path(source)), options.trust_pickle)
    return _assemble(contents, request)


def load(
    source: str | Path,
    options: CheckpointOptions | None = None,
    *,
    num_classes: int | None = None,
    **fields: Any,
) -> nn.Module:
    """Return the model of :func:`load_checkpoint`, which documents the arguments."""
    return load_checkpoint(source, options, num_classes=num_classes, **fields).model


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
    _check_built_again(model.vit)
    # copies, since safetensors refuses weights that share memory
    state = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
    with staged_file(path) as staging:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            state = {key: value.contiguous() for key, value in state.items()}
            save_file(state, str(staging), metadata={"format": "pt"})
        else:
            torch.save(state, staging)


def _check_built_again(vit: nn.Module) -> None:
    """Refuse a model that its architecture and arguments do not give again, changed after timm.

    Raises:
        CheckpointError: it cannot be built, or answers otherwise.
    """
    facts = describe_vit(vit)
    try:
        again = timm.create_model(facts["architecture"], **facts["model_args"])
        again.load_state_dict({key: value.cpu() for key, value in vit.state_dict().items()})
    except Exception as error:  # arguments reach every layer, and any of them may choke
        raise CheckpointError(f"{_CHANGED} ({one_line(error)})") from error
    check_same_answers(vit, again, _CHANGED)


_CHANGED = (
    "the model was changed after timm made it, and could not be built again: give what was changed "
    "to timm.create_model as arguments"
)


def check_same_answers(given: nn.Module, built: Any, otherwise: str) -> None:
    """Refuse a model that was built again and answers otherwise than the one that was given.

    Args:
        given: A model; it is left in the mode it is in.
        built: On the CPU, in float32.
        otherwise: The error's sentence.
    """
    training = given.training
    weight = next(given.parameters())
    size = built.patch_embed.img_size
    image = torch.rand(1, built.in_chans, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mine = given.eval()(image.to(weight.device, weight.dtype)).float().cpu()
        theirs = built.eval().float()(image)
    given.train(training)
    near = mine.shape == theirs.shape
    limit = 1e-4 if weight.dtype == torch.float32 else 0.05
    if not near or float((mine - theirs).abs().max()) > limit * (1 + float(mine.abs().max())):
        raise CheckpointError(otherwise)


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
    args = {**contents.model_args, **request.model_args}
    found = fitting.fit(state, arch, args, request.size)
    if found.mismatches:
        raise CheckpointError(_does_not_fit(source, arch, found.mismatches, state, args))
    if found.open_question:
        raise CheckpointError(f"{source}: {found.open_question}")
    notes.extend(found.notes)
    vit = found.model
    size = _wanted_size(contents, request, vit)
    if size is not None:
        fitting.check_size(size, vit)
    # shapes agree, so no more memory is spent than the file's own weights take
    vit.load_state_dict(_to_float32(source, state, notes), strict=True, assign=True)
    vit.eval()
    _resize(vit, size, notes)
    record(vit, contents, request.options, found.assumed)
    model: nn.Module = vit
    if contents.pruning is not None:
        model = PrunedViT(vit, PruneConfig.from_dict(contents.pruning)).eval()
    if contents.module is not None and size is None and vit.num_classes == _classes_of(contents):
        check_same_answers(
            contents.module,
            vit,
            f"{source} holds a model that was changed after timm made it, and timm's "
            f"{arch} answers otherwise: save its state_dict with the arguments that make it",
        )
    words = assumptions(describe_vit(vit)["preprocessing"])
    return Checkpoint(model, contents.kind, tuple(notes), tuple(words))


def _classes_of(contents: Contents) -> int:
    return int(getattr(contents.module, "num_classes", -1))


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
    if asked and stated and "." not in asked and asked == stated.split(".")[0]:
        return stated  # its tag tells timm's preprocessing
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
    args: dict[str, Any],
) -> str:
    shown = "; ".join(mismatches[:_MOST_SHOWN])
    more = len(mismatches) - _MOST_SHOWN
    others = fitting.suggest(state, args, but_not=arch)
    if others:
        way_out = f"{_suggestion(others)}: choose with {argument('arch')}"
    elif known := looks_like(state):
        way_out = known
    elif hint := fitting.kwargs_hint(state, arch):
        way_out = f"if it was built with {hint}, say so with {argument('model_kwargs')}"
    else:
        way_out = (
            f"the file has {some(state)}; if it was built with arguments of its own, say them with "
            f"{argument('model_kwargs')}"
        )
    return (
        f"{source} does not fit {arch}: {shown}{f'; and {more} more' if more > 0 else ''}; "
        f"{way_out}"
    )


def _choose_head(state: dict[str, torch.Tensor], request: _Request, notes: list[str]) -> None:
    """Hold the file's head against the number of classes asked for."""
    asked = request.num_classes
    if asked != 0:
        plain_head(request.source, state, notes)
    head = state.get("head.weight")
    has = 0 if head is None or head.ndim != 2 else head.shape[0]
    if asked is None or asked == has > 0:
        return
    if asked:
        raise CheckpointError(
            f"{request.source} has a head of {has} classes, not {asked}: leave "
            f"{argument('num_classes')} out, "
            "or give 0 for features without a head"
        )
    dropped = [key for key in state if key.startswith(("head.", "head_dist."))]
    for key in dropped:
        del state[key]
    if dropped:
        notes.append(f"head of {has} classes dropped" if has else "head dropped")


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


def _wanted_size(
    contents: Contents, request: _Request, vit: VisionTransformer
) -> tuple[int, int] | None:
    """Return the image size to resample to: the user's; or the file's, where both are sure."""
    if request.size is not None:
        return request.size
    stated = contents.model_args.get("img_size")
    if stated is None:
        return None
    pair = (stated, stated) if isinstance(stated, int) else tuple(stated)
    made_for = tuple(vit.patch_embed.img_size)
    if pair == made_for or contents.kind == "pruned model":
        return None
    if contents.model_args.get("dynamic_img_size"):
        return int(pair[0]), int(pair[1])  # trained so: positions resampled for every batch
    raise CheckpointError(
        f"{request.source} says that its images have {pair[0]}x{pair[1]} pixels, and its positions "
        f"are for {made_for[0]}x{made_for[1]}: choose with {argument('img_size')}"
    )


def _resize(vit: VisionTransformer, size: tuple[int, int] | None, notes: list[str]) -> None:
    old = tuple(vit.patch_embed.img_size)
    if size is None or size == old:
        return
    with torch.no_grad():
        vit.set_input_size(img_size=size)
    notes.append(f"resampled from {old[0]}x{old[1]} to {size[0]}x{size[1]} pixels")
