"""Export pruned Vision Transformers to ONNX and TensorRT, checked against PyTorch.

>>> import simprune_deploy as sd
>>> vit = sd.load("model.pt", arch="deit_small_patch16_224")      # doctest: +SKIP
>>> pruned = sd.prune(vit, threshold=0.85)                         # doctest: +SKIP
>>> sd.export(pruned, "exported").verdict.status                   # doctest: +SKIP
'passed'

There is a function for each command; each takes its request, a dataclass, or keywords that make
one. Names are resolved on first use, so that importing the package loads neither torch nor ONNX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from simprune_deploy.common.versions import __version__

if TYPE_CHECKING:
    from simprune_deploy.checkpoints.loading import load, save
    from simprune_deploy.checkpoints.options import CheckpointOptions
    from simprune_deploy.common.errors import (
        ArtifactError,
        CheckFailedError,
        CheckpointError,
        DataError,
        DestinationError,
        InvalidArgumentError,
        RequirementError,
        SimpruneError,
        ToolFailedError,
        UnsupportedModelError,
    )
    from simprune_deploy.deploy.building import BuildRequest, BuildResult, build
    from simprune_deploy.deploy.bundle.packing import BundleRequest, DeviceBundle, bundle
    from simprune_deploy.deploy.doctor.diagnosis import Diagnosis, doctor
    from simprune_deploy.deploy.export import ExportRequest, ExportResult, export
    from simprune_deploy.deploy.inspection import inspect
    from simprune_deploy.deploy.listing import ModelList, models, targets
    from simprune_deploy.deploy.verification import VerifyRequest, verify
    from simprune_deploy.engine.build import EngineOptions
    from simprune_deploy.evaluate.accuracy_check import (
        AccuracyRequest,
        AccuracyResult,
        check_accuracy,
    )
    from simprune_deploy.evaluate.bench import BenchReport, bench
    from simprune_deploy.evaluate.bench.request import BenchRequest
    from simprune_deploy.onnx.options import ExportOptions
    from simprune_deploy.parity.verdict import Verdict
    from simprune_deploy.pruning.config import PruneConfig
    from simprune_deploy.pruning.model import PrunedViT, prune
    from simprune_deploy.reports.sweep import report
    from simprune_deploy.reports.visualize import Visualization, VisualizeRequest, visualize
    from simprune_deploy.tuning.commands import SweepRequest, TuneRequest, sweep, tune
    from simprune_deploy.tuning.results import SweepResult
    from simprune_deploy.tuning.tuned import Tuned

_NAMES = {
    "checkpoints.loading": "load save",
    "checkpoints.options": "CheckpointOptions",
    "common.errors": "ArtifactError CheckFailedError CheckpointError DataError DestinationError "
    "InvalidArgumentError RequirementError SimpruneError ToolFailedError UnsupportedModelError",
    "deploy.building": "BuildRequest BuildResult build",
    "deploy.bundle.packing": "BundleRequest DeviceBundle bundle",
    "deploy.export": "ExportRequest ExportResult export",
    "deploy.inspection": "inspect",
    "deploy.doctor.diagnosis": "Diagnosis doctor",
    "deploy.listing": "ModelList models targets",
    "deploy.verification": "VerifyRequest verify",
    "engine.build": "EngineOptions",
    "evaluate.accuracy_check": "AccuracyRequest AccuracyResult check_accuracy",
    "evaluate.bench": "BenchReport bench",
    "evaluate.bench.request": "BenchRequest",
    "onnx.options": "ExportOptions",
    "parity.verdict": "Verdict",
    "pruning.config": "PruneConfig",
    "pruning.model": "PrunedViT prune",
    "reports.sweep": "report",
    "reports.visualize": "Visualization VisualizeRequest visualize",
    "tuning.commands": "SweepRequest TuneRequest sweep tune",
    "tuning.tuned": "Tuned",
    "tuning.results": "SweepResult",
}
"""Where each name lives; a test holds this to the imports above."""

_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}

# a room of the package and a function may have one name: the function is what users want
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
