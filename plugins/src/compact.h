// Kernel 2, one block an image: who goes, which slot whoever stays has, and who goes to which.
#pragma once

#include "radix_select.h"

namespace simprune {

constexpr uint16_t kNobody = 0xffff;

struct CompactShared {
    uint32_t valid[kMaxWords], stays[kMaxWords];
    int32_t rank[kMaxWords];  // of those that stay, how many are before a word
    int32_t placed;           // how much of `order` is given away
    RadixShared radix;
    TiesShared ties;
    uint32_t score[SIMPRUNE_MAX_PATCHES / 2];  // pairs: of a candidate and its partner; 0: it has none
    // By source: where it goes, and its place among those that go there (in no order)
    uint16_t partner[SIMPRUNE_MAX_PATCHES], place[SIMPRUNE_MAX_PATCHES];
    // By destination: how many go there, and from number() on in the high half their place in `order`
    int32_t members[SIMPRUNE_MAX_PATCHES];
};
static_assert(sizeof(CompactShared) <= 48 * 1024, "more than a block has without asking");

class Compact {
public:
    SIMPRUNE_FN Compact(const Job& job, int64_t image, CompactShared& shared)
        : job_(job), image_(image), shared_(shared) {}

    SIMPRUNE_FN void run(const Block& block) const {
        read_partners(block);
        if (!job_.redundancy && job_.capacity > 0) select_for_capacity(block);
        settle(block);
        number(block);
        leave(block);
    }

private:
    SIMPRUNE_FN int source_of(int patch) const { return job_.redundancy ? patch : patch / 2; }
    SIMPRUNE_FN bool is_source(int patch) const { return job_.redundancy || patch % 2 == 0; }
    SIMPRUNE_FN bool is_destination(int patch) const { return job_.redundancy || patch % 2 == 1; }
    SIMPRUNE_FN int destination_of(int patch) const { return job_.redundancy ? patch : patch / 2; }
    SIMPRUNE_FN int patch_of(int destination) const { return job_.redundancy ? destination : 2 * destination + 1; }

    SIMPRUNE_FN int rank_of(int patch) const {
        const int rank = shared_.rank[patch / kWarp] + popcount(shared_.stays[patch / kWarp] & bits_below(patch));
        // More than the capacity stay only where the definition says nothing: indices must still be in range
        return job_.capacity > 0 && rank >= job_.capacity ? job_.capacity - 1 : rank;
    }

    SIMPRUNE_FN void read_partners(const Block& block) const {
        block.warps([&](const Warp& warp) {
            mark_valid(block, warp, job_, image_, shared_.valid);
            warp.each([&](int lane) {
                const int thread = warp.index * kWarp + lane;
                if (thread == 0) shared_.placed = 0;
                for (int i = thread; i < job_.destinations; i += block.num_threads) shared_.members[i] = 0;
                for (int source = thread; source < job_.sources; source += block.num_threads) read_partner(source);
            });
        });
    }

    SIMPRUNE_FN void read_partner(int source) const {
        const uint64_t* best = job_.best + image_ * job_.splits * job_.sources + source;
        uint64_t key = kNoKey;
#pragma unroll 4
        for (int split = 0; split < job_.splits; ++split) {
            const uint64_t other = best[int64_t{split} * job_.sources];
            if (other > key) key = other;
        }
        shared_.partner[source] = key == kNoKey ? kNobody : static_cast<uint16_t>(destination_of_key(key));
        if (!job_.redundancy) {
            shared_.score[source] = is_valid(job_, image_, 2 * source) ? score_of_key(key) : 0;
        }
    }

    SIMPRUNE_FN void select_for_capacity(const Block& block) const {
        const auto key = [&](int source) { return shared_.score[source]; };
        const auto excess = [&](const Warp& warp) {
            return count_bits(warp, shared_.valid, job_.words) - job_.capacity;
        };
        select_largest(block, shared_.radix, job_.sources, excess, key);
        rank_ties(block, shared_.radix, shared_.ties, job_.sources, key);
    }

    // Whether a valid patch is to go.
    SIMPRUNE_FN bool goes(int patch, float limit) const {
        if (!is_source(patch) || shared_.partner[source_of(patch)] == kNobody) return false;
        if (job_.redundancy) return job_.stays[image_ * job_.num_patches + patch] == 0;
        const uint32_t score = shared_.score[source_of(patch)];
        if (job_.capacity > 0) return is_chosen(shared_.radix, shared_.ties, source_of(patch), score);
        return from_orderable(score) >= limit;
    }

