"""`SimilarityPrune` as an ONNX model-local function: the portable carrier of the operator.

The body is standard ONNX, so ONNX Runtime inlines it and TensorRT-RTX compiles it. It follows the
definition in :mod:`simprune_deploy.pruning.operator` step by step. What shaped it:

* N x N passes are what costs. Nothing but the Gram matrix, its comparison with the threshold and
  one matrix-vector product a round touches N x N numbers; the choice of a head and the merge work
  on the rows of the R pruned patches only, so a threshold that prunes nothing is nearly free.
* TensorRT-RTX wants a bound for every dimension: ranges of a data-dependent length are slices of a
  range of known length, and tensor names are unique over the whole body, subgraphs included.
* One function serves every prune layer of a model: numbers come as attributes, and what a model
  has one of (selection, reduction, dynamic or fixed capacity, prefix or none) picks the text.
"""

from __future__ import annotations

import dataclasses

import onnx
import onnx.parser

from simprune_deploy.pruning.config import PAD_LOG_SIZE, PruneConfig

DOMAIN = "simprune"
DOMAIN_VERSION = 1
OP_TYPE = "SimilarityPrune"
INPUTS = ("tokens", "log_size", "threshold")
OUTPUTS = ("kept_tokens", "kept_log_size", "kept_index", "assignment")
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

MIN_OPSET, MAX_OPSET = 18, 23


@dataclasses.dataclass(frozen=True)
class BodyVariant:
    """What the text of the body depends on; one model needs one variant."""

    selection: str
    reduction: str
    fixed_capacity: bool
    has_prefix: bool

    @classmethod
    def of(cls, config: PruneConfig, num_prefix_tokens: int) -> BodyVariant:
        return cls(
            config.selection, config.reduction, bool(config.capacities), num_prefix_tokens > 0
        )


def build_function(variant: BodyVariant, opset: int) -> onnx.FunctionProto:
    """Return the FunctionProto of `variant` for a model that imports `opset` (18 to 23)."""
    steps = [
        _PATCHES_WITH_PREFIX if variant.has_prefix else _PATCHES_WITHOUT_PREFIX,
        _SIMILARITY,
        _COVER if variant.selection == "cover" else _REDUNDANCY,
        _GIVE_UP if variant.fixed_capacity else _COUNT,
        _SLOTS,
        _PRUNED_ALL_ROWS if variant.fixed_capacity else _PRUNED_ROWS,
        _SIZES,
        _MERGE if variant.reduction == "merge" else _DROP,
        _JOIN_WITH_PREFIX if variant.has_prefix else _JOIN_WITHOUT_PREFIX,
    ]
    text = f"""
    <domain: "{DOMAIN}", opset_import: ["" : {opset}]>
    {OP_TYPE} <{", ".join(ATTRIBUTES)}> ({", ".join(INPUTS)}) => ({", ".join(OUTPUTS)})
    {{ {"".join(steps)} }}
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


# Each step below reads names of the steps before it. Shapes are in the comments; B is the batch,
# N the tokens, M the patches (N - P), K the slots for patches, R the largest number of pruned
# patches in an image.

_CONSTANTS = """
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()
    step_one = Constant <value_int = 1> ()
    start_zero = Constant <value_int = 0> ()
    f_zero = Constant <value_float = 0.0> ()
    f_half = Constant <value_float = 0.5> ()
    f_one = Constant <value_float = 1.0> ()
    num_tokens = Shape <start = 1, end = 2> (tokens)
"""

# patch_tokens T[B, M, D], patch_log_size float[B, M], prefix int64[1]
_PATCHES_WITH_PREFIX = (
    _CONSTANTS
    + """
    prefix_scalar = Constant <value_int : int = @num_prefix_tokens> ()
    prefix = Reshape (prefix_scalar, one)
    patch_tokens = Slice (tokens, prefix, num_tokens, one)
    patch_log_size = Slice (log_size, prefix, num_tokens, one)
    num_patches = Sub (num_tokens, prefix)
"""
)

_PATCHES_WITHOUT_PREFIX = (
    _CONSTANTS
    + """
    prefix = Identity (zero)
    patch_tokens = Identity (tokens)
    patch_log_size = Identity (log_size)
    num_patches = Identity (num_tokens)
