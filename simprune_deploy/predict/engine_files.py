"""Which engines run a model: those of its folder that fit this machine, or built like them."""

from __future__ import annotations

from pathlib import Path

from simprune_deploy.common.progress import Progress, silent
from simprune_deploy.engine import flavours
from simprune_deploy.engine.build import EngineOptions, build_engine
from simprune_deploy.engine.builders import like
from simprune_deploy.engine.gpu import find_gpu
from simprune_deploy.engine.inventory import engine_to_verify
from simprune_deploy.engine.libraries import find_library
from simprune_deploy.onnx.exported_folder import MODEL
from simprune_deploy.predict.engine_predictor import EngineSpec
from simprune_deploy.predict.source import ModelSource, source_of_export


def shipped_engine(
    target: Path, plugin: Path | None = None, progress: Progress = silent
) -> tuple[EngineSpec, ModelSource]:
    """Return the engine that ships, with one of the same graph that shows its decisions.

    Args:
        target: An exported folder, whose engine for this machine is taken, or an engine of one.
        plugin: The library of the plugin that is in the engine. Default: looked for.
        progress: Called with a word on each step of a build.

    Returns:
        What opens them, and the export that they are of.

    Raises:
        SimpruneError: no engine fits this machine, or the one that shows its decisions cannot be
            built.
    """
    found, folder = engine_to_verify(target, plugin)
    metadata = found.metadata
    assert metadata is not None
    # before anything imports Polygraphy, which then chooses between the flavours
    flavours.choose_for_polygraphy(metadata.flavour)
    source = source_of_export(folder)
    home = found.path.absolute().parent.parent
    library = find_library(home, plugin) if metadata.plugin is not None else None
    gpu = find_gpu()
    showing = build_engine(
        home / MODEL,
        like(metadata, gpu, library),
        EngineOptions.like(metadata),
        of="diagnosis",
        progress=progress,
    )
    name = f"{gpu.name} (SM {gpu.compute_capability[0]}.{gpu.compute_capability[1]})"
    spec = EngineSpec(found.path, source.metadata, showing=showing.path, plugin=library, gpu=name)
    return spec, source
