"""What can go wrong, as types: the command line turns each into one line and an exit code."""

from __future__ import annotations


class SimpruneError(Exception):
    """A user's mistake or an input that cannot be used. Exit code 2."""

    exit_code = 2


class UnsupportedModelError(SimpruneError):
    """The model is readable, and cannot be pruned; the message says why."""


class CheckpointError(SimpruneError):
    """A checkpoint that is missing, damaged, untrusted or does not fit its architecture."""


class CheckFailedError(SimpruneError):
    """A check ran and its answer is no (parity, decisions, nothing pruned). Exit code 1."""

    exit_code = 1
