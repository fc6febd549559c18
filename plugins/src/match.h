// Kernel 1: the most similar destination of every source.
//
// A block takes a tile of sources and goes through tiles of destinations, all of them or its share
// (Job::splits). Of each pair of tiles it makes the dot products; the depth goes by in stages, and while
// one stage is multiplied from shared memory the next is on its way into it. The rows are not normalized
// first: their squares are summed from the same stages, and s_ij = dot / |x_i| / |x_j|. A thread keeps
// the best destination of the rows that it has sums of, and the block leaves one key a source: nothing of
// the size N x N is stored, and nothing depends on the order in which blocks run.
//
// Every 128 bytes of a row are summed by themselves and then added to the total: rounding errors grow with
// the number of stages and the length of one, not with the depth. Tensor cores truncate, which is a bias:
// in one long sum it would add up. Both tile sizes add in the same order: the same bits.
#pragma once

#include "similarity.h"
#include "tensor_core.h"
#include "tile.h"

namespace simprune {

constexpr int kFoldBytes = 128;

template <class Tile>
struct MatchShared {
    static constexpr int kKeys = 16;  // threads with sums of one row, at most
    union alignas(16) {
        uint8_t stage[Tile::kBuffers][Tile::kThreads][Tile::kRowBytes];  // the rows of sources, then of destinations
        uint64_t keys[Tile::kRows][kKeys];
    };
    float source_inverse[Tile::kRows];
    float destination_inverse[2][Tile::kColumns];  // of this tile and the next
};

template <class T, class Tile, bool kTensorCores>
class Match {
public:
    using Shared = MatchShared<Tile>;

    SIMPRUNE_FN Match(const Job& job, int block_index) : job_(job) {
        const int split = block_index % job.splits;
        source_tile_ = block_index / job.splits % job.source_tiles;
        image_ = block_index / job.splits / job.source_tiles;
        first_tile_ = split * job.tiles_per_split;
        const int left = job.destination_tiles - first_tile_;
        stages_ = (job.feature_dim + kDepth - 1) / kDepth;
        iterations_ = (left < job.tiles_per_split ? left : job.tiles_per_split) * stages_;
        features_ =
            static_cast<const T*>(job.features) + (image_ * job.num_tokens + job.prefix) * int64_t{job.feature_dim};
        best_ = job.best + (image_ * job.splits + split) * job.sources;
    }

    SIMPRUNE_FN void run(const Block& block, Shared& shared) {
        Registers<Sums> part(block), total(block);  // zeros
        Registers<Squares> squares(block);
        Registers<BestOfRows> best(block);
        Copies copies;
        block.warps([&](const Warp& warp) {
            warp.each([&](int lane) {
                const int thread = warp.index * kWarp + lane;
#pragma unroll
                for (int i = 0; i < Tile::kBuffers - 1; ++i) bring(thread, shared, copies, i);
                best.of(warp, lane).clear();
                copies.template wait<Tile::kBuffers - 2>(thread);
            });
        });
        for (int iteration = 0; iteration < iterations_; ++iteration) {
            const int stage = iteration % stages_, tile = iteration / stages_;
            block.warps([&](const Warp& warp) {
                warp.each([&](int lane) {
                    bring(warp.index * kWarp + lane, shared, copies, iteration + Tile::kBuffers - 1);
                    if (stage != 0) return;
                    squares.of(warp, lane).usable = usable(warp.index * kWarp + lane, tile);
                    if (tile == 0) return;
                    compare(warp, lane, shared, tile - 1, total.of(warp, lane), best.of(warp, lane));
                    total.of(warp, lane) = Sums{};
                });
                warp.sync();  // products are made by whole warps
                if (has_work(warp, tile)) {
                    if constexpr (kTensorCores) {
                        multiply_on_tensor_cores(warp, shared, iteration, part);
                    } else {
                        multiply_plainly(warp, shared, iteration, part);
                    }
                }
                const bool last = stage + 1 == stages_;
                warp.each([&](int lane) {
                    const int thread = warp.index * kWarp + lane;
                    const bool fold = Tile::kStageBytes % kFoldBytes == 0 || last ||
                                      (stage + 1) * Tile::kStageBytes % kFoldBytes == 0;
                    if (fold) {
                        total.of(warp, lane).add(part.of(warp, lane));
                        part.of(warp, lane) = Sums{};
                    }
                    if (thread >= Tile::kRows || tile == 0) {
                        Squares& mine = squares.of(warp, lane);
                        mine.add(row_of_stage(shared, iteration, thread));
                        if (fold) mine.fold();
                        if (last) note_inverse(thread, shared, tile, mine);
                    }
                    copies.template wait<Tile::kBuffers - 2>(thread);
                });
            });
        }
        // The last tile; then the threads that share a row agree
        block.warps([&](const Warp& warp) {
            warp.each([&](int lane) {
                BestOfRows& mine = best.of(warp, lane);
                if (iterations_ > 0) {
                    compare(warp, lane, shared, iterations_ / stages_ - 1, total.of(warp, lane), mine);
                }
#pragma unroll
                for (int r = 0; r < kRowsOfThread; ++r) {
                    const uint64_t key = mine.destination[r] >= 0 ? key_of(mine.score[r], mine.destination[r]) : kNoKey;
                    shared.keys[row_of(warp, lane, r)][place_of(warp, lane)] = key;
                }
            });
        });
        block.threads([&](int thread) {
            const int source = source_tile_ * Tile::kRows + thread;
            if (thread >= Tile::kRows || source >= job_.sources) return;
            uint64_t key = kNoKey;
            for (int i = 0; i < kPlaces; ++i) {
                const uint64_t other = shared.keys[thread][i];
                if (other > key) key = other;
            }
            best_[source] = key;
        });
    }

private:
    static constexpr int kDepth = Tile::kStageBytes / static_cast<int>(sizeof(T));  // elements of a stage
    static constexpr int kPack = Pack<T>::kCount;
    static constexpr int kPacks = Tile::kStageBytes / 16;  // of a row of a stage

