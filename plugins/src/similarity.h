// The words of the definition that several kernels share.
#pragma once

#include <limits>

#include "job.h"
#include "simt.h"

namespace simprune {

constexpr float kNormFloor = 1e-12f;
constexpr float kNotANumber = std::numeric_limits<float>::quiet_NaN();

SIMPRUNE_FN float limit_of(const Job& job, int64_t image) {
    return job.threshold[job.threshold_per_image ? image : 0];
}

SIMPRUNE_FN bool is_valid(const Job& job, int64_t image, int patch) {
    return job.log_size[image * job.num_tokens + job.prefix + patch] > SIMPRUNE_PAD_LOG_SIZE / 2;
}

// A warp's share of a bit for every patch of an image: is it valid?
SIMPRUNE_FN void mark_valid(const Block& block, const Warp& warp, const Job& job, int64_t image, uint32_t* bits) {
    for (int word = warp.index; word < job.words; word += block.num_warps()) {
        Lanes<bool> valid;
        warp.each([&](int lane) {
            const int patch = word * kWarp + lane;
            valid[lane] = patch < job.num_patches && is_valid(job, image, patch);
        });
        const uint32_t found = warp.ballot(valid);
        warp.each([&](int lane) {
            if (lane == 0) bits[word] = found;
        });
    }
}

// K, once the selection of every image is done.
SIMPRUNE_FN int64_t num_slots(const Job& job) {
    if (job.capacity > 0) return job.prefix + job.capacity;
    const int64_t needed = job.prefix + int64_t{*job.most_kept};
    const int64_t rounded = (needed + job.multiple_of - 1) / job.multiple_of * job.multiple_of;
    return rounded < job.num_tokens ? rounded : job.num_tokens;
}

// 1 / max(|x|, 1e-12). The norm of finite numbers can be infinite in float32: then f = x / inf = 0.
SIMPRUNE_FN float inverse_norm(float square) {
    const float norm = square_root(square);
    return 1.0f / (norm < kNormFloor ? kNormFloor : norm);
}

// s_ij from a dot product and two inverse norms; the sum takes the sign from a zero. Where an inverse
// is 0 (a norm beyond float32) the dot product may be anything: then give 0 for it.
SIMPRUNE_FN float similarity(float dot, float inverse_i, float inverse_j) {
    return multiply_add(dot * inverse_j, inverse_i, 0.0f);
}

// Numbers in the order of the floats, which are not NaN; 0 is less than all of them.
SIMPRUNE_FN uint32_t orderable(float x) {
    const uint32_t bits = bits_of(x);
    return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
SIMPRUNE_FN float from_orderable(uint32_t x) {
    return float_of((x & 0x80000000u) != 0 ? x & 0x7fffffffu : ~x);
}

// The similarity of a source and a destination, and which: the larger one is the better one, on a
// tie that with the lower number. 0: there is none.
constexpr uint64_t kNoKey = 0;
SIMPRUNE_FN uint64_t key_of(float score, int destination) {
    return uint64_t{orderable(score)} << 32 | (0xffffffffu - static_cast<uint32_t>(destination));
}
SIMPRUNE_FN uint32_t score_of_key(uint64_t key) {
    return static_cast<uint32_t>(key >> 32);
}
SIMPRUNE_FN int destination_of_key(uint64_t key) {
    return static_cast<int>(0xffffffffu - static_cast<uint32_t>(key));
}

// ---- bit masks, one bit a number

SIMPRUNE_FN bool has_bit(const uint32_t* bits, int number) {
    return (bits[number / kWarp] >> number % kWarp & 1) != 0;
}
SIMPRUNE_FN uint32_t bits_below(int number) {
    return (1u << number % kWarp) - 1;
}

// How many bits are set; every lane gets it.
SIMPRUNE_FN int count_bits(const Warp& warp, const uint32_t* bits, int words) {
    Lanes<Count> count;
    warp.each([&](int lane) {
        count[lane].value = 0;
        for (int word = lane; word < words; word += kWarp) count[lane].value += popcount(bits[word]);
    });
    return warp_sum(warp, count);
}

// How many bits are set in earlier words, for every word. The first warp of a block does this.
SIMPRUNE_FN void count_before(const Warp& warp, const uint32_t* bits, int words, int32_t* before) {
    if (warp.index != 0) return;
    constexpr int kEach = kMaxWords / kWarp;
    Lanes<int> sum, mine;
    warp.each([&](int lane) {
        sum[lane] = 0;
        for (int i = 0; i < kEach; ++i) {
            const int word = lane * kEach + i;
            if (word < words) sum[lane] += popcount(bits[word]);
        }
        mine[lane] = sum[lane];
    });
    warp.add_up(sum);
    warp.each([&](int lane) {
        int count = sum[lane] - mine[lane];
        for (int i = 0; i < kEach; ++i) {
            const int word = lane * kEach + i;
            if (word >= words) break;
            before[word] = count;
            count += popcount(bits[word]);
        }
    });
}

}  // namespace simprune
