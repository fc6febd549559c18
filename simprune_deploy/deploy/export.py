"""``export`` as a function: a checkpoint becomes the folder that ships, and what is made of it."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simprune_deploy.checkpoints.options import CheckpointOptions, assumptions, for_checkpoints
from simprune_deploy.common.errors import (
    CheckpointError,
    InvalidArgumentError,
    SimpruneError,
    argument,
    spelled,
)
from simprune_deploy.common.files import (
    check_destination,
    sha256,
    staged_folder,
    stem_of,
    write_json,
)
from simprune_deploy.common.progress import Progress, silent
from simprune_deploy.common.requests import request_of
from simprune_deploy.common.versions import __version__, package_version
from simprune_deploy.deploy.building import says_how_to_build, targets_and_devices
from simprune_deploy.deploy.bundle.packing import (
    DeviceBundle,
    check_destinations,
    default_output,
    make_bundle,
)
from simprune_deploy.deploy.calibrated import FIXED, at_wish, calibrated
from simprune_deploy.deploy.triton import (
    TritonModel,
    check_batch,
    serve_engine,
    write_repository,
)
from simprune_deploy.engine.build import BuiltEngine
from simprune_deploy.engine.folder_engines import build_ahead, build_here, check_can_build_here
from simprune_deploy.engine.targets import short_names
from simprune_deploy.onnx.exported_folder import (
    COMPANIONS,
    FORMAT,
    GOLDEN,
    MANIFEST,
    MODEL,
    PARITY,
    UNVERIFIED,
)
from simprune_deploy.onnx.options import ExportOptions
from simprune_deploy.pruning.calibrated_curve import check_flops
from simprune_deploy.pruning.config import (
    Features,
    Place,
    PruneConfig,
    Reduction,
    Selection,
    check_threshold,
    format_numbers,
)
from simprune_deploy.pruning.tuned_file import read_configuration

if TYPE_CHECKING:
    import onnx

    from simprune_deploy.engine.targets import Target
    from simprune_deploy.parity.verdict import Verdict
    from simprune_deploy.pruning.calibration import Calibrated
    from simprune_deploy.pruning.model import PrunedViT


@dataclasses.dataclass(frozen=True)
class ExportRequest:
    """What to export, how, and what to make of it.

    Args:
        model: A checkpoint's path (or a name to download), a timm model, or one that
            :func:`simprune_deploy.prune` gave.
        output: The folder to write. Default None: NAME-pruned.
        options: The graph's form. Default None: :class:`ExportOptions`'s defaults. Without a
            precision in it, the targets choose one.
        threshold, layers, selection, reduction, proportional_attention, tokens, multiple_of, place,
            features: As :func:`simprune_deploy.prune` takes them. Default None: the model's own, or
            its defaults.
            `tokens` "fixed": the counts of the calibrated curve.
        config: A file of ``tune`` with these; what is given here overrides it.
        flops: The share of the blocks' FLOPs that is wanted, in (0, 1): a point of the calibrated
            curve of `config` or of the model, or without one calibrated now, on the pictures.
            Default None: what the configuration says.
        images: Folder of pictures for the parity check, and for calibration. Default None:
            photographs that come along.
        verify: Run the parity check. Default True.
        force: Replace an earlier result. Default False.
        source: What to say of the checkpoint in the manifest. Default None: how it was read.
        targets: Names of GPUs: after the parity check TensorRT-RTX engines are built for those
            that take one, and a bundle is packed for the devices that build their own.
        per_target: One engine for each target. Default False: one for all of them.
        engine: After the parity check, build a TensorRT engine for the GPU here. Default False.
        triton: After the parity check, write a Triton model repository too. Default False.
        checkpoint: How a checkpoint is loaded.

    Raises:
        SimpruneError: a value is out of its range, or the arguments contradict each other.
    """

    model: Any
    output: str | Path | None = None
    options: ExportOptions | None = None
    threshold: float | None = None
    layers: str | Sequence[int] | None = None
    selection: Selection | None = None
    reduction: Reduction | None = None
    proportional_attention: bool | None = None
    tokens: str | int | Sequence[int] | None = None
    multiple_of: int | None = None
    place: Place | None = None
    features: Features | None = None
    config: str | Path | None = None
    flops: float | None = None
    images: str | Path | None = None
    verify: bool = True
    force: bool = False
    source: dict[str, Any] | None = None
    targets: Sequence[str] = ()
    per_target: bool = False
    engine: bool = False
    triton: bool = False
    checkpoint: CheckpointOptions = dataclasses.field(default_factory=CheckpointOptions)

    def __post_init__(self) -> None:
        if self.images is not None and not self.verify:
            raise InvalidArgumentError(
                f"{argument('images')} is for the parity check, and {argument('verify', False)} "
                "skips it: drop one"
            )
        companions = getattr(self.options, "companions", ())
        if companions and not self.verify:
            raise InvalidArgumentError(
                f"{argument(companions[0], True)} writes a file that the parity check has proven, "
                f"and {argument('verify', False)} skips it: drop one"
            )
        if self.per_target and not self.targets:
            raise says_how_to_build()
        if self.flops is not None:
            check_flops(self.flops)
            if self.threshold is not None:
                raise InvalidArgumentError(
                    f"{argument('flops')} finds a threshold for every layer, and "
                    f"{argument('threshold')} is one for all: drop one"
                )

    @property
    def folder(self) -> Path:
        """Where the result goes."""
        if self.output is not None:
            return Path(self.output)
        return Path(f"{stem_of(self.model)}-pruned")

    def pruning(self) -> tuple[dict[str, Any], tuple[int, ...]]:
        """Return the arguments of :func:`simprune_deploy.prune`, and TensorRT's size hints.

        Raises:
            SimpruneError: a value is out of its range, or the configuration cannot be read.
        """
        names = ("threshold", "layers", "selection", "reduction", "proportional_attention",
                 "tokens", "multiple_of", "place", "features")  # fmt: skip
        asked = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        hints: tuple[int, ...] = ()
        if self.config is not None:
            tuned, found = read_configuration(Path(self.config))
            # they are of these layers, where the image decides how many tokens stay
            others = ("layers", "tokens", "place", "features")
            if asked.keys().isdisjoint(others) and tuned["tokens"] == "dynamic":
                hints = found
            if "curve" in tuned:
                self._check_keeps(tuned, asked)
                if self.flops not in (None, tuned["threshold"]):
                    hints = ()
            elif self.flops is not None:
                raise InvalidArgumentError(
                    f"{self.config} has one threshold for all layers and no curve to take "
                    f"{argument('flops')} from: drop one of the two"
                )
            asked = {**tuned, **asked}
        elif self.flops is not None and self.place is None:
            asked["place"] = "inside"  # where what is calibrated prunes
        if "threshold" in asked:
            check_threshold(asked["threshold"])
        if self.flops is not None and "curve" in asked:
            asked["curve"].check_share(self.flops)
        if asked.get("tokens") == FIXED:  # the model says how many they are
            del asked["tokens"]
        simple = ["threshold", "selection", "reduction", "multiple_of", "place"]
        if "place" in asked:  # else it is the checkpoint's, and keys may go with it
            simple.append("features")
        PruneConfig(**{name: asked[name] for name in simple if name in asked})
        return asked, hints

    def _check_keeps(self, tuned: dict[str, Any], asked: dict[str, Any]) -> None:
        """Refuse what contradicts calibrated thresholds."""
        if self.threshold is not None:
            raise InvalidArgumentError(
                f"{self.config} has calibrated thresholds for every layer, and "
                f"{argument('threshold')} is one for all: choose a point of its curve with "
                f"{argument('flops')}, or leave {argument('config')} out"
            )
        fixed = ("layers", "place", "features", "selection", "reduction", "proportional_attention")
        for name in fixed:
            if name in asked and asked[name] != tuned[name]:
                typed = format_numbers(tuned[name]) if name == "layers" else str(tuned[name])
                said = argument(name, tuned[name], typed)
                raise InvalidArgumentError(
                    f"{self.config} was calibrated with {said}: leave {argument(name)} out, or "
                    f"calibrate anew with `simprune-deploy tune`"
                )


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """An exported folder, and what was made of it.

    Attributes:
        folder: Where it is.
        manifest: What ``manifest.json`` says.
        verdict: The parity check's, or None if it was not asked for.
        engines: Those built; None if none were asked for, empty if the parity check did not pass.
        triton: The models in its Triton repository; None and empty as for `engines`.
        bundle: The bundle for devices, or None.
        devices: The devices that a bundle was asked for.
        checkpoint: How the checkpoint was read, in words; empty for a model that was given.
        calibrated: What calibration for a share of FLOPs found; None if there was none.
        precision_note: Why it has the precision that it has, in a line, where the targets chose
            it; else empty.
    """

    folder: Path
    manifest: dict[str, Any]
    verdict: Verdict | None
    engines: tuple[BuiltEngine, ...] | None = None
    triton: tuple[TritonModel, ...] | None = None
    bundle: DeviceBundle | None = None
    devices: tuple[str, ...] = ()
    checkpoint: tuple[str, ...] = ()
    calibrated: Calibrated | None = None
    precision_note: str = ""

    @property
    def assumed(self) -> tuple[str, ...]:
        """What neither the checkpoint nor the user says, in sentences."""
        return tuple(assumptions(self.manifest["model"]["preprocessing"]))

    @property
    def accepted(self) -> bool:
        """Whether the parity check passed, or was not asked for."""
        return self.verdict is None or self.verdict.accepted

    def __str__(self) -> str:
        made = [*(self.engines or ()), *([self.bundle] if self.bundle else ())]
        verdict = self.verdict or "verdict: not verified"
        notes = [self.precision_note] if self.precision_note else []
        return "\n".join(map(str, (self.folder, *notes, *self.assumed, verdict, *made)))

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON types."""
        answer: dict[str, Any] = {
            "output": str(self.folder),
            "verdict": self.verdict.to_dict() if self.verdict else None,
            "assumed": list(self.assumed),
            "precision_note": self.precision_note,
            "manifest": self.manifest,
        }
        if self.engines is not None:
            answer["engines"] = [each.to_dict() for each in self.engines]
        if self.triton is not None:
            answer["triton"] = [each.to_dict() for each in self.triton]
        if self.devices:
            answer["bundle"] = self.bundle.to_dict() if self.bundle else None
        return answer


