"""What is shipped to a device that builds its own engine: a folder, and the same as ``.tar.gz``.

The model in the forms that the device's TensorRT needs, golden cases, the plugin as source and, if
there is one, compiled, simprune-deploy itself, and a README of three commands. The manifest says
what each file is for, what was checked, and what was not.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simprune_deploy.common.errors import (
    ArtifactError,
    DestinationError,
    InvalidArgumentError,
    UnsupportedModelError,
    argument,
    spelled,
)
from simprune_deploy.common.files import (
    check_destination,
    sha256,
    staged_file,
    staged_folder,
    write_json,
)
from simprune_deploy.common.progress import Progress, silent
from simprune_deploy.common.requests import request_of
from simprune_deploy.deploy.bundle.archive import write_archive
from simprune_deploy.deploy.bundle.library import check_library, fit, sm_of
from simprune_deploy.deploy.bundle.own_wheel import write_own_wheel
from simprune_deploy.deploy.bundle.texts import README, write_texts
from simprune_deploy.engine import libraries
from simprune_deploy.engine.build import STRIPPED
from simprune_deploy.engine.plugin.build import source_files
from simprune_deploy.engine.plugin.toolchain import OLDEST_TENSORRT
from simprune_deploy.engine.targets import Target, find_targets, short_names
from simprune_deploy.onnx.exported_folder import (
    COMPANIONS,
    DEVICE_FORMAT,
    FORMAT,
    GOLDEN,
    MANIFEST,
    MODEL,
    PARITY,
    PLUGIN_SOURCE,
    UNVERIFIED,
    check_verdict,
    read_manifest,
)
from simprune_deploy.pruning.kernel_library import LibraryInfo

if TYPE_CHECKING:
    import onnx

PREBUILT = libraries.PREBUILT.as_posix()


@dataclasses.dataclass(frozen=True)
class DeviceBundle:
    """A bundle for devices.

    Attributes:
        folder: Where it is.
        archive: The same folder as ``.tar.gz``.
        manifest: What its ``manifest.json`` says.
    """

    folder: Path
    archive: Path
    manifest: dict[str, Any]

    @property
    def advice(self) -> str:
        """What would make the engine faster, in a line; empty if nothing is known."""
        if self.manifest["model"]["export"].get("precision", "fp32") != "fp32":
            return ""
        return spelled(
            "the model is float32, and TensorRT fuses no float32 attention: to have it fused, "
            f"export again with {argument('precision', 'fp16')}"
        )

    def __str__(self) -> str:
        return f"{self.archive} ({self.archive.stat().st_size / 1e6:.1f} MB), and as {self.folder}"

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON types."""
        return {
            "folder": str(self.folder),
            "archive": {
                "path": str(self.archive),
                "bytes": self.archive.stat().st_size,
                "sha256": sha256(self.archive),
            },
            "advice": self.advice,
            "manifest": self.manifest,
        }


def check_targets(targets: Sequence[Target]) -> None:
    """Refuse targets that take no bundle.

    Raises:
        SimpruneError: a target's engine is built on this machine, or its TensorRT is too old.
    """
    for target in targets:
        if target.built_here:
            raise InvalidArgumentError(
                f"{target.name}: its engine is built on this machine (`simprune-deploy build "
                f"FOLDER --target {target.name}`); bundles are for devices that build their own"
            )
        releases = target.releases
        if releases and all(_too_old(each.oldest_tensorrt) for each in releases):
            raise UnsupportedModelError(
                f"{target.name}: its TensorRT ({target.facts['tensorrt']}) is too old for the "
                f"plugin, which needs {'.'.join(map(str, OLDEST_TENSORRT))}"
            )


def default_output(folder: Path, targets: Sequence[Target]) -> Path:
    """Return where a bundle goes: beside the exported folder, ``NAME-TARGETS``."""
    folder = folder.resolve()
    return folder.parent / "-".join([folder.name, *short_names(targets)])


