"""Print what a set of extras installs, so that an image layer holds it apart from the project.

    python docker/requirements.py cpu export > requirements.txt

Python 3.11 or later, standard library only.
"""

from __future__ import annotations

import sys
from pathlib import Path

import tomllib

PROJECT = Path(__file__).parent.parent / "pyproject.toml"


def requirements(extras: list[str]) -> list[str]:
    """Return the project's requirements and those of its extras, sorted."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    known = project["optional-dependencies"]
    if unknown := sorted(set(extras) - set(known)):
        sys.exit(f"error: pyproject.toml has no extra {', '.join(unknown)}")
    lists = [project["dependencies"], *(known[extra] for extra in extras)]
    return sorted({each for found in lists for each in found})


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:])))
