"""What builds an engine, and for which GPUs: TensorRT-RTX ahead of time, TensorRT on the device.

Everything that can be refused is refused here, before any work.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from simprune_deploy.common.errors import (
    InvalidArgumentError,
    RequirementError,
    SimpruneError,
    argument,
)
from simprune_deploy.common.files import sha256
from simprune_deploy.common.progress import Progress, silent
from simprune_deploy.engine import flavours
from simprune_deploy.engine.compatibility import Here
from simprune_deploy.engine.engine_metadata import (
    TENSORRT,
    TENSORRT_RTX,
    Capability,
    EngineMetadata,
)
from simprune_deploy.engine.gpu import Gpu, NoGpuError, find_gpu
from simprune_deploy.engine.libraries import (
    PREBUILT,
    check_library,
    find_library,
    make_library,
)
from simprune_deploy.engine.targets import Target


@dataclasses.dataclass(frozen=True)
class Builder:
    """What builds, and for what.

    Attributes:
        flavour, version: Of TensorRT.
        compute_capabilities: The GPUs that the engine is for.
        targets: Their names in targets.json, if they were named.
        gpu: The GPU here, where it is tuned. None: it is built without one.
        plugin: The plugin's library. None: the graph needs none, or its function is compiled.
    """

    flavour: str
    version: str
    compute_capabilities: tuple[Capability, ...]
    targets: tuple[str, ...] = ()
    gpu: Gpu | None = None
    plugin: Path | None = None

    @property
    def title(self) -> str:
        """The GPUs, for messages."""
        return ", ".join(f"SM {major}.{minor}" for major, minor in self.compute_capabilities)

    def engine_name(self, of: str) -> str:
        """Return the file to write: ``model-rtx-sm89.engine``, ``model-dense-trt-sm87.engine``."""
        kind = "" if of == "pruned" else f"-{of}"
        flavour = "trt" if self.flavour == TENSORRT else "rtx"
        names = "-".join(f"sm{major}{minor}" for major, minor in self.compute_capabilities)
        return f"model{kind}-{flavour}-{names}.engine"


def check_targets(targets: Sequence[Target]) -> str:
    """Refuse what cannot be built here, before any work; return TensorRT-RTX's version.

    Raises:
        SimpruneError: a target's engine is built on the device, or TensorRT-RTX is missing, broken
            or too old for a target.
    """
    for target in targets:
        if not target.built_here:
            raise InvalidArgumentError(
                f"{target.name}: its engine is built on the device, by its own TensorRT: "
                f"`simprune-deploy bundle FOLDER --target {target.name}` packs what goes there"
            )
    trt = flavours.load_module(TENSORRT_RTX)
    for target in targets:
        major, minor = _capability(target)
        if not hasattr(trt.ComputeCapability, f"SM{major}{minor}"):
            raise RequirementError(
                f"{target.name}: tensorrt_rtx {trt.__version__} does not know SM {major}.{minor}: "
                f"{flavours.install_command(TENSORRT_RTX)} --upgrade"
            )
    return str(trt.__version__)


def ahead_of_time(targets: Sequence[Target], per_target: bool = False) -> list[Builder]:
    """Return what builds for targets whose engines can be built on another machine.

    Args:
        targets: From :func:`simprune_deploy.engine.targets.find_targets`.
        per_target: One engine for each target. Default: one for all of them.

    Raises:
        SimpruneError: as :func:`check_targets`.
    """
    version = check_targets(targets)
    builders = []
    for group in [[each] for each in targets] if per_target else [list(targets)]:
        group.sort(key=_capability)  # so that the order asked for makes no other engine
        capabilities = tuple(sorted({_capability(target) for target in group}))
        names = tuple(target.name for target in group)
        builders.append(Builder(TENSORRT_RTX, version, capabilities, names))
    return builders


def for_this_gpu(
    folder: Path | None,
    *,
    plugin: Path | None = None,
    use_plugin: bool = True,
    progress: Progress = silent,
) -> Builder:
    """Return what builds with TensorRT for the GPU of this machine.

    Args:
        folder: The exported folder, in whose ``plugin`` the library is, or is put where it has to
            be compiled first.
        plugin: The plugin's library. Default: the folder's, or SIMPRUNE_LIBRARY's, or compiled.
        use_plugin: False: let TensorRT compile the graph's own function. Default True.
        progress: Called with a word on each step.

    Raises:
        SimpruneError: TensorRT is missing or too old, there is no GPU, or no library that fits.
    """
    trt = flavours.load_module(TENSORRT)
    gpu = find_gpu()
    library = None
    if use_plugin:
        library = find_library(folder, plugin)
        if folder is not None and (library is None or not _fits(library, folder, gpu)):
            library = make_library(folder, progress)
        if library is not None:
            check_library(library, gpu)
    return Builder(
        TENSORRT, str(trt.__version__), (gpu.compute_capability,), gpu=gpu, plugin=library
    )


def _fits(library: Path, folder: Path, gpu: Gpu) -> bool:
    """Whether a library that came along can be used; of another the user is told why it cannot."""
    if library != folder / PREBUILT:
        return True
    try:
        check_library(library, gpu)
    except SimpruneError:
        return False
    return True


def like(metadata: EngineMetadata, gpu: Gpu, plugin: Path | None) -> Builder:
    """Return what builds another engine as one that is there was built, for the GPU here.

    Args:
        metadata: What is known of that engine, which fits this machine.
        gpu: The GPU here.
        plugin: The library whose plugin is in that engine. None: none is.
    """
    return Builder(
        metadata.flavour,
        metadata.version,
        (gpu.compute_capability,),
        gpu=gpu if metadata.flavour == TENSORRT else None,
        plugin=plugin,
    )


def this_machine(flavour: str, plugin: Path | None) -> Here:
    """Return what an engine of a flavour would be loaded by on this machine.

    Args:
        flavour: The engine's.
        plugin: The library whose plugin would be loaded. None: none would be.

    Raises:
        SimpruneError: the library cannot be read.
    """
    gpu, version = None, None
    with contextlib.suppress(NoGpuError):
        gpu = find_gpu()
    with contextlib.suppress(SimpruneError):
        version = str(flavours.load_module(flavour).__version__)
    return Here(
        flavour,
        version,
        gpu.compute_capability if gpu else None,
        gpu.cuda if gpu else None,
        sha256(plugin) if plugin is not None and plugin.is_file() else None,
    )


def check_precision(precision: str, builder: Builder) -> None:
    """Refuse a precision that a GPU does not have.

    Raises:
        SimpruneError: with the GPU and what it has.
    """
    for major, minor in builder.compute_capabilities:
        if precision == "bf16" and major < 8:
            raise RequirementError(
                f"SM {major}.{minor} has no bfloat16, which begins with SM 8.0: export with "
                f"{argument('precision', 'fp16')} or fp32"
            )


def _capability(target: Target) -> Capability:
    capability = target.compute_capability
    if capability is None:
        raise InvalidArgumentError(f"{target.name}: its compute capability is unknown")
    return capability
