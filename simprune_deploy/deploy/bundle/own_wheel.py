"""A wheel of the simprune-deploy that is running, so that the device needs no checkout."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipInfo

from simprune_deploy.common.errors import RequirementError
from simprune_deploy.common.versions import __version__
from simprune_deploy.engine.plugin.build import source_files

DISTRIBUTION = "simprune-deploy"
EXTRAS = ("cpu", "engine")
"""What the device needs beside the package's own requirements: ONNX Runtime, CUDA's bindings."""

SOURCE = "simprune_deploy/engine/plugin/source"
INSTALL = "pip install 'simprune-deploy[bundle]'"
_EARLIEST = (1980, 1, 1, 0, 0, 0)  # what a zip archive can hold: the same bytes at any time


def write_own_wheel(folder: Path) -> Path:
    """Write a wheel of the running installation, editable or not, and return its path.

    The same installation gives the same bytes.

    Raises:
        SimpruneError: simprune-deploy was not installed but only found on the path, its metadata
            is another version's, or the package ``wheel`` is missing.
    """
    try:
        from wheel.wheelfile import WheelFile
    except ImportError:
        raise RequirementError(
            f"wheel, which packs simprune-deploy, is missing: {INSTALL}"
        ) from None

    class Reproducible(WheelFile):
        """A wheel in which no time and no umask of this machine is left."""

        def writestr(self, name: Any, data: Any, compress_type: int | None = None) -> None:
            entry = name if isinstance(name, ZipInfo) else ZipInfo(name, _EARLIEST)
            entry.external_attr = (0o644 | stat.S_IFREG) << 16
            super().writestr(entry, data, ZIP_DEFLATED)

    about = _metadata()
    version = __version__
    name = DISTRIBUTION.replace("-", "_")
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with Reproducible(path, "w") as wheel:
        for inside, file in sorted(package_files().items()):
            wheel.writestr(inside, file.read_bytes())
        for inside, text in sorted(about.items()):
            wheel.writestr(f"{name}-{version}.dist-info/{inside}", text)
    return path


def package_files() -> dict[str, Path]:
    """Return the files of the running package by their place in a wheel, C++ sources included."""
    home = Path(__file__).parents[2]
    files = {f"simprune_deploy/{inside}": path for inside, path in _files_below(home)}
    # from beside the package, if it runs from a checkout
    files = {inside: path for inside, path in files.items() if not inside.startswith(SOURCE)}
    return {**files, **{f"{SOURCE}/{inside}": path for inside, path in source_files().items()}}


def _files_below(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in folder.rglob("*"):
        inside = path.relative_to(folder)
        left_out = any(part.startswith(".") or part == "__pycache__" for part in inside.parts)
        if path.is_file() and not left_out and path.suffix not in (".pyc", ".orig", ".rej"):
            yield inside.as_posix(), path


def _metadata() -> dict[str, str]:
    """Return the files of the wheel's ``.dist-info``."""
    # a checkout that is the working folder shows its .egg-info first, which is no wheel's metadata
    found = metadata.distributions(name=DISTRIBUTION)
    installed = next((each for each in found if each.read_text("METADATA")), None)
    if installed is None:
        raise RequirementError(
            f"{DISTRIBUTION} runs here without having been installed, so its dependencies are not "
            "known: pip install it (`pip install -e .` in a checkout)"
        )
    if installed.version != __version__:
        raise RequirementError(
            f"{DISTRIBUTION} was installed as {installed.version} and runs as "
            f"{__version__}: install it again"
        )
    lacking = set(EXTRAS) - set(installed.metadata.get_all("Provides-Extra") or ())
    if lacking:
        raise RequirementError(
            f"the metadata of {DISTRIBUTION} is older than its code (no extra "
            f"{', '.join(sorted(lacking))}): install it again (`pip install -e .` in a checkout)"
        )
    texts = {name: installed.read_text(name) for name in ("METADATA", "entry_points.txt")}
    if not all(texts.values()):
        raise RequirementError(f"the metadata of {DISTRIBUTION} is damaged: install it again")
    generator = f"simprune-deploy {__version__}"
    return {
        **{name: str(text) for name, text in texts.items()},
        "top_level.txt": "simprune_deploy\n",
        "WHEEL": f"Wheel-Version: 1.0\nGenerator: {generator}\n"
        "Root-Is-Purelib: true\nTag: py3-none-any\n",
        **dict(_licenses(installed)),
    }


def _licenses(installed: metadata.Distribution) -> Iterator[tuple[str, str]]:
    for file in installed.files or ():
        parts = file.parts
        if len(parts) > 2 and parts[0].endswith(".dist-info") and parts[1] == "licenses":
            yield "/".join(parts[1:]), file.read_text(encoding="utf-8")
