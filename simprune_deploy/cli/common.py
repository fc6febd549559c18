"""What the commands share: options, parsing, errors as one line, JSON."""

from __future__ import annotations

import contextlib
import contextvars
import json
import sys
import traceback
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from simprune_deploy.common.errors import (
    CheckFailedError,
    InvalidArgumentError,
    SimpruneError,
    arguments_spelled,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON to stdout, and nothing else.")]
PerTarget = Annotated[
    bool, typer.Option("--per-target", help="One engine for each target, not one for all.")
]

SPELLED_OTHERWISE = {
    "output": "-o",
    "targets": "--target",
    "workspace_mib": "--workspace",
    "served": "--batch",
    "use_plugin": "--plugin",
}
"""The options that are not called as the library's arguments are."""

debugging = contextvars.ContextVar("debugging", default=False)
"""Whether --debug stands before the command."""

INTERNAL_ERROR = 3
"""The exit code of a bug of ours; 1 is a check that failed, 2 a mistake of the user's."""


def was_typed(context: typer.Context, name: str) -> bool:
    """Tell an option that was given from one that has its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def parse_numbers(text: str, what: str, example: str) -> list[int]:
    """Return the whole numbers of "3,6,9"."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InvalidArgumentError(f"{what} {text!r} is not understood: write {example}") from None


def parse_layers(text: str | None) -> str | list[int] | None:
    """Return the blocks of --layers: "auto", 3,6,9, or None where nothing was said."""
    if text is None or text == "auto":
        return text
    return parse_numbers(text, "--layers", "'auto' or block numbers such as 3,6,9")


def parse_batch(text: str) -> tuple[int, int]:
    """Return the range of --batch: 1..8, or one number."""
    low, separator, high = text.partition("..")
    try:
        return int(low), int(high if separator else low)
    except ValueError:
        raise InvalidArgumentError(
            f"--batch {text!r} is not understood: write 1..8, or one number for a fixed batch"
        ) from None


def parse_targets(text: str | None) -> tuple[str, ...]:
    """Return the names of --target: rtx-ada,jetson-orin; none where nothing was said."""
    return () if text is None else tuple(text.split(","))


def parse_share(text: str) -> float:
    """Return the share that "1%" or "0.01" says."""
    try:
        number = float(text.strip().removesuffix("%"))
    except ValueError:
        raise InvalidArgumentError(f"{text!r} is not a share: write 1% or 0.01") from None
    return number / 100 if text.strip().endswith("%") else number


def print_json(value: Any) -> None:
    """Print to stdout, indented."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def option_spelling(name: str, value: str, typed: str) -> str:
    """Write an argument of the library as the option that sets it."""
    option = SPELLED_OTHERWISE.get(name, f"--{name.replace('_', '-')}")
    if value == "False":
        return option.replace("--", "--no-", 1)
    return f"{option} {typed}" if typed else option


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """Turn errors into one line on stderr and an exit code; --debug shows the traceback too.

    1: a check ran and its answer is no. 2: the user can mend it. 3: a bug of ours.
    """
    try:
        with arguments_spelled(option_spelling):
            try:
                yield
            except SimpruneError as error:
                code = 1 if isinstance(error, CheckFailedError) else 2
                _end(" ".join(str(error).split()), code)
    except ImportError as error:
        if (error.name or "").startswith("simprune_deploy"):
            _end_with_bug(error)
        _end(f"{error}: run `simprune-deploy doctor` to see what to install", 2)
    except MemoryError:
        _end("out of memory: use a smaller model, batch or image size", 2)
    except (typer.Exit, KeyboardInterrupt):
        raise
    except Exception as error:
        _end_with_bug(error)


def _end_with_bug(error: Exception) -> None:
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    _end(
        f"internal error: {text} (a bug of simprune-deploy: report it with what --debug prints, "
        "as in `simprune-deploy --debug export ...`)",
        INTERNAL_ERROR,
    )


def _end(message: str, code: int) -> None:
    if debugging.get():
        traceback.print_exc()
    typer.secho(f"error: {message}", fg="red", err=True)
    raise typer.Exit(code) from None
