"""The kernels on a GPU: times beside their floors, beside PyTorch and ToMe, and inside whole ViTs.

    python benchmarks/gpu_kernels.py --library libsimprune_plugin.so -o results

Writes gpu-benchmark.json and gpu-benchmark.md into the folder and prints the latter. With
`--device cpu --library libsimprune_host.so --quick` everything runs on the CPU in under a minute:
times then mean nothing, and the report says so.

What is timed, in one process:

* ours: the kernels by themselves, buffers made beforehand. *cold*: launched on a stream, the L2
  cache overwritten before each run. *graph*: 20 runs behind one another in a CUDA graph, so that
  inputs that fit the cache come from there. *fixed*: in a graph with the capacity that is kept.
* PyTorch: the reference operator, and a vectorised one (gpu_rivals.py), launched as they are: both
  ask the device something on the way, so neither can go into a graph.
* ToMe: bipartite matching and merging down to the same number of tokens, launched and in a graph.

The tokens are random, in as many clusters as patches are to stay (a stated share), so every
implementation keeps exactly those. Before anything is timed, the decisions of ours and of both
PyTorch operators are compared. Times are medians; floors are those of plugin_floors.py.
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
    gram_flops,
    markdown_table,
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
CHAINS = [(1, 197, 768), (64, 197, 768), (1, 1370, 1024), (8, 1370, 1024)]
QUICK = [(1, 50, 48), (2, 290, 40)]
HEAD_CHANNELS = 64
"""Channels of ToMe's similarities: those of one attention head in the usual models."""

CLUSTER_THRESHOLD = 0.7
CHAIN_THRESHOLD = 0.35

VITS = ("vit_base_patch16_224", "vit_large_patch16_224")
QUICK_VITS = ("vit_tiny_patch16_224",)

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


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


def clustered_tokens(shape: Shape, device: torch.device, seed: int = 0) -> Inputs:
    """Return inputs of which every image keeps exactly `shape.kept_patches` patches.

    That many random directions, each taken by one patch at least, with noise of a tenth of their
    length: cosines near 0.99 inside a cluster and near 0 between two.
    """
    generator = torch.Generator(device).manual_seed(seed)
    normal = {"generator": generator, "device": device}
    batch, patches, clusters = shape.batch, shape.patches, shape.kept_patches
    centers = torch.randn(batch, clusters, shape.dim, **normal)
    spread_out = torch.rand(batch, patches, **normal).argsort(1)
    which = torch.where(spread_out < clusters, spread_out, spread_out % clusters)
    tokens = torch.randn(batch, shape.tokens, shape.dim, **normal)
    chosen = centers.gather(1, which.unsqueeze(2).expand(-1, -1, shape.dim))
    tokens[:, shape.prefix :] = 0.1 * tokens[:, shape.prefix :] + chosen
    return _inputs(tokens, shape, CLUSTER_THRESHOLD)


def chained_tokens(shape: Shape, device: torch.device, seed: int = 0) -> Inputs:
    """Return inputs in which a patch resembles the one before it: the greedy rule's longest walks.

    Patch i is the sum of the random directions i and i + 1, so neighbours have cosines near 0.5.
    """
    generator = torch.Generator(device).manual_seed(seed)
    shape_of_all = (shape.batch, shape.tokens + 1, shape.dim)
    steps = torch.randn(shape_of_all, generator=generator, device=device)
    return _inputs(steps[:, 1:] + steps[:, :-1], shape, CHAIN_THRESHOLD)


def _inputs(tokens: torch.Tensor, shape: Shape, threshold: float) -> Inputs:
    return (
        tokens.to(DTYPES[shape.dtype]),
        torch.zeros(shape.batch, shape.tokens, device=tokens.device),
        torch.tensor([threshold], device=tokens.device),
    )


