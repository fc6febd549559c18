"""What holds for the whole package: its public names, its rooms, the length of its functions."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
from places import ROOT

import simprune_deploy as sd
from simprune_deploy.cli import app
from simprune_deploy.cli import export as export_command
from simprune_deploy.onnx.metadata import InputForm
from simprune_deploy.onnx.precision import Precision
from simprune_deploy.pruning.config import Features, Place, Reduction, Selection

PACKAGE = ROOT / "simprune_deploy"
MOST_LINES = 60
REASON = "# long because"
FOLDERS = ("tests", "examples", "benchmarks", "experiments", "tools")
REQUESTS = {
    "bench": sd.BenchRequest,
    "build": sd.BuildRequest,
    "bundle": sd.BundleRequest,
    "check_accuracy": sd.AccuracyRequest,
    "export": sd.ExportRequest,
    "sweep": sd.SweepRequest,
    "tune": sd.TuneRequest,
    "verify": sd.VerifyRequest,
    "visualize": sd.VisualizeRequest,
}

RESULTS = (
    sd.AccuracyResult,
    sd.BenchReport,
    sd.BuildResult,
    sd.DeviceBundle,
    sd.Diagnosis,
    sd.ExportResult,
    sd.ModelList,
    sd.SweepResult,
    sd.Tuned,
    sd.Verdict,
    sd.Visualization,
)


def test_every_command_is_a_function_too() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name in set(commands) - {"plugin"}:  # a group: it builds and reads a file
        assert callable(getattr(sd, name)), name


def test_public_names_are_listed_once_and_all_there() -> None:
    assert dir(sd) == sorted(sd.__all__)
    for name in sd.__all__:
        assert getattr(sd, name) is not None
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imported = {
        f"{node.module}.{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == {f"simprune_deploy.{home}.{name}" for name, home in sd._HOMES.items()}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sd.nothing  # noqa: B018


@pytest.mark.parametrize("name", REQUESTS)
def test_requests_are_frozen_and_say_what_each_field_is(name: str) -> None:
    kind = REQUESTS[name]
    assert dataclasses.is_dataclass(kind)
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    for field in dataclasses.fields(kind):
        assert field.name in (kind.__doc__ or ""), field.name


@pytest.mark.parametrize("kind", RESULTS)
def test_results_print_in_lines_and_become_json(kind: type) -> None:
    """docs/python.md prints some of them, and a test runs it."""
    assert kind.__str__ is not object.__str__
    assert callable(kind.to_dict)  # type: ignore[attr-defined]


def test_those_of_this_machine_print() -> None:
    assert "numpy: ok: " in str(sd.doctor())
    assert "jetson-orin-nano: Jetson Orin Nano" in str(sd.targets())
    assert str(sd.models("vit_tiny_patch16_224")) == "vit_tiny_patch16_224"
    assert "resnet18 cannot be pruned: " in str(sd.models("resnet18"))


def test_a_request_or_its_fields_but_not_both() -> None:
    request = sd.BenchRequest("nowhere", backend="onnxruntime")
    with pytest.raises(TypeError, match="BenchRequest is given: say batch in it"):
        sd.bench(request, batch=2)
    with pytest.raises(TypeError, match="bach"):
        sd.bench("nowhere", bach=2)
    for call, given, field, second in (
        (sd.export, sd.ExportRequest("nowhere"), "output", "out"),
        (sd.visualize, sd.VisualizeRequest("nowhere", "pictures"), "images", "others"),
        (sd.sweep, sd.SweepRequest("nowhere", "data"), "data", "others"),
        (sd.tune, sd.TuneRequest("nowhere", "data", max_drop=0.01), "data", "others"),
        (sd.bundle, sd.BundleRequest("nowhere", ("jetson-orin",)), "targets", ("rtx-ada",)),
    ):
        with pytest.raises(TypeError, match=f"is given: say {field} in it"):
            call(given, second)
    for call in (lambda: sd.bench(request), lambda: sd.bench("nowhere", backend="onnxruntime")):
        with pytest.raises(sd.SimpruneError, match="nowhere"):
            call()


def test_errors_are_caught_by_kind_and_speak_of_arguments(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(
        sd.DestinationError, match=r"replace it with force=True, or give output='DIR'"
    ):
        sd.export("nowhere.pt", tmp_path / "full")
    with pytest.raises(sd.CheckpointError, match="does not exist"):
        sd.export(tmp_path / "nowhere.pt", tmp_path / "out")
    with pytest.raises(sd.InvalidArgumentError, match=r"threshold 3\.0 is outside") as raised:
        sd.export("nowhere.pt", tmp_path / "out", threshold=3.0)
    assert isinstance(raised.value, sd.SimpruneError)
    with pytest.raises(sd.ArtifactError, match="does not exist"):
        sd.verify(tmp_path / "nowhere")


def test_the_command_lines_choices_are_the_librarys() -> None:
    """They are written twice, so that --help waits for neither onnx nor torch."""
    for mine, theirs in (
        (export_command.Selection, Selection),
        (export_command.Reduction, Reduction),
        (export_command.Place, Place),
        (export_command.Features, Features),
        (export_command.Precision, Precision),
        (export_command.InputForm, InputForm),
    ):
        assert mine == theirs


def test_help_and_the_package_wait_for_nothing_heavy() -> None:
    heavy = {"torch", "timm", "onnx", "onnxruntime", "tensorrt", "polygraphy", "numpy", "PIL"}
    code = "import sys, simprune_deploy, simprune_deploy.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not heavy & set(done.stdout.split())


def test_every_room_has_its_tests_and_is_packaged() -> None:
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()} >= rooms
    listed = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for path in PACKAGE.rglob("__init__.py"):
        name = ".".join(path.parent.relative_to(ROOT).parts)
        assert f'    "{name}",\n' in listed, name


def functions() -> Iterator[tuple[str, int, list[str]]]:
    """Yield every function: where it is, lines of its body, and its head with the line above."""
    for folder in (PACKAGE, *(ROOT / each for each in FOLDERS)):
        for path in sorted(folder.rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    body = node.body[1:] if ast.get_docstring(node) else node.body
                    if body:
                        lines = (body[-1].end_lineno or 0) - body[0].lineno + 1
                        head = text.splitlines()[node.lineno - 2 : body[0].lineno]
                        yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", lines, head


def test_no_function_is_long_without_a_reason() -> None:
    too_long = [
        (where, lines)
        for where, lines, head in functions()
        if lines > MOST_LINES and not any(REASON in line for line in head)
    ]
    assert not too_long


def test_what_there_is_to_measure_or_draw_has_to_be_given() -> None:
    for call in (
        lambda: sd.sweep("model"),
        lambda: sd.tune("model", max_drop=0.01),
        lambda: sd.visualize("model"),
    ):
        with pytest.raises(sd.InvalidArgumentError, match=r"give (data|images)"):
            call()
