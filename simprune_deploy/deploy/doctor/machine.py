"""What kind of machine this is: GPU, driver, CUDA, Jetson. Nothing of it is changed.

All that is looked at goes through a :class:`Machine`, so that a captured one can be examined too.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from simprune_deploy.common.versions import is_older
from simprune_deploy.deploy.doctor.findings import Finding
from simprune_deploy.engine.gpu import Gpu, NoGpuError, find_gpu

TIMEOUT = 10.0
"""Seconds a program may take to answer; nvidia-smi waits for minutes on a broken driver."""

OLDEST_L4T = "36"
"""JetPack 6; JetPack 5 has TensorRT 8."""

UPDATE_DRIVER = "update NVIDIA's driver: https://www.nvidia.com/drivers"


def run_command(command: Sequence[str]) -> str | None:
    """Return what a program prints; None if there is none, it fails, or takes too long."""
    program = shutil.which(command[0])
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, *command[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where to look.

    Attributes:
        root: The root of the file system. Default "/".
        run: Runs a program that only reads, and returns what it prints, or None.
        find_gpu: Asks the driver for the first GPU; raises NoGpuError.
        processor: Such as "x86_64" or "aarch64".
    """

    root: Path = Path("/")
    run: Callable[[Sequence[str]], str | None] = run_command
    find_gpu: Callable[[], Gpu] = find_gpu
    processor: str = dataclasses.field(default_factory=platform.machine)

    def read(self, path: str) -> str:
        """Return a file's text without NULs and what does not print; "" if it cannot be read."""
        try:
            text = (self.root / path).read_bytes().decode("utf-8", "replace")
        except OSError:
            return ""
        return "".join(each for each in text if each.isprintable() or each == "\n")


@dataclasses.dataclass(frozen=True)
class Facts:
    """What libraries and engines must fit; None is unknown.

    Attributes:
        processor: Such as "x86_64" or "aarch64".
        gpus: Their names.
        capability: The first GPU's compute capability, such as (8, 7).
        driver: The driver's version.
        cuda: The newest CUDA version that the driver knows.
        problem: Why no GPU was found, in words; "" if one was.
    """

    processor: str
    gpus: tuple[str, ...]
    capability: tuple[int, int] | None
    driver: str | None
    cuda: str | None
    problem: str


def gather(machine: Machine) -> Facts:
    """Ask the driver itself, and nvidia-smi; either may know what the other does not."""
    query = ("nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv")
    rows = [
        [field.strip() for field in line.split(",")]
        for line in (machine.run(query) or "").splitlines()[1:]
    ]
    rows = [row for row in rows if len(row) == 3]
    names = [_described(row[0], _capability(row[1])) for row in rows]
    capability = _capability(rows[0][1]) if rows else None
    driver = rows[0][2] if rows and re.match(r"\d", rows[0][2]) else None
    cuda, problem = None, ""
    try:
        found = machine.find_gpu()
    except NoGpuError as error:
        problem = "" if rows else str(error)
        # without the driver's library (as in some containers) nvidia-smi's table tells
        table = re.search(r"CUDA Version\s*:\s*(\d+\.\d+)", machine.run(("nvidia-smi",)) or "")
        cuda = table[1] if table else None
    else:
        capability, cuda = found.compute_capability, found.cuda
        # a Jetson's nvidia-smi may know no more of its GPU than the name, or not be there
        first = _described(found.name, capability)
        names = [first, *names[1:]] if len(names) > 1 else [first]
    return Facts(machine.processor, tuple(names), capability, driver, cuda, problem)


def _capability(text: str) -> tuple[int, int] | None:
    match = re.fullmatch(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else None


def _described(name: str, capability: tuple[int, int] | None) -> str:
    known = f"{capability[0]}.{capability[1]}" if capability else "unknown"
    return f"{name} (compute capability {known})"


def examine_machine(machine: Machine, facts: Facts) -> list[Finding]:
    """Return a line each for the GPU and its driver, and for toolkit and Jetson where they are."""
    gpu = Finding("CUDA GPU", "ok", ", ".join(facts.gpus), "running engines", "", needed=False)
    if not facts.gpus:
        remedy = "install NVIDIA's driver (nvidia-smi must list the GPU)"
        gpu = dataclasses.replace(gpu, state="optional", remedy=remedy, detail=facts.problem)
        return [gpu, *_examine_toolkit(machine), *_examine_jetson(machine)]
    version = f"{facts.driver or 'unknown'} (CUDA up to {facts.cuda or 'unknown'})"
    driver = Finding("NVIDIA driver", "ok", version, "running engines", "", needed=False)
    return [gpu, driver, *_examine_toolkit(machine), *_examine_jetson(machine)]


def _examine_toolkit(machine: Machine) -> list[Finding]:
    """Return what is in /usr/local/cuda, if it is there; nvcc may be elsewhere too."""
    try:
        version = json.loads(machine.read("usr/local/cuda/version.json"))["cuda"]["version"]
    except (ValueError, KeyError, TypeError):
        return []
    needed_for = "building the TensorRT plugin from source"
    return [Finding("CUDA toolkit", "ok", str(version), needed_for, "", needed=False)]


def _examine_jetson(machine: Machine) -> list[Finding]:
    """Return nothing on other machines."""
    model = machine.read("proc/device-tree/model").strip()
    release = re.match(
        r"# R(\d+) \(release\), REVISION: ([\d.]+)", machine.read("etc/nv_tegra_release")
    )
    if release is None and "tegra" not in machine.read("proc/device-tree/compatible"):
        return []
    l4t = f"{release[1]}.{release[2]}" if release else ""
    jetpack = (
        machine.run(("dpkg-query", "--show", "--showformat=${Version}", "nvidia-jetpack")) or ""
    ).strip()
    mode = re.search(r"NV Power Mode:\s*(\S+)", machine.run(("nvpmodel", "-q")) or "")
    known = [
        model or "a Jetson of unknown model",
        f"L4T {l4t or 'unknown'}",
        f"JetPack {jetpack}" if jetpack else "nvidia-jetpack not installed",
        f"power mode {mode[1] if mode else 'unknown'}",
    ]
    finding = Finding(
        "Jetson", "ok", ", ".join(known), "building and running engines", "", needed=False
    )
    if l4t and is_older(l4t, OLDEST_L4T):
        return [
            dataclasses.replace(
                finding,
                state="too old",
                remedy="install JetPack 6.1 or later",
                detail="its TensorRT 8 cannot load the plugin",
            )
        ]
    return [finding]
