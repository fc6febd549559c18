"""The CUDA kernels' sources, compiled for the CPU: what only such a build can show.

Thousands of drawn cases against the written definition, blocks, warps and lanes in any order,
AddressSanitizer, sums that round as tensor cores do, and bad calls of the C interface. The directed
cases, for this build and for GPUs, are those of test_gpu_kernels.py.
"""

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
from definition import PAD, SELECTIONS, Case, Result, exact_case, random_case
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

IN_PROCESS = 1500
UNDER_SANITIZERS = 600


@pytest.fixture(scope="module")
def kernels(host_library: Path) -> HostKernels:
    return HostKernels(host_library)


@pytest.fixture(autouse=True)
def default_schedule(kernels: HostKernels) -> None:
    kernels.schedule(0, 80)


def assert_identical(actual: Result, expected: Result) -> None:
    for field in dataclasses.fields(Result):
        np.testing.assert_array_equal(getattr(actual, field.name), getattr(expected, field.name))


# --- decisions and values -------------------------------------------------------------------------


@pytest.mark.parametrize("part", range(5))
def test_drawn_cases_are_as_defined(kernels: HostKernels, part: int) -> None:
    """Exact data: every decision, ties included. Random data: right within float noise."""
    kinds = {check_drawn_case(kernels, seed)[0] for seed in range(part, IN_PROCESS, 5)}
    assert kinds == {"exact", "random"}


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


def test_the_division_of_the_work_changes_no_bit(kernels: HostKernels) -> None:
    """Large tiles or small ones, many blocks or one to all destinations."""
    for seed in (*range(40), *large_cases(200)):
        _, dtype, case, misalign = drawn_case(seed)
        expected = kernels.run(case, dtype, misalign)
        for multiprocessors in (1, 4, 40):
            kernels.schedule(0, 80, multiprocessors)
            assert_identical(kernels.run(case, dtype, misalign), expected)
        kernels.schedule(0, 80)


@pytest.mark.parametrize("multiprocessors", [132, 1])
@pytest.mark.parametrize("sm", [80, 75, 0])
def test_the_order_of_threads_changes_no_bit(
    kernels: HostKernels, sm: int, multiprocessors: int
) -> None:
    """A result that depended on it would be a race: a missing barrier, or garbage read."""
    for seed in (*range(30), *large_cases(200)):
        _, dtype, case, misalign = drawn_case(seed)
        kernels.schedule(0, sm, multiprocessors)
        forward = kernels.run(case, dtype, misalign)
        for order in (1, 2, 3):
            kernels.schedule(order, sm, multiprocessors)
            assert_identical(kernels.run(case, dtype, misalign), forward)


def large_cases(end: int) -> list[int]:
    return [seed for seed in range(end) if drawn_case(seed)[2].tokens.shape[1] > 256]


def test_padding_anywhere_stays_within_the_buffers(kernels: HostKernels) -> None:
    """Outside the definition; indices are in range nevertheless, and all writes in place."""
    for seed in range(60):
        capacity = seed % 3 * 7
        case = random_case(seed, patches=13 + seed % 2, padding="holes", capacity=capacity)
        if seed % 4 == 3:  # nobody to go to
            case.log_size[:, case.prefix + 1 :: 2] = PAD
        kernels.schedule(*SCHEDULES[seed % len(SCHEDULES)])
        actual = kernels.run(case, list(DTYPES)[seed % 3])
        assert (actual.assignment < actual.kept_index.shape[1]).all()
        assert ((actual.assignment >= 0) == (case.log_size > PAD / 2)).all()
        assert (actual.kept_index >= 0).all()
        assert (actual.kept_index < case.tokens.shape[1]).all()


@pytest.mark.parametrize("capacity", [0, 31])
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_features_that_are_not_finite_stay_within_the_buffers(
    kernels: HostKernels, dtype: str, selection: str, capacity: int
) -> None:
    for value in (np.nan, np.inf, -np.inf):
        for share in (0.1, 1.0):
            case = random_case(
                8, patches=60, capacity=capacity, selection=selection, padding="tail"
            )
            features = case.tokens.copy()
            features[np.random.default_rng(1).random(features.shape[:2]) < share] = value
            actual = kernels.run(dataclasses.replace(case, features=features), dtype)
            assert (actual.assignment < actual.kept_index.shape[1]).all()
            assert ((actual.assignment >= 0) == (case.log_size > PAD / 2)).all()
            assert (actual.kept_index < case.tokens.shape[1]).all()


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


def test_norms_beyond_float32_are_like_nothing(kernels: HostKernels) -> None:
    """The square of a bfloat16 or float32 may overflow: f = x / inf = 0, as in PyTorch."""
    tokens = np.float32([[[1e30, 0], [1e30, 0], [0, 2], [0, 4], [-3e38, 3e38]]])
    log_size = np.zeros((1, 5), np.float32)
    for dtype in ("float32", "bfloat16"):
        for limit, kept in ((0.5, [0, 1, 3, 4]), (0.0, [1, 3])):
            case = rounded(Case(tokens, log_size, np.float32([limit]), prefix=0), dtype)
            for schedule in SCHEDULES:
                kernels.schedule(*schedule)
                actual = kernels.run(case, dtype)
                assert actual.kept_index.tolist() == [kept]
                assert actual.assignment[0, 4] == (3 if limit else 0)
                assert_values(case, dtype, actual)