def export(
    model: Any,
    output: str | Path | None = None,
    options: ExportOptions | None = None,
    *,
    progress: Progress = silent,
    **fields: Any,
) -> ExportResult:
    """Export a pruned model to a folder, compare the result with it, and make what is asked of it.

    Args:
        model: An :class:`ExportRequest`, or its first field; the others by name.
        output, options: The request's second and third field.
        progress: Called with a word on each step.

    Returns:
        The folder, the verdict, and what was built. A verdict other than "passed" raises nothing,
        and nothing is built of it: look at ``result.verdict.status``.

    Raises:
        SimpruneError: the model, the destination, the options or the images cannot be used; or
            engines or a bundle cannot be made, and then the export is there all the same.
    """
    request = request_of(ExportRequest, model, fields, output=output, options=options)
    # every check that needs no model comes before the model is loaded
    pruning, hints = request.pruning()
    given = ExportOptions() if request.options is None else request.options
    if not isinstance(given, ExportOptions):
        raise InvalidArgumentError(f"{argument('options')} {given!r} must be ExportOptions")
    named = request.model if isinstance(request.model, (str, Path)) else None
    check_destination(request.folder, request.force, MANIFEST, named)
    targets, devices = targets_and_devices(request.targets) if request.targets else ([], [])
    precise, note = _with_precision(given, devices)
    graph_options = dataclasses.replace(precise, opt_tokens=given.opt_tokens or hints)
    if devices:
        check_destinations(default_output(request.folder, devices), request.force)
    if request.triton:
        check_batch(graph_options.batch)
    if request.engine:
        check_can_build_here(str(graph_options.precision))
    progress("loading PyTorch and the checkpoint")
    pruned, source, words = _pruned(request, pruning)
    found = None
    if request.flops is not None and pruned.config.curve is None:
        pruned, found = calibrated(request, pruned, progress)
    result = _export_folder(request, pruned, graph_options, source, found, progress)
    after = _Afterwards(request, result, targets, devices, progress)
    return dataclasses.replace(
        result,
        checkpoint=words,
        calibrated=found,
        precision_note=note,
        **after.make(),
    )


