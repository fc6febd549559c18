// The kernels on the CPU: every block in turn, in the order that the schedule says.
#include <vector>

#include "gram.h"
#include "problem.h"
#include "select.h"
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

template <class T>
void run(Job job, const Layout& layout) {
    const Grid grid(job);
    Garbage<GramShared> gram_shared;
    Garbage<SelectShared> select_shared;
    for (; job.first_image < job.batch; job.first_image += layout.images_in_work) {
        job.num_images = static_cast<int>(std::min(layout.images_in_work, job.batch - job.first_image));
        in_scheduled_order(grid.gram * job.num_images, [&](int index) {
            const Block block{index, kGramThreads};
            if (has_tensor_cores<T>(host_schedule.sm)) {
                if constexpr (sizeof(T) == 2) gram_kernel<T, true>(block, job, gram_shared.fresh());
            } else {
                gram_kernel<T, false>(block, job, gram_shared.fresh());
            }
        });
        const bool small = job.num_patches <= kSmallPatches;
        if (!small) {
            in_scheduled_order(grid.rows * job.num_images, [&](int index) {
                rows_kernel(Block{index, kRowThreads}, job);
            });
        }
        in_scheduled_order(job.num_images, [&](int index) {
            select_kernel(Block{index, kSelectThreads}, job, select_shared.fresh());
        });
        if (!small) {
            in_scheduled_order(grid.rows * job.num_images, [&](int index) {
                assign_kernel(Block{index, kRowThreads}, job);
            });
        }
    }
    in_scheduled_order(static_cast<int>(grid.write * job.batch), [&](int index) {
        write_kernel<T>(Block{index, kWriteThreads}, job);
    });
}

}  // namespace

int launch(int32_t dtype, Job job, const Layout& layout, void*) {
    switch (dtype) {
        case SIMPRUNE_FLOAT32:
            run<float>(job, layout);
            break;
        case SIMPRUNE_FLOAT16:
            run<__half>(job, layout);
            break;
        default:
            run<__nv_bfloat16>(job, layout);
    }
    return SIMPRUNE_OK;
}

}  // namespace simprune

// For tests: the order in which the CPU runs, and the GPU whose code it takes: 75 or 80 with tensor cores
// that truncate sums, 1075 or 1080 with ones that round to the nearest, 0 without.
extern "C" SIMPRUNE_API void simprune_host_schedule(int order, int sm) {
    simprune::host_schedule = {order, sm % 1000, sm < 1000};
}
