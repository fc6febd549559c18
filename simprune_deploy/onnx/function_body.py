"""`SimilarityPrune` as an ONNX model-local function: the portable carrier of the operator.

The body is standard ONNX, so ONNX Runtime inlines it and TensorRT-RTX compiles it. It follows the
definition in :mod:`simprune_deploy.pruning.operator` step by step. What shaped it:

* On a GPU every node is a launch, and control flow, sizes computed at run time and copies to the
  host forbid CUDA graphs. There is no loop; with a fixed capacity and a fixed batch nothing but
  the decisions is computed at run time; with dynamic counts the token count is the only number
  that the host reads.
* Tokens travel with their size as one more channel, multiplied by it: a merge is then a plain sum,
  and a padding slot a row of zeros. Rows of zeros in front of the tokens and behind them give
  padding slots something to read and every even patch an odd neighbour.
* The slots are filled by one scatter of row numbers. Index 0 takes what does not stay.
* Even and odd patches are compared, so the largest matrix is a quarter of N x N.
* "pairs" with dynamic counts, which most models have, leaves 45 nodes a layer in ONNX Runtime,
  however many prefix tokens there are, and 4 more in 16 bits; a threshold at run time takes 3 more,
  which layers with the same threshold share. With fixed counts it leaves 41, 40 with one prefix
  token.

One function serves every prune layer of a model; what a model has one of (selection, reduction,
prefix tokens, ...) picks the text. Constants are tensors, because optimizers turn a `value_float`
into float64.
"""

from __future__ import annotations

import dataclasses

import onnx
import onnx.parser

from simprune_deploy.pruning.config import PAD_LOG_SIZE, PruneConfig

DOMAIN = "simprune"
DOMAIN_VERSION = 2
OP_TYPE = "SimilarityPrune"
INPUTS = ("tokens", "features", "log_size", "threshold")
OUTPUTS = ("kept_tokens", "kept_log_size", "kept_index", "assignment", "num_kept")
"""A node with a fixed capacity has all but the last."""
NUM_READ = 2
"""Outputs that a model reads: a function that computes the others too costs their nodes."""
NUM_SHOWN = 4
"""Outputs of a node whose decisions are shown."""
ATTRIBUTES = (
    "capacity",
    "max_tokens",
    "multiple_of",
    "num_prefix_tokens",
    "opt_tokens",
    "reduction",
    "selection",
)
"""In the order of the node's schema, which ONNX sorts by name."""
NAMING_ATTRIBUTES = {"plugin_namespace": "", "plugin_version": "2"}
"""By these TensorRT finds the plugin, and from 10.15 on takes it before a function of its name."""

MIN_OPSET, MAX_OPSET = 18, 23


@dataclasses.dataclass(frozen=True)
class BodyVariant:
    """What the text of the body depends on; one model needs one variant."""

    selection: str
    reduction: str
    fixed_capacity: bool
    num_prefix_tokens: int
    embed_dim: int
    multiple_of: int = 1
    in_float32: bool = True
    num_outputs: int = NUM_READ

    @classmethod
    def of(
        cls,
        config: PruneConfig,
        num_prefix_tokens: int,
        embed_dim: int,
        precision: str = "fp32",
        num_outputs: int = NUM_READ,
    ) -> BodyVariant:
        return cls(
            config.selection,
            config.reduction,
            bool(config.capacities),
            num_prefix_tokens,
            embed_dim,
            config.multiple_of,
            precision == "fp32",
            num_outputs,
        )


def count_outputs(fixed_capacity: bool) -> int:
    """Return how many outputs the operator has: its size tensor is one where it has it."""
    return len(OUTPUTS) - fixed_capacity


def build_function(variant: BodyVariant, opset: int) -> onnx.FunctionProto:
    """Return the FunctionProto of `variant` for a model that imports `opset` (18 to 23)."""
    outputs = OUTPUTS[: variant.num_outputs]
    text = f"""
    <domain: "{DOMAIN}", opset_import: ["" : {opset}]>
    {OP_TYPE} <{", ".join(ATTRIBUTES)}> ({", ".join(INPUTS)}) => ({", ".join(outputs)})
    {{ {"".join(_steps(variant))} }}
    """
    function = onnx.parser.parse_function(text)
    function.doc_string = (
        "Folds patch tokens that are nearly the same into one another; "
        f"selection {variant.selection}, reduction {variant.reduction}, "
        f"{'fixed capacity' if variant.fixed_capacity else 'data-dependent token count'}."
    )
    for node in function.node:
        node.name = f"{node.op_type}_{node.output[0]}"
    return function


