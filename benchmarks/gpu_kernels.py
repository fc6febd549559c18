"""The kernels on a GPU: times beside their floors, beside PyTorch and ToMe, and inside whole ViTs.

    python benchmarks/gpu_kernels.py --library libsimprune_plugin.so -o results

Writes gpu-benchmark.json and gpu-benchmark.md into the folder and prints the latter. With
`--device cpu --library libsimprune_host.so --quick` everything runs on the CPU in under a minute:
times then mean nothing, and the report says so.

What is timed, in one process:

* ours: the kernels by themselves, buffers made beforehand. *cold*: launched on a stream, the L2
  cache overwritten before each run. *graph*: 20 runs behind one another in a CUDA graph, so that
  inputs that fit the cache come from there. Features of 64 channels, as the mean of the keys over
  the heads has them; *fixed*: with the capacity that is kept; *tokens*: with the tokens compared;
  *keys*: with all heads' keys compared, a tensor of its own as wide as the tokens.
* PyTorch: the reference operator, and a vectorised one (gpu_rivals.py), launched as they are: both
  ask the device something on the way, so neither can go into a graph.
* ToMe: bipartite matching and merging down to the same number of tokens, launched and in a graph.

Everything is random; a stated share of the patches with even numbers lies near one with an odd
number, so every implementation lets exactly those go. Before anything is timed, the decisions of
ours and of both PyTorch operators are compared. Times are medians; floors are those of
plugin_floors.py. The targets are the project's, for an H100.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gpu_facts import facts, package_version
from gpu_rivals import HAS_HALF_GRAM, bipartite_merge, vectorised_prune
from gpu_timing import Clock, Effort, make_clock
from plugin_floors import (
    Peak,
    Shape,
    bytes_moved,
    floor_seconds,
    markdown_table,
    pair_flops,
    paper_floor,
    peak_of,
    share,
    table_shapes,
)

from simprune_deploy.common.errors import CheckFailedError, SimpruneError
from simprune_deploy.common.files import staged_file, write_json
from simprune_deploy.pruning.cuda_kernels import Kernels
from simprune_deploy.pruning.kernel_library import LIBRARY_VARIABLE
from simprune_deploy.pruning.operator import similarity_prune

if TYPE_CHECKING:
    from simprune_deploy.pruning.model import PrunedViT, PruneTrace

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
OTHER_TYPES = [(1, 197, 384), (64, 197, 768), (8, 577, 768)]
QUICK = [(1, 50, 48), (2, 290, 40)]
HEAD_CHANNELS = 64
"""Channels of one attention head in the usual models, and so of the mean of their keys."""

NEAR = 0.2
"""How far a patch that goes is from its partner, as a share of its length: their cosine is 0.98."""

THRESHOLD = 0.8

VITS = ("vit_base_patch16_224", "vit_large_patch16_224")
QUICK_VITS = ("vit_tiny_patch16_224",)

TARGETS = {
    (1, 197, 384): 14e-6,
    (1, 1370, 768): 20e-6,
    (64, 197, 768): 30e-6,
    (64, 1370, 768): 170e-6,
}
"""Seconds at most on an H100 in a CUDA graph, float16, features of 64 channels, by B, N and D."""

ALLOWED = {
    "ours_graph": 1.0,
    "ours_fixed_graph": 1.2,
    "ours_tokens_graph": 2.0,
    "ours_keys_graph": 2.0,
}
"""Of that time: dynamic counts, fixed ones, whole tokens compared, all heads' keys compared."""

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Bench:
    """What every measurement needs, and a list of what went wrong."""

    device: torch.device
    kernels: Kernels
    clock: Clock
    peak: Peak | None
    ceilings: dict[str, float]
    failures: list[str] = dataclasses.field(default_factory=list)


# --- data -----------------------------------------------------------------------------------------


