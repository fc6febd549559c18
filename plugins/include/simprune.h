/* simprune::SimilarityPrune, operator version 2, as a C library.
 *
 * The operator is defined in docs/operator.md. The same interface is offered by three libraries:
 *   libsimprune_plugin.so   CUDA kernels and the TensorRT plugin
 *   libsimprune_kernels.so  CUDA kernels alone
 *   libsimprune_host.so     the same kernel sources compiled for the CPU, for tests:
 *                           every pointer is then a host pointer and `stream` is ignored
 *
 * No function allocates memory on the device, waits for the device, or throws. All of them may be
 * called from several threads at once.
 */
#ifndef SIMPRUNE_H
#define SIMPRUNE_H

#include <stddef.h>
#include <stdint.h>

#define SIMPRUNE_ABI_VERSION 2
#define SIMPRUNE_MAX_PATCHES 4096 /* largest N - P */
#define SIMPRUNE_PAD_LOG_SIZE (-1e4f)

#if defined(__GNUC__)
#define SIMPRUNE_API __attribute__((visibility("default")))
#else
#define SIMPRUNE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum simprune_status {
    SIMPRUNE_OK = 0,
    SIMPRUNE_BAD_PROBLEM = 1, /* sizes, types or attributes that the operator does not cover */
    SIMPRUNE_BAD_POINTER = 2, /* a missing or misaligned buffer, or too small a workspace */
    SIMPRUNE_CUDA_ERROR = 3,
};

enum simprune_dtype { SIMPRUNE_FLOAT32 = 0, SIMPRUNE_FLOAT16 = 1, SIMPRUNE_BFLOAT16 = 2 };
enum simprune_selection { SIMPRUNE_PAIRS = 0, SIMPRUNE_REDUNDANCY = 1 };
enum simprune_reduction { SIMPRUNE_MERGE = 0, SIMPRUNE_DROP = 1 };

/* One call of the operator: its shapes and attributes. */
typedef struct simprune_problem {
    int64_t batch;             /* B, 1 or more */
    int64_t num_tokens;        /* N; N - P is at most SIMPRUNE_MAX_PATCHES */
    int64_t dim;               /* D, 1 or more */
    int64_t feature_dim;       /* F, 1 or more */
    int64_t num_thresholds;    /* 1 or B */
    int64_t capacity;          /* patches that every image keeps, with pairs at least (N - P) / 2; 0: as many as the
                                  data needs */
    int64_t multiple_of;       /* K is rounded up to a multiple of this, 1 or more */
    int32_t num_prefix_tokens; /* P, 0 or more, fewer than N */
    int32_t dtype;             /* simprune_dtype of tokens, features and kept_tokens */
    int32_t selection;         /* simprune_selection */
    int32_t reduction;         /* simprune_reduction */
} simprune_problem;

/* Device buffers, dense and row-major. With capacity 0 the number of slots K is only known on the
 * device; the outputs are then packed with that K in the front of buffers made for K = N. */
typedef struct simprune_buffers {
    const void* tokens;     /* T[B, N, D] */
    const void* features;   /* T[B, N, F], what is compared; may be tokens */
    const float* log_size;  /* float32[B, N] */
    const float* threshold; /* float32[1] or [B] */
    void* kept_tokens;      /* T[B, K, D] */
    float* kept_log_size;   /* float32[B, K] */
    int64_t* kept_index;    /* int64[B, K] */
    int64_t* assignment;    /* int64[B, N] */
    int32_t* num_kept;      /* int32, receives K; may be NULL */
} simprune_buffers;

/* SIMPRUNE_OK if the operator covers the problem. */
SIMPRUNE_API int simprune_check(const simprune_problem* problem);

/* Bytes of workspace that simprune_enqueue needs; 0 if the problem is refused. It does not shrink
 * when batch, num_tokens or dim grow, so the bytes for the largest sizes serve every smaller one. */
SIMPRUNE_API size_t simprune_workspace_bytes(const simprune_problem* problem);

/* Puts the operator on the stream (a cudaStream_t). The workspace is aligned to 256 bytes. */
SIMPRUNE_API int simprune_enqueue(
    const simprune_problem* problem, const simprune_buffers* buffers, void* workspace, size_t workspace_bytes,
    void* stream);

/* What went wrong in the last call of this thread that did not return SIMPRUNE_OK: one line with the
 * values in it. Valid until the thread's next call. */
SIMPRUNE_API const char* simprune_error(void);

/* JSON: library kind, versions, compiled architectures, plugin fields. The same text stands in the
 * file after the mark "simprune-library-info:", so it can be read without loading the library. */
SIMPRUNE_API const char* simprune_info(void);

#ifdef __cplusplus
}
#endif

#endif
