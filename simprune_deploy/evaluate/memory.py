"""What memory a model takes, measured in a process of its own: the one probe of sweep and bench.

    python -m simprune_deploy.evaluate.memory REQUEST.pickle

The request is pickled by :func:`probe` and read by nobody else. Only Linux tells; elsewhere every
number is None.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import pickle
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from simprune_deploy.common.errors import ToolFailedError
from simprune_deploy.predict.predictor import Predictor, PredictorSpec

RUNS = 3


@dataclasses.dataclass(frozen=True)
class MemoryUse:
    """Bytes of a process that runs a model.

    Attributes:
        before: Resident before the model was loaded: Python and the runtime's own code.
        peak: The most that was ever resident.
        runs: For each run that was asked for, by how much the process grew at most meanwhile,
            beyond the loaded model: what lies between its layers. Median of the repeats.
    """

    before: int | None
    peak: int | None
    runs: tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class MemoryRun:
    """A model and a batch to run.

    Attributes:
        spec: What opens the model.
        images: [b, ...] as the model takes them, or as pixels in [0, 1] if `pixels`.
        threshold: Default None: the model's own.
        pixels: Whether `images` are pixels. Default False.
    """

    spec: PredictorSpec
    images: np.ndarray
    threshold: float | None = None
    pixels: bool = False


def probe(runs: Sequence[MemoryRun], repeats: int = RUNS) -> MemoryUse:
    """Run models in a process of their own, one after another, and return what that took.

    Args:
        runs: What to run; each once, and then as often as is measured.
        repeats: Measured runs of each. Default :data:`RUNS`.

    Raises:
        ToolFailedError: the process failed; with its last line.
    """
    with tempfile.TemporaryDirectory() as scratch:
        request = Path(scratch) / "request.pickle"
        request.write_bytes(pickle.dumps((list(runs), repeats)))
        done = subprocess.run(
            [sys.executable, "-m", __name__, str(request)],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise ToolFailedError(
            f"the model cannot be run in a process of its own (exit code {done.returncode}): "
            f"{said[:300]}"
        )
    found = json.loads(done.stdout.splitlines()[-1])
    return MemoryUse(found["before"], found["peak"], tuple(found["runs"]))


def main() -> None:
    """Open what the request names, run it, and print what :func:`probe` reads."""
    with contextlib.suppress(ImportError):
        import onnxruntime  # noqa: F401  (its own size is not the model's)
    runs: list[MemoryRun]
    runs, repeats = pickle.loads(Path(sys.argv[1]).read_bytes())
    before, peak = resident("VmRSS"), None
    grown: list[int | None] = []
    opened: dict[str, Predictor] = {}
    for each in runs:
        if each.spec.key not in opened:
            opened[each.spec.key] = each.spec.open()
        predictor = opened[each.spec.key]
        images = predictor.to_inputs(each.images) if each.pixels else each.images
        prepared = predictor.prepare(images, each.threshold)

        def run(model: Predictor = predictor, inputs: object = prepared) -> object:
            return model.run(inputs)

        run()
        peak = _larger(peak, resident("VmHWM"))
        growths = [growth_in(run) for _ in range(repeats)]
        known = [growth for growth in growths if growth is not None]
        grown.append(int(statistics.median(known)) if len(known) == repeats else None)
        peak = _larger(peak, resident("VmHWM"))
    print(json.dumps({"before": before, "peak": peak, "runs": grown}))


def growth_in(run: Callable[[], object]) -> int | None:
    """Return how many bytes of memory this process took at most in a run, beyond those it had."""
    try:
        # what was freed and not yet given back would hide the growth
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back
        before = resident("VmRSS")
        run()
        peak = resident("VmHWM")
    except OSError:
        return None
    return None if before is None or peak is None else max(0, peak - before)


def resident(which: str) -> int | None:
    """Return what Linux counts for this process, in bytes; None on other systems.

    Not getrusage's: that counts what the parent held when it started this process.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    match = re.search(rf"{which}:\s*(\d+) kB", status.read_text(encoding="utf-8"))
    return int(match.group(1)) * 1024 if match else None


def _larger(one: int | None, other: int | None) -> int | None:
    known = [each for each in (one, other) if each is not None]
    return max(known, default=None)


if __name__ == "__main__":
    main()
