"""Everything that only a GPU can show, by one command; the results become docs/gpu-results.md.

    python tests/gpu/run_on_gpu.py [--out docs] [--force] [--only build,tests,sanitizer,benchmark]

It needs torch with CUDA, numpy and pytest, and nvcc (CMake if there is one) or a library built
elsewhere, named by SIMPRUNE_LIBRARY. With TensorRT's headers (--tensorrt-include, or where `plugin
build` looks) the plugin's `enqueue` is tested too; for a library built elsewhere
SIMPRUNE_ENQUEUE_SHIM may name a shim built elsewhere (plugins/tests/enqueue_shim.cpp). Without timm
the models are left out. What is left out is written down with its reason.

Where a command may not run long enough for all of it, give the stages one by one with --only, each
with an --out of its own, and join the records: --combine A/gpu-results.json B/gpu-results.json

Exit code 0: everything that was asked for passed; 1: something failed; 2: it cannot be run here.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from gpu_report import BENCHMARKS, STAGES, combined, page  # noqa: E402

from simprune_deploy.common.errors import SimpruneError  # noqa: E402
from simprune_deploy.common.files import staged_file, write_json  # noqa: E402
from simprune_deploy.engine.plugin import toolchain  # noqa: E402
from simprune_deploy.engine.plugin.build import BuildOptions, build  # noqa: E402
from simprune_deploy.pruning.kernel_library import LIBRARY_VARIABLE, LibraryInfo, read_info  # noqa: E402

SHIM_VARIABLE = "SIMPRUNE_ENQUEUE_SHIM"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
WHOLE = ""
"""What pytest's -k is given for the tests: all of them."""

SANITIZED = "small_cases or enqueue"
"""The tests that compute-sanitizer watches: small shapes, and buffers without a byte to spare."""

LAST_LINES = 40
PLUGINS = ROOT / "plugins"
PLUGIN_SOURCES = ("tensorrt_plugin.cpp", "tensorrt_log.cpp", "tensorrt_entry.cpp")


@dataclasses.dataclass
class Stage:
    """How a stage ended.

    Attributes:
        name: Its name.
        status: "passed", "failed" or "skipped".
        detail: One line about it.
        seconds: How long it took.
        skipped: What of it was left out, and why.
        output: The end of what a failed one printed.
        report: The benchmark's Markdown.
        results: The benchmark's numbers.
    """

    name: str
    status: str
    detail: str
    seconds: float = 0.0
    skipped: list[str] = dataclasses.field(default_factory=list)
    output: str | None = None
    report: str | None = None
    results: dict[str, Any] | None = None


