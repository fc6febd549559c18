"""The published rivals and ours, as files of their own, timed in turn: loss, FLOPs and speed-up.

    python experiments/rivals.py photographs --pixels 224 -o docs/method/rivals-photographs-224.csv
    python experiments/rivals.py fashion --ours ours=exported -o docs/method/rivals-fashion.csv

Every rival (rival_models.py) is set to each share of the unpruned model's FLOPs, and what its paper
leaves open is chosen by the loss there, on some of the half of the pictures that calibrates; the
numbers are of the other half. *Loss* is 1000 x (1 - cosine of the output to the unpruned model's).
Every rival but ATC, which no ONNX file can hold, becomes a file for one image, whose own outputs
give the loss and which is timed in ONNX Runtime on one thread, in turn with the unpruned model's
file and the others at that share. ``--ours NAME=FOLDER`` (repeatable) lets an exported folder join
where its share is nearest. For ATC there is a loss at equal FLOPs, and no time.

First every rival is set and its loss taken in PyTorch, a row at a time; then each share is timed. A
run that is interrupted goes on where it was, and ``--rounds 0`` leaves the timing to a later one.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rival_models import (
    ATC,
    ATM,
    LINKAGES,
    PiToMe,
    RandomDrop,
    Rival,
    Saint,
    ToMe,
    atc_stages,
    atm_thresholds,
    tome_schedule,
)
from tracks import TRACKS, Track, bootstrap, load_halves, run, write_csv

from simprune_deploy.common.errors import CheckFailedError, DataError, InvalidArgumentError
from simprune_deploy.common.files import sha256
from simprune_deploy.evaluate import timing
from simprune_deploy.onnx.exported_folder import MODEL, read_manifest
from simprune_deploy.onnx.exporter import quiet_exporter
from simprune_deploy.predict.onnx_predictor import OnnxSpec, open_session
from simprune_deploy.pruning import cost

DENSE = "dense"
SHARES = (0.85, 0.75, 0.65, 0.55, 0.5, 0.45)
NEAR, REACHED = 0.004, 0.04
"""A share is found when it is that near; a rival that gets no nearer than the other is left out."""

TRIES = 12
OPSET = 20
"""The package's default."""

SLACK = 0.05
"""A file's mean loss may be off PyTorch's by that and 2 %: decisions within float noise turn."""

Choice = dict[str, Any]
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """A rival at every strength.

    Attributes:
        kind: Its class, which also makes it again of its settings.
        build: Makes it of the model, a strength in [0, 1], above which it reduces more, and a
            choice.
        choices: What the paper leaves open, by the model's depth.
    """

    kind: type[Rival]
    build: Callable[..., Rival]
    choices: Callable[[int], list[Choice]] = lambda depth: [{}]


def patches_of(vit: torch.nn.Module) -> int:
    return int(vit.patch_embed.num_patches)  # type: ignore[union-attr, arg-type]


def depth_of(vit: torch.nn.Module) -> int:
    return len(vit.blocks)  # type: ignore[arg-type]


def build_tome(vit: torch.nn.Module, strength: float, decreasing: bool = False) -> Rival:
    return ToMe(vit, tome_schedule(strength * patches_of(vit) / 2, depth_of(vit), decreasing))


def build_atc(vit: torch.nn.Module, strength: float, linkage: str, places: str) -> Rival:
    patches, depth = patches_of(vit), depth_of(vit)
    if places == "three":
        return ATC(vit, atc_stages(1 - strength, patches, depth), linkage)
    removed = tome_schedule(strength * patches / 2, depth)[0]
    return ATC(vit, [max(1, patches - removed * (i + 1)) for i in range(depth)], linkage)


def build_random(vit: torch.nn.Module, strength: float) -> Rival:
    return RandomDrop(vit, tome_schedule(strength * patches_of(vit) / 2, depth_of(vit)))


def build_atm(vit: torch.nn.Module, strength: float, beta: float, **choice: Any) -> Rival:
    # similarities crowd near 1, and so must the thresholds that are tried
    return ATM(vit, atm_thresholds(1 - strength**3, beta, depth_of(vit)), **choice)


