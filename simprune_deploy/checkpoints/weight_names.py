"""Where the model is among the names of a file's weights: prefixes, heads, other programs' layouts.

What is left out or renamed is said in a note; what may change the model's answers is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import torch

from simprune_deploy.common.errors import CheckpointError, argument
from simprune_deploy.pruning.model import EXTRA_STATE_KEY

State = dict[str, torch.Tensor]

_NOT_WEIGHTS = ("n_averaged",)  # the step counter of torch's AveragedModel
_ANCHORS = ("patch_embed.proj.weight", "blocks.0.norm1.weight")
"""Names that a ViT of timm has once, the surest first."""
_AVERAGED = ("teacher", "ema", "model_ema", "ema_model", "module_ema", "momentum")
"""What the better of two models in one file is called, best first."""
_OTHER_LAYOUTS = ("mask_token", "visual.class_embedding", "module.visual.class_embedding")
"""Names that tell DINOv2's and CLIP's own layouts, which timm knows how to read."""
CLASSIFIERS = ("classifier", "head", "fc", "linear", "cls_head", "last_linear", "classification")
_LINEAR = re.compile(r"(\d+\.|fc\.)?(weight|bias)")
_MOST_NAMED = 3

_NUM_CLASSES_0 = (
    f"load it without its head ({argument('num_classes', 0)} in Python) for its features, or "
    "train a head of one Linear layer"
)


def timm_names(source: str, state: Mapping[str, torch.Tensor], notes: list[str]) -> State:
    """Return the model's weights by their name in timm.

    Args:
        source: The file, for messages.
        state: As the file has it.
        notes: Receives what was decided.

    Raises:
        CheckpointError: there are several models, or the head is none that timm has.
    """
    found = {key: value for key, value in state.items() if key not in _NOT_WEIGHTS}
    if any(name in found for name in _OTHER_LAYOUTS):
        return _converted(found, notes)
    prefix = _prefix(source, found)
    inside = {key[len(prefix) :]: each for key, each in found.items() if key.startswith(prefix)}
    others = {key: each for key, each in found.items() if not key.startswith(prefix)}
    if prefix:
        notes.append(f"prefix {prefix!r} stripped")
    if any(name in inside for name in _OTHER_LAYOUTS):
        inside = _converted(inside, notes)
    inside = _without_chunks(inside)
    if others:
        _take_classifier(source, inside, others, notes)
    if others:
        _check_left_out(source, prefix, others)
        notes.append(f"left out beside {prefix!r}: {some(others)}")
    return inside


_HARMLESS = re.compile(
    r"(^|\.)((dino_|ibot_|projection_)?head\.(mlp|last_layer|projection)|projector|prototypes|"
    r"predictor|text|text_model|text_encoder|transformer|token_embedding|positional_embedding|"
    r"ln_final|text_projection|logit_scale|logit_bias|loss\w*|criterion\w*|\w*metrics?|\w*acc\w*|"
    r"decoder\w*|mask_token|queue\w*|n_averaged)(\.|$)"
)
"""What stands beside a model for its training, or for another tower."""


def _check_left_out(source: str, prefix: str, others: State) -> None:
    """Refuse layers beside the model that may change its answers."""
    models = [
        key[: -len(anchor)] for anchor in _ANCHORS for key in others if key.endswith(f".{anchor}")
    ]
    unknown = [
        key
        for key in others
        if EXTRA_STATE_KEY not in key
        and not _HARMLESS.search(key)
        and not any(key.startswith(each) for each in models)
    ]
    if unknown:
        raise CheckpointError(
            f"{source} has layers beside {prefix!r} that may change its answers "
            f"({some(unknown)}): save the state_dict of the model in {prefix!r} alone, or with one "
            "Linear layer for its head"
        )


def has_classifier(state: Mapping[str, Any]) -> bool:
    """Tell weights with a Linear classifier from those for features, such as DINO's."""
    names = tuple(f"{name}.weight" for name in CLASSIFIERS)
    return any(
        key.split(".")[-2:] == name.split(".") and getattr(value, "ndim", 0) == 2
        for key, value in state.items()
        for name in names
    )


def _prefix(source: str, state: State) -> str:
    """Return what stands before the names of the one model that is in the file."""
    if EXTRA_STATE_KEY in state:
        return ""
    if prefix := _common_prefix(state, EXTRA_STATE_KEY):
        return prefix
    for anchor in _ANCHORS:
        found = [
            key[: -len(anchor)] for key in state if key == anchor or key.endswith(f".{anchor}")
        ]
        if len(found) > 1:
            return _better(source, found, state)
        if found:
            return found[0]
    return ""


def _common_prefix(state: State, name: str) -> str:
    """Return the prefix of all names, where one of them ends in `name`."""
    for key in state:
        prefix = key.removesuffix(name)
        if prefix != key and prefix and all(each.startswith(prefix) for each in state):
            return prefix
    return ""


def _better(source: str, prefixes: list[str], state: State) -> str:
    if "" in prefixes:
        return ""
    for name in _AVERAGED:
        of_it = [prefix for prefix in prefixes if name in prefix.split(".")]
        others = [prefix for prefix in prefixes if prefix not in of_it]
        # a teacher beside another model than its student is what that one was distilled from
        fits = name != "teacher" or (
            all("student" in each.split(".") for each in others) and not has_classifier(state)
        )
        if len(of_it) == 1 and fits:
            return of_it[0]
    raise CheckpointError(
        f"{source} holds several models ({', '.join(sorted(prefixes)[:_MOST_NAMED])}): save the "
        "state_dict of one"
    )


