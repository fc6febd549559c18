"""The edge GPUs this project knows, from targets.json. Light: standard library only."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
from importlib import resources
from typing import Any

from simprune_deploy.errors import SimpruneError

FACTS = (
    "compute_capability",
    "memory",
    "system",
    "flavour",
    "tensorrt",
    "build",
    "precisions",
)
HERE, ON_DEVICE = "here", "on the device"


@dataclasses.dataclass(frozen=True)
class Fact:
    """One thing that is known of a target, or not.

    Attributes:
        value: Text, a list of texts, or None: unknown.
        sources: The documents that say so; empty if it is unknown.
    """

    value: Any
    sources: tuple[str, ...]

    def __str__(self) -> str:
        if self.value is None:
            return "unknown"
        return ", ".join(self.value) if isinstance(self.value, list) else str(self.value)


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU to build engines for.

    Attributes:
        name: What ``--target`` takes.
        title: What it is called elsewhere.
        aliases: Other names ``--target`` takes.
        facts: By the names in FACTS.
        notes: Sentences a user should have read.
    """

    name: str
    title: str
    aliases: tuple[str, ...]
    facts: dict[str, Fact]
    notes: tuple[str, ...]

    @property
    def compute_capability(self) -> tuple[int, int] | None:
        """Major and minor number, or None where unknown."""
        value = self.facts["compute_capability"].value
        if value is None:
            return None
        major, minor = value.split(".")
        return int(major), int(minor)

    @property
    def built_here(self) -> bool:
        """Whether its engines can be built on another machine, without its GPU."""
        return bool(self.facts["build"].value == HERE)

    def to_dict(self) -> dict[str, Any]:
        """Return the target as JSON types, every fact with its sources."""
        return {
            "name": self.name,
            "title": self.title,
            "aliases": list(self.aliases),
            "facts": {
                name: {"value": fact.value, "sources": list(fact.sources)}
                for name, fact in self.facts.items()
            },
            "notes": list(self.notes),
        }


@dataclasses.dataclass(frozen=True)
class Targets:
    """The whole data file.

    Attributes:
        checked: The day on which the facts were last compared with their sources.
        targets: In the order of the file.
        groups: Names that stand for several targets.
    """

    checked: str
    targets: tuple[Target, ...]
    groups: dict[str, tuple[str, ...]]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON types."""
        return {
            "checked": self.checked,
            "groups": {name: list(members) for name, members in self.groups.items()},
            "targets": [target.to_dict() for target in self.targets],
        }


@functools.cache
def load_targets() -> Targets:
    """Read targets.json."""
    text = resources.files(__package__).joinpath("targets.json").read_text(encoding="utf-8")
    data = json.loads(text)
    sources = data["sources"]
    return Targets(
        checked=data["checked"],
        targets=tuple(
            Target(
                name=entry["name"],
                title=entry["title"],
                aliases=tuple(entry["aliases"]),
                facts={
                    name: Fact(fact["value"], tuple(sources[each] for each in fact["source"]))
                    for name, fact in entry["facts"].items()
                },
                notes=tuple(entry["notes"]),
            )
            for entry in data["targets"]
        ),
        groups={name: tuple(members) for name, members in data["groups"].items()},
    )


def find_targets(text: str) -> list[Target]:
    """Return the targets of a list such as ``rtx-ada,dgx-spark``, in its order, each once.

    Raises:
        SimpruneError: a name is unknown, or none was given.
    """
    known = load_targets()
    by_name = {target.name: target for target in known.targets}
    meanings: dict[str, tuple[str, ...]] = {name: (name,) for name in by_name}
    for target in known.targets:
        meanings.update(dict.fromkeys(target.aliases, (target.name,)))
    meanings.update(known.groups)
    found: dict[str, Target] = {}
    asked = [part.strip().lower() for part in text.split(",")]
    if not any(asked):
        raise SimpruneError("--target is empty: `simprune-deploy targets` lists the names")
    for name in asked:
        if not name:
            raise SimpruneError(
                f"--target {text!r} has an empty name between its commas: write rtx-ada,dgx-spark"
            )
        if name not in meanings:
            near = difflib.get_close_matches(name, meanings, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise SimpruneError(
                f"unknown target {name!r}: {hint}`simprune-deploy targets` lists the names"
            )
        for member in meanings[name]:
            found[member] = by_name[member]
    return list(found.values())
