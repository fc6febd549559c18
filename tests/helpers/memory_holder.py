"""A "model" of a known size, for the probe of memory, which opens it in a process of its own."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class MemoryHolder:
    """Holds so many bytes when it is open, and so many more while it runs."""

    holds: int
    takes: int = 0
    fails: str = ""

    @property
    def key(self) -> str:
        return f"{self.holds} {self.takes}"

    def open(self) -> Any:
        if self.fails:
            raise RuntimeError(self.fails)
        return _Open(self)


class _Open:
    def __init__(self, spec: MemoryHolder) -> None:
        self.spec, self.held = spec, np.ones(spec.holds, np.uint8)

    def prepare(self, images: np.ndarray, threshold: float | None) -> np.ndarray:
        return images

    def run(self, prepared: np.ndarray) -> None:
        assert np.ones(self.spec.takes, np.uint8).sum() >= 0
