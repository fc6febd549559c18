"""The kernels on directed cases: on a GPU, and the same checks on the CPU with the host library.

Every test here takes a `backend`: "host" runs the kernels' sources compiled for the CPU, "cuda"
(marked gpu) the library that SIMPRUNE_LIBRARY names. Inputs are made and results judged on the
CPU, so that on the GPU nothing but the kernels and copies runs: what compute-sanitizer then finds
is the kernels'. `tests/gpu/run_on_gpu.py` runs all of it.

What is asked of a result

* structure (indices, slots, padding, the count of slots): exact;
* decisions: exact on exact data; elsewhere right within float noise, by the float64 judge;
* tokens and log-sizes: those of step 4 for the decisions made, in float64, within TOLERANCE;
* tokens that stand alone, and the prefix: bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from definition import PAD, Array, Case, capacities_of, exact_case, random_case, reduce_tokens
from enqueue_shim import Plugin, ShimError, build_shim

from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.parity.decisions import broken_structure, float_noise, violation
from simprune_deploy.predict.records import PruneRecord
from simprune_deploy.pruning.config import PruneConfig
from simprune_deploy.pruning.cuda_kernels import Kernels, Prepared
from simprune_deploy.pruning.kernel_library import read_info
from simprune_deploy.pruning.operator import similarity_prune

FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)
HALF_TYPES = FLOAT_TYPES[1:]
SELECTIONS = ("pairs", "redundancy")
REDUCTIONS = ("merge", "drop")
UNIT = 2.0**-24
"""Unit roundoff of float32."""

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Backend:
    """A library and where its tensors live."""

    library: Path
    kernels: Kernels
    device: torch.device

    def inputs(self, case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
        """Return the case's inputs where the library takes them."""
        return [tensor.to(self.device) for tensor in tensors(case, dtype)]

    def __call__(self, case: Case, dtype: torch.dtype = torch.float32) -> Outputs:
        """Return the operator's outputs for the case, on the CPU."""
        outputs = self.kernels.similarity_prune(*self.inputs(case, dtype), **case.attributes)
        assert all(output.device.type == self.device.type for output in outputs)
        assert all(output.is_contiguous() for output in outputs)
        assert [output.dtype for output in outputs] == [
            dtype,
            torch.float32,
            torch.int64,
            torch.int64,
        ]
        return tuple(output.cpu() for output in outputs)  # type: ignore[return-value]


def cuda_library() -> Path:
    """Return the library under test on the GPU, or skip with the reason."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU that torch can use")
    if not os.environ.get("SIMPRUNE_LIBRARY"):
        pytest.skip(
            "SIMPRUNE_LIBRARY names no library: tests/gpu/run_on_gpu.py builds one and sets it"
        )
    return Path(os.environ["SIMPRUNE_LIBRARY"])


@pytest.fixture(scope="module", params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "cuda":
        library = cuda_library()
        return Backend(library, Kernels(library), torch.device("cuda"))
    library = request.getfixturevalue("host_library")
    return Backend(library, Kernels(library), torch.device("cpu"))


@pytest.fixture(scope="module")
def gpu() -> Backend:
    library = cuda_library()
    return Backend(library, Kernels(library), torch.device("cuda"))


# --- cases and what is asked of their results -----------------------------------------------------


def tensors(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """Tokens, features, log-sizes and thresholds; one tensor twice where tokens are compared."""
    tokens = torch.from_numpy(case.tokens).to(dtype)
    features = tokens if case.features is None else torch.from_numpy(case.features).to(dtype)
    return [tokens, features, torch.from_numpy(case.log_size), torch.from_numpy(case.threshold)]


def fill(prepared: Prepared, inputs: list[torch.Tensor]) -> None:
    """Write other inputs into those of a prepared call."""
    mine = (prepared.tokens, prepared.features, prepared.log_size, prepared.threshold)
    for target, given in zip(mine, inputs, strict=True):
        target.copy_(given)


def one_image(tokens: Any, threshold: float, **attributes: Any) -> Case:
    """A case of one image, without prefix and with all sizes 1 unless attributes say otherwise."""
    array = np.asarray(tokens, np.float32)[None]
    values = {
        "log_size": np.zeros(array.shape[:2], np.float32),
        "threshold": np.float32([threshold]),
        "prefix": 0,
        **attributes,
    }
    return Case(tokens=array, **values)


def bits(tensor: torch.Tensor) -> Array:
    """The tensor's bytes, so that -0.0 differs from 0.0 and NaN equals itself."""
    return tensor.contiguous().view(torch.uint8).numpy()


def assert_same_bits(actual: Outputs, expected: Outputs) -> None:
    for mine, other in zip(actual, expected, strict=True):
        assert mine.shape == other.shape
        np.testing.assert_array_equal(bits(mine), bits(other))


def plain_threshold(limit: float) -> float:
    """A threshold that decides as `limit` does and that arithmetic takes; NaN prunes nothing."""
    return 3.0 if math.isnan(limit) else min(max(limit, -3.0), 3.0)