@dataclasses.dataclass
class Context:
    """What the stages share."""

    args: argparse.Namespace
    work: Path
    library: Path | None = None
    shim: Path | None = None

    @property
    def rehearsal(self) -> bool:
        return bool(self.args.rehearse)

    def run(self, name: str, command: list[str], **environment: str) -> tuple[int, str]:
        """Run a command with its output in a log; return its exit code and what it said."""
        variables = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).strip(":"),
            "PYTHONUNBUFFERED": "1",
            LIBRARY_VARIABLE: str(self.library),
            **environment,
        }
        if self.shim:
            variables[SHIM_VARIABLE] = str(self.shim)
        log = self.args.logs / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        say(f"{name}: {' '.join(command)} (log: {log})")
        with log.open("w", encoding="utf-8") as file:
            try:
                code = subprocess.run(
                    command,
                    cwd=ROOT,
                    env=variables,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=self.args.limit,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                file.write(f"\nstopped after {self.args.limit} seconds\n")
                code = 124
        return code, log.read_text(encoding="utf-8", errors="replace")


# --- build ----------------------------------------------------------------------------------------


def build_stage(context: Context) -> Stage:
    """Take the library that is named, or build one; the shim too."""
    left_out: list[str] = []
    named = os.environ.get(LIBRARY_VARIABLE)
    if named:
        context.library, how = Path(named).absolute(), f"{LIBRARY_VARIABLE} names it"
    elif context.rehearsal:
        raise SimpruneError(f"a rehearsal needs libsimprune_host.so: set {LIBRARY_VARIABLE} to it")
    else:
        context.library, how = compile_library(context, left_out)
    info = read_info(context.library)
    check_library(context, info)
    if info.tensorrt_headers is None:
        left_out.append("the plugin's enqueue: the library was built without TensorRT's headers")
    elif os.environ.get(SHIM_VARIABLE):
        context.shim = Path(os.environ[SHIM_VARIABLE]).absolute()
    else:
        try:
            context.shim = compile_shim(context)
        except SimpruneError as error:
            left_out.append(f"the plugin's enqueue: {error}")
    detail = f"{info.path.name} ({info.kind}, {info.device_code}): {how}"
    return Stage("build", "passed", detail, skipped=left_out)


def check_library(context: Context, info: LibraryInfo) -> None:
    """Refuse a library that this device cannot run."""
    if context.rehearsal:
        if info.kind != "host":
            raise SimpruneError(f"{info.path} is for GPUs: a rehearsal takes libsimprune_host.so")
        return
    if info.kind == "host":
        raise SimpruneError(f"{info.path} is for the CPU: name one for GPUs, or give --rehearse")
    import torch

    major, minor = torch.cuda.get_device_capability()
    served = [re.match(r"(\d+)(\d)", each) for each in info.device_code.sms]
    fits = any(m and int(m[1]) == major and int(m[2]) <= minor for m in served)
    if not fits and not info.device_code.ptx:
        raise SimpruneError(
            f"{info.path} has code for {info.device_code} and this GPU is SM {major}{minor}: build "
            f"it with `simprune-deploy plugin build --arch {major}{minor}`"
        )


def compile_library(context: Context, left_out: list[str]) -> tuple[Path, str]:
    """Build for the present GPU: by CMake, or by nvcc alone where there is none."""
    import torch

    architecture = "{}{}".format(*torch.cuda.get_device_capability())
    headers: toolchain.TensorRTHeaders | None = None
    try:
        headers = toolchain.find_tensorrt_headers(context.args.tensorrt_include)
    except SimpruneError as error:
        if context.args.tensorrt_include:
            raise
        left_out.append(f"TensorRT's plugin: {error}")
    try:
        toolchain.find_cmake()
    except SimpruneError:
        return compile_with_nvcc(context, architecture, headers)
    options = BuildOptions(
        arch=architecture,
        output=context.work / "library",
        kernels_only=headers is None,
        tensorrt_include=headers.folder if headers else None,
    )
    say(f"building {options.library.name} for SM {architecture}")
    built = build(options)
    return built.info.path, f"built here by nvcc {built.nvcc.version} and CMake"


def compile_with_nvcc(
    context: Context, architecture: str, headers: toolchain.TensorRTHeaders | None
) -> tuple[Path, str]:
    """Compile all sources in one call of nvcc, with what plugins/CMakeLists.txt would tell them."""
    nvcc = toolchain.find_nvcc()
    kind = "plugin" if headers else "kernels"
    library = context.work / f"libsimprune_{kind}.so"
    names = ["problem.cpp", "simprune.cpp", "launch_cuda.cu", "info.cpp"]
    told = {
        "VERSION": (PLUGINS / "version.txt").read_text(encoding="utf-8").strip(),
        "KIND": kind,
        "CUDA_VERSION": nvcc.version,
        "ARCHITECTURES": architecture,
        "TENSORRT_VERSION": headers.version if headers else "none",
    }
    command = [str(nvcc.path), "-std=c++17", "-O3", "-shared", "-lineinfo"]
    command += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
    command += ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    command += [f'-DSIMPRUNE_{name}="{value}"' for name, value in told.items()]
    command += ["-I", str(PLUGINS / "include"), "-I", str(PLUGINS / "src")]
    if headers:
        names += PLUGIN_SOURCES
        command += ["-isystem", str(headers.folder)]
    command += [str(PLUGINS / "src" / name) for name in names]
    code, text = context.run("build", [*command, "-o", str(library), "-ldl"])
    if code:
        raise SimpruneError(f"nvcc failed: {' | '.join(text.split(chr(10))[:3])}")
    return library, f"built here by nvcc {nvcc.version} alone, there is no CMake"


def compile_shim(context: Context) -> Path:
    """Compile what calls the plugin as TensorRT would."""
    from enqueue_shim import ShimError, build_shim

    headers = toolchain.find_tensorrt_headers(context.args.tensorrt_include)
    try:
        return build_shim(context.work / "libenqueue_shim.so", headers.folder)
    except ShimError as error:
        raise SimpruneError(f"the shim does not compile: {str(error)[-500:]}") from None


# --- tests ----------------------------------------------------------------------------------------


def pytest_command(context: Context, junit: Path, selection: str) -> list[str]:
    """Return the command for the tests of the device at hand."""
    if context.rehearsal:
        chosen = ["-k", f"host and ({selection})" if selection else "host"]
    else:
        chosen = ["-m", "gpu", *(["-k", selection] if selection else [])]
    # addopts names --strict-markers, which needs every pytest plugin that the project tests with
    quiet = ["-q", "-p", "no:cacheprovider", "-o", "addopts="]
    tests = [str(ROOT / "tests" / "plugins" / "test_gpu_kernels.py")]
    if not context.rehearsal:
        tests.append(str(ROOT / "tests" / "engine" / "test_gpu_engines.py"))
    return [sys.executable, "-m", "pytest", *quiet, f"--junitxml={junit}", *chosen, *tests]


def read_junit(path: Path) -> tuple[dict[str, int], list[str]]:
    """Return how many tests passed, failed and were skipped, and why they were."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    reasons: dict[str, int] = {}
    if path.exists():
        for case in ElementTree.parse(path).iter("testcase"):
            kinds = {child.tag for child in case}
            if kinds & {"failure", "error"}:
                counts["failed"] += 1
            elif "skipped" in kinds:
                counts["skipped"] += 1
                reason = case.find("skipped")
                text = (reason.get("message") if reason is not None else "") or "no reason given"
                reasons[text] = reasons.get(text, 0) + 1
            else:
                counts["passed"] += 1
    return counts, [f"{number} tests: {reason}" for reason, number in reasons.items()]


def judge_tests(code: int, junit: Path, text: str, name: str) -> Stage:
    """Turn a run of pytest into a stage."""
    counts, reasons = read_junit(junit)
    detail = ", ".join(f"{number} {kind}" for kind, number in counts.items() if number)
    if code == 0 and counts["passed"] > 0 and counts["failed"] == 0:
        return Stage(name, "passed", detail, skipped=reasons)
    detail = f"{detail or 'no test ran'} (exit code {code})"
    return Stage(name, "failed", detail, skipped=reasons, output=last_lines(text))


def tests_stage(context: Context) -> Stage:
    """Run the directed tests."""
    junit = context.work / "tests.xml"
    code, text = context.run("tests", pytest_command(context, junit, WHOLE))
    return judge_tests(code, junit, text, "tests")


# --- compute-sanitizer ----------------------------------------------------------------------------


def find_sanitizer() -> str | None:
    """Return compute-sanitizer: in PATH, or beside nvcc."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), toolchain.CUDA_FOLDER]
    places = [Path(home) for home in homes if home]
    try:
        nvcc = toolchain.locate_nvcc()
        places += [nvcc.parent.parent, nvcc.resolve().parent.parent]
    except SimpruneError:
        pass
    candidates = ["compute-sanitizer"]
    for place in places:
        candidates += [str(place / folder / candidates[0]) for folder in ("bin", candidates[0])]
    return next((found for name in candidates if (found := shutil.which(name))), None)


def sanitizer_stage(context: Context) -> Stage:
    """Run the small cases under each tool."""
    program = find_sanitizer()
    if program is None:
        reason = "compute-sanitizer is missing: it comes with the CUDA toolkit"
        return Stage("sanitizer", "skipped", reason)
    findings, outputs, reasons = [], [], []
    for tool in TOOLS:
        junit = context.work / f"{tool}.xml"
        tests = pytest_command(context, junit, SANITIZED)
        options = ["--tool", tool, "--error-exitcode", "66", "--print-limit", "20"]
        # every tensor in memory of its own, so that an access beside it is seen
        code, text = context.run(
            tool, [program, *options, *tests], PYTORCH_NO_CUDA_MEMORY_CACHING="1"
        )
        ended = judge_tests(code, junit, text, tool)
        # one summary of every process that it watched
        summaries = sorted(set(re.findall(r"^=+ (\w+ SUMMARY: .+)$", text, re.M)))
        no_error = [re.search(r"SUMMARY: 0 (errors|hazards)", said) for said in summaries]
        clean = ended.status == "passed" and bool(summaries) and all(no_error)
        findings.append(f"{tool}: {ended.detail}; {', '.join(summaries) or 'no summary'}")
        reasons += [f"{tool}: {reason}" for reason in ended.skipped]
        if not clean:
            outputs.append(f"{tool}:\n{last_lines(text)}")
    status = "failed" if outputs else "passed"
    output = "\n\n".join(outputs) or None
    return Stage("sanitizer", status, "; ".join(findings), skipped=reasons, output=output)


# --- benchmark ------------------------------------------------------------------------------------


def benchmark_stage(context: Context) -> Stage:
    """Run the benchmark."""
    folder = context.work / "benchmark"
    command = [
        sys.executable,
        str(BENCHMARKS / "gpu_kernels.py"),
        "--library",
        str(context.library),
    ]
    command += ["--output", str(folder), "--force"]
    if context.rehearsal:
        command += ["--device", "cpu"]
    if context.rehearsal or context.args.quick:
        command += ["--quick"]
    code, text = context.run("benchmark", command)
    if not (folder / "gpu-benchmark.json").exists():
        return Stage("benchmark", "failed", f"exit code {code}", output=last_lines(text))
    results = json.loads((folder / "gpu-benchmark.json").read_text(encoding="utf-8"))
    report = (folder / "gpu-benchmark.md").read_text(encoding="utf-8")
    left_out = [f"whole models: {results['no_vits']}"] if results["no_vits"] else []
    detail = f"{len(results['shapes'])} shapes, {len(results['vits'])} models and batches"
    if results["quick"]:
        detail += ", small sizes only (--quick)"
    status = "passed"
    if code or results["failures"]:
        status, detail = (
            "failed",
            f"{detail}; {len(results['failures'])} failures, exit code {code}",
        )
    return Stage("benchmark", status, detail, skipped=left_out, report=report, results=results)


# --- the whole ------------------------------------------------------------------------------------

RUN: dict[str, Callable[[Context], Stage]] = {
    "build": build_stage,
    "tests": tests_stage,
    "sanitizer": sanitizer_stage,
    "benchmark": benchmark_stage,
}


def run_stages(context: Context) -> dict[str, Any]:
    """Run what was asked for, writing the page after every stage."""
    wanted = ["build", *(name for name in context.args.only if name != "build")]
    record: dict[str, Any] = {"rehearsal": context.rehearsal, "facts": None, "stages": []}
    for name in wanted:
        began = time.monotonic()
        stage = RUN[name](context)
        stage.seconds = time.monotonic() - began
        say(f"{name}: {stage.status} in {stage.seconds:.0f} s: {stage.detail}")
        if record["facts"] is None:
            record["facts"] = all_facts(context)
        record["stages"].append(dataclasses.asdict(stage))
        write(record, context.args.out)
    return record


def all_facts(context: Context) -> dict[str, Any]:
    """Return what the run stands on."""
    import torch
    from gpu_facts import answer, facts

    assert context.library is not None
    device = torch.device("cpu" if context.rehearsal else "cuda")
    commit = answer("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    changed = answer("git", "-C", str(ROOT), "status", "--porcelain")
    if commit and changed:
        commit += " with changes"
    return {**facts(device, context.library), "sources": sources_hash(), "commit": commit}


def sources_hash() -> str:
    """Return the hash of all that decides the results: kernels, operator, tests, benchmark."""
    digest = hashlib.sha256()
    folders = [PLUGINS, ROOT / "simprune_deploy", BENCHMARKS, ROOT / "tests"]
    kinds = {".cpp", ".cu", ".h", ".py", ".txt"}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix in kinds:
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def write(record: dict[str, Any], out: Path) -> None:
    """Write the page and, beside it, the numbers."""
    out.mkdir(parents=True, exist_ok=True)
    with staged_file(out / "gpu-results.json") as staging:
        write_json(staging, record)
    with staged_file(out / "gpu-results.md") as staging:
        staging.write_text(page(record), encoding="utf-8")


def check_writable(out: Path, force: bool) -> None:
    """Refuse to replace results, before any work is done."""
    target = out / "gpu-results.md"
    if target.exists() and not force:
        raise SimpruneError(f"{target} holds results: replace them with --force, or give --out DIR")


def check_machine(args: argparse.Namespace) -> None:
    """Refuse a machine on which nothing can be run, in one line that says what is missing."""
    for name in (
        "numpy",
        "torch",
        *(["pytest"] if {"tests", "sanitizer"} & set(args.only) else []),
    ):
        if importlib.util.find_spec(name) is None:
            raise SimpruneError(f"{name} is not installed for {sys.executable}: pip install {name}")
    if args.rehearse:
        return
    import torch

    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU only"
        raise SimpruneError(
            f"no CUDA GPU that torch can use (torch {torch.__version__} is built for {built}): run "
            "this on a machine with one, or give --rehearse to try it on the CPU"
        )


def stage_names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in STAGES:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(STAGES)}")
    return [name for name in STAGES if name in names]


def last_lines(text: str) -> str:
    return "\n".join(text.rstrip().splitlines()[-LAST_LINES:])


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the results")
    parser.add_argument("--force", action="store_true", help="replace results that are there")
    parser.add_argument("--only", type=stage_names, default=list(STAGES), metavar="STAGES")
    parser.add_argument("--quick", action="store_true", help="benchmark small sizes only")
    parser.add_argument("--tensorrt-include", type=Path, help="folder of NvInferRuntime.h")
    parser.add_argument("--limit", type=float, default=3600, help="seconds for one command (3600)")
    parser.add_argument("--logs", type=Path, help="folder for logs (default: a temporary one)")
    parser.add_argument("--rehearse", action="store_true", help="try all this on the CPU")
    parser.add_argument("--combine", type=Path, nargs="+", metavar="JSON", help="records to join")
    args = parser.parse_args(arguments)
    if args.rehearse and args.out.resolve() == (ROOT / "docs").resolve():
        parser.error("a rehearsal is no result: give it an --out of its own")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    try:
        check_writable(args.out, args.force)
        if args.combine:
            record = combined([read_record(path) for path in args.combine])
            write(record, args.out)
        else:
            check_machine(args)
            record = run_all(args)
    except SimpruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(args.out / "gpu-results.md")
    return 1 if any(stage["status"] == "failed" for stage in record["stages"]) else 0


def run_all(args: argparse.Namespace) -> dict[str, Any]:
    work = Path(tempfile.mkdtemp(prefix="simprune-gpu-"))
    args.logs = args.logs or work / "logs"
    try:
        return run_stages(Context(args, work))
    finally:
        # logs of a run are worth keeping, what was built is not
        for entry in work.iterdir():
            if entry != args.logs:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["facts"]["sources"], record["stages"], record["rehearsal"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SimpruneError(f"{path} is no record of this command's: {error}") from None
    return record


if __name__ == "__main__":
    sys.exit(main())
