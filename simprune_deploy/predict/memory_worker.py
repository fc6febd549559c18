"""Runs one ONNX file in ONNX Runtime and says what memory that took; a process of its own.

    python memory_worker.py MODEL FEEDS.npz THREADS

FEEDS has arrays named ``0/images``, ``0/threshold``, ``1/images``, ...: the number of the feed and
the input's name. Prints JSON: bytes resident before the model was loaded, and the most there were.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path


def main() -> None:
    """Load, run every feed twice, and print."""
    import numpy as np
    import onnxruntime  # noqa: F401  (its own size is not the model's)

    from simprune_deploy.predict.onnxruntime_session import cpu_session

    model, feeds_path, threads = sys.argv[1:]
    feeds: dict[str, dict[str, np.ndarray]] = {}
    with np.load(feeds_path, allow_pickle=False) as file:
        for key in file.files:
            number, _, name = key.partition("/")
            feeds.setdefault(number, {})[name] = file[key]
    before = resident("VmRSS")
    session = cpu_session(model, int(threads))
    for _ in range(2):
        for feed in feeds.values():
            session.run(None, feed)
    # not getrusage's: that counts what the parent held when it started this process
    print(json.dumps({"before": before, "peak": resident("VmHWM")}))


def resident(which: str) -> int | None:
    """Return what Linux counts for this process, in bytes; None on other systems."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    match = re.search(rf"{which}:\s*(\d+) kB", status.read_text(encoding="utf-8"))
    return int(match.group(1)) * 1024 if match else None


if __name__ == "__main__":
    main()
