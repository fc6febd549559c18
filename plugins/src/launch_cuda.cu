// The kernels on the GPU.
#include <cuda_runtime.h>

#include "compact.h"
#include "match.h"
#include "means.h"
#include "problem.h"
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
__global__ void __launch_bounds__(kMeansThreads) means(const __grid_constant__ Job job) {
    __shared__ MeansShared shared;
    means_kernel<T>(this_block(), job, shared);
}

// Blocks a multiprocessor that registers must suffice for; on SM 7.5 there is shared memory for one
template <class T>
constexpr int kMatchBlocks = kArchitecture >= 80 && has_tensor_cores<T>(kArchitecture) ? 4 : 1;

template <class T>
__global__ void __launch_bounds__(SmallTile::kThreads, kMatchBlocks<T>) match(const __grid_constant__ Job job) {
    __shared__ MatchShared<SmallTile> shared;
    match_kernel<T, SmallTile, has_tensor_cores<T>(kArchitecture)>(this_block(), job, shared);
}

template <class T>
__global__ void __launch_bounds__(LargeTile::kThreads) match_large(const __grid_constant__ Job job) {
    extern __shared__ uint4 memory[];
    // Elsewhere it is not launched
    if constexpr (has_tensor_cores<T>(kArchitecture)) {
        match_kernel<T, LargeTile, true>(this_block(), job, *reinterpret_cast<MatchShared<LargeTile>*>(memory));
    }
}
constexpr size_t kLargeBytes = sizeof(MatchShared<LargeTile>);
static_assert(kLargeBytes <= 64 * 1024, "more than a block of SM 7.5 can have");

__global__ void __launch_bounds__(kMaxCompactThreads) compact(const __grid_constant__ Job job) {
    __shared__ CompactShared shared;
    compact_kernel(this_block(), job, shared);
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kWriteThreads, 4) write(const __grid_constant__ Job job) {
    write_kernel<T, kAligned>(this_block(), job);
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

// What a launch came to; others shall not find its error again.
int status_of(cudaError_t error, const char* kernel) {
    if (error == cudaSuccess) return SIMPRUNE_OK;
    cudaGetLastError();
    return explain(error, kernel);
}

// The launch's own status is read, not the thread's last error, which may be somebody else's.
int start(
    const char* name, void (*kernel)(Job), int64_t blocks, int threads, const Job& job, cudaStream_t stream,
    size_t shared_bytes = 0) {
    Job copy = job;
    void* arguments[] = {&copy};
    const dim3 grid(static_cast<unsigned>(blocks)), block(static_cast<unsigned>(threads));
    return status_of(
        cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared_bytes, stream), name);
}

template <class T>
int start_match(const Job& job, const Grid& grid, cudaStream_t stream) {
    if constexpr (sizeof(T) == 2) {
        if (job.large_tiles) {
            const int status = status_of(
                cudaFuncSetAttribute(
                    match_large<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kLargeBytes)),
                "match_large");
            if (status != SIMPRUNE_OK) return status;
            return start("match_large", match_large<T>, grid.match, LargeTile::kThreads, job, stream, kLargeBytes);
        }
    }
    return start("match", match<T>, grid.match, SmallTile::kThreads, job, stream);
}

template <class T>
int start_write(const Job& job, const Grid& grid, cudaStream_t stream) {
    return start(
        "write", job.tokens_aligned ? write<T, true> : write<T, false>, grid.write, kWriteThreads, job, stream);
}

template <class T>
int run(const Job& job, cudaStream_t stream) {
    const Grid grid(job);
    int status = SIMPRUNE_OK;
    if (grid.means > 0) status = start("means", means<T>, grid.means, kMeansThreads, job, stream);
    if (status == SIMPRUNE_OK) status = start_match<T>(job, grid, stream);
    if (status == SIMPRUNE_OK) status = start("compact", compact, grid.compact, grid.compact_threads, job, stream);
    if (status == SIMPRUNE_OK) status = start_write<T>(job, grid, stream);
    return status;
}

// Where the current GPU cannot be asked, the launch will say why.
Gpu current_gpu() {
    int device = 0, multiprocessors = 0, major = 0, minor = 0;
    if (cudaGetDevice(&device) == cudaSuccess &&
        cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) == cudaSuccess &&
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess) {
        return {major * 10 + minor, multiprocessors};
    }
    cudaGetLastError();
    return {0, 1};
}

}  // namespace

int launch(const simprune_problem& problem, const simprune_buffers& buffers, void* workspace, void* stream) {
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    const Job job = make_job(problem, buffers, workspace, current_gpu());
    switch (problem.dtype) {
        case SIMPRUNE_FLOAT32:
            return run<float>(job, cuda_stream);
        case SIMPRUNE_FLOAT16:
            return run<__half>(job, cuda_stream);
        default:
            return run<__nv_bfloat16>(job, cuda_stream);
    }
}

}  // namespace simprune
