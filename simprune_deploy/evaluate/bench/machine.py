"""What a machine is, for a report on its speed: processor, GPU, power mode, clocks, load.

What the system does not tell is not in the answer.
"""

from __future__ import annotations

import os
import platform
import re

from simprune_deploy.deploy.doctor.machine import Machine, gather

CLOCKS = "clocks.current.sm,clocks.max.sm,clocks.current.memory,power.limit,persistence_mode"
CLOCK_NAMES = ("SM clock", "SM clock at most", "memory clock", "power limit", "persistence mode")


def describe_machine(machine: Machine | None = None) -> dict[str, str]:
    """Return what is known of a machine, by name, in words.

    Args:
        machine: Where to look. Default: this one.
    """
    machine = machine or Machine()
    told = machine.run(("nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader", "--id=0"))
    clocks = [each.strip() for each in (told or "").split(",")] if told else []
    mode = re.search(r"NV Power Mode: *(.+)", machine.run(("nvpmodel", "-q")) or "")
    model = re.search(r"model name\s*: (.+)", machine.read("proc/cpuinfo"))
    facts = gather(machine)
    known: dict[str, str | None] = {
        "system": machine.read("proc/device-tree/model").strip(),
        "processor": f"{model[1] if model else platform.machine()}, {usable_cores()} of "
        f"{os.cpu_count()} cores",
        "load before": f"{_load():.1f} programs, mean of the last minute",
        "frequency governor": machine.read(
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"
        ).strip(),
        "GPU": ", ".join(facts.gpus[:1]),
        "driver": facts.driver,
        "driver's CUDA": facts.cuda,
        "power mode": mode[1] if mode else None,
        **dict(zip(CLOCK_NAMES, clocks, strict=False)),
    }
    return {name: value for name, value in known.items() if value}


def usable_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_busy() -> bool:
    """Whether more programs want to run than there are cores, over the last minute."""
    return _load() > (os.cpu_count() or 1)


def _load() -> float:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
