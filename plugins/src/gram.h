// Kernel 1: the dot products of all patches of an image, G = X X^T, and the inverse norms.
//
// A block makes one tile of kTile x kTile sums of the lower triangle and writes it twice, as it is
// and mirrored, so that G_ij and G_ji have the same bits. The depth goes by in stages of 128 bytes a
// row; while one stage is multiplied from shared memory the next is on its way into it. The rows are
// not normalized first: s_ij = G_ij / (sqrt(G_ii) sqrt(G_jj)), and the diagonal is there.
//
// A stage is summed by itself and then added to the total: rounding errors grow with the number of
// stages and the length of one, not with the depth. Tensor cores truncate, which is a bias: in one long
// sum it would add up.
#pragma once

#include "job.h"
#include "tensor_core.h"

namespace simprune {

constexpr int kStageBytes = 128;             // of a row
constexpr int kRowBytes = kStageBytes + 16;  // shared memory: 16 more keep 8 rows x 4 words on 32 banks
constexpr int kPacksPerRow = kStageBytes / 16;
constexpr float kNormFloor = 1e-12f;

struct GramShared {
    alignas(16) uint8_t stage[2][2][kTile][kRowBytes];  // [double buffer][operand][row]
};

// A thread's sums: [2][4][4] fragments of a 32 x 32 warp tile, or [8][4] of the plain code.
struct GramSums {
    float value[32];

    SIMPRUNE_FN void add(const GramSums& part) {
#pragma unroll
        for (int i = 0; i < 32; ++i) value[i] += part.value[i];
    }
};

SIMPRUNE_FN int gram_tiles(const Job& job) {
    return (job.num_patches + kTile - 1) / kTile;
}

template <class T>
class GramTile {
public:
    SIMPRUNE_FN GramTile(const Job& job, int block_index) : job_(job) {
        const int tiles = gram_tiles(job), pairs = tiles * (tiles + 1) / 2;
        image_ = block_index / pairs;
        // The pair (row tile, column tile), column <= row, that has this number
        int number = block_index % pairs;
        row_tile_ = 0;
        while (number > row_tile_) number -= ++row_tile_;
        column_tile_ = number;
        patches_ = static_cast<const T*>(job.tokens) +
                   ((job.first_image + image_) * job.num_tokens + job.prefix) * int64_t{job.dim};
    }

    template <bool kTensorCores>
    SIMPRUNE_FN void run(const Block& block, GramShared& shared) {
        Registers<GramSums> sums(block);  // zeros
        const int stages = (job_.dim + kDepth - 1) / kDepth;
        block.threads([&](int thread) {
            bring(thread, shared, 0);
            wait_for_copies();
        });
        for (int stage = 0; stage < stages; ++stage) {
            block.warps([&](const Warp& warp) {
                if (stage + 1 < stages) {
                    warp.each([&](int lane) { bring(warp.index * kWarp + lane, shared, stage + 1); });
                }
                if constexpr (kTensorCores) {
                    multiply_on_tensor_cores(warp, shared, stage % 2, sums);
                } else {
                    multiply_plainly(warp, shared, stage % 2, sums);
                }
                warp.each([&](int) { wait_for_copies(); });
            });
        }
        block.warps([&](const Warp& warp) {
            warp.each([&](int lane) {
                if constexpr (kTensorCores) {
                    write_fragments(warp, lane, sums.of(warp, lane));
                } else {
                    write_plainly(warp.index * kWarp + lane, sums.of(warp, lane));
                }
            });
        });
    }

private:
    static constexpr int kDepth = kStageBytes / static_cast<int>(sizeof(T));  // elements of a stage
    static constexpr int kPack = Pack<T>::kCount;

    // A diagonal tile multiplies its rows with themselves: one operand is enough.
    SIMPRUNE_FN bool diagonal() const { return row_tile_ == column_tile_; }
    SIMPRUNE_FN int operands() const { return diagonal() ? 1 : 2; }
    SIMPRUNE_FN int column_operand() const { return diagonal() ? 0 : 1; }

    // Starts a thread's share of the copies of one stage into its buffer; zeros beyond the tokens.
    SIMPRUNE_FN void bring(int thread, GramShared& shared, int stage) const {
        const int in_row = thread % kPacksPerRow, column = stage * kDepth + in_row * kPack;
        for (int operand = 0; operand < operands(); ++operand) {
            const int first = (operand == 0 ? row_tile_ : column_tile_) * kTile;
#pragma unroll
            for (int i = 0; i < kTile * kPacksPerRow / kGramThreads; ++i) {
                const int row = thread / kPacksPerRow + i * (kGramThreads / kPacksPerRow);
                auto* target = reinterpret_cast<Pack<T>*>(shared.stage[stage % 2][operand][row] + in_row * 16);
                const bool inside = first + row < job_.num_patches;
                const T* source = patches_ + int64_t{inside ? first + row : 0} * job_.dim + column;
                if (job_.aligned) {
                    copy_or_clear(target, source, inside && column < job_.dim, patches_);
                    continue;
                }
                for (int e = 0; e < kPack; ++e) {
                    target->value[e] = inside && column + e < job_.dim ? source[e] : from_float<T>(0.0f);
                }
            }
        }
    }

    // ---- float16 and bfloat16: 2 x 2 warps, each 32 x 32 sums as 2 x 4 fragments

    SIMPRUNE_FN int warp_row(const Warp& warp) const {
        return warp.index / 2 * 32;
    }
    SIMPRUNE_FN int warp_column(const Warp& warp) const {
        return warp.index % 2 * 32;
    }