def _with_precision(options: ExportOptions, devices: list[Target]) -> tuple[ExportOptions, str]:
    """Return the options with a precision, and why it is that one where nobody asked for one.

    There is one file for all targets, so one device that wants float16 decides.
    """
    if options.precision is not None or not devices:
        return options.decided(), ""
    names = ", ".join(short_names(devices))
    note = (
        f"precision: float16, because TensorRT, which builds the engine of {names}, fuses no "
        f"float32 attention; {argument('precision', 'fp32')} for float32"
    )
    return options.decided("fp16"), spelled(note)


def _pruned(
    request: ExportRequest, pruning: dict[str, Any]
) -> tuple[PrunedViT, dict[str, Any], tuple[str, ...]]:
    """Return the model, what the manifest says of its source, and that in words."""
    from simprune_deploy.pruning.model import PrunedViT, prune

    model, source = request.model, request.source
    words: tuple[str, ...] = ()
    if isinstance(model, (str, Path)):
        from simprune_deploy.checkpoints.loading import load_checkpoint

        checkpoint = load_checkpoint(model, request.checkpoint)
        model, words = checkpoint.model, (checkpoint.kind, *checkpoint.notes)
        source = source or {"kind": checkpoint.kind, "notes": list(checkpoint.notes)}
    elif request.checkpoint.given:
        raise for_checkpoints(request.checkpoint)
    if pruning or not isinstance(model, PrunedViT):
        model = prune(model, **pruning)
    return at_wish(request, model), source or {}, words


