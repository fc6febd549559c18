// The kernels on the CPU: every block in turn, in the order that the schedule says.
#include <vector>

#include "compact.h"
#include "match.h"
#include "means.h"
#include "problem.h"
#include "write.h"

namespace simprune {

Schedule host_schedule;

namespace {

// Shared memory as a GPU gives it: with whatever was in it.
template <class Shared>
class Garbage {
public:
    Garbage() : bytes_(sizeof(Shared) + alignof(Shared)) {}
    Shared& fresh() {
        std::fill(bytes_.begin(), bytes_.end(), uint8_t{0xA5});
        const auto address = reinterpret_cast<uintptr_t>(bytes_.data());
        return *reinterpret_cast<Shared*>((address + alignof(Shared) - 1) / alignof(Shared) * alignof(Shared));
    }

private:
    std::vector<uint8_t> bytes_;
};

template <class Shared, class Kernel>
void each_block(int64_t blocks, int threads, Kernel kernel) {
    Garbage<Shared> shared;
    in_scheduled_order(static_cast<int>(blocks), [&](int index) { kernel(Block{index, threads}, shared.fresh()); });
}

template <class T, class Tile>
void match(const Job& job, const Grid& grid) {
    each_block<MatchShared<Tile>>(grid.match, Tile::kThreads, [&](const Block& block, auto& shared) {
        if (has_tensor_cores<T>(host_schedule.sm)) {
            if constexpr (sizeof(T) == 2) match_kernel<T, Tile, true>(block, job, shared);
        } else {
            match_kernel<T, Tile, false>(block, job, shared);
        }
    });
}

template <class T>
void run(const Job& job) {
    const Grid grid(job);
    each_block<MeansShared>(grid.means, kMeansThreads, [&](const Block& block, MeansShared& shared) {
        means_kernel<T>(block, job, shared);
    });
    if (job.large_tiles) {
        match<T, LargeTile>(job, grid);
    } else {
        match<T, SmallTile>(job, grid);
    }
    each_block<CompactShared>(grid.compact, grid.compact_threads, [&](const Block& block, CompactShared& shared) {
        compact_kernel(block, job, shared);
    });
    in_scheduled_order(static_cast<int>(grid.write), [&](int index) {
        const Block block{index, kWriteThreads};
        if (job.tokens_aligned) {
            write_kernel<T, true>(block, job);
        } else {
            write_kernel<T, false>(block, job);
        }
    });
}

}  // namespace

int launch(const simprune_problem& problem, const simprune_buffers& buffers, void* workspace, void*) {
    const Job job = make_job(problem, buffers, workspace, {host_schedule.sm, host_schedule.multiprocessors});
    switch (problem.dtype) {
        case SIMPRUNE_FLOAT32:
            run<float>(job);
            break;
        case SIMPRUNE_FLOAT16:
            run<__half>(job);
            break;
        default:
            run<__nv_bfloat16>(job);
    }
    return SIMPRUNE_OK;
}

}  // namespace simprune

// For tests: the order in which the CPU runs, and the GPU whose code it takes: 75 or 80 with tensor cores
// that truncate sums, 1075 or 1080 with ones that round to the nearest, 0 without; and how many
// multiprocessors that has, on which the division of the work depends.
extern "C" SIMPRUNE_API void simprune_host_schedule(int order, int sm, int multiprocessors) {
    simprune::host_schedule = {order, sm % 1000, sm < 1000, multiprocessors};
}