    SIMPRUNE_FN void settle(const Block& block) const {
        const float limit = limit_of(job_, image_);
        block.warps([&](const Warp& warp) {
            for (int word = warp.index; word < job_.words; word += block.num_warps()) {
                Lanes<bool> stays;
                warp.each([&](int lane) {
                    const int patch = word * kWarp + lane;
                    stays[lane] = false;
                    if (!has_bit(shared_.valid, patch)) return;
                    stays[lane] = !goes(patch, limit);
                    if (stays[lane]) return;
                    const int source = source_of(patch);
                    const int place = atomic_add(shared_.members + shared_.partner[source], 1);
                    shared_.place[source] = static_cast<uint16_t>(place);
                });
                const uint32_t bits = warp.ballot(stays);
                warp.each([&](int lane) {
                    if (lane == 0) shared_.stays[word] = bits;
                });
            }
        });
    }

    // Ranks, and room in `order` for the members of every destination.
    SIMPRUNE_FN void number(const Block& block) const {
        block.warps([&](const Warp& warp) {
            count_before(warp, shared_.stays, job_.words, shared_.rank);
            for (int start = warp.index * kWarp; start < job_.destinations; start += block.num_threads) {
                Lanes<int> members, up_to, base;
                warp.each([&](int lane) {
                    members[lane] = start + lane < job_.destinations ? shared_.members[start + lane] : 0;
                    up_to[lane] = members[lane];
                });
                warp.add_up(up_to);
                const int all = warp.broadcast(up_to, kWarp - 1);
                warp.each([&](int lane) {
                    if (lane == 0) base[lane] = all > 0 ? atomic_add(&shared_.placed, all) : 0;
                });
                const int from = warp.broadcast(base, 0);
                warp.each([&](int lane) {
                    const int first = from + up_to[lane] - members[lane];
                    if (start + lane < job_.destinations) shared_.members[start + lane] |= first << 16;
                });
            }
        });
    }

    SIMPRUNE_FN void leave(const Block& block) const {
        Slot* slots = job_.slots + image_ * job_.num_patches;
        uint16_t* order = job_.order + image_ * job_.num_patches;
        int64_t* assignment = job_.assignment + image_ * job_.num_tokens;
        block.warps([&](const Warp& warp) {
            warp.each([&](int lane) {
                const int thread = warp.index * kWarp + lane;
                const int last = job_.words - 1;
                const int count = shared_.rank[last] + popcount(shared_.stays[last]);
                if (thread == 0) {
                    job_.kept[image_] = count;
                    atomic_max(job_.most_kept, count);
                }
                for (int token = thread; token < job_.prefix; token += block.num_threads) assignment[token] = token;
                for (int patch = thread; patch < job_.num_patches; patch += block.num_threads) {
                    int64_t slot = -1;
                    if (has_bit(shared_.stays, patch)) {
                        const int rank = rank_of(patch);
                        slot = job_.prefix + rank;
                        Slot one = {static_cast<uint16_t>(patch), 0, 0};
                        if (is_destination(patch)) {
                            const int members = shared_.members[destination_of(patch)];
                            one.first = static_cast<uint16_t>(members >> 16);
                            one.members = static_cast<uint16_t>(members & 0xffff);
                        }
                        slots[rank] = one;
                    } else if (has_bit(shared_.valid, patch)) {
                        const int source = source_of(patch), partner = shared_.partner[source];
                        slot = job_.prefix + rank_of(patch_of(partner));
                        order[(shared_.members[partner] >> 16) + shared_.place[source]] = static_cast<uint16_t>(patch);
                    }
                    assignment[job_.prefix + patch] = slot;
                    if (patch >= count) slots[patch] = Slot{};  // no slot of that rank, but write looks there
                }
            });
        });
    }

    const Job& job_;
    const int64_t image_;
    CompactShared& shared_;
};

SIMPRUNE_FN void compact_kernel(const Block& block, const Job& job, CompactShared& shared) {
    Compact(job, block.index, shared).run(block);
}

}  // namespace simprune
