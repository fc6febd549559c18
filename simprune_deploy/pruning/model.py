"""The pruned Vision Transformer: embed, then (prune, block) over the depth, norm, pool, head."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, cast

import torch
from timm.models import VisionTransformer
from timm.models._manipulate import checkpoint as recompute_in_backward
from torch import nn

from simprune_deploy.common.errors import (
    CheckpointError,
    InvalidArgumentError,
    UnsupportedModelError,
    argument,
)
from simprune_deploy.common.transforms import PREPROCESSING
from simprune_deploy.pruning.attention import (
    Sizes,
    attention_half,
    features_of,
    has_keys,
    has_two_halves,
    mlp_half,
    run_block,
    sizes_of,
)
from simprune_deploy.pruning.calibrated_curve import LEAST_PART, CalibratedCurve
from simprune_deploy.pruning.config import (
    PAD_LOG_SIZE,
    PruneConfig,
    Selection,
    check_threshold,
    resolve_capacities,
    resolve_layers,
)
from simprune_deploy.pruning.cost import BlockShape
from simprune_deploy.pruning.families import architecture_name, check_prunable
from simprune_deploy.pruning.operator import similarity_prune

STATE_FORMAT = 1
"""Version of what :meth:`PrunedViT.get_extra_state` writes."""

EXTRA_STATE_KEY = "_extra_state"


@dataclasses.dataclass(frozen=True)
class PruneTrace:
    """What one prune layer read and decided, for one batch of B images.

    Attributes:
        layer: The block it runs before, or inside.
        features: What it compared, T[B, N, F].
        log_size: Its input, float32[B, N].
        kept_index: Its output, int64[B, K].
        assignment: Its output, int64[B, N].
    """

    layer: int
    features: torch.Tensor
    log_size: torch.Tensor
    kept_index: torch.Tensor
    assignment: torch.Tensor


class PrunedViT(nn.Module):
    """A timm ``VisionTransformer`` that prunes similar patches before or inside chosen blocks.

    It trains, saves and loads like any module; its ``state_dict`` carries the pruning
    configuration and what is needed to rebuild the architecture (as a uint8 tensor of JSON, so
    that safetensors, EMA and DDP take it too).

    Args:
        vit: The model to prune; it is used, not copied.
        config: The resolved configuration; see :func:`prune` for the friendly way.

    Raises:
        UnsupportedModelError: `vit` is of a family that cannot be pruned.
        SimpruneError: the configuration does not fit the model.
    """

    def __init__(self, vit: nn.Module, config: PruneConfig) -> None:
        super().__init__()
        check_prunable(vit)
        self.vit = cast(VisionTransformer, vit)
        self.config = config
        _check_fits(self.vit, config)

    @property
    def num_prefix_tokens(self) -> int:
        """P: class, distillation and register tokens."""
        return int(self.vit.num_prefix_tokens)

    @property
    def num_patches(self) -> int:
        """Patches of an image at the model's input size."""
        return int(self.vit.patch_embed.num_patches)

    @property
    def num_tokens(self) -> int:
        """N before the first prune layer."""
        return self.num_prefix_tokens + self.num_patches

    @property
    def block_shape(self) -> BlockShape:
        """Widths of a block, as if all beside 4 D x D projections were an MLP's two matrices."""
        embed_dim = int(self.vit.embed_dim)
        matrices = sum(p.numel() for p in self.vit.blocks[0].parameters() if p.ndim == 2)
        return BlockShape(embed_dim, max(0, matrices - 4 * embed_dim**2) // (2 * embed_dim))

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return int(self.vit.in_chans)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image, in pixels."""
        height, width = self.vit.patch_embed.img_size
        return int(height), int(width)

    def forward(
        self,
        images: torch.Tensor,
        threshold: float | torch.Tensor | None = None,
        traces: list[PruneTrace] | None = None,
    ) -> torch.Tensor:
        """Classify images.

        Args:
            images: float[B, C, H, W], normalized as the model wants it.
            threshold: Overrides the configuration's for this run: a number, float32[1], or
                float32[B] with one per image.
            traces: A list that receives a :class:`PruneTrace` for each prune layer.

        Returns:
            The model's output [B, num_classes], or features [B, D] without a head.
        """
        tokens, log_size = self.forward_features(images, threshold, traces)
        return self.forward_head(tokens, log_size)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Return the tokens [B, N, D] of images ahead of the first block."""
        vit = self.vit
        tokens: torch.Tensor = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
        return tokens

    def forward_features(
        self,
        images: torch.Tensor,
        threshold: float | torch.Tensor | None = None,
        traces: list[PruneTrace] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the final tokens [B, K, D] and their float32[B, K] log_size."""
        vit = self.vit
        limits = self._limits(threshold, images.device)
        tokens = self.embed(images)
        log_size = tokens.new_zeros(tokens.shape[:2], dtype=torch.float32)
        sizes: Sizes | None = None
        inside = self.config.place == "inside"
        for index, block in enumerate(vit.blocks):
            prunes = index in self.config.layers
            if prunes and not inside:
                tokens, log_size = self._prune(index, tokens, tokens, log_size, limits, traces)
                sizes = sizes_of(self._attended(log_size), tokens)
            if prunes and inside:
                tokens, keys = self._run(attention_half, block, tokens, sizes)
                features = features_of(self.config.features, tokens, keys)
                tokens, log_size = self._prune(index, tokens, features, log_size, limits, traces)
                sizes = sizes_of(self._attended(log_size), tokens)
                tokens = self._run(mlp_half, block, tokens)
            else:
                tokens = self._run(run_block, block, tokens, sizes)
        return vit.norm(tokens), log_size

    def _run(self, part: Any, block: nn.Module, *inputs: torch.Tensor | Sizes | None) -> Any:
        """Run a block or half of one; with gradient checkpointing, once more in the backward."""
        if self.vit.grad_checkpointing and self.training:
            return recompute_in_backward(part, block, *inputs)
        return part(block, *inputs)

    def _prune(
        self,
        index: int,
        tokens: torch.Tensor,
        features: torch.Tensor,
        log_size: torch.Tensor,
        limits: Sequence[torch.Tensor],
        traces: list[PruneTrace] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        config, position = self.config, self.config.layers.index(index)
        usual = config.usual_patches(position, self.num_patches)
        kept, kept_log_size, kept_index, assignment = self._operator(
            tokens,
            features,
            log_size,
            self._limit_of(position, limits, log_size),
            num_prefix_tokens=self.num_prefix_tokens,
            selection=config.selection,
            reduction=config.reduction,
            capacity=config.capacity_of(position),
            multiple_of=config.multiple_of,
            opt_tokens=self.num_prefix_tokens + usual,
            max_tokens=self.num_tokens,
        )
        if traces is not None:
            traces.append(PruneTrace(index, features, log_size, kept_index, assignment))
        return kept, kept_log_size

    def _operator(
        self,
        tokens: torch.Tensor,
        features: torch.Tensor,
        log_size: torch.Tensor,
        threshold: torch.Tensor,
        **values: Any,
    ) -> tuple[torch.Tensor, ...]:
        return similarity_prune(tokens, features, log_size, threshold, **values)

    def _attended(self, log_size: torch.Tensor) -> torch.Tensor:
        """The term added to q.k: how many patches a key stands for, and PAD for padding."""
        return log_size if self.config.proportional_attention else log_size.clamp_max(0.0)

    def forward_head(self, tokens: torch.Tensor, log_size: torch.Tensor) -> torch.Tensor:
        """Pool [B, K, D] with the sizes as weights, then classify."""
        vit = self.vit
        if not self.config.layers or vit.global_pool == "token":
            return vit.forward_head(tokens)
        pooled = vit.fc_norm(self._pool(tokens, log_size))
        return vit.head(vit.head_drop(pooled))

    def _pool(self, tokens: torch.Tensor, log_size: torch.Tensor) -> torch.Tensor:
        vit = self.vit
        if not vit.pool_include_prefix:
            tokens = tokens[:, self.num_prefix_tokens :]
            log_size = log_size[:, self.num_prefix_tokens :]
        if vit.attn_pool is not None:
            mask = sizes_of(self._attended(log_size), tokens).mask
            return vit.attn_pool(tokens, attn_mask=mask)
        # softmax of the log-sizes is size / sum of sizes, and 0 for padding
        shares = log_size.softmax(1).to(tokens.dtype)
        mean = (shares.unsqueeze(1) @ tokens).squeeze(1)
        if vit.global_pool == "avg":
            return mean
        lowest = torch.finfo(tokens.dtype).min
        is_padding = (log_size <= PAD_LOG_SIZE / 2).unsqueeze(2)
        largest = tokens.masked_fill(is_padding, lowest).amax(1)
        return largest if vit.global_pool == "max" else 0.5 * (largest + mean)

    def _threshold_tensor(
        self, threshold: float | torch.Tensor | None, device: torch.device
    ) -> torch.Tensor:
        if isinstance(threshold, torch.Tensor):
            return threshold
        value = self.config.threshold if threshold is None else threshold
        check_threshold(value)
        return torch.full((1,), value, dtype=torch.float32, device=device)

    def _limits(
        self, threshold: float | torch.Tensor | None, device: torch.device
    ) -> list[torch.Tensor]:
        """Return for each prune layer its threshold; with a curve the floor, then its tolerance.

        Each float32[1], or [B] for thresholds of the images' own.
        """
        number = self._threshold_tensor(threshold, device)
        curve, layers = self.config.curve, len(self.config.layers)
        if curve is None or not layers:
            return [number] * layers
        if threshold is None:
            point = curve.at(self.config.threshold)
            return [number.new_full((1,), each) for each in (point.floor, *point.layers)]
        starts, widths, slopes = (number.new_tensor(each) for each in curve.ramps())
        share = torch.where(number < 1, number, number.new_tensor(1.0))  # no number: 1
        climbed = (share[:, None] - starts).clamp_min(0).minimum(widths)
        lowest = curve.at(0.0)
        found = number.new_tensor((lowest.floor, *lowest.layers)) + climbed @ slopes
        return list(found.unbind(1))

    def _limit_of(
        self, position: int, limits: Sequence[torch.Tensor], log_size: torch.Tensor
    ) -> torch.Tensor:
        """Return a prune layer's threshold, float32[1] or [B], of what :meth:`_limits` gave."""
        if self.config.curve is None:
            return limits[position]
        floor, tolerance = limits[0], limits[1 + position]
        if self.config.capacities or position == 0:  # all patches are there
            return 1 - tolerance
        tokens = log_size.clamp_max(0).exp().sum(1)  # padding counts e to the PAD, 0
        at_floor = self.num_prefix_tokens + floor * self.num_patches
        part = (tokens - at_floor) / ((1 - floor) * self.num_patches)
        return 1 - tolerance * part.clamp_min(LEAST_PART)

    def get_extra_state(self) -> torch.Tensor:
        """Return what `state_dict` carries beside the weights, for :func:`read_extra_state`."""
        state = {
            "simprune_format": STATE_FORMAT,
            "pruning": self.config.to_dict(),
            **describe_vit(self.vit),
        }
        text = json.dumps(state).encode()
        return torch.frombuffer(bytearray(text), dtype=torch.uint8).clone()

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Take the pruning configuration of a loaded `state_dict`."""
        config = PruneConfig.from_dict(read_extra_state(state)["pruning"])
        _check_fits(self.vit, config)
        self.config = config

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.config.to_dict().items())


def prune(
    model: nn.Module,
    threshold: float | None = None,
    layers: str | Sequence[int] | None = None,
    selection: str | None = None,
    reduction: str | None = None,
    proportional_attention: bool | None = None,
    tokens: str | int | Sequence[int] | None = None,
    multiple_of: int | None = None,
    place: str | None = None,
    features: str | None = None,
    curve: CalibratedCurve | None = None,
) -> PrunedViT:
    """Prune a timm ViT, or a pruned one anew; what is left out keeps its value or its default.

    Args:
        model: A timm ``VisionTransformer`` or a :class:`PrunedViT`. Its weights are shared.
        threshold: Cosine similarity in [-1, 2] from which patches are the same. Default 0.85. With
            a `curve`, the share of the blocks' FLOPs that is wanted.
        layers: "auto" (five, at the sixths of the depth) or block indices. Default "auto".
        selection: "pairs" or "redundancy". Default "pairs".
        reduction: "merge" or "drop". Default "merge".
        proportional_attention: Attend to a token as to the patches it stands for. Default True.
        tokens: "dynamic", or how many patches the last prune layer keeps, or one count per layer.
            Default "dynamic".
        multiple_of: Round token counts up to a multiple of this. Default 1.
        place: Prune "before" the blocks, or "inside" them, between attention and MLP. Default
            "before".
        features: Compare "tokens", or inside blocks their "keys", "mean-keys" or "tokens+keys".
            Default "tokens".
        curve: Thresholds of its own for each layer, as ``tune`` finds them for these layers.
            Default: the model's; with other layers it no longer fits.

    Raises:
        UnsupportedModelError: the family cannot be pruned; the message says why.
        SimpruneError: a value is out of range or does not fit the model.
    """
    base: PruneConfig | None = None
    vit = model
    if isinstance(model, PrunedViT):
        base, vit = model.config, model.vit
    check_prunable(vit)
    old = base or PruneConfig()
    depth = len(vit.blocks)  # type: ignore[arg-type]
    if layers is None:
        new_layers = base.layers if base else resolve_layers("auto", depth)
    else:
        new_layers = resolve_layers(layers, depth)
    if tokens is None:
        capacities = old.capacities if new_layers == old.layers else ()
    else:
        num_patches = vit.patch_embed.num_patches  # type: ignore[union-attr]
        wish = None if tokens == "dynamic" else cast("int | Sequence[int]", tokens)
        chosen = cast("Selection", selection or old.selection)
        capacities = resolve_capacities(wish, len(new_layers), num_patches, chosen)  # type: ignore[arg-type]
    changes: dict[str, Any] = {
        "threshold": threshold,
        "selection": selection,
        "reduction": reduction,
        "proportional_attention": proportional_attention,
        "multiple_of": multiple_of,
        "place": place,
        "features": features,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    if curve is None and old.curve is not None:
        curve = _kept_curve(old, {**given, "layers": new_layers})
    config = dataclasses.replace(
        old, layers=new_layers, capacities=capacities, curve=curve, **given
    )
    return PrunedViT(vit, config)


def _kept_curve(old: PruneConfig, changes: dict[str, Any]) -> CalibratedCurve | None:
    """Return the curve, or None where it was calibrated for another way of pruning."""
    of = ("layers", "selection", "reduction", "proportional_attention", "place", "features")
    changed = [name for name in of if changes.get(name, getattr(old, name)) != getattr(old, name)]
    if not changed:
        return old.curve
    if "threshold" not in changes:
        raise InvalidArgumentError(
            f"the model's thresholds were calibrated with other {' and '.join(changed)}: give "
            f"{argument('threshold')} too, one for all layers, or calibrate anew with "
            "`simprune-deploy tune`"
        )
    return None


def _check_fits(vit: VisionTransformer, config: PruneConfig) -> None:
    resolve_layers(config.layers, len(vit.blocks))
    if config.capacities:
        patches = vit.patch_embed.num_patches
        resolve_capacities(config.capacities, len(config.layers), patches, config.selection)
    for layer in config.layers if config.place == "inside" else ():
        _check_inside(vit, layer, config.features)


def _check_inside(vit: VisionTransformer, layer: int, features: str) -> None:
    """Refuse a block that has no place between attention and MLP, or no keys to compare."""
    block = vit.blocks[layer]
    kind = type(block).__name__
    if not has_two_halves(block):
        remedy = {"place": "before", **({} if features == "tokens" else {"features": "tokens"})}
        what = f"it is a {kind}, which does not run as attention and then MLP"
    elif features != "tokens" and not has_keys(block):
        remedy = {"features": "tokens"}
        what = f"it is a {kind} with {type(block.attn).__name__}, whose keys are not at hand"
    else:
        return
    raise UnsupportedModelError(
        f"{architecture_name(vit)} cannot be pruned inside block {layer} by its {features}: "
        f"{what}; use {' and '.join(argument(name, value) for name, value in remedy.items())}"
    )


def describe_vit(vit: nn.Module) -> dict[str, Any]:
    """Return what rebuilds `vit` with ``timm.create_model`` and feeds it: JSON types only."""
    cfg = dict(getattr(vit, "pretrained_cfg", None) or {})
    wanted = (*PREPROCESSING, "label_names", "class_order", "assumed")
    return {
        "architecture": cfg.get("architecture") or "",
        "model_args": _json_only({**getattr(vit, "_model_args", {}), **_reset_since(vit)}),
        "preprocessing": _json_only(
            {key: cfg[key] for key in wanted if cfg.get(key) not in (None, {})}
        ),
    }


def _reset_since(vit: nn.Module) -> dict[str, Any]:
    """Return the classes and the pooling as they are: timm's reset_classifier changes them."""
    found: dict[str, Any] = {}
    if isinstance(classes := getattr(vit, "num_classes", None), int):
        found["num_classes"] = classes
    pool = getattr(vit, "global_pool", None)
    if pool is None or ("global_pool" not in getattr(vit, "_model_args", {}) and pool == "token"):
        return found
    found["global_pool"] = pool
    after = not isinstance(getattr(vit, "fc_norm", None), (nn.Identity, type(None)))
    before = not isinstance(getattr(vit, "norm", None), (nn.Identity, type(None)))
    if after != before and after != (pool in ("avg", "avgmax", "max")):
        found["fc_norm"] = after
    return found


def _json_only(values: dict[str, Any]) -> dict[str, Any]:
    result = {}
    for key, value in values.items():
        try:
            result[key] = json.loads(json.dumps(value))
        except TypeError:
            raise CheckpointError(
                f"the model argument {key}={value!r} cannot be saved: build the model with "
                "plain values"
            ) from None
    return result


def read_extra_state(state: torch.Tensor) -> dict[str, Any]:
    """Decode what :meth:`PrunedViT.get_extra_state` wrote.

    Raises:
        CheckpointError: it is damaged, or of a newer format.
    """
    try:
        values = json.loads(bytes(state.to("cpu", torch.uint8).numpy()))
        found = values["simprune_format"]
    except (AttributeError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"the saved pruning configuration ({EXTRA_STATE_KEY}) is damaged: {error}"
        ) from error
    if found != STATE_FORMAT:
        raise CheckpointError(
            f"the saved pruning configuration has format {found}, and this version reads "
            f"{STATE_FORMAT}: update simprune-deploy"
        )
    return cast("dict[str, Any]", values)
