"""What a sweep has finished, on the disk as it comes: an interrupted sweep loses one shard.

``cells.jsonl`` has a line that says what the cells are of, then one for each shard of each
setting, and for each timing. The dense model's outputs lie beside it, one file a shard, so that
settings that are added later need not run it again.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simprune_deploy.common.errors import (
    ArtifactError,
    DestinationError,
    InvalidArgumentError,
    argument,
)
from simprune_deploy.common.files import as_user_error, check_destination, staged_file
from simprune_deploy.tuning.results import Setting
from simprune_deploy.tuning.tallies import DENSE_SETTING, Tally
from simprune_deploy.tuning.timing import Timing

if TYPE_CHECKING:
    from simprune_deploy.tuning.tallies import ShardResult

CELLS, DENSE_OUTPUTS = "cells.jsonl", "dense"
FORMAT = 1


class Store:
    """A folder of finished work; :func:`open_store` opens it.

    Args:
        folder: Where.
        identity: What the work is of; see :func:`open_store`.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self.identity = folder, identity
        self.tallies: dict[tuple[Setting, int], Tally] = {}
        self.skipped: dict[int, list[tuple[str, str]]] = {}
        self.timings: dict[Setting, Timing] = {}

    def has(self, setting: Setting, shard: int) -> bool:
        return (setting, shard) in self.tallies

    def add(self, result: ShardResult) -> None:
        """Keep a shard's results: in one write, so that a kill cannot part them."""
        lines = []
        for setting, tally in result.tallies.items():
            entry = {"setting": setting.to_dict(), "shard": result.number, "tally": tally.to_dict()}
            if setting == DENSE_SETTING:
                entry["skipped"] = result.skipped
                self.skipped[result.number] = result.skipped
                with (
                    staged_file(self._dense_path(result.number)) as place,
                    place.open("wb") as file,
                ):
                    np.save(file, result.dense, allow_pickle=False)
            self.tallies[setting, result.number] = tally
            lines.append(entry)
        self._append(lines)

    def add_timing(self, setting: Setting, timing: Timing) -> None:
        """Keep what a setting takes."""
        self.timings[setting] = timing
        self._append([{"setting": setting.to_dict(), "timing": timing.to_dict()}])

    def dense(self, shard: int) -> np.ndarray | None:
        """Return the dense model's outputs of a shard; None if they are not there any more."""
        tally = self.tallies.get((DENSE_SETTING, shard))
        if tally is None:
            return None
        with contextlib.suppress(OSError, ValueError, EOFError):
            found: np.ndarray = np.load(self._dense_path(shard), allow_pickle=False)
            if (
                found.dtype == np.float32
                and len(found) == tally.images
                and np.isfinite(found).all()
            ):
                return found
        return None

    def _dense_path(self, shard: int) -> Path:
        return self.folder / DENSE_OUTPUTS / f"{shard:06}.npy"

    def _append(self, entries: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in entries)
        try:
            with (self.folder / CELLS).open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise as_user_error(error, self.folder / CELLS) from error

    def load(self) -> None:
        """Read what is there.

        Raises:
            SimpruneError: it is of another model, other data, or damaged.
        """
        path = self.folder / CELLS
        whole, _, torn = path.read_bytes().rpartition(b"\n")
        lines = whole.splitlines()
        try:
            first = json.loads(lines[0]) if lines else {}
            if first.get("format") != FORMAT:
                raise ValueError(f"format {first.get('format')}, and this version reads {FORMAT}")
            self._check_identity(first["of"])
            for line in lines[1:]:
                self._take(json.loads(line))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ArtifactError(
                f"{path} cannot be continued ({error}): start anew with {argument('force', True)}"
            ) from error
        if torn:
            # the last write was cut off by a kill: what it held is computed again
            with path.open("rb+") as file:
                file.truncate(len(whole) + 1)

    def _check_identity(self, found: dict[str, Any]) -> None:
        for name in {**found, **self.identity}:
            if found.get(name) != self.identity.get(name):
                raise ArtifactError(
                    f"{self.folder} was swept with another {name} ({_short(found.get(name))}, now "
                    f"{_short(self.identity.get(name))}): give another folder with "
                    f"{argument('output')}, or start "
                    f"anew with {argument('force', True)}"
                )

    def _take(self, entry: dict[str, Any]) -> None:
        setting = Setting.from_dict(entry["setting"])
        if "timing" in entry:
            self.timings[setting] = Timing(**entry["timing"])
            return
        shard = int(entry["shard"])
        self.tallies[setting, shard] = Tally.from_dict(entry["tally"])
        if "skipped" in entry:
            self.skipped[shard] = [(str(name), str(why)) for name, why in entry["skipped"]]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def check_store(folder: Path, resume: bool, force: bool) -> None:
    """Refuse a destination before any work is done.

    Raises:
        SimpruneError: it is there, and may be neither continued nor replaced.
    """
    if resume and force:
        raise InvalidArgumentError(
            f"{argument('resume', True)} goes on with what is there and {argument('force', True)} "
            f"drops it: give one"
        )
    if resume and (folder / CELLS).is_file():
        return
    if not force and (folder / CELLS).is_file():
        raise DestinationError(
            f"{folder} already exists: go on with {argument('resume', True)}, replace it with "
            f"{argument('force', True)}, or give {argument('output', 'DIR')}"
        )
    check_destination(folder, force, CELLS)


def open_store(folder: Path, identity: dict[str, Any], resume: bool, force: bool) -> Store:
    """Open a folder for a sweep's work.

    Args:
        folder: Where; made if it is not there.
        identity: What must be the same for cells to belong together: model, data, backend, batch.
        resume: Go on with the cells that are there.
        force: Drop them.

    Raises:
        SimpruneError: the folder is in use otherwise, or its cells are of something else.
    """
    check_store(folder, resume, force)
    store = Store(folder, identity)
    if resume and (folder / CELLS).is_file():
        store.load()
        return store
    try:
        if folder.exists():
            shutil.rmtree(folder)
        (folder / DENSE_OUTPUTS).mkdir(parents=True)
        with staged_file(folder / CELLS) as staging:
            staging.write_text(json.dumps({"format": FORMAT, "of": identity}) + "\n")
    except OSError as error:
        raise as_user_error(error, folder) from error
    return store
