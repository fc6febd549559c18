"""What can go wrong, as types that a caller can catch by kind.

A message names the value, the limit and the way out, in one line. Where it names an argument it
does so through :func:`argument`, so that Python reads ``force=True`` where the command line says
``--force``.

| error | what it says |
|---|---|
| `InvalidArgumentError` | an argument's value, or a combination of them, cannot be used |
| `DestinationError` | a result may not, or cannot, be written there |
| `CheckpointError` | a checkpoint is missing, damaged, untrusted, or fits no architecture |
| `UnsupportedModelError` | the model is readable, and cannot be pruned |
| `ArtifactError` | an exported folder, engine, library or another file of ours cannot be used |
| `DataError` | pictures, labels or classes cannot be used |
| `RequirementError` | a package, a tool or a GPU that this takes is missing here, or does not fit |
| `ToolFailedError` | TensorRT, CUDA, a compiler or ONNX Runtime did not do what it was asked |
| `CheckFailedError` | a check ran, and its answer is no |
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

_OPEN, _CLOSE, _SPLIT = "\ue000", "\ue001", "\ue002"
_NAMED = re.compile(f"{_OPEN}(.*?){_SPLIT}(.*?){_SPLIT}(.*?){_CLOSE}", re.DOTALL)

Spelling = Callable[[str, str, str], str]
"""Writes an argument: its name, its value as Python writes it, and as a command line does; both are
empty where only the name is meant."""


def argument(name: str, value: Any = None, typed: str = "") -> str:
    """Return the name of an argument for a message, spelled for whoever reads it.

    Args:
        name: As in Python: "max_drop".
        value: To show with it. Default None: the name alone.
        typed: How the value is typed on a command line, where that differs: "0.5%". A flag
            (True, False) has none.

    >>> str(SimpruneError(f"it exists: replace it with {argument('force', True)}"))
    'it exists: replace it with force=True'
    """
    shown = "" if value is None else repr(value)
    if not typed and value is not None and not isinstance(value, bool):
        typed = str(value)
    return f"{_OPEN}{name}{_SPLIT}{shown}{_SPLIT}{typed}{_CLOSE}"


def python_spelling(name: str, value: str, typed: str) -> str:
    """Write an argument as Python does: ``name=value``, or ``name``."""
    return f"{name}={value}" if value else name


_spelling: ContextVar[Spelling] = ContextVar("spelling", default=python_spelling)


@contextlib.contextmanager
def arguments_spelled(spelling: Spelling) -> Iterator[None]:
    """Let messages write their arguments by `spelling`, as the command line does for its "
    "options."""
    before = _spelling.set(spelling)
    try:
        yield
    finally:
        _spelling.reset(before)


def spelled(text: str) -> str:
    """Return a text with its arguments spelled for whoever reads it: for what is no error."""
    spelling = _spelling.get()
    return _NAMED.sub(lambda found: spelling(*found.groups()), text)


class SimpruneError(Exception):
    """Something that the caller can mend: the message says how.

    Args:
        message: One line; :func:`argument` names arguments in it.
        what: The argument, file or tool at fault. Default None: the message says it.
        value: What was found there. Default None.
        allowed: What would be allowed. Default None.
        remedy: The way out. Default None.

    Attributes:
        marked: The message with its arguments still marked, to be part of another message.
        what, value, allowed, remedy: As given.
    """

    def __init__(
        self,
        message: str,
        *,
        what: str | None = None,
        value: Any = None,
        allowed: Any = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(spelled(message))
        self.marked = message
        self.what, self.value, self.allowed, self.remedy = what, value, allowed, remedy

    def __str__(self) -> str:
        return spelled(self.marked)

    def with_note(self, note: str) -> SimpruneError:
        """Return the same error with more to say."""
        more = type(self)(f"{self.marked} {note}")
        more.__dict__.update({**self.__dict__, "marked": more.marked})
        return more

    def __reduce__(self) -> Any:
        # the fields too, when the error comes from another process
        return (type(self), (self.marked,), self.__dict__)


class InvalidArgumentError(SimpruneError):
    """An argument's value, or a combination of arguments, cannot be used."""


class DestinationError(SimpruneError):
    """A result may not, or cannot, be written there."""


class CheckpointError(SimpruneError):
    """A checkpoint is missing, damaged, untrusted, or does not fit its architecture."""


class UnsupportedModelError(SimpruneError):
    """The model is readable, and cannot be pruned; the message says why."""


class ArtifactError(SimpruneError):
    """An exported folder, an engine, a library or another file of ours cannot be used."""


class DataError(SimpruneError):
    """Pictures, labels or classes cannot be used."""


class RequirementError(SimpruneError):
    """A package, a tool or a GPU that this takes is missing here, or does not fit."""


class ToolFailedError(SimpruneError):
    """TensorRT, CUDA, a compiler or ONNX Runtime did not do what it was asked."""


class CheckFailedError(SimpruneError):
    """A check ran, and its answer is no (parity, accuracy, nothing pruned)."""
