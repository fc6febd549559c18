"""The command line: parse, call the library, print. Heavy imports happen inside the commands."""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from simprune_deploy import __version__
from simprune_deploy.errors import SimpruneError

if TYPE_CHECKING:
    from simprune_deploy.checkpoint import Checkpoint
    from simprune_deploy.engine.rtx import BuiltEngine
    from simprune_deploy.engine.targets import Target

app = typer.Typer(
    name="simprune-deploy",
    help="Export pruned Vision Transformers to ONNX, proved equal to PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON to stdout, and nothing else.")]
Arch = Annotated[
    Optional[str],  # noqa: UP045  (typer reads annotations at run time, on Python 3.10 too)
    typer.Option(help="timm architecture, for checkpoints that do not say theirs."),
]
Pretrained = Annotated[
    bool, typer.Option("--pretrained", help="MODEL is a timm name or hf-hub: id to download.")
]
PerTarget = Annotated[
    bool, typer.Option("--per-target", help="One engine for each target, not one for all.")
]
TrustPickle = Annotated[
    bool,
    typer.Option(
        "--trust-pickle", help="Load a pickled module. This runs code from the file: trust it?"
    ),
]


plugin_app = typer.Typer(
    help="Build the TensorRT plugin and its CUDA kernels, and read what a built one is.",
    no_args_is_help=True,
)
app.add_typer(plugin_app, name="plugin")


