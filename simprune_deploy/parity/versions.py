"""Versions of what took part in a proof."""

from __future__ import annotations

import importlib.metadata


def package_version(package: str) -> str | None:
    """Return the installed version of a package or of its ``-gpu`` twin, or None."""
    for name in (package, f"{package}-gpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
