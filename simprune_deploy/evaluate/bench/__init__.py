"""How fast an exported model is beside the same model without pruning, on this machine.

Both are timed in one run, in turn, on real pictures: how many tokens stay depends on the picture,
so noise would say nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from simprune_deploy.common.errors import InvalidArgumentError, argument
from simprune_deploy.common.progress import Progress, silent
from simprune_deploy.common.requests import request_of
from simprune_deploy.evaluate.bench.inputs import count_tokens, load_pictures
from simprune_deploy.evaluate.bench.machine import describe_machine, is_busy
from simprune_deploy.evaluate.bench.models import DENSE, TimedModel, open_models
from simprune_deploy.evaluate.bench.request import BenchRequest
from simprune_deploy.evaluate.timing import (
    Plan,
    Speedup,
    Times,
    as_json,
    latency,
    layer_cost,
    measure,
    speedup,
)
from simprune_deploy.predict.source import ModelSource, source_of_export


@dataclasses.dataclass(frozen=True)
class BenchReport:
    """What was timed.

    Attributes:
        data: In JSON types: ``model``, ``machine``, ``machine_was_busy``, ``environment``,
            ``inputs``, ``plan``, ``models`` (with latency, speed-up over the dense model and its
            confidence interval, what the tokens allow, what a prune layer costs, memory),
            ``trtexec``.
    """

    data: dict[str, Any]

    def __str__(self) -> str:
        lines = []
        for row in self.data["models"]:
            faster = f", {row['speedup']['ratio']:.2f}x" if "speedup" in row else ""
            lines.append(f"{row['name']}: {row['latency_ms']['mean']:.2f} ms{faster}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        return self.data


def bench(
    model: BenchRequest | str | Path, *, progress: Progress = silent, **fields: Any
) -> BenchReport:
    """Time an exported model and the same model without pruning, side by side.

    Args:
        model: A :class:`BenchRequest`, or its first field; the others by name.
        progress: Called with a word on each step.

    Raises:
        SimpruneError: the export is damaged, an argument does not fit it, or there is nothing
            here to run it with.
    """
    from simprune_deploy.onnx.variants import prune_nodes

    request = request_of(BenchRequest, model, fields)
    source = source_of_export(Path(request.model))
    assert source.graph is not None
    if not prune_nodes(source.graph):
        raise InvalidArgumentError(
            f"{source.name} prunes nothing (threshold {source.metadata.pruning.threshold}): there "
            "is nothing to compare"
        )
    thresholds = _thresholds(source, request)
    pictures = load_pictures(source, request.images, request.batch)
    machine, busy = describe_machine(), is_busy()
    with contextlib.ExitStack() as stack:
        opened = open_models(stack, source, request, thresholds, pictures.batches, progress)
        plan = Plan(request.iterations, request.warm_up, len(pictures.batches))
        runners = {each.name: each.runner(pictures.batches) for each in opened.models}
        times = measure(runners, plan, progress=progress)
    progress("counting tokens")
    tokens = {
        threshold: count_tokens(source, pictures.batches, threshold) for threshold in thresholds
    }
    metadata = source.metadata
    return BenchReport(
        {
            "model": {
                "folder": source.name,
                "architecture": metadata.architecture,
                "image_size": list(metadata.image_size),
                "precision": metadata.precision,
                "pruning": metadata.pruning.to_dict(),
                "verdict": "unknown: the file was given without its folder"
                if source.manifest is None
                else source.manifest["verdict"],
            },
            "machine": machine,
            "machine_was_busy": busy,
            "environment": opened.environment,
            "inputs": {
                "source": pictures.source,
                "images": pictures.count,
                "batch": len(pictures.batches[0]),
                "batches": len(pictures.batches),
                "skipped": [list(pair) for pair in pictures.skipped],
            },
            "plan": {
                "warm_up": plan.warm_up,
                "blocks": len(plan.blocks),
                "runs_a_block": len(plan.blocks[0]),
            },
            "models": [
                _row(each, times, tokens, len(pictures.batches[0])) for each in opened.models
            ],
            "trtexec": list(opened.trtexec),
        }
    )


def _thresholds(source: ModelSource, request: BenchRequest) -> tuple[float, ...]:
    own = source.metadata.pruning.threshold
    if not request.thresholds:
        return (own,)
    if not source.runtime_threshold:
        raise InvalidArgumentError(
            f"the threshold of this export is fixed at {own}: export with "
            f"{argument('runtime_threshold', True)} to time others"
        )
    return tuple(dict.fromkeys(request.thresholds))


def _row(
    model: TimedModel,
    times: dict[str, Times],
    tokens: dict[float, dict[str, Any]],
    batch: int,
) -> dict[str, Any]:
    dense, mine = times[DENSE], times[model.name]
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
        found = speedup(dense.whole, mine.whole)
        row["speedup"] = as_json(found)
        row["gpu_speedup"] = as_json(speedup(dense.gpu, mine.gpu)) if mine.gpu else None
        row["tokens"] = tokens[model.threshold]
        row["layer_cost"] = _layer_cost(found, tokens[model.threshold])
    return row


def _layer_cost(found: Speedup, tokens: dict[str, Any]) -> dict[str, Any] | None:
    """Return what a prune layer costs; None where nobody counted the tokens."""
    if "unknown" in tokens:
        return None
    cost = layer_cost(found, tokens["allowed_speedup"], len(tokens["kept"]))
    return None if cost is None else as_json(cost)
