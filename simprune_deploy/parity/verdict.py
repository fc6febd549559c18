"""The verdict: named checks, each with its numbers and its limit, and what was not looked at."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from simprune_deploy.onnx.exported_folder import ACCEPTED

Status = Literal["passed", "passed in emulation", "failed", "inconclusive"]


@dataclasses.dataclass(frozen=True)
class Check:
    """One question and its answer.

    Attributes:
        name: "graph", "outputs", "top1", "decisions", "batch_invariance", "pruning"; for 16 bits
            also "range" (float16) or "run" (bfloat16); "plugin" for a file without the function;
            for engines "same_engine"; for companion files "inlined" and "fused_attention".
        passed: The answer; None if the question was not asked, and `summary` says why.
        summary: One line for a person.
        numbers: The measurements and limits behind it, JSON types; NaN or infinity is None there,
            and `summary` says what is not finite.
    """

    name: str
    passed: bool | None
    summary: str
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "numbers", finite_or_none(self.numbers))


def finite_or_none(value: Any) -> Any:
    """Return JSON types with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite_or_none(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_none(each) for each in value]
    return value


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a parity check found.

    Attributes:
        checks: In the order in which they are to be read.
        environment: What ran on what.
        inputs: Which images, how many, where from.
    """

    checks: tuple[Check, ...]
    environment: dict[str, Any]
    inputs: dict[str, Any]

    @property
    def status(self) -> Status:
        """ "failed" if a check failed, "inconclusive" if nothing was pruned, else "passed".

        "passed in emulation" if what ran was not the file but the same numbers in float32.
        """
        by_name = {check.name: check for check in self.checks}
        if any(check.passed is False for name, check in by_name.items() if name != "pruning"):
            return "failed"
        if not by_name["pruning"].passed:
            return "inconclusive"
        return "passed in emulation" if "run" in by_name else "passed"

    @property
    def accepted(self) -> bool:
        """Whether every check that was made said yes."""
        return self.status in ACCEPTED

    @property
    def reason(self) -> str:
        """Why it is not "passed"; empty if it is."""
        return "; ".join(check.summary for check in self.checks if check.passed is False)

    def check(self, name: str) -> Check:
        """Return a check by its name."""
        return next(check for check in self.checks if check.name == name)

    def __str__(self) -> str:
        marks = {True: "yes", False: "no", None: "not asked"}
        lines = [f"{each.name}: {marks[each.passed]}: {each.summary}" for each in self.checks]
        return "\n".join([*lines, f"verdict: {self.status}"])

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict as JSON types."""
        return {
            "status": self.status,
            "reason": self.reason,
            "checks": {
                check.name: {
                    "passed": check.passed,
                    "summary": check.summary,
                    **check.numbers,
                }
                for check in self.checks
            },
            "skipped": [
                {"check": check.name, "why": check.summary}
                for check in self.checks
                if check.passed is None
            ],
            "inputs": self.inputs,
            "environment": self.environment,
        }
