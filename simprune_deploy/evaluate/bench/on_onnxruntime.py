"""The ONNX file in ONNX Runtime, on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.common.progress import Progress
from simprune_deploy.evaluate.bench.inputs import Feed, images_only
from simprune_deploy.evaluate.bench.machine import usable_cores
from simprune_deploy.evaluate.bench.options import BenchOptions
from simprune_deploy.evaluate.bench.subjects import DENSE, Subject, Subjects, name_of
from simprune_deploy.evaluate.timing import Runner
from simprune_deploy.onnx.exported_folder import MODEL
from simprune_deploy.predict import memory_worker
from simprune_deploy.predict.onnxruntime_session import cpu_session

if TYPE_CHECKING:
    import onnx

    from simprune_deploy.onnx.metadata import ModelMetadata


def onnxruntime_subjects(
    folder: Path,
    graph: onnx.ModelProto,
    metadata: ModelMetadata,
    feeds: dict[float, list[Feed]],
    options: BenchOptions,
    progress: Progress,
) -> Subjects:
    """Return the models in sessions of their own, with the memory each takes in a process alone.

    Args:
        folder: The exported folder.
        graph, metadata: Its model.
        feeds: By threshold, the batches to run.
        options: The user's choices.
        progress: Called with a word on each step.

    Raises:
        SimpruneError: ONNX Runtime is missing, cannot run the model, or was ended.
    """
    from simprune_deploy.onnx.variants import dense, with_function

    try:
        import onnxruntime
    except ImportError as error:
        raise SimpruneError(
            f"onnxruntime does not load ({error}): pip install onnxruntime"
        ) from None
    if metadata.precision == "bf16":
        raise SimpruneError(
            "ONNX Runtime has no bfloat16 on the CPU: time an engine, or an export in fp32"
        )
    threads = options.threads or usable_cores()
    first = next(iter(feeds.values()))
    plain = [images_only(feed) for feed in first]
    models = []
    with tempfile.TemporaryDirectory() as scratch:
        unpruned, pruned = Path(scratch) / "dense.onnx", folder / MODEL
        unpruned.write_bytes(dense(graph).SerializeToString())
        if not metadata.has_function:
            pruned = Path(scratch) / MODEL
            pruned.write_bytes(with_function(graph).SerializeToString())
        progress(f"memory: {DENSE}")
        memory = _memory(unpruned, plain, threads)
        models.append(Subject(DENSE, _runner(cpu_session(str(unpruned), threads), plain), memory))
        session = cpu_session(str(pruned), threads)
        for threshold, batches in feeds.items():
            name = name_of(threshold, list(feeds))
            progress(f"memory: {name}")
            memory = _memory(pruned, batches, threads)
            models.append(Subject(name, _runner(session, batches), memory, threshold))
    environment: dict[str, Any] = {
        "backend": "onnxruntime",
        "run_by": f"the ONNX file in ONNX Runtime {onnxruntime.__version__}, on the CPU",
        "threads": threads,
    }
    if metadata.precision == "fp16":
        environment["note"] = (
            "on a CPU, ONNX Runtime casts much of a float16 model to float32 and back: this says "
            "nothing about a GPU"
        )
    return Subjects(models, environment)


def _runner(session: Any, batches: list[Feed]) -> Runner:
    def run(index: int) -> None:
        session.run(None, batches[index])

    return run


def _memory(model: Path, batches: list[Feed], threads: int) -> dict[str, int]:
    """Run a model in a process of its own, and return the most memory that it had."""
    with tempfile.TemporaryDirectory() as scratch:
        feeds = Path(scratch) / "feeds.npz"
        arrays = {
            f"{i}/{name}": each for i, feed in enumerate(batches) for name, each in feed.items()
        }
        np.savez(feeds, **arrays)  # type: ignore[arg-type]
        worker = memory_worker.__name__
        done = subprocess.run(
            [sys.executable, "-m", worker, str(model), str(feeds), str(threads)],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise SimpruneError(
            f"ONNX Runtime cannot run {model.name} (exit code {done.returncode}): {said[:300]}"
        )
    found = json.loads(done.stdout)
    if found["peak"] is None:
        return {}
    return {"process at most": found["peak"], "process before the model": found["before"]}
