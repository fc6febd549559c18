"""What a built library says about itself, read from its file without loading it.

So a library for a Jetson can be examined on a workstation, and a damaged one cannot do harm.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simprune_deploy.common.errors import ArtifactError, SimpruneError

LIBRARY_VARIABLE = "SIMPRUNE_LIBRARY"
"""The environment variable that names the library whose kernels take torch's CUDA tensors."""

ABI_VERSION = 2
"""The version of the C interface (``plugins/include/simprune.h``) that this package speaks."""

MARK = b"simprune-library-info:"
"""What stands in a library before its description (JSON, ended by a zero byte)."""

MACHINES = {62: "x86_64", 183: "aarch64"}
"""Processors by the ELF header's number for them."""

LARGEST_FILE = 1 << 30
"""How many bytes of a file are read at most; a library of ours has some millions."""

LARGEST_DESCRIPTION = 1 << 16
"""How many bytes a description has at most; ours have some hundreds."""

_FATBIN = b".nv_fatbin\0"
_FATBIN_MAGIC = struct.pack("<I", 0xBA55ED50)
_MOST_GPU_CODE = 1 << 16  # containers and pieces of code; ours have some dozens
_PTX, _CUBIN = 1, 2
_VARIANTS = {0x100000: "a", 0x200000: "f"}
_TEGRA = ("72", "87", "101", "110")
"""Jetsons: machine code for their GPUs and for others is not exchanged."""

_NO_BYTES_IN_FILE = 8  # SHT_NOBITS, the section type of .bss


@dataclasses.dataclass(frozen=True)
class DeviceCode:
    """The GPU code inside a library.

    Attributes:
        sms: The architectures there is machine code for, such as ("87", "110").
        ptx: The architectures there is PTX for, which a driver can compile for newer GPUs.
    """

    sms: tuple[str, ...]
    ptx: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"SM {', '.join(self.sms)}"] if self.sms else []
        parts += [f"PTX {', '.join(self.ptx)}"] if self.ptx else []
        return "; ".join(parts) or "none"

    def runs_on(self, sm: str) -> bool:
        """Whether there is code for a GPU, such as "87".

        Machine code runs on its own GPU and on later ones of the same major number, but not between
        Jetsons and others; that with a letter (90a) only on its own. A driver compiles PTX for
        every later GPU.
        """
        if sm in self.sms or any(int(each) <= int(sm) for each in self.ptx if each.isdigit()):
            return True
        return sm not in _TEGRA and any(
            each[:-1] == sm[:-1] and int(each) <= int(sm)
            for each in self.sms
            if each.isdigit() and each not in _TEGRA
        )


@dataclasses.dataclass(frozen=True)
class LibraryInfo:
    """A library of ours, as its file tells.

    Attributes:
        path: The file.
        bytes: Its size.
        sha256: Its hash.
        machine: The processor it is for: "x86_64", "aarch64" or another's ELF number.
        kind: "plugin", "kernels" or "host".
        version: This project's version.
        abi: The version of the C interface (plugins/include/simprune.h).
        operator: The operator's name.
        operator_version: Its version.
        namespace: The TensorRT plugin's namespace.
        cuda: The compiler's version; None for the host library.
        architectures: The GPU architectures it was configured for.
        tensorrt_headers: The TensorRT version it was compiled against; None without the plugin.
        fields: The TensorRT plugin's fields and their types.
        device_code: The GPU code that is really inside.
    """

    path: Path
    bytes: int
    sha256: str
    machine: str
    kind: str
    version: str
    abi: int
    operator: str
    operator_version: str
    namespace: str
    cuda: str | None
    architectures: tuple[str, ...]
    tensorrt_headers: str | None
    fields: dict[str, str]
    device_code: DeviceCode

    def to_dict(self) -> dict[str, Any]:
        """Return the facts for JSON."""
        return {**dataclasses.asdict(self), "path": str(self.path)}