def middle_mean(shape: Shape, tokens: torch.Tensor) -> torch.Tensor:
    """Return the threshold below which, over the batch, `shape.kept_share` of the means lie."""
    features = torch.nn.functional.normalize(tokens[:, shape.prefix :].float(), dim=2)
    total = (features * features.sum(1, keepdim=True)).sum(2) - 1
    means = (total / max(1, shape.patches - 1)).flatten()
    return means.sort().values[int(shape.kept_share * (len(means) - 1))].view(1)


# --- one shape ------------------------------------------------------------------------------------


def check_agreement(bench: Bench, shape: Shape, inputs: Inputs, clustered: bool) -> int:
    """Return the slots that ours leaves, once all implementations were seen to decide alike.

    Raises:
        CheckFailedError: they do not, or not as the data was made to be decided.
    """
    ours = bench.kernels.similarity_prune(*inputs, shape.prefix)
    slots = ours[2].shape[1]
    if clustered and slots != shape.slots:
        raise CheckFailedError(f"{shape}: the kernels keep {slots} slots, not {shape.slots}")
    others: dict[str, Callable[[], tuple[torch.Tensor, ...]]] = {
        "the reference": lambda: similarity_prune(*inputs, shape.prefix),
        "the vectorised PyTorch operator": lambda: vectorised_prune(*inputs, shape.prefix),
    }
    for name, run in others.items():
        with in_pytorch():
            outputs = run()
        same = all(torch.equal(ours[i], outputs[i]) for i in (2, 3))
        # in a chain some similarities lie near the threshold, where noise may decide
        if clustered and not same:
            raise CheckFailedError(f"{shape}: the kernels and {name} decide differently")
        if not torch.isfinite(outputs[0]).all():
            raise CheckFailedError(f"{shape}: {name} gives infinite or undefined tokens")
    return slots


@contextlib.contextmanager
def in_pytorch() -> Iterator[None]:
    """Let the operator run in PyTorch, whatever library the environment names."""
    named = os.environ.pop(LIBRARY_VARIABLE, None)
    try:
        yield
    finally:
        if named is not None:
            os.environ[LIBRARY_VARIABLE] = named


def measure_shape(
    bench: Bench, shape: Shape, chain: bool = False, selection: str = "cover"
) -> dict[str, Any]:
    """Time every implementation on one shape; seconds, or why there are none."""
    make = chained_tokens if chain else clustered_tokens
    inputs = make(shape, bench.device)
    row: dict[str, Any] = {
        **dataclasses.asdict(shape),
        "data": "chain" if chain else "clusters",
        "selection": selection,
        "bytes": bytes_moved(shape),
        "gram_flops": gram_flops(shape),
        "seconds": {},
    }
    if selection == "cover":
        slots = check_agreement(bench, shape, inputs, clustered=not chain)
    else:
        inputs = (*inputs[:2], middle_mean(shape, inputs[0]))
        slots = bench.kernels.similarity_prune(*inputs, shape.prefix, selection)[2].shape[1]
    row["slots"] = slots
    kept_shape = dataclasses.replace(shape, kept_share=(slots - shape.prefix) / shape.patches)
    row["bytes"] = bytes_moved(kept_shape)
    if bench.peak:
        row["paper_floor"] = paper_floor(kept_shape, bench.peak)
    ceiling = bench.ceilings[f"{'float32' if shape.dtype == 'float32' else 'half'}_flops"]
    row["measured_floor"] = floor_seconds(kept_shape, bench.ceilings["bandwidth"], ceiling)

    free = bench.kernels.prepare(*inputs, shape.prefix, selection)
    fixed = bench.kernels.prepare(
        *inputs, shape.prefix, selection, capacity=max(1, slots - shape.prefix)
    )
    record(bench, row, "ours_cold", lambda: bench.clock.cold(free.launch))
    record(bench, row, "ours_graph", lambda: bench.clock.in_graph(free.launch))
    record(bench, row, "ours_fixed_graph", lambda: bench.clock.in_graph(fixed.launch))
    if selection == "cover":
        measure_rivals(bench, shape, inputs, row)
    ours = row["seconds"]["ours_cold"]
    if isinstance(ours, float):
        row["achieved_bandwidth"] = row["bytes"] / ours
        row["achieved_flops"] = row["gram_flops"] / ours
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
    metric = tokens[:, :, : min(HEAD_CHANNELS, shape.dim)].contiguous()
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
    names = ("model", "batch", "tokens", "dim", "dtype", "data", "selection")
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


