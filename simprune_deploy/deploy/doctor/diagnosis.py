"""``doctor`` as a function: what is here, and whether it fits."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from simprune_deploy.deploy.doctor import Finding, all_needed_present, examine


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What is here.

    Attributes:
        findings: One for each thing that was looked for.
    """

    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """Whether all that is needed is there."""
        return all_needed_present(list(self.findings))

    def __str__(self) -> str:
        return "\n".join(map(str, self.findings))

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON types."""
        findings = [dataclasses.asdict(each) for each in self.findings]
        return {"healthy": self.healthy, "findings": findings}


def doctor(folder: str | Path | None = None) -> Diagnosis:
    """Say what is installed, what is missing or does not fit, and the command that helps.

    Args:
        folder: An exported folder whose plugin and engines are held against this machine.
            Default: none.

    Raises:
        SimpruneError: `folder` is not a folder.
    """
    return Diagnosis(tuple(examine(folder)))
