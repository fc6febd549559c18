"""The ``trtexec`` line that does what a build does, for those who prefer it."""

from __future__ import annotations

import shlex
from collections.abc import Collection
from pathlib import Path

from simprune_deploy.engine.engine_metadata import TENSORRT, Profile
from simprune_deploy.engine.flavours import needs_strong_typing_flag


def trtexec_line(
    version: str | None,
    graph: Path,
    engine: Path,
    profile: Profile,
    free: Collection[str],
    *,
    plugin: Path | None = None,
    workspace_mib: int | None = None,
    timing_cache: Path | None = None,
) -> str:
    """Return the line for a shell, of NVIDIA's ``trtexec`` of the same TensorRT.

    Args:
        version: TensorRT's; ``--stronglyTyped`` belongs to 10, and 11 always is. None: a line for
            both, since 11 takes the flag and ignores it.
        graph: The ONNX file to parse.
        engine: The file to write.
        profile: As in the metadata.
        free: The inputs with a free dimension. Shapes are given for these alone: trtexec refuses
            them for a graph without any, and takes 1 for a free dimension that it is not told.
        plugin: The plugin's library. None: the graph needs none.
        workspace_mib: The limit on the workspace. None: no limit.
        timing_cache: The file of earlier timings. None: without.
    """
    parts = ["trtexec", f"--onnx={graph}", f"--saveEngine={engine}"]
    if plugin is not None:
        parts.append(f"--dynamicPlugins={plugin}")
    if version is None or needs_strong_typing_flag(TENSORRT, version):
        parts.append("--stronglyTyped")
    parts.append("--noTF32")
    told = {name: each for name, each in profile.items() if name in free}
    for which in ("min", "opt", "max") if told else ():
        shapes = [f"{name}:{'x'.join(map(str, each[which]))}" for name, each in told.items()]
        parts.append(f"--{which}Shapes={','.join(shapes)}")
    if workspace_mib is not None:
        parts.append(f"--memPoolSize=workspace:{workspace_mib}")
    if timing_cache is not None:
        parts.append(f"--timingCacheFile={timing_cache}")
    return shlex.join([*parts, "--skipInference"])
