"""The edge GPUs this project knows, from targets.json. Light: standard library only."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

from simprune_deploy.common.errors import InvalidArgumentError, argument
from simprune_deploy.common.versions import version_numbers

FACTS = (
    "compute_capability",
    "cpu",
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
class Release:
    """One release of a target's system, with what it brings.

    Attributes:
        system: Its name: "JetPack 6.1 or 6.2".
        cuda: Its CUDA version, or None: unknown.
        tensorrt: Its TensorRT version, such as "10.3" or "10.16 or later", or None: unknown.
        sources: The documents that say so.
    """

    system: str
    cuda: str | None
    tensorrt: str | None
    sources: tuple[str, ...]

    @property
    def oldest_tensorrt(self) -> tuple[int, ...] | None:
        """The numbers of the TensorRT version, or None where unknown."""
        return version_numbers(self.tensorrt) if self.tensorrt else None

    def to_dict(self) -> dict[str, Any]:
        """Return the release as JSON types."""
        return {**dataclasses.asdict(self), "sources": list(self.sources)}


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU to build engines for.

    Attributes:
        name: What ``--target`` takes.
        title: What it is called elsewhere.
        aliases: Other names ``--target`` takes.
        facts: By the names in FACTS.
        releases: The systems it runs, oldest first; empty where the user installs them.
        notes: Sentences a user should have read.
    """

    name: str
    title: str
    aliases: tuple[str, ...]
    facts: dict[str, Fact]
    releases: tuple[Release, ...]
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
            "releases": [release.to_dict() for release in self.releases],
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

    def __str__(self) -> str:
        return "\n".join(f"{target.name}: {target.title}" for target in self.targets)

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
    sources: dict[str, str] = data["sources"]
    return Targets(
        checked=data["checked"],
        targets=tuple(_read_target(entry, sources) for entry in data["targets"]),
        groups={name: tuple(members) for name, members in data["groups"].items()},
    )


def _read_target(entry: dict[str, Any], sources: dict[str, str]) -> Target:
    releases = tuple(
        Release(
            system=each["system"],
            cuda=each["cuda"],
            tensorrt=each["tensorrt"],
            sources=tuple(sources[name] for name in each["source"]),
        )
        for each in entry.get("releases", ())
    )
    facts = {name: _read_fact(fact, sources) for name, fact in entry["facts"].items()}
    if releases:
        facts["system"] = _join(
            releases, lambda each: each.system + (f" (CUDA {each.cuda})" if each.cuda else "")
        )
        facts["tensorrt"] = _join(
            [each for each in releases if each.tensorrt],
            lambda each: f"{each.tensorrt} ({each.system})",
        )
    return Target(
        name=entry["name"],
        title=entry["title"],
        aliases=tuple(entry["aliases"]),
        facts={name: facts[name] for name in FACTS},
        releases=releases,
        notes=tuple(entry["notes"]),
    )


def _read_fact(fact: dict[str, Any], sources: dict[str, str]) -> Fact:
    return Fact(fact["value"], tuple(sources[each] for each in fact["source"]))


def _join(releases: Sequence[Release], text: Callable[[Release], str]) -> Fact:
    """Return one fact out of what every release says."""
    documents = dict.fromkeys(source for each in releases for source in each.sources)
    return Fact(", ".join(map(text, releases)) or None, tuple(documents))


def short_names(targets: Sequence[Target]) -> list[str]:
    """Return the names of targets in the file's order, a group's where all its members are there.

    So the same targets have the same names, in whatever order they were asked for.
    """
    known = load_targets()
    left = {target.name for target in targets}
    found = []
    for name, members in known.groups.items():
        if set(members) <= left:
            found.append(name)
            left -= set(members)
    return [*found, *(target.name for target in known.targets if target.name in left)]


def find_targets(names: str | Sequence[str]) -> list[Target]:
    """Return the targets of ("rtx-ada", "dgx-spark") or "rtx-ada,dgx-spark", in order, each once.

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
    text = names if isinstance(names, str) else ",".join(names)
    asked = [part.strip().lower() for part in text.split(",")]
    if not any(asked):
        raise InvalidArgumentError(
            f"{argument('targets')} is empty: `simprune-deploy targets` lists the names"
        )
    for name in asked:
        if not name:
            raise InvalidArgumentError(
                f"{argument('targets')} {text!r} has an empty name between its commas: write "
                f"rtx-ada,dgx-spark"
            )
        if name not in meanings:
            near = difflib.get_close_matches(name, meanings, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise InvalidArgumentError(
                f"unknown target {name!r}: {hint}`simprune-deploy targets` lists the names"
            )
        for member in meanings[name]:
            found[member] = by_name[member]
    return list(found.values())