def paired_inputs(shape: Shape, device: torch.device, seed: int = 0) -> Inputs:
    """Return inputs of which every image keeps exactly `shape.kept_patches` patches.

    Features are random directions, in which cosines are small, but that as many candidates as are
    to go are a partner's with noise of a fifth of its length.
    """
    generator = torch.Generator(device).manual_seed(seed)
    normal = {"generator": generator, "device": device}
    features = torch.randn(shape.batch, shape.tokens, shape.width, **normal)
    patches, odd = features[:, shape.prefix :], shape.patches // 2
    gone = shape.patches - shape.kept_patches
    even = shape.patches - odd
    which = torch.rand(shape.batch, even, **normal).argsort(1)[:, :gone]
    partner = torch.randint(max(odd, 1), (shape.batch, gone), **normal)

    def rows(numbers: torch.Tensor) -> torch.Tensor:
        return numbers[:, :, None].expand(-1, -1, shape.width)

    near = patches.gather(1, rows(2 * partner + 1)) if gone else patches[:, :0]
    near = near + NEAR * torch.randn(shape.batch, gone, shape.width, **normal)
    patches.scatter_(1, rows(2 * which), near)
    features = features.to(DTYPES[shape.dtype])
    tokens = features
    if shape.features is not None:
        tokens = torch.randn(shape.batch, shape.tokens, shape.dim, **normal).to(features.dtype)
    log_size = torch.rand(shape.batch, shape.tokens, **normal)
    return tokens, features, log_size, torch.tensor([THRESHOLD], device=device)


def middle_mean(shape: Shape, compared: torch.Tensor) -> torch.Tensor:
    """Return the threshold below which, over the batch, `shape.kept_share` of the means lie."""
    features = torch.nn.functional.normalize(compared[:, shape.prefix :].float(), dim=2)
    total = (features * features.sum(1, keepdim=True)).sum(2) - 1
    means = (total / max(1, shape.patches - 1)).flatten()
    return means.sort().values[int(shape.kept_share * (len(means) - 1))].view(1)


# --- one shape ------------------------------------------------------------------------------------


def check_agreement(bench: Bench, shape: Shape, inputs: Inputs) -> None:
    """See that all implementations decide alike, and as the data was made to be decided.

    Raises:
        CheckFailedError: they do not.
    """
    for capacity in (0, shape.kept_patches):
        ours = bench.kernels.similarity_prune(*inputs, shape.prefix, capacity=capacity)
        if ours[2].shape[1] != shape.slots or (ours[1] < 0).any():
            raise CheckFailedError(
                f"{shape}: the kernels keep {ours[2].shape[1]} slots, not {shape.slots}"
            )
        others: dict[str, Callable[[], tuple[torch.Tensor, ...]]] = {
            "the reference": lambda: similarity_prune(*inputs, shape.prefix, capacity=capacity),  # noqa: B023
            "the vectorised PyTorch operator": lambda: vectorised_prune(
                *inputs,
                shape.prefix,
                capacity,  # noqa: B023
            ),
        }
        for name, run in others.items():
            with in_pytorch():
                outputs = run()
            if not all(torch.equal(ours[i], outputs[i]) for i in (2, 3)):
                raise CheckFailedError(f"{shape}: the kernels and {name} decide differently")
            if not torch.isfinite(outputs[0]).all():
                raise CheckFailedError(f"{shape}: {name} gives infinite or undefined tokens")


@contextlib.contextmanager
def in_pytorch() -> Iterator[None]:
    """Let the operator run in PyTorch, whatever library the environment names."""
    named = os.environ.pop(LIBRARY_VARIABLE, None)
    try:
        yield
    finally:
        if named is not None:
            os.environ[LIBRARY_VARIABLE] = named


def measure_shape(bench: Bench, shape: Shape) -> dict[str, Any]:
    """Time every implementation on one shape; seconds, or why there are none."""
    inputs = paired_inputs(shape, bench.device)
    check_agreement(bench, shape, inputs)
    row = row_of(bench, shape, "pairs", shape.slots)
    kernels, prefix = bench.kernels, shape.prefix
    free = kernels.prepare(*inputs, prefix)
    record(bench, row, "ours_cold", lambda: bench.clock.cold(free.launch))
    record(bench, row, "ours_graph", lambda: bench.clock.in_graph(free.launch))
    fixed = kernels.prepare(*inputs, prefix, capacity=shape.kept_patches)
    record(bench, row, "ours_fixed_graph", lambda: bench.clock.in_graph(fixed.launch))
    wide = paired_inputs(dataclasses.replace(shape, features=None), bench.device)
    whole = kernels.prepare(*wide, prefix)
    record(bench, row, "ours_tokens_graph", lambda: bench.clock.in_graph(whole.launch))
    keys = kernels.prepare(inputs[0], *wide[1:], prefix)
    record(bench, row, "ours_keys_graph", lambda: bench.clock.in_graph(keys.launch))
    measure_rivals(bench, shape, inputs, row)
    ours = row["seconds"]["ours_cold"]
    if isinstance(ours, float):
        row["achieved_bandwidth"] = row["bytes"] / ours
    return row