def _export_folder(
    request: ExportRequest,
    model: PrunedViT,
    options: ExportOptions,
    source: dict[str, Any],
    calibrated: Calibrated | None,
    progress: Progress,
) -> ExportResult:
    from simprune_deploy.common.images import Preprocessing, load_as_taken
    from simprune_deploy.onnx.companions import companions
    from simprune_deploy.onnx.exporter import export_onnx
    from simprune_deploy.onnx.metadata import UINT8_NHWC, read_metadata
    from simprune_deploy.onnx.variants import set_size_hints
    from simprune_deploy.parity.comparison import answers_of_torch, compare_with_torch
    from simprune_deploy.parity.golden import save_golden
    from simprune_deploy.parity.usual_tokens import usual_tokens

    _check_finite(model)
    # pictures first: a wrong folder should not cost the user an export
    pictures = (
        load_as_taken(
            request.images,
            Preprocessing.of_model(model),
            graph_normalizes=options.normalize,
            uint8=options.input == UINT8_NHWC,
        )
        if request.verify
        else None
    )
    progress("tracing and translating to ONNX")
    graph = export_onnx(model, options)
    forms: dict[str, onnx.ModelProto] = {}
    verdict, golden = None, None
    if pictures is not None:
        metadata = read_metadata(graph)
        answered = answers_of_torch(model, metadata, pictures, progress)
        hints = usual_tokens(answered[1], len(pictures.pixels), metadata)
        if hints and not options.opt_tokens:
            set_size_hints(graph, hints)  # before the comparison: what is compared is what ships
        forms = companions(graph, options)
        verdict, golden = compare_with_torch(
            graph, model, pictures, progress, forms=forms, answered=answered
        )
    progress("writing")
    with staged_folder(request.folder, request.force, MANIFEST) as staging:
        (staging / MODEL).write_bytes(graph.SerializeToString())
        if verdict is not None and golden is not None:
            write_json(staging / PARITY, verdict.to_dict())
            save_golden(staging / GOLDEN, golden)
            for name, form in forms.items():
                if verdict.check(COMPANIONS[name]).passed:  # one that differs is not kept
                    (staging / name).write_bytes(form.SerializeToString())
        manifest = _manifest(graph, staging, verdict, source)
        if calibrated is not None:
            manifest["calibration"] = calibrated.to_dict()
        write_json(staging / MANIFEST, manifest)
    return ExportResult(request.folder, manifest, verdict)


