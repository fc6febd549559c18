// What every kernel reads: the problem, and where its tensors and workspace lie.
#pragma once

#include <cstdint>

#include "simprune.h"

namespace simprune {

constexpr int kWarp = 32;
constexpr int kSmallPatches = 256;  // up to here one block does an image's rows, selection and assignment
constexpr int kMaxWords = SIMPRUNE_MAX_PATCHES / kWarp;
constexpr int kTile = 64;  // rows and columns of a block of the gram kernel
constexpr int kGramThreads = 128;
constexpr int kRowThreads = 256;  // rows and assign kernels: one warp a patch
constexpr int kRowsPerBlock = kRowThreads / kWarp;
constexpr int kSelectThreads = 1024;
constexpr int kWriteThreads = 256;  // one warp a slot
constexpr int kSlotsPerBlock = kWriteThreads / kWarp;
constexpr int kUndecided = -2;  // in `assignment`: left to the assign kernel

struct Job {
    // The problem; M = N - P patches
    int64_t batch;
    int num_tokens, num_patches, dim, prefix, capacity;
    int words;  // M / 32 rounded up: bit masks have one bit a patch
    int64_t multiple_of;
    bool redundancy, merge, threshold_per_image;
    bool aligned;  // rows of tokens and kept_tokens start on 16 bytes

    const void* tokens;
    const float* log_size;
    const float* threshold;
    void* kept_tokens;
    float* kept_log_size;
    int64_t* kept_index;
    int64_t* assignment;
    int32_t* num_slots;

    // Workspace of the whole batch
    int32_t* most_kept;  // [1] largest number of kept patches of an image
    int32_t* num_kept;   // [B]
    int32_t* heads;      // [B, M] the kept patches of an image, ascending

    // Workspace of the images [first_image, first_image + num_images) that are in work
    int64_t first_image;
    int num_images;
    int gram_stride;      // row length of gram: M rounded up to 32
    float* gram;          // [num_images, M, gram_stride] dot products of patches
    float* inverse_norm;  // [num_images, gram_stride]
    uint32_t* earlier;    // [num_images, M, words] cover: bit j of row i: j < i is alike. If M > kSmallPatches
    float* score;         // [num_images, gram_stride] redundancy: mean similarity. If M > kSmallPatches
};

}  // namespace simprune