    // A thread has the dot products of kRowsOfThread rows with kColumnsOfThread columns.
    static constexpr int kRowGroups = Tile::kThreads / 16;  // without tensor cores
    static constexpr int kRowsOfThread = kTensorCores ? Tile::kRowFragments * 2 : Tile::kRows / kRowGroups;
    static constexpr int kColumnsOfThread = kTensorCores ? Tile::kColumnFragments * 2 : Tile::kColumns / 16;
    static constexpr int kPlaces = kTensorCores ? Tile::kWarpColumns * 4 : 16;  // threads with the same row

    struct Sums {
        float value[kRowsOfThread * kColumnsOfThread];

        SIMPRUNE_FN void add(const Sums& part) {
#pragma unroll
            for (int i = 0; i < kRowsOfThread * kColumnsOfThread; ++i) value[i] += part.value[i];
        }
    };

    struct Squares {
        float part[4], total;
        bool usable;  // the destination that a thread sums up

        SIMPRUNE_FN void add(const uint8_t* row) {
#pragma unroll
            for (int p = 0; p < kPacks; ++p) {
                const Pack<T> pack = pack_of(row, p);
#pragma unroll
                for (int e = 0; e < kPack; ++e) {
                    const float x = to_float(pack.value[e]);
                    part[e % 4] = multiply_add(x, x, part[e % 4]);
                }
            }
        }
        SIMPRUNE_FN void fold() {
            total += (part[0] + part[1]) + (part[2] + part[3]);
            part[0] = part[1] = part[2] = part[3] = 0.0f;
        }
    };

    struct BestOfRows {
        float score[kRowsOfThread];
        int destination[kRowsOfThread];

        SIMPRUNE_FN void clear() {
#pragma unroll
            for (int r = 0; r < kRowsOfThread; ++r) {
                score[r] = -INFINITY;
                destination[r] = -1;
            }
        }
    };

    SIMPRUNE_FN int patch_of_source(int source) const {
        return job_.redundancy ? source : 2 * source;
    }
    SIMPRUNE_FN int patch_of_destination(int destination) const {
        return job_.redundancy ? destination : 2 * destination + 1;
    }

    // With few stages those of the sources stay where they are for all tiles of destinations.
    SIMPRUNE_FN bool sources_stay() const {
        return stages_ <= Tile::kBuffers;
    }

    SIMPRUNE_FN const uint8_t* row_of_stage(const Shared& shared, int iteration, int row) const {
        const int buffer = row < Tile::kRows && sources_stay() ? iteration % stages_ : iteration % Tile::kBuffers;
        return shared.stage[buffer][row];
    }

