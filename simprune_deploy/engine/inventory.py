"""The engines of an exported folder, and which of them fits this machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simprune_deploy.common.errors import ArtifactError, InvalidArgumentError, SimpruneError
from simprune_deploy.common.files import sha256
from simprune_deploy.engine import ENGINE_SUFFIX, ENGINES
from simprune_deploy.engine.builders import this_machine
from simprune_deploy.engine.compatibility import Here, misfit
from simprune_deploy.engine.engine_metadata import NAMES, EngineMetadata, read_engine_metadata
from simprune_deploy.engine.libraries import find_library
from simprune_deploy.onnx.exported_folder import MANIFEST


@dataclasses.dataclass(frozen=True)
class FoundEngine:
    """An engine that lies somewhere.

    Attributes:
        path: The file.
        metadata: What its metadata says; None if that cannot be read.
        problem: Why it cannot be used here, as a sentence; None if it can.
    """

    path: Path
    metadata: EngineMetadata | None
    problem: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as JSON types, with whether it fits this machine."""
        metadata = self.metadata.to_dict() if self.metadata else {}
        return {**metadata, "fits_this_machine": self.problem is None, "problem": self.problem}


def examine_engine(path: Path, plugin: Path | None = None) -> FoundEngine:
    """Read what an engine is, and whether it fits this machine and the model beside it.

    Args:
        path: The engine file.
        plugin: The plugin's library. Default: looked for as ``build`` does.
    """
    try:
        metadata = read_engine_metadata(path)
        problem = misfit(metadata, _here(metadata, path, plugin))
    except SimpruneError as error:
        return FoundEngine(path, None, str(error))
    if problem is not None:
        return FoundEngine(path, metadata, f"{path.name} {problem}")
    model = path.parent.parent / metadata.onnx.file
    if model.is_file() and sha256(model) != metadata.onnx.sha256:
        return FoundEngine(
            path,
            metadata,
            f"{path.name} was built from another {model.name} than {model}: build again",
        )
    return FoundEngine(path, metadata, None)


def _here(metadata: EngineMetadata, path: Path, plugin: Path | None) -> Here:
    library = None
    if metadata.plugin is not None:
        library = find_library(path.parent.parent, plugin)
    return this_machine(metadata.flavour, library)


def engines_in(folder: Path, plugin: Path | None = None) -> list[FoundEngine]:
    """Return the engines of an exported folder, by name."""
    paths = sorted((folder / ENGINES).glob(f"*{ENGINE_SUFFIX}"))
    return [examine_engine(path, plugin) for path in paths if not path.name.startswith(".")]


def pruned_engine_in(
    folder: Path, plugin: Path | None = None, flavours: Sequence[str] = tuple(NAMES)
) -> tuple[Path, EngineMetadata] | None:
    """Return the first engine of the pruned model that fits this machine; None if there is none.

    Args:
        folder: The exported folder.
        plugin: The plugin's library. Default: looked for as ``build`` does.
        flavours: Which engines count. Default: TensorRT's and TensorRT-RTX's.
    """
    for found in engines_in(folder, plugin):
        known = found.metadata
        if found.problem is not None or known is None:
            continue
        if known.of == "pruned" and known.flavour in flavours:
            return found.path, known
    return None


def choose_engine(folder: Path, plugin: Path | None = None) -> FoundEngine:
    """Return the engine of a folder's model that fits this machine.

    Raises:
        SimpruneError: there is none, or several, with the reasons.
    """
    found = [each for each in engines_in(folder, plugin) if _is_of_the_model(each)]
    fitting = [each for each in found if each.problem is None]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(str(each.path) for each in fitting)
        raise InvalidArgumentError(f"several engines fit this machine: name one of {names}")
    if not found:
        raise ArtifactError(f"{folder} has no engines: `simprune-deploy build {folder}` makes one")
    problems = "; ".join(f"{each.problem}" for each in found)
    raise ArtifactError(f"no engine in {folder / ENGINES} can be used here: {problems}")


def _is_of_the_model(found: FoundEngine) -> bool:
    return found.metadata is None or found.metadata.of == "pruned"


def engine_to_verify(target: Path, plugin: Path | None) -> tuple[FoundEngine, Path]:
    """Return the engine that is meant, which fits this machine, and its exported folder.

    Raises:
        SimpruneError: there is none.
    """
    if target.suffix != ENGINE_SUFFIX:
        folder = target if target.is_dir() else target.parent
        return choose_engine(folder, plugin), folder
    found = examine_engine(target, plugin)
    folder = target.absolute().parent.parent
    if found.problem is not None:
        raise ArtifactError(found.problem)
    if found.metadata is not None and found.metadata.of != "pruned":
        raise InvalidArgumentError(
            f"{target} is the engine of another form of the model "
            f"({found.metadata.of}), and only the pruned model's is verified"
        )
    if not (folder / MANIFEST).is_file():
        raise ArtifactError(f"{target} is not in the engines of an exported folder: put it there")
    return found, folder
