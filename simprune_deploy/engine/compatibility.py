"""Whether an engine fits a machine: its GPU, its TensorRT, its driver and the plugin's library."""

from __future__ import annotations

import dataclasses

from simprune_deploy.common.errors import ArtifactError, argument, spelled
from simprune_deploy.common.versions import same_version, version_numbers
from simprune_deploy.engine.engine_metadata import NAMES, TENSORRT, Capability, EngineMetadata


@dataclasses.dataclass(frozen=True)
class Here:
    """What an engine would be loaded by.

    Attributes:
        flavour: "tensorrt" or "tensorrt-rtx".
        version: Its version; None if it is not installed.
        compute_capability: The GPU's; None if there is none.
        cuda: The CUDA version that the GPU's driver knows; None if there is none.
        plugin: SHA-256 of the plugin's library that would be loaded; None: none would be.
    """

    flavour: str
    version: str | None
    compute_capability: Capability | None
    cuda: str | None = None
    plugin: str | None = None


def check_fits(metadata: EngineMetadata, here: Here) -> None:
    """Refuse an engine that this machine cannot load or would load wrongly.

    Raises:
        SimpruneError: with what it was built for, what is here, and the way out.
    """
    problem = misfit(metadata, here)
    if problem is not None:
        raise ArtifactError(f"{metadata.engine.file} {problem}")


def misfit(metadata: EngineMetadata, here: Here) -> str | None:
    """Return why an engine does not fit a machine, as the end of a sentence; None if it does."""
    built = f"was built for SM {', '.join(metadata.compute_capabilities)} with {metadata.title}"
    again = f"run `{_build_command(metadata)}`"
    if here.flavour != metadata.flavour:
        return f"{built}, and {NAMES[here.flavour]} cannot load it"
    if here.version is None:
        return f"{built}, and {NAMES[here.flavour]} is not installed here"
    if here.compute_capability is None:
        return f"{built}, and no GPU was found here"
    mine = f"{here.compute_capability[0]}.{here.compute_capability[1]}"
    if mine not in metadata.compute_capabilities or not same_version(
        metadata.version, here.version
    ):
        return f"{built}; this is SM {mine} with {here.version}: {again}"
    if (
        metadata.cuda
        and here.cuda
        and version_numbers(here.cuda)[0] < version_numbers(metadata.cuda)[0]
    ):
        return f"{built} and CUDA {metadata.cuda}; this driver knows CUDA {here.cuda}: {again}"
    if metadata.plugin is not None and here.plugin != metadata.plugin.sha256:
        name = metadata.plugin.file
        if here.plugin is None:
            return spelled(
                f"has the plugin of {name} in it, and no library was found: name it "
                f"({argument('plugin')})"
            )
        return spelled(
            f"was built with another {name} (SHA-256 {metadata.plugin.sha256[:12]}...) than the "
            f"library here ({here.plugin[:12]}...): name that one ({argument('plugin')}), or "
            f"{again}"
        )
    return None


def _build_command(metadata: EngineMetadata) -> str:
    if metadata.flavour == TENSORRT:
        return "simprune-deploy build FOLDER"
    return f"simprune-deploy build FOLDER --target {','.join(metadata.targets) or 'NAME'}"