"""
)

# similarity float[B, M, M], valid bool[B, M], valid_f float[B, M, 1], before bool[M, M] (j < i)
_SIMILARITY = f"""
    patches = Cast <to = 1> (patch_tokens)
    last_axis = Constant <value_ints = [-1]> ()
    norm = ReduceL2 <keepdims = 1> (patches, last_axis)
    norm_floor = Constant <value_float = 1e-12> ()
    safe_norm = Max (norm, norm_floor)
    features = Div (patches, safe_norm)
    features_transposed = Transpose <perm = [0, 2, 1]> (features)
    similarity = MatMul (features, features_transposed)
    limit_shape = Constant <value_ints = [-1, 1, 1]> ()
    limit = Reshape (threshold, limit_shape)
    half_pad = Constant <value_float = {PAD_LOG_SIZE / 2}> ()
    valid = Greater (patch_log_size, half_pad)
    valid_row = Cast <to = 1> (valid)
    valid_f = Unsqueeze (valid_row, two)
    num_patches_scalar = Squeeze (num_patches, zero)
    positions = Range (start_zero, num_patches_scalar, step_one)
    positions_column = Unsqueeze (positions, one)
    before = Less (positions, positions_column)
"""

# first_kept_f float[B, M]: 1 for a kept patch. "Kept iff no earlier kept patch is alike", applied
# to all patches at once. The first round finds those without any earlier alike patch: they are
# kept for certain. The second takes out what is alike those: what remains is possible. What is
# possible and not certain is open, usually little; further rounds run over that alone until
# nothing changes. (TensorRT-RTX needs the data-dependent size of the open part to come out of a
# loop.)
_COVER = """
    alike = GreaterOrEqual (similarity, limit)
    alike_before = And (alike, before)
    adjacency = Cast <to = 1> (alike_before)
    two_rounds = Constant <value_int = 2> ()
    go_on = Constant <value = bool {1}> ()
    certain, possible = Loop (two_rounds, go_on, valid_f, valid_f) <body = first_rounds (
        int64 first_round, bool first_go_on,
        float[cover_batch, cover_patches, 1] round_unused,
        float[cover_batch, cover_patches, 1] first_before
    ) => (
        bool first_changed,
        float[cover_batch, cover_patches, 1] first_kept_before,
        float[cover_batch, cover_patches, 1] first_after
    ) {
        first_kept_before = Identity (first_before)
        alike_count = MatMul (adjacency, first_before)
        none_alike = Less (alike_count, f_half)
        none_alike_f = Cast <to = 1> (none_alike)
        first_after = Mul (none_alike_f, valid_f)
        first_flips = Sub (first_after, first_before)
        first_flip_sizes = Abs (first_flips)
        first_largest_flip = ReduceMax <keepdims = 0> (first_flip_sizes)
        first_changed = Greater (first_largest_flip, f_half)
    }>
    open_column = Sub (possible, certain)
    open_row = Squeeze (open_column, two)
    certain_row = Squeeze (certain, two)
    open_count = ReduceSum <keepdims = 0> (open_row, one)
    most_open_f = ReduceMax <keepdims = 0> (open_count)
    most_open_safe = Max (most_open_f, f_one)
    most_open_scalar = Cast <to = 7> (most_open_safe)
    most_open = Reshape (most_open_scalar, one)
    open_values, open_index = TopK <axis = 1, largest = 1, sorted = 1> (open_row, most_open)
    open_patch = Unsqueeze (open_index, two)
    open_rows = GatherND <batch_dims = 1> (adjacency, open_patch)
    open_rows_turned = Transpose <perm = [0, 2, 1]> (open_rows)
    open_adjacency = GatherND <batch_dims = 1> (open_rows_turned, open_patch)
    is_open = Unsqueeze (open_values, one)
    round_limit = Add (num_patches_scalar, step_one)
    open_kept = Loop (round_limit, go_on, is_open) <body = cover_round (
        int64 round, bool round_go_on, float[cover_batch, 1, cover_open] kept_before
    ) => (
        bool round_changed, float[cover_batch, 1, cover_open] kept_after
    ) {
        conflicts = MatMul (kept_before, open_adjacency)
        no_conflict = Less (conflicts, f_half)
        no_conflict_f = Cast <to = 1> (no_conflict)
        kept_after = Mul (no_conflict_f, is_open)
        flips = Sub (kept_after, kept_before)
        flip_sizes = Abs (flips)
        largest_flip = ReduceMax <keepdims = 0> (flip_sizes)
        round_changed = Greater (largest_flip, f_half)
    }>
    open_kept_row = Squeeze (open_kept, one)
    certain_at_open = GatherElements <axis = 1> (certain_row, open_index)
    settled = Max (open_kept_row, certain_at_open)
    first_kept_f = ScatterElements <axis = 1> (certain_row, open_index, settled)