def _steps(variant: BodyVariant) -> list[str]:
    if variant.selection == "pairs" and not variant.fixed_capacity:
        return _steps_of_dynamic_pairs(variant)
    pairs, merges = variant.selection == "pairs", variant.reduction == "merge"
    steps = [
        _constants(variant, row_behind=not pairs),
        _WIDE if variant.in_float32 else _WIDE_OF_16_BITS,
        _NORM,
        _SIZES,
        _UNIT if pairs else _UNIT_WITH_ROW_BEHIND,
    ]
    if pairs:
        steps += [_SIMILARITY, _PAIRS_OF_FIXED_COUNT]
        steps.append(_even_slot(variant.num_prefix_tokens) + _PAIR_SLOTS)
    else:
        steps += [_SCORES, _HIGHEST_GO if variant.fixed_capacity else _HIGH_GO, _PATCH_SLOTS]
    steps.append(_ROWS)
    if variant.fixed_capacity:
        steps.append(_FIXED_COUNT)
    else:
        steps += [_DEST_SUMMED, *_count(variant)]
    steps += [_COMPACT, _PAIR_MEMBERS if pairs else _PATCH_MEMBERS]
    if merges:
        steps += [_WEIGHTED, _MERGE_PAIRS if pairs else _MERGE_PATCHES]
        steps += [_GATHERED, _MEAN]
        steps.append(_MEAN_IN_FLOAT32 if variant.in_float32 else _MEAN_ROUNDED)
    else:
        steps += [_UNWEIGHTED, _DROP_PAIRS if pairs else _DROP_PATCHES, _HEAD]
    steps.append(_LOG_SIZES)
    if variant.num_outputs > NUM_READ:
        steps += [_PAIR_INDEX if pairs else _PATCH_INDEX, _NUM_INPUTS, _ASSIGNED_COUNT]
        steps += [_PAIR_ASSIGNMENT if pairs else _PATCH_ASSIGNMENT, _ASSIGNMENT]
    return steps


def _steps_of_dynamic_pairs(variant: BodyVariant) -> list[str]:
    """Return the steps of "pairs" with dynamic counts, whose rows stay in their order."""
    steps = [
        _constants(variant, row_behind=True),
        _paired_constants(variant),
        _WIDE if variant.in_float32 else _WIDE_OF_16_BITS,
        _NORM,
        _PAIRED_UNIT,
        _PAIRED_SIMILARITY,
        _PAIRED_VALIDITY,
        _PARTNERS,
        _GOES,
        _PAIRED_SLOTS,
        *_paired_count(variant),
        _PAIRED_ROWS,
        _PAIRED_MEMBERS,
    ]
    if variant.reduction == "merge":
        steps += [_PAIRED_WEIGHTED, _PAIRED_MERGE, _MEAN]
        steps.append(_MEAN_IN_FLOAT32 if variant.in_float32 else _MEAN_ROUNDED)
    else:
        steps.append(_PAIRED_DROP)
    steps.append(_LOG_SIZES)
    if variant.num_outputs > NUM_READ:
        steps += [_NUM_INPUTS, _PAIRED_INDEX, _PAIRED_ASSIGNMENT]
    return steps


def _paired_count(variant: BodyVariant) -> list[str]:
    """Return the steps from `dest` to where the slots end, and to K where it is asked for."""
    shows_count = variant.num_outputs == len(OUTPUTS)
    if variant.multiple_of != 1:
        steps = [_PAIRED_COUNT_NEEDED, _ROUNDED_UP, _PAIRED_COUNT_END]
    else:
        steps = [_PAIRED_END, *([_PAIRED_COUNT] if shows_count else [])]
    return steps + ([_NUM_KEPT] if shows_count else [])


def _count(variant: BodyVariant) -> list[str]:
    """Return the steps from `slot_numbers` to K, as the variant wants it."""
    steps = [_COUNT] if variant.multiple_of == 1 else [_COUNT_NEEDED, _ROUNDED_UP, _COUNT_END]
    return steps + ([_NUM_KEPT] if variant.num_outputs == len(OUTPUTS) else [])


# Each step below reads names of the steps before it. Shapes are in the comments; B is the batch,
# N the tokens, P the prefix, M the patches, K the slots. Rows are the tokens between a row of zeros
# in front, row 0, and one behind, which is even or odd as M says: E even rows, O odd ones, of M + 1
# patch rows in all. C is D + 1: the channels and the size.


