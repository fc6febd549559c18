// The sizes of match's tiles.
#pragma once

#include "job.h"

namespace simprune {

template <int warp_rows, int warp_columns, int row_fragments, int column_fragments, int stage_bytes, int buffers>
struct Tile {
    static constexpr int kWarpRows = warp_rows, kWarpColumns = warp_columns;
    static constexpr int kRowFragments = row_fragments, kColumnFragments = column_fragments;  // of a warp
    static constexpr int kStageBytes = stage_bytes;                                           // of a row
    static constexpr int kBuffers = buffers;

    static constexpr int kThreads = kWarpRows * kWarpColumns * kWarp;
    static constexpr int kRows = kWarpRows * kRowFragments * 16;          // sources
    static constexpr int kColumns = kWarpColumns * kColumnFragments * 8;  // destinations
    static constexpr int kRowBytes = kStageBytes + 16;  // 16 more: 8 rows x 16 bytes lie on all 32 banks
    static_assert(kThreads == kRows + kColumns, "a thread sums the squares of one row");
};

// 64 x 64, and for wide features in large batches 128 x 128: half of the bytes to each product.
using SmallTile = Tile<2, 2, 2, 4, 128, 2>;
using LargeTile = Tile<4, 2, 2, 8, 64, 3>;

}  // namespace simprune
