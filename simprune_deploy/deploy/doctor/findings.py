"""What an examination finds, one line each."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

State = Literal["ok", "missing", "too old", "broken", "optional"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Attributes:
        name: What was looked for.
        state: "ok"; "missing", "too old" or "broken"; "optional" for what is not there and need
            not be.
        version: What was found, "" if nothing.
        needed_for: What does not work without it.
        remedy: The command that puts it right, "" if nothing is to be done.
        detail: What else there is to know, in one line; "" if nothing.
        needed: False for what only some users need, whatever its state. Default True.
    """

    name: str
    state: State
    version: str
    needed_for: str
    remedy: str
    detail: str = ""
    needed: bool = True


def all_needed_present(findings: list[Finding]) -> bool:
    """Return whether nothing is missing, too old or broken that every user needs."""
    return all(finding.state in ("ok", "optional") for finding in findings if finding.needed)


def is_older(version: str, minimum: str) -> bool:
    """Compare the numbers at the start of versions; one without numbers counts as new enough."""
    numbers = _numbers(version)
    return bool(numbers) and numbers < _numbers(minimum)


def major(version: str) -> int | None:
    """Return the first number of a version, None where it has none."""
    numbers = _numbers(version)
    return numbers[0] if numbers else None


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(number) for number in match.group().split(".")] if match else []
    while len(numbers) > 1 and not numbers[-1]:
        numbers.pop()  # 10 is as new as 10.0
    return tuple(numbers)


def one_line(error: Exception) -> str:
    """Return what an error says, on one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"
