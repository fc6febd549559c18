"""``tune``: the threshold, and the blocks, that meet a wish."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from simprune_deploy.cli.common import Arch, Json, Pretrained, TrustPickle, errors, print_json
from simprune_deploy.cli.sweep import (
    BackendName,
    BatchSize,
    Classes,
    Data,
    Limit,
    MaxUnreadable,
    NoLabels,
    Ray,
    Timing,
    building,
    check_engines,
    command_line,
    joined,
    load_subject,
    parse_share,
    stem_of,
)
from simprune_deploy.common.errors import SimpruneError

if TYPE_CHECKING:
    from simprune_deploy.tune.configuration import Tuned
    from simprune_deploy.tune.results import Setting
    from simprune_deploy.tune.search import Wish
    from simprune_deploy.tune.subject import Subject


def tune(
    model: Annotated[str, typer.Argument(help="Checkpoint, hub folder, or exported folder.")],
    data: Data,
    max_drop: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Most pruning whose accuracy surely drops by no more: 0.5%."),
    ] = None,
    min_speedup: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Least pruning that is so many times as fast as the dense model."),
    ] = None,
    target_latency: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Least pruning that takes no longer for one picture: 8ms."),
    ] = None,
    layers: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="'auto' tries several sets of blocks; or name them: 3,6,9;2,5,8.  [default: the "
            "model's, or three at the quarters of the depth]",
            show_default=False,
        ),
    ] = None,
    selection: Annotated[str, typer.Option(help="'cover' or 'redundancy'.")] = "cover",
    reduction: Annotated[str, typer.Option(help="'merge' or 'drop'.")] = "merge",
    confidence: Annotated[str, typer.Option(help="Of the interval of the drop.")] = "95%",
    overflow: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Fix token counts that this share of the pictures exceeds: 1%."),
    ] = None,
    backend: BackendName = "onnxruntime",
    limit: Limit = None,
    classes: Classes = None,
    no_labels: NoLabels = False,
    max_unreadable: MaxUnreadable = "1%",
    batch: BatchSize = 32,
    timing: Timing = 200,
    cells: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder that keeps what was measured; a sweep's will do."),
    ] = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "-o", "--output", help="File for `export --config`. [default: NAME-tuned.json]"
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    ray: Ray = None,
    arch: Arch = None,
    pretrained: Pretrained = False,
    trust_pickle: TrustPickle = False,
    as_json: Json = False,
) -> None:
    """Find the threshold that meets a wish, and write it for `export --config`."""
    with errors():
        from simprune_deploy.evaluate.datasets import DataOptions, open_data
        from simprune_deploy.report.bars import progress_bar
        from simprune_deploy.tune.sweep import SweepOptions, batch_for, start_sweep

        wish = _wish(max_drop, min_speedup, target_latency, confidence)
        share = None if overflow is None else parse_share(overflow)
        options = SweepOptions(batch, timing)
        if not timing and not wish.of_accuracy:
            raise SimpruneError(f"--{wish.kind} needs times, and --timing 0 takes none")
        wanted = DataOptions(limit, not no_labels, classes, parse_share(max_unreadable))
        file = output or Path(f"{stem_of(model)}-tuned.json")
        _check_file(file, force)
        check_engines(backend, model, ray)

        from simprune_deploy.tune.backends import backend_of
        from simprune_deploy.tune.configuration import tuned
        from simprune_deploy.tune.search import search

        with (
            progress_bar(enabled=not as_json) as bar,
            joined(ray) as runner,
            _folder(cells) as folder,
        ):
            bar.begin("loading the model and the list of pictures", 1)
            subject = load_subject(model, arch, pretrained, trust_pickle)
            bases = _bases(subject, layers, selection, reduction)
            options = dataclasses.replace(options, batch=batch_for(subject, batch))
            pictures = open_data(data, subject.metadata, wanted)
            measured_by = backend_of(backend, subject, options.batch, building(bar))
            sweep = start_sweep(
                subject,
                pictures,
                measured_by,
                folder,
                options,
                resume=True,
                runner=runner,
                bar=bar,
            )
            result = tuned(sweep, search(sweep, wish, bases), share, command_line())
            result.save(file)
        if as_json:
            print_json({"output": str(file), **result.to_dict()})
        else:
            _print(result, file, model)


def _wish(
    max_drop: str | None, min_speedup: float | None, target_latency: str | None, confidence: str
) -> Wish:
    from simprune_deploy.tune.search import MAX_DROP, MIN_SPEEDUP, TARGET_LATENCY, Wish

    given = [each is not None for each in (max_drop, min_speedup, target_latency)]
    if sum(given) != 1:
        raise SimpruneError(
            "give one wish: --max-drop 0.5%, --min-speedup 1.5 or --target-latency 8ms"
        )
    sure = parse_share(confidence)
    if max_drop is not None:
        return Wish(MAX_DROP, parse_share(max_drop), sure)
    if min_speedup is not None:
        return Wish(MIN_SPEEDUP, min_speedup, sure)
    assert target_latency is not None
    try:
        return Wish(TARGET_LATENCY, float(target_latency.strip().removesuffix("ms")), sure)
    except ValueError:
        raise SimpruneError(
            f"--target-latency {target_latency!r} is not understood: write milliseconds, 8ms"
        ) from None


def _check_file(file: Path, force: bool) -> None:
    if file.is_dir() or (file.exists() and not force):
        raise SimpruneError(f"{file} already exists: replace it with --force, or give -o FILE")
    if not file.absolute().parent.is_dir():
        raise SimpruneError(f"{file.absolute().parent} is not a folder: give another place with -o")


@contextlib.contextmanager
def _folder(cells: Path | None) -> Iterator[Path]:
    """Yield the folder for what is measured; one that nobody named is removed again."""
    if cells is not None:
        yield cells
        return
    with tempfile.TemporaryDirectory(prefix="simprune-tune-") as place:
        yield Path(place)


def _bases(subject: Subject, layers: str | None, selection: str, reduction: str) -> list[Setting]:
    """Return the settings whose thresholds are searched."""
    from simprune_deploy.tune.grid import Grid
    from simprune_deploy.tune.search import layer_candidates

    if subject.graph is not None:
        if not subject.runtime_threshold:
            raise SimpruneError(
                f"the threshold of {subject.source} is fixed: tune its checkpoint, or export with "
                "--runtime-threshold"
            )
        if layers is not None or (selection, reduction) != ("cover", "merge"):
            raise SimpruneError(
                f"the graph of {subject.source} fixes all but the threshold: tune its checkpoint "
                "to choose --layers, --selection or --reduction"
            )
        return [subject.setting]
    metadata = subject.metadata
    grid = Grid("0.9", layers or "auto", selection, reduction)
    bases = grid.settings(metadata.depth, metadata.num_patches)
    own = metadata.pruning.layers
    if layers is None:
        return [dataclasses.replace(each, layers=own) for each in bases]
    if layers != "auto":
        return bases
    return [
        dataclasses.replace(each, layers=candidate)
        for each in bases
        for candidate in layer_candidates(metadata.depth, each.layers)
    ]


def _print(result: Tuned, file: Path, model: str) -> None:
    from rich.console import Console

    from simprune_deploy.report.terminal import print_facts

    console = Console()
    print_facts(console, result.shown())
    for note in result.data["notes"]:
        console.print(note, style="dim", highlight=False, markup=False)
    console.print(f"wrote {file}", highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"simprune-deploy export {model} --config {file}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
