"""The version of this package, and those of others."""

from __future__ import annotations

import importlib.metadata

__version__ = "0.1.0"


def package_version(package: str) -> str | None:
    """Return the installed version of a package or of its ``-gpu`` twin, or None."""
    for name in (package, f"{package}-gpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
