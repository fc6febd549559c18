"""What a benchmark ran on: GPU, driver, versions, the library. JSON types only."""

from __future__ import annotations

import datetime
import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from simprune_deploy.pruning.kernel_library import read_info

PACKAGES = ("torch", "timm", "numpy")


def facts(device: torch.device, library: Path) -> dict[str, Any]:
    """Return date, machine and versions; what cannot be found out is None."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": device.type,
        "gpu": None,
        "driver": None,
        "cuda_of_torch": torch.version.cuda,
        "nvcc": nvcc_version(),
        "processor": processor(),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
    }
    info = read_info(library)
    found["library"] = {
        "name": library.name,
        "sha256": info.sha256,
        "kind": info.kind,
        "version": info.version,
        "operator_version": info.operator_version,
        "cuda": info.cuda,
        "architectures": list(info.device_code.sms),
        "tensorrt_headers": info.tensorrt_headers,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "name": properties.name,
            "sm": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        }
        found["driver"] = driver_version()
    return found


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def answer(*command: str) -> str | None:
    """Return what a program prints, or None if it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return result.stdout.strip() if result.returncode == 0 else None


def driver_version() -> str | None:
    told = answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return told.splitlines()[0].strip() if told else None


def nvcc_version() -> str | None:
    match = re.search(r"release [\d.]+, V([\d.]+)", answer("nvcc", "--version") or "")
    return match.group(1) if match else None


def processor() -> str:
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    match = re.search(r"model name\s*: (.+)", text)
    return match.group(1) if match else platform.machine()