def test_the_largest_norms_and_the_smallest(kernels: HostKernels) -> None:
    """Squares near float32's largest, and norms of a millionth of a millionth."""
    rng = np.random.default_rng(1)
    for scale in (1.2e19, 1e-11, 1e-13, 1e-25, 1e-40):
        directions = rng.standard_normal((1, 40, 8))
        directions /= np.linalg.norm(directions, axis=2, keepdims=True)
        features = np.float32(directions)
        features[0, ::3] *= np.float32(scale)
        case = Case(features, np.zeros((1, 40), np.float32), np.float32([0.3]), prefix=0)
        for dtype in ("float32", "bfloat16"):
            of_type = rounded(case, dtype)
            assert worst_violation(of_type, kernels.run(of_type, dtype)) <= float_noise(8)


def test_float16_at_its_limits(kernels: HostKernels) -> None:
    rng = np.random.default_rng(1)
    tokens = rng.choice(np.float32([65504, -65504, 6e-8, 0]), (2, 80, 192))
    case = Case(tokens, np.zeros((2, 80), np.float32), np.float32([0.05]), prefix=1)
    case = rounded(case, "float16")
    actual = kernels.run(case, "float16")
    assert worst_violation(case, actual) <= float_noise(192)
    assert np.isfinite(actual.kept_tokens).all()
    assert_values(case, "float16", actual)


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
        ({"dim": 2**40}, "tokens have 1099511627776 dimensions"),
        ({"feature_dim": 0}, "features have 0 dimensions: at least 1 is needed"),
        ({"feature_dim": -5}, "features have -5 dimensions"),
        ({"feature_dim": 2**40}, "features have 1099511627776 dimensions"),
        ({"num_thresholds": 3}, "3 thresholds for 2 images"),
        ({"num_thresholds": 0}, "0 thresholds for 2 images"),
        ({"capacity": 11}, "capacity 11 is outside [0, 10]"),
        ({"capacity": -1}, "capacity -1 is outside"),
        (
            {"capacity": 4},
            "capacity 4 is below the 5 of 10 patches that a layer of pairs keeps at least: give 5 "
            "or more, or another layer behind this one",
        ),
        ({"num_tokens": 12, "capacity": 4}, "capacity 4 is below the 5 of 11 patches"),
        ({"capacity": 11, "selection": 1}, "capacity 11 is outside [0, 10]"),
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


@pytest.mark.parametrize("selection", [0, 1])
def test_a_workspace_for_the_largest_sizes_serves_every_smaller_one(
    kernels: HostKernels, selection: int
) -> None:
    sizes = [1, 2, 31, 32, 33, 255, 256, 257, 500, 1369, 2000, 3000, 3500, 4095, 4096]

    def needed(**values: int) -> int:
        return kernels.workspace_bytes(
            changed(num_thresholds=1, capacity=0, selection=selection, **values)
        )

    table = [
        [needed(batch=batch, num_tokens=patches + 1, feature_dim=width) for patches in sizes]
        for batch in (1, 2, 3, 8, 17, 64, 1000)
        for width in (1, 768)
    ]
    bytes_of = np.array(table)
    for step in (bytes_of[::2], bytes_of[1::2]):
        assert (np.diff(step, axis=0) >= 0).all()
        assert (np.diff(step, axis=1) >= 0).all()
    assert (bytes_of[1::2] >= bytes_of[::2]).all()
    # linear in the patches: keys for at most 16 blocks that share a source
    assert needed(batch=1000, num_tokens=4097) < 1000 * 4096 * (8 + 2 + 1 + 16 * 8 + 1)


def test_nothing_in_the_workspace_is_read_before_it_is_written(kernels: HostKernels) -> None:
    """Zeros, ones, or what another problem left: the same bits."""
    for seed in range(40):
        _, dtype, case, misalign = drawn_case(seed)
        expected = kernels.run(case, dtype, misalign)
        for garbage in (0x00, 0x7F, 0xFF):
            assert_identical(kernels.run(case, dtype, misalign, garbage), expected)


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
    closest = similarity_matrix(case.tokens[0], 0)[0, 1::2].max()
    steps = np.geomspace(1e-7, 3e-4, 25)
    worst = 0.0
    for step in [*-steps, *steps]:
        limit = np.float32([closest + step])
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
        case = Case(tokens, np.float32([[0, 45, 0]]), np.float32([-1]), prefix=0)
        case = rounded(case, dtype)
        actual = kernels.run(case, dtype)
        assert actual.kept_index.tolist() == [[1]]
        assert_values(case, dtype, actual)
