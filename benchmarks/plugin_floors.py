"""The floor of the operator on paper: bytes that must move, FLOPs that must be done, on four GPUs.

    python benchmarks/plugin_floors.py [--dtype float16] [--kept-share 0.7] [--features 64]

Nothing here is measured. No implementation of the operator can take less than

    max(bytes / peak memory bandwidth, FLOPs / peak arithmetic)

when its data comes from memory. Bytes: tokens, features (unless the tokens are compared), log_size
and threshold are read once; the kept tokens (a stated share of the patches), their log_size and
index, the assignment and the number of slots are written once. FLOPs: "pairs" compares the patches
with even numbers with those with odd ones, a multiply-add counted as two: ``2 (M / 2)^2 F`` an
image. Norms and the merge (``2 N (F + D)``) are left out: they are small beside it. The time to
launch kernels is not in it either, though at batch 1 it is what counts: gpu_kernels.py measures it.
Data that still lies in the L2 cache can beat the bandwidth's part.

Peaks are of the vendor's data sheets, without sparsity. A chip reaches less: gpu_kernels.py also
measures a large copy and a large matrix product.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Sequence

BATCHES = (1, 8, 64)
TOKEN_COUNTS = (197, 577, 1370)
DIMS = (384, 768, 1024)
ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class Peak:
    """What a GPU can do at most.

    Attributes:
        name: As in the table's head.
        device: The name that the driver reports for it.
        multiprocessors: How many it has: one name can stand for several modules.
        bandwidth: Bytes a second to and from memory.
        half_flops: Dense float16 and bfloat16 matrix FLOPs a second, accumulated in float32.
        single_flops: float32 FLOPs a second outside the matrix units.
        source: Where the numbers stand.
    """

    name: str
    device: str
    multiprocessors: int
    bandwidth: float
    half_flops: float
    single_flops: float
    source: str

    def flops(self, dtype: str) -> float:
        """Return the arithmetic peak for tokens of that type, kept exact.

        float32 tokens count outside the matrix units, which round them to 10 bits.
        """
        return self.single_flops if dtype == "float32" else self.half_flops


PEAKS = (
    Peak(
        "H200",
        "NVIDIA H200",
        132,
        4.8e12,
        989.5e12,
        67e12,
        "NVIDIA H200 data sheet, SXM (1,979 TFLOPS float16 with sparsity, halved)",
    ),
    Peak(
        "H100",
        "NVIDIA H100 80GB HBM3",
        132,
        3.35e12,
        989.5e12,
        67e12,
        "NVIDIA H100 data sheet, SXM (1,979 TFLOPS float16 with sparsity, halved)",
    ),
    Peak(
        "AGX Orin",
        "Orin",
        16,
        204.8e9,
        42.5e12,
        5.3e12,
        "NVIDIA Jetson AGX Orin data sheet, 64 GB, MAXN (170 INT8 TOPS with sparsity on the GPU: "
        "half of it for float16, half again without sparsity; it names no accumulator)",
    ),
    Peak(
        "RTX 4090",
        "NVIDIA GeForce RTX 4090",
        128,
        1.008e12,
        165.2e12,
        82.6e12,
        "NVIDIA Ada GPU architecture white paper (float16 with float32 accumulation)",
    ),
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """One call of the operator.

    Attributes:
        batch: B, images.
        tokens: N, tokens of an image with the prefix.
        dim: D, channels.
        dtype: Type of the tokens. Default "float16".
        prefix: P, tokens that are never pruned. Default 1.
        kept_share: Share of the patches that stays. Default 0.7.
        features: F, the width of the features; None (the default) compares the tokens themselves.
    """

    batch: int
    tokens: int
    dim: int
    dtype: str = "float16"
    prefix: int = 1
    kept_share: float = 0.7
    features: int | None = None

    @property
    def width(self) -> int:
        """F, the channels that are compared."""
        return self.dim if self.features is None else self.features

    @property
    def patches(self) -> int:
        """M, the patches of an image."""
        return self.tokens - self.prefix

    @property
    def kept_patches(self) -> int:
        """The patches of an image that stay: with pairs at least half."""
        return max(1, self.patches // 2, round(self.kept_share * self.patches))

    @property
    def slots(self) -> int:
        """K, the tokens of an image afterwards."""
        return self.prefix + self.kept_patches


def bytes_read(shape: Shape) -> int:
    """Return the bytes of tokens, features, log_size and one threshold."""
    tokens = shape.batch * shape.tokens
    channels = shape.dim + (shape.features or 0)
    return tokens * (channels * ELEMENT_BYTES[shape.dtype] + 4) + 4


def bytes_written(shape: Shape) -> int:
    """Return the bytes of kept tokens, log_size, index, assignment and the number of slots."""
    slots = shape.batch * shape.slots
    kept = slots * (shape.dim * ELEMENT_BYTES[shape.dtype] + 4 + 8)
    return kept + shape.batch * shape.tokens * 8 + 4


def bytes_moved(shape: Shape) -> int:
    """Return the fewest bytes that the operator moves."""
    return bytes_read(shape) + bytes_written(shape)


def pair_flops(shape: Shape) -> int:
    """Return the FLOPs of the dot products of even and odd patches."""
    odd = shape.patches // 2
    return 2 * shape.batch * (shape.patches - odd) * odd * shape.width


def floor_seconds(shape: Shape, bandwidth: float, flops: float) -> float:
    """Return the least time of the operator at the given bytes and FLOPs a second."""
    return max(bytes_moved(shape) / bandwidth, pair_flops(shape) / flops)


def paper_floor(shape: Shape, peak: Peak) -> float:
    """Return the least time of the operator on that GPU, in seconds."""
    return floor_seconds(shape, peak.bandwidth, peak.flops(shape.dtype))


def bound_by(shape: Shape, peak: Peak) -> str:
    """Return which term of the floor is the larger: "bytes" or "FLOPs"."""
    moving = bytes_moved(shape) / peak.bandwidth
    return "bytes" if moving >= pair_flops(shape) / peak.flops(shape.dtype) else "FLOPs"


def peak_of(device: str, multiprocessors: int) -> Peak | None:
    """Return the peaks of the GPU that the driver calls so, or None if it is not in the table."""
    for peak in PEAKS:
        if (peak.device, peak.multiprocessors) == (device, multiprocessors):
            return peak
    return None


def table_shapes(dtype: str, kept_share: float, features: int | None = None) -> list[Shape]:
    """Return the shapes of the table, smallest batch first."""
    return [
        Shape(batch, tokens, dim, dtype, kept_share=kept_share, features=features)
        for batch in BATCHES
        for tokens in TOKEN_COUNTS
        for dim in DIMS
    ]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def floors_table(
    dtype: str = "float16", kept_share: float = 0.7, features: int | None = None
) -> str:
    """Return the floors as Markdown: microseconds, with the term that bounds them."""
    header = ["B", "N", "D", "MB moved", "GFLOP"]
    rows = []
    for shape in table_shapes(dtype, kept_share, features):
        row = [str(shape.batch), str(shape.tokens), str(shape.dim)]
        row += [f"{bytes_moved(shape) / 1e6:.2f}", f"{pair_flops(shape) / 1e9:.3f}"]
        for peak in PEAKS:
            row.append(f"{paper_floor(shape, peak) * 1e6:.2f} {bound_by(shape, peak)}")
        rows.append(row)
    return markdown_table([*header, *(f"{peak.name} µs" for peak in PEAKS)], rows)


def peaks_table() -> str:
    """Return the peaks and their sources as Markdown."""
    rows = [
        [
            peak.name,
            f"{peak.bandwidth / 1e9:,.0f}",
            f"{peak.half_flops / 1e12:,.1f}",
            f"{peak.single_flops / 1e12:,.1f}",
            peak.source,
        ]
        for peak in PEAKS
    ]
    return markdown_table(["GPU", "GB/s", "TFLOPS half", "TFLOPS float32", "source"], rows)


def share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not a share: give one in (0, 1]")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", choices=sorted(ELEMENT_BYTES), default="float16")
    parser.add_argument("--kept-share", type=share, default=0.7)
    parser.add_argument("--features", type=int, help="F of separate features; else the tokens")
    args = parser.parse_args()
    compared = f"features of {args.features} channels" if args.features else "tokens"
    print(
        f"Floors for {args.dtype}, {compared} compared, {args.kept_share:.0%} of the patches kept, "
        "P = 1.\n"
    )
    print(floors_table(args.dtype, args.kept_share, args.features))
    print(peaks_table(), end="")


if __name__ == "__main__":
    main()
