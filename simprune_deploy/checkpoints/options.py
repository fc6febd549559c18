"""How a checkpoint is to be loaded, as what a user says of it. Imports nothing heavy."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class CheckpointOptions:
    """How a checkpoint is to be loaded.

    Args:
        arch: timm architecture, for checkpoints that do not say theirs. Default None.
        img_size: Pixels, or (height, width). Default None: the model's.
        pretrained: The source is a timm name or ``hf-hub:`` id to download. Default False.
        trust_pickle: Load a pickled module, which runs code from the file. Default False.
    """

    arch: str | None = None
    img_size: int | tuple[int, int] | None = None
    pretrained: bool = False
    trust_pickle: bool = False
