// The kernels on the GPU.
#include <cuda_runtime.h>

#include <algorithm>

#include "gram.h"
#include "problem.h"
#include "select.h"
#include "write.h"

namespace simprune {
namespace {

#if defined(__CUDA_ARCH__)
constexpr int kArchitecture = __CUDA_ARCH__ / 10;
#else
constexpr int kArchitecture = 0;
#endif

__device__ __forceinline__ Block this_block() {
    return {static_cast<int>(blockIdx.x), static_cast<int>(blockDim.x)};
}

template <class T>
__global__ void __launch_bounds__(kGramThreads) gram(const __grid_constant__ Job job) {
    __shared__ GramShared shared;
    gram_kernel<T, has_tensor_cores<T>(kArchitecture)>(this_block(), job, shared);
}

__global__ void __launch_bounds__(kRowThreads) rows(const __grid_constant__ Job job) {
    rows_kernel(this_block(), job);
}

__global__ void __launch_bounds__(kSelectThreads) select(const __grid_constant__ Job job) {
    __shared__ SelectShared shared;
    select_kernel(this_block(), job, shared);
}

__global__ void __launch_bounds__(kRowThreads) assign(const __grid_constant__ Job job) {
    assign_kernel(this_block(), job);
}

template <class T>
__global__ void __launch_bounds__(kWriteThreads) write(const __grid_constant__ Job job) {
    write_kernel<T>(this_block(), job);
}

// A CUDA error as a sentence with a way out.
int explain(cudaError_t error, const char* kernel) {
    int device = -1, major = 0, minor = 0, driver = 0, runtime = 0;
    switch (error) {
        case cudaErrorNoKernelImageForDevice:
        case cudaErrorInvalidDeviceFunction:
        case cudaErrorUnsupportedPtxVersion:
            cudaGetDevice(&device);
            cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
            cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
            cudaGetLastError();
            return fail(
                SIMPRUNE_CUDA_ERROR,
                "this library has no code for GPU %d (SM %d.%d): build it with `simprune-deploy plugin build --arch "
                "%d%d`",
                device, major, minor, major, minor);
        case cudaErrorInsufficientDriver:
            cudaDriverGetVersion(&driver);
            cudaRuntimeGetVersion(&runtime);
            cudaGetLastError();
            if (driver == 0) {
                return fail(
                    SIMPRUNE_CUDA_ERROR,
                    "no NVIDIA driver was found: install one, or give the container access to the GPU (--gpus all)");
            }
            return fail(
                SIMPRUNE_CUDA_ERROR,
                "the driver serves CUDA up to %d.%d and this library was built with %d.%d: update the driver, or "
                "build the library with an older CUDA",
                driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
        default:
            return fail(SIMPRUNE_CUDA_ERROR, "%s: %s (%s)", kernel, cudaGetErrorString(error), cudaGetErrorName(error));
    }
}

// The launch's own status is read, not the thread's last error, which may be somebody else's.
int start(const char* name, void (*kernel)(Job), int64_t blocks, int threads, const Job& job, cudaStream_t stream) {
    Job copy = job;
    void* arguments[] = {&copy};
    const dim3 grid(static_cast<unsigned>(blocks)), block(static_cast<unsigned>(threads));
    const cudaError_t error =
        cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, 0, stream);
    if (error == cudaSuccess) return SIMPRUNE_OK;
    cudaGetLastError();  // reported here, so others shall not find it again
    return explain(error, name);
}

template <class T>
int run(Job job, const Layout& layout, cudaStream_t stream) {
    const Grid grid(job);
    int status = SIMPRUNE_OK;
    for (; job.first_image < job.batch; job.first_image += layout.images_in_work) {
        job.num_images = static_cast<int>(std::min(layout.images_in_work, job.batch - job.first_image));
        const int64_t images = job.num_images;
        const bool small = job.num_patches <= kSmallPatches;
        status = start("gram", gram<T>, grid.gram * images, kGramThreads, job, stream);
        if (status == SIMPRUNE_OK && !small) {
            status = start("rows", rows, grid.rows * images, kRowThreads, job, stream);
        }
        if (status == SIMPRUNE_OK) status = start("select", select, images, kSelectThreads, job, stream);
        if (status == SIMPRUNE_OK && !small) {
            status = start("assign", assign, grid.rows * images, kRowThreads, job, stream);
        }
        if (status != SIMPRUNE_OK) return status;
    }
    return start("write", write<T>, grid.write * job.batch, kWriteThreads, job, stream);
}

}  // namespace

int launch(int32_t dtype, Job job, const Layout& layout, void* stream) {
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    switch (dtype) {
        case SIMPRUNE_FLOAT32:
            return run<float>(job, layout, cuda_stream);
        case SIMPRUNE_FLOAT16:
            return run<__half>(job, layout, cuda_stream);
        default:
            return run<__nv_bfloat16>(job, layout, cuda_stream);
    }
}

}  // namespace simprune