def measure_redundancy(bench: Bench, shape: Shape) -> dict[str, Any]:
    """Time the kernels alone with the other selection."""
    inputs = paired_inputs(shape, bench.device)
    inputs = (*inputs[:3], middle_mean(shape, inputs[1]))
    kept = bench.kernels.similarity_prune(*inputs, shape.prefix, "redundancy")[2].shape[1]
    row = row_of(bench, shape, "redundancy", kept)
    free = bench.kernels.prepare(*inputs, shape.prefix, "redundancy")
    fixed = bench.kernels.prepare(
        *inputs, shape.prefix, "redundancy", capacity=max(1, kept - shape.prefix)
    )
    record(bench, row, "ours_cold", lambda: bench.clock.cold(free.launch))
    record(bench, row, "ours_graph", lambda: bench.clock.in_graph(free.launch))
    record(bench, row, "ours_fixed_graph", lambda: bench.clock.in_graph(fixed.launch))
    return row


def row_of(bench: Bench, shape: Shape, selection: str, slots: int) -> dict[str, Any]:
    """Return what is known of a row before anything is timed."""
    kept = dataclasses.replace(shape, kept_share=(slots - shape.prefix) / shape.patches)
    ceiling = bench.ceilings[f"{'float32' if shape.dtype == 'float32' else 'half'}_flops"]
    row: dict[str, Any] = {
        **dataclasses.asdict(shape),
        "selection": selection,
        "slots": slots,
        "bytes": bytes_moved(kept),
        "flops": pair_flops(kept),
        "measured_floor": floor_seconds(kept, bench.ceilings["bandwidth"], ceiling),
        "seconds": {},
    }
    if bench.peak:
        row["paper_floor"] = paper_floor(kept, bench.peak)
    return row