"""

# first_kept_f float[B, M]. The loop of one round changes nothing; TensorRT-RTX lets a size depend
# on the data if it comes out of a loop, and otherwise refuses it as a "shape tensor of type float".
_REDUNDANCY = """
    squares = Mul (features, features)
    own_similarity = ReduceSum <keepdims = 1> (squares, last_axis)
    total_similarity = MatMul (similarity, valid_f)
    others_similarity = Sub (total_similarity, own_similarity)
    num_valid = ReduceSum <keepdims = 1> (valid_f, one)
    num_others = Sub (num_valid, f_one)
    safe_num_others = Max (num_others, f_one)
    score_column = Div (others_similarity, safe_num_others)
    reached_column = GreaterOrEqual (score_column, limit)
    below_column = Not (reached_column)
    score = Squeeze (score_column, two)
    below = Squeeze (below_column, two)
    unlike = And (below, valid)
    unlike_f = Cast <to = 1> (unlike)
    unlike_count = ReduceSum <keepdims = 1> (unlike_f, one)
    none_unlike = Less (unlike_count, f_half)
    out_of_range = Constant <value_float = 8.0> ()
    score_of_valid = Where (valid, score, out_of_range)
    least = ArgMin <axis = 1, keepdims = 1> (score_of_valid)
    is_least = Equal (positions, least)
    valid_least = And (is_least, valid)
    saved = And (valid_least, none_unlike)
    redundancy_kept = Or (unlike, saved)
    redundancy_kept_f = Cast <to = 1> (redundancy_kept)
    one_round = Constant <value_int = 1> ()
    go_on = Constant <value = bool {1}> ()
    first_kept_f = Loop (one_round, go_on, redundancy_kept_f) <body = redundancy_round (
        int64 round, bool round_go_on, float[cover_batch, cover_patches] kept_before
    ) => (
        bool round_end, float[cover_batch, cover_patches] kept_after
    ) {
        round_end = Identity (round_go_on)
        kept_after = Identity (kept_before)
    }>
"""

# kept_f float[B, M], kept bool[B, M], num_slots int64[1] (K)
_COUNT = """
    kept_f = Identity (first_kept_f)
    kept = Greater (kept_f, f_half)
    kept_count = ReduceSum <keepdims = 0> (kept_f, one)
    most_kept_f = ReduceMax <keepdims = 0> (kept_count)
    most_kept_scalar = Cast <to = 7> (most_kept_f)
    most_kept = Reshape (most_kept_scalar, one)
    multiple_scalar = Constant <value_int : int = @multiple_of> ()
    multiple = Reshape (multiple_scalar, one)
    slots_needed = Add (most_kept, prefix)
    multiple_less_one = Sub (multiple, one)
    slots_raised = Add (slots_needed, multiple_less_one)
    multiples = Div (slots_raised, multiple)
    slots_rounded = Mul (multiples, multiple)
    slots_total = Min (slots_rounded, num_tokens)
    num_slots = Sub (slots_total, prefix)
