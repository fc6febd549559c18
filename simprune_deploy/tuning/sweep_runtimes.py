"""What runs the settings of a sweep: ONNX Runtime, PyTorch, or engines (engine_runtime.py)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from simprune_deploy.common.errors import InvalidArgumentError, argument
from simprune_deploy.common.progress import Progress, silent
from simprune_deploy.common.versions import package_version
from simprune_deploy.predict.predictor import PredictorSpec
from simprune_deploy.predict.source import ModelSource
from simprune_deploy.tuning.results import BASELINES, OURS, Setting
from simprune_deploy.tuning.tallies import Models, by_graph

if TYPE_CHECKING:
    from simprune_deploy.pruning.model import PrunedViT

Backend = Literal["onnxruntime", "torch", "engine"]


class SweepRuntime(Protocol):
    """Turns settings into models that can be opened.

    Attributes:
        name: As in --backend.
        environment: What a report says of it.
        no_memory: Why the memory of a run cannot be measured. None: it can.
    """

    name: str
    environment: dict[str, Any]
    no_memory: str | None

    def groups(self, settings: Sequence[Setting]) -> list[list[Setting]]:
        """Return the settings in groups whose models are open at the same time."""

    def models(self, group: Sequence[Setting]) -> Models:
        """Return the models of a group, and the dense one."""

    def alone(self, group: Sequence[Setting], keep_memory: bool) -> Models:
        """Return them as they ship, to measure time, or memory (which is then not kept)."""


def runtime_of(
    name: Backend, source: ModelSource, batch: int, progress: Progress = silent
) -> SweepRuntime:
    """Return the runtime of a name.

    Args:
        name: What runs it.
        source: The model.
        batch: The largest batch it will be given.
        progress: Called with a word on each step where engines have to be built.

    Raises:
        SimpruneError: it is unknown, or cannot run this model here.
    """
    if name == "onnxruntime":
        return OnnxRuntime(source, batch)
    if name == "torch":
        if source.model is None:
            raise InvalidArgumentError(
                f"{source.name} is an exported graph, and {argument('backend', 'torch')} runs "
                "checkpoints: give the checkpoint"
            )
        return TorchRuntime(source)
    if name == "engine":
        from simprune_deploy.tuning.engine_runtime import EngineRuntime

        return EngineRuntime(source, progress)
    raise InvalidArgumentError(
        f"backend {name!r} is unknown: use one of {', '.join(get_args(Backend))}",
        what="backend",
        value=name,
        allowed=get_args(Backend),
    )


class OnnxRuntime:
    """ONNX Runtime on the CPU. A checkpoint is exported once for all thresholds of a group."""

    name = "onnxruntime"
    no_memory: str | None = None

    def __init__(self, source: ModelSource, batch: int) -> None:
        self.source, self.batch = source, batch
        emulating = ", emulating bfloat16" if source.metadata.precision == "bf16" else ""
        version = package_version("onnxruntime") or "of unknown version"
        self.environment = {
            "backend": self.name,
            "runtime": f"ONNX Runtime {version} (CPU{emulating})",
            "graphs": "the exported file"
            if source.graph is not None
            else "exported for this sweep, one for all thresholds, and not verified: `export` does",
        }

    def groups(self, settings: Sequence[Setting]) -> list[list[Setting]]:
        return by_graph(settings)

    def models(self, group: Sequence[Setting]) -> Models:
        return self._models(group, True)

    def alone(self, group: Sequence[Setting], keep_memory: bool) -> Models:
        return self._models(group, keep_memory)

    def _models(self, group: Sequence[Setting], keep_memory: bool) -> Models:
        source = self._source(dataclasses.replace(group[0], threshold=None))
        pruned, dense = (source.spec(form, keep_memory=keep_memory) for form in ("pruned", "dense"))
        return Models(dense, dict.fromkeys(group, pruned))

    @functools.lru_cache(maxsize=1)  # noqa: B019  (a runtime lives as long as its sweep)
    def _source(self, setting: Setting) -> ModelSource:
        if self.source.graph is not None:
            return self.source
        from simprune_deploy.onnx.exporter import export_onnx
        from simprune_deploy.onnx.metadata import read_metadata
        from simprune_deploy.onnx.options import ExportOptions

        assert self.source.model is not None
        options = ExportOptions(batch=(1, self.batch), runtime_threshold=True)
        graph = export_onnx(configured(self.source.model, setting), options)
        return ModelSource(self.source.name, read_metadata(graph), graph=graph)


class TorchRuntime:
    """PyTorch on the CPU: ours, and the methods it is compared with."""

    name = "torch"
    no_memory: str | None = None

    def __init__(self, source: ModelSource) -> None:
        self.source = source
        version = package_version("torch") or "of unknown version"
        self.environment = {"backend": self.name, "runtime": f"PyTorch {version} (CPU)"}

    def groups(self, settings: Sequence[Setting]) -> list[list[Setting]]:
        return [list(settings)] if settings else []

    def models(self, group: Sequence[Setting]) -> Models:
        from simprune_deploy.predict.torch_predictor import TorchSpec

        model, metadata = self.source.model, self.source.metadata
        assert model is not None
        dense = TorchSpec(model, metadata, "dense", self.source.sha256)
        return Models(dense, {setting: self._spec(setting) for setting in group})

    def alone(self, group: Sequence[Setting], keep_memory: bool) -> Models:
        return self.models(group)

    def _spec(self, setting: Setting) -> PredictorSpec:
        from simprune_deploy.onnx.exporter import metadata_of_model
        from simprune_deploy.onnx.options import ExportOptions
        from simprune_deploy.predict.torch_predictor import TorchSpec
        from simprune_deploy.tuning.baselines import Baseline, BaselineSpec

        assert self.source.model is not None
        model = configured(self.source.model, ours_of(setting) if _is_other(setting) else setting)
        metadata = metadata_of_model(model, ExportOptions())
        if _is_other(setting):
            baseline = Baseline(setting.method)
            return BaselineSpec(model, metadata, baseline, self.source.sha256)
        return TorchSpec(model, metadata, identity=self.source.sha256)


def _is_other(setting: Setting) -> bool:
    return setting.method != OURS


def configured(model: PrunedViT, setting: Setting) -> PrunedViT:
    """Return the model pruned as a setting of ours says; its weights are shared."""
    from simprune_deploy.pruning.model import prune

    return prune(
        model,
        threshold=setting.threshold,
        layers=setting.layers,
        selection=setting.selection,
        reduction=setting.reduction,
        tokens="dynamic" if setting.tokens is None else setting.tokens,
        place=setting.place,
        features=setting.features,
    )


def ours_of(setting: Setting) -> Setting:
    """Return the setting of ours whose token counts a baseline takes."""
    usual = Setting(OURS, setting.threshold, setting.layers)
    return dataclasses.replace(usual, place=setting.place, features=setting.features)


def compared(settings: Sequence[Setting]) -> list[Setting]:
    """Return each setting followed by the baselines at its token counts.

    Raises:
        SimpruneError: none of the settings is the operator's usual form, with counts of its own.
    """
    usual = [each for each in settings if each == ours_of(each)]
    if not usual:
        raise InvalidArgumentError(
            f"{argument('compare', True)} takes the token counts of selection pairs, reduction "
            "merge and dynamic tokens: sweep these too"
        )
    return [
        *settings,
        *(dataclasses.replace(each, method=name) for each in usual for name in BASELINES),
    ]
