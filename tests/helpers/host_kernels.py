"""The CUDA kernels' sources on the CPU (libsimprune_host.so), held to the written definition.

As a module: a numpy binding of the C interface. As a program, for a library built with sanitizers,
which only a process that loads their run time first can load:

    LD_PRELOAD=libasan.so python tests/helpers/host_kernels.py LIBRARY --cases 2000

It prints a JSON summary and exits with 1 at the first case that is not as defined. Nothing of torch
is loaded.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from definition import (
    PAD,
    REDUCTIONS,
    SELECTIONS,
    Array,
    Case,
    Result,
    exact_case,
    random_case,
    reduce_tokens,
)

from simprune_deploy.parity.decisions import float_noise, violation
from simprune_deploy.predict.records import PruneRecord
from simprune_deploy.pruning.config import PruneConfig

DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
SCHEDULES = [
    (order, sm, multiprocessors)
    for multiprocessors in (132, 1)
    for sm in (80, 75, 0)
    for order in (0, 1, 7)
]
"""Orders of blocks, warps and lanes (forward, backward, shuffled) and the GPU whose code is taken:
with tensor cores that truncate sums as real ones do (80, 75), or none (0); with a block for every
tile, or large tiles and few blocks."""


class Problem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "num_tokens", "dim", "feature_dim")),
        *((name, ctypes.c_int64) for name in ("num_thresholds", "capacity", "multiple_of")),
        *((name, ctypes.c_int32) for name in ("num_prefix_tokens", "dtype")),
        *((name, ctypes.c_int32) for name in ("selection", "reduction")),
    ]


class Buffers(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            "tokens",
            "features",
            "log_size",
            "threshold",
            "kept_tokens",
            "kept_log_size",
            "kept_index",
            "assignment",
            "num_kept",
        )
    ]


class HostKernels:
    """libsimprune_host.so.

    Every buffer is made as large as the interface asks for and no larger, and filled with garbage,
    so that a sanitizer sees an access outside and a test an output that was not written.
    """

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.simprune_workspace_bytes.restype = ctypes.c_size_t
        self.library.simprune_error.restype = ctypes.c_char_p
        self.library.simprune_info.restype = ctypes.c_char_p

    def schedule(self, order: int, sm: int, multiprocessors: int = 132) -> None:
        self.library.simprune_host_schedule(order, sm, multiprocessors)

    def error(self) -> str:
        return str(self.library.simprune_error().decode())

    def workspace_bytes(self, problem: Problem) -> int:
        return int(self.library.simprune_workspace_bytes(ctypes.byref(problem)))

    def enqueue(
        self, problem: Problem, buffers: Buffers, workspace: int | None, workspace_bytes: int
    ) -> int:
        return int(
            self.library.simprune_enqueue(
                ctypes.byref(problem),
                ctypes.byref(buffers),
                ctypes.c_void_p(workspace),
                ctypes.c_size_t(workspace_bytes),
                None,
            )
        )

    def run(
        self, case: Case, dtype: str = "float32", misalign: int = 0, garbage: int = 0xA5
    ) -> Result:
        """Run a case with its tokens and features as `dtype`; kept tokens come back in float64.

        `misalign` moves them by that many elements from a 256-byte boundary; `garbage` is what
        every byte of the outputs and the workspace holds before.
        """
        batch, num_tokens, dim = case.tokens.shape
        problem = problem_of(case, dtype)
        tokens = aligned_empty(case.tokens.shape, DTYPES[dtype], misalign)
        tokens[...] = case.tokens
        features = tokens
        if case.features is not None:
            features = aligned_empty(case.features.shape, DTYPES[dtype], misalign)
            features[...] = case.features
        most = case.prefix + case.capacity if case.capacity else num_tokens
        outputs = [
            aligned_empty((batch * most, dim), DTYPES[dtype], misalign),
            aligned_empty((batch * most,), np.float32),
            aligned_empty((batch * most,), np.int64),
            aligned_empty((batch, num_tokens), np.int64),
            aligned_empty((1,), np.int32),
        ]
        inputs = [tokens, features, *(as_aligned(x) for x in (case.log_size, case.threshold))]
        size = self.workspace_bytes(problem)
        assert size > 0, self.error()
        workspace = aligned_empty((size,), np.uint8)
        for output in [*outputs, workspace]:
            output.view(np.uint8)[...] = garbage
        buffers = Buffers(*(x.ctypes.data for x in inputs + outputs))
        status = self.enqueue(problem, buffers, workspace.ctypes.data, size)
        assert status == 0, self.error()

        slots = int(outputs[4][0])
        assert slots <= most
        kept_tokens, kept_log_size, kept_index, assignment, _ = outputs
        used = batch * slots
        for unused in (kept_tokens[used:], kept_log_size[used:], kept_index[used:]):
            assert (np.ascontiguousarray(unused).view(np.uint8) == garbage).all(), "wrote behind K"
        return Result(
            kept_tokens[:used].reshape(batch, slots, dim).astype(np.float64),
            kept_log_size[:used].reshape(batch, slots).copy(),
            kept_index[:used].reshape(batch, slots).copy(),
            assignment.copy(),
        )


def problem_of(case: Case, dtype: str = "float32") -> Problem:
    batch, num_tokens, dim = case.tokens.shape
    return Problem(
        batch,
        num_tokens,
        dim,
        case.compared.shape[2],
        len(case.threshold),
        case.capacity,
        case.multiple_of,
        case.prefix,
        list(DTYPES).index(dtype),
        SELECTIONS.index(case.selection),
        REDUCTIONS.index(case.reduction),
    )


def aligned_empty(shape: tuple[int, ...], dtype: Any, misalign: int = 0) -> Array:
    """An array that begins `misalign` elements behind a 256-byte boundary and ends with its memory.

    The buffer has not a byte more than it must, so that a read behind the end is seen.
    """
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(256 + misalign * dtype.itemsize + size, np.uint8)
    start = -memory.ctypes.data % 256 + misalign * dtype.itemsize
    return memory[start : start + size].view(dtype).reshape(shape)


def as_aligned(values: Array) -> Array:
    copy = aligned_empty(values.shape, values.dtype)
    copy[...] = values
    return copy


def rounded(case: Case, dtype: str) -> Case:
    """The case with its tokens and features as `dtype` holds them."""

    def held(values: Array) -> Array:
        return np.asarray(values.astype(DTYPES[dtype]).astype(np.float32))

    features = None if case.features is None else held(case.features)
    return dataclasses.replace(case, tokens=held(case.tokens), features=features)


def assert_values(case: Case, dtype: str, actual: Result) -> None:
    """Step 4 and padding, for the decisions that were made: within rounding of the definition.

    One rounding to `dtype` of a weighted mean, and float32 sums of up to N terms before it.
    """
    num_tokens = case.tokens.shape[1]
    expected = reduce_tokens(
        case.tokens,
        case.log_size,
        actual.kept_index,
        actual.assignment,
        case.reduction,
        case.prefix,
    )
    scale = np.abs(case.tokens).max(initial=0) or 1
    noise = scale * 2.0**-23 * (2 + np.sqrt(num_tokens))
    np.testing.assert_allclose(
        actual.kept_tokens, expected.kept_tokens, rtol=EPSILON[dtype], atol=noise
    )
    np.testing.assert_allclose(
        actual.kept_log_size, expected.kept_log_size, rtol=2.0**-22, atol=4e-6
    )
    heads = np.take_along_axis(
        case.tokens.astype(np.float64), actual.kept_index[:, :, None], axis=1
    )
    for image in range(len(case.tokens)):
        members = np.bincount(
            actual.assignment[image][actual.assignment[image] >= 0],
            minlength=actual.kept_index.shape[1],
        )
        alone = members == 1
        np.testing.assert_array_equal(actual.kept_tokens[image, alone], heads[image, alone])
        assert (actual.kept_tokens[image, members == 0] == 0).all()
        assert (actual.kept_log_size[image, members == 0] == np.float32(PAD)).all()


def worst_violation(case: Case, actual: Result) -> float:
    """By how much similarities would have to differ for the decisions to be right."""
    config = PruneConfig(selection=case.selection, reduction=case.reduction)
    worst = 0.0
    for image in range(len(case.tokens)):
        record = PruneRecord(
            case.compared[image],
            case.log_size[image],
            float(case.threshold[image if len(case.threshold) > 1 else 0]),
            actual.kept_index[image],
            actual.assignment[image],
        )
        worst = max(worst, violation(record, config, case.capacity, case.prefix))
    return worst


def drawn_case(seed: int) -> tuple[str, str, Case, int]:
    """Case number `seed`: kind ("exact", "random"), dtype, the case, and its misalignment."""
    rng = np.random.default_rng([seed, 20])
    large = rng.random() < 0.03
    exact = rng.random() < 0.6
    patches = int(rng.integers(257, 420)) if large else int(rng.integers(1, 90))
    widths = [1, 3, 8, 16, 24, 40, 64, 65, 96, 128, 130, 192, 264]
    common: dict[str, Any] = {
        "seed": seed,
        "batch": 1 if large else int(rng.integers(1, 4)),
        "patches": patches,
        "prefix": int(rng.integers(0, 6)),
        "selection": str(rng.choice(SELECTIONS, p=[0.7, 0.3])),
        "reduction": str(rng.choice(REDUCTIONS)),
        "capacity": int(rng.integers(1, patches + 1)) if rng.random() < 0.4 else 0,
        "multiple_of": int(rng.choice([1, 1, 2, 8, 64])),
        "padding": str(rng.choice(["none", "tail", "all", "mixed"])),
        "per_image_threshold": bool(rng.random() < 0.5),
        "dim": int(rng.choice(widths)),
        "feature_dim": int(rng.choice(widths)) if rng.random() < 0.6 else None,
    }
    if exact:
        case = exact_case(sizes=str(rng.choice(["ones", "several"])), **common)
    else:
        case = random_case(spread=float(rng.choice([0.0, 0.1, 0.4, 1.0])), **common)
    dtype = str(rng.choice(list(DTYPES)))
    return "exact" if exact else "random", dtype, rounded(case, dtype), int(rng.integers(0, 3))


def check_drawn_case(kernels: HostKernels, seed: int) -> tuple[str, float]:
    """Hold one case to the definition; return its kind and the largest violation."""
    kind, dtype, case, misalign = drawn_case(seed)
    kernels.schedule(*SCHEDULES[seed % len(SCHEDULES)])
    actual = kernels.run(case, dtype, misalign)
    assert_values(case, dtype, actual)
    worst = worst_violation(case, actual)
    if kind == "exact":
        assert worst == 0
        if case.tokens.shape[1] < 60:  # the literal definition takes its time
            expected = case.expected()
            np.testing.assert_array_equal(actual.kept_index, expected.kept_index)
            np.testing.assert_array_equal(actual.assignment, expected.assignment)
    else:
        assert worst <= float_noise(case.compared.shape[2]), (worst, case)
    return kind, worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", type=Path)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    kernels = HostKernels(arguments.library)
    count = {"exact": 0, "random": 0}
    worst = 0.0
    for seed in range(arguments.first, arguments.first + arguments.cases):
        try:
            kind, margin = check_drawn_case(kernels, seed)
        except AssertionError as error:
            print(f"case {seed}: {error}", file=sys.stderr)
            return 1
        count[kind] += 1
        worst = max(worst, margin)
    print(json.dumps({"cases": sum(count.values()), **count, "worst_violation": worst}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
