// The first line of the definition: which patches are valid, and how alike two of them are.
#pragma once

#include "job.h"
#include "simt.h"

namespace simprune {

SIMPRUNE_FN float limit_of(const Job& job, int64_t image) {
    return job.threshold[job.threshold_per_image ? image : 0];
}

SIMPRUNE_FN bool is_valid(const Job& job, int64_t image, int patch) {
    return job.log_size[image * job.num_tokens + job.prefix + patch] > SIMPRUNE_PAD_LOG_SIZE / 2;
}

// K, once the selection of every image is done.
SIMPRUNE_FN int64_t num_slots(const Job& job) {
    if (job.capacity > 0) return job.prefix + job.capacity;
    const int64_t needed = job.prefix + int64_t{*job.most_kept};
    const int64_t rounded = (needed + job.multiple_of - 1) / job.multiple_of * job.multiple_of;
    return rounded < job.num_tokens ? rounded : job.num_tokens;
}

// The similarities of one image, from its dot products.
struct Similarity {
    const float* gram;
    const float* inverse_norm;
    int stride;

    SIMPRUNE_FN Similarity(const Job& job, int image_in_work)
        : gram(job.gram + int64_t{image_in_work} * job.num_patches * job.gram_stride),
          inverse_norm(job.inverse_norm + int64_t{image_in_work} * job.gram_stride),
          stride(job.gram_stride) {}

    // s_ij; the same bits as s_ji. A norm too large for float32 has the inverse 0, and as in the
    // definition such a patch is like nothing: its dot products (infinite) do not count.
    SIMPRUNE_FN float operator()(int i, int j) const {
        const float scale = inverse_norm[i] * inverse_norm[j];
        return scale == 0.0f ? 0.0f : gram[int64_t{i} * stride + j] * scale;
    }
};

}  // namespace simprune
