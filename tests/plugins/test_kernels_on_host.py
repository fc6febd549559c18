"""The CUDA kernels' sources, compiled for the CPU, against PyTorch and the written definition."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from definition import PAD, REDUCTIONS, SELECTIONS, Case, Result, exact_case, random_case
from host_kernels import (
    DTYPES,
    SCHEDULES,
    Buffers,
    HostKernels,
    Problem,
    aligned_empty,
    assert_values,
    check_drawn_case,
    drawn_case,
    problem_of,
    rounded,
    worst_violation,
)
from places import ROOT
from plugin_build import cmake_build

from simprune_deploy.parity.decisions import float_noise, similarity_matrix
from simprune_deploy.pruning.operator import similarity_prune

IN_PROCESS = 1500
UNDER_SANITIZERS = 600
MAX_PATCHES = 4096


@pytest.fixture(scope="module")
def kernels(host_library: Path) -> HostKernels:
    return HostKernels(host_library)


@pytest.fixture(autouse=True)
def default_schedule(kernels: HostKernels) -> None:
    kernels.schedule(0, 80)


def run_torch(case: Case, dtype: str = "float32") -> Result:
    tokens = torch.from_numpy(case.tokens).to(getattr(torch, dtype))
    outputs = similarity_prune(
        tokens, torch.from_numpy(case.log_size), torch.from_numpy(case.threshold), **case.attributes
    )
    return Result(outputs[0].double().numpy(), *(output.numpy() for output in outputs[1:]))


def assert_same_decisions(actual: Result, expected: Result) -> None:
    np.testing.assert_array_equal(actual.kept_index, expected.kept_index)
    np.testing.assert_array_equal(actual.assignment, expected.assignment)


def assert_identical(actual: Result, expected: Result) -> None:
    for field in dataclasses.fields(Result):
        np.testing.assert_array_equal(getattr(actual, field.name), getattr(expected, field.name))


def attributes(seed: int, patches: int) -> dict[str, Any]:
    """Attributes that go through selections, reductions and capacities with the seed."""
    return {
        "selection": SELECTIONS[seed % 2],
        "reduction": REDUCTIONS[seed // 2 % 2],
        "capacity": [0, 0, max(1, patches // 3)][seed % 3],
        "multiple_of": [1, 8][seed // 4 % 2],
        "prefix": seed % 6,
    }


# --- decisions and values -------------------------------------------------------------------------


@pytest.mark.parametrize("part", range(5))
def test_drawn_cases_are_as_defined(kernels: HostKernels, part: int) -> None:
    """Exact data: every decision, ties included. Random data: right within float noise."""
    kinds = {check_drawn_case(kernels, seed)[0] for seed in range(part, IN_PROCESS, 5)}
    assert kinds == {"exact", "random"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("patches", [1, 2, 31, 32, 33, 63, 64, 65, 196, 255, 256, 257, 288, 576])
def test_exact_data_is_decided_as_by_pytorch(
    kernels: HostKernels, patches: int, dtype: str
) -> None:
    """Sizes around a warp, a tile of the Gram matrix, and the largest image of one block."""
    for seed in range(6):
        case = exact_case(seed, patches=patches, **attributes(seed, patches), dim=40)
        kernels.schedule(*SCHEDULES[seed])
        actual = kernels.run(case, dtype)
        assert_same_decisions(actual, run_torch(case))
        assert_values(case, dtype, actual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 7, 31, 32, 33, 64, 65, 127, 384, 1000, 1024, 1032])
def test_every_dimension(kernels: HostKernels, dim: int, dtype: str) -> None:
    for seed in range(3):
        case = random_case(seed, patches=40, dim=dim, spread=0.3, padding="tail")
        case = rounded(case, dtype)
        actual = kernels.run(case, dtype, misalign=seed)
        assert_values(case, dtype, actual)
        assert worst_violation(case, actual) <= float_noise(dim)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_images_are_decided_as_by_pytorch(
    kernels: HostKernels, dtype: str, selection: str
) -> None:
    """Where they differ, each is within float noise of the definition; they seldom do."""
    differ = 0
    for seed in range(20):
        case = random_case(
            seed,
            batch=2,
            patches=300,
            dim=48,
            spread=0.5,
            selection=selection,
            capacity=90 * (seed % 2),
        )
        case = rounded(case, dtype)
        actual = kernels.run(case, dtype)
        assert worst_violation(case, actual) <= float_noise(48)
        differ += not np.array_equal(actual.assignment, run_torch(case).assignment)
    assert differ <= 1


@pytest.mark.parametrize("selection", SELECTIONS)
def test_as_many_patches_as_there_may_be(kernels: HostKernels, selection: str) -> None:
    """4096 patches, and two images that do not fit into the work space together."""
    case = exact_case(
        3, batch=2, patches=MAX_PATCHES, prefix=1, selection=selection, padding="tail", dim=16
    )
    kernels.schedule(0, 0)
    actual = kernels.run(case)
    assert_same_decisions(actual, run_torch(case))
    alone = kernels.run(case.image(1))
    np.testing.assert_array_equal(actual.assignment[1:], alone.assignment)


def test_an_image_does_not_depend_on_the_others_in_its_batch(kernels: HostKernels) -> None:
    for seed in range(40):
        _, dtype, case, _ = drawn_case(seed)
        together = kernels.run(case, dtype)
        for image in range(len(case.tokens)):
            alone = kernels.run(case.image(image), dtype)
            slots = min(alone.kept_index.shape[1], together.kept_index.shape[1])
            np.testing.assert_array_equal(alone.assignment[0], together.assignment[image])
            for name in ("kept_tokens", "kept_log_size", "kept_index"):
                np.testing.assert_array_equal(
                    getattr(alone, name)[0, :slots], getattr(together, name)[image, :slots]
                )


@pytest.mark.parametrize("sm", [80, 75, 0])
def test_the_order_of_threads_changes_no_bit(kernels: HostKernels, sm: int) -> None:
    """A result that depended on it would be a race: a missing barrier, or garbage read."""
    for seed in [
        *range(30),
        *(s for s in range(30, 200) if drawn_case(s)[2].tokens.shape[1] > 256),
    ]:
        _, dtype, case, misalign = drawn_case(seed)
        kernels.schedule(0, sm)
        forward = kernels.run(case, dtype, misalign)
        for order in (1, 2, 3):
            kernels.schedule(order, sm)
            assert_identical(kernels.run(case, dtype, misalign), forward)


@pytest.mark.timeout(1200)
def test_sanitizers_find_nothing(tensorrt_headers: Path) -> None:
    """AddressSanitizer and UBSan over buffers that are no larger than they must be."""
    folder = cmake_build(
        "host-sanitized",
        ["simprune_host"],
        {"SIMPRUNE_CUDA": "OFF", "SIMPRUNE_HOST": "ON", "SIMPRUNE_SANITIZE": "address,undefined"},
    )
    library = folder / "libsimprune_host.so"
    preload = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    tests = ROOT / "tests" / "helpers"
    done = subprocess.run(
        [
            sys.executable,
            str(tests / "host_kernels.py"),
            str(library),
            f"--cases={UNDER_SANITIZERS}",
            "--first=100000",
        ],
        env={
            **os.environ,
            "LD_PRELOAD": preload,
            "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "PYTHONPATH": str(tests.parent),
            "PYTHONMALLOC": "malloc",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["cases"] == UNDER_SANITIZERS
    assert "runtime error" not in done.stderr


# --- special values -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("threshold", [np.nan, np.inf, -np.inf, 0.0, 1.5])
def test_every_threshold(
    kernels: HostKernels, threshold: float, selection: str, dtype: str
) -> None:
    for patches in (20, 270):
        case = exact_case(5, patches=patches, selection=selection, padding="none", threshold=1.0)
        case = dataclasses.replace(case, threshold=np.float32([threshold]))
        actual = kernels.run(case, dtype)
        assert_same_decisions(actual, run_torch(case))
        assert_values(case, dtype, actual)
        if np.isnan(threshold) or threshold > 1:
            np.testing.assert_array_equal(actual.kept_tokens, case.tokens)


def test_norms_beyond_float32_are_like_nothing(kernels: HostKernels) -> None:
    """The square of a bfloat16 or float32 may overflow: f = x / inf = 0, as in PyTorch."""
    tokens = np.float32([[[1e30, 0], [1e30, 0], [0, 2], [0, 4], [-3e38, 3e38]]])
    for dtype in ("float32", "bfloat16"):
        case = Case(tokens, np.zeros((1, 5), np.float32), np.float32([0.5]), prefix=0)
        case = rounded(case, dtype)
        actual = kernels.run(case, dtype)
        assert_same_decisions(actual, run_torch(case))
        assert actual.kept_index.tolist() == [[0, 1, 2, 4]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_that_are_not_finite_are_kept(kernels: HostKernels, dtype: str) -> None:
    for value in (np.nan, np.inf, -np.inf):
        for patches in (30, 300):
            case = exact_case(8, batch=1, patches=patches, padding="none", threshold=0.5)
            case.tokens[0, case.prefix + 4, 3] = value
            actual = kernels.run(case, dtype)
            heads = actual.kept_index[0].tolist()
            assert case.prefix + 4 in heads
            assert (actual.assignment >= 0).all()
            assert (actual.assignment < len(heads)).all()


def test_float16_at_its_limits(kernels: HostKernels) -> None:
    rng = np.random.default_rng(1)
    tokens = rng.choice(np.float32([65504, -65504, 6e-8, 0]), (2, 80, 192))
    case = Case(tokens, np.zeros((2, 80), np.float32), np.float32([0.05]), prefix=1)
    case = rounded(case, "float16")
    actual = kernels.run(case, "float16")
    assert worst_violation(case, actual) <= float_noise(192)
    assert np.isfinite(actual.kept_tokens).all()
    assert_values(case, "float16", actual)


@pytest.mark.parametrize("capacity", [0, 3])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("patches", [12, 260])
def test_a_batch_of_padding_alone(
    kernels: HostKernels, patches: int, prefix: int, capacity: int
) -> None:
    case = exact_case(3, patches=patches, prefix=prefix, capacity=capacity, padding="none")
    case.log_size[:, prefix:] = PAD
    actual = kernels.run(case)
    assert_same_decisions(actual, run_torch(case))
    assert_values(case, "float32", actual)


# --- bad calls ------------------------------------------------------------------------------------

GOOD = exact_case(1, batch=2, patches=10, prefix=1)


def changed(**values: int) -> Problem:
    problem = problem_of(GOOD)
    for name, value in values.items():
        setattr(problem, name, value)
    return problem


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_prefix_tokens": 11}, "num_prefix_tokens 11 leaves no patches among 11 tokens"),
        ({"num_prefix_tokens": -1}, "num_prefix_tokens -1 must be 0 or more"),
        ({"dim": 0}, "0 dimensions"),
        ({"batch": 0}, "batch 0"),
        ({"batch": 2**62, "num_thresholds": 1}, "too many"),
        ({"num_tokens": -3}, "leaves no patches among -3 tokens"),
        ({"num_tokens": 4098}, "4097 patches are more than the 4096"),
        ({"num_tokens": 2**60}, "more than the 4096"),
        ({"dim": 2**40}, "dimensions"),
        ({"num_thresholds": 3}, "3 thresholds for 2 images"),
        ({"num_thresholds": 0}, "0 thresholds for 2 images"),
        ({"capacity": 11}, "capacity 11 is outside [0, 10]"),
        ({"capacity": -1}, "capacity -1 is outside"),
        ({"multiple_of": 0}, "multiple_of 0 must be 1 or more"),
        ({"multiple_of": 2**40}, "multiple_of"),
        ({"dtype": 3}, "dtype 3"),
        ({"selection": 2}, "selection 2"),
        ({"reduction": -1}, "reduction -1"),
    ],
)
def test_a_problem_that_is_not_covered_is_refused(
    kernels: HostKernels, values: dict[str, int], message: str
) -> None:
    problem = changed(**values)
    assert kernels.workspace_bytes(problem) == 0
    assert message in kernels.error()
    assert kernels.enqueue(problem, Buffers(), None, 0) == 1
    assert "\n" not in kernels.error()


def test_missing_buffers_and_workspace_are_refused(kernels: HostKernels) -> None:
    problem = problem_of(GOOD)
    size = kernels.workspace_bytes(problem)
    memory = aligned_empty((size,), np.uint8)
    buffers = [aligned_empty((4096,), np.uint8) for _ in Buffers._fields_]
    names = [name for name, _ in Buffers._fields_]
    for position, name in enumerate(names[:-1]):
        pointers = [buffer.ctypes.data for buffer in buffers]
        pointers[position] = 0
        assert kernels.enqueue(problem, Buffers(*pointers), memory.ctypes.data, size) == 2
        assert kernels.error() == f"the pointer to {name} is NULL"
        pointers[position] = buffers[position].ctypes.data + 1
        assert kernels.enqueue(problem, Buffers(*pointers), memory.ctypes.data, size) == 2
        assert f"{name} is not aligned to" in kernels.error()
    whole = Buffers(*(buffer.ctypes.data for buffer in buffers))
    assert kernels.enqueue(problem, whole, None, size) == 2
    assert kernels.enqueue(problem, whole, memory.ctypes.data, size - 1) == 2
    assert f"{size - 1} bytes is too small: {size} are needed" in kernels.error()


def test_a_workspace_for_the_largest_sizes_serves_every_smaller_one(kernels: HostKernels) -> None:
    sizes = [1, 2, 31, 32, 33, 255, 256, 257, 500, 1369, 2000, 3000, 3500, 4095, 4096]
    table = [
        [
            kernels.workspace_bytes(
                changed(batch=batch, num_tokens=patches + 1, num_thresholds=1, capacity=0)
            )
            for patches in sizes
        ]
        for batch in (1, 2, 3, 8, 17, 64, 1000)
    ]
    bytes_of = np.array(table)
    assert (np.diff(bytes_of, axis=0) >= 0).all()
    assert (np.diff(bytes_of, axis=1) >= 0).all()
    assert bytes_of.max() < 200 * 2**20, "a batch is worked on in groups"


# --- float noise ----------------------------------------------------------------------------------


def giant_first(rng: np.random.Generator, dim: int) -> Any:
    """One component far larger than the rest, as ViTs have them ("massive activations")."""
    tokens = rng.standard_normal((12, dim))
    tokens[:, 0] = 500
    return tokens


def scaled_constants(rng: np.random.Generator, dim: int) -> Any:
    """Multiples of the vector of ones: all products of a sum are equal, and so are its errors."""
    return np.ones((12, dim)) * rng.uniform(1, 2, (12, 1))


def offset(rng: np.random.Generator, dim: int) -> Any:
    return 100 + rng.standard_normal((12, dim))


def gaussian(rng: np.random.Generator, dim: int) -> Any:
    return rng.standard_normal((12, dim))


def worst_noise(kernels: HostKernels, tokens: Any, dtype: str) -> float:
    """The largest violation, as a multiple of the bound, at thresholds around a similarity."""
    limit = np.float32([2])
    case = Case(np.float32(tokens[None]), np.zeros((1, len(tokens)), np.float32), limit, prefix=0)
    case = rounded(case, dtype)
    similarity = similarity_matrix(case.tokens[0], 0)
    steps = np.geomspace(1e-7, 3e-4, 25)
    worst = 0.0
    for step in [*-steps, *steps]:
        limit = np.float32([similarity[1, 0] + step])
        case = dataclasses.replace(case, threshold=limit)
        worst = max(worst, worst_violation(case, kernels.run(case, dtype)))
    return worst / float_noise(tokens.shape[1])


@pytest.mark.parametrize("sm", [80, 75, 1080, 0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", [giant_first, scaled_constants, offset, gaussian])
def test_sums_stay_within_the_noise_that_is_allowed(
    kernels: HostKernels, family: Callable[..., Any], dtype: str, sm: int
) -> None:
    """Sums that round badly; 80 and 75 truncate them as tensor cores do."""
    kernels.schedule(0, sm)
    for dim in (384, 768, 1024, 4096):
        tokens = family(np.random.default_rng(dim), dim)
        assert worst_noise(kernels, tokens, dtype) <= 1, dim


def test_a_mean_of_large_tokens_does_not_overflow(kernels: HostKernels) -> None:
    tokens = np.full((1, 3, 16), 3e38, np.float32)
    for dtype in ("float32", "bfloat16"):
        case = Case(tokens, np.float32([[0, 0, 45]]), np.float32([-1]), prefix=0)
        case = rounded(case, dtype)
        actual = kernels.run(case, dtype)
        assert actual.kept_index.tolist() == [[0]]
        assert_values(case, dtype, actual)
