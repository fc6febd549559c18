"""The floors on paper, counted again from arrays of those shapes and from the pairs themselves."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
from places import ROOT

BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import plugin_floors as floors  # noqa: E402


@pytest.mark.parametrize("features", [None, 64])
def test_one_row_counted_from_arrays_and_pairs(features: int | None) -> None:
    """B = 8, N = 577, D = 768, float16, 403 of 576 patches kept."""
    batch, tokens, dim, slots = 8, 577, 768, 404
    read = [
        np.empty((batch, tokens, dim), np.float16),
        np.empty((batch, tokens), np.float32),
        np.empty(1, np.float32),
        *([np.empty((batch, tokens, features), np.float16)] if features else []),
    ]
    written = [
        np.empty((batch, slots, dim), np.float16),
        np.empty((batch, slots), np.float32),
        np.empty((batch, slots), np.int64),
        np.empty((batch, tokens), np.int64),
        np.empty((), np.int32),
    ]
    pairs = sum(1 for i in range(0, tokens - 1, 2) for j in range(1, tokens - 1, 2))
    multiply_adds = batch * pairs * (features or dim)

    shape = floors.Shape(batch, tokens, dim, kept_share=0.7, features=features)
    assert shape.slots == slots
    assert floors.bytes_read(shape) == sum(array.nbytes for array in read)
    assert floors.bytes_written(shape) == sum(array.nbytes for array in written)
    assert floors.pair_flops(shape) == 2 * multiply_adds

    h200 = floors.PEAKS[0]
    seconds = max(
        sum(array.nbytes for array in read + written) / 4.8e12, 2 * multiply_adds / 989.5e12
    )
    assert floors.paper_floor(shape, h200) == pytest.approx(seconds)
    table = floors.floors_table(features=features)
    row = next(line for line in table.splitlines() if line.startswith("| 8 | 577 | 768 |"))
    assert f"| {seconds * 1e6:.2f} bytes |" in row


def test_float32_tokens_move_twice_the_bytes_of_their_channels_and_leave_the_matrix_units() -> None:
    half, single = (floors.Shape(2, 101, 64, dtype) for dtype in ("float16", "float32"))
    channels = 2 * 2 * (101 + 71) * 64
    assert floors.bytes_moved(single) - floors.bytes_moved(half) == channels
    peak = floors.PEAKS[0]
    assert peak.flops("float32") < peak.flops("bfloat16") == peak.flops("float16")


@pytest.mark.parametrize("share", [0.001, 0.5, 1.0])
def test_half_at_least_and_all_at_most_are_kept(share: float) -> None:
    assert floors.Shape(1, 3, 4, prefix=2, kept_share=share).kept_patches == 1
    shape = floors.Shape(1, 11, 4, prefix=2, kept_share=share)
    assert 4 <= shape.kept_patches <= 9
    assert shape.slots == shape.kept_patches + 2


def test_a_gpu_is_known_by_its_name_and_size() -> None:
    assert floors.peak_of("NVIDIA H200", 132) is floors.PEAKS[0]
    assert floors.peak_of("NVIDIA H200 NVL", 132) is None
    assert floors.peak_of("Orin", 8) is None


def test_the_command_prints_every_shape_and_source() -> None:
    command = [sys.executable, str(BENCHMARKS / "plugin_floors.py"), "--kept-share", "0.5"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "50% of the patches" in printed
    for batch, tokens, dim in itertools.product((1, 8, 64), (197, 577, 1370), (384, 768, 1024)):
        assert f"| {batch} | {tokens} | {dim} |" in printed
    for peak in floors.PEAKS:
        assert peak.source in printed
    wrong = subprocess.run([*command[:-1], "1.5"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "give one in (0, 1]" in wrong.stderr
