// What every kernel reads: the problem, and where its tensors and workspace lie.
#pragma once

#include <cstdint>

#include "simprune.h"

namespace simprune {

constexpr int kWarp = 32;
constexpr int kMaxWords = SIMPRUNE_MAX_PATCHES / kWarp;  // bit masks have one bit a patch
constexpr int kMaxSplits = 16;
constexpr int kMeansThreads = 1024;
constexpr int kMaxCompactThreads = 1024;
constexpr int kWriteThreads = 256;  // one warp a slot
constexpr int kSlotsPerBlock = kWriteThreads / kWarp;

// What compact leaves for write about one slot behind the prefix.
struct alignas(8) Slot {
    uint16_t patch;    // that heads it
    uint16_t first;    // of the patches that went to it, in `order`
    uint16_t members;  // how many those are
};

struct Job {
    // The problem; M = N - P patches
    int64_t batch;
    int num_tokens, num_patches, dim, feature_dim, prefix, capacity;
    int words;  // M / 32 rounded up
    int64_t multiple_of;
    bool redundancy, merge, threshold_per_image;
    bool tokens_aligned;    // rows of tokens and kept_tokens start on 16 bytes
    bool features_aligned;  // rows of features do

    const void* tokens;
    const void* features;
    const float* log_size;
    const float* threshold;
    void* kept_tokens;
    float* kept_log_size;
    int64_t* kept_index;
    int64_t* assignment;
    int32_t* num_kept;

    // How match is divided. Sources look for the most similar destination. With pairs they are the
    // patches with even and with odd numbers, with redundancy both are all patches.
    int sources, destinations;
    bool large_tiles;
    int source_tiles, destination_tiles;
    int splits, tiles_per_split;  // blocks that share the destinations of a tile of sources

    // Workspace. Nothing in it outlives a call: what is read was written in the same call.
    int32_t* most_kept;  // [1] largest number of kept patches of an image
    int32_t* kept;       // [B] kept patches
    Slot* slots;         // [B, M]
    uint16_t* order;     // [B, M] the patches that go, those of one slot together
    uint64_t* best;      // [B, splits, sources] the most similar destination as a key (similarity.h)
    uint8_t* stays;      // [B, M] redundancy: valid, and not to go
    float* sum;          // [B, F] redundancy: of the features
};

}  // namespace simprune
