// Kernel 0 of "redundancy", one block an image: the mean similarity of every patch to the others, and
// who stays. It is not made to be fast: an image's features pass through one block, three times.
#pragma once

#include "radix_select.h"
#include "tensor_core.h"

namespace simprune {

struct MeansShared {
    uint32_t valid[kMaxWords], stays[kMaxWords];
    RadixShared radix;
    TiesShared ties;
    float inverse[SIMPRUNE_MAX_PATCHES];
    float score[SIMPRUNE_MAX_PATCHES];
    float part[kMeansThreads];
};
static_assert(sizeof(MeansShared) <= 48 * 1024, "more than a block has without asking");

template <class T>
class Means {
public:
    SIMPRUNE_FN Means(const Job& job, int64_t image, MeansShared& shared)
        : job_(job),
          image_(image),
          shared_(shared),
          features_(
              static_cast<const T*>(job.features) + (image * job.num_tokens + job.prefix) * int64_t{job.feature_dim}),
          sum_(job.sum + image * job.feature_dim) {}

    SIMPRUNE_FN void run(const Block& block) const {
        find_norms(block);
        sum_up(block);
        find_scores(block);
        if (job_.capacity > 0) {
            keep_capacity(block);
        } else {
            keep_below_limit(block);
        }
        block.threads([&](int thread) {
            for (int patch = thread; patch < job_.num_patches; patch += block.num_threads) {
                job_.stays[image_ * job_.num_patches + patch] = has_bit(shared_.stays, patch) ? 1 : 0;
            }
        });
    }

private:
    SIMPRUNE_FN float feature(int patch, int column) const {
        return to_float(features_[int64_t{patch} * job_.feature_dim + column]) * shared_.inverse[patch];
    }

    SIMPRUNE_FN void find_norms(const Block& block) const {
        block.warps([&](const Warp& warp) {
            mark_valid(block, warp, job_, image_, shared_.valid);
            for (int patch = warp.index; patch < job_.num_patches; patch += block.num_warps()) {
                Lanes<Sum> square;
                warp.each([&](int lane) {
                    square[lane].value = 0.0f;
                    for (int column = lane; column < job_.feature_dim; column += kWarp) {
                        const float x = to_float(features_[int64_t{patch} * job_.feature_dim + column]);
                        square[lane].value = multiply_add(x, x, square[lane].value);
                    }
                });
                const float inverse = inverse_norm(warp_sum(warp, square));
                warp.each([&](int lane) {
                    if (lane == 0) shared_.inverse[patch] = inverse;
                });
            }
        });
    }

    // The patches are dealt out to groups of threads; a thread sums one column of those of its group.
    SIMPRUNE_FN void sum_up(const Block& block) const {
        const int rounded = (job_.feature_dim + kWarp - 1) / kWarp * kWarp;
        const int columns = rounded < block.num_threads ? rounded : block.num_threads;
        const int groups = block.num_threads / columns;
        for (int first = 0; first < job_.feature_dim; first += columns) {
            block.threads([&](int thread) {
                const int group = thread / columns, column = first + thread % columns;
                float sum = 0.0f;
                if (group < groups && column < job_.feature_dim) {
                    for (int patch = group; patch < job_.num_patches; patch += groups) {
                        if (has_bit(shared_.valid, patch)) sum += feature(patch, column);
                    }
                }
                shared_.part[thread] = sum;
            });
            block.threads([&](int thread) {
                if (thread >= columns || first + thread >= job_.feature_dim) return;
                float sum = 0.0f;
                for (int group = 0; group < groups; ++group) sum += shared_.part[group * columns + thread];
                sum_[first + thread] = sum;
            });
        }
    }

    // r_i = f_i . (sum - f_i) / (valid - 1); the similarity of a patch that is alone is 0.
    SIMPRUNE_FN void find_scores(const Block& block) const {
        block.warps([&](const Warp& warp) {
            const int valid = count_bits(warp, shared_.valid, job_.words);
            const float others = valid > 1 ? static_cast<float>(valid - 1) : 1.0f;
            for (int patch = warp.index; patch < job_.num_patches; patch += block.num_warps()) {
                Lanes<Sum> dot;
                warp.each([&](int lane) {
                    dot[lane].value = 0.0f;
                    for (int column = lane; column < job_.feature_dim; column += kWarp) {
                        const float x = feature(patch, column);
                        dot[lane].value = multiply_add(x, sum_[column] - x, dot[lane].value);
                    }
                });
                const float score = warp_sum(warp, dot) / others + 0.0f;  // not -0
                warp.each([&](int lane) {
                    if (lane == 0) shared_.score[patch] = score;
                });
            }
        });
    }

    SIMPRUNE_FN void keep_capacity(const Block& block) const {
        const auto key = [&](int patch) {
            const float score = shared_.score[patch];
            return has_bit(shared_.valid, patch) && score == score ? orderable(score) : 0;
        };
        const auto excess = [&](const Warp& warp) {
            return count_bits(warp, shared_.valid, job_.words) - job_.capacity;
        };
        select_largest(block, shared_.radix, job_.num_patches, excess, key);
        rank_ties(block, shared_.radix, shared_.ties, job_.num_patches, key);
        keep(block, [&](int patch) { return !is_chosen(shared_.radix, shared_.ties, patch, key(patch)); });
    }

    // At least one stays: the one with the smallest score.
    SIMPRUNE_FN void keep_below_limit(const Block& block) const {
        const float limit = limit_of(job_, image_);
        keep(block, [&](int patch) { return !(shared_.score[patch] >= limit); });
        block.warps([&](const Warp& warp) {
            if (warp.index != 0 || count_bits(warp, shared_.stays, job_.words) > 0) return;
            Lanes<Best> least;
            warp.each([&](int lane) {
                least[lane] = {-INFINITY, job_.num_patches};
                for (int patch = lane; patch < job_.num_patches; patch += kWarp) {
                    if (!has_bit(shared_.valid, patch)) continue;
                    least[lane] = better(least[lane], {-shared_.score[patch], patch});
                }
            });
            const int patch = warp_best(warp, least).index;
            warp.each([&](int lane) {
                if (lane == 0 && patch < job_.num_patches) shared_.stays[patch / kWarp] = 1u << patch % kWarp;
            });
        });
    }

    template <class Stays>
    SIMPRUNE_FN void keep(const Block& block, Stays stays_if_valid) const {
        block.warps([&](const Warp& warp) {
            for (int word = warp.index; word < job_.words; word += block.num_warps()) {
                Lanes<bool> stays;
                warp.each([&](int lane) {
                    const int patch = word * kWarp + lane;
                    stays[lane] = has_bit(shared_.valid, patch) && stays_if_valid(patch);
                });
                const uint32_t bits = warp.ballot(stays);
                warp.each([&](int lane) {
                    if (lane == 0) shared_.stays[word] = bits;
                });
            }
        });
    }

    const Job& job_;
    const int64_t image_;
    MeansShared& shared_;
    const T* features_;
    float* sum_;
};

template <class T>
SIMPRUNE_FN void means_kernel(const Block& block, const Job& job, MeansShared& shared) {
    Means<T>(job, block.index, shared).run(block);
}

}  // namespace simprune
