"""Libraries of ours written byte by byte, for machines and versions that are not at hand."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from simprune_deploy.pruning.kernel_library import MARK

FACTS: dict[str, Any] = {
    "kind": "plugin",
    "version": "0.1.0",
    "abi": 2,
    "operator": "SimilarityPrune",
    "operator_version": "2",
    "namespace": "",
    "cuda": "13.0.88",
    "architectures": "87,110",
    "tensorrt_headers": "10.14",
    "fields": {"capacity": "int32"},
}


def fatbin(*entries: tuple[int, int, int], header: int = 64) -> bytes:
    """One container with (kind, architecture, flags) entries and some code in each."""
    body = b""
    for kind, architecture, flags in entries:
        head = struct.pack("<HHIQ12xI8xQ", kind, 0x101, header, 24, architecture, flags)
        body += head.ljust(header, b"\0") + bytes(range(24))
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def elf(machine: int = 183, facts: Any = FACTS, gpu_code: bytes | None = None) -> bytes:
    """A minimal ELF library with a description and, if given, a section of GPU code."""
    text = facts if isinstance(facts, bytes) else MARK + json.dumps(facts).encode() + b"\0more"
    contents = {"": b"", ".rodata": text}
    if gpu_code is not None:
        contents[".nv_fatbin"] = gpu_code
    names = b"".join(name.encode() + b"\0" for name in [*contents, ".bss", ".shstrtab"])
    contents[".shstrtab"] = names
    data, headers = b"", b""
    for name, content in contents.items():
        place = names.find(name.encode() + b"\0")
        headers += struct.pack("<IIQQQQ24x", place, 1, 0, 0, 64 + len(data), len(content))
        data += content
    # a section that takes no bytes of the file, however large it says it is
    headers += struct.pack("<IIQQQQ24x", names.find(b".bss"), 8, 0, 0, 64, 1 << 40)
    table = 64 + len(data)
    head = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack("<HHI", 3, machine, 1)
    head += struct.pack("<QQQIHHHHHH", 0, 0, table, 0, 64, 0, 0, 64, len(contents) + 1, 3)
    if gpu_code is None:
        head = head[:-2] + struct.pack("<H", 2)
    return head + data + headers


def written(path: Path, data: bytes) -> Path:
    """Write a file, and return its path."""
    path.write_bytes(data)
    return path
