"""The command for GPU machines, rehearsed on the CPU: what it refuses, runs, and writes down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_report
import pytest
import run_on_gpu
import torch
from places import ROOT

from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.pruning.kernel_library import read_info

PAGE = ROOT / "docs" / "gpu-results.md"


def run_command(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tests" / "gpu" / "run_on_gpu.py"), *options]
    variables = {key: value for key, value in os.environ.items() if key != "SIMPRUNE_LIBRARY"}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**variables, **environment}
    )


def record(**changes: Any) -> dict[str, Any]:
    """A record of a run that went well; `changes` go into its facts."""
    facts = {
        "date": "2026-01-01 00:00 UTC",
        "gpu": {
            "name": "NVIDIA H200",
            "sm": "9.0",
            "multiprocessors": 132,
            "memory_gib": 139.8,
            "l2_mib": 60.0,
        },
        "driver": "1.2.3",
        "cuda_of_torch": "13.0",
        "nvcc": None,
        "processor": "a processor",
        "python": "3.12.1",
        "packages": {"torch": "2.14.1", "timm": None},
        "library": {
            "name": "libsimprune_kernels.so",
            "sha256": "ab" * 32,
            "kind": "kernels",
            "version": "0.1.0",
            "operator_version": "2",
            "cuda": "13.0.88",
            "architectures": ["90"],
            "tensorrt_headers": None,
        },
        "sources": "cd" * 32,
        "commit": None,
        **changes,
    }
    return {"rehearsal": False, "facts": facts, "stages": [stage("build"), stage("tests")]}


def stage(name: str, status: str = "passed", **values: Any) -> dict[str, Any]:
    return {"name": name, "status": status, "detail": "a detail", "seconds": 1.5, **values}


# --- the page -------------------------------------------------------------------------------------


def test_the_page_is_what_its_record_says() -> None:
    """`run_on_gpu.py --combine docs/gpu-results.json --out docs --force` writes it again."""
    given = json.loads(PAGE.with_suffix(".json").read_text(encoding="utf-8"))
    text = PAGE.read_text(encoding="utf-8")
    assert text == gpu_report.page(given)
    assert "| driver |" in text
    assert gpu_report.REHEARSAL not in text


def test_a_page_about_an_earlier_operator_says_so(host_library: Path) -> None:
    assert read_info(host_library).operator_version == gpu_report.OPERATOR_VERSION
    now = record()
    assert "have not been run" not in gpu_report.page(now)
    del now["facts"]["library"]["operator_version"]
    assert "**This was run with version 1 of the operator." in gpu_report.page(now)


def test_a_page_names_the_machine_and_all_that_was_left_out() -> None:
    given = record()
    given["stages"][1]["skipped"] = ["24 tests: built without TensorRT's headers"]
    given["stages"].append(stage("sanitizer", "skipped", detail="compute-sanitizer is missing"))
    text = gpu_report.page(given)
    for part in (
        "NVIDIA H200, SM 9.0, 132 multiprocessors",
        "| driver | 1.2.3 |",
        "torch 2.14.1, timm missing",
        "| tests | passed | 2 | a detail |",
        "* tests: 24 tests: built without TensorRT's headers",
        "* sanitizer: compute-sanitizer is missing",
        "* benchmark: not asked for",
        "## Floors on paper",
    ):
        assert part in text, part
    assert gpu_report.REHEARSAL not in text


def test_a_failed_stage_shows_its_output_and_a_benchmark_its_report() -> None:
    given = record()
    given["stages"][1] = stage("tests", "failed", output="it broke ``` here")
    given["stages"].append(stage("benchmark", report="### Times\n"))
    text = gpu_report.page(given)
    assert "## What tests said\n\n```\nit broke ''' here\n```" in text
    assert "## Benchmark\n\n### Times\n" in text


def test_records_of_one_gpu_are_joined_and_others_are_not() -> None:
    later = record()
    later["stages"] = [stage("benchmark"), stage("tests", "failed")]
    joined = gpu_report.combined([record(), later])
    assert [(s["name"], s["status"]) for s in joined["stages"]] == [
        ("build", "passed"),
        ("tests", "failed"),
        ("benchmark", "passed"),
    ]
    for name, value in (("driver", "9"), ("sources", "ef"), ("gpu", {"name": "another"})):
        with pytest.raises(SimpruneError, match=f"{name} is .* in another"):
            gpu_report.combined([record(), record(**{name: value})])
    with pytest.raises(SimpruneError, match="rehearsal"):
        gpu_report.combined([record(), {**record(), "rehearsal": True}])


def test_the_command_joins_records(tmp_path: Path) -> None:
    for name, given in (("a", record()), ("b", record(driver="other"))):
        (tmp_path / name).write_text(json.dumps(given), encoding="utf-8")
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert run_on_gpu.main(["--combine", a, a, "--out", str(tmp_path / "out")]) == 0
    assert "NVIDIA H200" in (tmp_path / "out" / "gpu-results.md").read_text(encoding="utf-8")
    # results are replaced on demand only
    assert run_on_gpu.main(["--combine", a, "--out", str(tmp_path / "out")]) == 2
    assert run_on_gpu.main(["--combine", a, "--out", str(tmp_path / "out"), "--force"]) == 0
    assert run_on_gpu.main(["--combine", a, b, "--out", str(tmp_path / "two")]) == 2
    assert run_on_gpu.main(["--combine", str(PAGE), "--out", str(tmp_path / "two")]) == 2
    assert not (tmp_path / "two").exists()


# --- what it refuses ------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    done = run_command("--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "no CUDA GPU that torch can use" in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_rehearsal_never_becomes_the_results(tmp_path: Path) -> None:
    done = run_command("--rehearse")
    assert done.returncode == 2
    assert "give it an --out of its own" in done.stderr
    done = run_command("--rehearse", "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "a rehearsal needs libsimprune_host.so" in done.stderr
    assert not (tmp_path / "out").exists()


def test_unknown_stages_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_on_gpu.main(["--only", "tests,profile"])
    assert "'profile' is not one of build, tests, sanitizer, benchmark" in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    args = run_on_gpu.parse(["--rehearse", "--out", str(tmp_path)])
    find = run_on_gpu.importlib.util.find_spec
    monkeypatch.setattr(
        run_on_gpu.importlib.util,
        "find_spec",
        lambda name: None if name == "pytest" else find(name),
    )
    with pytest.raises(SimpruneError, match=r"pytest is not installed .* pip install pytest"):
        run_on_gpu.check_machine(args)
    args.only = ["benchmark"]
    run_on_gpu.check_machine(args)


def test_a_library_for_another_gpu_is_refused(
    plugin_library: Path, host_library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    context = run_on_gpu.Context(run_on_gpu.parse([]), tmp_path)
    info = read_info(plugin_library)
    for capability, served in (((8, 7), True), ((8, 8), True), ((7, 0), False), ((13, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        if served:
            run_on_gpu.check_library(context, info)
        else:
            with pytest.raises(SimpruneError, match="{}{}$|--arch {}{}".format(*capability * 2)):
                run_on_gpu.check_library(context, info)
    with pytest.raises(SimpruneError, match="is for the CPU"):
        run_on_gpu.check_library(context, read_info(host_library))


# --- a rehearsal ----------------------------------------------------------------------------------

SANITIZER = """#!/bin/sh
while [ "$1" != {python} ]; do shift; done
"$@" || exit
echo "========= ERROR SUMMARY: {errors} errors"
[ {errors} = 0 ] || exit 66
"""


def rehearse(
    host_library: Path, out: Path, monkeypatch: pytest.MonkeyPatch, errors: int, only: str
) -> tuple[int, str]:
    """Run the command in this process, on a few tests, with a make-believe compute-sanitizer."""
    tools = out / "tools"
    tools.mkdir(parents=True)
    program = tools / "compute-sanitizer"
    program.write_text(SANITIZER.format(python=sys.executable, errors=errors), encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    monkeypatch.setenv("SIMPRUNE_LIBRARY", str(host_library))
    monkeypatch.setattr(run_on_gpu, "TOOLS", ("memcheck",))
    monkeypatch.setattr(run_on_gpu, "SANITIZED", "small_cases and D33")
    monkeypatch.setattr(run_on_gpu, "WHOLE", "chained_layers or refuses")
    code = run_on_gpu.main(["--rehearse", "--out", str(out), "--only", only])
    page = out / "gpu-results.md"
    return code, page.read_text(encoding="utf-8") if page.exists() else ""


def test_a_rehearsal_runs_every_stage(
    host_library: Path,
    tensorrt_headers: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TENSORRT_INCLUDE", str(tensorrt_headers))
    everything = "tests,sanitizer,benchmark"
    code, text = rehearse(host_library, tmp_path / "out", monkeypatch, 0, everything)
    assert code == 0, text
    assert gpu_report.REHEARSAL in text
    for part in (
        "| build | passed |",
        "| tests | passed |",
        "2 passed",
        "memcheck: 3 passed; ERROR SUMMARY: 0 errors",
        "| benchmark | passed |",
        "### What this device reaches",
    ):
        assert part in text, part
    assert "## What was skipped, and why\n\nNothing.\n" in text
    found = json.loads((tmp_path / "out" / "gpu-results.json").read_text(encoding="utf-8"))
    assert [stage["name"] for stage in found["stages"]] == list(gpu_report.STAGES)
    assert found["stages"][-1]["results"]["vits"]


def test_an_error_that_the_sanitizer_finds_fails_the_run(
    host_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIMPRUNE_ENQUEUE_SHIM", "/nowhere")
    code, text = rehearse(host_library, tmp_path / "out", monkeypatch, 2, "sanitizer")
    assert code == 1
    assert "| sanitizer | failed |" in text
    assert "ERROR SUMMARY: 2 errors" in text
    assert "* tests: not asked for" in text


def test_a_failing_test_fails_the_run(
    host_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIMPRUNE_ENQUEUE_SHIM", "/nowhere/shim.so")
    code, text = rehearse(host_library, tmp_path / "out", monkeypatch, 0, "tests")
    assert code == 1
    assert "| tests | failed |" in text
    assert "2 failed (exit code 1)" in text
    assert "/nowhere/shim.so" in text


def test_running_no_test_is_a_failure(tmp_path: Path) -> None:
    stage = run_on_gpu.judge_tests(5, tmp_path / "nothing.xml", "no tests ran", "tests")
    assert stage.status == "failed"
    assert stage.detail == "no test ran (exit code 5)"
    junit = tmp_path / "skipped.xml"
    junit.write_text(
        '<testsuites><testsuite><testcase name="a"><skipped message="no plugin in it"/>'
        "</testcase></testsuite></testsuites>",
        encoding="utf-8",
    )
    stage = run_on_gpu.judge_tests(0, junit, "", "tests")
    assert stage.status == "failed"
    assert stage.skipped == ["1 tests: no plugin in it"]