    // Starts a thread's share of the copies of one stage into its buffer; zeros beyond the features.
    SIMPRUNE_FN void bring(int thread, Shared& shared, Copies& copies, int iteration) const {
        if (iteration < iterations_) {
            const int in_row = thread % kPacks, first_row = thread / kPacks;
            const int tile = iteration / stages_;
            const int column = iteration % stages_ * kDepth + in_row * kPack;
            constexpr int kStep = Tile::kThreads / kPacks;
            static_assert(Tile::kRows % kStep == 0, "a step stays within one operand");
#pragma unroll
            for (int step = 0; step < Tile::kThreads; step += kStep) {
                const int row = first_row + step;
                int patch;
                bool inside;
                if (step < Tile::kRows) {
                    if (sources_stay() && tile > 0) continue;
                    const int source = source_tile_ * Tile::kRows + row;
                    inside = source < job_.sources;
                    patch = patch_of_source(source);
                } else {
                    const int destination = (first_tile_ + tile) * Tile::kColumns + row - Tile::kRows;
                    inside = destination < job_.destinations;
                    patch = patch_of_destination(destination);
                }
                auto* target = const_cast<uint8_t*>(row_of_stage(shared, iteration, row)) + in_row * 16;
                const T* source = features_ + int64_t{inside ? patch : 0} * job_.feature_dim + column;
                if (job_.features_aligned) {
                    copies.copy_or_clear(thread, target, source, inside && column < job_.feature_dim, features_);
                    continue;
                }
                auto* pack = reinterpret_cast<Pack<T>*>(target);
                for (int e = 0; e < kPack; ++e) {
                    pack->value[e] = inside && column + e < job_.feature_dim ? source[e] : from_float<T>(0.0f);
                }
            }
        }
        copies.commit(thread);
    }

    // Whether anything may go to the destination whose row the thread sums up.
    SIMPRUNE_FN bool usable(int thread, int tile) const {
        const int destination = (first_tile_ + tile) * Tile::kColumns + thread - Tile::kRows;
        if (thread < Tile::kRows || destination >= job_.destinations) return false;
        const int patch = patch_of_destination(destination);
        if (job_.redundancy) return job_.stays[image_ * job_.num_patches + patch] != 0;
        return is_valid(job_, image_, patch);
    }

    SIMPRUNE_FN void note_inverse(int thread, Shared& shared, int tile, Squares& squares) const {
        const float inverse = inverse_norm(squares.total);
        if (thread < Tile::kRows) {
            shared.source_inverse[thread] = inverse;
        } else {
            // NaN is less alike than anything
            shared.destination_inverse[tile % 2][thread - Tile::kRows] = squares.usable ? inverse : kNotANumber;
        }
        squares.total = 0.0f;
    }

    // Holds the finished sums against the best so far, in ascending order of the destinations.
    SIMPRUNE_FN void compare(
        const Warp& warp, int lane, const Shared& shared, int tile, const Sums& sums, BestOfRows& best) const {
        float of_row[kRowsOfThread], of_column[kColumnsOfThread];
        bool plain = true;
#pragma unroll
        for (int r = 0; r < kRowsOfThread; ++r) {
            of_row[r] = shared.source_inverse[row_of(warp, lane, r)];
            plain = plain && of_row[r] != 0.0f;
        }
#pragma unroll
        for (int c = 0; c < kColumnsOfThread; ++c) {
            of_column[c] = shared.destination_inverse[tile % 2][column_of(warp, lane, c)];
            plain = plain && of_column[c] != 0.0f;
        }
        const int first = (first_tile_ + tile) * Tile::kColumns;
        if (plain) {
            compare_with(warp, lane, first, best, [&](int r, int c) {
                return similarity(sums.value[sum_of(r, c)], of_row[r], of_column[c]);
            });
        } else {
            compare_with(warp, lane, first, best, [&](int r, int c) {
                const bool nothing = of_row[r] == 0.0f || of_column[c] == 0.0f;
                return similarity(nothing ? 0.0f : sums.value[sum_of(r, c)], of_row[r], of_column[c]);
            });
        }
    }

    template <class Score>
    SIMPRUNE_FN static void compare_with(const Warp& warp, int lane, int first, BestOfRows& best, Score score_of) {
#pragma unroll
        for (int c = 0; c < kColumnsOfThread; ++c) {
            const int destination = first + column_of(warp, lane, c);
#pragma unroll
            for (int r = 0; r < kRowsOfThread; ++r) {
                const float score = score_of(r, c);
                if (score > best.score[r]) {  // not where it is NaN
                    best.score[r] = score;
                    best.destination[r] = destination;
                }
            }
        }
    }

    // ---- which sums a thread has

    SIMPRUNE_FN static int warp_row(const Warp& warp) {
        return warp.index / Tile::kWarpColumns * Tile::kRowFragments * 16;
    }
    SIMPRUNE_FN static int warp_column(const Warp& warp) {
        return warp.index % Tile::kWarpColumns * Tile::kColumnFragments * 8;
    }

    // Without tensor cores rows are broadcast to 16 threads, and columns 16 apart lie on different banks
    SIMPRUNE_FN static int row_of(const Warp& warp, int lane, int r) {
        if (kTensorCores) return warp_row(warp) + r / 2 * 16 + r % 2 * 8 + lane / 4;
        return (warp.index * kWarp + lane) / 16 + r * kRowGroups;
    }
    SIMPRUNE_FN static int column_of(const Warp& warp, int lane, int c) {
        if (kTensorCores) return warp_column(warp) + c / 2 * 8 + lane % 4 * 2 + c % 2;
        return lane % 16 + c * 16;
    }
    SIMPRUNE_FN static constexpr int sum_of(int r, int c) {
        if (kTensorCores) return (r / 2 * Tile::kColumnFragments + c / 2) * 4 + r % 2 * 2 + c % 2;
        return r * kColumnsOfThread + c;
    }
    SIMPRUNE_FN static int place_of(const Warp& warp, int lane) {
        return kTensorCores ? warp.index % Tile::kWarpColumns * 4 + lane % 4 : lane % 16;
    }