def assert_right(
    case: Case,
    outputs: Outputs,
    dtype: torch.dtype = torch.float32,
    exact: bool = False,
    bitwise: bool = True,
) -> None:
    """Ask everything that this module's text lists, `bitwise` the last of it."""
    inputs = [tensor.double().numpy() for tensor in tensors(case, dtype)]
    tokens, features, log_size, threshold = inputs
    kept_tokens, kept_log_size, kept_index, assignment = outputs
    batch, num_tokens, dim = tokens.shape
    index, slots = kept_index.numpy(), assignment.numpy()
    config = PruneConfig(selection=case.selection, reduction=case.reduction)  # type: ignore[arg-type]

    kept_counts = []
    for image in range(batch):
        limit = plain_threshold(threshold[image if len(threshold) > 1 else 0])
        record = PruneRecord(features[image], log_size[image], limit, index[image], slots[image])
        assert broken_structure(record, case.prefix, case.selection) is None
        found = violation(record, config, case.capacity, case.prefix)
        assert found <= (0.0 if exact else float_noise(features.shape[2])), (
            f"image {image}: violation {found}"
        )
        kept_counts.append(len(record.heads()) - case.prefix)
    wanted = case.prefix + (case.capacity or max(kept_counts))
    if not case.capacity:
        wanted = min(num_tokens, -(-wanted // case.multiple_of) * case.multiple_of)
    assert kept_tokens.shape == (batch, wanted, dim)
    assert kept_log_size.shape == kept_index.shape == (batch, wanted)
    assert assignment.shape == (batch, num_tokens)
    if exact:
        expected = case.expected()
        np.testing.assert_array_equal(index, expected.kept_index)
        np.testing.assert_array_equal(slots, expected.assignment)

    written = reduce_tokens(tokens, log_size, index, slots, case.reduction, case.prefix)
    members = np.stack([np.bincount(row[row >= 0], minlength=wanted) for row in slots])
    assert_close_tokens(kept_tokens, written.kept_tokens, members, tokens, dtype)
    # log(1 + sum of relative sizes): the sum's noise is relative, and so an absolute one of the log
    allowed = UNIT * (8 + members + 4 * np.abs(written.kept_log_size))
    assert (np.abs(kept_log_size.double().numpy() - written.kept_log_size) <= allowed).all()

    padding = np.arange(wanted) >= np.asarray(kept_counts)[:, None] + case.prefix
    assert not kept_tokens.float().numpy()[padding].any()
    assert (kept_log_size.numpy()[padding] == PAD).all()
    if bitwise:
        assert_untouched(case, outputs, dtype, members)


def assert_close_tokens(
    actual: torch.Tensor, expected: Array, members: Array, tokens: Array, dtype: torch.dtype
) -> None:
    """TOLERANCE: one unit in the last place of the type, and the noise of a float32 sum.

    Half a unit is the rounding of the result; noise may carry it across the boundary of two
    roundings. The sum of n members has noise of at most about n units of float32, of their size.
    """
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    largest = np.abs(tokens).max(initial=0, axis=(1, 2))[:, None, None]
    allowed = eps * np.abs(expected) + UNIT * (8 + members[:, :, None]) * largest + tiny
    error = np.abs(actual.double().numpy() - expected)
    assert (error <= allowed).all(), f"off by {(error / allowed).max():.1f} times the tolerance"


def assert_untouched(case: Case, outputs: Outputs, dtype: torch.dtype, members: Array) -> None:
    """A token that stands alone, a dropped slot's head and the prefix are bit for bit the input."""
    given, _, log_size, _ = tensors(case, dtype)
    kept_tokens, kept_log_size, kept_index, _ = outputs
    slots = np.arange(members.shape[1])
    for image in range(len(members)):
        alone = (slots < case.prefix) | (members[image] == 1)
        whole = alone | (members[image] > 0) if case.reduction == "drop" else alone
        heads = kept_index[image]
        np.testing.assert_array_equal(
            bits(kept_tokens[image])[whole], bits(given[image, heads])[whole]
        )
        np.testing.assert_array_equal(
            bits(kept_log_size[image])[alone.repeat(4)],
            bits(log_size[image, heads])[alone.repeat(4)],
        )


# --- small cases: these also run under compute-sanitizer ------------------------------------------

DIMENSIONS = (1, 2, 3, 7, 8, 9, 31, 33, 64, 65, 100, 127, 129, 200, 264, 513, 1032)
"""Around vector loads (8 of 16 bits), stages (64), passes of a merge (512); odd ones."""

PATCHES = (1, 2, 3, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 130, 255, 256, 257, 300)
"""Around warps, tiles (64 sources and 64 destinations), blocks that share destinations."""


def small_cases() -> Iterator[Any]:
    for selection in SELECTIONS:
        for reduction in REDUCTIONS:
            for capacity in (0, 1, 30, 40):
                case = exact_case(
                    capacity,
                    batch=3,
                    patches=40,
                    selection=selection,
                    reduction=reduction,
                    capacity=capacity,
                    feature_dim=24,
                )
                yield pytest.param(case, id=f"{selection}-{reduction}-{capacity}")
    for dim in DIMENSIONS:
        case = random_case(dim, patches=37, dim=dim, threshold=0.8)
        yield pytest.param(case, id=f"D{dim}")
        case = random_case(dim, patches=37, dim=16, feature_dim=dim, threshold=0.8)
        yield pytest.param(case, id=f"F{dim}")
    for patches in PATCHES:
        case = random_case(patches, patches=patches, dim=16, threshold=0.7, padding="tail")
        yield pytest.param(case, id=f"M{patches}")
        case = random_case(patches, patches=patches, dim=16, capacity=1, feature_dim=64)
        yield pytest.param(case, id=f"M{patches}-fixed")
    for prefix in (0, 5, 33):
        case = random_case(prefix, patches=40, prefix=prefix, multiple_of=8)
        yield pytest.param(case, id=f"P{prefix}")
    # enough tiles for the large ones, and several tiles of destinations to a block
    for feature_dim in (64, 136):
        case = random_case(1, batch=150, patches=300, dim=8, feature_dim=feature_dim)
        yield pytest.param(case, id=f"B150-F{feature_dim}")


SMALL_CASES = list(small_cases())


@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("case", SMALL_CASES)
def test_small_cases(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    assert_right(case, backend(case, dtype), dtype)


# --- exact data: ties, duplicates, thresholds that are met exactly --------------------------------


@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_exact_data_equals_the_definition_and_the_reference(
    backend: Backend, selection: str, dtype: torch.dtype
) -> None:
    for seed in range(8):
        for reduction in REDUCTIONS:
            case = exact_case(
                seed,
                selection=selection,
                reduction=reduction,
                capacity=seed % 3 * 6,
                patches=13 + seed % 2,
                padding=("none", "tail", "all", "mixed")[seed % 4],
                prefix=seed % 3,
                multiple_of=1 + seed % 4,
                per_image_threshold=seed % 2 == 1,
                feature_dim=(None, 32)[seed // 2 % 2],
            )
            outputs = backend(case, dtype)
            assert_right(case, outputs, dtype, exact=True)
            reference = similarity_prune(*tensors(case, dtype), **case.attributes)
            assert torch.equal(outputs[2], reference[2])
            assert torch.equal(outputs[3], reference[3])


@pytest.mark.parametrize("patches", [40, 41, 270])
def test_of_equal_patches_all_candidates_go_to_the_first_partner(
    backend: Backend, patches: int
) -> None:
    """More members than a warp has lanes, too."""
    tokens = np.tile(np.float32([1, -1, 1, 1]), (patches, 1))
    odd = patches // 2
    for capacity in (0, odd, odd + 1, patches - 1, patches):
        case = one_image(tokens, 1.0, capacity=capacity)
        _, kept_log_size, index, assignment = outputs = backend(case, torch.float16)
        assert_right(case, outputs, torch.float16, exact=True)
        gone = patches - (capacity or odd)
        went = list(range(0, 2 * gone, 2))
        assert [i for i in range(patches) if i not in index[0]] == went
        first = index[0].tolist().index(1)
        assert all(assignment[0, i] == first for i in [*went, 1])
        assert kept_log_size[0, first] == pytest.approx(math.log(1 + gone), abs=1e-6)


def test_of_equal_patches_redundancy_leaves_one(backend: Backend) -> None:
    for patches in (40, 270):
        tokens = np.tile(np.float32([1, -1, 1, 1]), (patches, 1))
        for capacity in (0, 1, 9):
            case = one_image(tokens, 1.0, selection="redundancy", capacity=capacity)
            outputs = backend(case, torch.float16)
            assert_right(case, outputs, torch.float16, exact=True)
            assert outputs[2].shape == (1, capacity or 1)


@pytest.mark.parametrize("patches", [40, 270])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_patches_without_anything_in_common_all_stay(
    backend: Backend, reduction: str, patches: int
) -> None:
    case = one_image(np.eye(patches), 0.5, reduction=reduction)
    tokens, _, index, assignment = backend(case)
    assert torch.equal(tokens, torch.from_numpy(case.tokens))
    assert index[0].tolist() == assignment[0].tolist() == list(range(patches))


@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("patches", [33, 257])
def test_on_a_tie_the_lowest_number_wins(
    backend: Backend, patches: int, dtype: torch.dtype
) -> None:
    """The last candidate is as like to every partner, in every tile of them."""
    features = np.eye(patches, 256)
    features[-1] = 1.0  # of length 16
    case = one_image(features, 1 / 16)
    outputs = backend(case, dtype)
    assert_right(case, outputs, dtype, exact=True)
    assert outputs[2][0].tolist() == list(range(patches - 1))
    assert outputs[3][0, -1] == 1


@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("patches", [50, 301])
def test_with_equal_similarities_the_lower_candidates_go(
    backend: Backend, patches: int, dtype: torch.dtype
) -> None:
    """Three levels of similarity; each capacity cuts one of them or ends with it."""
    features = np.tile(np.float32([1, 1, 1, 1]), (patches, 1))
    level = np.arange(0, patches, 2) % 3
    features[0::2] = np.float32([[1, 1, 1, 1], [1, 1, 1, -1], [1, 1, -1, -1]])[level]
    order = [2 * i for want in range(3) for i in np.flatnonzero(level == want)]
    for capacity in range(patches // 2, patches + 1, 1 if patches < 100 else 17):
        case = one_image(features, math.nan, capacity=capacity)
        outputs = backend(case, dtype)
        gone = set(range(patches)) - set(outputs[2][0].tolist())
        assert gone == set(order[: patches - capacity])


@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
def test_zero_vectors_are_like_nothing(backend: Backend, dtype: torch.dtype) -> None:
    tokens = np.zeros((6, 8), np.float32)
    tokens[1] = tokens[4] = 1.0
    for threshold, kept in ((0.5, [0, 1, 2, 3, 5]), (0.0, [1, 3, 5]), (-0.0, [1, 3, 5])):
        case = one_image(tokens, threshold)
        outputs = backend(case, dtype)
        assert outputs[2][0].tolist() == kept
        assert_right(case, outputs, dtype, exact=True)


@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
def test_minus_zero_is_zero(backend: Backend, dtype: torch.dtype) -> None:
    """Opposite signs on either side of a dot product that is 0: a tie, and at threshold 0 met."""
    features = np.float32([[1, 0, 0], [0, -1, 0], [-1, 0, 0], [0, 1, 0], [-1, -0.0, 0], [0, 0, 0]])
    case = one_image(features, 0.0)
    outputs = backend(case, dtype)
    assert outputs[2][0].tolist() == [1, 3, 5]
    assert outputs[3][0].tolist() == [0, 0, 0, 1, 0, 2]
    fixed = dataclasses.replace(case, capacity=4)
    assert backend(fixed, dtype)[2][0].tolist() == [1, 3, 4, 5]
    tokens = dataclasses.replace(case, tokens=-0.0 * case.tokens, features=case.tokens)
    kept = backend(dataclasses.replace(tokens, threshold=np.float32([2])), dtype)[0]
    assert torch.equal(torch.signbit(kept), torch.signbit(tensors(tokens, dtype)[0]))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_smallest_images(backend: Backend, selection: str) -> None:
    """One patch, or two, or nothing but padding behind a prefix."""
    for patches in (1, 2):
        least, most = capacities_of(patches, selection)
        for prefix in (0, 1):
            for valid in range(1 - prefix, patches + 1):
                for capacity in (0, *range(least, most + 1)):
                    case = one_image(
                        np.ones((prefix + patches, 4)),
                        0.5,
                        prefix=prefix,
                        selection=selection,
                        capacity=capacity,
                    )
                    case.log_size[0, prefix + valid :] = PAD
                    outputs = backend(case)
                    assert_right(case, outputs, exact=True)


# --- thresholds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("patches", [20, 300])
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("threshold", [math.nan, math.inf, 1.5])
def test_thresholds_that_nothing_reaches_prune_nothing(
    backend: Backend, selection: str, threshold: float, patches: int
) -> None:
    case = random_case(
        3, patches=patches, selection=selection, threshold=threshold, padding="none", dim=8
    )
    tokens, log_size, index, assignment = backend(case, torch.bfloat16)
    given, _, given_log_size, _ = tensors(case, torch.bfloat16)
    np.testing.assert_array_equal(bits(tokens), bits(given))
    np.testing.assert_array_equal(bits(log_size), bits(given_log_size))
    everything = torch.arange(case.tokens.shape[1]).expand(2, -1)
    assert torch.equal(index, everything)
    assert torch.equal(assignment, everything)


@pytest.mark.parametrize("patches", [20, 301])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_minus_infinity_leaves_what_must_stay(
    backend: Backend, selection: str, patches: int
) -> None:
    case = random_case(
        3, patches=patches, selection=selection, threshold=-math.inf, padding="none", dim=8
    )
    outputs = backend(case)
    assert outputs[2].shape == (2, 1 + (patches // 2 if selection == "pairs" else 1))
    assert_right(case, outputs)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_every_image_has_its_own_threshold(backend: Backend, selection: str) -> None:
    limits = np.float32([math.nan, -math.inf, 0.3, 0.9, math.inf, 1.0, 0.0])
    case = random_case(8, batch=7, patches=50, selection=selection, dim=32, padding="none")
    case = dataclasses.replace(case, threshold=limits)
    outputs = backend(case, torch.float16)
    kept = (outputs[1] > PAD / 2).sum(1) - 1
    assert kept[0] == kept[4] == 50
    assert kept[1] == (25 if selection == "pairs" else 1)
    assert_right(case, outputs, torch.float16)
    for image in range(7):
        assert_same_image(outputs, image, backend(case.image(image), torch.float16))


# --- sizes and shapes -----------------------------------------------------------------------------

LARGE = [
    # patches, D, F, batch, dtype, selection, capacity
    (196, 384, 64, 2, torch.float16, "pairs", 0),
    (196, 768, 768, 2, torch.bfloat16, "pairs", 137),
    (576, 384, 384, 1, torch.float16, "redundancy", 0),
    (576, 130, 30, 2, torch.float32, "pairs", 300),
    (1369, 96, 64, 1, torch.float16, "pairs", 958),
    (1369, 40, 40, 1, torch.float32, "redundancy", 900),
    (2900, 8, 128, 2, torch.float16, "pairs", 0),
    (4095, 24, 24, 1, torch.bfloat16, "pairs", 0),
    (4096, 32, 32, 1, torch.float16, "pairs", 2048),
    (4096, 17, 17, 1, torch.float32, "redundancy", 4000),
]


@pytest.mark.parametrize(
    ("patches", "dim", "feature_dim", "batch", "dtype", "selection", "capacity"), LARGE
)
def test_sizes_of_real_models_and_the_largest(
    backend: Backend,
    patches: int,
    dim: int,
    feature_dim: int,
    batch: int,
    dtype: torch.dtype,
    selection: str,
    capacity: int,
) -> None:
    threshold = 0.6 if selection == "pairs" else 0.01
    case = random_case(
        patches,
        batch,
        patches,
        selection=selection,
        capacity=capacity,
        threshold=threshold,
        dim=dim,
        feature_dim=None if feature_dim == dim else feature_dim,
    )
    limits = np.linspace(threshold, threshold + 0.1, batch, dtype=np.float32)
    case = dataclasses.replace(case, threshold=limits)
    outputs = backend(case, dtype)
    assert_right(case, outputs, dtype)
    if batch > 1:
        assert_same_image(outputs, batch - 1, backend(case.image(batch - 1), dtype))


def test_a_batch_of_64_with_padding_of_every_kind(backend: Backend) -> None:
    for seed, capacity in ((1, 0), (2, 20)):
        case = random_case(seed, batch=64, patches=48, prefix=2, capacity=capacity, dim=16)
        assert_right(case, backend(case, torch.float16), torch.float16)


def test_a_batch_that_is_all_padding(backend: Backend) -> None:
    for prefix, multiple in ((1, 1), (1, 4), (0, 1), (0, 4)):
        case = random_case(1, batch=2, patches=9, prefix=prefix, multiple_of=multiple)
        case = dataclasses.replace(
            case, log_size=np.where(np.arange(prefix + 9) < prefix, 0, PAD).astype(np.float32)
        )
        case = dataclasses.replace(case, log_size=np.tile(case.log_size, (2, 1)))
        tokens, log_size, index, assignment = backend(case)
        slots = -(-prefix // multiple) * multiple
        assert tokens.shape == (2, slots, 24)
        assert not tokens[:, prefix:].any()
        assert (log_size[:, prefix:] == PAD).all()
        assert not index[:, prefix:].any()
        assert (assignment[:, prefix:] == -1).all()
        np.testing.assert_array_equal(tokens[:, :prefix], case.tokens[:, :prefix])


@pytest.mark.parametrize("multiple_of", [1, 2, 16, 64, 1000, 2**31 - 1])
def test_the_count_of_slots_is_rounded_up(backend: Backend, multiple_of: int) -> None:
    case = random_case(4, patches=70, multiple_of=multiple_of, threshold=0.6)
    assert_right(case, backend(case), torch.float32)


@pytest.mark.parametrize("patches", [60, 61, 280])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_capacities_are_kept_exactly(backend: Backend, selection: str, patches: int) -> None:
    """Whatever the threshold; with padding, as many as are there."""
    least, most = capacities_of(patches, selection)
    for padding in ("none", "tail"):
        free = random_case(6, 2, patches, 1, selection, threshold=math.nan, padding=padding)
        valid = (free.log_size[:, 1:] > PAD / 2).sum(1)
        for capacity in (least, least + 1, (least + most) // 2, most - 1, most):
            case = dataclasses.replace(free, capacity=capacity)
            outputs = backend(case)
            assert_right(case, outputs)
            kept = (outputs[1][:, 1:] > PAD / 2).sum(1).numpy()
            np.testing.assert_array_equal(kept, np.minimum(valid, capacity))


@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("scale", [2.0**-18, 2.0**12])
def test_the_length_of_a_patch_does_not_matter(
    backend: Backend, dtype: torch.dtype, scale: float
) -> None:
    """2^-18 leaves float16 with subnormal numbers, 2^12 with dot products past its largest."""
    for seed in range(4):
        case = exact_case(seed, patches=20, threshold=0.5)
        scaled = dataclasses.replace(case, tokens=case.tokens * np.float32(scale))
        mine, plain = backend(scaled, dtype), backend(case, dtype)
        assert_right(scaled, mine, dtype, exact=True)
        assert torch.equal(mine[3], plain[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_patches_whose_squares_leave_float32_decide_as_the_reference(
    backend: Backend, dtype: torch.dtype
) -> None:
    case = exact_case(5, patches=20, threshold=0.5, padding="none")
    for scale in (2.0**-80, 2.0**100):
        tokens = case.tokens.copy()
        tokens[:, ::3] *= np.float32(scale)
        odd = dataclasses.replace(case, tokens=tokens)
        outputs = backend(odd, dtype)
        reference = similarity_prune(*tensors(odd, dtype), **odd.attributes)
        assert torch.equal(outputs[3], reference[3])


# --- what the definition promises -----------------------------------------------------------------


def assert_same_image(outputs: Outputs, image: int, alone: Outputs) -> None:
    """The image's own slots have the same bits in the batch and alone."""
    slots = int((outputs[1][image] > PAD / 2).sum())
    assert slots == int((alone[1][0] > PAD / 2).sum())
    for together, single in zip(outputs[:3], alone[:3], strict=True):
        np.testing.assert_array_equal(bits(together[image, :slots]), bits(single[0, :slots]))
    assert torch.equal(outputs[3][image], alone[3][0])


@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
@pytest.mark.parametrize(
    ("selection", "capacity"), [("pairs", 0), ("redundancy", 0), ("pairs", 50)]
)
def test_an_image_does_not_depend_on_its_batch(
    backend: Backend, selection: str, capacity: int, dtype: torch.dtype
) -> None:
    for patches in (70, 290):
        case = random_case(
            patches,
            5,
            patches,
            selection=selection,
            capacity=capacity * patches // 70,
            padding="tail",
            feature_dim=64,
        )
        outputs = backend(case, dtype)
        for image in range(5):
            assert_same_image(outputs, image, backend(case.image(image), dtype))


@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
def test_every_run_gives_the_same_bits(backend: Backend, dtype: torch.dtype) -> None:
    for patches, selection in ((120, "pairs"), (300, "redundancy"), (300, "pairs")):
        case = random_case(patches, 3, patches, selection=selection, dim=72, spread=0.3)
        first = backend(case, dtype)
        for _ in range(5):
            assert_same_bits(backend(case, dtype), first)


@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("patches", [90, 280])
def test_pruned_patches_are_alike_kept_ones_and_sums_stay(
    backend: Backend, patches: int, dtype: torch.dtype
) -> None:
    case = random_case(patches, 3, patches, threshold=0.7, dim=48, spread=0.4, padding="tail")
    tokens = tensors(case, dtype)[0].double()
    log_size = torch.from_numpy(case.log_size)
    kept, kept_log_size, index, assignment = backend(case, dtype)
    pruned = 0
    for image in range(3):
        valid = log_size[image] > PAD / 2
        filled = kept_log_size[image] > PAD / 2
        unit = tokens[image] / tokens[image].norm(dim=1, keepdim=True).clamp_min(1e-12)
        heads = index[image][assignment[image].clamp_min(0)]
        gone = valid & (heads != torch.arange(1 + patches))
        alike = (unit * unit[heads]).sum(1)
        assert (alike[gone] >= 0.7 - float_noise(48)).all()
        pruned += int(gone.sum())
        assert gone.sum() <= (valid.sum() + 1) // 2

        size, kept_size = (
            x.double().exp()[:, None] for x in (log_size[image], kept_log_size[image])
        )
        before = (size * tokens[image])[valid].sum(0)
        parts = (kept_size * kept[image].double())[filled]
        room = torch.finfo(dtype).eps * parts.abs().sum(0) + 1e-5 * size[valid].sum()
        assert ((parts.sum(0) - before).abs() <= room).all()
        assert kept_size[filled].sum().item() == pytest.approx(size[valid].sum().item(), rel=1e-5)
    assert pruned > 10


@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
def test_layer_after_layer(backend: Backend, dtype: torch.dtype) -> None:
    """Padding and sizes that one layer leaves are what the next one takes."""
    case = random_case(12, 4, 280, dim=40, padding="none", spread=0.5)
    sizes_before = np.exp(case.log_size[:, 1:]).sum(1)
    seen = []
    for threshold, share in ((0.95, 0), (0.8, 0.7), (0.6, 0), (0.5, 0.55)):
        room = case.tokens.shape[1] - 1
        case = dataclasses.replace(
            case,
            threshold=np.float32([threshold]),
            capacity=round(share * room),
            multiple_of=1 if share else 8,
        )
        outputs = backend(case, dtype)
        assert_right(case, outputs, dtype)
        case = dataclasses.replace(
            case, tokens=outputs[0].float().numpy(), log_size=outputs[1].numpy()
        )
        seen.append(case.tokens.shape[1])
    assert seen[0] > seen[1] > seen[3]
    sizes = np.where(case.log_size[:, 1:] > PAD / 2, np.exp(case.log_size[:, 1:]), 0).sum(1)
    np.testing.assert_allclose(sizes, sizes_before, rtol=1e-5)


# --- memory, threads, refusals --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("dim", [24, 64])
@pytest.mark.parametrize("offset", [1, 3, 8])
def test_tensors_that_begin_anywhere(
    backend: Backend, offset: int, dim: int, dtype: torch.dtype
) -> None:
    case = random_case(2, 2, 45, dim=dim, feature_dim=64, threshold=0.6)
    moved = []
    for tensor in tensors(case, dtype):
        roomy = torch.zeros(tensor.numel() + offset, dtype=tensor.dtype)
        roomy[offset:] = tensor.flatten()
        moved.append(roomy.to(backend.device)[offset:].view(tensor.shape))
    outputs = backend.kernels.similarity_prune(*moved, **case.attributes)
    plain = backend(case, dtype)
    assert_same_bits(tuple(output.cpu() for output in outputs), plain)  # type: ignore[arg-type]


def test_strided_tensors(backend: Backend) -> None:
    case = random_case(2, 2, 45, dim=24, threshold=0.6)
    tokens, _, log_size, threshold = backend.inputs(case, torch.float16)
    turned = tokens.transpose(1, 2).contiguous().transpose(1, 2)
    every_other = torch.stack([log_size, log_size], 2)[:, :, 0]
    assert not turned.is_contiguous()
    assert not every_other.is_contiguous()
    before = [turned.clone(), every_other.clone()]
    # the second threshold is one element that both images read
    for limit, same in ((threshold, threshold), (threshold[:1].expand(2), threshold[:1])):
        outputs = backend.kernels.similarity_prune(
            turned, turned, every_other, limit, **case.attributes
        )
        alike = dataclasses.replace(case, threshold=same.cpu().numpy())
        assert_same_bits(
            tuple(output.cpu() for output in outputs),  # type: ignore[arg-type]
            backend(alike, torch.float16),
        )
    assert torch.equal(before[0], turned)
    assert torch.equal(before[1], every_other)


def test_a_prepared_call_reads_what_its_inputs_hold_at_launch(backend: Backend) -> None:
    first, second = (
        random_case(seed, 2, 80, dim=32, feature_dim=16, threshold=limit, per_image_threshold=False)
        for seed, limit in ((1, 0.5), (2, 0.8))
    )
    inputs = backend.inputs(first, torch.float16)
    prepared = backend.kernels.prepare(*inputs, **first.attributes)
    with pytest.raises(SimpruneError, match=r"call launch\(\) before outputs\(\)"):
        prepared.outputs()
    for case in (first, second, first):
        fill(prepared, tensors(case, torch.float16))
        prepared.launch()
        outputs = tuple(output.cpu() for output in prepared.outputs())
        assert_same_bits(outputs, backend(case, torch.float16))  # type: ignore[arg-type]


def test_threads_do_not_disturb_one_another(backend: Backend) -> None:
    cases = [random_case(seed, 2, 60 + 70 * seed, dim=32) for seed in range(4)]
    expected = [backend(case) for case in cases]
    failures: list[BaseException] = []

    def repeat(case: Case, right: Outputs) -> None:
        try:
            for _ in range(5):
                if backend.device.type == "cuda":
                    with torch.cuda.stream(torch.cuda.Stream()):
                        assert_same_bits(backend(case), right)
                else:
                    assert_same_bits(backend(case), right)
        except BaseException as error:
            failures.append(error)

    threads = [
        threading.Thread(target=repeat, args=pair) for pair in zip(cases, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


@pytest.mark.parametrize(
    ("shape", "attributes", "message"),
    [
        ((1, 5, 3), {"num_prefix_tokens": 5}, "num_prefix_tokens 5 leaves no patches among 5"),
        ((1, 5, 3), {"num_prefix_tokens": -1}, "num_prefix_tokens -1"),
        ((0, 5, 3), {}, "batch 0"),
        ((1, 5, 0), {}, "tokens have 0 dimensions"),
        ((1, 5, 3), {"feature_dim": 0}, "features have 0 dimensions"),
        ((1, 4098, 1), {}, "4097 patches are more than the 4096"),
        ((1, 5, 3), {"capacity": 5}, r"capacity 5 is outside \[0, 4\]"),
        ((1, 5, 3), {"capacity": -1}, "capacity -1"),
        (
            (1, 6, 3),
            {"capacity": 1},
            "capacity 1 is below the 2 of 5 patches that a layer of pairs",
        ),
        ((1, 5, 3), {"multiple_of": 0}, "multiple_of 0"),
        ((1, 5, 3), {"selection": "random"}, "selection 'random'"),
        ((1, 5, 3), {"reduction": "sum"}, "reduction 'sum'"),
    ],
)
def test_what_the_kernels_do_not_cover_is_refused_with_the_values(
    backend: Backend, shape: tuple[int, int, int], attributes: dict[str, Any], message: str
) -> None:
    values = {"num_prefix_tokens": 1, **attributes}
    tokens = torch.ones(shape, device=backend.device)
    features = torch.ones(*shape[:2], values.pop("feature_dim", 3), device=backend.device)
    log_size = torch.zeros(shape[:2], device=backend.device)
    threshold = torch.tensor([0.5], device=backend.device)
    with pytest.raises(SimpruneError, match=message) as caught:
        backend.kernels.similarity_prune(tokens, features, log_size, threshold, **values)
    assert "\n" not in str(caught.value)
    # and the next call is none the worse for it
    right = one_image(np.eye(4), 0.5)
    assert backend(right)[2].shape == (1, 4)


# --- the plugin, called as TensorRT calls it ------------------------------------------------------

ALIGNMENT = 256
"""Of every buffer that TensorRT hands to a plugin."""

GUARD = 4096
"""Bytes before and behind every buffer that nothing may write to."""


class Guarded:
    """A buffer of garbage with guards around it, to be looked at afterwards."""

    def __init__(self, size: int, device: torch.device, garbage: int) -> None:
        room = torch.empty(ALIGNMENT + GUARD + size + GUARD, dtype=torch.uint8, device=device)
        start = -room.data_ptr() % ALIGNMENT
        self.memory = room[start : start + GUARD + size + GUARD]
        self.memory.copy_(torch.full(self.memory.shape, garbage, dtype=torch.uint8))
        self.size, self.garbage = size, garbage

    @property
    def bytes(self) -> torch.Tensor:
        return self.memory[GUARD : GUARD + self.size]

    def view(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """The front of the buffer, on the CPU."""
        size = math.prod(shape) * dtype.itemsize
        return self.bytes[:size].cpu().clone().view(dtype).view(shape)

    def assert_only_front_written(self, used: int) -> None:
        memory = self.memory.cpu()
        assert (memory[:GUARD] == self.garbage).all(), "written before the buffer"
        assert (memory[GUARD + used :] == self.garbage).all(), "written behind what is used"


@pytest.fixture(scope="module")
def plugin(backend: Backend) -> Path:
    """The library, where it has the plugin in it."""
    info = read_info(backend.library)
    if info.tensorrt_headers is None:
        assert backend.device.type == "cuda", "the host library of the tests has the plugin"
        pytest.skip(f"{backend.library.name} was built without TensorRT's headers: no plugin in it")
    return backend.library


@pytest.fixture(scope="module")
def tensorrt_shim(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shim that SIMPRUNE_ENQUEUE_SHIM names, or one compiled now."""
    if os.environ.get("SIMPRUNE_ENQUEUE_SHIM"):
        return Path(os.environ["SIMPRUNE_ENQUEUE_SHIM"])
    headers = request.getfixturevalue("tensorrt_headers")
    return build_shim(tmp_path_factory.mktemp("shim") / "libenqueue_shim.so", headers)


def enqueue_as_tensorrt(
    backend: Backend,
    shim: Path,
    case: Case,
    dtype: torch.dtype,
    garbage: int = 0xA5,
    inputs: list[torch.Tensor] | None = None,
) -> Outputs:
    """Run the case through the plugin, with every buffer as large as TensorRT makes it."""
    if inputs is None:
        inputs = backend.inputs(case, dtype)
    batch, num_tokens, dim = case.tokens.shape
    most = case.prefix + case.capacity if case.capacity else num_tokens
    sizes = [
        batch * most * dim * dtype.itemsize,
        batch * most * 4,
        batch * most * 8,
        batch * num_tokens * 8,
        *([] if case.capacity else [4]),
    ]
    with Plugin(shim, backend.library, **case.attributes, max_tokens=num_tokens) as layer:
        outputs = [Guarded(size, backend.device, garbage) for size in sizes]
        needed = layer.workspace_bytes(inputs[0], inputs[1], inputs[3])
        assert needed > 0
        workspace = Guarded(needed, backend.device, garbage)
        stream = torch.cuda.current_stream().cuda_stream if backend.device.type == "cuda" else 0
        layer.enqueue(inputs, [output.bytes for output in outputs], workspace.bytes, stream)
        slots = most if case.capacity else int(outputs[4].view(torch.int32, 1))
        workspace.assert_only_front_written(needed)
    used = [batch * slots * dim * dtype.itemsize, batch * slots * 4, batch * slots * 8, *sizes[3:]]
    for output, size in zip(outputs, used, strict=True):
        output.assert_only_front_written(size)
    return (
        outputs[0].view(dtype, batch, slots, dim),
        outputs[1].view(torch.float32, batch, slots),
        outputs[2].view(torch.int64, batch, slots),
        outputs[3].view(torch.int64, batch, num_tokens),
    )


@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("patches", [50, 270])
@pytest.mark.parametrize(
    ("selection", "reduction", "capacity"),
    [
        ("pairs", "merge", 0),
        ("pairs", "drop", 40),
        ("redundancy", "merge", 30),
        ("redundancy", "drop", 0),
    ],
)
def test_enqueue_gives_what_the_c_interface_gives(
    backend: Backend,
    plugin: Path,
    tensorrt_shim: Path,
    selection: str,
    reduction: str,
    capacity: int,
    patches: int,
    dtype: torch.dtype,
) -> None:
    """Whatever lies in the workspace and the outputs beforehand."""
    capacity *= patches // 50
    case = random_case(7, 3, patches, 1, selection, reduction, capacity, dim=40, feature_dim=64)
    expected = backend(case, dtype)
    assert_right(case, expected, dtype)
    for garbage in (0x00, 0x7F, 0xFF):
        outputs = enqueue_as_tensorrt(backend, tensorrt_shim, case, dtype, garbage)
        assert_same_bits(outputs, expected)


def test_enqueue_of_chained_layers(backend: Backend, plugin: Path, tensorrt_shim: Path) -> None:
    """The second layer takes as many tokens as the first one's size tensor says."""
    first = random_case(3, 2, 120, dim=24, threshold=0.8, multiple_of=8)
    tokens, log_size, index, _ = enqueue_as_tensorrt(backend, tensorrt_shim, first, torch.float16)
    assert index.shape[1] < 121
    second = dataclasses.replace(
        first,
        tokens=tokens.float().numpy(),
        log_size=log_size.numpy(),
        threshold=np.float32([0.5]),
    )
    outputs = enqueue_as_tensorrt(backend, tensorrt_shim, second, torch.float16)
    assert_right(second, outputs, torch.float16)


def test_a_workspace_for_larger_shapes_serves_smaller_ones(
    backend: Backend, plugin: Path, tensorrt_shim: Path
) -> None:
    """TensorRT asks once, for the largest shapes of the profile."""
    shapes = [(4, 300, 64), (1, 300, 64), (4, 40, 64), (3, 257, 8), (1, 2, 1)]
    with Plugin(tensorrt_shim, plugin, num_prefix_tokens=1, max_tokens=301) as layer:
        one = torch.zeros(1)
        whole = torch.zeros(4, 301, 64, dtype=torch.float16)
        largest = layer.workspace_bytes(whole, whole, one)
        for batch, patches, dim in shapes:
            tokens = torch.zeros(batch, 1 + patches, dim, dtype=torch.float16)
            assert layer.workspace_bytes(tokens, tokens, one) <= largest
            case = random_case(5, batch, patches, dim=dim, per_image_threshold=False)
            inputs = backend.inputs(case, torch.float16)
            sizes = (tokens.numel() * 2, *(tokens[:, :, 0].numel() * n for n in (4, 8, 8)), 4)
            buffers = [
                torch.empty(size, dtype=torch.uint8, device=backend.device) for size in sizes
            ]
            workspace = Guarded(largest, backend.device, 0xA5)
            stream = torch.cuda.current_stream().cuda_stream if backend.device.type == "cuda" else 0
            layer.enqueue(inputs, buffers, workspace.bytes, stream)
            slots = int(buffers[4].cpu().view(torch.int32))
            expected = backend(case, torch.float16)
            assert expected[2].shape == (batch, slots)
            kept = buffers[2].cpu()[: batch * slots * 8].view(torch.int64).view(batch, slots)
            assert torch.equal(kept, expected[2])
            workspace.assert_only_front_written(largest)


def test_the_plugin_refuses_what_it_cannot_do(
    backend: Backend, plugin: Path, tensorrt_shim: Path
) -> None:
    with pytest.raises(ShimError):
        Plugin(tensorrt_shim, plugin, selection="random")
    with pytest.raises(ShimError):
        Plugin(tensorrt_shim, plugin, multiple_of=0)
    with Plugin(tensorrt_shim, plugin, num_prefix_tokens=5, max_tokens=6) as layer:
        case = random_case(1, 1, 4, prefix=1)  # five tokens, all of them prefix to this layer
        inputs = backend.inputs(case, torch.float32)
        buffers = [torch.empty(4096, dtype=torch.uint8, device=backend.device) for _ in range(5)]
        with pytest.raises(ShimError):
            layer.enqueue(inputs, buffers, torch.empty(1 << 20, device=backend.device))


# --- what only a GPU can show ---------------------------------------------------------------------

SLEEP_CYCLES = 400_000_000
"""Of the GPU's clock: 0.2 s or so, far longer than the host needs to enqueue anything."""


@pytest.mark.gpu
@pytest.mark.parametrize("capacity", [0, 60])
@pytest.mark.parametrize("patches", [100, 300])
def test_launch_waits_for_nothing(gpu: Backend, patches: int, capacity: int) -> None:
    """While the stream is busy, launch() returns; torch's own check for waiting is on as well."""
    case = random_case(1, 2, patches, capacity=capacity * patches // 100, dim=64)
    inputs = gpu.inputs(case, torch.float16)
    prepared = gpu.kernels.prepare(*inputs, **case.attributes)
    prepared.launch()  # loading the kernels waits, the first time
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(SLEEP_CYCLES)
        prepared.launch()
        done = torch.cuda.Event()
        done.record()
        still_busy = not done.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert still_busy
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated
    torch.cuda.synchronize()
    outputs = tuple(output.cpu() for output in prepared.outputs())
    assert_right(case, outputs, torch.float16)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("capacity", [0, 60])
@pytest.mark.parametrize("patches", [100, 300])
def test_a_cuda_graph_replays_on_new_inputs(gpu: Backend, patches: int, capacity: int) -> None:
    capacity *= patches // 100
    cases = [random_case(seed, 2, patches, capacity=capacity, dim=64) for seed in range(3)]
    inputs = gpu.inputs(cases[0], torch.float16)
    prepared = gpu.kernels.prepare(*inputs, **cases[0].attributes)
    prepared.launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prepared.launch()
    for case in (*cases, cases[0]):
        fill(prepared, tensors(case, torch.float16))
        graph.replay()
        torch.cuda.synchronize()
        outputs = tuple(output.cpu() for output in prepared.outputs())
        assert_same_bits(outputs, gpu(case, torch.float16))  # type: ignore[arg-type]


@pytest.mark.gpu
def test_the_current_stream_is_used(gpu: Backend) -> None:
    """Its inputs arrive on that stream after a while: any other one would read too early."""
    case, stale = (random_case(seed, 2, 300, dim=64) for seed in (1, 2))
    fresh, inputs = gpu.inputs(case, torch.float16), gpu.inputs(stale, torch.float16)
    prepared = gpu.kernels.prepare(*inputs, **case.attributes)
    prepared.launch()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES // 10)
        fill(prepared, fresh)
        prepared.launch()
    stream.synchronize()
    outputs = tuple(output.cpu() for output in prepared.outputs())
    assert_same_bits(outputs, gpu(case, torch.float16))  # type: ignore[arg-type]


@pytest.mark.gpu
def test_tensors_on_a_gpu_that_is_not_the_current_one(gpu: Backend) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    case = random_case(1, 2, 100, dim=64)
    inputs = [tensor.to("cuda:1") for tensor in tensors(case, torch.float16)]
    with torch.cuda.device(0):
        outputs = gpu.kernels.similarity_prune(*inputs, **case.attributes)
        assert torch.cuda.current_device() == 0
    assert all(output.device == torch.device("cuda:1") for output in outputs)
    assert_same_bits(tuple(o.cpu() for o in outputs), gpu(case, torch.float16))  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_pytorch_operator_with_and_without_the_library(
    gpu: Backend, monkeypatch: pytest.MonkeyPatch, selection: str, dtype: torch.dtype
) -> None:
    """On exact data both decide as defined; with the library the bits are the kernels'."""
    for seed in range(6):
        for make, exact in ((exact_case, True), (random_case, False)):
            case = make(seed, 2, 30, selection=selection, capacity=seed % 2 * 19)
            inputs = gpu.inputs(case, dtype)
            monkeypatch.setenv("SIMPRUNE_LIBRARY", str(gpu.library))
            ours = tuple(o.cpu() for o in similarity_prune(*inputs, **case.attributes))
            monkeypatch.delenv("SIMPRUNE_LIBRARY")
            plain = tuple(o.cpu() for o in similarity_prune(*inputs, **case.attributes))
            assert_same_bits(ours, gpu(case, dtype))  # type: ignore[arg-type]
            assert_right(case, ours, dtype, exact)  # type: ignore[arg-type]
            # PyTorch's sums turn -0.0 into 0.0
            assert_right(case, plain, dtype, exact, bitwise=False)  # type: ignore[arg-type]


@pytest.mark.gpu
def test_the_pytorch_operator_says_what_is_wrong_with_the_library(
    gpu: Backend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    inputs = gpu.inputs(random_case(1), torch.float16)
    monkeypatch.setenv("SIMPRUNE_LIBRARY", str(tmp_path / "nothing.so"))
    with pytest.raises(SimpruneError, match=r"nothing\.so does not exist"):
        similarity_prune(*inputs, 1)