def check_destinations(output: Path, force: bool, folder: Path | None = None) -> None:
    """Refuse a place for the folder and its archive before any work.

    Args:
        output: The bundle to be.
        force: Replace an earlier one.
        folder: The export that it is made of, if there is one yet.

    Raises:
        SimpruneError: one of them exists and may not be replaced, or cannot be written.
    """
    check_destination(output, force, MANIFEST, folder)
    if (output / MANIFEST).is_file() and not (output / README).is_file():
        # --force is for a bundle that is made again, not for an export and its engines
        raise DestinationError(
            f"{output} is an exported folder and no bundle: give another "
            f"{argument('output', 'DIR')}"
        )
    archive = archive_of(output)
    if archive.is_symlink() or (archive.exists() and not archive.is_file()):
        raise DestinationError(
            f"{archive} is not a file: give another place with {argument('output')}"
        )
    if archive.exists() and not force:
        raise DestinationError(
            f"{archive} already exists: replace it with {argument('force', True)}, or give "
            f"{argument('output', 'DIR')}"
        )


def archive_of(output: Path) -> Path:
    """Return where a bundle's archive goes."""
    return output.with_name(f"{output.name}.tar.gz")


@dataclasses.dataclass(frozen=True)
class BundleRequest:
    """What to pack for which devices.

    Args:
        folder: A folder that :func:`simprune_deploy.export` wrote.
        targets: Names of devices that build their own engine: ("jetson-orin",).
        output: Folder to write, and the archive beside it. Default None: FOLDER-TARGET.
        plugin: The plugin's library compiled for the targets. Default None: it is compiled on the
            device.
        force: Replace an earlier bundle. Default False.
    """

    folder: str | Path
    targets: Sequence[str] = ()
    output: str | Path | None = None
    plugin: str | Path | None = None
    force: bool = False


def bundle(
    folder: BundleRequest | str | Path,
    targets: Sequence[str] | None = None,
    *,
    progress: Progress = silent,
    **fields: Any,
) -> DeviceBundle:
    """Pack an exported folder for devices that build their own engine: a folder and a .tar.gz.

    Args:
        folder: A :class:`BundleRequest`, or its first field; the others by name.
        targets: The request's second field.
        progress: Called with a word on each step.

    Raises:
        SimpruneError: as :func:`make_bundle`.
    """
    request = request_of(BundleRequest, folder, fields, targets=targets)
    return make_bundle(
        request.folder,
        find_targets(request.targets),
        output=request.output,
        plugin=request.plugin,
        force=request.force,
        progress=progress,
    )


def make_bundle(
    folder: str | Path,
    targets: Sequence[Target],
    *,
    output: str | Path | None = None,
    plugin: str | Path | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> DeviceBundle:
    """Make a bundle of an exported folder. Needs no torch and no GPU.

    Args:
        folder: A folder that :func:`simprune_deploy.export` wrote.
        targets: From :func:`simprune_deploy.engine.targets.find_targets`.
        output: The folder to write, and the archive beside it. Default: :func:`default_output`.
        plugin: The plugin's library compiled for the targets. Default: none, then it is compiled
            on the device.
        force: Replace an earlier bundle. Default False.
        progress: Called with a word on each step.

    Returns:
        The bundle. The same export, installation and library give the same bytes.

    Raises:
        SimpruneError: the folder is damaged or its parity check failed, a target or the library
            does not fit, or the destination cannot be written.
    """
    from simprune_deploy.onnx.metadata import load_graph

    check_targets(targets)
    folder = Path(folder)
    output = Path(output) if output is not None else default_output(folder, targets)
    check_destinations(output, force, folder)
    progress("reading the export")
    exported = _read_export(folder)
    library = check_library(Path(plugin), targets) if plugin is not None else None
    graph = load_graph(folder / MODEL)
    with (
        staged_folder(output, force, MANIFEST) as staging,
        staged_file(archive_of(output)) as archive,
    ):
        progress("writing the bundle")
        for name in exported["files"].keys() - COMPANIONS:  # TensorRT takes neither
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, staging / name)
        stripped = _write_stripped(graph, staging / STRIPPED)
        _copy_plugin(staging, library)
        wheel = write_own_wheel(staging)
        about = _about(exported, folder, targets, library, stripped, wheel.name)
        write_texts(staging, output.name, graph, about)
        progress("hashing")
        manifest = {
            **exported,
            "format": DEVICE_FORMAT,
            "bundle": about,
            "files": {
                path.relative_to(staging).as_posix(): {
                    "bytes": path.stat().st_size,
                    "sha256": sha256(path),
                }
                for path in sorted(staging.rglob("*"))
                if path.is_file()
            },
        }
        write_json(staging / MANIFEST, manifest)
        progress("packing")
        write_archive(staging, output.name, archive)
    return DeviceBundle(output, archive_of(output), manifest)


