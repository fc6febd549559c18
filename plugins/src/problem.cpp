#include "problem.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <limits>

namespace simprune {
namespace {

constexpr size_t kAlignment = 256;
constexpr size_t kWorkBytes = size_t{128} << 20;

thread_local char error_text[512] = "";

size_t aligned(size_t bytes) {
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

size_t element_size(int32_t dtype) {
    return dtype == SIMPRUNE_FLOAT32 ? 4 : 2;
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
    if (p.selection != SIMPRUNE_COVER && p.selection != SIMPRUNE_REDUNDANCY) {
        return fail(SIMPRUNE_BAD_PROBLEM, "selection %d is not one of cover (0), redundancy (1)", p.selection);
    }
    if (p.reduction != SIMPRUNE_MERGE && p.reduction != SIMPRUNE_DROP) {
        return fail(SIMPRUNE_BAD_PROBLEM, "reduction %d is not one of merge (0), drop (1)", p.reduction);
    }
    if (p.batch < 1) return fail(SIMPRUNE_BAD_PROBLEM, "batch %lld: give at least one image", number(p.batch));
    if (p.dim < 1 || p.dim > std::numeric_limits<int32_t>::max() / 2) {
        return fail(SIMPRUNE_BAD_PROBLEM, "tokens have %lld dimensions: at least 1 is needed", number(p.dim));
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
            SIMPRUNE_BAD_PROBLEM, "capacity %lld is outside [0, %lld] patches", number(p.capacity), number(patches));
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
    // Blocks are counted in 31 bits; the write kernel has the most of them to an image
    const int64_t blocks = (p.num_tokens + 7) / 8 + patches * patches / (64 * 64);
    if (p.batch > std::numeric_limits<int32_t>::max() / (blocks + 1)) {
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
    if (b.num_slots != nullptr && !on_bytes(b.num_slots, 4)) {
        return fail(SIMPRUNE_BAD_POINTER, "num_slots is not aligned to 4 bytes");
    }
    const size_t needed = Layout(problem).total;
    if (workspace_bytes < needed) {
        return fail(
            SIMPRUNE_BAD_POINTER, "a workspace of %zu bytes is too small: %zu are needed", workspace_bytes, needed);
    }
    return SIMPRUNE_OK;
}

Layout::Layout(const simprune_problem& problem) {
    const size_t batch = static_cast<size_t>(problem.batch);
    const size_t patches = static_cast<size_t>(problem.num_tokens - problem.num_prefix_tokens);
    const size_t words = (patches + kWarp - 1) / kWarp, stride = words * kWarp;

    most_kept = 0;
    num_kept = aligned(sizeof(int32_t));
    heads = num_kept + aligned(batch * sizeof(int32_t));
    work = heads + aligned(batch * patches * sizeof(int32_t));

    // Arrays of all images in work lie behind one another: first every image's norms, and so on.
    const size_t norm_bytes = aligned(stride * sizeof(float)), gram_bytes = aligned(patches * stride * sizeof(float));
    // Alike bits or scores, whichever the selection needs: bits are the more
    const size_t row_bytes = patches > kSmallPatches ? aligned(patches * words * sizeof(uint32_t)) : 0;
    const size_t per_image = norm_bytes + gram_bytes + row_bytes;

    const size_t work_bytes = std::min(batch * per_image, std::max(kWorkBytes, per_image));
    const size_t images = work_bytes / per_image;
    gram = images * norm_bytes;
    rows = gram + images * gram_bytes;
    total = work + work_bytes;
    images_in_work = static_cast<int64_t>(images);
}

Job make_job(const simprune_problem& problem, const simprune_buffers& buffers, void* workspace, const Layout& layout) {
    Job job{};
    job.batch = problem.batch;
    job.num_tokens = static_cast<int>(problem.num_tokens);
    job.prefix = problem.num_prefix_tokens;
    job.num_patches = job.num_tokens - job.prefix;
    job.dim = static_cast<int>(problem.dim);
    job.capacity = static_cast<int>(problem.capacity);
    job.multiple_of = problem.multiple_of;
    job.redundancy = problem.selection == SIMPRUNE_REDUNDANCY;
    job.merge = problem.reduction == SIMPRUNE_MERGE;
    job.threshold_per_image = problem.num_thresholds > 1;
    job.aligned = static_cast<size_t>(job.dim) * element_size(problem.dtype) % 16 == 0 &&
                  on_bytes(buffers.tokens, 16) && on_bytes(buffers.kept_tokens, 16);

    job.tokens = buffers.tokens;
    job.log_size = buffers.log_size;
    job.threshold = buffers.threshold;
    job.kept_tokens = buffers.kept_tokens;
    job.kept_log_size = buffers.kept_log_size;
    job.kept_index = buffers.kept_index;
    job.assignment = buffers.assignment;
    job.num_slots = buffers.num_slots;

    auto* bytes = static_cast<uint8_t*>(workspace);
    job.most_kept = reinterpret_cast<int32_t*>(bytes + layout.most_kept);
    job.num_kept = reinterpret_cast<int32_t*>(bytes + layout.num_kept);
    job.heads = reinterpret_cast<int32_t*>(bytes + layout.heads);
    job.words = (job.num_patches + kWarp - 1) / kWarp;
    job.gram_stride = job.words * kWarp;
    uint8_t* work = bytes + layout.work;
    job.inverse_norm = reinterpret_cast<float*>(work);
    job.gram = reinterpret_cast<float*>(work + layout.gram);
    job.earlier = reinterpret_cast<uint32_t*>(work + layout.rows);
    job.score = reinterpret_cast<float*>(work + layout.rows);
    return job;
}

Grid::Grid(const Job& job) {
    const int tiles = (job.num_patches + kTile - 1) / kTile;
    const int slots = job.capacity > 0 ? job.prefix + job.capacity : job.num_tokens;
    gram = tiles * (tiles + 1) / 2;
    rows = (job.num_patches + kRowsPerBlock - 1) / kRowsPerBlock;
    write = (slots + kSlotsPerBlock - 1) / kSlotsPerBlock;
}

}  // namespace simprune

const char* simprune_error(void) {
    return simprune::error_text;
}
