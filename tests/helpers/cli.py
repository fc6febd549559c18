"""The command line as a shell calls it, in this process."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
from unittest import mock

from simprune_deploy.cli import main


@dataclasses.dataclass(frozen=True)
class Called:
    """What a call printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line of a refusal."""
        assert (self.code, self.out) == (2, ""), self
        (line,) = self.err.splitlines()
        return line


def cli(*arguments: object) -> Called:
    """Run ``simprune-deploy``; calls that cannot be parsed are one line, as in a shell."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["simprune-deploy", *map(str, arguments)]
    with (
        mock.patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
    return Called(code, out.getvalue(), err.getvalue())
