"""Golden cases: inputs with PyTorch's outputs and decisions, for machines without torch."""

from __future__ import annotations

import dataclasses
import zipfile
import zlib
from pathlib import Path

import numpy as np

from simprune_deploy.common.errors import ArtifactError, argument
from simprune_deploy.parity.runs import Inputs, Run
from simprune_deploy.predict.records import Array, PruneRecord

LARGEST = 1 << 30
"""Bytes that a file may have when it is unpacked."""

MAX_IMAGES = 4
"""Enough to mix a batch, small enough to ship: 2.4 MB at 224 pixels before compression."""


@dataclasses.dataclass(frozen=True)
class Golden:
    """A few images, what PyTorch gave for them, and who made it.

    Attributes:
        images: As the graph takes them: float32[n, C, H, W] or uint8[n, H, W, C].
        thresholds: float32[n].
        reference: PyTorch's run; its records hold decisions without features.
    """

    images: Array
    thresholds: Array
    reference: Run


def golden_of(inputs: Inputs, reference: Run) -> Golden:
    """Take images from all over a run, and so different thresholds if it has them."""
    last = len(inputs.images) - 1
    chosen = sorted({round(last * i / (MAX_IMAGES - 1)) for i in range(MAX_IMAGES)})
    records = {
        layer: [dataclasses.replace(record, features=None) for record in (found[i] for i in chosen)]
        for layer, found in reference.records.items()
    }
    run = Run(reference.name, reference.outputs[chosen], records)
    return Golden(inputs.images[chosen], inputs.thresholds[chosen], run)


def save_golden(path: Path, golden: Golden) -> None:
    """Write golden cases as ``.npz``."""
    arrays = {
        "images": golden.images,
        "thresholds": golden.thresholds.astype(np.float32),
        "output": golden.reference.outputs,
        "reference": np.array(golden.reference.name),
    }
    for layer, records in golden.reference.records.items():
        arrays[f"kept_index_{layer}"] = _stack([r.heads() for r in records], -1)
        arrays[f"assignment_{layer}"] = _stack([r.valid_assignment() for r in records], -1)
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


GIVE_THE_CHECKPOINT = f"give the checkpoint with {argument('reference')}"


def load_golden(path: Path, layers: list[int], without: str = GIVE_THE_CHECKPOINT) -> Golden:
    """Read golden cases for a model with the given prune layers.

    Args:
        path: The file.
        layers: The prune layers, block numbers.
        without: What to do where there is no such file, for the message.

    Raises:
        SimpruneError: the file is missing, damaged, or of a model with other prune layers.
    """
    try:
        with zipfile.ZipFile(path) as packed:
            size = sum(each.file_size for each in packed.infolist())
        if size > LARGEST:
            raise ValueError(f"unpacked it has {size} bytes, and at most {LARGEST} are read")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        images, thresholds = arrays["images"], arrays["thresholds"]
        count = len(images)
        records = {layer: _records(arrays, layer, thresholds) for layer in layers}
        if (
            not count
            or images.ndim != 4
            or len(arrays["output"]) != count
            or len(thresholds) != count
        ):
            raise ValueError("its arrays do not fit together")
        reference = Run(str(arrays["reference"]), arrays["output"], records)
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist: without golden cases {without}") from None
    except (
        *(OSError, ValueError, KeyError, TypeError, MemoryError),
        *(zlib.error, zipfile.BadZipFile),
    ) as error:
        raise ArtifactError(f"{path} holds no golden cases for this model: {error}") from error
    return Golden(images, thresholds, reference)


def _records(arrays: dict[str, Array], layer: int, thresholds: Array) -> list[PruneRecord]:
    records = []
    pairs = zip(arrays[f"kept_index_{layer}"], arrays[f"assignment_{layer}"], strict=True)
    for name in (f"kept_index_{layer}", f"assignment_{layer}"):
        if arrays[name].dtype.kind != "i" or arrays[name].ndim != 2:
            raise ValueError(f"{name} is {arrays[name].dtype}, not integers [n, N]")
    for limit, (heads, assignment) in zip(thresholds, pairs, strict=True):
        records.append(
            PruneRecord(
                features=None,
                log_size=np.zeros(0, np.float32),
                threshold=float(limit),
                kept_index=heads[heads >= 0],
                assignment=assignment[assignment >= 0],
            )
        )
    return records


def _stack(rows: list[Array], fill: int) -> Array:
    """Stack rows of different lengths, filled up at the end."""
    width = max(len(row) for row in rows)
    return np.stack(
        [np.concatenate([row, np.full(width - len(row), fill, row.dtype)]) for row in rows]
    )
