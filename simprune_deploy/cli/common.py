"""What the commands share: options, parsing, errors as one line, JSON."""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from simprune_deploy.common.errors import CheckFailedError, SimpruneError

if TYPE_CHECKING:
    from simprune_deploy.checkpoints.loading import Checkpoint
    from simprune_deploy.engine.targets import Target

Json = Annotated[bool, typer.Option("--json", help="Print JSON to stdout, and nothing else.")]
Arch = Annotated[
    Optional[str],  # noqa: UP045  (typer reads annotations at run time, on Python 3.10 too)
    typer.Option(help="timm architecture, for checkpoints that do not say theirs."),
]
Pretrained = Annotated[
    bool, typer.Option("--pretrained", help="MODEL is a timm name or hf-hub: id to download.")
]
PerTarget = Annotated[
    bool, typer.Option("--per-target", help="One engine for each target, not one for all.")
]
TrustPickle = Annotated[
    bool,
    typer.Option(
        "--trust-pickle", help="Load a pickled module. This runs code from the file: trust it?"
    ),
]


class State:
    """What the options before the command say."""

    debug = False


def engine_targets(text: str) -> list[Target]:
    """Return the targets of --target; refuse here, before any work, what cannot be built here."""
    from simprune_deploy.engine.builders import check_targets
    from simprune_deploy.engine.targets import find_targets

    targets = find_targets(text)
    check_targets(targets)
    return targets


def split_targets(text: str) -> tuple[list[Target], list[Target]]:
    """Return the targets whose engines are built here, and those that take a bundle.

    What cannot be built here is refused here, before any work.
    """
    from simprune_deploy.deploy.bundle import check_targets
    from simprune_deploy.engine.targets import find_targets

    targets = find_targets(text)
    devices = [target for target in targets if not target.built_here]
    check_targets(devices)
    here = ",".join(target.name for target in targets if target.built_here)
    return engine_targets(here) if here else [], devices


def load_model(
    source: str,
    arch: str | None,
    img_size: int | tuple[int, int] | None,
    pretrained: bool,
    trust_pickle: bool,
) -> Checkpoint:
    from simprune_deploy.checkpoints.loading import load_checkpoint

    return load_checkpoint(
        source, arch=arch, img_size=img_size, pretrained=pretrained, trust_pickle=trust_pickle
    )


def parse_numbers(text: str, what: str, example: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise SimpruneError(f"{what} {text!r} is not understood: write {example}") from None


def parse_batch(text: str) -> tuple[int, int]:
    low, separator, high = text.partition("..")
    try:
        return int(low), int(high if separator else low)
    except ValueError:
        raise SimpruneError(
            f"--batch {text!r} is not understood: write 1..8, or one number for a fixed batch"
        ) from None


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


SPELLED_OTHERWISE = {"output": "-o", "targets": "--target"}
"""The options that are not called as the library's arguments are."""


def option_spelling(name: str, value: str, typed: str) -> str:
    """Write an argument of the library as the option that sets it."""
    option = SPELLED_OTHERWISE.get(name, f"--{name.replace('_', '-')}")
    if value == "False":
        return option.replace("--", "--no-", 1)
    return f"{option} {typed}" if typed else option


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """Turn the library's errors into one line on stderr and an exit code."""
    try:
        yield
    except SimpruneError as error:
        if State.debug:
            traceback.print_exc()
        message = " ".join(error.spelled(option_spelling).split())
        typer.secho(f"error: {message}", fg="red", err=True)
        raise typer.Exit(1 if isinstance(error, CheckFailedError) else 2) from None
    except ImportError as error:
        if State.debug:
            traceback.print_exc()
        typer.secho(
            f"error: {error}: run `simprune-deploy doctor` to see what to install",
            fg="red",
            err=True,
        )
        raise typer.Exit(2) from None
    except MemoryError:
        typer.secho("error: out of memory: use a smaller --img-size", fg="red", err=True)
        raise typer.Exit(2) from None
    except (typer.Exit, KeyboardInterrupt):
        raise
    except Exception as error:
        # whatever is left is our mistake or a damaged file we did not foresee: still one line
        if State.debug:
            traceback.print_exc()
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        typer.secho(f"error: {text} (--debug shows where)", fg="red", err=True)
        raise typer.Exit(2) from None
