#include "problem.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <limits>

#include "tile.h"

namespace simprune {
namespace {

constexpr size_t kAlignment = 256;
constexpr int kSmall = SmallTile::kRows, kLarge = LargeTile::kRows;
static_assert(kSmall == SmallTile::kColumns && kLarge == LargeTile::kColumns, "tiles are square");
constexpr size_t kNarrow = 256;  // bytes of features up to which sources stay in shared memory

thread_local char error_text[512] = "";

size_t aligned(size_t bytes) {
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

size_t element_size(int32_t dtype) {
    return dtype == SIMPRUNE_FLOAT32 ? 4 : 2;
}

// As in tensor_core.h
bool has_tensor_cores(int32_t dtype, int sm) {
    return dtype != SIMPRUNE_FLOAT32 && (sm >= 80 || (sm == 75 && dtype == SIMPRUNE_FLOAT16));
}

bool on_bytes(const void* pointer, size_t bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

long long number(int64_t value) {
    return static_cast<long long>(value);
}

}  // namespace

int fail(simprune_status status, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(error_text, sizeof error_text, format, arguments);
    va_end(arguments);
    return status;
}

int check_problem(const simprune_problem* problem) {
    if (problem == nullptr) return fail(SIMPRUNE_BAD_PROBLEM, "the problem is NULL");
    const simprune_problem& p = *problem;
    const int64_t patches = p.num_tokens - p.num_prefix_tokens;
    if (p.dtype < SIMPRUNE_FLOAT32 || p.dtype > SIMPRUNE_BFLOAT16) {
        return fail(SIMPRUNE_BAD_PROBLEM, "dtype %d is not one of float32 (0), float16 (1), bfloat16 (2)", p.dtype);
    }
    if (p.selection != SIMPRUNE_PAIRS && p.selection != SIMPRUNE_REDUNDANCY) {
        return fail(SIMPRUNE_BAD_PROBLEM, "selection %d is not one of pairs (0), redundancy (1)", p.selection);
    }
    if (p.reduction != SIMPRUNE_MERGE && p.reduction != SIMPRUNE_DROP) {
        return fail(SIMPRUNE_BAD_PROBLEM, "reduction %d is not one of merge (0), drop (1)", p.reduction);
    }
    if (p.batch < 1) return fail(SIMPRUNE_BAD_PROBLEM, "batch %lld: give at least one image", number(p.batch));
    if (p.dim < 1 || p.dim > std::numeric_limits<int32_t>::max() / 2) {
        return fail(SIMPRUNE_BAD_PROBLEM, "tokens have %lld dimensions: at least 1 is needed", number(p.dim));
    }
    if (p.feature_dim < 1 || p.feature_dim > std::numeric_limits<int32_t>::max() / 2) {
        return fail(SIMPRUNE_BAD_PROBLEM, "features have %lld dimensions: at least 1 is needed", number(p.feature_dim));
    }
    if (p.num_prefix_tokens < 0) {
        return fail(SIMPRUNE_BAD_PROBLEM, "num_prefix_tokens %d must be 0 or more", p.num_prefix_tokens);
    }
    if (patches < 1) {
        return fail(
            SIMPRUNE_BAD_PROBLEM, "num_prefix_tokens %d leaves no patches among %lld tokens", p.num_prefix_tokens,
            number(p.num_tokens));
    }
    if (patches > SIMPRUNE_MAX_PATCHES) {
        return fail(
            SIMPRUNE_BAD_PROBLEM,
            "%lld patches are more than the %d that the kernels hold: use smaller images, or the ONNX function in "
            "place of the plugin",
            number(patches), SIMPRUNE_MAX_PATCHES);
    }
    if (p.capacity < 0 || p.capacity > patches) {
        return fail(
            SIMPRUNE_BAD_PROBLEM,
            "capacity %lld is outside [0, %lld] patches: give the number that every image keeps, or 0 for as many as "
            "it needs",
            number(p.capacity), number(patches));
    }
    if (p.selection == SIMPRUNE_PAIRS && p.capacity > 0 && p.capacity < patches / 2) {
        return fail(
            SIMPRUNE_BAD_PROBLEM,
            "capacity %lld is below the %lld of %lld patches that a layer of pairs keeps at least: give %lld or more, "
            "or another layer behind this one",
            number(p.capacity), number(patches / 2), number(patches), number(patches / 2));
    }
    if (p.multiple_of < 1 || p.multiple_of > std::numeric_limits<int32_t>::max()) {
        return fail(SIMPRUNE_BAD_PROBLEM, "multiple_of %lld must be 1 or more", number(p.multiple_of));
    }
    if (p.num_thresholds != 1 && p.num_thresholds != p.batch) {
        return fail(
            SIMPRUNE_BAD_PROBLEM, "%lld thresholds for %lld images: give 1, or one an image", number(p.num_thresholds),
            number(p.batch));
    }
    if (p.num_tokens > std::numeric_limits<int32_t>::max() / 2) {
        return fail(SIMPRUNE_BAD_PROBLEM, "%lld tokens are too many", number(p.num_tokens));
    }
    // Blocks are counted in 31 bits
    const int64_t blocks = (p.num_tokens + kSlotsPerBlock - 1) / kSlotsPerBlock + (patches / kSmall + 1) * kMaxSplits;
    if (p.batch > std::numeric_limits<int32_t>::max() / blocks) {
        return fail(
            SIMPRUNE_BAD_PROBLEM, "%lld images of %lld tokens are too many for one call", number(p.batch),
            number(p.num_tokens));
    }
    return SIMPRUNE_OK;
}

int check_buffers(
    const simprune_problem& problem, const simprune_buffers* buffers, const void* workspace, size_t workspace_bytes) {
    if (buffers == nullptr) return fail(SIMPRUNE_BAD_POINTER, "the buffers are NULL");
    const simprune_buffers& b = *buffers;
    const struct {
        const char* name;
        const void* pointer;
        size_t alignment;
    } all[] = {
        {"tokens", b.tokens, element_size(problem.dtype)},
        {"features", b.features, element_size(problem.dtype)},
        {"log_size", b.log_size, 4},
        {"threshold", b.threshold, 4},
        {"kept_tokens", b.kept_tokens, element_size(problem.dtype)},
        {"kept_log_size", b.kept_log_size, 4},
        {"kept_index", b.kept_index, 8},
        {"assignment", b.assignment, 8},
        {"workspace", workspace, kAlignment},
    };
    for (const auto& one : all) {
        if (one.pointer == nullptr) return fail(SIMPRUNE_BAD_POINTER, "the pointer to %s is NULL", one.name);
        if (!on_bytes(one.pointer, one.alignment)) {
            return fail(SIMPRUNE_BAD_POINTER, "%s is not aligned to %zu bytes", one.name, one.alignment);
        }
    }
    if (b.num_kept != nullptr && !on_bytes(b.num_kept, 4)) {
        return fail(SIMPRUNE_BAD_POINTER, "num_kept is not aligned to 4 bytes");
    }
    const size_t needed = Layout(problem).total;
    if (workspace_bytes < needed) {
        return fail(
            SIMPRUNE_BAD_POINTER, "a workspace of %zu bytes is too small: %zu are needed", workspace_bytes, needed);
    }
    return SIMPRUNE_OK;
}

Layout::Layout(const simprune_problem& problem) {
    const bool redundancy = problem.selection == SIMPRUNE_REDUNDANCY;
    const size_t batch = static_cast<size_t>(problem.batch);
    const size_t patches = static_cast<size_t>(problem.num_tokens - problem.num_prefix_tokens);
    const size_t sources = redundancy ? patches : (patches + 1) / 2;
    const size_t tiles = ((redundancy ? patches : patches / 2) + kSmall - 1) / kSmall;
    const size_t splits = std::max<size_t>(1, std::min<size_t>(tiles, kMaxSplits));

    most_kept = 0;
    kept = most_kept + aligned(sizeof(int32_t));
    slots = kept + aligned(batch * sizeof(int32_t));
    order = slots + aligned(batch * patches * sizeof(Slot));
    best = order + aligned(batch * patches * sizeof(uint16_t));
    stays = best + aligned(batch * splits * sources * sizeof(uint64_t));
    sum = stays + (redundancy ? aligned(batch * patches) : 0);
    total = sum + (redundancy ? aligned(batch * static_cast<size_t>(problem.feature_dim) * sizeof(float)) : 0);
}

Job make_job(const simprune_problem& problem, const simprune_buffers& buffers, void* workspace, const Gpu& gpu) {
    const size_t feature_bytes = static_cast<size_t>(problem.feature_dim) * element_size(problem.dtype);
    Job job{};
    job.batch = problem.batch;
    job.num_tokens = static_cast<int>(problem.num_tokens);
    job.prefix = problem.num_prefix_tokens;
    job.num_patches = job.num_tokens - job.prefix;
    job.words = (job.num_patches + kWarp - 1) / kWarp;
    job.dim = static_cast<int>(problem.dim);
    job.feature_dim = static_cast<int>(problem.feature_dim);
    job.capacity = static_cast<int>(problem.capacity);
    job.multiple_of = problem.multiple_of;
    job.redundancy = problem.selection == SIMPRUNE_REDUNDANCY;
    job.merge = problem.reduction == SIMPRUNE_MERGE;
    job.threshold_per_image = problem.num_thresholds > 1;
    job.tokens_aligned = static_cast<size_t>(job.dim) * element_size(problem.dtype) % 16 == 0 &&
                         on_bytes(buffers.tokens, 16) && on_bytes(buffers.kept_tokens, 16);
    job.features_aligned = feature_bytes % 16 == 0 && on_bytes(buffers.features, 16);

    job.tokens = buffers.tokens;
    job.features = buffers.features;
    job.log_size = buffers.log_size;
    job.threshold = buffers.threshold;
    job.kept_tokens = buffers.kept_tokens;
    job.kept_log_size = buffers.kept_log_size;
    job.kept_index = buffers.kept_index;
    job.assignment = buffers.assignment;
    job.num_kept = buffers.num_kept;

    job.sources = job.redundancy ? job.num_patches : (job.num_patches + 1) / 2;
    job.destinations = job.redundancy ? job.num_patches : job.num_patches / 2;
    const auto tiles = [](int count, int tile) { return (count + tile - 1) / tile; };
    // Wide features are limited by the bytes of tiles, where there are enough tiles
    const int64_t large = job.batch * tiles(job.sources, kLarge) * tiles(job.destinations, kLarge);
    job.large_tiles =
        has_tensor_cores(problem.dtype, gpu.sm) && feature_bytes > kNarrow && large >= gpu.multiprocessors;
    const int tile = job.large_tiles ? kLarge : kSmall;
    job.source_tiles = tiles(job.sources, tile);
    job.destination_tiles = tiles(job.destinations, tile);
    // Three blocks a multiprocessor where there are so many tiles, and no more than four tiles a block
    const int64_t blocks = job.batch * job.source_tiles, wanted = int64_t{3} * gpu.multiprocessors;
    const int most = std::max(1, std::min(job.destination_tiles, kMaxSplits));
    const int64_t enough = std::max<int64_t>((wanted + blocks - 1) / blocks, tiles(job.destination_tiles, 4));
    const int splits = static_cast<int>(std::min<int64_t>(most, enough));
    job.tiles_per_split = std::max(1, tiles(job.destination_tiles, splits));
    job.splits = std::max(1, tiles(job.destination_tiles, job.tiles_per_split));

    const Layout layout(problem);
    auto* bytes = static_cast<uint8_t*>(workspace);
    job.most_kept = reinterpret_cast<int32_t*>(bytes + layout.most_kept);
    job.kept = reinterpret_cast<int32_t*>(bytes + layout.kept);
    job.slots = reinterpret_cast<Slot*>(bytes + layout.slots);
    job.order = reinterpret_cast<uint16_t*>(bytes + layout.order);
    job.best = reinterpret_cast<uint64_t*>(bytes + layout.best);
    job.stays = bytes + layout.stays;
    job.sum = reinterpret_cast<float*>(bytes + layout.sum);
    return job;
}

Grid::Grid(const Job& job) {
    const int slots = job.capacity > 0 ? job.prefix + job.capacity : job.num_tokens;
    means = job.redundancy ? job.batch : 0;
    match = job.batch * job.source_tiles * job.splits;
    compact = job.batch;
    write = job.batch * ((slots + kSlotsPerBlock - 1) / kSlotsPerBlock);
    compact_threads = std::min(kMaxCompactThreads, std::max(kWarp * 4, (job.num_patches + 511) / 512 * 256));
}

}  // namespace simprune

const char* simprune_error(void) {
    return simprune::error_text;
}
