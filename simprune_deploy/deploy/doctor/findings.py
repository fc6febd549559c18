"""What an examination finds, one line each."""

from __future__ import annotations

import dataclasses
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

    def __str__(self) -> str:
        said = [self.version, self.detail, "" if self.state == "ok" else self.remedy]
        return ": ".join([f"{self.name}: {self.state}", *filter(None, said)])


def all_needed_present(findings: list[Finding]) -> bool:
    """Return whether nothing is missing, too old or broken that every user needs."""
    return all(finding.state in ("ok", "optional") for finding in findings if finding.needed)


def one_line(error: Exception) -> str:
    """Return what an error says, on one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"
