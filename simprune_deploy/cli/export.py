"""``export``: a checkpoint becomes an ONNX model that prunes, verified."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from simprune_deploy.cli.common import (
    Arch,
    Json,
    PerTarget,
    Pretrained,
    TrustPickle,
    errors,
    load_model,
    parse_batch,
    parse_numbers,
    print_json,
    split_targets,
)
from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.common.progress import Progress

if TYPE_CHECKING:
    from simprune_deploy.checkpoints.loading import Checkpoint
    from simprune_deploy.deploy.bundle import DeviceBundle
    from simprune_deploy.deploy.triton import TritonModel
    from simprune_deploy.engine.build import BuiltEngine
    from simprune_deploy.engine.targets import Target


def export(
    model: Annotated[str, typer.Argument(help="Checkpoint, hub folder, or timm name.")],
    arch: Arch = None,
    config: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Pruning that `tune` found; options given here override it."),
    ] = None,
    threshold: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            help="Cosine similarity from which patches are the same, in [-1, 2].  [default: 0.85]",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="'auto', or the blocks before which to prune: 3,6,9.  [default: auto]",
            show_default=False,
        ),
    ] = None,
    selection: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="'cover' or 'redundancy'.  [default: cover]", show_default=False),
    ] = None,
    reduction: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="'merge' or 'drop'.  [default: merge]", show_default=False),
    ] = None,
    proportional_attention: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(
            "--proportional-attention/--no-proportional-attention",
            help="Attend to a token as to the patches it stands for.  [default: yes]",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="'dynamic'; or K: patches left after the last prune layer, with static shapes; "
            "or one count per layer: 150,110,80.  [default: dynamic]",
            show_default=False,
        ),
    ] = None,
    multiple_of: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            help="Round the token count up to a multiple.  [default: 1]", show_default=False
        ),
    ] = None,
    runtime_threshold: Annotated[
        bool, typer.Option("--runtime-threshold", help="Make the threshold a graph input.")
    ] = False,
    batch: Annotated[str, typer.Option(help="Batch sizes: 1..8, or one fixed size.")] = "1..8",
    img_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Image size in pixels.  [default: the model's]", show_default=False),
    ] = None,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Take pixels in [0, 1]; normalize in the graph.")
    ] = False,
    input_form: Annotated[
        str,
        typer.Option(
            "--input",
            help="float32-nchw, or uint8-nhwc: images as a camera gives them, converted and "
            "normalized in the graph.",
        ),
    ] = "float32-nchw",
    softmax: Annotated[bool, typer.Option("--softmax", help="Give probabilities.")] = False,
    precision: Annotated[
        str, typer.Option(help="Types in the graph: fp32, fp16 or bf16; inputs stay as they are.")
    ] = "fp32",
    opset: Annotated[int, typer.Option(help="ONNX opset, 18 to 23.")] = 20,
    emit_assignments: Annotated[
        bool, typer.Option("--emit-assignments", help="Output where every token went, per layer.")
    ] = False,
    images: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Pictures for the parity check.  [default: some that come along]"),
    ] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Skip the parity check.")] = False,
    target: Annotated[
        Optional[str],  # noqa: UP045
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
        Optional[Path],  # noqa: UP045
        typer.Option("-o", "--output", help="Folder to write.  [default: NAME-pruned]"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier result.")] = False,
    pretrained: Pretrained = False,
    trust_pickle: TrustPickle = False,
    as_json: Json = False,
) -> None:
    """Turn a checkpoint into an ONNX model that prunes, and check it against PyTorch."""
    with errors():
        # every check that needs no model comes before the model is loaded
        from simprune_deploy.common.files import check_destination
        from simprune_deploy.onnx.exported_folder import MANIFEST
        from simprune_deploy.onnx.metadata import check_input
        from simprune_deploy.onnx.precision import check_precision
        from simprune_deploy.pruning.config import PruneConfig, check_threshold

        asked: dict[str, Any] = {
            "threshold": threshold,
            "layers": _parse_layers(layers),
            "selection": selection,
            "reduction": reduction,
            "proportional_attention": proportional_attention,
            "tokens": _parse_tokens(tokens),
            "multiple_of": multiple_of,
        }
        changes = {name: value for name, value in asked.items() if value is not None}
        size_hints: tuple[int, ...] = ()
        if config is not None:
            from simprune_deploy.tune.configuration import read_configuration

            tuned, hints = read_configuration(config)
            # they are of these layers, where the image decides how many tokens stay
            if changes.keys().isdisjoint(("layers", "tokens")) and tuned["tokens"] == "dynamic":
                size_hints = hints
            changes = {**tuned, **changes}
        if "threshold" in changes:
            check_threshold(changes["threshold"])
        simple = ("threshold", "selection", "reduction", "multiple_of")
        PruneConfig(**{name: changes[name] for name in simple if name in changes})
        check_precision(precision)
        check_input(input_form)
        batch_range = parse_batch(batch)
        folder = output or Path(f"{_stem(model)}-pruned")
        check_destination(folder, force, MANIFEST, model)
        if images is not None and no_verify:
            raise SimpruneError(
                "--images is for the parity check, and --no-verify skips it: drop one"
            )
        if per_target and target is None:
            raise SimpruneError("--per-target says how to build for --target: name the targets")
        targets, devices = split_targets(target) if target is not None else ([], [])
        if devices:
            from simprune_deploy.deploy.bundle import check_destinations, default_output

            check_destinations(default_output(folder, devices), force)
        if triton:
            from simprune_deploy.deploy.triton import check_batch

            check_batch(batch_range)
        if engine:
            from simprune_deploy.engine.folder_engines import check_can_build_here

            check_can_build_here(precision)

        from simprune_deploy.deploy.export import export as export_folder
        from simprune_deploy.report.terminal import progress

        with progress(enabled=not as_json) as step:
            step("loading PyTorch and the checkpoint")
            from simprune_deploy.onnx.exporter import ExportOptions
            from simprune_deploy.pruning.model import prune

            options = ExportOptions(
                opset=opset,
                batch=batch_range,
                runtime_threshold=runtime_threshold,
                normalize=normalize,
                input=input_form,
                softmax=softmax,
                emit_assignments=emit_assignments,
                precision=precision,
                opt_tokens=size_hints,
            )
            checkpoint = load_model(model, arch, img_size, pretrained, trust_pickle)
            pruned = prune(checkpoint.model, **changes)
            result = export_folder(
                pruned,
                folder,
                options,
                images=images,
                verify=not no_verify,
                force=force,
                source={"kind": checkpoint.kind, "notes": list(checkpoint.notes)},
                progress=step,
            )
            verdict = result.verdict
            engines, served = None, []
            accepted = verdict is None or verdict.accepted
            if triton and accepted:
                from simprune_deploy.deploy.triton import write_repository

                step("writing the Triton repository")
                served.append(write_repository(result.folder))
            if (targets or engine) and accepted:
                engines = _build_engines_after_export(
                    result.folder, targets, per_target, engine, step
                )
                if triton and engine:
                    from simprune_deploy.deploy.triton import serve_engine

                    served.append(serve_engine(result.folder, engines[-1]))
            bundled = None
            if devices and accepted:
                bundled = _bundle_after_export(result.folder, devices, force, step)
        if as_json:
            answer: dict[str, Any] = {
                "output": str(result.folder),
                "verdict": verdict.to_dict() if verdict else None,
                "manifest": result.manifest,
            }
            if targets or engine:
                answer["engines"] = [each.to_dict() for each in engines or []]
            if triton:
                answer["triton"] = [each.to_dict() for each in served]
            if devices:
                answer["bundle"] = bundled.to_dict() if bundled else None
            print_json(answer)
        else:
            _print_export(result, checkpoint)
            if engines is not None:
                _print_engines(engines)
            elif targets or engine:
                typer.echo("no engine was built: the parity check did not pass")
            for each in served:
                _print_served(each)
            if triton and not served:
                typer.echo("no Triton repository was written: the parity check did not pass")
            if bundled is not None:
                _print_bundle(bundled)
            elif devices:
                typer.echo("no bundle was made: the parity check did not pass")
        if verdict is not None and not verdict.accepted:
            raise typer.Exit(1)


def _build_engines_after_export(
    folder: Path,
    targets: list[Target],
    per_target: bool,
    here: bool,
    progress: Progress,
) -> list[BuiltEngine]:
    from simprune_deploy.engine.folder_engines import build_ahead, build_here

    try:
        engines = []
        if targets:
            engines += build_ahead(folder, targets, per_target=per_target, progress=progress)
        if here:
            engines.append(build_here(folder, progress=progress))
        return engines
    except SimpruneError as error:
        # the export is whole and may have taken long: it stays
        raise SimpruneError(
            f"{error} (the export in {folder} is complete; `simprune-deploy build {folder}` "
            "builds its engines)"
        ) from error


def _bundle_after_export(
    folder: Path, targets: list[Target], force: bool, progress: Progress
) -> DeviceBundle:
    from simprune_deploy.deploy.bundle import make_bundle

    try:
        return make_bundle(folder, targets, force=force, progress=progress)
    except SimpruneError as error:
        names = ",".join(target.name for target in targets)
        raise SimpruneError(
            f"{error} (the export in {folder} is complete; `simprune-deploy bundle {folder} "
            f"--target {names}` makes its bundle)"
        ) from error


def _print_bundle(bundle: DeviceBundle) -> None:
    from simprune_deploy.report.bundle import print_bundle

    typer.echo()
    print_bundle(bundle)


def _print_engines(engines: list[BuiltEngine]) -> None:
    from simprune_deploy.report.engines import print_engines

    typer.echo()
    print_engines(engines)


def _print_served(served: TritonModel) -> None:
    from simprune_deploy.report.triton import print_model

    typer.echo()
    print_model(served)


def _print_export(result: Any, checkpoint: Checkpoint) -> None:
    from rich.console import Console

    from simprune_deploy.report.terminal import print_facts, print_verdict

    console = Console()
    facts = result.manifest["model"]
    pruning = facts["pruning"]
    print_facts(
        console,
        {
            "model": facts["architecture"] or "(unnamed)",
            "checkpoint": "; ".join([checkpoint.kind, *checkpoint.notes]),
            "prunes before blocks": pruning["layers"],
            "threshold": pruning["threshold"],
            "precision": facts["export"]["precision"],
            "patches kept": pruning["capacities"] or "as many as the image needs",
            "written": ", ".join(
                f"{result.folder / name} ({entry['bytes'] / 1e6:.1f} MB)"
                for name, entry in result.manifest["files"].items()
                if name.endswith(".onnx")
            ),
        },
    )
    console.print()
    if result.verdict is None:
        console.print("verdict: [yellow]not verified[/yellow] (--no-verify)", highlight=False)
    else:
        print_verdict(console, result.verdict)


def _stem(model: str) -> str:
    name = Path(model.rstrip("/")).name
    return name.split(":")[-1].split(".")[0] or "model"


def _parse_layers(text: str | None) -> str | list[int] | None:
    if text is None or text == "auto":
        return text
    return parse_numbers(text, "--layers", "'auto' or block numbers such as 3,6,9")


def _parse_tokens(text: str | None) -> str | int | list[int] | None:
    if text is None or text == "dynamic":
        return text
    counts = parse_numbers(text, "--tokens", "'dynamic', a number, or one per layer: 150,110,80")
    return counts[0] if len(counts) == 1 else counts
