"""How far from PyTorch's float32 a precision may be, and why that far. docs/precision.md tells."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from simprune_deploy.predict.records import Array

UNIT_ROUNDOFF = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}

OUTPUT_ATOL, OUTPUT_RTOL = 1e-4, 1e-5
"""In float32 outputs may differ by 1e-4 plus 1e-5 of the largest reference output."""

INPUT_NOISE = 8
"""In float32 two runtimes' similarities may differ by 8 times the noise of a similarity, because
their tokens do."""

BLOCK_ERROR = 4
"""In 16 bits outputs may be off by 4 u sqrt(depth) of their size in the root of the mean square:
each block rounds its tokens a few times, and roundings add up like a random walk."""

LARGEST_ERROR = 8
"""A single output may be off by 8 times as much."""

SIMILARITY_ERROR = 8
"""In 16 bits a similarity may be off by 8 u sqrt(depth), because the tokens are."""

TURNED_COSINE = 0.9
"""In 16 bits an image with another decision keeps this cosine to the reference's output: a decision
can matter (0.977 was seen), so this only tells a broken model from a working one."""

TURNED_DIFFERENCE = 0.45
"""A single output has no direction: in place of the cosine its difference is held to this share of
the outputs' root mean square, by which two vectors of one length are apart at that cosine."""


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """The limits of a precision for a model of some depth.

    Attributes:
        precision: "fp32", "fp16" or "bf16".
        depth: Blocks.
    """

    precision: str = "fp32"
    depth: int = 1

    @property
    def is_float32(self) -> bool:
        return self.precision == "fp32"

    @property
    def unit(self) -> float:
        """The unit roundoff u times the root of the depth."""
        return UNIT_ROUNDOFF[self.precision] * math.sqrt(self.depth)

    def rms(self, reference: Array) -> float:
        """Return the limit of the root mean square of output differences (inf in float32)."""
        if self.is_float32:
            return math.inf
        return BLOCK_ERROR * self.unit * root_mean_square(reference)

    def largest(self, reference: Array) -> float:
        """Return the limit of a single output difference."""
        if self.is_float32:
            return OUTPUT_ATOL + OUTPUT_RTOL * float(np.abs(reference).max())
        return LARGEST_ERROR * self.rms(reference)

    def similarity(self, noise: float) -> float:
        """Return how far similarities may differ because tokens do; `noise` is float32's own."""
        return INPUT_NOISE * noise if self.is_float32 else SIMILARITY_ERROR * self.unit


def root_mean_square(values: Array) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))) if values.size else 0.0


def cosines(left: Array, right: Array) -> Array:
    """Return the cosine of every row of one array to the same row of the other.

    Of rows of one number it is 1 or -1, whatever they are: ask for their difference instead.
    """
    a, b = (np.asarray(each, np.float64).reshape(len(each), -1) for each in (left, right))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray((a * b).sum(1) / np.maximum(norms, 1e-300))