class _State:
    debug = False


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
    _State.debug = debug


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Checkpoint, hub folder, or timm name.")],
    arch: Arch = None,
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
        bool, typer.Option("--normalize", help="Take pixels in [0, 1]; normalise in the graph.")
    ] = False,
    softmax: Annotated[bool, typer.Option("--softmax", help="Give probabilities.")] = False,
    precision: Annotated[
        str, typer.Option(help="Types in the graph: fp32, fp16 or bf16; inputs stay float32.")
    ] = "fp32",
    opset: Annotated[int, typer.Option(help="ONNX opset, 18 to 23.")] = 20,
    emit_assignments: Annotated[
        bool, typer.Option("--emit-assignments", help="Output where every token went, per layer.")
    ] = False,
    images: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Pictures for the proof.  [default: some that come along]"),
    ] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Skip the proof.")] = False,
    target: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="GPUs to build TensorRT-RTX engines for, after the proof: rtx-ada."),
    ] = None,
    per_target: PerTarget = False,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("-o", "--output", help="Folder to write.  [default: NAME-pruned]"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier result.")] = False,
    pretrained: Pretrained = False,
    trust_pickle: TrustPickle = False,
    as_json: Json = False,
) -> None:
    """Turn a checkpoint into an ONNX model that prunes, and prove it equal to PyTorch."""
    with _errors():
        # every check that needs no model comes before the model is loaded
        from simprune_deploy.bundle import MANIFEST
        from simprune_deploy.files import check_destination
        from simprune_deploy.onnx.precision import check_precision
        from simprune_deploy.pruning.config import PruneConfig, check_threshold

        changes: dict[str, Any] = {
            "threshold": threshold,
            "selection": selection,
            "reduction": reduction,
            "multiple_of": multiple_of,
        }
        if threshold is not None:
            check_threshold(threshold)
        PruneConfig(**{name: value for name, value in changes.items() if value is not None})
        check_precision(precision)
        layer_list = _parse_layers(layers)
        counts = _parse_tokens(tokens)
        batch_range = _parse_batch(batch)
        folder = output or Path(f"{_stem(model)}-pruned")
        check_destination(folder, force, MANIFEST)
        if images is not None and no_verify:
            raise SimpruneError("--images is for the proof, and --no-verify skips it: drop one")
        if per_target and target is None:
            raise SimpruneError("--per-target says how to build for --target: name the targets")
        engine_targets = _engine_targets(target) if target is not None else []

        from simprune_deploy import bundle
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
                softmax=softmax,
                emit_assignments=emit_assignments,
                precision=precision,
            )
            checkpoint = _load(model, arch, img_size, pretrained, trust_pickle)
            pruned = prune(
                checkpoint.model,
                layers=layer_list,
                tokens=counts,
                proportional_attention=proportional_attention,
                **changes,
            )
            result = bundle.export(
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
            engines = None
            if engine_targets and (verdict is None or verdict.accepted):
                engines = _build_engines_after_export(
                    result.folder, engine_targets, per_target, step
                )
        if as_json:
            answer: dict[str, Any] = {
                "output": str(result.folder),
                "verdict": verdict.to_dict() if verdict else None,
                "manifest": result.manifest,
            }
            if engine_targets:
                answer["engines"] = [each.to_dict() for each in engines or []]
            _print_json(answer)
        else:
            _print_export(result, checkpoint)
            if engines is not None:
                _print_engines(engines)
            elif engine_targets:
                typer.echo("no engine was built: the export is not proven")
        if verdict is not None and not verdict.accepted:
            raise typer.Exit(1)


def _engine_targets(text: str) -> list[Target]:
    """Return the targets of --target; refuse here, before any work, what cannot be built here."""
    from simprune_deploy.engine.rtx import check_targets
    from simprune_deploy.engine.targets import find_targets

    targets = find_targets(text)
    check_targets(targets)
    return targets


def _build_engines_after_export(
    folder: Path, targets: list[Target], per_target: bool, progress: Callable[[str], None]
) -> list[BuiltEngine]:
    from simprune_deploy.bundle import build_engines

    try:
        return build_engines(folder, targets, per_target=per_target, progress=progress)
    except SimpruneError as error:
        # the export is whole and may have taken long: it stays
        raise SimpruneError(
            f"{error} (the export in {folder} is complete; `simprune-deploy engine {folder}` "
            "builds its engines)"
        ) from error


def _print_engines(engines: list[BuiltEngine]) -> None:
    from simprune_deploy.report.terminal import print_engines

    typer.echo()
    print_engines(engines)


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


@app.command()
def verify(
    target: Annotated[Path, typer.Argument(help="Exported folder, or its model.onnx.")],
    reference: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Checkpoint to compare with.  [default: the golden cases]"),
    ] = None,
    arch: Arch = None,
    images: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Pictures, with --reference.  [default: some that come along]"),
    ] = None,
    pretrained: Pretrained = False,
    trust_pickle: TrustPickle = False,
    as_json: Json = False,
) -> None:
    """Prove an exported model again: against its golden cases, or against PyTorch."""
    with _errors():
        from rich.console import Console

        from simprune_deploy import bundle
        from simprune_deploy.report.terminal import print_verdict, progress

        if reference is None and (arch or trust_pickle or pretrained):
            raise SimpruneError("--arch, --pretrained and --trust-pickle belong to --reference")
        with progress(enabled=not as_json) as step:
            model = None
            if reference is not None:
                model = _reference_of(target, reference, arch, pretrained, trust_pickle)
            verdict = bundle.verify(target, reference=model, images=images, progress=step)
        if as_json:
            _print_json(verdict.to_dict())
        else:
            print_verdict(Console(), verdict)
        if not verdict.accepted:
            raise typer.Exit(1)


def _reference_of(
    target: Path, reference: str, arch: str | None, pretrained: bool, trust_pickle: bool
) -> Any:
    """Load the PyTorch model and prune it as the exported file says it was pruned."""
    from simprune_deploy.bundle import MODEL
    from simprune_deploy.onnx.metadata import load_graph, read_facts
    from simprune_deploy.pruning.model import PrunedViT

    facts = read_facts(load_graph(target / MODEL if target.is_dir() else target))
    height, width = facts.image_size
    size = height if height == width else (height, width)
    model = _load(reference, arch, size, pretrained, trust_pickle).model
    return PrunedViT(getattr(model, "vit", model), facts.pruning)