def read_info(path: str | Path) -> LibraryInfo:
    """Read what a library is from its bytes; nothing of it is loaded or run.

    Args:
        path: A shared library of ours, for any processor.

    Raises:
        SimpruneError: the file cannot be read, is no ELF library, is cut short or damaged, or is
            not one of ours.
    """
    path = Path(path)
    data = _read_elf_file(path)
    machine, gpu_code = _parse_elf(path, data)
    facts = _parse_facts(path, data)
    try:
        return LibraryInfo(
            path=path,
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            machine=machine,
            kind=_typed(facts, "kind", str),
            version=_typed(facts, "version", str),
            abi=_typed(facts, "abi", int),
            operator=_typed(facts, "operator", str),
            operator_version=_typed(facts, "operator_version", str),
            namespace=_typed(facts, "namespace", str),
            cuda=_unless_none(_typed(facts, "cuda", str)),
            architectures=_split(_typed(facts, "architectures", str)),
            tensorrt_headers=_unless_none(_typed(facts, "tensorrt_headers", str)),
            fields=_typed(facts, "fields", dict),
            device_code=_parse_device_code(path, gpu_code),
        )
    except KeyError as error:
        raise ArtifactError(
            f"{path}: its description has no usable {error.args[0]!r}: the file is damaged or "
            "not made by this project; build it again"
        ) from None


def _read_elf_file(path: Path) -> bytes:
    try:
        # a pipe would block, and a device may do anything when it is opened
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ArtifactError(
                f"{path} is a folder: name the library in it, such as "
                f"{path / 'libsimprune_plugin.so'}"
            )
        if not stat.S_ISREG(mode):
            raise ArtifactError(f"{path} is not a shared library: it is no regular file")
        # what has become a pipe since then does not block either
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            # the first bytes decide, so that a file of another kind is not read whole
            start = file.read(8)
            if start.startswith(b"\x7fELF"):
                size = os.fstat(file.fileno()).st_size
                if size > LARGEST_FILE:
                    raise ArtifactError(
                        f"{path} has {size} bytes, more than the {LARGEST_FILE} that are read: it "
                        "is no library of ours; name libsimprune_plugin.so"
                    )
                file.seek(0)
                return file.read(size)
    except FileNotFoundError:
        raise ArtifactError(
            f"{path} does not exist: `simprune-deploy plugin build` makes a library"
        ) from None
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from None
    if start == b"!<arch>\n":
        raise ArtifactError(f"{path} is a static archive: name the shared library (.so)")
    raise ArtifactError(f"{path} is not a shared library: it does not begin as an ELF file")


def _parse_elf(path: Path, data: bytes) -> tuple[str, bytes]:
    """Return the processor and the GPU code (the section .nv_fatbin), empty if there is none."""
    # ELF header: e_ident with class (2: 64 bits) and byte order (1: little-endian), e_machine,
    # then where the section headers are, their size and number, and which of them holds the names
    if len(data) < 64:
        raise _cut_short(path, data)
    if data[4] != 2 or data[5] != 1:
        raise ArtifactError(f"{path} is not a 64-bit little-endian library: it is none of ours")
    machine = struct.unpack_from("<H", data, 18)[0]
    table = struct.unpack_from("<Q", data, 40)[0]
    size, count, names_index = struct.unpack_from("<HHH", data, 58)
    if not table or not count or size < 64:
        raise ArtifactError(f"{path} has no section headers: use the library as it was built")
    if table + size * count > len(data) or names_index >= count:
        raise _cut_short(path, data)

    headers = []
    for index in range(count):
        name, kind, _, _, offset, length = struct.unpack_from("<IIQQQQ", data, table + size * index)
        if kind == _NO_BYTES_IN_FILE:
            length = 0
        elif offset + length > len(data):
            raise _cut_short(path, data)
        headers.append((name, offset, length))
    # sections may overlap, so none is copied but the one that is wanted
    _, names, names_length = headers[names_index]
    found = [
        (offset, length)
        for name, offset, length in headers
        if name < names_length and data.startswith(_FATBIN, names + name, names + names_length)
    ]
    if len(found) > 1:
        raise _damaged_gpu_code(path)
    gpu_code = b"".join(data[offset : offset + length] for offset, length in found)
    return MACHINES.get(machine, f"ELF machine {machine}"), gpu_code