"""

# The kept patches most similar to an earlier kept one leave first, until `capacity` stay.
_GIVE_UP = """
    first_kept = Greater (first_kept_f, f_half)
    first_kept_row = Unsqueeze (first_kept, one)
    kept_before_pair = And (before, first_kept_row)
    nothing_before = Constant <value_float = -4.0> ()
    similarity_before = Where (kept_before_pair, similarity, nothing_before)
    closest_before = ReduceMax <keepdims = 0> (similarity_before, last_axis)
    not_kept_score = Constant <value_float = -8.0> ()
    leave_score = Where (first_kept, closest_before, not_kept_score)
    leave_values, leave_order = TopK <axis = 1, largest = 1, sorted = 1> (leave_score, num_patches)
    first_kept_count = ReduceSum <keepdims = 1> (first_kept_f, one)
    capacity_scalar = Constant <value_int : int = @capacity> ()
    num_slots = Reshape (capacity_scalar, one)
    capacity_f = Cast <to = 1> (num_slots)
    excess_f = Sub (first_kept_count, capacity_f)
    excess = Cast <to = 7> (excess_f)
    stays = GreaterOrEqual (positions, excess)
    stays_f = Cast <to = 1> (stays)
    stays_by_patch = ScatterElements <axis = 1> (first_kept_f, leave_order, stays_f)
    kept_f = Mul (stays_by_patch, first_kept_f)
    kept = Greater (kept_f, f_half)
"""

# slot_patch int64[B, K, 1]: the patch that heads each slot; filled float[B, K]
_SLOTS = """
    patches_left = Sub (num_patches, positions)
    zero_left = Sub (patches_left, patches_left)
    slot_key = Where (kept, patches_left, zero_left)
    slot_key_f = Cast <to = 1> (slot_key)
    slot_values, slot_patch_row = TopK <axis = 1, largest = 1, sorted = 1> (slot_key_f, num_slots)
    filled_bool = Greater (slot_values, f_half)
    filled = Cast <to = 1> (filled_bool)
    slot_patch = Unsqueeze (slot_patch_row, two)
    slot_log_size_read = GatherElements <axis = 1> (patch_log_size, slot_patch_row)
    slot_tokens_read = GatherND <batch_dims = 1> (patches, slot_patch)
    kept_up_to_here = CumSum (kept_f, step_one)
    rank_f = Sub (kept_up_to_here, f_one)
    rank = Cast <to = 7> (rank_f)
    keep_penalty_base = Sub (kept_f, f_one)
    f_four = Constant <value_float = 4.0> ()
    keep_penalty_row = Mul (keep_penalty_base, f_four)
    keep_penalty = Unsqueeze (keep_penalty_row, one)
    no_slot = Constant <value_int = -1> ()
    own_slot = Where (kept, rank, no_slot)
    all_slots = Slice (positions, zero, num_slots, zero)
    slots_column = Unsqueeze (all_slots, one)
    pruned_bool_not = Not (kept)
    pruned_bool = And (pruned_bool_not, valid)
    pruned_f = Cast <to = 1> (pruned_bool)
"""

# Of the R pruned patches of an image: member_tokens float[B, R, D], member_log_size float[B, R],
# is_member bool[B, R], member_slot int64[B, R]. Slots of all patches: slot_of_patch int64[B, M].
_PRUNED_ROWS = """
    pruned_count = ReduceSum <keepdims = 0> (pruned_f, one)
    most_pruned_f = ReduceMax <keepdims = 0> (pruned_count)
    most_pruned_safe = Max (most_pruned_f, f_one)
    most_pruned_scalar = Cast <to = 7> (most_pruned_safe)
    most_pruned = Reshape (most_pruned_scalar, one)
    pruned_values, member_index = TopK <axis = 1, largest = 1, sorted = 1> (pruned_f, most_pruned)
    is_member = Greater (pruned_values, f_half)
    member_row = Unsqueeze (member_index, two)
    member_similarity = GatherND <batch_dims = 1> (similarity, member_row)
    member_choice = Add (member_similarity, keep_penalty)
    member_head = ArgMax <axis = 2, keepdims = 0> (member_choice)
    member_head_slot = GatherElements <axis = 1> (rank, member_head)
    member_head_log_size = GatherElements <axis = 1> (patch_log_size, member_head)
    member_log_size = GatherElements <axis = 1> (patch_log_size, member_index)
    member_tokens = GatherND <batch_dims = 1> (patches, member_row)
    member_own_slot = GatherElements <axis = 1> (own_slot, member_index)
    member_slot = Where (is_member, member_head_slot, member_own_slot)
    slot_of_patch = ScatterElements <axis = 1> (own_slot, member_index, member_slot)
