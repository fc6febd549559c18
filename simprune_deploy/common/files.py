"""Results appear whole or not at all: write beside the destination, then rename."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simprune_deploy.common.errors import DestinationError, SimpruneError, argument


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as lower-case hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def stem_of(source: object) -> str:
    """Return a name for results made of a model: of its path, or "model"."""
    if not isinstance(source, (str, Path)):
        return "model"
    name = Path(str(source).rstrip("/")).name
    return name.split(":")[-1].split(".")[0] or "model"


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, without NaN or infinities (which JSON does not have)."""
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def check_destination(
    folder: Path, force: bool, marker: str, source: str | Path | None = None
) -> None:
    """Refuse a destination before any work is done.

    A folder that exists is replaced only with `force`, and only if it is empty or holds `marker`
    (the file every result of ours has): ``--force -o ~`` must not be able to lose a home folder.
    Nor is it replaced if `source`, what the result is made of, is this folder or lies in it.

    Raises:
        SimpruneError: it exists and may not be replaced, or its parent cannot be written.
    """
    try:
        if source is not None and folder.is_dir():
            made_of = Path(source).resolve()
            if made_of.exists() and folder.resolve() in (made_of, *made_of.parents):
                raise DestinationError(
                    f"{source}, which this is made of, would be replaced: give another folder "
                    f"with {argument('output')}"
                )
        _check_destination(folder, force, marker)
    except OSError as error:
        raise as_user_error(error, folder) from error


def _check_destination(folder: Path, force: bool, marker: str) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise DestinationError(
            f"{folder} is not a folder: give another one with {argument('output')}"
        )
    if folder.is_dir() and any(folder.iterdir()):
        if not force:
            raise DestinationError(
                f"{folder} already exists: replace it with {argument('force', True)}, or give "
                f"{argument('output', 'DIR')}"
            )
        if not (folder / marker).is_file():
            raise DestinationError(
                f"{folder} holds no {marker}, so it is not a result of this tool, and "
                f"{argument('force', True)} "
                f"does not replace it: give another folder with {argument('output')}"
            )
    parent = _nearest_existing(folder.absolute().parent)
    if not parent.is_dir():
        raise DestinationError(
            f"{parent} is not a folder: give another place with {argument('output')}"
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise DestinationError(
            f"{parent} is not writable: give another place with {argument('output')}"
        )


def _nearest_existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


@contextlib.contextmanager
def staged_folder(folder: Path, force: bool, marker: str) -> Iterator[Path]:
    """Yield an empty folder beside `folder` that takes its place when the block ends well.

    An error or an interrupt removes it, with any parents made for it, and leaves `folder` as it
    was. Call :func:`check_destination` first, before the work that fills it.
    """
    check_destination(folder, force, marker)
    folder = folder.absolute()
    existing = _nearest_existing(folder.parent)
    staging: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        yield staging
        staging.chmod(0o777 & ~_umask())
        for file in staging.iterdir():
            # libraries that write through temporary files leave them readable by the owner only
            file.chmod((0o777 if file.is_dir() else 0o666) & ~_umask())
        _replace_folder(staging, folder)
    except OSError as error:
        _clean_up(staging, folder.parent, existing)
        raise as_user_error(error, folder) from error
    except BaseException:
        _clean_up(staging, folder.parent, existing)
        raise


def _replace_folder(staging: Path, folder: Path) -> None:
    """Swap `staging` in; an old `folder` is put back if the last rename fails."""
    if not folder.exists():
        staging.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    folder.rename(old)
    try:
        staging.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _clean_up(staging: Path | None, parent: Path, existing: Path) -> None:
    if staging is not None:
        shutil.rmtree(staging, ignore_errors=True)
    while parent != existing and existing in parent.parents:
        try:
            parent.rmdir()
        except OSError:
            return
        parent = parent.parent


@contextlib.contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, renamed over it when the block ends well."""
    staging: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
        os.close(handle)
        staging = Path(name)
        yield staging
        staging.chmod(0o666 & ~_umask())
        staging.replace(path)
    except BaseException as error:
        if staging is not None:
            staging.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise as_user_error(error, path) from error
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def as_user_error(error: OSError, path: Path) -> SimpruneError:
    """Say in one line what the operating system refused."""
    if error.errno == errno.ENOSPC:
        return DestinationError(f"no space left to write {path}: free some, or write elsewhere")
    return DestinationError(f"cannot write {path}: {error.strerror or error}")
