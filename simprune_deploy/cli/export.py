"""``export``: a checkpoint becomes an ONNX model that prunes, verified, and what is made of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from simprune_deploy.checkpoints.options import CheckpointOptions
from simprune_deploy.cli.checkpoints import FROM_THE_FILE, takes_checkpoint
from simprune_deploy.cli.common import (
    Json,
    PerTarget,
    errors,
    parse_batch,
    parse_layers,
    parse_numbers,
    parse_share,
    parse_targets,
    print_json,
)

if TYPE_CHECKING:
    from simprune_deploy.deploy.export import ExportResult

# the library's own, in modules that --help does not wait for; a test holds them to those
Selection = Literal["pairs", "redundancy"]
Reduction = Literal["merge", "drop"]
Place = Literal["before", "inside"]
Features = Literal["tokens", "keys", "mean-keys", "tokens+keys"]
Precision = Literal["fp32", "fp16", "bf16"]
InputForm = Literal["float32-nchw", "uint8-nhwc"]

PlaceChoice = Annotated[
    Place | None,
    typer.Option(
        "--place",
        help="Prune before those blocks, or inside them, between attention and MLP.  "
        "[default: the model's, or before]",
        show_default=False,
    ),
]
FeaturesChoice = Annotated[
    Features | None,
    typer.Option(
        "--features",
        help="What is compared; keys want --place inside.  [default: the model's, or tokens]",
        show_default=False,
    ),
]


@takes_checkpoint()
def export(
    model: Annotated[str, typer.Argument(help="Checkpoint, hub folder, or timm name.")],
    config: Annotated[
        Path | None,
        typer.Option(help="Pruning that `tune` found; options given here override it."),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Cosine similarity from which patches are the same, in [-1, 2].  [default: 0.85]",
            show_default=False,
        ),
    ] = None,
    flops: Annotated[
        str | None,
        typer.Option(
            help="Find a threshold for every layer, so that this share of the blocks' FLOPs is "
            "spent: 60%. Calibrates on --images, or takes the curve of --config.",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="'auto', or the blocks to prune at: 3,6,9.  [default: auto]",
            show_default=False,
        ),
    ] = None,
    place: PlaceChoice = None,
    features: FeaturesChoice = None,
    selection: Annotated[
        Selection | None,
        typer.Option(help="How patches are chosen.  [default: pairs]", show_default=False),
    ] = None,
    reduction: Annotated[
        Reduction | None,
        typer.Option(help="What becomes of them.  [default: merge]", show_default=False),
    ] = None,
    proportional_attention: Annotated[
        bool | None,
        typer.Option(
            "--proportional-attention/--no-proportional-attention",
            help="Attend to a token as to the patches it stands for.  [default: yes]",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            help="'dynamic'; or K: patches left after the last prune layer, with static shapes; "
            "or one count per layer: 150,110,80; or 'fixed': the counts that --flops found.  "
            "[default: dynamic]",
            show_default=False,
        ),
    ] = None,
    multiple_of: Annotated[
        int | None,
        typer.Option(
            help="Round the token count up to a multiple.  [default: 1]", show_default=False
        ),
    ] = None,
    runtime_threshold: Annotated[
        bool, typer.Option("--runtime-threshold", help="Make the threshold a graph input.")
    ] = False,
    batch: Annotated[str, typer.Option(help="Batch sizes: 1..8, or one fixed size.")] = "1..8",
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Take pixels in [0, 1]; normalize in the graph.")
    ] = False,
    input_form: Annotated[
        InputForm,
        typer.Option(
            "--input",
            help="uint8-nhwc: images as a camera gives them, converted and normalized in the "
            "graph.",
        ),
    ] = "float32-nchw",
    softmax: Annotated[bool, typer.Option("--softmax", help="Give probabilities.")] = False,
    precision: Annotated[
        Precision | None,
        typer.Option(
            help="Types in the graph; inputs stay as they are.  [default: fp32; fp16 where a "
            "target is a device that builds its own engine]",
            show_default=False,
        ),
    ] = None,
    opset: Annotated[int, typer.Option(help="ONNX opset, 18 to 23.")] = 20,
    inline: Annotated[
        bool,
        typer.Option("--inline", help="Write model-inlined.onnx too, for tools without functions."),
    ] = False,
    fused_attention: Annotated[
        bool,
        typer.Option(
            "--fused-attention",
            help="Write model-fused.onnx too, with ONNX Runtime's attention for GPUs.",
        ),
    ] = False,
    emit_assignments: Annotated[
        bool, typer.Option("--emit-assignments", help="Output where every token went, per layer.")
    ] = False,
    images: Annotated[
        Path | None,
        typer.Option(help="Pictures for the parity check.  [default: some that come along]"),
    ] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Skip the parity check.")] = False,
    target: Annotated[
        str | None,
        typer.Option(
            help="After the parity check, build TensorRT-RTX engines for these GPUs, or for "
            "devices that "
            "build their own a bundle: rtx-ada,jetson-orin."
        ),
    ] = None,
    per_target: PerTarget = False,
    triton: Annotated[
        bool,
        typer.Option(
            "--triton", help="After the parity check, write a Triton model repository too."
        ),
    ] = False,
    engine: Annotated[
        bool,
        typer.Option(
            "--engine",
            help="After the parity check, build a TensorRT engine for the GPU of this machine.",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder to write.  [default: NAME-pruned]"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier result.")] = False,
    checkpoint: CheckpointOptions = FROM_THE_FILE,
    as_json: Json = False,
) -> None:
    """Turn a checkpoint into an ONNX model that prunes, and check it against PyTorch."""
    with errors():
        from simprune_deploy.deploy.export import ExportRequest
        from simprune_deploy.deploy.export import export as export_model
        from simprune_deploy.onnx.options import ExportOptions
        from simprune_deploy.reports.terminal import progress

        request = ExportRequest(
            model=model,
            output=output,
            options=ExportOptions(
                opset=opset,
                batch=parse_batch(batch),
                runtime_threshold=runtime_threshold,
                normalize=normalize,
                input=input_form,
                softmax=softmax,
                emit_assignments=emit_assignments,
                precision=precision,
                inline=inline,
                fused_attention=fused_attention,
            ),
            threshold=threshold,
            layers=parse_layers(layers),
            selection=selection,
            reduction=reduction,
            proportional_attention=proportional_attention,
            tokens=_parse_tokens(tokens),
            multiple_of=multiple_of,
            place=place,
            features=features,
            config=config,
            flops=None if flops is None else parse_share(flops),
            images=images,
            verify=not no_verify,
            force=force,
            targets=parse_targets(target),
            per_target=per_target,
            engine=engine,
            triton=triton,
            checkpoint=checkpoint,
        )
        with progress(enabled=not as_json) as step:
            result = export_model(request, progress=step)
        if as_json:
            print_json(result.to_dict())
        else:
            _print(result)
        if not result.accepted:
            raise typer.Exit(1)


def _print(result: ExportResult) -> None:
    from simprune_deploy.reports.bundle import print_bundle
    from simprune_deploy.reports.engines import print_engines
    from simprune_deploy.reports.export import print_export
    from simprune_deploy.reports.triton import print_model

    print_export(result)
    without = "the parity check did not pass"
    if result.engines:
        typer.echo()
        print_engines(list(result.engines))
    elif result.engines is not None:
        typer.echo(f"no engine was built: {without}")
    for each in result.triton or ():
        typer.echo()
        print_model(each)
    if result.triton == ():
        typer.echo(f"no Triton repository was written: {without}")
    if result.bundle is not None:
        typer.echo()
        print_bundle(result.bundle)
    elif result.devices:
        typer.echo(f"no bundle was made: {without}")


def _parse_tokens(text: str | None) -> str | int | list[int] | None:
    if text is None or text in ("dynamic", "fixed"):
        return text
    example = "'dynamic', 'fixed', a number, or one per layer: 150,110,80"
    counts = parse_numbers(text, "--tokens", example)
    return counts[0] if len(counts) == 1 else counts
