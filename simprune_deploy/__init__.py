"""Export pruned Vision Transformers to ONNX and TensorRT, checked against PyTorch.

>>> import simprune_deploy as sd
>>> vit = sd.load("model.pt", arch="deit_small_patch16_224")      # doctest: +SKIP
>>> pruned = sd.prune(vit, threshold=0.85)                         # doctest: +SKIP
>>> sd.export(pruned, "exported").verdict.status                   # doctest: +SKIP
'passed'

Names are resolved on first use, so that importing the package loads neither torch nor ONNX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from simprune_deploy.common.versions import __version__

_HOMES = {
    "CheckFailedError": "simprune_deploy.common.errors",
    "ExportOptions": "simprune_deploy.onnx.exporter",
    "PruneConfig": "simprune_deploy.pruning.config",
    "PrunedViT": "simprune_deploy.pruning.model",
    "SimpruneError": "simprune_deploy.common.errors",
    "export": "simprune_deploy.deploy.export",
    "load": "simprune_deploy.checkpoints.loading",
    "prune": "simprune_deploy.pruning.model",
    "save": "simprune_deploy.checkpoints.loading",
    "verify": "simprune_deploy.deploy.verification",
}

__all__ = [
    "__version__",
    "CheckFailedError",
    "ExportOptions",
    "PruneConfig",
    "PrunedViT",
    "SimpruneError",
    "export",
    "load",
    "prune",
    "save",
    "verify",
]

if TYPE_CHECKING:
    from simprune_deploy.checkpoints.loading import load, save
    from simprune_deploy.common.errors import CheckFailedError, SimpruneError
    from simprune_deploy.deploy.export import export
    from simprune_deploy.deploy.verification import verify
    from simprune_deploy.onnx.exporter import ExportOptions
    from simprune_deploy.pruning.config import PruneConfig
    from simprune_deploy.pruning.model import PrunedViT, prune


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
