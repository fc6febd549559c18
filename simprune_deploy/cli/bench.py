"""``bench``: how fast an exported model is beside the same model without pruning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from simprune_deploy.cli.common import Json, errors, print_json
from simprune_deploy.common.errors import InvalidArgumentError

Backend = Literal["engine", "onnxruntime"]


def bench(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Exported folder, or an ONNX file of one.")
    ],
    backend: Annotated[
        Backend,
        typer.Option(
            help="engine: TensorRT on the GPU here; onnxruntime: the ONNX file on the CPU."
        ),
    ] = "engine",
    batch: Annotated[
        int | None,
        typer.Option(help="Images in a batch.  [default: the smallest that the export takes]"),
    ] = None,
    thresholds: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="0.95,0.9,0.8: for exports with a run-time threshold.  [default: the model's]",
        ),
    ] = None,
    iterations: Annotated[int, typer.Option(help="Timed runs of each model, at least.")] = 100,
    warm_up: Annotated[int, typer.Option(help="Runs of each model before that.")] = 10,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of pictures.  [default: the golden cases]"),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(help="Of ONNX Runtime.  [default: the cores there are to use]"),
    ] = None,
    plugin: Annotated[
        Path | None,
        typer.Option(help="The plugin's library, for engines.  [default: as in build]"),
    ] = None,
    cuda_graph: Annotated[
        bool,
        typer.Option(
            "--cuda-graph", help="Replay engines as CUDA graphs: the dense one, and fixed tokens."
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Build the engines again that are there already.")
    ] = False,
    fused_attention: Annotated[
        bool,
        typer.Option(
            "--fused-attention",
            help="Time both with ONNX Runtime's attention for GPUs, as in model-fused.onnx.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Time an exported model and the same model without pruning, side by side."""
    with errors():
        from simprune_deploy.evaluate.bench import BenchRequest
        from simprune_deploy.evaluate.bench import bench as time_models
        from simprune_deploy.reports.bench import print_benchmark
        from simprune_deploy.reports.terminal import progress

        request = BenchRequest(
            model=folder,
            backend=backend,
            batch=batch,
            thresholds=_numbers(thresholds) if thresholds is not None else (),
            iterations=iterations,
            warm_up=warm_up,
            images=images,
            threads=threads,
            plugin=plugin,
            cuda_graph=cuda_graph,
            force=force,
            fused_attention=fused_attention,
        )
        with progress(enabled=not as_json) as step:
            report = time_models(request, progress=step)
        if as_json:
            print_json(report.to_dict())
        else:
            print_benchmark(report.to_dict())


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InvalidArgumentError(
            f"--thresholds {text!r} is not understood: write 0.95,0.9,0.8"
        ) from None
