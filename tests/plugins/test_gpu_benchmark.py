"""The GPU benchmark tried on the CPU: its rivals compute what they say, and every path runs."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from definition import PAD, exact_case
from places import ROOT

BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_kernels  # noqa: E402
import gpu_timing  # noqa: E402
import plugin_floors as floors  # noqa: E402
from gpu_rivals import bipartite_merge, vectorised_prune  # noqa: E402


def arguments(case: Any) -> tuple[Any, ...]:
    return (
        torch.from_numpy(case.tokens),
        torch.from_numpy(case.compared),
        torch.from_numpy(case.log_size),
        torch.from_numpy(case.threshold),
        case.prefix,
    )


@pytest.mark.parametrize("capacity", [0, 9])
def test_the_vectorised_operator_equals_the_definition(capacity: int) -> None:
    for seed in range(60):
        case = exact_case(
            seed,
            prefix=seed % 3,
            patches=13 + seed % 2,
            capacity=capacity,
            feature_dim=(None, 32)[seed // 2 % 2],
        )
        outputs = vectorised_prune(*arguments(case), capacity)
        expected = case.expected()
        np.testing.assert_array_equal(outputs[2], expected.kept_index)
        np.testing.assert_array_equal(outputs[3], expected.assignment)
        np.testing.assert_allclose(outputs[0], expected.kept_tokens, atol=1e-6)
        np.testing.assert_allclose(outputs[1], expected.kept_log_size, atol=2e-6)


def test_a_bipartite_merge_by_hand() -> None:
    """Class token, then patches a, b, c, d, e of which c is nearest to its neighbour b."""
    metric = torch.tensor([[[1.0, 0], [9, 9], [1, 0.1], [1, 0.11], [0, 1], [1, 5]]])
    tokens = torch.tensor([[[7.0], [1], [2], [4], [8], [16]]])
    sizes = torch.tensor([[[1.0], [1], [3], [1], [1], [1]]])
    # even positions: 0 (class), 2, 4; odd ones: 1, 3, 5. 2 goes into 3: (3 * 2 + 4) / 4
    kept, kept_sizes = bipartite_merge(tokens, sizes, metric, 1)
    assert kept.flatten().tolist() == [7, 8, 1, 2.5, 16]
    assert kept_sizes.flatten().tolist() == [1, 1, 1, 4, 1]
    kept, kept_sizes = bipartite_merge(tokens, sizes, metric, 2)
    assert kept.flatten().tolist() == [7, 1, 2.5, 12]
    assert kept_sizes.flatten().tolist() == [1, 1, 4, 2]


def test_a_bipartite_merge_keeps_the_weighted_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, metric = (torch.randn(3, 50, 8, generator=generator) for _ in range(2))
    sizes = torch.randint(1, 5, (3, 50, 1), generator=generator).float()
    kept, kept_sizes = bipartite_merge(tokens, sizes, metric, 20)
    assert kept.shape == (3, 30, 8)
    torch.testing.assert_close((kept * kept_sizes).sum(1), (tokens * sizes).sum(1))
    torch.testing.assert_close(kept_sizes.sum(1), sizes.sum(1))
    assert torch.equal(kept[:, 0], tokens[:, 0])


@pytest.mark.parametrize("features", [None, 64])
@pytest.mark.parametrize("kept_share", [0.05, 0.7, 1.0])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_paired_inputs_leave_the_stated_share(
    kept_share: float, dtype: str, features: int | None
) -> None:
    shape = floors.Shape(2, 198, 256, dtype, prefix=2, kept_share=kept_share, features=features)
    inputs = gpu_kernels.paired_inputs(shape, torch.device("cpu"))
    outputs = gpu_kernels.similarity_prune(*inputs, shape.prefix)
    assert outputs[1].shape[1] == shape.slots
    assert (outputs[1] > PAD / 2).all()


def test_a_disagreement_is_an_error_not_a_time(
    host_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = cpu_bench(host_library)
    shape = floors.Shape(1, 30, 64)
    inputs = gpu_kernels.paired_inputs(shape, torch.device("cpu"))
    gpu_kernels.check_agreement(bench, shape, inputs)

    def wrong(*values: Any) -> tuple[torch.Tensor, ...]:
        tokens, sizes, index, assignment = vectorised_prune(*values)
        return tokens, sizes, index, assignment.flip(1)

    monkeypatch.setattr(gpu_kernels, "vectorised_prune", wrong)
    with pytest.raises(gpu_kernels.CheckFailedError, match="vectorised PyTorch operator decide"):
        gpu_kernels.check_agreement(bench, shape, inputs)
    loose = (*inputs[:3], torch.tensor([-1.0]))
    with pytest.raises(gpu_kernels.CheckFailedError, match="keep 15 slots, not 21"):
        gpu_kernels.check_agreement(bench, shape, loose)


def cpu_bench(library: Path) -> gpu_kernels.Bench:
    clock = gpu_timing.CpuClock(gpu_timing.Effort(0.001, 1, 2))
    ceilings = {"bandwidth": 1e9, "half_flops": 1e9, "float32_flops": 1e9}
    return gpu_kernels.Bench(
        torch.device("cpu"), gpu_kernels.Kernels(library), clock, None, ceilings
    )


def test_what_cannot_be_measured_is_written_down(host_library: Path) -> None:
    row: dict[str, Any] = {"seconds": {}, "batch": 2, "dtype": "float16"}
    bench = cpu_bench(host_library)

    def fail(error: Exception) -> float:
        raise error

    gpu_kernels.record(bench, row, "reference", lambda: fail(torch.OutOfMemoryError("too large")))
    gpu_kernels.record(bench, row, "tome_graph", lambda: fail(RuntimeError("no capture\nmore")))
    gpu_kernels.record(bench, row, "ours", lambda: 2e-6)
    assert row["seconds"] == {"reference": "out of memory", "tome_graph": "failed", "ours": 2e-6}
    assert bench.failures == ["tome_graph at batch 2, dtype float16: no capture"]
    assert gpu_kernels.microseconds("out of memory") == "out of memory"
    assert gpu_kernels.ratio("failed", 1.0) == ""

    shapes = [floors.Shape(1, 20, 8, features=2), floors.Shape(1, 20, 64, features=64)]
    rows = gpu_kernels.each(bench, shapes, lambda shape: gpu_kernels.measure_shape(bench, shape))
    # in two dimensions nobody is far from everybody
    assert [row["dim"] for row in rows] == [64]
    assert "the kernels keep" in bench.failures[1]


class FakeGpu:
    """A clock of its own instead of a GPU: every run takes one more millisecond than the last."""

    def __init__(self) -> None:
        self.now, self.captured = 0.0, 0

    def event(self, enable_timing: bool) -> Any:
        assert enable_timing
        moment = SimpleNamespace(at=-1.0, synchronize=lambda: None)
        moment.record = lambda: setattr(moment, "at", self.now)
        moment.elapsed_time = lambda end: (end.at - moment.at) * 1e3
        return moment

    def graph(self) -> Any:
        def replay() -> None:
            self.now += 1e-4 * self.captured

        return SimpleNamespace(replay=replay)

    @contextlib.contextmanager
    def capture(self, graph: Any) -> Iterator[None]:
        self.captured = 0
        yield

    def run(self) -> None:
        self.captured += 1
        self.now += 1e-4


def test_the_clock_of_a_gpu_on_a_make_believe_one(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu()
    fakes = {
        "Event": gpu.event,
        "CUDAGraph": gpu.graph,
        "graph": gpu.capture,
        "synchronize": lambda: None,
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1 << 20),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    clock = gpu_timing.CudaClock(gpu_timing.Effort(0.001, 3, 50), torch.device("cpu"))
    assert clock.cold(gpu.run) == pytest.approx(1e-4)
    assert clock.in_graph(gpu.run) == pytest.approx(1e-4)
    assert 1 < gpu.captured <= clock.MOST_COPIES


def run_benchmark(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "gpu_kernels.py"), *options]
    variables = {key: value for key, value in os.environ.items() if key != "SIMPRUNE_LIBRARY"}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**variables, **environment}
    )


def test_everything_runs_on_the_cpu_and_says_so(host_library: Path, tmp_path: Path) -> None:
    options = ["--device", "cpu", "--quick", "-o", str(tmp_path / "out")]
    done = run_benchmark(*options, SIMPRUNE_LIBRARY=str(host_library))
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / "gpu-benchmark.md").read_text(encoding="utf-8")
    assert done.stdout == text
    assert text.startswith("**This ran on the CPU")
    results = json.loads((tmp_path / "out" / "gpu-benchmark.json").read_text(encoding="utf-8"))
    assert results["facts"]["library"]["kind"] == "host"
    assert results["facts"]["gpu"] is None
    assert results["failures"] == []
    ours = {"ours_cold", "ours_graph", "ours_fixed_graph"}
    for key in ("shapes", "other_types", "redundancy"):
        for row in results[key]:
            assert row["seconds"].keys() >= ours
            assert all(seconds > 0 for seconds in row["seconds"].values())
            if key != "redundancy":
                assert row["seconds"].keys() - ours == {
                    *("ours_tokens_graph", "ours_keys_graph"),
                    *("reference", "vectorised", "tome_cold", "tome_graph"),
                }
                assert row["tome_slots"] == row["slots"]
    for row in results["vits"]:
        assert row["cosine_to_pytorch"] > 0.999
        assert row["kept"] == row["capacities"]
        assert "| " + row["model"] + " | " + str(row["batch"]) in text
    again = run_benchmark(*options, SIMPRUNE_LIBRARY=str(host_library))
    assert again.returncode == 2
    assert "replace it with --force" in again.stderr


def test_mistakes_are_one_line(host_library: Path, tmp_path: Path) -> None:
    for options, message in (
        ([], "no library: give --library"),
        (["--library", str(tmp_path / "x.so"), "--device", "cpu"], "does not exist"),
        (["--library", str(host_library)], "--device cpu"),
    ):
        if torch.cuda.is_available() and options[1:] == [str(host_library)]:
            message = "give --device cpu"
        done = run_benchmark(*options, "-o", str(tmp_path / "out"))
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_targets_are_met_or_not_by_the_numbers() -> None:
    seconds = {
        "ours_graph": 13.9e-6,
        "ours_fixed_graph": 16.9e-6,
        "ours_tokens_graph": 27.9e-6,
        "ours_keys_graph": "failed",
    }
    results = {"shapes": [{"batch": 1, "tokens": 197, "dim": 384, "seconds": seconds}]}
    lines = gpu_kernels.targets_table(results).splitlines()[2:]
    assert [line.split(" | ")[-1] for line in lines[:5]] == [
        *("yes |", "no |", "yes |", "not measured |", "not measured |")
    ]
    assert "| B = 1, N = 197, D = 384 | fixed | 16.8 | 16.9 | no |" in lines
    assert len(lines) == 16