@dataclasses.dataclass(frozen=True)
class _Afterwards:
    """What is made of an export that passed; whatever fails, the export stays."""

    request: ExportRequest
    result: ExportResult
    targets: list[Target]
    devices: list[Target]
    progress: Progress

    def make(self) -> dict[str, Any]:
        """Return fields of :class:`ExportResult`."""
        request, folder, passed = self.request, self.result.folder, self.result.accepted
        engines: list[BuiltEngine] = []
        served: list[TritonModel] = []
        if request.triton and passed:
            self.progress("writing the Triton repository")
            served.append(write_repository(folder))
        wants_engines = bool(self.targets or request.engine)
        if wants_engines and passed:
            engines = self._engines()
            if request.triton and request.engine:
                served.append(serve_engine(folder, engines[-1]))
        return {
            "engines": tuple(engines) if wants_engines else None,
            "triton": tuple(served) if request.triton else None,
            "bundle": self._bundle() if self.devices and passed else None,
            "devices": tuple(each.name for each in self.devices),
        }

    def _engines(self) -> list[BuiltEngine]:
        folder, request = self.result.folder, self.request
        engines = []
        try:
            if self.targets:
                engines += build_ahead(
                    folder, self.targets, per_target=request.per_target, progress=self.progress
                )
            if request.engine:
                engines.append(build_here(folder, progress=self.progress))
            return engines
        except SimpruneError as error:
            raise error.with_note(
                f"(the export in {folder} is complete; `simprune-deploy build {folder}` builds "
                "its engines)"
            ) from error

    def _bundle(self) -> DeviceBundle:
        folder, request = self.result.folder, self.request
        try:
            return make_bundle(folder, self.devices, force=request.force, progress=self.progress)
        except SimpruneError as error:
            names = ",".join(target.name for target in self.devices)
            raise error.with_note(
                f"(the export in {folder} is complete; `simprune-deploy bundle {folder} "
                f"--target {names}` makes its bundle)"
            ) from error


def _check_finite(model: PrunedViT) -> None:
    import torch

    for name, tensor in model.vit.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"the weight {name} holds NaN or infinity: train or load it again"
            )


def _manifest(
    graph: onnx.ModelProto, folder: Path, verdict: Verdict | None, source: dict[str, Any]
) -> dict[str, Any]:
    from simprune_deploy.onnx.metadata import describe_value, read_metadata

    packages = ("torch", "timm", "onnx", "onnxscript", "onnxruntime", "polygraphy")
    return {
        "format": FORMAT,
        "verdict": verdict.status if verdict else UNVERIFIED,
        "model": read_metadata(graph).to_dict(),
        "inputs": [describe_value(value) for value in graph.graph.input],
        "outputs": [describe_value(value) for value in graph.graph.output],
        "source": source,
        "versions": {
            "simprune-deploy": __version__,
            **{name: package_version(name) for name in packages},
        },
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in sorted(folder.iterdir())
        },
    }