def profile(bench: Bench, shape: Shape, chain: bool = False) -> dict[str, Any]:
    """Return the seconds of each of our kernels within one call, as torch's profiler sees them."""
    inputs = (chained_tokens if chain else clustered_tokens)(shape, bench.device)
    prepared = bench.kernels.prepare(*inputs, shape.prefix)
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
    data = "chain" if chain else "clusters"
    return {**dataclasses.asdict(shape), "data": data, "kernels": kernels}


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
    pruned = prune(pruned, threshold=threshold_that_keeps(pruned, images[:1]))
    row: dict[str, Any] = {
        "model": name,
        "batch": batch,
        "dtype": dtype,
        "layers": list(pruned.config.layers),
        "capacities": list(pruned.config.capacities),
        "threshold": pruned.config.threshold,
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
    prepared = bench.kernels.prepare(
        trace.tokens, trace.log_size, limit, pruned.num_prefix_tokens, capacity=capacity
    )
    return bench.clock.in_graph(prepared.launch)


def threshold_that_keeps(pruned: Any, images: torch.Tensor) -> float:
    """Return a threshold at which step 2 keeps a little more than the first layer's capacity.

    So that both the greedy rule and the giving up of step 6 have work to do. It is the quantile of
    the patches' largest similarity to an earlier patch, of one image, at halfway from the capacity
    to all.
    """
    vit = pruned.vit
    tokens = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
    for block in vit.blocks[: pruned.config.layers[0]]:
        tokens = block(tokens)
    patches = torch.nn.functional.normalize(tokens[0, pruned.num_prefix_tokens :].float(), dim=1)
    earlier = (patches @ patches.T).tril(-1) - 2 * torch.ones_like(patches @ patches.T).triu()
    closest = earlier.amax(1)[1:]
    kept_share = (1 + pruned.config.capacities[0] / pruned.num_patches) / 2
    return float(closest.quantile(kept_share).clamp(-1, 1))


# --- report ---------------------------------------------------------------------------------------


def microseconds(value: object) -> str:
    return f"{value * 1e6:,.1f}" if isinstance(value, float) else str(value or "")


def ratio(numerator: object, denominator: object) -> str:
    if not isinstance(numerator, float) or not isinstance(denominator, float):
        return ""
    return f"{numerator / denominator:.2f}"


def kernel_table(rows: list[dict[str, Any]]) -> str:
    """Return the operator's times as Markdown."""
    header = [
        *("B", "N", "D", "K", "floor µs", "measured floor µs"),
        *(
            "ours cold µs",
            "ours graph µs",
            "ours fixed graph µs",
            "cold / floor",
            "cold / measured",
        ),
        *("GB/s", "TFLOP/s", "reference µs", "vectorised µs", "vectorised / ours"),
        *("ToMe cold µs", "ToMe graph µs"),
    ]
    lines = []
    for row in rows:
        seconds = row["seconds"]
        lines.append(
            [
                *(str(row[key]) for key in ("batch", "tokens", "dim", "slots")),
                microseconds(row.get("paper_floor")),
                microseconds(row["measured_floor"]),
                microseconds(seconds["ours_cold"]),
                microseconds(seconds["ours_graph"]),
                microseconds(seconds["ours_fixed_graph"]),
                ratio(seconds["ours_cold"], row.get("paper_floor")),
                ratio(seconds["ours_cold"], row["measured_floor"]),
                f"{row.get('achieved_bandwidth', 0) / 1e9:,.1f}",
                f"{row.get('achieved_flops', 0) / 1e12:,.2f}",
                microseconds(seconds.get("reference")),
                microseconds(seconds.get("vectorised")),
                ratio(seconds.get("vectorised"), seconds["ours_cold"]),
                microseconds(seconds.get("tome_cold")),
                microseconds(seconds.get("tome_graph")),
            ]
        )
    return markdown_table(header, lines)


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
    """Return the project's speed targets, set for an H200, beside what was measured."""
    lines = []
    for row in results["shapes"]:
        if (row["batch"], row["tokens"], row["dim"]) == (1, 197, 384):
            for name in ("ours_cold", "ours_graph"):
                lines.append(_target("B = 1, N = 197, D = 384", name, row["seconds"][name], 25e-6))
        if (row["batch"], row["tokens"], row["dim"]) == (64, 197, 768) and "paper_floor" in row:
            for name in ("ours_cold", "ours_graph"):
                limit = 3 * row["paper_floor"]
                lines.append(
                    _target(
                        "B = 64, N = 197, D = 768: 3 x floor", name, row["seconds"][name], limit
                    )
                )
    for row in results["vits"]:
        if (row["model"], row["batch"]) == ("vit_base_patch16_224", 64):
            dense = row["seconds"]["dense_graph"]
            limit = 0.02 * dense if isinstance(dense, float) else None
            spent = row["seconds"]["our_kernels"]
            lines.append(_target("2 % of the dense ViT-B at B = 64", "our_kernels", spent, limit))
    return markdown_table(["target", "measured as", "µs", "at most µs", "met"], lines)


def _target(what: str, name: str, measured: object, limit: object) -> list[str]:
    met = "not measured"
    if isinstance(measured, float) and isinstance(limit, float):
        met = "yes" if measured <= limit else "no"
    return [what, name, microseconds(measured), microseconds(limit), met]


def profile_table(rows: list[dict[str, Any]]) -> str:
    """Return how the time divides among our kernels."""
    lines = [
        [
            *(str(row[key]) for key in ("batch", "tokens", "dim", "data")),
            kernel,
            microseconds(seconds),
        ]
        for row in rows
        for kernel, seconds in row["kernels"].items()
    ]
    return markdown_table(["B", "N", "D", "data", "kernel", "µs"], lines)


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
        "The vectorised PyTorch operator makes its Gram matrix of float16 tokens in "
        f"{results['vectorised_gram']}.\n",
        "### Targets\n",
        "Set for an H200; on another GPU they are for information.\n",
        targets_table(results),
        f"### The operator: {results['dtype']}, {results['kept_share']:.0%} of the patches kept\n",
        kernel_table(results["shapes"]),
    ]
    for title, key in (
        ("Other types", "other_types"),
        ('Selection "redundancy"', "redundancy"),
        ("Chains of similar neighbours, the greedy rule's longest walks", "chains"),
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
            f"{results['vit_share']:.0%} of the patches, and a threshold at which the first one "
            'would keep somewhat more. "Our kernels" is the sum of the prune layers by themselves, '
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
        return [Shape(*size, dtype, kept_share=args.kept_share) for size in sizes]

    main_shapes = table_shapes("float16", args.kept_share)
    others, chains = OTHER_TYPES, CHAINS
    if args.quick:
        main_shapes, others, chains = shapes(QUICK, "float16"), QUICK[:1], QUICK[1:]
    results["shapes"] = each(bench, main_shapes, lambda shape: measure_shape(bench, shape))
    results["other_types"] = each(
        bench,
        shapes(others, "float32") + shapes(others, "bfloat16"),
        lambda shape: measure_shape(bench, shape),
    )
    results["redundancy"] = each(
        bench,
        shapes(others, "float16"),
        lambda shape: measure_shape(bench, shape, selection="redundancy"),
    )
    results["chains"] = each(
        bench, shapes(chains, "float16"), lambda shape: measure_shape(bench, shape, chain=True)
    )
    results["profiles"] = each(
        bench,
        [*shapes(others, "float16"), *shapes(chains, "float16")],
        lambda shape: profile(bench, shape),
    )
    results["profiles"] += each(
        bench, shapes(chains, "float16"), lambda shape: profile(bench, shape, chain=True)
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
