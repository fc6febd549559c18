"""The options that say how a checkpoint is loaded, for every command that takes one."""

from __future__ import annotations

import ast
import inspect
import shlex
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from simprune_deploy.checkpoints.options import CheckpointOptions, Pooling
from simprune_deploy.cli.common import errors
from simprune_deploy.common.errors import InvalidArgumentError, argument
from simprune_deploy.common.transforms import CropMode, Interpolation

PANEL = "What the checkpoint does not say"

FROM_THE_FILE = CheckpointOptions()
"""What stands in a command's signature, in the place of these options."""


def _option(text: str, *names: str, **details: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=PANEL, **details)


def _options(
    arch: Annotated[str | None, _option("timm architecture.")] = None,
    img_size: Annotated[
        int | None, _option("Image size in pixels; positions are resampled.")
    ] = None,
    global_pool: Annotated[Pooling | None, _option("How the tokens become one.")] = None,
    model_kwargs: Annotated[
        list[str] | None,
        _option(
            "What else it was built with: fc_norm=False. May be repeated.", metavar="KEY=VALUE"
        ),
    ] = None,
    mean: Annotated[
        str | None,
        _option("Of the training pictures' channels, in 0 to 1: 0.485,0.456,0.406."),
    ] = None,
    std: Annotated[str | None, _option("Of the same: 0.229,0.224,0.225.")] = None,
    interpolation: Annotated[Interpolation | None, _option("How pictures are scaled.")] = None,
    crop_pct: Annotated[
        float | None, _option("Share of the scaled picture's side that the crop keeps.")
    ] = None,
    crop_mode: Annotated[CropMode | None, _option("How pictures are cropped.")] = None,
    pretrained: Annotated[
        bool, _option("MODEL is a timm name or hf-hub: id to download.", "--pretrained")
    ] = False,
    trust_pickle: Annotated[
        bool,
        _option("Load a pickled module. This runs code from the file: trust it?", "--trust-pickle"),
    ] = False,
) -> CheckpointOptions:
    return CheckpointOptions(
        arch=arch,
        img_size=img_size,
        pretrained=pretrained,
        trust_pickle=trust_pickle,
        global_pool=global_pool,
        model_kwargs=_keywords(model_kwargs or []),
        mean=_numbers("mean", mean),
        std=_numbers("std", std),
        interpolation=interpolation,
        crop_pct=crop_pct,
        crop_mode=crop_mode,
    )


def takes_checkpoint(*without: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command these options, put together as its argument ``checkpoint``.

    Args:
        without: Names of options that mean nothing to it.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command)
        extra = inspect.signature(_options).parameters
        added = [extra[name] for name in extra if name not in without]
        names = [each.name for each in added]
        parameters: list[inspect.Parameter] = []
        for name, each in signature.parameters.items():
            parameters += added if name == "checkpoint" else [each]

        def run(**values: Any) -> None:
            said = {name: values.pop(name) for name in names}
            with errors():
                checkpoint = _options(**said)
            command(**values, checkpoint=checkpoint)

        hints = typing.get_type_hints(command, include_extras=True)
        hints |= typing.get_type_hints(_options, include_extras=True)
        # typer reads both, and as they are: the names in them are other modules'
        parameters = [each.replace(annotation=hints[each.name]) for each in parameters]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__name__, run.__doc__, run.__module__ = (
            command.__name__,
            command.__doc__,
            command.__module__,
        )
        return run

    return decorate


def typed(options: CheckpointOptions) -> str:
    """Return the options that were given as one would type them, each with a space before it."""
    words: list[str] = []
    for name in options.given:
        option, value = f"--{name.replace('_', '-')}", getattr(options, name)
        if isinstance(value, Mapping):
            words += [word for key, each in value.items() for word in (option, f"{key}={each}")]
        elif value is True:
            words.append(option)
        else:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words += [option, text]
    return "".join(f" {shlex.quote(word)}" for word in words)


def _numbers(name: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InvalidArgumentError(
            f"{argument(name)} {text!r} is not understood: write numbers, such as 0.485,0.456,0.406"
        ) from None


def _keywords(pairs: list[str]) -> dict[str, Any]:
    """Return the arguments of KEY=VALUE pairs; a value that is no Python literal is a text."""
    found = {}
    for pair in " ".join(pairs).split():
        name, separator, value = pair.partition("=")
        if not separator or not name.isidentifier():
            raise InvalidArgumentError(
                f"{argument('model_kwargs')} {pair!r} is not understood: write KEY=VALUE, such as "
                "fc_norm=False"
            )
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found
