// Kernels 2 to 4: which patches of an image are kept, and where the others go.
//
//   rows    (M > kSmallPatches) the alike bits or the score of every patch, one warp a row
//   select  one block an image: steps 2 and 6 of the definition; for small images the rows before
//           and the assignment after, too
//   assign  (M > kSmallPatches) step 3, one warp a patch
#pragma once

#include "similarity.h"

namespace simprune {

struct SelectShared {
    uint32_t valid[kMaxWords], kept[kMaxWords];
    int32_t rank[kMaxWords + 1];  // kept patches before a word
    bool conflict[kWarp];
    int32_t saved;  // redundancy: the patch that stays though all would go
    uint16_t heads[SIMPRUNE_MAX_PATCHES];
    bool gives_up[SIMPRUNE_MAX_PATCHES];
    float key[SIMPRUNE_MAX_PATCHES];  // of step 6; before that the scores of a small image
    uint32_t earlier[kSmallPatches * kSmallPatches / kWarp];
};

SIMPRUNE_FN bool has_bit(const uint32_t* words, int patch) {
    return (words[patch / kWarp] >> patch % kWarp & 1) != 0;
}

// How many patches before this one are kept, once list_heads has counted.
SIMPRUNE_FN int rank_of(const SelectShared& shared, int patch) {
    const uint32_t below = (1u << patch % kWarp) - 1;
    return shared.rank[patch / kWarp] + popcount(shared.kept[patch / kWarp] & below);
}

// cover: bit j of word w of row i says that patch 32 w + j < i is alike.
SIMPRUNE_FN void alike_row(
    const Warp& warp, const Job& job, const Similarity& similarity, int64_t image, int patch, uint32_t* row) {
    const float limit = limit_of(job, image);
    for (int word = 0; word * kWarp <= patch; ++word) {
        Lanes<bool> alike;
        warp.each([&](int lane) {
            const int other = word * kWarp + lane;
            alike[lane] = other < patch && similarity(patch, other) >= limit;
        });
        const uint32_t bits = warp.ballot(alike);
        warp.each([&](int lane) {
            if (lane == 0) row[word] = bits;
        });
    }
}

// redundancy: the mean similarity to the other valid patches; 0 for a patch that is alone.
SIMPRUNE_FN void mean_row(
    const Warp& warp, const Job& job, const Similarity& similarity, int64_t image, int patch, float* score) {
    Lanes<Sum> sum, count;
    warp.each([&](int lane) {
        sum[lane].value = count[lane].value = 0.0f;
        for (int other = lane; other < job.num_patches; other += kWarp) {
            if (other == patch || !is_valid(job, image, other)) continue;
            sum[lane].value += similarity(patch, other);
            count[lane].value += 1.0f;
        }
    });
    const float total = warp_sum(warp, sum), others = warp_sum(warp, count);
    warp.each([&](int lane) {
        if (lane == 0) *score = others > 0.0f ? total / others : 0.0f;
    });
}

SIMPRUNE_FN void rows_kernel(const Block& block, const Job& job) {
    const int blocks_per_image = (job.num_patches + kRowsPerBlock - 1) / kRowsPerBlock;
    const int image_in_work = block.index / blocks_per_image;
    const int64_t image = job.first_image + image_in_work;
    const Similarity similarity(job, image_in_work);
    block.warps([&](const Warp& warp) {
        const int patch = block.index % blocks_per_image * kRowsPerBlock + warp.index;
        if (patch >= job.num_patches) return;
        if (job.redundancy) {
            mean_row(warp, job, similarity, image, patch, job.score + int64_t{image_in_work} * job.gram_stride + patch);
        } else {
            const int64_t row = int64_t{image_in_work} * job.num_patches + patch;
            alike_row(warp, job, similarity, image, patch, job.earlier + row * job.words);
        }
    });
}

// The kept patch with the largest similarity; the slot of the first one if none compares (NaN).
template <class Heads>
SIMPRUNE_FN int most_similar(
    const Warp& warp, const Similarity& similarity, int patch, const Heads& heads, int num_heads) {
    Lanes<Best> best;
    warp.each([&](int lane) {
        best[lane] = {-INFINITY, num_heads};
        for (int slot = lane; slot < num_heads; slot += kWarp) {
            best[lane] = better(best[lane], {similarity(patch, static_cast<int>(heads[slot])), slot});
        }
    });
    const int slot = warp_best(warp, best).index;
    return slot < num_heads ? slot : 0;
}

SIMPRUNE_FN void assign_kernel(const Block& block, const Job& job) {
    const int blocks_per_image = (job.num_patches + kRowsPerBlock - 1) / kRowsPerBlock;
    const int image_in_work = block.index / blocks_per_image;
    const int64_t image = job.first_image + image_in_work;
    const Similarity similarity(job, image_in_work);
    const int32_t* heads = job.heads + image * job.num_patches;
    block.warps([&](const Warp& warp) {
        const int patch = block.index % blocks_per_image * kRowsPerBlock + warp.index;
        int64_t* assignment = job.assignment + image * job.num_tokens + job.prefix + patch;
        if (patch >= job.num_patches || *assignment != kUndecided) return;
        const int slot = most_similar(warp, similarity, patch, heads, job.num_kept[image]);
        warp.each([&](int lane) {
            if (lane == 0) *assignment = job.prefix + slot;
        });
    });
}

// Step 2 of cover. Patches are settled 32 at a time: first the kept ones of earlier words are held
// against all 32, then one warp goes through the word, patch by patch, with its bits in registers.
SIMPRUNE_FN void keep_cover(const Block& block, const Job& job, const uint32_t* earlier, SelectShared& shared) {
    const int words = job.words;
    for (int word = 0; word < words; ++word) {
        block.warps([&](const Warp& warp) {
            for (int i = warp.index; i < kWarp; i += block.num_warps()) {
                const int patch = word * kWarp + i;
                if (patch >= job.num_patches) break;
                Lanes<bool> hit;
                warp.each([&](int lane) {
                    uint32_t bits = 0;
                    for (int w = lane; w < word; w += kWarp) {
                        bits |= earlier[int64_t{patch} * words + w] & shared.kept[w];
                    }
                    hit[lane] = bits != 0;
                });
                const bool any = warp.ballot(hit) != 0;
                warp.each([&](int lane) {
                    if (lane == 0) shared.conflict[i] = any;
                });
            }
        });
        block.warps([&](const Warp& warp) {
            if (warp.index != 0) return;
            Lanes<uint32_t> row;
            Lanes<bool> free;
            warp.each([&](int lane) {
                const int patch = word * kWarp + lane;
                const bool inside = patch < job.num_patches;
                row[lane] = inside ? earlier[int64_t{patch} * words + word] : 0;
                free[lane] = inside && (shared.valid[word] >> lane & 1) != 0 && !shared.conflict[lane];
            });
            uint32_t open = warp.ballot(free), kept = 0;
            while (open != 0) {
                const int next = lowest_bit(open);
                kept |= 1u << next;
                Lanes<bool> alike;
                warp.each([&](int lane) { alike[lane] = (row[lane] >> next & 1) != 0; });
                open &= ~(1u << next) & ~warp.ballot(alike);
            }
            warp.each([&](int lane) {
                if (lane == 0) shared.kept[word] = kept;
            });
        });
    }
}

// Step 2 of redundancy.
SIMPRUNE_FN void keep_below_mean(
    const Block& block, const Job& job, int64_t image, const float* score, SelectShared& shared) {
    const float limit = limit_of(job, image);
    const int words = job.words;
    block.warps([&](const Warp& warp) {
        for (int word = warp.index; word < words; word += block.num_warps()) {
            Lanes<bool> stays;
            warp.each([&](int lane) {
                const int patch = word * kWarp + lane;
                stays[lane] = (shared.valid[word] >> lane & 1) != 0 && !(score[patch] >= limit);
            });
            const uint32_t bits = warp.ballot(stays);
            warp.each([&](int lane) {
                if (lane == 0) shared.kept[word] = bits;
            });
        }
    });
    // All gone: the one with the smallest mean stays
    block.warps([&](const Warp& warp) {
        if (warp.index != 0) return;
        Lanes<bool> some;
        Lanes<Best> least;
        warp.each([&](int lane) {
            some[lane] = false;
            least[lane] = {-INFINITY, job.num_patches};
            for (int word = 0; word < words; ++word) {
                const int patch = word * kWarp + lane;
                some[lane] = some[lane] || shared.kept[word] != 0;
                if ((shared.valid[word] >> lane & 1) != 0) least[lane] = better(least[lane], {-score[patch], patch});
            }
        });
        const int patch = warp.ballot(some) != 0 ? job.num_patches : warp_best(warp, least).index;
        warp.each([&](int lane) {
            if (lane == 0) shared.saved = patch;
        });
    });
    block.threads([&](int thread) {
        const int patch = shared.saved;
        if (thread == 0 && patch < job.num_patches) shared.kept[patch / kWarp] = 1u << patch % kWarp;
    });
}

// Counts the kept patches and lists them in ascending order.
SIMPRUNE_FN void list_heads(const Block& block, const Job& job, SelectShared& shared) {
    const int words = job.words;
    block.threads([&](int thread) {
        if (thread != 0) return;
        shared.rank[0] = 0;
        for (int word = 0; word < words; ++word)
            shared.rank[word + 1] = shared.rank[word] + popcount(shared.kept[word]);
    });
    block.threads([&](int thread) {
        for (int patch = thread; patch < job.num_patches; patch += block.num_threads) {
            if (has_bit(shared.kept, patch)) shared.heads[rank_of(shared, patch)] = static_cast<uint16_t>(patch);
        }
    });
}

// Step 6: the kept patches most similar to an earlier kept one go, until `capacity` stay.
SIMPRUNE_FN void give_up(const Block& block, const Job& job, const Similarity& similarity, SelectShared& shared) {
    const int count = shared.rank[job.words], excess = count - job.capacity;
    block.warps([&](const Warp& warp) {
        for (int a = warp.index; a < count; a += block.num_warps()) {
            Lanes<Best> best;
            warp.each([&](int lane) {
                best[lane] = {-4.0f, 0};  // below every similarity: the first kept patch has no earlier one
                for (int b = lane; b < a; b += kWarp) {
                    best[lane] = better(best[lane], {similarity(shared.heads[a], shared.heads[b]), 0});
                }
            });
            const float key = warp_best(warp, best).score;
            warp.each([&](int lane) {
                if (lane == 0) shared.key[a] = key;
            });
        }
    });
    block.threads([&](int thread) {
        for (int a = thread; a < count; a += block.num_threads) {
            const float key = shared.key[a];
            int before = 0;
            for (int b = 0; b < count; ++b) before += shared.key[b] > key || (shared.key[b] == key && b < a);
            shared.gives_up[a] = before < excess;
        }
    });
    block.threads([&](int thread) {
        for (int word = thread; word < job.words; word += block.num_threads) {
            int slot = shared.rank[word];
            uint32_t stays = 0;
            for (uint32_t open = shared.kept[word]; open != 0; open &= open - 1) {
                if (!shared.gives_up[slot++]) stays |= 1u << lowest_bit(open);
            }
            shared.kept[word] = stays;
        }
    });
    list_heads(block, job, shared);
}

SIMPRUNE_FN void select_kernel(const Block& block, const Job& job, SelectShared& shared) {
    const int image_in_work = block.index;
    const int64_t image = job.first_image + image_in_work;
    const bool small = job.num_patches <= kSmallPatches;
    const int words = job.words;
    const Similarity similarity(job, image_in_work);

    block.warps([&](const Warp& warp) {
        for (int word = warp.index; word < words; word += block.num_warps()) {
            Lanes<bool> valid;
            warp.each([&](int lane) {
                const int patch = word * kWarp + lane;
                valid[lane] = patch < job.num_patches && is_valid(job, image, patch);
            });
            const uint32_t bits = warp.ballot(valid);
            warp.each([&](int lane) {
                if (lane == 0) shared.valid[word] = bits;
            });
        }
        if (!small) return;
        for (int patch = warp.index; patch < job.num_patches; patch += block.num_warps()) {
            if (job.redundancy) {
                mean_row(warp, job, similarity, image, patch, &shared.key[patch]);
            } else {
                alike_row(warp, job, similarity, image, patch, shared.earlier + patch * words);
            }
        }
    });
    if (job.redundancy) {
        const float* score = job.score + int64_t{image_in_work} * job.gram_stride;
        keep_below_mean(block, job, image, small ? shared.key : score, shared);
    } else {
        const uint32_t* earlier = job.earlier + int64_t{image_in_work} * job.num_patches * words;
        keep_cover(block, job, small ? shared.earlier : earlier, shared);
    }
    list_heads(block, job, shared);
    if (job.capacity > 0 && shared.rank[words] > job.capacity) give_up(block, job, similarity, shared);

    const int count = shared.rank[words];
    int64_t* assignment = job.assignment + image * job.num_tokens;
    block.threads([&](int thread) {
        if (thread == 0) {
            job.num_kept[image] = count;
            atomic_max(job.most_kept, count);
        }
        for (int slot = thread; slot < count; slot += block.num_threads) {
            job.heads[image * job.num_patches + slot] = shared.heads[slot];
        }
        for (int token = thread; token < job.prefix; token += block.num_threads) assignment[token] = token;
    });
    block.warps([&](const Warp& warp) {
        for (int patch = warp.index; patch < job.num_patches; patch += block.num_warps()) {
            int64_t slot;
            if (!has_bit(shared.valid, patch)) {
                slot = -1;
            } else if (has_bit(shared.kept, patch)) {
                slot = job.prefix + rank_of(shared, patch);
            } else if (small) {
                slot = job.prefix + most_similar(warp, similarity, patch, shared.heads, count);
            } else {
                slot = kUndecided;
            }
            warp.each([&](int lane) {
                if (lane == 0) assignment[job.prefix + patch] = slot;
            });
        }
    });
}

}  // namespace simprune