"""

# With a fixed capacity every shape is static, so every patch is taken for a possible member.
_PRUNED_ALL_ROWS = """
    is_member = Identity (pruned_bool)
    member_choice = Add (similarity, keep_penalty)
    member_head = ArgMax <axis = 2, keepdims = 0> (member_choice)
    member_head_slot = GatherElements <axis = 1> (rank, member_head)
    member_head_log_size = GatherElements <axis = 1> (patch_log_size, member_head)
    member_log_size = Identity (patch_log_size)
    member_tokens = Identity (patches)
    member_slot = Where (is_member, member_head_slot, own_slot)
    slot_of_patch = Identity (member_slot)
"""

# member_of float[B, K, R]; relative_size float[B, R] = size / size of its head;
# others float[B, K] = sum of those, so a slot's size is its head's times (1 + others)
_SIZES = f"""
    member_slot_row = Unsqueeze (member_slot, one)
    in_slot = Equal (member_slot_row, slots_column)
    log_ratio = Sub (member_log_size, member_head_log_size)
    ratio = Exp (log_ratio)
    relative_size = Where (is_member, ratio, f_zero)
    relative_row = Unsqueeze (relative_size, one)
    weight_of = Where (in_slot, relative_row, f_zero)
    others_column = ReduceSum <keepdims = 1> (weight_of, last_axis)
    growth_column = Add (others_column, f_one)
    growth = Squeeze (growth_column, two)
    log_growth = Log (growth)
    slot_log_size_grown = Add (slot_log_size_read, log_growth)
    pad_log_size = Constant <value_float = {PAD_LOG_SIZE}> ()
    slot_log_size = Where (filled_bool, slot_log_size_grown, pad_log_size)
    filled_column = Unsqueeze (filled, two)
"""

_MERGE = """
    share_of = Div (weight_of, growth_column)
    shares = MatMul (share_of, member_tokens)
    own_share = Div (slot_tokens_read, growth_column)
    slot_tokens_merged = Add (own_share, shares)
    slot_tokens_f = Mul (slot_tokens_merged, filled_column)
"""

_DROP = """
    slot_tokens_f = Mul (slot_tokens_read, filled_column)
"""

_JOIN_WITH_PREFIX = """
    slot_tokens = CastLike (slot_tokens_f, tokens)
    prefix_tokens = Slice (tokens, zero, prefix, one)
    kept_tokens = Concat <axis = 1> (prefix_tokens, slot_tokens)
    prefix_log_size = Slice (log_size, zero, prefix, one)
    kept_log_size = Concat <axis = 1> (prefix_log_size, slot_log_size)
    prefix_positions = Range (start_zero, prefix_scalar, step_one)
    prefix_row = Unsqueeze (prefix_positions, zero)
    batch_size = Shape <start = 0, end = 1> (tokens)
    prefix_shape = Concat <axis = 0> (batch_size, prefix)
    prefix_index = Expand (prefix_row, prefix_shape)
    filled_int = Cast <to = 7> (filled_bool)
    slot_patch_shifted = Add (slot_patch_row, prefix)
    slot_index = Mul (slot_patch_shifted, filled_int)
    kept_index = Concat <axis = 1> (prefix_index, slot_index)
    has_slot = GreaterOrEqual (slot_of_patch, start_zero)
    shifted_slot = Add (slot_of_patch, prefix)
    patch_assignment = Where (has_slot, shifted_slot, no_slot)
    assignment = Concat <axis = 1> (prefix_index, patch_assignment)
"""

_JOIN_WITHOUT_PREFIX = """
    kept_tokens = CastLike (slot_tokens_f, tokens)
    kept_log_size = Identity (slot_log_size)
    filled_int = Cast <to = 7> (filled_bool)
    kept_index = Mul (slot_patch_row, filled_int)
    assignment = Identity (slot_of_patch)
"""