@app.command()
def engine(
    bundle: Annotated[Path, typer.Argument(metavar="FOLDER", help="Exported folder.")],
    target: Annotated[
        str, typer.Option(help="GPUs to build for: rtx-ada,dgx-spark; `targets` lists them.")
    ],
    per_target: PerTarget = False,
    force: Annotated[
        bool, typer.Option("--force", help="Build again what is there already.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Build TensorRT-RTX engines of an exported folder, on a machine with or without a GPU."""
    with _errors():
        from simprune_deploy.bundle import build_engines
        from simprune_deploy.report.terminal import print_engines, progress

        targets = _engine_targets(target)
        with progress(enabled=not as_json) as step:
            engines = build_engines(
                bundle, targets, per_target=per_target, force=force, progress=step
            )
        if as_json:
            _print_json({"engines": [each.to_dict() for each in engines]})
        else:
            print_engines(engines)


@app.command("targets")
def list_targets(as_json: Json = False) -> None:
    """List the edge GPUs: what each carries, and where its engine can be built."""
    with _errors():
        from simprune_deploy.engine.targets import load_targets
        from simprune_deploy.report.terminal import print_targets

        known = load_targets()
        if as_json:
            _print_json(known.to_dict())
        else:
            print_targets(known)


@app.command()
def inspect(
    target: Annotated[str, typer.Argument(help="Exported folder, ONNX file, or checkpoint.")],
    arch: Arch = None,
    trust_pickle: TrustPickle = False,
    as_json: Json = False,
) -> None:
    """Say what a file or folder is: architecture, pruning, inputs and outputs."""
    with _errors():
        from rich.console import Console

        from simprune_deploy.inspection import inspect_target
        from simprune_deploy.report.terminal import print_facts

        facts = inspect_target(target, arch=arch, trust_pickle=trust_pickle)
        if as_json:
            _print_json(facts)
        else:
            print_facts(Console(), facts)


@app.command()
def models(
    pattern: Annotated[str, typer.Argument(help="timm names, such as 'vit_small*'.")] = "*",
    as_json: Json = False,
) -> None:
    """List the timm architectures that can be pruned, with their token counts."""
    with _errors():
        import dataclasses

        from simprune_deploy.pruning.families import describe_models, list_names
        from simprune_deploy.report.terminal import print_models, progress

        prunable, refused = list_names(pattern)
        if not prunable and not refused:
            raise SimpruneError(f"no timm architecture matches {pattern!r}: try 'vit_*'")
        with progress(enabled=not as_json) as step:
            step("building the architectures without weights")
            rows = list(describe_models(prunable))
        if as_json:
            _print_json(
                {
                    "prunable": [dataclasses.asdict(row) for row in rows],
                    "refused": dict(refused),
                }
            )
        else:
            print_models(rows, refused, named=pattern != "*")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is installed, what is missing, and the command that installs it."""
    with _errors():
        import dataclasses

        from simprune_deploy.doctor import all_needed_present, examine
        from simprune_deploy.report.terminal import print_findings

        findings = examine()
        healthy = all_needed_present(findings)
        if as_json:
            _print_json(
                {"healthy": healthy, "findings": [dataclasses.asdict(each) for each in findings]}
            )
        else:
            print_findings(findings)
        if not healthy:
            raise typer.Exit(1)


@plugin_app.command("build")
def build_plugin(
    arch: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="GPU architectures: 87,110, or 'native', or 'all'.  [default: native where there "
            "is a GPU, else all]",
            show_default=False,
        ),
    ] = None,
    tensorrt_include: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder of TensorRT's headers.  [default: looked for]"),
    ] = None,
    nvcc: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="CUDA compiler.  [default: looked for]"),
    ] = None,
    kernels_only: Annotated[
        bool,
        typer.Option("--kernels-only", help="Leave the TensorRT plugin out; needs no headers."),
    ] = False,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the library.")] = Path(
        "simprune-plugin"
    ),
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier library.")] = False,
    as_json: Json = False,
) -> None:
    """Compile the library for the GPUs of this machine, or for those that are named."""
    with _errors():
        from rich.console import Console

        from simprune_deploy.plugin.build import BuildOptions, build
        from simprune_deploy.report.terminal import library_facts, print_facts, progress

        options = BuildOptions(
            arch=arch,
            output=output,
            kernels_only=kernels_only,
            nvcc=nvcc,
            tensorrt_include=tensorrt_include,
            force=force,
        )
        with progress(enabled=not as_json) as step:
            built = build(options, step)
        if as_json:
            _print_json(built.to_dict())
        else:
            facts = {
                **library_facts(built.info),
                "compiled with": built.nvcc.path,
                "headers from": built.tensorrt.folder if built.tensorrt else "none needed",
                "seconds": f"{built.seconds:.0f}",
            }
            print_facts(Console(), facts)


@plugin_app.command("info")
def show_plugin(
    library: Annotated[Path, typer.Argument(metavar="LIB", help="A built library.")],
    as_json: Json = False,
) -> None:
    """Say what a built library is and which GPUs it has code for, without loading it."""
    with _errors():
        from rich.console import Console

        from simprune_deploy.plugin.info import read_info
        from simprune_deploy.report.terminal import library_facts, print_facts

        info = read_info(library)
        if as_json:
            _print_json(info.to_dict())
        else:
            print_facts(Console(), library_facts(info))


def _load(
    source: str,
    arch: str | None,
    img_size: int | tuple[int, int] | None,
    pretrained: bool,
    trust_pickle: bool,
) -> Checkpoint:
    from simprune_deploy.checkpoint import load_checkpoint

    return load_checkpoint(
        source, arch=arch, img_size=img_size, pretrained=pretrained, trust_pickle=trust_pickle
    )


def _stem(model: str) -> str:
    name = Path(model.rstrip("/")).name
    return name.split(":")[-1].split(".")[0] or "model"


def _parse_numbers(text: str, what: str, example: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise SimpruneError(f"{what} {text!r} is not understood: write {example}") from None


def _parse_layers(text: str | None) -> str | list[int] | None:
    if text is None or text == "auto":
        return text
    return _parse_numbers(text, "--layers", "'auto' or block numbers such as 3,6,9")


def _parse_tokens(text: str | None) -> str | int | list[int] | None:
    if text is None or text == "dynamic":
        return text
    counts = _parse_numbers(text, "--tokens", "'dynamic', a number, or one per layer: 150,110,80")
    return counts[0] if len(counts) == 1 else counts


def _parse_batch(text: str) -> tuple[int, int]:
    low, separator, high = text.partition("..")
    try:
        return int(low), int(high if separator else low)
    except ValueError:
        raise SimpruneError(
            f"--batch {text!r} is not understood: write 1..8, or one number for a fixed batch"
        ) from None


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Turn the library's errors into one line on stderr and an exit code."""
    try:
        yield
    except SimpruneError as error:
        if _State.debug:
            traceback.print_exc()
        message = " ".join(str(error).split())
        typer.secho(f"error: {message}", fg="red", err=True)
        raise typer.Exit(error.exit_code) from None
    except ImportError as error:
        if _State.debug:
            traceback.print_exc()
        typer.secho(
            f"error: {error}: run `simprune-deploy doctor` to see what to install",
            fg="red",
            err=True,
        )
        raise typer.Exit(2) from None
    except MemoryError:
        typer.secho("error: out of memory: use a smaller --img-size", fg="red", err=True)
        raise typer.Exit(2) from None
    except (typer.Exit, KeyboardInterrupt):
        raise
    except Exception as error:
        # whatever is left is our mistake or a damaged file we did not foresee: still one line
        if _State.debug:
            traceback.print_exc()
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        typer.secho(f"error: {text} (--debug shows where)", fg="red", err=True)
        raise typer.Exit(2) from None


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
            typer.secho(f"error: {message} (--help lists what there is)", fg="red", err=True)
        sys.exit(2)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)
