// float32 += float16 x float16 (or bfloat16) on the tensor cores of one warp, and the same on the CPU.
//
// Fragment layout: PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type". With
// g = lane / 4 and t = lane % 4, and two 16-bit values to a 32-bit register:
//   a[0] row g,     columns 2t, 2t+1       b[0] rows 2t, 2t+1, column g
//   a[1] row g + 8, columns 2t, 2t+1       b[1] rows 2t + 8, 2t + 9, column g
//   a[2] row g,     columns 2t+8, 2t+9     c[0..1] row g, columns 2t, 2t+1
//   a[3] row g + 8, columns 2t+8, 2t+9     c[2..3] row g + 8
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <climits>
#include <type_traits>

#include "simt.h"

namespace simprune {

SIMPRUNE_FN float to_float(float x) {
    return x;
}
SIMPRUNE_FN float to_float(__half x) {
    return __half2float(x);
}
SIMPRUNE_FN float to_float(__nv_bfloat16 x) {
    return __bfloat162float(x);
}

template <class T>
SIMPRUNE_FN T from_float(float x);
template <>
SIMPRUNE_FN float from_float<float>(float x) {
    return x;
}
template <>
SIMPRUNE_FN __half from_float<__half>(float x) {
    return __float2half_rn(x);
}
template <>
SIMPRUNE_FN __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

// One fragment of a, or two of b beside one another (columns 0 to 7 in words 0 and 1).
struct Fragment {
    uint32_t word[4];
};

// Which GPUs have an instruction for the type: m16n8k16 from SM 8.0 on, m16n8k8 for float16 on 7.5.
template <class T>
SIMPRUNE_FN constexpr bool has_tensor_cores(int sm) {
    return sizeof(T) == 2 && (sm >= 80 || (sm == 75 && std::is_same<T, __half>::value));
}

#if defined(SIMPRUNE_ON_HOST)

template <class T>
float half_of(uint32_t word, int which) {
    const uint16_t bits = static_cast<uint16_t>(word >> (16 * which));
    T value;
    std::memcpy(static_cast<void*>(&value), &bits, sizeof value);
    return to_float(value);
}

// Sums as tensor cores do them at their coarsest: addends are aligned to the largest one and lose what
// is below its 24 bits, and so does the result. None of this is specified; it is what has been
// measured: Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores", 2021.
inline float truncated_sum(const float* addend, int count) {
    int exponent = 0, largest = INT_MIN;
    for (int i = 0; i < count; ++i) {
        if (!std::isfinite(addend[i])) return std::accumulate(addend, addend + count, 0.0f);
        if (addend[i] == 0.0f) continue;
        std::frexp(addend[i], &exponent);
        largest = std::max(largest, exponent);
    }
    if (largest == INT_MIN) return 0.0f;
    double sum = 0.0;
    for (int i = 0; i < count; ++i) sum += std::trunc(std::ldexp(static_cast<double>(addend[i]), 24 - largest));
    if (sum == 0.0) return 0.0f;
    std::frexp(sum, &exponent);
    const int shift = std::max(exponent - 24, 0);
    return static_cast<float>(std::ldexp(std::trunc(std::ldexp(sum, -shift)), shift + largest - 24));
}

// Four matrices of 8 rows of 16 bytes from shared memory: row r of matrix m lies at row(8 m + r). A lane
// gets word lane % 4 of row lane / 4 of each.
template <class Row>
void load_matrices(const Warp&, Lanes<Fragment>& fragment, Row row) {
    for (int lane = 0; lane < kWarp; ++lane) {
        for (int m = 0; m < 4; ++m) {
            std::memcpy(&fragment[lane].word[m], row(8 * m + lane / 4) + lane % 4 * 4, 4);
        }
    }
}

// The instruction, element by element. `c(lane)` points to the lane's four sums; `which` of the two
// fragments of b.
template <class T, class C>
void multiply_accumulate(const Warp&, C c, Lanes<Fragment>& a, Lanes<Fragment>& b, int which) {
    for (int row = 0; row < 16; ++row) {
        for (int column = 0; column < 8; ++column) {
            float& sum = c((row % 8) * 4 + column / 2)[2 * (row / 8) + column % 2];
            for (int half = 0; half < 2; ++half) {
                float addend[9] = {sum};
                for (int k = 0; k < 8; ++k) {
                    const int lane_a = (row % 8) * 4 + k / 2, lane_b = column * 4 + k / 2;
                    const float x = half_of<T>(a[lane_a].word[2 * half + row / 8], k % 2);
                    const float y = half_of<T>(b[lane_b].word[2 * which + half], k % 2);
                    addend[k + 1] = x * y;  // exact, but for the ends of bfloat16's range
                    if (!host_schedule.truncates) sum = multiply_add(x, y, sum);
                }
                if (host_schedule.truncates) sum = truncated_sum(addend, 9);
            }
        }
    }
}

#else

template <class Row>
SIMPRUNE_FN void load_matrices(const Warp&, Lanes<Fragment>& fragment, Row row) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row(static_cast<int>(threadIdx.x % kWarp))));
    uint32_t(&word)[4] = fragment[0].word;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                 : "r"(address)
                 : "memory");
}

template <class T, class C>
SIMPRUNE_FN void multiply_accumulate(
    const Warp&, C c, Lanes<Fragment>& fragment_a, Lanes<Fragment>& fragment_b, int which) {
    [[maybe_unused]] float* sum = c(0);
    [[maybe_unused]] const uint32_t(&a)[4] = fragment_a[0].word;
    [[maybe_unused]] const uint32_t* b = fragment_b[0].word + 2 * which;
#if __CUDA_ARCH__ >= 800
    if constexpr (std::is_same<T, __half>::value) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
#elif __CUDA_ARCH__ >= 750
    if constexpr (std::is_same<T, __half>::value) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                         : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                         : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
        }
    }
#endif
}

#endif

}  // namespace simprune