def _constants(variant: BodyVariant, row_behind: bool) -> str:
    prefix, multiple_of = variant.num_prefix_tokens, variant.multiple_of
    first_unit = prefix if variant.in_float32 else 0  # the first patch's row of `unit`
    ints = {
        "i_zero": [0],
        "i_one": [1],
        "i_two": [2],
        "i_last": [-1],
        "i_end": [2**31 - 1],
        "i_prefix": [prefix],
        "i_even_unit": [first_unit],
        "i_odd_unit": [first_unit + 1],
        "i_front": [prefix + 1],  # rows before the patches: zeros and the prefix
        "i_second": [prefix + 2],
        "i_axes": [0, 1],
        "limit_shape": [-1, 1, 1],
        "behind": [0, 0, 0, 0, 1, 0],
        "around": [0, 1, 0, 0, int(row_behind), 0],
        "around_and_size": [0, 1, 0, 0, int(row_behind), 1],
        "sums_and_sizes": [variant.embed_dim, 1],
        "i_column": [0, -1, 1],
        "i_row": [0, 1, -1],
        "i_multiple": [multiple_of],
        "i_multiple_less_one": [multiple_of - 1],
    }
    scalars = {
        "s_zero": 0,
        "s_one": 1,
        "s_two": 2,
        "s_prefix": prefix,
        "s_prefix_less_one": prefix - 1,
        "s_no_slot": -1,
    }
    floats = {
        "f_zero": "0.0",
        "f_one": "1.0",
        "f_norm_floor": "1e-12",
        "f_pad": f"{PAD_LOG_SIZE}",
        "f_never": "-4.0",  # the similarity of what cannot be a partner
        "f_least": "-2.0",  # a threshold that all partners reach, and nothing without one
        "f_last": "-8.0",  # the score of what cannot go
        "f_tiny": "1e-30",
    }
    lines = [_int_constant(name, values) for name, values in ints.items()]
    lines += [f"{n} = Constant <value = int64 {{{value}}}> ()" for n, value in scalars.items()]
    lines += [f"{n} = Constant <value = float {{{value}}}> ()" for n, value in floats.items()]
    return "\n".join(lines)


def _int_constant(name: str, values: list[int]) -> str:
    return f"{name} = Constant <value = int64[{len(values)}] {{{', '.join(map(str, values))}}}> ()"


