"""What is installed, what is missing, whether it fits together, and what puts it right."""

from __future__ import annotations

from pathlib import Path

from simprune_deploy.deploy.doctor.findings import Finding, all_needed_present
from simprune_deploy.deploy.doctor.libraries import (
    examine_folder,
    examine_named_library,
    examine_tools,
)
from simprune_deploy.deploy.doctor.machine import Machine, examine_machine, gather
from simprune_deploy.deploy.doctor.packages import examine_packages
from simprune_deploy.engine.engine_metadata import TENSORRT, TENSORRT_RTX

__all__ = ["Finding", "Machine", "all_needed_present", "examine"]


def examine(folder: str | Path | None = None, machine: Machine | None = None) -> list[Finding]:
    """Look for everything this project can use, and return one finding for each.

    Args:
        folder: An exported folder whose plugin and engines are held against this machine.
            Default: none.
        machine: Where to look. Default: here.

    Raises:
        SimpruneError: `folder` is not a folder.
    """
    machine = machine or Machine()
    packages = examine_packages()
    facts = gather(machine)
    modules = {TENSORRT: "tensorrt", TENSORRT_RTX: "tensorrt_rtx"}
    versions = {
        flavour: each.version
        for flavour, module in modules.items()
        for each in packages
        if each.name == module and each.state == "ok"
    }
    return [
        *packages,
        *examine_machine(machine, facts),
        *examine_tools(machine),
        *examine_named_library(facts, versions.get(TENSORRT, "")),
        *(examine_folder(Path(folder), facts, versions) if folder is not None else ()),
    ]