FAMILIES = {
    "tome": Family(ToMe, build_tome),
    "tome, decreasing": Family(ToMe, functools.partial(build_tome, decreasing=True)),
    "pitome": Family(
        PiToMe,
        lambda vit, strength, **choice: PiToMe(vit, 1 - strength / 2, **choice),
        lambda depth: [{"matching_blocks": each} for each in (0, (depth + 1) // 2)],
    ),
    "atc": Family(
        ATC,
        build_atc,
        lambda depth: [
            {"linkage": linkage, "places": places}
            for linkage in LINKAGES
            for places in ("every", "three")
        ],
    ),
    "atm": Family(
        ATM,
        build_atm,
        lambda depth: [
            {"beta": beta, "split": split, "compared": compared}
            for compared, betas in (("tokens", (0.0, 0.005, 0.01, 0.02)), ("keys", (0.0, 0.01)))
            for beta in betas
            for split in (depth, depth * 2 // 3)
        ],
    ),
    "saint": Family(Saint, lambda vit, strength: Saint(vit, 1 - strength**3)),
    "random": Family(RandomDrop, build_random),
}


@dataclasses.dataclass
class File:
    """What is timed.

    Attributes:
        losses: float64[n], of the file's own outputs.
        runner: Runs timed picture i.
    """

    losses: np.ndarray
    runner: timing.Runner


@dataclasses.dataclass
class Ours:
    """An export of ours, measured.

    Attributes:
        name: In the table.
        row: Of the table, not yet timed.
        file: What is timed.
    """

    name: str
    row: Row
    file: File


@torch.inference_mode()
def run_rival(model: Rival, images: Iterable[torch.Tensor]) -> tuple[torch.Tensor, np.ndarray]:
    """Return the outputs [n, D], and float64[n] the share of the FLOPs of every image."""
    outputs, shares = [], []
    shape = cost.BlockShape(model.vit.embed_dim, model.vit.blocks[0].mlp.fc1.out_features)
    tokens = model.prefix + patches_of(model.vit)
    for image in images:
        counts: list[int] = []
        outputs.append(model(image[None], counts))
        seen = [cost.BlockTokens(*pair) for pair in zip([tokens, *counts], counts, strict=False)]
        shares.append(cost.flops_share(shape, tokens, seen))
    return torch.cat(outputs), np.array(shares)


def losses_of(outputs: torch.Tensor, track: Track) -> np.ndarray:
    """Return float64[n]: 1000 x (1 - cosine) to the unpruned outputs."""
    cosine = torch.cosine_similarity(outputs.double(), track.dense.double(), dim=1)
    return (1000 * (1 - cosine)).numpy()


def at_share(family: Family, choice: Choice, target: float, track: Track) -> tuple[Rival, float]:
    """Return the rival at the strength whose share of the FLOPs is nearest to the target."""
    low: tuple[float, float] = (0.0, 1.0)
    high: tuple[float, float | None] = (1.0, None)
    found: list[tuple[Rival, float]] = []
    for _ in range(TRIES):
        strength = between(low, high, target)
        model = family.build(track.vit, strength, **choice).eval()
        images = track.images if model.counts_depend_on_image else track.images[:1]
        share = float(run_rival(model, images)[1].mean())
        found.append((model, share))
        if abs(share - target) < NEAR:
            break
        if share > target:
            low = (strength, share)
        else:
            high = (strength, share)
    return min(found, key=lambda each: abs(each[1] - target))


def between(low: tuple[float, float], high: tuple[float, float | None], target: float) -> float:
    """Return the next strength to try: on the line between two (strength, share), near neither."""
    (left, more), (right, less) = low, high
    line = 0.5 if less is None or more <= less else (more - target) / (more - less)
    return left + min(max(line, 0.1), 0.9) * (right - left)


def choose(family: Family, target: float, few: Track, half: Track) -> Rival | None:
    """Set a rival to a share, with the choice that loses least there; None if it is not reached.

    Args:
        family: The rival.
        target: The share.
        few: Pictures to find the choice on.
        half: Pictures to find the strength on, where they differ in their counts.
    """
    tried = [
        (choice, *at_share(family, choice, target, few))
        for choice in family.choices(depth_of(few.vit))
    ]
    reached = [each for each in tried if abs(each[2] - target) < REACHED]
    if not reached:
        return None

    def loss(model: Rival) -> float:
        return float(losses_of(run_rival(model, few.images)[0], few).mean())

    alone = len(reached) == 1
    choice, model, _ = reached[0] if alone else min(reached, key=lambda each: loss(each[1]))
    if model.counts_depend_on_image:
        model, share = at_share(family, choice, target, half)
        return model if abs(share - target) < REACHED else None
    return model


@contextlib.contextmanager
def written_out(vit: Any) -> Iterator[None]:
    """Compute attention as it is exported: the fused one does not trace with counts from data."""
    fused = [block.attn for block in vit.blocks if block.attn.fused_attn]
    for attn in fused:
        attn.fused_attn = False
    try:
        yield
    finally:
        for attn in fused:
            attn.fused_attn = True


def export(model: Rival, image: torch.Tensor) -> bytes:
    """Return the ONNX file of a rival for one image, with static counts where they are fixed."""
    with quiet_exporter(), written_out(model.vit), torch.no_grad():
        program = torch.onnx.export(
            model,
            (image,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["output"],
            external_data=False,
            verbose=False,
        )
    assert program is not None
    return bytes(program.model_proto.SerializeToString())


def rivals_file(name: str, model: Rival, track: Track, timed: Sequence[int], loss: float) -> File:
    """Export a rival and run the file.

    Raises:
        CheckFailedError: its loss is not the one of PyTorch, which is given.
    """
    session = open_session(export(model, track.images[:1]), OnnxSpec(b"", threads=1))
    feeds = [{"images": image[None].numpy()} for image in track.images]
    found = np.concatenate([session.run(None, feed)[0] for feed in feeds])
    losses = losses_of(torch.from_numpy(found), track)
    if not abs(losses.mean() - loss) <= 0.02 * loss + SLACK:
        raise CheckFailedError(
            f"the file of {name} loses {losses.mean():.3f} and PyTorch {loss:.3f}: the export is "
            "not the rival"
        )

    def run_picture(index: int) -> None:
        session.run(None, feeds[timed[index]])

    return File(losses, run_picture)


def open_ours(text: str, shares: Sequence[float], track: Track, timed: Sequence[int]) -> Ours:
    """Open and measure what ``--ours NAME=FOLDER`` names.

    Raises:
        InvalidArgumentError: it is not written so, or does not take the track's pictures.
    """
    name, _, folder = text.partition("=")
    if not name or not folder or name in (*FAMILIES, DENSE):
        raise InvalidArgumentError(
            f"--ours {text!r} must be NAME=FOLDER, with a name that no rival has"
        )
    read_manifest(Path(folder))
    file = Path(folder) / MODEL
    predictor = OnnxSpec(file.read_bytes(), threads=1).open()
    facts, images = predictor.metadata, track.images.numpy()
    plain = not facts.takes_uint8 and not facts.export["normalize"] and predictor.batch[0] == 1
    if facts.image_shape != images.shape[1:] or not plain:
        raise InvalidArgumentError(
            f"{folder} takes {facts.image_shape}, batches from {predictor.batch[0]}: export it for "
            f"normalized float pictures of {images.shape[1:]} and batch 1"
        )
    one_by_one = [[index] for index in range(len(images))]
    answer = predictor.answer(images, counts=True, batches=one_by_one)
    assert answer.kept is not None
    tokens, place = facts.num_tokens, facts.pruning.place
    seen = [
        cost.spread_over_blocks(tokens, predictor.layers, kept, facts.depth, place)
        for kept in (answer.kept + facts.num_prefix_tokens).tolist()
    ]
    share = float(np.mean([cost.flops_share(facts.block, tokens, each) for each in seen]))
    target = min(shares, key=lambda each: abs(each - share))
    losses = losses_of(torch.from_numpy(answer.outputs), track)
    values = {"threshold": facts.pruning.threshold, "sha256": sha256(file)}
    prepared = [predictor.prepare(images[[index]]) for index in timed]
    row = to_row(name, target, share, losses, values)
    return Ours(name, row, File(losses, lambda index: predictor.run(prepared[index])))


def to_row(name: str, target: float, share: float, losses: np.ndarray, values: Choice) -> Row:
    """One line of the CSV file, not yet timed."""
    untimed = dict.fromkeys(("speedup", "speedup low", "speedup high", "ms", "dense ms"), "")
    return {
        "method": name,
        "target": target,
        "flops": round(share, 4),
        "images": len(losses),
        "loss": "",
        "loss low": "",
        "loss high": "",
        **untimed,
        "setting": json.dumps(values),
        **loss_cells(losses),
    }


def loss_cells(losses: np.ndarray) -> Row:
    """Return the mean loss with its interval, and the losses themselves, for paired comparisons."""
    low, high = bootstrap(lambda chosen: losses[chosen].mean(), len(losses))
    cells = {"loss": losses.mean(), "loss low": low, "loss high": high}
    return {
        **{name: round(float(value), 4) for name, value in cells.items()},
        "losses": " ".join(f"{loss:.3f}" for loss in losses),
    }


def time_together(
    files: dict[str, File], dense: File, rounds: int, pictures: int
) -> dict[str, Row]:
    """Time files in turn, with the unpruned model's, and return the cells that this fills."""
    runners = {DENSE: dense.runner, **{name: file.runner for name, file in files.items()}}
    plan = timing.Plan(rounds * pictures, warm_up=2, inputs=pictures)
    times = {name: each.whole for name, each in timing.measure(runners, plan).items()}
    dense_ms = timing.latency(times[DENSE]).p50
    found: dict[str, Row] = {}
    for name, file in files.items():
        ratio = timing.speedup(times[DENSE], times[name])
        cells = {"speedup": ratio.ratio, "speedup low": ratio.low, "speedup high": ratio.high}
        cells |= {"ms": timing.latency(times[name]).p50, "dense ms": dense_ms}
        shown = {key: "" if value is None else round(value, 4) for key, value in cells.items()}
        found[name] = {**loss_cells(file.losses), **shown}
    return found


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of an earlier run.

    Raises:
        DataError: they are not of this script.
    """
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    if not rows or not {"method", "target", "losses"} <= rows[0].keys():
        raise DataError(f"{path} is not of this script: give another file with -o")
    return rows


def print_rows(rows: Sequence[dict[str, Any]], title: str) -> None:
    names = ["method", "target", "flops", "loss", "loss low", "loss high", "speedup"]
    names += ["speedup low", "speedup high", "setting"]
    table = Table(*names, title=title)
    for row in rows:
        table.add_row(*(str(row[name]) for name in names))
    Console(width=160).print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("track", choices=TRACKS)
    parser.add_argument("--pixels", type=int, default=224, help="of a photograph; default 224")
    parser.add_argument("--rivals", nargs="*", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES, help="of the FLOPs")
    parser.add_argument("--ours", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--images", type=int, default=1000, help="of Fashion-MNIST; default 1000")
    parser.add_argument("--calibrate", type=int, default=12, help="to choose by; default 12")
    parser.add_argument("--timed", type=int, default=40, help="pictures; default 40, at most all")
    parser.add_argument("--rounds", type=int, default=10, help="over them; 0: time nothing")
    parser.add_argument("--weights", type=Path, default=Path("real-weights"))
    parser.add_argument("-o", "--output", type=Path, required=True, help="CSV file, to go on with")
    return parser.parse_args()


def spread(count: int, wanted: int) -> list[int]:
    """Return `wanted` numbers, or all, spread evenly over 0 to count - 1."""
    wanted = min(count, max(1, wanted))
    return [index * count // wanted for index in range(wanted)]


def set_rivals(args: argparse.Namespace, rows: list[Row], first: Track, track: Track) -> None:
    """Set every rival to every share, unless its row is there, and write the row at once."""
    chosen = spread(len(first.images), args.calibrate)
    few = dataclasses.replace(first, images=first.images[chosen], dense=first.dense[chosen])
    done = {(row["method"], float(row["target"])) for row in rows}
    for target in args.shares:
        for name in (each for each in args.rivals if (each, target) not in done):
            model = choose(FAMILIES[name], target, few, first)
            if model is None:
                print(f"{name} does not reach {target} of the FLOPs", file=sys.stderr)
                continue
            outputs, shares = run_rival(model, track.images)
            losses = losses_of(outputs, track)
            rows.append(to_row(name, target, float(shares.mean()), losses, model.settings()))
            write_csv(args.output, rows)


def join_ours(path: Path, rows: list[Row], joined: Sequence[Ours]) -> None:
    """Give ours their rows, unless those of the same files are there."""
    for each in joined:
        same = [row for row in rows if row["method"] == each.name]
        if [row["setting"] for row in same] != [each.row["setting"]]:
            rows[:] = [row for row in rows if row["method"] != each.name] + [each.row]
            write_csv(path, rows)


def time_shares(
    args: argparse.Namespace, rows: list[Row], joined: Sequence[Ours], track: Track
) -> None:
    """Time what is not timed yet, share by share, and write the rows after each."""
    timed = spread(len(track.images), args.timed)
    dense: File | None = None
    of_ours = {each.name: each.file for each in joined}
    for target in args.shares:
        wanted = [row for row in rows if float(row["target"]) == target and not row["speedup"]]
        files: dict[str, File] = {}
        for row in wanted:
            name = row["method"]
            if name in of_ours:
                files[name] = of_ours[name]
            elif name in args.rivals and FAMILIES[name].kind.exports:
                model = FAMILIES[name].kind(track.vit, **json.loads(row["setting"])).eval()
                files[name] = rivals_file(name, model, track, timed, float(row["loss"]))
        if not files:
            continue
        dense = dense or rivals_file(DENSE, Rival(track.vit).eval(), track, timed, 0.0)
        found = time_together(files, dense, args.rounds, len(timed))
        for row in wanted:
            row |= found.get(row["method"], {})
        write_csv(args.output, rows)


def main() -> None:
    args = parse()
    rows = read_rows(args.output)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    first, track = load_halves(args.track, args.weights, args.pixels, args.images)
    timed = spread(len(track.images), args.timed)
    joined = [open_ours(text, args.shares, track, timed) for text in args.ours]
    set_rivals(args, rows, first, track)
    join_ours(args.output, rows, joined)
    if args.rounds:
        time_shares(args, rows, joined, track)
    print_rows(rows, f"{args.track}: {len(track.images)} images, {args.output}")


if __name__ == "__main__":
    sys.exit(run(main))