def _cut_short(path: Path, data: bytes) -> SimpruneError:
    return ArtifactError(
        f"{path} is cut short: its {len(data)} bytes are fewer than its headers tell; copy or "
        "build it again"
    )


def _parse_facts(path: Path, data: bytes) -> dict[str, Any]:
    """Return the description that stands after the mark."""
    start = data.find(MARK + b"{")
    if start < 0:
        raise ArtifactError(
            f"{path} is not a library of ours: it has no mark {MARK.decode()!r} inside; name "
            "libsimprune_plugin.so or libsimprune_kernels.so"
        )
    start += len(MARK)
    end = data.find(b"\0", start, start + LARGEST_DESCRIPTION)
    try:
        facts = json.loads(data[start:end]) if end >= 0 else None
    except (ValueError, RecursionError):  # the second: thousands of brackets in one another
        facts = None
    if not isinstance(facts, dict):
        raise ArtifactError(f"{path}: its description is damaged; copy or build it again")
    return facts


def _typed(facts: dict[str, Any], name: str, kind: type) -> Any:
    value = facts.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise KeyError(name)
    if isinstance(value, int) and not 0 <= value < 1 << 31:
        raise KeyError(name)
    texts = [*value.keys(), *value.values()] if isinstance(value, dict) else [value]
    # nothing from the file may steer a terminal or break a line
    if kind is not int and not all(isinstance(each, str) and each.isprintable() for each in texts):
        raise KeyError(name)
    return value


def _unless_none(text: str) -> str | None:
    return None if text == "none" else text


def _split(text: str) -> tuple[str, ...]:
    return () if text in ("", "none") else tuple(text.split(","))


def _parse_device_code(path: Path, section: bytes) -> DeviceCode:
    """Return the architectures in a .nv_fatbin section."""
    found: dict[int, set[tuple[int, str]]] = {_PTX: set(), _CUBIN: set()}
    try:
        for kind, architecture, variant in _fatbin_entries(section):
            found.setdefault(kind, set()).add((architecture, variant))
    except (ValueError, struct.error):
        raise _damaged_gpu_code(path) from None
    sms, ptx = (
        tuple(f"{architecture}{variant}" for architecture, variant in sorted(found[kind]))
        for kind in (_CUBIN, _PTX)
    )
    return DeviceCode(sms, ptx)


def _damaged_gpu_code(path: Path) -> SimpruneError:
    return ArtifactError(
        f"{path}: its GPU code (section .nv_fatbin) is damaged; copy or build it again"
    )


def _fatbin_entries(section: bytes) -> Iterator[tuple[int, int, str]]:
    """Yield kind, architecture and variant ("a", "f" or "") of every piece of GPU code.

    The section holds a container for every object file: magic, version, size of the header, size
    of the rest; then entries: kind, version, size of the header, size of the code, 12 bytes of no
    interest here, architecture, 8 more, flags. CUDA 13.0's nvcc wrote the files that this was
    worked out on.
    """
    position = count = 0
    while True:
        found = section.find(_FATBIN_MAGIC, position)
        gap_end = found if found >= 0 else len(section)
        # padding between containers is zeros
        if section.count(0, position, gap_end) != gap_end - position:
            raise ValueError("not a container")
        if found < 0:
            return
        _, _, header, size = struct.unpack_from("<IHHQ", section, found)
        position, end = found + header, found + header + size
        if header < 16 or end > len(section):
            raise ValueError("not a container")
        count += 1
        while position < end:
            kind, _, header, size = struct.unpack_from("<HHIQ", section, position)
            architecture = struct.unpack_from("<I", section, position + 28)[0]
            flags = struct.unpack_from("<Q", section, position + 40)[0]
            position += header + size
            count += 1
            if header < 48 or position > end or count > _MOST_GPU_CODE:
                raise ValueError("not an entry")
            variant = "".join(letter for flag, letter in _VARIANTS.items() if flags & flag)
            yield kind, architecture, variant
        if count > _MOST_GPU_CODE:
            raise ValueError("too many containers")
