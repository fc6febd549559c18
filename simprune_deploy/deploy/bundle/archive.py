"""The bundle as one file: the same folder gives the same bytes, at any time and for anybody."""

from __future__ import annotations

import gzip
import tarfile
from pathlib import Path


def write_archive(folder: Path, name: str, archive: Path) -> None:
    """Write a folder as ``.tar.gz``.

    Names are sorted; times, owners and modes are fixed. Shell scripts can be run, other files not.

    Args:
        folder: What to pack; it holds files and folders, nothing else.
        name: What the folder is called in the archive.
        archive: The file to write.
    """
    with (
        archive.open("wb") as file,
        gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for path in [folder, *sorted(folder.rglob("*"))]:
            entry = tarfile.TarInfo("/".join([name, *path.relative_to(folder).parts]))
            if path.is_dir():
                entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(entry)
                continue
            entry.size = path.stat().st_size
            entry.mode = 0o755 if path.suffix == ".sh" else 0o644
            with path.open("rb") as content:
                tar.addfile(entry, content)
