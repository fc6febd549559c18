// The `need` largest of a block's keys, the lower number first on a tie, without sorting them.
#pragma once

#include "similarity.h"

namespace simprune {

struct RadixShared {
    int32_t bins[2][256];
    uint32_t limit;  // the least key that is chosen, as far as its bits are settled
    int32_t tied;    // how many keys are equal to it, so far
    int32_t need;    // how many of those are chosen
};

// Eight bits a pass, the highest first. `key(i)` is not 0 for those of the `count` numbers that take
// part; if fewer than `need(warp)` do, all are chosen. is_chosen() then says which are, after rank_ties()
// where that has something to do.
template <class Need, class Key>
SIMPRUNE_FN void select_largest(const Block& block, RadixShared& shared, int count, Need need, Key key) {
    block.warps([&](const Warp& warp) {
        const int wanted = need(warp);
        warp.each([&](int lane) {
            const int thread = warp.index * kWarp + lane;
            for (int bin = thread; bin < 256; bin += block.num_threads) shared.bins[0][bin] = 0;
            if (thread == 0) shared.need = wanted > 0 ? wanted : 0, shared.limit = 0;
        });
    });
    for (int pass = 0; pass < 4; ++pass) {
        const int shift = 24 - 8 * pass;
        int32_t* bins = shared.bins[pass % 2];
        block.warps([&](const Warp& warp) {
            const uint32_t settled = shared.limit;
            for (int first = warp.index * kWarp; first < count; first += block.num_threads) {
                Lanes<uint32_t> digit;
                Lanes<bool> taking_part, like_most;
                warp.each([&](int lane) {
                    const int i = first + lane;
                    const uint32_t mine = i < count ? key(i) : 0;
                    taking_part[lane] = mine != 0 && (pass == 0 || (mine ^ settled) >> (shift + 8) == 0);
                    digit[lane] = mine >> shift & 255;
                });
                const uint32_t open = warp.ballot(taking_part);
                if (open == 0) continue;
                // Cosines have few leading digits: those that share the first one's are counted at once
                const uint32_t common = warp.broadcast(digit, lowest_bit(open));
                warp.each([&](int lane) { like_most[lane] = taking_part[lane] && digit[lane] == common; });
                const int number = popcount(warp.ballot(like_most));
                warp.each([&](int lane) {
                    if (lane == lowest_bit(open)) atomic_add(bins + common, number);
                    if (taking_part[lane] && !like_most[lane]) atomic_add(bins + digit[lane], 1);
                });
            }
        });
        block.warps([&](const Warp& warp) {
            int32_t* next = shared.bins[(pass + 1) % 2];
            warp.each([&](int lane) {
                for (int bin = warp.index * kWarp + lane; bin < 256; bin += block.num_threads) next[bin] = 0;
            });
            if (warp.index != 0) return;
            // A lane has eight digits, lane 0 the largest ones
            Lanes<int> sum, mine, wanted;
            warp.each([&](int lane) {
                sum[lane] = 0;
                for (int d = 0; d < 8; ++d) sum[lane] += bins[248 - 8 * lane + d];
                mine[lane] = sum[lane];
                wanted[lane] = shared.need;
            });
            warp.add_up(sum);
            const int all = warp.broadcast(sum, kWarp - 1);
            warp.sync();  // everybody has read what one of them now writes
            warp.each([&](int lane) {
                if (wanted[lane] > all) wanted[lane] = all;
                int above = sum[lane] - mine[lane];
                if (wanted[lane] <= above || wanted[lane] > sum[lane]) return;
                int digit = 255 - 8 * lane;
                while (above + bins[digit] < wanted[lane]) above += bins[digit--];
                shared.limit |= static_cast<uint32_t>(digit) << shift;
                shared.need = wanted[lane] - above;
                shared.tied = bins[digit];
            });
            warp.each([&](int lane) {
                if (lane != 0 || wanted[lane] > 0) return;
                shared.limit = 0xffffffffu;
                shared.need = shared.tied = 0;
            });
        });
    }
}

// Which of the keys are equal to the limit.
struct TiesShared {
    uint32_t bits[kMaxWords];
    int32_t before[kMaxWords];  // in earlier words
};

// Counts them, where not all of them are chosen.
template <class Key>
SIMPRUNE_FN void rank_ties(const Block& block, const RadixShared& radix, TiesShared& shared, int count, Key key) {
    if (radix.tied == radix.need) return;
    const int words = (count + kWarp - 1) / kWarp;
    block.warps([&](const Warp& warp) {
        for (int word = warp.index; word < words; word += block.num_warps()) {
            Lanes<bool> tie;
            warp.each([&](int lane) {
                const int i = word * kWarp + lane;
                tie[lane] = i < count && key(i) == radix.limit;
            });
            const uint32_t bits = warp.ballot(tie);
            warp.each([&](int lane) {
                if (lane == 0) shared.bits[word] = bits;
            });
        }
    });
    block.warps([&](const Warp& warp) { count_before(warp, shared.bits, words, shared.before); });
}

SIMPRUNE_FN bool is_chosen(const RadixShared& radix, const TiesShared& ties, int i, uint32_t key) {
    if (key == 0 || key < radix.limit) return false;
    if (key > radix.limit || radix.tied == radix.need) return true;
    return ties.before[i / kWarp] + popcount(ties.bits[i / kWarp] & bits_below(i)) < radix.need;
}

}  // namespace simprune
