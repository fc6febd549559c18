"""The command line: parse, call the library, print. Heavy imports happen inside the commands.

A module for each group of commands; what they share is in ``common``.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from simprune_deploy.cli import (
    bench,
    build,
    bundle,
    export,
    inspect,
    plugin,
    report,
    sweep,
    tune,
    verify,
    visualize,
)
from simprune_deploy.cli.common import debugging
from simprune_deploy.common.versions import __version__

app = typer.Typer(
    name="simprune-deploy",
    help="Export pruned Vision Transformers to ONNX, checked against PyTorch.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # in rich markup "[default: auto]" would be a style, and vanish
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(plugin.plugin_app, name="plugin")

app.command("export")(export.export)
app.command("verify")(verify.verify)
app.command("bench")(bench.bench)
app.command("build")(build.build)
app.command("bundle")(bundle.bundle)
app.command("targets")(build.list_targets)
app.command("sweep")(sweep.sweep)
app.command("tune")(tune.tune)
app.command("report")(report.report)
app.command("visualize")(visualize.visualize)
app.command("inspect")(inspect.inspect)
app.command("models")(inspect.models)
app.command("doctor")(inspect.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"simprune-deploy {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    debugging.set(debug)


# typer brings its own click or uses the installed one, by version; this is the one it raises
_ClickException: type[Exception] = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
)


def main() -> None:
    """Run the command line; a call that cannot be parsed is one line too."""
    try:
        code = app(standalone_mode=False)
    except _ClickException as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
        else:
            message = " ".join(error.format_message().split())  # type: ignore[attr-defined]
            message = message.replace("Value error, ", "")  # how typer begins a wrong choice
            typer.secho(f"error: {message} (--help lists what there is)", fg="red", err=True)
        sys.exit(2)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)
