"""``build`` as a function: engines of an exported folder, and a Triton repository of one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simprune_deploy.common.errors import InvalidArgumentError, argument
from simprune_deploy.common.progress import Progress, silent
from simprune_deploy.common.requests import request_of
from simprune_deploy.deploy.triton import TritonModel, serve_engine
from simprune_deploy.engine.build import BuiltEngine, EngineOptions
from simprune_deploy.engine.builders import check_targets
from simprune_deploy.engine.folder_engines import build_ahead, build_here
from simprune_deploy.engine.targets import Target, find_targets


@dataclasses.dataclass(frozen=True)
class BuildRequest:
    """Which engines to build of an exported folder.

    Args:
        folder: A folder that :func:`simprune_deploy.export` wrote.
        targets: Names of GPUs, for TensorRT-RTX engines built ahead of time. Default (): a
            TensorRT engine for the GPU of this machine.
        per_target: One engine for each target. Default False: one for all of them.
        plugin: Library of the TensorRT plugin. Default None: the folder's, SIMPRUNE_LIBRARY's, or
            one compiled now.
        use_plugin: False: let TensorRT compile the function in the file. Default True.
        options: Batches, workspace, force. Default None: :class:`EngineOptions`'s defaults.
        triton: Write the engine into the folder's Triton model repository too. Default False.

    Raises:
        InvalidArgumentError: the arguments contradict each other.
    """

    folder: str | Path
    targets: Sequence[str] = ()
    per_target: bool = False
    plugin: str | Path | None = None
    use_plugin: bool = True
    options: EngineOptions | None = None
    triton: bool = False

    def __post_init__(self) -> None:
        plugin, without = argument("plugin"), argument("use_plugin", False)
        if self.per_target and not self.targets:
            raise says_how_to_build()
        if self.plugin is not None and not self.use_plugin:
            raise InvalidArgumentError(f"{without} and {plugin} contradict each other: drop one")
        if self.targets and (self.plugin is not None or not self.use_plugin):
            raise InvalidArgumentError(
                f"{plugin} and {without} are for TensorRT, and {argument('targets')} builds with "
                "TensorRT-RTX, which takes no plugins: drop one"
            )
        if self.triton and self.targets:
            raise InvalidArgumentError(
                f"{argument('triton', True)} serves TensorRT's engines, and {argument('targets')} "
                "builds TensorRT-RTX's, which Triton cannot load: leave "
                f"{argument('targets')} out on the machine that serves"
            )


def says_how_to_build() -> InvalidArgumentError:
    """Return the error of ``per_target`` without targets."""
    return InvalidArgumentError(
        f"{argument('per_target', True)} says how to build for {argument('targets')}: name the "
        "targets"
    )


@dataclasses.dataclass(frozen=True)
class BuildResult:
    """The engines that there are now.

    Attributes:
        engines: In the order of the targets.
        triton: The models in the Triton repository; None if none was asked for.
    """

    engines: tuple[BuiltEngine, ...]
    triton: tuple[TritonModel, ...] | None = None

    def __str__(self) -> str:
        return "\n".join(map(str, self.engines))

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON types."""
        answer: dict[str, Any] = {"engines": [each.to_dict() for each in self.engines]}
        if self.triton is not None:
            answer["triton"] = [each.to_dict() for each in self.triton]
        return answer


def build(
    folder: BuildRequest | str | Path, *, progress: Progress = silent, **fields: Any
) -> BuildResult:
    """Build engines of an exported folder: for the GPU here, or ahead of time for other GPUs.

    Args:
        folder: A :class:`BuildRequest`, or its first field; the others by name.
        progress: Called with a word on each step.

    Raises:
        SimpruneError: the folder is damaged or its parity check failed; TensorRT, the GPU or the
            plugin's library is missing or does not fit; or an engine cannot be built.
    """
    request = request_of(BuildRequest, folder, fields)
    place, options = Path(request.folder), request.options
    if request.targets:
        targets = targets_built_here(request.targets)
        engines = build_ahead(
            place, targets, per_target=request.per_target, options=options, progress=progress
        )
        return BuildResult(tuple(engines))
    engine = build_here(
        place,
        plugin=request.plugin,
        use_plugin=request.use_plugin,
        options=options,
        progress=progress,
    )
    if not request.triton:
        return BuildResult((engine,))
    progress("writing the Triton repository")
    force = options is not None and options.force
    served = serve_engine(place, engine, plugin=request.plugin, force=force)
    return BuildResult((engine,), (served,))


def targets_built_here(names: Sequence[str]) -> list[Target]:
    """Return targets by name; refuse here, before any work, what cannot be built here.

    Raises:
        SimpruneError: a name is unknown, or its engine is built elsewhere.
    """
    targets = find_targets(names)
    check_targets(targets)
    return targets


def targets_and_devices(names: Sequence[str]) -> tuple[list[Target], list[Target]]:
    """Return the targets whose engines are built here, and those that take a bundle.

    Raises:
        SimpruneError: a name is unknown, or there is nothing here to build its engine with.
    """
    from simprune_deploy.deploy.bundle.packing import check_targets as check_devices

    targets = find_targets(names)
    devices = [target for target in targets if not target.built_here]
    check_devices(devices)
    here = [target.name for target in targets if target.built_here]
    return targets_built_here(here) if here else [], devices
