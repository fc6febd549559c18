"""The file of metadata beside an engine, and whether the engine fits a machine. Light: no TensorRT.

An engine is machine code for one kind of GPU and one version of one flavour of TensorRT, made from
one ONNX file, and for one plugin if it has one in it. TensorRT itself notices some mismatches with
an error, and some with a crash; the metadata turns all of them into a sentence beforehand.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_type_hints

from simprune_deploy.common.errors import ArtifactError
from simprune_deploy.common.files import sha256
from simprune_deploy.common.versions import version_numbers

FORMAT = 3
FIRST_OF_VERSION_2 = 3
"""The first format whose engines are of the operator's version 2."""
TENSORRT, TENSORRT_RTX = "tensorrt", "tensorrt-rtx"
NAMES = {TENSORRT: "TensorRT", TENSORRT_RTX: "TensorRT-RTX"}
KINDS = ("pruned", "dense", "diagnosis")
LARGEST_METADATA = 1 << 20

Capability = tuple[int, int]
Profile = dict[str, dict[str, list[int]]]


@dataclasses.dataclass(frozen=True)
class FileStamp:
    """A file as it was when the engine was built.

    Attributes:
        file: Its name, without a folder.
        bytes: Its size.
        sha256: Its hash, lower-case hexadecimal.
    """

    file: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path, name: str | None = None) -> FileStamp:
        """Stamp a file; `name` if it is to be called otherwise."""
        return cls(name or path.name, path.stat().st_size, sha256(path))


@dataclasses.dataclass(frozen=True)
class EngineMetadata:
    """What is known of an engine.

    Attributes:
        flavour: "tensorrt" or "tensorrt-rtx".
        version: Of the TensorRT that built it, and that alone runs it.
        compute_capabilities: The GPUs it is for, such as ("8.9", "12.1").
        targets: Their names in targets.json; empty if it was built for the GPU of the machine.
        gpu: The GPU on which it was built and tuned; None if it was built without one.
        cuda: The CUDA version of the driver there, such as "12.6"; None without a GPU.
        plugin: The library with the plugin that is in it; None if it runs the ONNX function.
        prune_layers: How many prune layers the ONNX file that was parsed had.
        plugin_layers: How many layers of the parsed network ran a plugin, as they were counted.
        onnx: The ONNX file it was built from.
        of: "pruned" (the model as shipped), "dense" (without pruning) or "diagnosis" (with the
            decisions as outputs, for a parity check).
        precision: "fp32", "fp16" or "bf16".
        profile: By input, the shapes "min", "opt" and "max".
        workspace_mib: The limit on the builder's and the engine's workspace; None: no limit.
        engine: The engine file.
        status: How far it was checked, in words.
        checked, not_checked: What was looked at, and what was not.
        versions: Of simprune-deploy and Polygraphy.
        seconds: How long the build took.
        created: When, in UTC.
    """

    flavour: str
    version: str
    compute_capabilities: tuple[str, ...]
    targets: tuple[str, ...]
    gpu: str | None
    cuda: str | None
    plugin: FileStamp | None
    onnx: FileStamp
    of: str
    precision: str
    profile: Profile
    workspace_mib: int | None
    prune_layers: int
    plugin_layers: int
    engine: FileStamp
    status: str
    checked: str
    not_checked: str
    versions: dict[str, str]
    seconds: float
    created: str

    @property
    def counted(self) -> str:
        """What the parser made of the prune layers, as it was counted: "3 of 3 prune layers"."""
        return f"{self.plugin_layers} of {self.prune_layers} prune layers"

    @property
    def title(self) -> str:
        """What built it: "TensorRT 10.3.0"."""
        return f"{NAMES[self.flavour]} {self.version}"

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as JSON types."""
        values = dataclasses.asdict(self)
        for name in ("compute_capabilities", "targets"):
            values[name] = list(values[name])
        return {"format": FORMAT, **values}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EngineMetadata:
        """Build facts from :meth:`to_dict`'s result.

        Raises:
            KeyError, TypeError, ValueError: a value is missing or is not what it should be.
        """
        known = {field.name: values[field.name] for field in dataclasses.fields(cls)}
        for name in ("compute_capabilities", "targets"):
            known[name] = tuple(known[name])
        for name in ("plugin", "onnx", "engine"):
            known[name] = None if known[name] is None else FileStamp(**known[name])
        metadata = cls(**known)
        metadata._check()
        return metadata

    def _check(self) -> None:
        hints = get_type_hints(EngineMetadata)
        texts = [name for name, hint in hints.items() if hint is str]
        texts += [name for name in ("gpu", "cuda") if getattr(self, name) is not None]
        lists = {name: getattr(self, name) for name in ("compute_capabilities", "targets")}
        checked = [(name, getattr(self, name)) for name in texts]
        checked += [(name, each) for name, found in lists.items() for each in found]
        checked += [("versions", each) for pair in self.versions.items() for each in pair]
        checked += [("profile", each) for each in self.profile]
        for stamp in filter(None, (self.plugin, self.onnx, self.engine)):
            checked += [("file", stamp.file), ("sha256", stamp.sha256)]
            if Path(stamp.file).name != stamp.file or not isinstance(stamp.bytes, int):
                raise ValueError(f"the file {stamp.file!r}")
        for name, text in checked:
            # nothing from the file may steer a terminal or break a line
            if not isinstance(text, str) or not text.isprintable():
                raise ValueError(f"{name} {text!r}")
        if self.onnx is None or self.engine is None:
            raise ValueError("no onnx or no engine")
        if self.flavour not in NAMES or self.of not in KINDS:
            raise ValueError(f"flavour {self.flavour!r}, of {self.of!r}")
        if not lists["compute_capabilities"]:
            raise ValueError("no compute capability")
        for each in lists["compute_capabilities"]:
            parse_capability(each)
        if self.cuda is not None:
            version_numbers(self.cuda)
        if not isinstance(self.workspace_mib, (int, type(None))):
            raise ValueError(f"workspace_mib {self.workspace_mib!r}")
        for name in ("prune_layers", "plugin_layers"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)!r}")
        if not isinstance(self.seconds, (int, float)):
            raise ValueError(f"seconds {self.seconds!r}")
        if "images" not in self.profile:
            raise ValueError("no profile of the images")
        for shapes in self.profile.values():
            for which in ("min", "opt", "max"):
                if not all(isinstance(size, int) and size > 0 for size in shapes[which]):
                    raise ValueError(f"profile {shapes!r}")


def metadata_path(engine: Path) -> Path:
    """Return where an engine's metadata is: ``x.engine.json`` beside ``x.engine``."""
    return engine.with_name(engine.name + ".json")


