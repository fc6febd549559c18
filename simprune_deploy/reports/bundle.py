"""What is printed of a bundle for devices."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from rich.console import Console

from simprune_deploy.reports.terminal import print_facts

if TYPE_CHECKING:
    from simprune_deploy.deploy.bundle.packing import DeviceBundle


def print_bundle(bundle: DeviceBundle) -> None:
    """Print where a bundle is, what the devices take of it, and how far it was checked."""
    about = bundle.manifest["bundle"]
    facts: dict[str, Any] = {
        "bundle": bundle.folder,
        "archive": f"{bundle.archive} ({bundle.archive.stat().st_size / 1e6:.1f} MB)",
    }
    for target in about["targets"]:
        facts[target["name"]] = (
            "; ".join(f"{each['system']}: {_takes(each)}" for each in target["releases"])
            or "what is installed there; the plugin is compiled there"
        )
    facts["verdict"] = bundle.manifest["verdict"]
    facts["checked"] = "; ".join(f"{each['what']} {each['found']}" for each in about["checked"])
    facts["not checked"] = "; ".join(about["not_checked"])
    facts["engine"] = about["engine"]
    facts["on the device"] = f"tar -xzf {shlex.quote(bundle.archive.name)}, then its README.md"
    print_facts(Console(), facts)


def _takes(release: dict[str, Any]) -> str:
    if release["model"] is None:
        return "its TensorRT is too old"
    plugin = "the compiled plugin" if release["library"] else "the plugin is compiled there"
    return f"{release['model']}, {plugin}"
