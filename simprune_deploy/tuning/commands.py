"""``sweep`` and ``tune`` as functions."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from simprune_deploy.checkpoints.options import CheckpointOptions
from simprune_deploy.common.errors import DestinationError, InvalidArgumentError, argument
from simprune_deploy.common.files import stem_of
from simprune_deploy.common.progress import NO_BAR, Progress, ProgressBar
from simprune_deploy.common.requests import as_path, check_whole, request_of
from simprune_deploy.evaluate.class_order import ClassOrder
from simprune_deploy.evaluate.datasets import MAX_UNREADABLE, DataOptions, open_data
from simprune_deploy.predict.answers import cut_of
from simprune_deploy.predict.source import ModelSource, open_source
from simprune_deploy.pruning.calibrated_curve import check_flops, check_layer_cost
from simprune_deploy.pruning.config import (
    Features,
    Place,
    Reduction,
    Selection,
    resolve_layers,
)
from simprune_deploy.tuning.calibrating import CalibratedModel, calibrated_source, result_of
from simprune_deploy.tuning.grid import Grid, LayerSet, TokenSet, layer_sets, settings_for
from simprune_deploy.tuning.results import Setting, SweepResult
from simprune_deploy.tuning.search import (
    EXAMPLES,
    MAX_DROP,
    MIN_SPEEDUP,
    TARGET_LATENCY,
    Objective,
    layer_candidates,
    search,
)
from simprune_deploy.tuning.store import check_store
from simprune_deploy.tuning.sweep import (
    Runner,
    Sweep,
    SweepOptions,
    batch_for,
    setting_of,
    start_sweep,
)
from simprune_deploy.tuning.sweep_runtimes import Backend, compared, runtime_of
from simprune_deploy.tuning.tallies import close_models
from simprune_deploy.tuning.tuned import Tuned, tuned


@dataclasses.dataclass(frozen=True)
class _Measured:
    """What sweeping and tuning have in common: the model, the pictures, and what runs it."""

    model: Any
    data: str | Path = ""
    backend: Backend | None = None
    limit: int | None = None
    classes: str | Path | None = None
    class_order: ClassOrder | None = None
    labels: bool = True
    max_unreadable: float = MAX_UNREADABLE
    batch: int = 32
    timing: int = 200
    output: str | Path | None = None
    force: bool = False
    ray: str | None = None
    checkpoint: CheckpointOptions = dataclasses.field(default_factory=CheckpointOptions)
    command: str = ""
    cut: float | None = None

    def __post_init__(self) -> None:
        if not str(self.data):
            raise InvalidArgumentError(f"there is nothing to measure on: give {argument('data')}")
        _ = self.options, self.data_options  # they check their values

    @property
    def options(self) -> SweepOptions:
        """How to measure."""
        return SweepOptions(self.batch, self.timing, self.cut)

    @property
    def data_options(self) -> DataOptions:
        """What is said of the data."""
        return DataOptions(
            self.limit,
            self.labels,
            as_path(self.classes),
            self.max_unreadable,
            self.class_order,
        )

    def started(
        self,
        source: ModelSource,
        backend: Backend,
        folder: Path,
        runner: Runner | None,
        bar: ProgressBar,
        resume: bool,
        force: bool,
    ) -> Sweep:
        """Open the pictures and what runs the model."""
        cut_of(source.metadata.num_classes, self.cut)  # before anything runs
        batch = batch_for(source, self.batch)
        pictures = open_data(Path(self.data), source.metadata, self.data_options)
        return start_sweep(
            source,
            pictures,
            runtime_of(backend, source, batch, _step_of(bar)),
            folder,
            dataclasses.replace(self.options, batch=batch),
            resume=resume,
            force=force,
            runner=runner,
            bar=bar,
        )


@dataclasses.dataclass(frozen=True)
class SweepRequest(_Measured):
    """What to measure.

    Args:
        model: An exported folder, an ONNX file of one, a checkpoint, or a model.
        data: A folder with a folder a class, or of pictures; .csv, .npz; a Hugging Face data set.
        thresholds: Default None: 0.95 to 0.6 in steps of 0.05.
        layers: Sets of blocks. Default None: the model's, or "auto".
        selections, reductions, tokens, place, features: As in :class:`Grid`. Default None: the
            model's.
        backend: What runs the model. Default None: "onnxruntime", with `compare` "torch".
        compare: Measure other methods too, at the same token counts, in PyTorch. Default False.
        limit: Take this many pictures, spread evenly. Default None: all.
        classes: File that maps the data's classes to the model's. Default None.
        class_order: "timm" or "torchvision": whose order numbers class names that the model does
            not know. Default None: what the model's training checkpoint says, or torchvision's.
        labels: Use labels where there are any. Default True.
        max_unreadable: The share of unreadable pictures beyond which it stops. Default 0.01.
        batch: Pictures a run; timing is of one. Default 32.
        timing: Runs that each latency is of; 0: no timing. Default 200.
        output: Folder to write. Default None: NAME-sweep.
        resume: Go on with what is there. Default False.
        force: Replace an earlier sweep. Default False.
        ray: Run on a Ray cluster: "host:port", "auto" or "local". Default None.
        checkpoint: How a checkpoint is loaded.
        command: What makes the sweep again, for the report.
        cut: Of a model with one output: above it is class 1, at or below it class 0. Default None:
            0, of a logit the probability of one half.
    """

    thresholds: Sequence[float] | None = None
    layers: Sequence[LayerSet] | None = None
    selections: Sequence[str] | None = None
    reductions: Sequence[str] | None = None
    tokens: Sequence[TokenSet] | None = None
    place: Place | None = None
    features: Features | None = None
    compare: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        Grid(**self.asked)  # it checks its values
        if self.compare and self.backend not in (None, "torch"):
            raise InvalidArgumentError(
                f"{argument('compare', True)} runs in PyTorch, not {self.backend}: leave "
                f"{argument('backend')} out"
            )

    @property
    def folder(self) -> Path:
        """Where the result goes."""
        return Path(self.output or f"{stem_of(self.model)}-sweep")

    @property
    def asked(self) -> dict[str, Any]:
        """The fields of :class:`Grid` that were given."""
        names = ("thresholds", "layers", "selections", "reductions", "tokens", "place", "features")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def sweep(
    model: Any, data: str | Path | None = None, *, bar: ProgressBar = NO_BAR, **fields: Any
) -> SweepResult:
    """Measure accuracy, tokens, time and memory at many settings, beside the dense model.

    The result is in the folder too, as ``sweep.json``.

    Args:
        model: A :class:`SweepRequest`, or its first field; the others by name.
        data: The request's second field.
        bar: Shows how far it is. Default: nothing is shown.

    Raises:
        SimpruneError: the model, the data or the folder cannot be used, or a setting does not fit.
    """
    request = request_of(SweepRequest, model, fields, data=data)
    # every check that needs no model comes before the model is loaded
    check_store(request.folder, request.resume, request.force)
    backend = request.backend or ("torch" if request.compare else "onnxruntime")
    _check_backend(backend, request)
    with _cluster(request.ray) as runner:
        bar.begin("loading the model and the list of pictures", 1)
        source = _source(request)
        settings = settings_for(source, request.asked)
        if request.compare:
            settings = compared(settings)
        started = request.started(
            source, backend, request.folder, runner, bar, request.resume, request.force
        )
        result = started.result(settings, request.command)
        result.save(request.folder / "sweep.json")
    return result


@dataclasses.dataclass(frozen=True)
class TuneRequest(_Measured):
    """What to find. Give one of `flops`, `max_drop`, `min_speedup` and `target_latency`.

    Args:
        model, data, limit, classes, class_order, labels, max_unreadable, batch, timing, ray,
            checkpoint, command, cut: As in :class:`SweepRequest`.
        flops: The share of the blocks' FLOPs to spend, in (0, 1), so that least is lost: finds
            what is compared, in which blocks, and a threshold for each; labels are not needed.
        max_drop: Most pruning whose accuracy surely drops by no more than this share.
        min_speedup: Least pruning that is so many times as fast as the dense model.
        target_latency: Least pruning that takes no more milliseconds for one picture.
        layers: Sets of blocks; ("auto",) tries several. Default None: the model's, or five at
            the sixths of the depth.
        selection: "pairs" (the default) or "redundancy".
        reduction: "merge" (the default) or "drop".
        place: "before" or "inside" the blocks. Default None: the model's, or "before".
        features: Compare "tokens", "keys", "mean-keys" or "tokens+keys". Default None: the model's,
            or "tokens".
        tokens: With `flops`, prune by "dynamic" counts, which thresholds give, or by "fixed" ones.
            Default None: thresholds for single images, for batches whichever loses less.
        confidence: Of the interval of the drop, in (0, 1). Default 0.95.
        overflow: Fix token counts that this share of the pictures exceeds. Default None: counts
            stay dynamic.
        served: With `flops`, the images of a batch as it will be served: the share is of batches
            that are padded to their largest image. Default None: 1.
        layer_cost: With `flops`, what a prune layer costs on the machine that will serve, as a
            share of the dense model's time; ``bench`` measures it. Default None: 0.004.
        backend: What runs the model. Default None: "onnxruntime".
        cells: Folder that keeps what was measured; a sweep's will do. Default None: none.
        output: File for ``export --config``. Default None: NAME-tuned.json.
        force: Replace a file that is there. Default False.
    """

    flops: float | None = None
    max_drop: float | None = None
    min_speedup: float | None = None
    target_latency: float | None = None
    layers: Sequence[LayerSet] | None = None
    selection: Selection = "pairs"
    reduction: Reduction = "merge"
    place: Place | None = None
    features: Features | None = None
    tokens: Literal["dynamic", "fixed"] | None = None
    confidence: float = 0.95
    overflow: float | None = None
    served: int | None = None
    layer_cost: float | None = None
    cells: str | Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.flops is not None:
            self._check_calibrates()
            return
        wanted = self.objective
        for name in ("tokens", "served", "layer_cost"):
            if getattr(self, name) is not None:
                raise InvalidArgumentError(
                    f"{argument(name)} is for {argument('flops')}: add it, or drop {argument(name)}"
                )
        if not self.timing and not wanted.of_accuracy:
            raise InvalidArgumentError(
                f"{argument(wanted.kind.replace('-', '_'))} needs times, and "
                f"{argument('timing', 0)} takes none"
            )

    def _check_calibrates(self) -> None:
        """Refuse what does not go with a share of FLOPs."""
        assert self.flops is not None
        check_flops(self.flops)
        if self.served is not None:
            check_whole("served", self.served, 1)
        if self.layer_cost is not None:
            check_layer_cost(self.layer_cost)
        wishes = (self.max_drop, self.min_speedup, self.target_latency)
        if wishes != (None, None, None):
            raise InvalidArgumentError(
                f"{argument('flops')} is a wish of its own: drop it, or the other one"
            )
        if (self.selection, self.reduction) != ("pairs", "merge") or self.place == "before":
            raise InvalidArgumentError(
                f"{argument('flops')} calibrates pairs that merge inside blocks: drop "
                f"{argument('selection')}, {argument('reduction')} and {argument('place')}"
            )
        if self.overflow is not None:
            raise InvalidArgumentError(
                f"{argument('flops')} writes the token counts for static engines beside its "
                f"thresholds: drop {argument('overflow')}"
            )

    @property
    def file(self) -> Path:
        """Where the result goes."""
        return Path(self.output or f"{stem_of(self.model)}-tuned.json")

    @property
    def objective(self) -> Objective:
        """What is wanted.

        Raises:
            InvalidArgumentError: not exactly one of the three is given, or it is out of range.
        """
        given = [
            (kind, value)
            for kind, value in (
                (MAX_DROP, self.max_drop),
                (MIN_SPEEDUP, self.min_speedup),
                (TARGET_LATENCY, self.target_latency),
            )
            if value is not None
        ]
        if len(given) != 1:
            first, second, third = EXAMPLES.values()
            share = argument("flops", 0.6, "60%")
            raise InvalidArgumentError(f"give one wish: {share}, {first}, {second} or {third}")
        kind, value = given[0]
        return Objective(kind, value, self.confidence)


def tune(
    model: Any, data: str | Path | None = None, *, bar: ProgressBar = NO_BAR, **fields: Any
) -> Tuned | CalibratedModel:
    """Find thresholds, and blocks, that meet a wish, and write them for ``export --config``.

    Args:
        model: A :class:`TuneRequest`, or its first field; the others by name.
        data: The request's second field.
        bar: Shows how far it is. Default: nothing is shown.

    Raises:
        SimpruneError: the model, the data or the file cannot be used.
        CheckFailedError: nothing meets the wish; the message says what the best is.
    """
    request = request_of(TuneRequest, model, fields, data=data)
    if request.flops is not None:
        return _tune_by_flops(request, bar)
    objective = request.objective
    _check_file(request.file, request.force)
    backend = request.backend or "onnxruntime"
    _check_backend(backend, request)
    with _cluster(request.ray) as runner, _folder(request.cells) as folder:
        bar.begin("loading the model and the list of pictures", 1)
        source = _source(request)
        bases = _bases(source, request)
        started = request.started(source, backend, folder, runner, bar, True, False)
        found = search(started, objective, bases)
        result = tuned(started, found, request.overflow, request.command)
        result.save(request.file)
    return result


def _tune_by_flops(request: TuneRequest, bar: ProgressBar) -> CalibratedModel:
    """Calibrate for a share of FLOPs, and time what was found beside the dense model."""
    assert request.flops is not None
    _check_file(request.file, request.force)
    backend = request.backend or "onnxruntime"
    _check_backend(backend, request)
    if request.layers is not None and len(request.layers) != 1:
        raise InvalidArgumentError(
            f"{argument('flops')} takes one set of {argument('layers')}, or finds its own"
        )
    with _cluster(request.ray) as runner, _folder(request.cells) as folder:
        bar.begin("loading the model and the list of pictures", 1)
        source = _source(request)
        data = open_data(Path(request.data), source.metadata, request.data_options)
        found, calibrated = calibrated_source(
            source,
            data,
            request.flops,
            features=request.features,
            layers=_only_set(request, source),
            batch=request.served or 1,
            tokens=request.tokens,
            layer_cost=request.layer_cost,
            progress=_step_of(bar),
        )
        started = request.started(found, backend, folder, runner, bar, True, False)
        timed = started.time([setting_of(found)])[0] if request.timing else None
        environment = {**started.environment(), "command": request.command}
        result = result_of(found, calibrated, timed, data, environment)
        result.save(request.file)
    return result


def _only_set(request: TuneRequest, source: ModelSource) -> tuple[int, ...] | None:
    """Return the blocks that the user names, or None: calibration finds them."""
    if request.layers is None or request.layers[0] == "auto":
        return None
    return resolve_layers(request.layers[0], source.metadata.depth)


def _step_of(bar: ProgressBar) -> Progress:
    return lambda step: bar.begin(step, 1)


def _source(request: _Measured) -> ModelSource:
    source = open_source(request.model, request.checkpoint, prune=True)
    if source.graph is not None and not source.metadata.pruning.layers:
        raise InvalidArgumentError(
            f"{source.name} is a dense model without prune layers: sweep its checkpoint"
        )
    return source


@contextlib.contextmanager
def _cluster(address: str | None) -> Iterator[Runner | None]:
    """Join the Ray cluster that was asked for, if one was; at the end close what ran here."""
    if address is None:
        try:
            yield None
        finally:
            close_models()
        return
    from simprune_deploy.tuning.cluster import connected

    with connected(address) as runner:
        yield runner


def _check_backend(backend: Backend, request: _Measured) -> None:
    """Refuse engines before any work where they cannot run."""
    if backend == "engine":
        from simprune_deploy.tuning.engine_runtime import check_engines_can_run

        check_engines_can_run(Path(str(request.model)), request.ray is not None)


def _check_file(file: Path, force: bool) -> None:
    if file.is_dir() or (file.exists() and not force):
        raise DestinationError(
            f"{file} already exists: replace it with {argument('force', True)}, or give "
            f"{argument('output', 'FILE')}"
        )
    if not file.absolute().parent.is_dir():
        raise DestinationError(
            f"{file.absolute().parent} is not a folder: give another place with "
            f"{argument('output')}"
        )


@contextlib.contextmanager
def _folder(cells: str | Path | None) -> Iterator[Path]:
    """Yield the folder for what is measured; one that nobody named is removed again."""
    if cells is not None:
        yield Path(cells)
        return
    with tempfile.TemporaryDirectory(prefix="simprune-tune-") as place:
        yield Path(place)


def _bases(source: ModelSource, request: TuneRequest) -> list[Setting]:
    """Return the settings whose thresholds are searched."""
    choices = (request.selection, request.reduction)
    if source.graph is not None:
        if not source.runtime_threshold:
            raise InvalidArgumentError(
                f"the threshold of {source.name} is fixed: tune its checkpoint, or export with "
                f"{argument('runtime_threshold', True)}"
            )
        where = (request.layers, request.place, request.features)
        if where != (None, None, None) or choices != ("pairs", "merge"):
            raise InvalidArgumentError(
                f"the graph of {source.name} fixes all but the threshold: tune its checkpoint to "
                f"choose {argument('layers')}, {argument('place')}, {argument('features')}, "
                f"{argument('selection')} or {argument('reduction')}"
            )
        return [setting_of(source)]
    metadata = source.metadata
    grid = Grid(
        (0.9,),
        layer_sets(request.layers or "auto"),
        (request.selection,),
        (request.reduction,),
        place=request.place or metadata.pruning.place,
        features=request.features or metadata.pruning.features,
    )
    bases = grid.settings(metadata.depth, metadata.num_patches)
    own = metadata.pruning.layers
    if request.layers is None:
        return [dataclasses.replace(each, layers=own) for each in bases]
    if layer_sets(request.layers) != ("auto",):
        return bases
    return [
        dataclasses.replace(each, layers=candidate)
        for each in bases
        for candidate in layer_candidates(metadata.depth, each.layers)
    ]
