"""How fast an exported model is beside the same model without pruning, on this machine.

Both are timed in one run, in turn, on real pictures: how many tokens stay depends on the picture,
so noise would say nothing. What is timed is the exported folder's model, in its engine or in ONNX
Runtime, and the graph that is left when its prune nodes are taken out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.common.progress import Progress, silent
from simprune_deploy.evaluate.bench.inputs import (
    count_tokens,
    feed_of,
    load_pictures,
    thresholds_of,
)
from simprune_deploy.evaluate.bench.machine import describe_machine, is_busy
from simprune_deploy.evaluate.bench.options import BenchOptions
from simprune_deploy.evaluate.bench.subjects import Subject, Subjects
from simprune_deploy.evaluate.timing import Plan, Times, as_json, latency, measure, speedup
from simprune_deploy.onnx.exported_folder import MODEL, read_manifest

if TYPE_CHECKING:
    import onnx

    from simprune_deploy.evaluate.bench.inputs import Feed
    from simprune_deploy.onnx.metadata import ModelMetadata

__all__ = ["BenchOptions", "benchmark"]


def benchmark(
    folder: str | Path,
    options: BenchOptions | None = None,
    *,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Time an exported model and the same model without pruning.

    Args:
        folder: A folder that :func:`simprune_deploy.export` wrote.
        options: Default: :class:`BenchOptions`'s defaults.
        progress: Called with a word on each step.

    Returns:
        The report, in JSON types: ``model``, ``machine``, ``machine_was_busy``, ``environment``,
        ``inputs``, ``plan``, ``models`` (with latency, speed-up over the dense model and its
        confidence interval, what the tokens allow, memory), ``trtexec``.

    Raises:
        SimpruneError: the folder is damaged, an option does not fit the model, or there is
            nothing here to run it with.
    """
    from simprune_deploy.onnx.metadata import load_graph, read_metadata
    from simprune_deploy.onnx.variants import prune_nodes

    options = options or BenchOptions()
    folder = Path(folder)
    manifest = read_manifest(folder)
    graph = load_graph(folder / MODEL)
    metadata = read_metadata(graph)
    if not prune_nodes(graph):
        raise SimpruneError(
            f"{folder} prunes nothing (threshold {metadata.pruning.threshold}): there is nothing "
            "to compare"
        )
    thresholds = thresholds_of(metadata, options)
    pictures = load_pictures(folder, graph, metadata, options)
    feeds = {
        threshold: [feed_of(metadata, batch, threshold) for batch in pictures.batches]
        for threshold in thresholds
    }
    machine, busy = describe_machine(), is_busy()
    with contextlib.ExitStack() as stack:
        subjects = _subjects(stack, folder, graph, metadata, feeds, options, progress)
        plan = Plan(options.iterations, options.warm_up, len(pictures.batches))
        runners = {subject.name: subject.run for subject in subjects.models}
        times = measure(runners, plan, progress=progress)
    progress("counting tokens")
    tokens = {name: count_tokens(graph, metadata, each) for name, each in feeds.items()}
    return {
        "model": {
            "folder": str(folder),
            "architecture": metadata.architecture,
            "image_size": list(metadata.image_size),
            "precision": metadata.precision,
            "pruning": metadata.pruning.to_dict(),
            "verdict": manifest["verdict"],
        },
        "machine": machine,
        "machine_was_busy": busy,
        "environment": subjects.environment,
        "inputs": {
            "source": pictures.source,
            "images": pictures.count,
            "batch": len(pictures.batches[0]),
            "batches": len(pictures.batches),
            "skipped": [list(pair) for pair in pictures.skipped],
        },
        "plan": {
            "warm_up": plan.warm_up,
            "blocks": plan.blocks,
            "runs_a_block": plan.rounds_a_block * plan.inputs,
        },
        "models": _rows(subjects.models, times, tokens, len(pictures.batches[0])),
        "trtexec": list(subjects.trtexec),
    }


def _rows(
    models: Sequence[Subject],
    times: dict[str, Times],
    tokens: dict[float, dict[str, Any]],
    batch: int,
) -> list[dict[str, Any]]:
    dense = times[models[0].name]
    rows = []
    for model in models:
        mine = times[model.name]
        whole = latency(mine.whole)
        row: dict[str, Any] = {
            "name": model.name,
            "threshold": model.threshold,
            "latency_ms": as_json(whole),
            "images_per_second": round(batch / whole.mean * 1e3, 3),
            "gpu_ms": as_json(latency(mine.gpu)) if mine.gpu else None,
            "memory_bytes": model.memory,
        }
        if model.threshold is not None:
            row["speedup"] = as_json(speedup(dense.whole, mine.whole))
            row["gpu_speedup"] = as_json(speedup(dense.gpu, mine.gpu)) if mine.gpu else None
            row["tokens"] = tokens[model.threshold]
        rows.append(row)
    return rows


def _subjects(
    stack: contextlib.ExitStack,
    folder: Path,
    graph: onnx.ModelProto,
    metadata: ModelMetadata,
    feeds: dict[float, list[Feed]],
    options: BenchOptions,
    progress: Progress,
) -> Subjects:
    if options.backend == "onnxruntime":
        from simprune_deploy.evaluate.bench.on_onnxruntime import onnxruntime_subjects

        return onnxruntime_subjects(folder, graph, metadata, feeds, options, progress)
    from simprune_deploy.evaluate.bench.on_engines import engine_subjects

    return engine_subjects(stack, folder, metadata, feeds, options, progress)