    // Nothing is to be done beyond the last source or destination.
    SIMPRUNE_FN bool has_work(const Warp& warp, int tile) const {
        if (!kTensorCores) return true;
        return source_tile_ * Tile::kRows + warp_row(warp) < job_.sources &&
               (first_tile_ + tile) * Tile::kColumns + warp_column(warp) < job_.destinations;
    }

    // ---- float16 and bfloat16

    SIMPRUNE_FN void multiply_on_tensor_cores(
        const Warp& warp, const Shared& shared, int iteration, Registers<Sums>& part) const {
        const uint8_t* rows = row_of_stage(shared, iteration, 0) + warp_row(warp) * Tile::kRowBytes;
        const uint8_t* columns = row_of_stage(shared, iteration, Tile::kRows) + warp_column(warp) * Tile::kRowBytes;
#pragma unroll
        for (int k = 0; k < Tile::kStageBytes; k += 32) {  // 16 elements
            Lanes<Fragment> a[Tile::kRowFragments];
#pragma unroll
            for (int m = 0; m < Tile::kRowFragments; ++m) {
                load_matrices(
                    warp, a[m], [&](int i) { return rows + (m * 16 + i % 16) * Tile::kRowBytes + k + i / 16 * 16; });
            }
#pragma unroll
            for (int n = 0; n < Tile::kColumnFragments; n += 2) {
                Lanes<Fragment> b;
                load_matrices(warp, b, [&](int i) {
                    return columns + (n * 8 + i / 16 * 8 + i % 8) * Tile::kRowBytes + k + i / 8 % 2 * 16;
                });
#pragma unroll
                for (int m = 0; m < Tile::kRowFragments; ++m) {
#pragma unroll
                    for (int which = 0; which < 2; ++which) {
                        multiply_accumulate<T>(
                            warp,
                            [&](int lane) {
                                return part.of(warp, lane).value + (m * Tile::kColumnFragments + n + which) * 4;
                            },
                            a[m], b, which);
                    }
                }
            }
        }
    }

    // ---- float32, and what the GPU's tensor cores do not take

    SIMPRUNE_FN void multiply_plainly(
        const Warp& warp, const Shared& shared, int iteration, Registers<Sums>& part) const {
        const uint8_t* rows = row_of_stage(shared, iteration, 0);
        const uint8_t* columns = row_of_stage(shared, iteration, Tile::kRows);
        warp.each([&](int lane) {
            float* sum = part.of(warp, lane).value;
#pragma unroll 2
            for (int p = 0; p < kPacks; ++p) {
                Pack<T> of_column[kColumnsOfThread];
#pragma unroll
                for (int c = 0; c < kColumnsOfThread; ++c) {
                    of_column[c] = pack_of(columns + column_of(warp, lane, c) * Tile::kRowBytes, p);
                }
#pragma unroll
                for (int r = 0; r < kRowsOfThread; ++r) {
                    const Pack<T> of_row = pack_of(rows + row_of(warp, lane, r) * Tile::kRowBytes, p);
#pragma unroll
                    for (int c = 0; c < kColumnsOfThread; ++c) {
#pragma unroll
                        for (int e = 0; e < kPack; ++e) {
                            float& one = sum[sum_of(r, c)];
                            one = multiply_add(to_float(of_row.value[e]), to_float(of_column[c].value[e]), one);
                        }
                    }
                }
            }
        });
    }

    SIMPRUNE_FN static const Pack<T>& pack_of(const uint8_t* row, int index) {
        return *reinterpret_cast<const Pack<T>*>(row + index * 16);
    }

    const Job& job_;
    int64_t image_;
    int source_tile_, first_tile_, stages_, iterations_;
    const T* features_;
    uint64_t* best_;
};

// Also clears the counter that kernel 2 raises, so that no launch is spent on that.
template <class T, class Tile, bool kTensorCores>
SIMPRUNE_FN void match_kernel(const Block& block, const Job& job, MatchShared<Tile>& shared) {
    if (block.index == 0) {
        block.threads([&](int thread) {
            if (thread == 0) *job.most_kept = 0;
        });
    }
    Match<T, Tile, kTensorCores>(job, block.index).run(block, shared);
}

}  // namespace simprune
