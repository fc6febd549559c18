"""``export --flops``: a checkpoint's model, calibrated for a share of the FLOPs on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from simprune_deploy.common.errors import InvalidArgumentError, argument
from simprune_deploy.common.progress import Progress

if TYPE_CHECKING:
    from simprune_deploy.deploy.export import ExportRequest
    from simprune_deploy.pruning.calibration import Calibrated
    from simprune_deploy.pruning.model import PrunedViT

FIXED = "fixed"
"""As `tokens`: the counts that calibration found."""


def at_wish(request: ExportRequest, model: PrunedViT) -> PrunedViT:
    """Return a model at the point of its own curve that is wanted, with its counts if those are.

    Raises:
        SimpruneError: the curve does not reach there, or counts are wanted and there is no curve.
    """
    from simprune_deploy.pruning.model import prune

    curve = model.config.curve
    if curve is None:
        if request.tokens == FIXED and request.flops is None:
            raise InvalidArgumentError(
                f"{argument('tokens', FIXED)} takes the counts that calibration found: add "
                f"{argument('flops', 0.6, '60%')}, or give counts"
            )
        return model
    share = model.config.threshold if request.flops is None else request.flops
    curve.check_share(share)
    config, patches = model.config, model.num_patches
    follow = config.capacities == curve.counts(config.threshold, patches) and not request.tokens
    # counts that calibration found move along the curve; counts of the user's stay
    fixed = request.tokens == FIXED or follow
    tokens = list(curve.counts(share, patches)) if fixed else None
    if request.flops is None and tokens is None:
        return model
    return prune(model, threshold=share, tokens=tokens)


def calibrated(
    request: ExportRequest, model: PrunedViT, progress: Progress
) -> tuple[PrunedViT, Calibrated]:
    """Calibrate the model for the share of FLOPs that is wanted, on the pictures of the check."""
    import torch

    from simprune_deploy.common.images import Preprocessing, load_as_taken
    from simprune_deploy.pruning.calibration import calibrate
    from simprune_deploy.pruning.model import PrunedViT

    for name, kept in (("selection", ("pairs",)), ("reduction", ("merge",)), ("place", ("inside",)),
                       ("tokens", ("dynamic", FIXED)), ("multiple_of", (1,))):  # fmt: skip
        if getattr(request, name) not in (None, *kept):
            raise InvalidArgumentError(
                f"{argument('flops')} calibrates with "
                f"{' or '.join(argument(name, each) for each in kept)}: drop {argument(name)}, or "
                f"give {argument('threshold')} in place of {argument('flops')}"
            )
    pictures = load_as_taken(
        request.images, Preprocessing.of_model(model), graph_normalizes=False, uint8=False
    )
    assert request.flops is not None
    found = calibrate(
        model.vit,
        torch.from_numpy(pictures.pixels),
        request.flops,
        features=request.features,
        layers=model.config.layers if request.layers not in (None, "auto") else None,
        tokens="fixed" if request.tokens == FIXED else "dynamic",
        progress=progress,
    )
    return PrunedViT(model.vit, found.config), found
