"""docs/gpu-results.md: what was run on a GPU, and what came of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from simprune_deploy.common.errors import SimpruneError

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import plugin_floors as floors  # noqa: E402

STAGES = {
    "build": "the library for this GPU is built, or the one that SIMPRUNE_LIBRARY names is taken",
    "tests": "`tests/plugins/test_gpu_kernels.py`: the kernels and the plugin's `enqueue` on "
    "directed cases against the definition and the PyTorch operator; streams, CUDA graphs, no "
    "waiting; `tests/engine/test_gpu_engines.py`, where TensorRT or TensorRT-RTX is installed: "
    "engines built, run through the runtime and held to PyTorch's golden cases, with and without "
    "CUDA graphs",
    "sanitizer": "compute-sanitizer: memcheck, racecheck, initcheck and synccheck over the small "
    "cases and `enqueue`",
    "benchmark": "`benchmarks/gpu_kernels.py`: times beside floors, PyTorch and ToMe; "
    "dense and pruned ViT-B/16 and ViT-L/16",
}

TITLE = "# GPU results\n"

COMMAND = """```
make test-gpu                             # or, where only nvcc, torch, numpy and pytest are:
python tests/gpu/run_on_gpu.py --out docs --force
```
"""

INTRODUCTION = (
    "Written by one command (at the end of this page). What it means for a user, and what was "
    "measured beside it, is in [gpu.md](gpu.md).\n"
)

REHEARSAL = (
    "**This is a rehearsal on the CPU. It shows that the commands run; nothing in it was run on a "
    "GPU, and none of its times means anything.**"
)


OPERATOR_VERSION = "2"

EARLIER = (
    "**This was run with version {} of the operator. The kernels of version {} have not been run "
    "on a GPU: nothing here is theirs but the floors on paper.**"
)


def floors_section() -> str:
    """Return the floors on paper."""
    return "\n".join(
        [
            "## Floors on paper\n",
            "Nothing here is measured: the least bytes and FLOPs of the operator over the peaks of "
            "the vendor's data sheets (`python benchmarks/plugin_floors.py --features 64`). "
            "float16 tokens, features of 64 channels, one prefix token, 70 % of the patches kept. "
            "Bytes: tokens, features, log-sizes and threshold read once, the kept tokens with "
            "their log-sizes and indices, the assignment and the count written once. FLOPs: "
            "patches with even numbers by those with odd ones. The floor is the larger of the two "
            "times, and says which it is. Launches are not in it.\n",
            floors.floors_table(features=64),
            floors.peaks_table(),
        ]
    )


def page(record: dict[str, Any]) -> str:
    """Return the page for what was run."""
    parts = [TITLE]
    if record["rehearsal"]:
        parts.append(REHEARSAL + "\n")
    # records from before there was a second version do not name it
    version = record["facts"]["library"].get("operator_version", "1")
    if version != OPERATOR_VERSION:
        parts.append(EARLIER.format(version, OPERATOR_VERSION) + "\n")
    parts += [
        INTRODUCTION,
        facts_table(record["facts"]),
        "## What was run\n",
        stages_table(record["stages"]),
        *(f"* **{name}**: {what}." for name, what in STAGES.items()),
        "",
    ]
    left_out = skipped(record["stages"])
    parts.append("## What was skipped, and why\n")
    parts.append("\n".join(f"* {line}" for line in left_out) + "\n" if left_out else "Nothing.\n")
    for stage in record["stages"]:
        if stage["status"] == "failed" and stage.get("output"):
            parts.append(f"## What {stage['name']} said\n")
            parts.append("```\n" + stage["output"].replace("```", "'''") + "\n```\n")
        if stage["name"] == "benchmark" and stage.get("report"):
            parts += ["## Benchmark\n", stage["report"]]
    parts += [floors_section(), "## To run it again\n", COMMAND]
    return "\n".join(parts)


def facts_table(facts: dict[str, Any]) -> str:
    """Return date, machine and versions as Markdown."""
    gpu, library = facts["gpu"], facts["library"]
    rows = [["date", facts["date"]]]
    if gpu:
        rows.append(
            [
                "GPU",
                f"{gpu['name']}, SM {gpu['sm']}, {gpu['multiprocessors']} multiprocessors, "
                f"{gpu['memory_gib']} GiB, L2 {gpu['l2_mib']} MiB",
            ]
        )
    packages = ", ".join(
        f"{name} {found or 'missing'}" for name, found in facts["packages"].items()
    )
    rows += [
        ["driver", facts["driver"] or "unknown"],
        ["CUDA", f"{facts['cuda_of_torch'] or 'none'} in torch, nvcc {facts['nvcc'] or 'missing'}"],
        ["processor", facts["processor"]],
        ["Python", f"{facts['python']}; {packages}"],
        [
            "library",
            f"{library['name']} {library['version']} ({library['kind']}, CUDA {library['cuda']}, "
            f"SM {', '.join(library['architectures']) or 'none'}, TensorRT headers "
            f"{library['tensorrt_headers'] or 'none'}), SHA-256 `{library['sha256'][:16]}`",
        ],
        ["sources", f"SHA-256 `{facts['sources'][:16]}`, commit {facts['commit'] or 'unknown'}"],
    ]
    return floors.markdown_table(["", ""], rows)


def stages_table(stages: list[dict[str, Any]]) -> str:
    """Return the stages and how they ended as Markdown."""
    rows = [
        [stage["name"], stage["status"], f"{stage['seconds']:.0f}", stage["detail"]]
        for stage in stages
    ]
    return floors.markdown_table(["stage", "result", "seconds", ""], rows)


def skipped(stages: list[dict[str, Any]]) -> list[str]:
    """Return everything that was not run, with its reason."""
    lines = []
    for stage in stages:
        if stage["status"] == "skipped":
            lines.append(f"{stage['name']}: {stage['detail']}")
        lines += [f"{stage['name']}: {reason}" for reason in stage.get("skipped", [])]
    asked = {stage["name"] for stage in stages}
    lines += [f"{name}: not asked for" for name in STAGES if name.split(" ")[0] not in asked]
    return lines


def combined(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one record of several runs on the same GPU with the same sources; later stages win.

    Raises:
        SimpruneError: the runs do not belong together.
    """
    first = records[0]
    for other in records[1:]:
        for name in ("gpu", "driver", "sources", "cuda_of_torch", "packages"):
            if other["facts"][name] != first["facts"][name]:
                raise SimpruneError(
                    f"these runs do not belong together: {name} is {first['facts'][name]!r} in one "
                    f"and {other['facts'][name]!r} in another: run the stages again in one place"
                )
        if other["rehearsal"] != first["rehearsal"]:
            raise SimpruneError("one run is a rehearsal on the CPU and another is not")
    stages = {stage["name"]: stage for record in records for stage in record["stages"]}
    order = [*STAGES]
    ordered = sorted(stages.values(), key=lambda stage: order.index(stage["name"]))
    return {**records[-1], "stages": ordered}
