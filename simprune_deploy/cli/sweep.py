"""``sweep``: what each setting gives and costs."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from simprune_deploy.cli.common import (
    Arch,
    Json,
    Pretrained,
    TrustPickle,
    errors,
    load_model,
    print_json,
)
from simprune_deploy.common.errors import SimpruneError

if TYPE_CHECKING:
    from simprune_deploy.tune.grid import Grid
    from simprune_deploy.tune.results import Setting, SweepResult
    from simprune_deploy.tune.subject import Subject
    from simprune_deploy.tune.sweep import Bar, Runner

Data = Annotated[
    Path,
    typer.Option(help="Folder with a folder a class, or of pictures; .csv, .npz; Hugging Face."),
]
Limit = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="Take this many pictures, spread evenly.  [default: all]"),
]
Classes = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="File that maps the data's classes to the model's."),
]
NoLabels = Annotated[bool, typer.Option("--no-labels", help="Leave labels aside.")]
MaxUnreadable = Annotated[
    str, typer.Option(help="Share of unreadable pictures beyond which it stops.")
]
BackendName = Annotated[str, typer.Option(help="What runs the model: onnxruntime, torch, engine.")]
BatchSize = Annotated[int, typer.Option(help="Pictures a run; timing is of one.")]
Ray = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Run on a Ray cluster: host:port, auto, or local.", metavar="ADDRESS"),
]
Timing = Annotated[int, typer.Option(help="Runs that each latency is of; 0: no timing.")]


def sweep(
    model: Annotated[str, typer.Argument(help="Checkpoint, hub folder, or exported folder.")],
    data: Data,
    thresholds: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="first:last:step, or a list: 0.9,0.8.  [default: 0.95:0.6:0.05]",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="'auto', or sets of blocks: 3,6,9;2,5,8.  [default: the model's, or auto]"
        ),
    ] = None,
    selection: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="cover, redundancy, or both: cover,redundancy.  [default: cover]"),
    ] = None,
    reduction: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="merge, drop, or both.  [default: merge]"),
    ] = None,
    tokens: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="'dynamic', or counts as in export: dynamic;64.  [default: dynamic]"),
    ] = None,
    backend: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="What runs the model: onnxruntime, torch, engine.  [default: onnxruntime, with "
            "--compare torch]",
            show_default=False,
        ),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Baselines too, at the same token counts, in PyTorch."),
    ] = False,
    limit: Limit = None,
    classes: Classes = None,
    no_labels: NoLabels = False,
    max_unreadable: MaxUnreadable = "1%",
    batch: BatchSize = 32,
    timing: Timing = 200,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("-o", "--output", help="Folder to write.  [default: NAME-sweep]"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is there.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier sweep.")] = False,
    ray: Ray = None,
    arch: Arch = None,
    pretrained: Pretrained = False,
    trust_pickle: TrustPickle = False,
    as_json: Json = False,
) -> None:
    """Measure accuracy, tokens, time and memory at many settings, beside the dense model."""
    with errors():
        from simprune_deploy.evaluate.datasets import DataOptions, open_data
        from simprune_deploy.report.bars import progress_bar
        from simprune_deploy.tune.grid import Grid, parse_layer_sets, parse_thresholds
        from simprune_deploy.tune.store import check_store
        from simprune_deploy.tune.sweep import SweepOptions, batch_for, start_sweep

        # every check that needs no model comes before the model is loaded
        wishes = {
            "thresholds": thresholds,
            "layers": layers,
            "selections": selection,
            "reductions": reduction,
            "tokens": tokens,
        }
        asked = {name: value for name, value in wishes.items() if value is not None}
        grid = Grid(**asked)
        parse_thresholds(grid.thresholds)
        parse_layer_sets(grid.layers)
        options = SweepOptions(batch, timing)
        wanted = DataOptions(limit, not no_labels, classes, parse_share(max_unreadable))
        folder = output or Path(f"{stem_of(model)}-sweep")
        check_store(folder, resume, force)
        if compare and backend not in (None, "torch"):
            raise SimpruneError(f"--compare runs in PyTorch, not {backend}: leave --backend out")
        name = backend or ("torch" if compare else "onnxruntime")
        check_engines(name, model, ray)

        from simprune_deploy.tune.backends import backend_of, compared

        with progress_bar(enabled=not as_json) as bar, joined(ray) as runner:
            bar.begin("loading the model and the list of pictures", 1)
            subject = load_subject(model, arch, pretrained, trust_pickle)
            settings = settings_for(subject, grid, asked)
            if compare:
                settings = compared(settings)
            options = SweepOptions(batch_for(subject, batch), timing)
            pictures = open_data(data, subject.metadata, wanted)
            started = start_sweep(
                subject,
                pictures,
                backend_of(name, subject, options.batch, building(bar)),
                folder,
                options,
                resume=resume,
                force=force,
                runner=runner,
                bar=bar,
            )
            result = started.result(settings, command_line())
            written = write_results(result, folder)
        if as_json:
            files = [path.name for path in written]
            print_json({"output": str(folder), "files": files, **result.to_dict()})
        else:
            _print_sweep(result, written)


def write_results(result: SweepResult, folder: Path) -> list[Path]:
    """Write what a sweep gave; the page and the plots where what draws them is installed."""
    import importlib.util

    from simprune_deploy.report.sweep import FILES, write_report

    drawn = all(importlib.util.find_spec(name) for name in ("matplotlib", "jinja2"))
    result.save(folder / "sweep.json")
    written = [folder / "sweep.json"]
    for name in FILES:
        if drawn or name.endswith((".csv", ".md")):
            write_report(result, folder / name)
            written.append(folder / name)
    return written


def _print_sweep(result: SweepResult, written: list[Path]) -> None:
    from rich.console import Console

    from simprune_deploy.report.tables import print_sweep

    console = Console()
    print_sweep(console, result)
    for note in result.data["notes"]:
        console.print(note, style="dim", highlight=False, markup=False)
    for path in written:
        console.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)
    if not any(path.suffix == ".html" for path in written):
        console.print(
            'no page and no plots: pip install "simprune-deploy[report]", then '
            f"`simprune-deploy report {written[0].parent} -o report.html`",
            style="yellow",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def command_line() -> str:
    """Return the command that runs, as one would type it."""
    return shlex.join(["simprune-deploy", *sys.argv[1:]])


@contextlib.contextmanager
def joined(address: str | None) -> Iterator[Runner | None]:
    """Join the Ray cluster that was asked for, if one was."""
    if address is None:
        yield None
        return
    from simprune_deploy.tune.cluster import connected

    with connected(address) as runner:
        yield runner


def check_engines(backend: str, model: str, ray: str | None) -> None:
    """Refuse engines before any work where they cannot run."""
    if backend == "engine":
        from simprune_deploy.tune.engine_backend import check_engines_can_run

        check_engines_can_run(Path(model), ray is not None)


def building(bar: Bar) -> Callable[[str], None]:
    """Return what shows the steps of a build on a bar."""
    return lambda step: bar.begin(step, 1)


def parse_share(text: str) -> float:
    """Return the share that "1%" or "0.01" says."""
    try:
        number = float(text.strip().removesuffix("%"))
    except ValueError:
        raise SimpruneError(f"{text!r} is not a share: write 1% or 0.01") from None
    return number / 100 if text.strip().endswith("%") else number


def load_subject(model: str, arch: str | None, pretrained: bool, trust_pickle: bool) -> Subject:
    """Return the model to sweep: an export, or else a checkpoint."""
    from simprune_deploy.tune.subject import is_export, subject_of_export, subject_of_model

    if not pretrained and is_export(Path(model)):
        if arch or trust_pickle:
            raise SimpruneError(
                f"--arch and --trust-pickle are for checkpoints, and {model} is an export"
            )
        return subject_of_export(Path(model))
    return subject_of_model(model, load_model(model, arch, None, pretrained, trust_pickle).model)


def settings_for(subject: Subject, grid: Grid, asked: dict[str, str]) -> list[Setting]:
    """Return the settings of the grid; of an export only its thresholds can be chosen.

    What was not asked for is as the checkpoint has it, if it was saved pruned.
    """
    import dataclasses

    if subject.graph is None:
        own = subject.metadata.pruning
        saved = {
            "layers": ",".join(map(str, own.layers)),
            "selections": own.selection,
            "reductions": own.reduction,
        }
        if own.capacities and "layers" not in asked:
            saved["tokens"] = ",".join(map(str, own.capacities))
        left = {name: value for name, value in saved.items() if value and name not in asked}
        grid = dataclasses.replace(grid, **left)
        return grid.settings(subject.metadata.depth, subject.metadata.num_patches)
    from simprune_deploy.tune.grid import parse_thresholds

    if fixed := sorted(asked.keys() - {"thresholds"}):
        raise SimpruneError(
            f"the {fixed[0]} of {subject.source} are fixed in the graph: sweep the checkpoint to "
            "choose them"
        )
    if not subject.runtime_threshold:
        if "thresholds" in asked:
            raise SimpruneError(
                f"the threshold of {subject.source} is fixed at {subject.setting.threshold:g}: "
                "leave --thresholds out to measure it, or export with --runtime-threshold"
            )
        return [subject.setting]
    thresholds = parse_thresholds(grid.thresholds)
    return [dataclasses.replace(subject.setting, threshold=each) for each in thresholds]


def stem_of(model: str) -> str:
    name = Path(model.rstrip("/")).name
    return name.split(":")[-1].split(".")[0] or "model"