def read_engine_metadata(engine: Path, *, check_hash: bool = True) -> EngineMetadata:
    """Read what is known of an engine, and see that it is the engine that was built.

    Args:
        engine: The engine file, not the metadata.
        check_hash: Read the engine and compare its SHA-256. Default True.

    Raises:
        SimpruneError: there is no engine or no metadata, the metadata is damaged or of a newer
            format, or the engine was changed.
    """
    path = metadata_path(engine)
    if not engine.is_file():
        raise ArtifactError(f"{engine} does not exist: `simprune-deploy build` makes engines")
    try:
        if path.stat().st_size > LARGEST_METADATA:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        values = json.loads(path.read_text(encoding="utf-8"))
        found = int(values["format"])
        metadata = EngineMetadata.from_dict(values) if found == FORMAT else None
    except FileNotFoundError:
        raise ArtifactError(
            f"{path} is missing: without it nobody knows what {engine.name} is for; build it again"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = " ".join(f"{error!r}".split())[:200]
        raise ArtifactError(f"{path} is damaged ({why}): build the engine again") from error
    if metadata is None:
        if found < FIRST_OF_VERSION_2:
            raise ArtifactError(
                f"{engine} was built before version 2 of the operator: export the model again, and "
                "build the engine of that"
            )
        remedy = "update simprune-deploy" if found > FORMAT else "build the engine again"
        raise ArtifactError(f"{path} has format {found}, and this version reads {FORMAT}: {remedy}")
    if check_hash and FileStamp.of(engine) != dataclasses.replace(
        metadata.engine, file=engine.name
    ):
        raise ArtifactError(
            f"{engine} is not the engine that was built: its SHA-256 differs; build it again"
        )
    return metadata


def parse_capability(text: str) -> Capability:
    """Return (8, 9) for "8.9"."""
    major, minor = text.split(".")
    return int(major), int(minor)
