// Which problems the operator covers, and how the workspace of one is divided.
#pragma once

#include <cstddef>
#include <cstdint>

#include "job.h"
#include "simprune.h"

namespace simprune {

// Keeps what went wrong for simprune_error(), and returns the status.
int fail(simprune_status status, const char* format, ...) __attribute__((format(printf, 2, 3)));

int check_problem(const simprune_problem* problem);
int check_buffers(
    const simprune_problem& problem, const simprune_buffers* buffers, const void* workspace, size_t workspace_bytes);

// Offsets in bytes. The total does not shrink when a size grows.
struct Layout {
    size_t most_kept, kept, slots, order, best, stays, sum, total;

    explicit Layout(const simprune_problem& problem);
};

struct Gpu {
    int sm;  // 80 for 8.0
    int multiprocessors;
};

// How the work is divided depends on the GPU; no result does.
Job make_job(const simprune_problem& problem, const simprune_buffers& buffers, void* workspace, const Gpu& gpu);

// How many blocks each kernel has, and how many threads compact has in one.
struct Grid {
    int64_t means, match, compact, write;
    int compact_threads;

    explicit Grid(const Job& job);
};

// Runs the problem; in launch_cuda.cu and launch_host.cpp.
int launch(const simprune_problem& problem, const simprune_buffers& buffers, void* workspace, void* stream);

}  // namespace simprune
