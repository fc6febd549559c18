"""The folder that ships, as it is read: its files' names, its manifest, and their hashes."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from simprune_deploy.common.errors import ArtifactError, argument
from simprune_deploy.common.files import sha256

MODEL, MANIFEST, PARITY, GOLDEN = "model.onnx", "manifest.json", "parity.json", "golden.npz"
INLINED_MODEL, FUSED_MODEL = "model-inlined.onnx", "model-fused.onnx"
COMPANIONS = {INLINED_MODEL: "inlined", FUSED_MODEL: "fused_attention"}
"""Other forms of the model that may lie beside it, and the check that proved each equal to it."""
PLUGIN_SOURCE = "plugin/source"
FORMAT, DEVICE_FORMAT = 1, 2
KINDS = {FORMAT: "exported folder", DEVICE_FORMAT: "device bundle"}
"""What the formats of a manifest are of; a later one is of a newer version."""

LARGEST_MANIFEST = 1 << 24

ACCEPTED = ("passed", "passed in emulation")
"""The verdicts with which a model may ship."""
UNVERIFIED = "not verified"
"""What a manifest says in a verdict's place of an export that was not compared with PyTorch."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a folder's manifest and check that its files are the ones it was made with.

    Args:
        folder: An exported folder, or a device's bundle unpacked.

    Raises:
        SimpruneError: it is no result of ours, of a newer format, or a file was changed.
    """
    path = folder / MANIFEST
    try:
        if path.stat().st_size > LARGEST_MANIFEST:
            raise ValueError(f"more than {LARGEST_MANIFEST} bytes")
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = manifest["format"]
        if not isinstance(found, int):
            raise TypeError(f"format {found!r}")
        # of a newer one nothing else is known
        hashes = {
            name: str(entry["sha256"])
            for name, entry in (dict(manifest["files"]) if found in KINDS else {}).items()
        }
        for name in ("verdict", "versions", "model") if found in KINDS else ():
            manifest[name]
        if found == DEVICE_FORMAT:
            manifest["bundle"]
    except FileNotFoundError:
        raise ArtifactError(
            f"{folder} holds no {MANIFEST}: give a folder that `simprune-deploy export` wrote"
        ) from None
    except NotADirectoryError:
        raise ArtifactError(
            f"{folder} is a file: give the folder that `simprune-deploy export` wrote"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged ({error!r}): export again") from error
    if found not in KINDS:
        newest = max(KINDS)
        raise ArtifactError(
            f"{path} has format {found}, and this version reads up to {newest}: "
            f"{'update simprune-deploy' if found > newest else 'export again'}"
        )
    for name, expected in hashes.items():
        file = _file_inside(folder, name)
        if not file.is_file():
            raise ArtifactError(f"{file} is missing: copy the folder again, or export again")
        if sha256(file) != expected:
            raise ArtifactError(f"{file} is not the file that was exported: its SHA-256 differs")
    return dict(manifest)


def check_verdict(folder: Path, manifest: dict[str, Any], rule: str) -> None:
    """Refuse a folder whose model was compared with PyTorch, and found different.

    Args:
        folder: The exported folder, for the message.
        manifest: What its manifest says.
        rule: What is refused, for the message: "engines are built of verified exports".

    Raises:
        ArtifactError: its verdict is none with which a model may ship.
    """
    if manifest["verdict"] not in (*ACCEPTED, UNVERIFIED):
        raise ArtifactError(
            f"the verdict on {folder} is {manifest['verdict']!r}, and {rule}: export again, or "
            f"with {argument('verify', False)} if you want one all the same"
        )


def _file_inside(folder: Path, name: str) -> Path:
    """Return a file that a manifest names; it must lie in the folder, also through links."""
    parts = PurePosixPath(name).parts
    sound = parts and name == "/".join(parts) and name.isprintable() and "\\" not in name
    if not sound or ".." in parts or PurePosixPath(name).is_absolute():
        raise ArtifactError(
            f"{folder / MANIFEST} names the file {name!r}, which is not below its folder: "
            "do not use it"
        )
    file = folder / name
    if not file.resolve().is_relative_to(folder.resolve()):
        raise ArtifactError(f"{file} is a link out of its folder: copy the file itself")
    return file