def measure_rivals(bench: Bench, shape: Shape, inputs: Inputs, row: dict[str, Any]) -> None:
    """Time PyTorch's operators and ToMe on the same inputs, down to as many slots."""
    clock = bench.clock
    with in_pytorch():
        record(
            bench,
            row,
            "reference",
            lambda: clock.cold(lambda: similarity_prune(*inputs, shape.prefix)),
        )
    record(
        bench,
        row,
        "vectorised",
        lambda: clock.cold(lambda: vectorised_prune(*inputs, shape.prefix)),
    )
    tokens, sizes = inputs[0], torch.ones_like(inputs[0][:, :, :1])
    metric = inputs[1]
    # ToMe removes at most half of the tokens in one step
    merged = min(shape.tokens - row["slots"], (shape.tokens + 1) // 2 - 1)
    row["tome_slots"] = shape.tokens - merged

    def tome() -> object:
        return bipartite_merge(tokens, sizes, metric, merged)

    record(bench, row, "tome_cold", lambda: clock.cold(tome))
    record(bench, row, "tome_graph", lambda: clock.in_graph(tome))


def record(bench: Bench, row: dict[str, Any], name: str, measure: Callable[[], float]) -> None:
    """Put a time into the row, or why there is none; what fails does not end the benchmark."""
    try:
        row["seconds"][name] = measure()
    except torch.OutOfMemoryError:
        row["seconds"][name] = "out of memory"
        free_memory(bench.device)
    except (RuntimeError, SimpruneError) as error:
        row["seconds"][name] = "failed"
        bench.failures.append(f"{name} at {label(row)}: {first_line(error)}")


def label(row: dict[str, Any]) -> str:
    """Return what a row is about."""
    names = ("model", "batch", "tokens", "dim", "dtype", "selection")
    return ", ".join(f"{name} {row[name]}" for name in names if name in row)


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def measure_ceilings(device: torch.device, clock: Clock, quick: bool) -> dict[str, float]:
    """Return what this device reaches: bytes a second of a copy, FLOPs a second of a product."""

    def copy(size: int) -> float:
        source = torch.ones(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return 2 * size / clock.cold(lambda: target.copy_(source))

    def product(dtype: torch.dtype, size: int) -> float:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        return 2 * size**3 / clock.cold(lambda: left @ right)

    found = {
        "bandwidth": copy((1 << 24) if quick else (1 << 30)),
        "half_flops": product(torch.float16, 256 if quick else 8192),
        "float32_flops": product(torch.float32, 256 if quick else 4096),
    }
    free_memory(device)
    return found


def measure_trivial(device: torch.device, clock: Clock) -> dict[str, float]:
    """Return the seconds of a kernel that does next to nothing: what launching costs."""
    one = torch.zeros(1, device=device)
    return {"cold": clock.cold(one.zero_), "graph": clock.in_graph(one.zero_)}


def profile(bench: Bench, shape: Shape, fixed: bool) -> dict[str, Any]:
    """Return the seconds of each of our kernels within one call, as torch's profiler sees them."""
    capacity = shape.kept_patches if fixed else 0
    inputs = paired_inputs(shape, bench.device)
    prepared = bench.kernels.prepare(*inputs, shape.prefix, capacity=capacity)
    prepared.launch()
    on_gpu = bench.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    rounds = 20
    with torch.profiler.profile(activities=[activity.CUDA if on_gpu else activity.CPU]) as trace:
        for _ in range(rounds):
            prepared.launch()
        if on_gpu:
            torch.cuda.synchronize()
    kernels = {
        event.key.split("(")[0].removeprefix("void "): event.device_time_total / rounds / 1e6
        for event in trace.key_averages()
        if "simprune" in event.key and event.device_time_total
    }
    counts = "fixed" if fixed else "dynamic"
    return {**dataclasses.asdict(shape), "counts": counts, "kernels": kernels}


# --- whole models ---------------------------------------------------------------------------------


def measure_vits(bench: Bench, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time every model at every batch."""
    try:
        import timm

        from simprune_deploy.pruning import model  # noqa: F401
    except ImportError as error:
        bench.failures.append(f"whole models: timm cannot be used: {first_line(error)}")
        return []
    dtype = "float16" if bench.device.type == "cuda" else "float32"
    rows = []
    for name in QUICK_VITS if args.quick else VITS:
        torch.manual_seed(0)
        vit = timm.create_model(name).eval().to(bench.device, DTYPES[dtype])
        for batch in (1, 2) if args.quick else (1, 8, 64):
            about = f"{name}, batch {batch}, {dtype}"
            say(about)
            try:
                rows.append(measure_vit(bench, name, vit, batch, dtype, args.vit_share))
            except (RuntimeError, SimpruneError) as error:
                bench.failures.append(f"{about}: {first_line(error)}")
            free_memory(bench.device)
    return rows


def measure_vit(
    bench: Bench, name: str, vit: Any, batch: int, dtype: str, kept_share: float
) -> dict[str, Any]:
    """Time a ViT dense and pruned: with our kernels, and with the operator in PyTorch."""
    from simprune_deploy.pruning.model import prune

    patches = vit.patch_embed.num_patches
    size = vit.patch_embed.img_size
    images = torch.randn(batch, 3, *size, device=bench.device).to(DTYPES[dtype])
    pruned = prune(vit, tokens=max(1, round(kept_share * patches)))
    row: dict[str, Any] = {
        "model": name,
        "batch": batch,
        "dtype": dtype,
        "layers": list(pruned.config.layers),
        "capacities": list(pruned.config.capacities),
        "seconds": {},
    }

    with_kernels = on_kernels(pruned, bench.kernels)
    traces: list[PruneTrace] = []
    result = with_kernels(images, traces=traces)
    if not torch.isfinite(result).all():
        raise CheckFailedError(f"{name} at batch {batch}: the pruned model's output is not finite")
    with in_pytorch():
        expected = pruned(images)
    row["cosine_to_pytorch"] = float(
        torch.nn.functional.cosine_similarity(result.float(), expected.float()).min()
    )
    row["kept"] = [
        (trace.assignment.amax(1).float().mean() + 1 - pruned.num_prefix_tokens).item()
        for trace in traces
    ]

    forwards: dict[str, Callable[[], object]] = {
        "dense": lambda: vit(images),
        "pruned": lambda: with_kernels(images),
    }
    for kind, forward in forwards.items():
        record(bench, row, kind, lambda forward=forward: bench.clock.cold(forward))  # type: ignore[misc]
        record(bench, row, f"{kind}_graph", lambda forward=forward: bench.clock.in_graph(forward))  # type: ignore[misc]
    with in_pytorch():
        record(bench, row, "pruned_in_pytorch", lambda: bench.clock.cold(lambda: pruned(images)))

    row["seconds"]["our_kernels"] = sum(
        layer_seconds(bench, pruned, trace, capacity)
        for trace, capacity in zip(traces, pruned.config.capacities, strict=True)
    )
    return row


def on_kernels(pruned: PrunedViT, kernels: Kernels) -> PrunedViT:
    """Return the pruned model with the library under test, whatever SIMPRUNE_LIBRARY names."""
    from simprune_deploy.pruning.model import PrunedViT

    class WithKernels(PrunedViT):
        def _operator(self, *inputs: torch.Tensor, **values: Any) -> tuple[torch.Tensor, ...]:
            hints = ("opt_tokens", "max_tokens")
            kept = {key: value for key, value in values.items() if key not in hints}
            return kernels.similarity_prune(*inputs, **kept)

    return WithKernels(pruned.vit, pruned.config).eval()


def layer_seconds(bench: Bench, pruned: PrunedViT, trace: PruneTrace, capacity: int) -> float:
    """Return the seconds that the kernels take for one prune layer, on what reaches it."""
    limit = torch.tensor([pruned.config.threshold], device=bench.device)
    tokens = trace.features  # before a block the tokens are compared
    prepared = bench.kernels.prepare(
        tokens, tokens, trace.log_size, limit, pruned.num_prefix_tokens, capacity=capacity
    )
    return bench.clock.in_graph(prepared.launch)


# --- report ---------------------------------------------------------------------------------------


def microseconds(value: object) -> str:
    return f"{value * 1e6:,.1f}" if isinstance(value, float) else str(value or "")


def ratio(numerator: object, denominator: object) -> str:
    if not isinstance(numerator, float) or not isinstance(denominator, float):
        return ""
    return f"{numerator / denominator:.2f}"


def kernel_table(rows: list[dict[str, Any]]) -> str:
    """Return the operator's times as Markdown."""
    columns = {
        "ours_cold": "ours cold µs",
        "ours_graph": "graph µs",
        "ours_fixed_graph": "fixed graph µs",
        "ours_tokens_graph": "tokens graph µs",
        "ours_keys_graph": "keys graph µs",
        "reference": "reference µs",
        "vectorised": "vectorised µs",
        "tome_cold": "ToMe cold µs",
        "tome_graph": "ToMe graph µs",
    }
    timed = {name: title for name, title in columns.items() if name in rows[0]["seconds"]}
    header = ["B", "N", "D", "K", "floor µs", "measured floor µs", *timed.values()]
    lines = []
    for row in rows:
        seconds = row["seconds"]
        lines.append(
            [
                *(str(row[key]) for key in ("batch", "tokens", "dim", "slots")),
                microseconds(row.get("paper_floor")),
                microseconds(row["measured_floor"]),
                *(microseconds(seconds[name]) for name in timed),
                ratio(seconds["ours_cold"], row["measured_floor"]),
                f"{row.get('achieved_bandwidth', 0) / 1e9:,.1f}",
            ]
        )
    return markdown_table([*header, "cold / measured", "GB/s"], lines)


def vit_table(rows: list[dict[str, Any]]) -> str:
    """Return the models' speeds as Markdown."""
    header = [
        *("model", "B", "tokens kept by layer", "dense images/s", "pruned images/s", "speed-up"),
        *("dense graph images/s", "pruned graph images/s", "speed-up in graphs"),
        *("pruned with PyTorch's operator images/s", "our kernels µs", "of the dense forward"),
        "of the pruned forward",
    ]
    lines = []
    for row in rows:
        seconds = row["seconds"]
        rate = {
            name: f"{row['batch'] / value:,.0f}" if isinstance(value, float) else str(value)
            for name, value in seconds.items()
        }
        kernels = seconds["our_kernels"]
        shares = [
            f"{kernels / seconds[name]:.2%}" if isinstance(seconds[name], float) else ""
            for name in ("dense_graph", "pruned_graph")
        ]
        lines.append(
            [
                row["model"],
                str(row["batch"]),
                ", ".join(f"{kept:.0f}" for kept in row["kept"]),
                rate["dense"],
                rate["pruned"],
                ratio(seconds["dense"], seconds["pruned"]),
                rate["dense_graph"],
                rate["pruned_graph"],
                ratio(seconds["dense_graph"], seconds["pruned_graph"]),
                rate["pruned_in_pytorch"],
                microseconds(kernels),
                *shares,
            ]
        )
    return markdown_table(header, lines)


def targets_table(results: dict[str, Any]) -> str:
    """Return the project's speed targets, set for an H100, beside what was measured."""
    lines = []
    rows = {(row["batch"], row["tokens"], row["dim"]): row for row in results["shapes"]}
    for size, limit in TARGETS.items():
        seconds = rows[size]["seconds"] if size in rows else {}
        for name, times in ALLOWED.items():
            measured, allowed = seconds.get(name), times * limit
            met = "not measured"
            if isinstance(measured, float):
                met = "yes" if measured <= allowed else "no"
            lines.append(
                [
                    "B = {}, N = {}, D = {}".format(*size),
                    name.removesuffix("_graph").removeprefix("ours").strip("_") or "mean keys",
                    microseconds(allowed),
                    microseconds(measured),
                    met,
                ]
            )
    return markdown_table(["", "", "at most µs", "measured µs", "met"], lines)


def profile_table(rows: list[dict[str, Any]]) -> str:
    """Return how the time divides among our kernels."""
    lines = [
        [
            *(str(row[key]) for key in ("batch", "tokens", "dim", "counts")),
            kernel,
            microseconds(seconds),
        ]
        for row in rows
        for kernel, seconds in row["kernels"].items()
    ]
    return markdown_table(["B", "N", "D", "counts", "kernel", "µs"], lines)


def report(results: dict[str, Any]) -> str:
    """Return everything as Markdown; headings begin at the third level."""
    machine = results["facts"]
    parts = []
    if machine["device"] != "cuda":
        parts.append(
            "**This ran on the CPU to try the code. None of its times says anything about a GPU.**"
        )
    ceilings = results["ceilings"]
    if results["failures"]:
        parts += ["### Failures\n", *(f"* {each_one}" for each_one in results["failures"]), ""]
    parts += [
        "### What this device reaches\n",
        f"A copy moves {ceilings['bandwidth'] / 1e9:,.0f} GB/s (bytes read and written), a "
        f"float16 matrix product {ceilings['half_flops'] / 1e12:,.1f} TFLOP/s, a float32 one "
        f"{ceilings['float32_flops'] / 1e12:,.1f} TFLOP/s. A kernel that does nothing much takes "
        f"{microseconds(results['trivial']['cold'])} µs on a stream and "
        f"{microseconds(results['trivial']['graph'])} µs in a graph.\n",
        "The vectorised PyTorch operator multiplies float16 features in "
        f"{results['vectorised_gram']}.\n",
        "### Targets\n",
        "Set for an H100, in a CUDA graph, float16; on another GPU they are for information. Mean "
        "keys: features of 64 channels; fixed: as many patches as stay anyway; tokens, keys: all "
        "channels of the tokens, or as many of another tensor, compared.\n",
        targets_table(results),
        f"### The operator: {results['dtype']}, features of {HEAD_CHANNELS} channels, "
        f"{results['kept_share']:.0%} of the patches kept\n",
        kernel_table(results["shapes"]),
    ]
    for title, key in (
        ("Other types", "other_types"),
        ('Selection "redundancy"', "redundancy"),
    ):
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in results[key]:
            groups.setdefault(row["dtype"], []).append(row)
        for dtype, rows in groups.items():
            parts += [f"### {title}: {dtype}\n", kernel_table(rows)]
    parts.append("### Within one call\n")
    if any(row["kernels"] for row in results["profiles"]):
        parts.append(profile_table(results["profiles"]))
    else:
        parts.append("The profiler saw no kernel of ours.\n")
    parts.append("### Whole models\n")
    if results["vits"]:
        row = results["vits"][0]
        parts += [
            f"{row['dtype']}, random weights and random images: good for speed, not for accuracy. "
            "Every prune layer has a fixed capacity, the last one "
            f"{results['vit_share']:.0%} of the patches, and compares tokens. "
            '"Our kernels" is the sum of the prune layers by themselves, '
            "in graphs, on what reaches them; the shares are of the forward in a graph.\n",
            vit_table(results["vits"]),
        ]
    else:
        parts.append(f"Not run: {results['no_vits'] or 'see the failures'}.\n")
    return "\n".join(parts)


# --- the whole ------------------------------------------------------------------------------------


@torch.inference_mode()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure everything that was asked for."""
    device = torch.device(args.device)
    kernels = Kernels(args.library)
    if kernels.device_type != device.type:
        raise SimpruneError(
            f"{args.library} takes {kernels.device_type} tensors: "
            f"give --device {kernels.device_type}"
        )
    torch.set_float32_matmul_precision("highest")
    effort = Effort(0.02, 3, 5) if args.quick else Effort()
    clock = make_clock(device, effort)
    machine = facts(device, args.library)
    peak = None
    if machine["gpu"]:
        peak = peak_of(machine["gpu"]["name"], machine["gpu"]["multiprocessors"])
    bench = Bench(device, kernels, clock, peak, measure_ceilings(device, clock, args.quick))
    results: dict[str, Any] = {
        "facts": machine,
        "vectorised_gram": "float16 with float32 sums" if HAS_HALF_GRAM else "float32",
        "quick": args.quick,
        "dtype": "float16",
        "kept_share": args.kept_share,
        "vit_share": args.vit_share,
        "paper_peak": dataclasses.asdict(peak) if peak else None,
        "ceilings": bench.ceilings,
        "trivial": measure_trivial(device, clock),
    }

    measure_shapes(bench, args, results)
    results["vits"], results["no_vits"] = [], None
    if args.skip_vits:
        results["no_vits"] = "--skip-vits was given"
    elif package_version("timm") is None:
        results["no_vits"] = "timm is not installed here"
    else:
        results["vits"] = measure_vits(bench, args)
    results["failures"] = bench.failures
    return results


def measure_shapes(bench: Bench, args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Measure the operator at every size, type and kind of data, and within one call."""

    def shapes(sizes: list[tuple[int, int, int]], dtype: str) -> list[Shape]:
        return [
            Shape(*size, dtype, kept_share=args.kept_share, features=HEAD_CHANNELS)
            for size in sizes
        ]

    main_shapes = table_shapes("float16", args.kept_share, HEAD_CHANNELS)
    others, profiled = OTHER_TYPES, list(TARGETS)
    if args.quick:
        main_shapes, others, profiled = shapes(QUICK, "float16"), QUICK[:1], QUICK[:1]
    results["shapes"] = each(bench, main_shapes, lambda shape: measure_shape(bench, shape))
    results["other_types"] = each(
        bench,
        shapes(others, "float32") + shapes(others, "bfloat16"),
        lambda shape: measure_shape(bench, shape),
    )
    results["redundancy"] = each(
        bench, shapes(others, "float16"), lambda shape: measure_redundancy(bench, shape)
    )
    results["profiles"] = []
    for fixed in (False, True):
        results["profiles"] += each(
            bench,
            shapes(profiled, "float16"),
            lambda shape: profile(bench, shape, fixed),  # noqa: B023
        )


def each(
    bench: Bench, shapes: list[Shape], measure: Callable[[Shape], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Measure every shape; one that cannot be measured is a failure with its reason."""
    rows = []
    for shape in shapes:
        about = label(dataclasses.asdict(shape))
        say(about)
        try:
            rows.append(measure(shape))
        except (RuntimeError, SimpruneError) as error:
            bench.failures.append(f"{about}: {first_line(error)}")
        free_memory(bench.device)
    return rows


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    named = os.environ.get(LIBRARY_VARIABLE)
    parser.add_argument(
        "--library", type=Path, default=named and Path(named), help=f"default: {LIBRARY_VARIABLE}"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu-benchmark"))
    parser.add_argument("--force", action="store_true", help="replace results that are there")
    parser.add_argument("--kept-share", type=share, default=0.7, help="of the patches (0.7)")
    parser.add_argument("--vit-share", type=share, default=0.5, help="after the last layer (0.5)")
    parser.add_argument("--skip-vits", action="store_true")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the code")
    return parser.parse_args(arguments)


def main() -> int:
    args = parse()
    try:
        if args.library is None:
            raise SimpruneError(f"no library: give --library, or set {LIBRARY_VARIABLE}")
        if args.device == "cuda" and not torch.cuda.is_available():
            raise SimpruneError("torch finds no CUDA GPU: give --device cpu to try the code only")
        paths = [args.output / f"gpu-benchmark.{kind}" for kind in ("json", "md")]
        there = [path for path in paths if path.exists()]
        if there and not args.force:
            raise SimpruneError(f"{there[0]} exists: replace it with --force, or give -o DIR")
        results = run(args)
        text = report(results)
        args.output.mkdir(parents=True, exist_ok=True)
        with staged_file(paths[0]) as staging:
            write_json(staging, results)
        with staged_file(paths[1]) as staging:
            staging.write_text(text, encoding="utf-8")
    except SimpruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, CheckFailedError) else 2
    print(text, end="")
    return 1 if results["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