def _converted(state: State, notes: list[str]) -> State:
    """Let timm rename what DINOv2 and CLIP call otherwise; no number is changed."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    first = next(
        (state[key] for key in ("patch_embed.proj.weight", "visual.conv1.weight") if key in state),
        torch.empty(1, 1, 1, 1),
    )
    # of the model timm only asks its shapes, to resample what differs: nothing does here
    shapes = SimpleNamespace(
        patch_embed=SimpleNamespace(proj=SimpleNamespace(weight=first)), pos_embed=None
    )
    notes.append("names converted by timm from another program's")
    # timm takes names out of the dictionary that it is given
    renamed = checkpoint_filter_fn(dict(state), cast(Any, shapes))
    return dict(renamed)


def _without_chunks(state: State) -> State:
    """Undo DINOv2's chunks, blocks.1.7.norm1: the second number counts through all of them."""
    if not any(re.match(r"blocks\.\d+\.\d+\.norm1\.", key) for key in state):
        return state
    return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key): v for key, v in state.items()}


def _take_classifier(source: str, inside: State, others: State, notes: list[str]) -> None:
    """Move one Linear classifier that stands beside a model without a head into its place."""
    if any(key.startswith("head.") for key in inside):
        return
    for name in CLASSIFIERS:
        layer = {key: others[key] for key in others if key.startswith(f"{name}.")}
        if not layer:
            continue
        inner = {key[len(name) + 1 :]: value for key, value in layer.items()}
        if not all(_LINEAR.fullmatch(key) for key in inner):
            continue  # DINO's head.mlp.*: a projection for training
        linear = _one_linear(source, name, inner)
        inside.update({f"head.{kind}": value for kind, value in linear.items()})
        for key in layer:
            del others[key]
        notes.append(f"head from {name}.*, which is taken to follow the pooled features")
        return


def plain_head(source: str, state: State, notes: list[str]) -> None:
    """Rename the one Linear layer of a head that is a Sequential: Dropout does nothing here.

    Raises:
        CheckpointError: the head has more than that.
    """
    inner = {key.removeprefix("head."): each for key, each in state.items() if key[:5] == "head."}
    if "weight" in inner and "bias" not in inner:
        state["head.bias"] = torch.zeros(len(inner["weight"]), dtype=inner["weight"].dtype)
        notes.append("a head without bias: zeros")
    if not inner or "weight" in inner:
        return
    linear = _one_linear(source, "head", inner)
    for key in inner:
        del state[f"head.{key}"]
    state.update({f"head.{kind}": value for kind, value in linear.items()})
    notes.append(f"head from head.{next(iter(inner)).rpartition('.')[0]}, its one Linear layer")


def _one_linear(source: str, name: str, inner: State) -> State:
    """Return "weight" and "bias" of the one Linear layer in a head."""
    layers = sorted({key.rpartition(".")[0] for key in inner})
    weights = [value for key, value in inner.items() if key.endswith("weight")]
    if len(layers) != 1 or len(weights) != 1 or weights[0].ndim != 2:
        raise CheckpointError(
            f"{source} has a head of several layers ({some([f'{name}.{key}' for key in inner])}), "
            f"and timm's is one Linear layer: {_NUM_CLASSES_0}"
        )
    return {key.rpartition(".")[2]: value for key, value in inner.items()}


# What a file that fits nothing looks like

_LOOKS: tuple[tuple[str, str], ...] = (
    (
        r"\.(lora_[AB]|lora_embedding_[AB]|base_layer)\b",
        "it looks like a model with LoRA layers that are not merged: save "
        "peft's merge_and_unload().state_dict()",
    ),
    (
        r"\.(_packed_params|scale|zero_point|weight_scale|qweight|SCB|absmax)\b",
        "it looks like a quantized model: give the checkpoint it was made from",
    ),
    (
        r"encoder\.layer\.\d+\.attention\.attention\.(query|key|value)\.",
        "it looks like a ViT of transformers, whose layout is another: train or save it with timm "
        "(transformers' TimmWrapper has timm's layout)",
    ),
    (
        r"encoder\.layers\.encoder_layer_\d+\.",
        "it looks like a ViT of torchvision, whose layout is another: train it with timm",
    ),
    (
        r"^(module\.)?(text|transformer\.resblocks|token_embedding|text_model)\b",
        "it holds a text tower: give the image tower's state_dict alone",
    ),
    (
        r"^decoder_(blocks|embed|pred)",
        "it looks like MAE's pretraining with its decoder: give the fine-tuned model",
    ),
    (r"layers\.\d+\.blocks\.\d+\.", "it looks like a Swin transformer, which cannot be pruned"),
    (r"layer[1-4]\.\d+\.conv\d", "it looks like a convolutional network, which cannot be pruned"),
)


def looks_like(state: Mapping[str, Any]) -> str:
    """Return what weights that fit nothing are, and what to do, or "" if that is not known."""
    for pattern, words in _LOOKS:
        if any(re.search(pattern, key) for key in state):
            return words
    return ""


def some(names: Any) -> str:
    """Return the first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return f"{', '.join(names[:_MOST_NAMED])}{more}"