def _read_export(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    if manifest["format"] != FORMAT:
        raise InvalidArgumentError(
            f"{folder} is a bundle already: give the exported folder it came from"
        )
    check_verdict(folder, manifest, "bundles are made of verified exports")
    if MODEL not in manifest["files"]:
        raise ArtifactError(f"{folder / MANIFEST} names no {MODEL}: export again")
    return manifest


def _too_old(version: tuple[int, ...] | None) -> bool:
    return version is not None and version < OLDEST_TENSORRT


def _write_stripped(graph: onnx.ModelProto, path: Path) -> bool:
    """Write the model without its function, for TensorRT; say whether it has one."""
    from simprune_deploy.onnx.variants import with_function, without_function

    if not graph.functions:
        return False
    stripped = without_function(graph)
    if with_function(stripped).SerializeToString() != graph.SerializeToString():
        raise ArtifactError(
            f"the function in {MODEL} is not the one this version writes, so it cannot be taken "
            "out and put back: export again"
        )
    path.write_bytes(stripped.SerializeToString())
    return True


def _copy_plugin(staging: Path, library: LibraryInfo | None) -> None:
    for inside, file in source_files().items():
        place = staging / PLUGIN_SOURCE / inside
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
    if library is not None:
        (staging / PREBUILT).parent.mkdir()
        shutil.copyfile(library.path, staging / PREBUILT)
        if sha256(staging / PREBUILT) != library.sha256:
            raise ArtifactError(f"{library.path} was changed while it was copied: run this again")


def _about(
    exported: dict[str, Any],
    folder: Path,
    targets: Sequence[Target],
    library: LibraryInfo | None,
    stripped: bool,
    wheel: str,
) -> dict[str, Any]:
    """Say what the bundle is for, and what of it was checked."""
    verdict, parity = exported["verdict"], {}
    if PARITY in exported["files"]:
        parity = json.loads((folder / PARITY).read_text(encoding="utf-8"))
    environment = parity.get("environment", {})
    gpu = environment.get("gpu", "none used")
    checked, unchecked = [], []
    if verdict == UNVERIFIED:
        unchecked.append(f"{MODEL}: it was never compared with PyTorch, and never run")
    else:
        runtime = environment.get("runtime", "an unknown runtime")
        found = f"{verdict}, {runtime} against {environment.get('reference', 'PyTorch')}"
        checked.append({"what": MODEL, "found": f"{found} ({PARITY})"})
    if stripped:
        found = f"{MODEL} without its function; with it put back, the same file byte for byte"
        checked.append({"what": STRIPPED, "found": found})
        unchecked.append(f"{STRIPPED}: not run, since only a TensorRT with the plugin can")
    if library is not None:
        found = f"{library.machine}, GPU code for {library.device_code}, CUDA {library.cuda}"
        checked.append({"what": PREBUILT, "found": f"{found}; read from the file"})
        unchecked.append(f"{PREBUILT}: not loaded and not run")
    unchecked.append(f"{PLUGIN_SOURCE}: not compiled from here")
    engine = "built on the device; nothing of this bundle was run on a GPU"
    if gpu != "none used":
        engine = f"built on the device; the parity check of {MODEL} used a GPU: {gpu}"
    return {
        "targets": [_describe(target, library, stripped) for target in targets],
        "wheel": wheel,
        "engine": engine,
        "golden": GOLDEN in exported["files"],
        "library": library and {**library.to_dict(), "path": PREBUILT},
        "checked": checked,
        "not_checked": unchecked,
    }


def _describe(target: Target, library: LibraryInfo | None, stripped: bool) -> dict[str, Any]:
    """Say of one target what it takes of the bundle, release by release."""
    releases = []
    for release in target.releases:
        version = release.oldest_tensorrt
        usable = not _too_old(version)
        model = STRIPPED if stripped else MODEL
        runs = fit(library, release) if library is not None else None
        releases.append(
            {
                "system": release.system,
                "cuda": release.cuda,
                "tensorrt": release.tensorrt,
                "model": model if usable else None,
                "library": PREBUILT if usable and runs and runs.runs else None,
                "why": runs.why if runs else "no compiled library in this bundle",
            }
        )
    return {
        "name": target.name,
        "title": target.title,
        "sm": sm_of(target),
        "cpu": target.facts["cpu"].value,
        "releases": releases,
        "notes": list(target.notes),
    }