    SIMPRUNE_FN void multiply_on_tensor_cores(
        const Warp& warp, GramShared& shared, int buffer, Registers<GramSums>& sums) const {
        const int row = warp_row(warp), column = warp_column(warp);
        // Nothing to do above the diagonal or beyond the last patch
        if ((diagonal() && column > row) || row_tile_ * kTile + row >= job_.num_patches) return;
        const auto& rows = shared.stage[buffer][0];
        const auto& columns = shared.stage[buffer][column_operand()];
        Lanes<GramSums> part;
        warp.each([&](int lane) { part[lane] = GramSums{}; });
#pragma unroll
        for (int k = 0; k < kStageBytes / 32; ++k) {  // 16 elements, 8 words
            Lanes<FragmentA> a[2];
            Lanes<FragmentB> b[4];
            warp.each([&](int lane) {
                const int g = lane / 4, t = k * 8 + lane % 4;
#pragma unroll
                for (int m = 0; m < 2; ++m) {
#pragma unroll
                    for (int w = 0; w < 4; ++w) {
                        a[m][lane].word[w] = word_of(rows[row + m * 16 + g + w % 2 * 8], t + w / 2 * 4);
                    }
                }
#pragma unroll
                for (int n = 0; n < 4; ++n) {
#pragma unroll
                    for (int w = 0; w < 2; ++w) {
                        b[n][lane].word[w] = word_of(columns[column + n * 8 + g], t + w * 4);
                    }
                }
            });
#pragma unroll
            for (int m = 0; m < 2; ++m) {
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    multiply_accumulate<T>(
                        warp, [&](int lane) { return part[lane].value + (m * 4 + n) * 4; }, a[m], b[n]);
                }
            }
        }
        warp.each([&](int lane) { sums.of(warp, lane).add(part[lane]); });
    }

    SIMPRUNE_FN static uint32_t word_of(const uint8_t* row, int index) {
#if defined(SIMPRUNE_ON_HOST)
        uint32_t word;
        std::memcpy(&word, row + index * 4, 4);
        return word;
#else
        return reinterpret_cast<const uint32_t*>(row)[index];
#endif
    }

    SIMPRUNE_FN void write_fragments(const Warp& warp, int lane, const GramSums& sums) const {
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            const int m = i / 16, n = i / 4 % 4, c = i % 4;
            write(
                warp_row(warp) + m * 16 + lane / 4 + c / 2 * 8, warp_column(warp) + n * 8 + lane % 4 * 2 + c % 2,
                sums.value[i]);
        }
    }

    // ---- float32, and what the GPU's tensor cores do not take: a thread has 8 x 4 sums

    SIMPRUNE_FN void multiply_plainly(
        const Warp& warp, GramShared& shared, int buffer, Registers<GramSums>& sums) const {
        warp.each([&](int lane) {
            const int thread = warp.index * kWarp + lane;
            GramSums part{};
            float* sum = part.value;
#pragma unroll 2
            for (int p = 0; p < kPacksPerRow; ++p) {
                Pack<T> columns[4];
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    columns[c] = pack_of(shared.stage[buffer][column_operand()][plain_column(thread, c)], p);
                }
#pragma unroll
                for (int r = 0; r < 8; ++r) {
                    const Pack<T> row = pack_of(shared.stage[buffer][0][plain_row(thread, r)], p);
#pragma unroll
                    for (int c = 0; c < 4; ++c) {
#pragma unroll
                        for (int e = 0; e < kPack; ++e) {
                            sum[r * 4 + c] =
                                multiply_add(to_float(row.value[e]), to_float(columns[c].value[e]), sum[r * 4 + c]);
                        }
                    }
                }
            }
            sums.of(warp, lane).add(part);
        });
    }

    SIMPRUNE_FN static const Pack<T>& pack_of(const uint8_t* row, int index) {
        return *reinterpret_cast<const Pack<T>*>(row + index * 16);
    }
    // Rows are broadcast to 16 threads; columns 16 apart lie on different banks
    SIMPRUNE_FN static int plain_row(int thread, int r) {
        return thread / 16 + r * 8;
    }
    SIMPRUNE_FN static int plain_column(int thread, int c) {
        return thread % 16 + c * 16;
    }

    SIMPRUNE_FN void write_plainly(int thread, const GramSums& sums) const {
#pragma unroll
        for (int i = 0; i < 32; ++i) write(plain_row(thread, i / 4), plain_column(thread, i % 4), sums.value[i]);
    }

    // ---- results

    SIMPRUNE_FN void write(int row_in_tile, int column_in_tile, float sum) const {
        const int i = row_tile_ * kTile + row_in_tile, j = column_tile_ * kTile + column_in_tile;
        if (i >= job_.num_patches || j > i) return;
        float* gram = job_.gram + int64_t{image_} * job_.num_patches * job_.gram_stride;
        gram[int64_t{i} * job_.gram_stride + j] = sum;
        if (j < i) {
            gram[int64_t{j} * job_.gram_stride + i] = sum;
        } else {
            const float norm = square_root(sum);
            // The norm of finite numbers can be infinite in float32: then f = x / inf = 0
            job_.inverse_norm[int64_t{image_} * job_.gram_stride + i] = 1.0f / (norm < kNormFloor ? kNormFloor : norm);
        }
    }

    const Job& job_;
    int image_, row_tile_, column_tile_;
    const T* patches_;
};

// Also clears the counter that kernel 2 raises, so that no launch is spent on that.
template <class T, bool kTensorCores>
SIMPRUNE_FN void gram_kernel(const Block& block, const Job& job, GramShared& shared) {
    if (block.index == 0 && job.first_image == 0) {
        block.threads([&](int thread) {
            if (thread == 0) *job.most_kept = 0;
        });
    }
    GramTile<T>(job, block.index).template run<kTensorCores>(block, shared);
}

}  // namespace simprune
