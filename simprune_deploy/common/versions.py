"""The version of this package, and those of others."""

from __future__ import annotations

import importlib.metadata
import re

__version__ = "0.1.0"


def package_version(package: str) -> str | None:
    """Return the installed version of a package or of its ``-gpu`` twin, or None."""
    for name in (package, f"{package}-gpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def version_numbers(text: str) -> tuple[int, ...]:
    """Return the numbers that a version begins with: (10, 16) of "10.16 or later".

    Raises:
        ValueError: it begins with none.
    """
    match = re.match(r"\d+(\.\d+)*", text)
    if match is None:
        raise ValueError(f"{text!r} is no version")
    return tuple(int(part) for part in match[0].split("."))


def is_older(version: str, minimum: str) -> bool:
    """Compare the numbers at the start of versions; one without numbers counts as new enough."""
    try:
        mine, oldest = version_numbers(version), version_numbers(minimum)
    except ValueError:
        return False
    length = max(len(mine), len(oldest))  # 10 is as new as 10.0
    return mine + (0,) * (length - len(mine)) < oldest + (0,) * (length - len(oldest))


def same_version(one: str, other: str) -> bool:
    """Compare versions as far as both tell them: 10.3.0 and 10.3.0.30 are the same."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return all(mine == theirs for mine, theirs in pairs)


def major(version: str | None) -> int | None:
    """Return the first number of a version, None where it has none."""
    try:
        return version_numbers(version or "")[0]
    except ValueError:
        return None
