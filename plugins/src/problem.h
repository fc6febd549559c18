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

// Offsets in bytes. The dot products of the whole batch may be large: images are worked on in groups
// that fit into kWorkBytes, or one by one. The total does not shrink when a size grows.
struct Layout {
    size_t most_kept, num_kept, heads, work, total;
    size_t gram, rows;  // inside the work space, behind the inverse norms
    int64_t images_in_work;

    explicit Layout(const simprune_problem& problem);
};

Job make_job(const simprune_problem& problem, const simprune_buffers& buffers, void* workspace, const Layout& layout);

// How many blocks each kernel has for one image.
struct Grid {
    int gram, rows, write;

    explicit Grid(const Job& job);
};

// Runs a job, group by group; in launch_cuda.cu and launch_host.cpp.
int launch(int32_t dtype, Job job, const Layout& layout, void* stream);

}  // namespace simprune
