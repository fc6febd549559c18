"""A compiled library for a device that is not at hand: can it work there?

What NVIDIA says (CUDA Compatibility): a driver runs what was compiled with its own CUDA version or
an older one, and with a newer minor version of the same major one. For a newer major version it
needs the forward compatibility package, which a Jetson does not have as it is flashed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from simprune_deploy.common.errors import ArtifactError, argument
from simprune_deploy.common.versions import __version__, version_numbers
from simprune_deploy.engine.targets import Release, Target
from simprune_deploy.pruning.kernel_library import LibraryInfo, read_info


@dataclasses.dataclass(frozen=True)
class Fit:
    """Whether a library runs on a release of a device's system.

    Attributes:
        runs: None: not known.
        why: In words.
    """

    runs: bool | None
    why: str


def check_library(path: Path, targets: Sequence[Target]) -> LibraryInfo:
    """Read a library and refuse one that cannot work on some target.

    Raises:
        SimpruneError: it has no plugin, is of another version, for another processor or GPU, or
            its CUDA is too new for every system that a target has.
    """
    info = read_info(path)
    if info.kind != "plugin" or info.tensorrt_headers is None or info.cuda is None:
        raise ArtifactError(
            f"{path} has no TensorRT plugin in it ({info.kind}): name libsimprune_plugin.so"
        )
    if info.version != __version__:
        raise ArtifactError(
            f"{path} is of version {info.version}, and this is {__version__}: build it again"
        )
    for target in targets:
        _check_target(path, info, target)
    return info


def _check_target(path: Path, info: LibraryInfo, target: Target) -> None:
    cpu = target.facts["cpu"].value
    if info.machine != cpu:
        how = "plugin build --cross aarch64" if cpu == "aarch64" else "plugin build"
        raise ArtifactError(
            f"{path} is for {info.machine}, and {target.name} is {cpu}: build one for it with "
            f"`simprune-deploy {how}`, or leave {argument('plugin')} out, and it is compiled on "
            f"the device"
        )
    sm = sm_of(target)
    if sm is None:
        raise ArtifactError(
            f"{target.name}: its compute capability is unknown, so no library can be held against "
            f"it: leave {argument('plugin')} out, and the library is compiled on the device"
        )
    if sm not in info.device_code.sms:
        raise ArtifactError(
            f"{path} has GPU code for {info.device_code}, and {target.name} is SM {sm}: build it "
            f"with {argument('arch')} {sm}"
        )
    fits = [fit(info, release) for release in target.releases]
    if fits and all(each.runs is False for each in fits):
        raise ArtifactError(
            f"{path} does not run on {target.name}: {fits[-1].why}: build it with an older CUDA, "
            f"or leave {argument('plugin')} out, and it is compiled on the device"
        )


def sm_of(target: Target) -> str | None:
    """Return a target's GPU architecture as compilers call it, such as "87", or None: unknown."""
    capability = target.compute_capability
    return None if capability is None else f"{capability[0]}{capability[1]}"


def fit(info: LibraryInfo, release: Release) -> Fit:
    """Say whether a library's CUDA fits a release of a device's system."""
    assert info.cuda is not None
    own = version_numbers(info.cuda)[:2]
    name = ".".join(map(str, own))
    if release.cuda is None:
        return Fit(None, f"the CUDA version of {release.system} is not known, the library's {name}")
    there = f"{release.system} has CUDA {release.cuda}"
    device = version_numbers(release.cuda)[:2]
    if own[0] > device[0]:
        return Fit(False, f"compiled with CUDA {name}; {there}, which is older")
    if own > device:
        return Fit(True, f"compiled with CUDA {name}; {there}, of the same major version")
    return Fit(True, f"compiled with CUDA {name}; {there}")