def _paired_constants(variant: BodyVariant) -> str:
    """Return what dynamic pairs have besides: where rows of zeros stand, and where slices begin.

    One or two rows of zeros in front make an even number with the prefix, so that the first patch
    is in an even row.
    """
    prefix = variant.num_prefix_tokens
    zeros = 2 - prefix % 2
    front = zeros + prefix
    width = variant.embed_dim + 1 if variant.reduction == "merge" else 1  # sums, or sizes alone
    ints = {
        "i_zeros": [zeros],
        "i_first": [front],
        "i_first_odd": [front + 1],
        "i_before_two": [-2],
        "i_each": [1, 1, 1],
        "around_rows": [0, zeros, 0, 0, 2, 0],
        "around_rows_and_size": [0, zeros, 0, 0, 2, 1],
        "around_patches": [0, front, 0, 0, 1, 0],
        "around_gains": [0, front // 2, width, 0, 1, 0],
        "rows_of_gains": [0, -1, width],
        "of_stays": [1, 1, 0],
        "of_gone": [0, 1, 0],
    }
    lines = [_int_constant(name, values) for name, values in ints.items()]
    lines.append(f"f_half_pad = Constant <value = float {{{PAD_LOG_SIZE / 2}}}> ()")
    return "\n" + "\n".join(lines)


# unit float[B, N + 1, F], the last row zero; in 16 bits only the patches' rows, float[B, M + 1, F]:
# ONNX Runtime's CPU provider takes a Cast to 16 bits and one back for nothing, and would compare
# numbers that were never rounded, unless something stands between. sizes float[B, N + 2, 1] with a
# zero in front and behind; valid bool, the same. (The size of padding, e to the PAD, is 0.) With
# pairs of a fixed count there is no row behind, and no padding.
_WIDE = """
    wide = Cast <to = 1> (features)
"""
_WIDE_OF_16_BITS = """
    patch_features = Slice (features, i_prefix, i_end, i_one)
    wide = Cast <to = 1> (patch_features)
"""
_NORM = """
    norm = ReduceL2 <keepdims = 1> (wide, i_last)
    safe_norm = Max (norm, f_norm_floor)
"""
_SIZES = """
    log_column = Unsqueeze (log_size, i_two)
    token_sizes = Exp (log_column)
    sizes = Pad (token_sizes, around)
"""
_UNIT = """
    unit = Div (wide, safe_norm)
"""
_UNIT_WITH_ROW_BEHIND = """
    unit_rows = Div (wide, safe_norm)
    unit = Pad (unit_rows, behind)
    valid = Greater (sizes, f_zero)
"""

# Of "pairs" with a fixed count. similarity float[B, E, O]
_SIMILARITY = """
    even_unit = Slice (unit, i_even_unit, i_end, i_one, i_two)
    odd_unit = Slice (unit, i_odd_unit, i_end, i_one, i_two)
    odd_unit_turned = Transpose <perm = [0, 2, 1]> (odd_unit)
    similarity = MatMul (even_unit, odd_unit_turned)
"""

# best float[B, E, 1] and partner int64[B, E, 1]: every even row's most similar odd one. stays, and
# below, bool[B, E, 1]: it does not go. A model with fixed counts has no padding. By rank: the
# (M - capacity) most alike go, the lower number first among equals.
_PAIRS_OF_FIXED_COUNT = """
    num_odd = Shape <start = 1, end = 2> (odd_unit)
    best = ReduceMax <keepdims = 1> (similarity, i_last)
    partner = ArgMax <axis = 2, keepdims = 1> (similarity)
    capacity_scalar = Constant <value_int : int = @capacity> ()
    num_even = Shape <start = 1, end = 2> (even_unit)
    num_patches = Add (num_even, num_odd)
    excess = Sub (num_patches, capacity_scalar)
    ranked_values, ranked_index = TopK <axis = 1, largest = 1, sorted = 1> (best, num_even)
    pair_shape_of = Shape (best)
    pair_ones = ConstantOfShape <value = int64[1] {1}> (pair_shape_of)
    ranks = CumSum <exclusive = 1> (pair_ones, s_one)
    rank_goes = Less (ranks, excess)
    rank_counts = Where (rank_goes, s_one, s_two)
    pair_counts = ScatterElements <axis = 1> (pair_ones, ranked_index, rank_counts)
    stays = Greater (pair_counts, s_one)
    below = Identity (stays)
"""


def _even_slot(prefix: int) -> str:
    """Slots count from 1, and the first even patch's is P + 1 where it stays."""
    if prefix == 1:  # a node less
        return "even_slot = CumSum (pair_counts, s_one)"
    return """
    pair_ends = CumSum (pair_counts, s_one)
    even_slot = Add (pair_ends, s_prefix_less_one)
    """


# patch_dest int64[B, M + 1, 1]: the slot of each patch row, even ones first; 0 where none stays
_PAIR_SLOTS = """
    even_dest = Where (stays, even_slot, s_zero)
    odd_slot_of_all = Add (even_slot, s_one)
    odd_slot = Slice (odd_slot_of_all, i_zero, num_odd, i_one)
    patch_dest = Concat <axis = 1> (even_dest, odd_slot)
"""

# Of "redundancy": patches in their own order, with the row of zeros behind them (M + 1 of them).
# score float[B, M + 1, 1]
_SCORES = """
    patch_unit_any = Slice (unit, i_even_unit, i_end, i_one)
    patch_valid = Slice (valid, i_front, i_end, i_one)
    patch_valid_f = Cast <to = 1> (patch_valid)
    patch_unit = Mul (patch_unit_any, patch_valid_f)
    sum_unit = ReduceSum <keepdims = 1> (patch_unit, i_one)
    with_all = Mul (patch_unit, sum_unit)
    total_similarity = ReduceSum <keepdims = 1> (with_all, i_last)
    squares = Mul (patch_unit, patch_unit)
    own_similarity = ReduceSum <keepdims = 1> (squares, i_last)
    others_similarity = Sub (total_similarity, own_similarity)
    num_valid_f = ReduceSum <keepdims = 1> (patch_valid_f, i_one)
    num_others = Sub (num_valid_f, f_one)
    safe_num_others = Max (num_others, f_one)
    score = Div (others_similarity, safe_num_others)
    num_rows = Shape <start = 1, end = 2> (patch_unit)
    patch_shape = Shape (score)
    patch_ones = ConstantOfShape <value = int64[1] {1}> (patch_shape)
    patch_numbers = CumSum <exclusive = 1> (patch_ones, s_one)
"""
_HIGH_GO = """
    limit = Reshape (threshold, limit_shape)
    reached = GreaterOrEqual (score, limit)
    unreached = Not (reached)
    unlike = And (unreached, patch_valid)
    unlike_i = Cast <to = 7> (unlike)
    any_unlike = ReduceMax <keepdims = 1> (unlike_i, i_one)
    none_unlike = Less (any_unlike, s_one)
    out_of_range = Constant <value = float {8.0}> ()
    score_of_valid = Where (patch_valid, score, out_of_range)
    least = ArgMin <axis = 1, keepdims = 1> (score_of_valid)
    is_least = Equal (patch_numbers, least)
    saved = And (is_least, none_unlike)
    not_saved = Not (saved)
    goes = And (reached, not_saved)
"""
_HIGHEST_GO = """
    capacity_scalar = Constant <value_int : int = @capacity> ()
    patch_valid_i = Cast <to = 7> (patch_valid)
    num_valid = ReduceSum <keepdims = 1> (patch_valid_i, i_one)
    excess = Sub (num_valid, capacity_scalar)
    ranked = Where (patch_valid, score, f_last)
    ranked_values, ranked_index = TopK <axis = 1, largest = 1, sorted = 1> (ranked, num_rows)
    rank_goes = Less (patch_numbers, excess)
    rank_goes_i = Cast <to = 7> (rank_goes)
    goes_i = ScatterElements <axis = 1> (patch_ones, ranked_index, rank_goes_i)
    goes = Cast <to = 9> (goes_i)
"""
_PATCH_SLOTS = """
    gone_not = Not (goes)
    stays = And (gone_not, patch_valid)
    stays_i = Cast <to = 7> (stays)
    stay_counts = CumSum (stays_i, s_one)
    patch_slot = Add (stay_counts, s_prefix)
    patch_dest = Where (stays, patch_slot, s_zero)
"""

# Row numbers 0, 1, 2, ...; the first P + 1 go to where they are. Even patch rows come before odd.
_ROWS = """
    rows_shape = Shape (sizes)
    row_ones = ConstantOfShape <value = int64[1] {1}> (rows_shape)
    row_numbers = CumSum <exclusive = 1> (row_ones, s_one)
    no_rows = ConstantOfShape <value = int64[1] {0}> (rows_shape)
    front_dest = Slice (row_numbers, i_zero, i_front, i_one)
    dest = Concat <axis = 1> (front_dest, patch_dest)
"""

# slots_end int64[1]: K + 1
_FIXED_COUNT = """
    fixed_capacity = Constant <value_int : int = @capacity> ()
    fixed_count = Reshape (fixed_capacity, i_last)
    slots_end = Add (fixed_count, i_front)
"""
# (A sum along an axis of length 1 changes nothing: TensorRT-RTX lets a size depend on the data
# where it comes out of a loop, which a CumSum is to it, and otherwise takes small tensors for
# shapes that it must know.)
_DEST_SUMMED = """
    slot_numbers = CumSum (dest, s_two)
"""
_COUNT = """
    slots = ReduceMax <keepdims = 0> (slot_numbers, i_axes)
    slots_end = Add (slots, i_one)
"""
_COUNT_NEEDED = """
    slots_needed = ReduceMax <keepdims = 0> (slot_numbers, i_axes)
"""
_ROUNDED_UP = """
    slots_raised = Add (slots_needed, i_multiple_less_one)
    multiples = Div (slots_raised, i_multiple)
    slots_rounded = Mul (multiples, i_multiple)
    most_slots = Shape <start = 1, end = 2> (tokens)
    slots = Min (slots_rounded, most_slots)
"""
_COUNT_END = """
    slots_end = Add (slots, i_one)
"""
_NUM_KEPT = """
    num_kept = Squeeze (slots)
"""

# rows int64[B, K, 1]: the row that heads each slot, 0 for padding
_COMPACT = """
    slot_rows = ScatterElements <axis = 1> (no_rows, dest, row_numbers)
    rows = Slice (slot_rows, i_one, slots_end, i_one)
"""

# members float[B, heads, members]: 1 where a patch (column) goes to a head (row). (TensorRT-RTX has
# OneHot for constant depths only.)
_PAIR_MEMBERS = """
    going_to = Where (below, s_no_slot, partner)
    going_to_row = Transpose <perm = [0, 2, 1]> (going_to)
    head_numbers = Slice (row_numbers, i_zero, num_odd, i_one)
    is_member = Equal (head_numbers, going_to_row)
    members = Cast <to = 1> (is_member)
"""
_PATCH_MEMBERS = """
    patch_unit_turned = Transpose <perm = [0, 2, 1]> (patch_unit)
    similarity = MatMul (patch_unit, patch_unit_turned)
    head_gap = Where (stays, f_zero, f_never)
    head_gap_row = Transpose <perm = [0, 2, 1]> (head_gap)
    head_similarity = Add (similarity, head_gap_row)
    head = ArgMax <axis = 2, keepdims = 1> (head_similarity)
    going_to = Where (goes, head, s_no_slot)
    going_to_row = Transpose <perm = [0, 2, 1]> (going_to)
    is_member = Equal (patch_numbers, going_to_row)
    members = Cast <to = 1> (is_member)
"""

# Tokens times their sizes, and the sizes: weighted float[B, N + 2, C]; source: of every row
_WEIGHTED = """
    wide_tokens = Cast <to = 1> (tokens)
    framed = Pad (wide_tokens, around_and_size, f_one)
    weighted = Mul (framed, sizes)
    front = Slice (weighted, i_zero, i_front, i_one)
"""
_MERGE_PAIRS = """
    even = Slice (weighted, i_front, i_end, i_one, i_two)
    odd = Slice (weighted, i_second, i_end, i_one, i_two)
    gained = MatMul (members, even)
    merged = Add (odd, gained)
    source = Concat <axis = 1> (front, even, merged)
"""
_MERGE_PATCHES = """
    patches = Slice (weighted, i_front, i_end, i_one)
    gained = MatMul (members, patches)
    merged = Add (patches, gained)
    source = Concat <axis = 1> (front, merged)
"""
_GATHERED = """
    slots_weighted = GatherND <batch_dims = 1> (source, rows)
"""
_MEAN = """
    slot_sums, slot_sizes = Split <axis = 2> (slots_weighted, sums_and_sizes)
    slot_divisors = Max (slot_sizes, f_tiny)
"""
_MEAN_IN_FLOAT32 = """
    kept_tokens = Div (slot_sums, slot_divisors)
"""
_MEAN_ROUNDED = """
    slot_means = Div (slot_sums, slot_divisors)
    kept_tokens = CastLike (slot_means, tokens)
"""


# Tokens as they are, and their sizes apart
_UNWEIGHTED = """
    framed = Pad (tokens, around)
    front = Slice (framed, i_zero, i_front, i_one)
    front_sizes = Slice (sizes, i_zero, i_front, i_one)
"""
_DROP_PAIRS = """
    even = Slice (framed, i_front, i_end, i_one, i_two)
    odd = Slice (framed, i_second, i_end, i_one, i_two)
    source = Concat <axis = 1> (front, even, odd)
    even_sizes = Slice (sizes, i_front, i_end, i_one, i_two)
    odd_sizes = Slice (sizes, i_second, i_end, i_one, i_two)
    gained_sizes = MatMul (members, even_sizes)
    merged_sizes = Add (odd_sizes, gained_sizes)
    source_sizes = Concat <axis = 1> (front_sizes, even_sizes, merged_sizes)
"""
_DROP_PATCHES = """
    patches = Slice (framed, i_front, i_end, i_one)
    source = Concat <axis = 1> (front, patches)
    patch_sizes = Slice (sizes, i_front, i_end, i_one)
    gained_sizes = MatMul (members, patch_sizes)
    merged_sizes = Add (patch_sizes, gained_sizes)
    source_sizes = Concat <axis = 1> (front_sizes, merged_sizes)
"""
_HEAD = """
    kept_tokens = GatherND <batch_dims = 1> (source, rows)
    slot_sizes = GatherND <batch_dims = 1> (source_sizes, rows)
"""

_LOG_SIZES = """
    slot_log_sizes = ReduceLogSum <keepdims = 0> (slot_sizes, i_two)
    kept_log_size = Max (slot_log_sizes, f_pad)
"""

# From rows back to positions, and from slots to assignments. Only where a node names them: a
# runtime computes what nobody reads too.
_PAIR_INDEX = """
    row_behind_front = Sub (rows, i_front)
    num_even_rows = Shape <start = 1, end = 2> (even_unit)
    row_is_patch = GreaterOrEqual (row_behind_front, s_zero)
    row_is_odd = GreaterOrEqual (row_behind_front, num_even_rows)
    row_doubled = Mul (row_behind_front, s_two)
    position_if_even = Add (row_doubled, s_prefix)
    twice_even = Mul (num_even_rows, s_two)
    odd_shift = Sub (twice_even, s_one)
    position_if_odd = Sub (position_if_even, odd_shift)
    position_of_patch = Where (row_is_odd, position_if_odd, position_if_even)
    row_less_one = Sub (rows, s_one)
    position_in_front = Max (row_less_one, s_zero)
    position = Where (row_is_patch, position_of_patch, position_in_front)
    kept_index = Squeeze (position, i_two)
"""
_PATCH_INDEX = """
    row_less_one = Sub (rows, s_one)
    position = Max (row_less_one, s_zero)
    kept_index = Squeeze (position, i_two)
"""
_PAIR_ASSIGNMENT = """
    partner_slot = GatherElements <axis = 1> (odd_slot, partner)
    even_target = Where (below, even_slot, partner_slot)
    even_sizes_there = Slice (sizes, i_front, i_end, i_one, i_two)
    even_is_there = Greater (even_sizes_there, f_zero)
    even_assigned = Where (even_is_there, even_target, s_zero)
    split_assigned = Concat <axis = 1> (even_assigned, odd_slot)
    num_even_targets = Shape <start = 1, end = 2> (even_assigned)
    patch_numbers = Slice (row_numbers, i_zero, assigned_patches, i_one)
    patch_halves = Div (patch_numbers, s_two)
    patch_parity = Mod (patch_numbers, s_two)
    patch_shift = Mul (patch_parity, num_even_targets)
    patch_source = Add (patch_halves, patch_shift)
    patch_assigned = GatherElements <axis = 1> (split_assigned, patch_source)
"""
_PATCH_ASSIGNMENT = """
    head_slot = GatherElements <axis = 1> (patch_slot, head)
    patch_target = Where (goes, head_slot, patch_slot)
    every_assigned = Where (patch_valid, patch_target, s_zero)
    patch_assigned = Slice (every_assigned, i_zero, assigned_patches, i_one)
"""
_NUM_INPUTS = """
    num_inputs = Shape <start = 1, end = 2> (tokens)
"""
_ASSIGNED_COUNT = """
    assigned_patches = Sub (num_inputs, i_prefix)
"""
_ASSIGNMENT = """
    front_assigned = Slice (front_dest, i_one, i_end, i_one)
    assigned = Concat <axis = 1> (front_assigned, patch_assigned)
    assigned_slot = Sub (assigned, s_one)
    assignment = Squeeze (assigned_slot, i_two)
"""


# "pairs" with dynamic counts. Rows keep their order: one or two of zeros, the prefix (S in all, an
# even number), the patches, two of zeros; R in all. An even row and the odd one behind it are a
# pair; of pairs with a patch there are H. (Even rows are sliced without the last: where the last
# would be half a pair, it is one of zeros.) Patches alone are compared, so that nothing has to be
# kept from the prefix; it and all the rows in front of it get slots as if they stayed.

# unit float[B, M + 1 or N + 1, F], the last row zero; similarity float[B, H, H], odd rows first
_PAIRED_UNIT = """
    unit_rows = Div (wide, safe_norm)
    unit = Pad (unit_rows, behind)
"""
_PAIRED_SIMILARITY = """
    even_unit = Slice (unit, i_even_unit, i_last, i_one, i_two)
    odd_unit = Slice (unit, i_odd_unit, i_end, i_one, i_two)
    even_unit_turned = Transpose <perm = [0, 2, 1]> (even_unit)
    similarity = MatMul (odd_unit, even_unit_turned)
"""

# log_rows, sizes float and is_padding bool[B, R, 1]; rows of zeros are padding
_PAIRED_VALIDITY = """
    log_column = Unsqueeze (log_size, i_two)
    log_rows = Pad (log_column, around_rows, f_pad)
    sizes = Exp (log_rows)
    is_padding = LessOrEqual (log_rows, f_half_pad)
    even_padding = Slice (is_padding, i_first, i_before_two, i_one, i_two)
    odd_padding = Slice (is_padding, i_first_odd, i_last, i_one, i_two)
"""

# partner int64[B, 1, H]: every even row's most similar odd patch (TopK takes the lowest number on a
# tie), and best float[B, 1, H] how similar. goes bool[B, 1, H], of padding too. GreaterOrEqual is
# false at a threshold that is not a number, which a Max with one might drop; one below every
# similarity is raised, so that nothing goes without a partner.
_PARTNERS = """
    partner_similarity = Where (odd_padding, f_never, similarity)
    best, partner = TopK <axis = 1, largest = 1, sorted = 1> (partner_similarity, i_one)
"""
_GOES = """
    limit_is_low = Less (threshold, f_least)
    limit_row = Where (limit_is_low, f_least, threshold)
    limit = Reshape (limit_row, limit_shape)
    goes = GreaterOrEqual (best, limit)
"""

# Of S + 2 H + 1 rows, the last of which gets a slot behind all others: dest int64[.., 1], the slot
# from 0 on, and 0, which is nobody's, where there is none; row_numbers; and no_rows, zeros. The
# three are made side by side: each has one number a row, 1, 1 and 0 where it gets a slot, 0, 1 and
# 0 where not, and the sum of the rows before it times that number is what is wanted. (A Reshape
# launches nothing, unlike the Transpose that would do the same.)
_PAIRED_SLOTS = """
    goes_column = Reshape (goes, i_column)
    even_without_slot = Or (goes_column, even_padding)
    pairs_without_slot = Concat <axis = 2> (even_without_slot, odd_padding)
    patches_without_slot = Reshape (pairs_without_slot, i_column)
    without_slot = Pad (patches_without_slot, around_patches)
    each_row = Where (without_slot, of_gone, of_stays)
    rows_before = CumSum <exclusive = 1> (each_row, s_one)
    numbers = Mul (rows_before, each_row)
    dest, row_numbers, no_rows = Split <axis = 2> (numbers, i_each)
"""

# slots_end int64[1]: the slot of the row behind all others, in the image with the most
_PAIRED_END = """
    slots_end = ReduceMax <keepdims = 0> (dest, i_axes)
"""
_PAIRED_COUNT = """
    slots = Sub (slots_end, i_zeros)
"""
_PAIRED_COUNT_NEEDED = """
    last_slot = ReduceMax <keepdims = 0> (dest, i_axes)
    slots_needed = Sub (last_slot, i_zeros)
"""
_PAIRED_COUNT_END = """
    slots_end = Add (slots, i_zeros)
"""

# rows int64[B, K, 1]: the row that heads each slot. Slots of padding have row 0 or the last.
_PAIRED_ROWS = """
    slot_rows = ScatterElements <axis = 1> (no_rows, dest, row_numbers)
    rows = Slice (slot_rows, i_zeros, slots_end, i_one)
"""

# members float[B, H, H]: 1 where an even row (column) goes to an odd one (row), into zeros that
# take no shape from the host
_PAIRED_MEMBERS = """
    no_members = Sub (similarity, similarity)
    share = Cast <to = 1> (goes)
    members = ScatterElements <axis = 1> (no_members, partner, share)
"""

# Tokens times their sizes, and the sizes: weighted float[B, R, C]. What odd rows gain is gathered
# apart and added then: R is odd as often as even, so that rows and pairs of rows have no sum.
_PAIRED_WEIGHTED = """
    wide_tokens = Cast <to = 1> (tokens)
    framed = Pad (wide_tokens, around_rows_and_size, f_one)
    weighted = Mul (framed, sizes)
"""
_PAIRED_MERGE = """
    even = Slice (weighted, i_first, i_before_two, i_one, i_two)
    gained = MatMul (members, even)
    gained_pairs = Pad (gained, around_gains)
    gained_rows = Reshape (gained_pairs, rows_of_gains)
    slots_own = GatherND <batch_dims = 1> (weighted, rows)
    slots_gained = GatherND <batch_dims = 1> (gained_rows, rows)
    slots_weighted = Add (slots_own, slots_gained)
"""
_PAIRED_DROP = """
    source = Pad (tokens, around_rows)
    kept_tokens = GatherND <batch_dims = 1> (source, rows)
    even_sizes = Slice (sizes, i_first, i_before_two, i_one, i_two)
    gained_sizes = MatMul (members, even_sizes)
    gained_pairs = Pad (gained_sizes, around_gains)
    gained_rows = Reshape (gained_pairs, rows_of_gains)
    slots_own = GatherND <batch_dims = 1> (sizes, rows)
    slots_gained = GatherND <batch_dims = 1> (gained_rows, rows)
    slot_sizes = Add (slots_own, slots_gained)
"""

# Rows behind the tokens head slots of padding.
_PAIRED_INDEX = """
    row_behind_zeros = Sub (rows, i_zeros)
    position = Max (row_behind_zeros, s_zero)
    is_behind = GreaterOrEqual (position, num_inputs)
    position_or_zero = Where (is_behind, s_zero, position)
    kept_index = Squeeze (position_or_zero, i_two)
"""
_PAIRED_ASSIGNMENT = """
    even_dest = Slice (dest, i_first, i_last, i_one, i_two)
    odd_dest = Slice (dest, i_first_odd, i_end, i_one, i_two)
    partner_column = Reshape (partner, i_column)
    partner_slot = GatherElements <axis = 1> (odd_dest, partner_column)
    even_target = Where (goes_column, partner_slot, even_dest)
    even_assigned = Where (even_padding, s_zero, even_target)
    assigned_pairs = Concat <axis = 2> (even_assigned, odd_dest)
    assigned_patches = Reshape (assigned_pairs, i_column)
    front_assigned = Slice (dest, i_zeros, i_first, i_one)
    assigned_rows = Concat <axis = 1> (front_assigned, assigned_patches)
    assigned = Slice (assigned_rows, i_zero, num_inputs, i_one)
    assigned_slot = Sub (assigned, i_zeros)
    assigned_or_none = Max (assigned_slot, s_no_slot)
    assignment = Squeeze (assigned_or_none, i_two)
"""
