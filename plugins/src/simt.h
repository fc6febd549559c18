// Kernels as blocks of warps between barriers, compiled for the GPU or for the CPU.
//
// A kernel is written as a row of phases. In a phase every warp of the block (or every thread) does
// its part, and a barrier ends it. Inside a warp, lanes act in `each`, and speak to one another only
// in the collectives (ballot, sum, ...). On the GPU this is what it looks like: a phase is the code
// followed by __syncthreads(), a lane is a thread. On the CPU (SIMPRUNE_ON_HOST) a phase is a loop
// over the warps and `each` a loop over the lanes; state that outlives a phase stands in shared
// memory or in `Registers`. The loops can be run in any order, which shows a missing barrier: a
// result that depends on the order is a race.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(SIMPRUNE_ON_HOST)

#include <cstring>
#include <numeric>
#include <random>
#include <vector>
#define SIMPRUNE_FN inline
#else
#define SIMPRUNE_FN __device__ __forceinline__
#endif

#include "job.h"

namespace simprune {

#if defined(SIMPRUNE_ON_HOST)

// The order in which the CPU runs blocks, warps and lanes, and the GPU whose code path it takes.
struct Schedule {
    int order = 0;              // 0 forward, 1 backward, otherwise a seed to shuffle with
    int sm = 80;                // 80: mma.m16n8k16; 75: mma.m16n8k8 for float16; 0: no tensor cores
    bool truncates = true;      // sums of tensor cores are rounded towards zero, as real ones do
    int multiprocessors = 132;  // of the GPU: how the work is divided
};
extern Schedule host_schedule;

template <class F>
void in_scheduled_order(int count, F f) {
    const int order = host_schedule.order;
    if (order == 0) {
        for (int i = 0; i < count; ++i) f(i);
    } else if (order == 1) {
        for (int i = count; i-- > 0;) f(i);
    } else {
        std::vector<int> turn(static_cast<size_t>(count));
        std::iota(turn.begin(), turn.end(), 0);
        std::mt19937 random(static_cast<uint32_t>(order));
        for (int i = count; i-- > 1;) {
            std::swap(turn[static_cast<size_t>(i)], turn[random() % static_cast<uint32_t>(i + 1)]);
        }
        for (int i : turn) f(i);
    }
}

// A value of every lane of a warp. It does not outlive the phase.
template <class T>
class Lanes {
public:
    T& operator[](int lane) { return value_[lane]; }

private:
    T value_[kWarp];
};

struct Warp {
    int index;

    template <class F>
    void each(F f) const {
        in_scheduled_order(kWarp, f);
    }

    uint32_t ballot(Lanes<bool>& bit) const {
        uint32_t bits = 0;
        for (int lane = 0; lane < kWarp; ++lane) bits |= static_cast<uint32_t>(bit[lane]) << lane;
        return bits;
    }

    template <class T>
    T broadcast(Lanes<T>& value, int lane) const {
        return value[lane];
    }

    // What lanes wrote to memory before, others may read or write over after.
    void sync() const {}

    // Every lane gets the sum of the values up to its own.
    void add_up(Lanes<int>& value) const {
        for (int lane = 1; lane < kWarp; ++lane) value[lane] += value[lane - 1];
    }

    // Butterfly reduction: every lane combines with the lane `step` away, as on the GPU, so that
    // sums round alike.
    template <class T, class Combine>
    T reduce(Lanes<T>& value, Combine combine) const {
        for (int step = kWarp / 2; step > 0; step /= 2) {
            Lanes<T> before = value;
            for (int lane = 0; lane < kWarp; ++lane) value[lane] = combine(before[lane], before[lane ^ step]);
        }
        return value[0];
    }
};

struct Block {
    int index;
    int num_threads;

    int num_warps() const { return num_threads / kWarp; }

    template <class F>
    void warps(F f) const {
        in_scheduled_order(num_warps(), [&](int i) { f(Warp{i}); });
    }

    template <class F>
    void threads(F f) const {
        in_scheduled_order(num_threads, f);
    }
};

// A thread's variable that outlives a phase.
template <class T>
class Registers {
public:
    explicit Registers(const Block& block) : value_(static_cast<size_t>(block.num_threads)) {}
    T& of(const Warp& warp, int lane) { return value_[static_cast<size_t>(warp.index * kWarp + lane)]; }

private:
    std::vector<T> value_;
};

inline void atomic_max(int32_t* address, int32_t value) {
    if (value > *address) *address = value;
}
// What was there before
inline int32_t atomic_add(int32_t* address, int32_t value) {
    const int32_t before = *address;
    *address += value;
    return before;
}
inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
inline int popcount(uint32_t bits) {
    return __builtin_popcount(bits);
}
inline int lowest_bit(uint32_t bits) {
    return __builtin_ctz(bits);
}
inline float multiply_add(float a, float b, float c) {
    return std::fma(a, b, c);
}
inline float square_root(float x) {
    return std::sqrt(x);
}
inline float exponential(float x) {
    return std::exp(x);
}
inline float logarithm(float x) {
    return std::log(x);
}

#else  // on the GPU

template <class T>
class Lanes {
public:
    SIMPRUNE_FN T& operator[](int) { return value_; }

private:
    T value_;
};

struct Warp {
    int index;

    template <class F>
    SIMPRUNE_FN void each(F f) const {
        f(static_cast<int>(threadIdx.x % kWarp));
    }

    SIMPRUNE_FN uint32_t ballot(Lanes<bool>& bit) const { return __ballot_sync(~0u, bit[0]); }

    template <class T>
    SIMPRUNE_FN T broadcast(Lanes<T>& value, int lane) const {
        return __shfl_sync(~0u, value[0], lane);
    }

    SIMPRUNE_FN void sync() const { __syncwarp(); }

    SIMPRUNE_FN void add_up(Lanes<int>& value) const {
#pragma unroll
        for (int step = 1; step < kWarp; step *= 2) {
            const int before = __shfl_up_sync(~0u, value[0], step);
            if (static_cast<int>(threadIdx.x % kWarp) >= step) value[0] += before;
        }
    }

    template <class T, class Combine>
    SIMPRUNE_FN T reduce(Lanes<T>& value, Combine combine) const {
#pragma unroll
        for (int step = kWarp / 2; step > 0; step /= 2) {
            value[0] = combine(value[0], T::shuffled(value[0], step));
        }
        return value[0];
    }
};

struct Block {
    int index;
    int num_threads;

    SIMPRUNE_FN int num_warps() const { return num_threads / kWarp; }

    template <class F>
    SIMPRUNE_FN void warps(F f) const {
        f(Warp{static_cast<int>(threadIdx.x / kWarp)});
        __syncthreads();
    }

    template <class F>
    SIMPRUNE_FN void threads(F f) const {
        f(static_cast<int>(threadIdx.x));
        __syncthreads();
    }
};

template <class T>
class Registers {
public:
    SIMPRUNE_FN explicit Registers(const Block&) : value_() {}
    SIMPRUNE_FN T& of(const Warp&, int) { return value_; }

private:
    T value_;
};

SIMPRUNE_FN void atomic_max(int32_t* address, int32_t value) {
    atomicMax(address, value);
}
SIMPRUNE_FN int32_t atomic_add(int32_t* address, int32_t value) {
    return atomicAdd(address, value);
}
SIMPRUNE_FN uint32_t bits_of(float x) {
    return __float_as_uint(x);
}
SIMPRUNE_FN float float_of(uint32_t bits) {
    return __uint_as_float(bits);
}
SIMPRUNE_FN int popcount(uint32_t bits) {
    return __popc(bits);
}
SIMPRUNE_FN int lowest_bit(uint32_t bits) {
    return __ffs(static_cast<int>(bits)) - 1;
}
SIMPRUNE_FN float multiply_add(float a, float b, float c) {
    return fmaf(a, b, c);
}
SIMPRUNE_FN float square_root(float x) {
    return sqrtf(x);
}
SIMPRUNE_FN float exponential(float x) {
    return expf(x);
}
SIMPRUNE_FN float logarithm(float x) {
    return logf(x);
}

#endif

// Numbers that warps add up. The butterfly gives every lane the same bits.
template <class Number>
struct SumOf {
    Number value;
#if !defined(SIMPRUNE_ON_HOST)
    SIMPRUNE_FN static SumOf shuffled(SumOf mine, int step) {
        return {__shfl_xor_sync(~0u, mine.value, step)};
    }
#endif
};
using Sum = SumOf<float>;
using Count = SumOf<int>;

// A candidate and its score: the larger score wins, on a tie the lower index.
struct Best {
    float score;
    int index;
#if !defined(SIMPRUNE_ON_HOST)
    SIMPRUNE_FN static Best shuffled(Best mine, int step) {
        return {__shfl_xor_sync(~0u, mine.score, step), __shfl_xor_sync(~0u, mine.index, step)};
    }
#endif
};

SIMPRUNE_FN Best better(Best a, Best b) {
    return b.score > a.score || (b.score == a.score && b.index < a.index) ? b : a;
}

template <class Number>
SIMPRUNE_FN Number warp_sum(const Warp& warp, Lanes<SumOf<Number>>& value) {
    using Each = SumOf<Number>;
    return warp.reduce(value, [](Each a, Each b) { return Each{a.value + b.value}; }).value;
}

SIMPRUNE_FN Best warp_best(const Warp& warp, Lanes<Best>& value) {
    return warp.reduce(value, [](Best a, Best b) { return better(a, b); });
}

// 16 bytes, moved by one instruction.
template <class T>
struct alignas(16) Pack {
    static constexpr int kCount = 16 / static_cast<int>(sizeof(T));
    T value[kCount];
};

// Copies 16 bytes from global to shared memory, or clears them, in the background. A thread's copies
// since its last commit() are a group; wait<n>() waits until no more than the n newest of its groups
// are on their way. `anywhere` is a readable address for a GPU that wants one
// even for no bytes.
#if defined(SIMPRUNE_ON_HOST)

// The copies are done when they are waited for, and no earlier.
class CopiesUnderWay {
public:
    void begin(int thread, void* target, const void* source) {
        std::memset(target, 0x5A, 16);
        of(thread).back().push_back({target, source});
    }
    void commit(int thread) { of(thread).emplace_back(); }
    void wait(int thread, size_t newest) {
        auto& groups = of(thread);
        while (groups.size() > newest + 1) {  // the last one is not committed
            for (const Copy& copy : groups.front()) {
                if (copy.source != nullptr) {
                    std::memcpy(copy.target, copy.source, 16);
                } else {
                    std::memset(copy.target, 0, 16);
                }
            }
            groups.erase(groups.begin());
        }
    }

private:
    struct Copy {
        void* target;
        const void* source;
    };
    using Groups = std::vector<std::vector<Copy>>;

    Groups& of(int thread) {
        const auto index = static_cast<size_t>(thread);
        if (threads_.size() <= index) threads_.resize(index + 1, Groups(1));
        return threads_[index];
    }

    std::vector<Groups> threads_;
};

struct Copies {
    CopiesUnderWay under_way;

    template <class T>
    void copy_or_clear(int thread, void* target, const T* source, bool copy, const T*) {
        under_way.begin(thread, target, copy ? source : nullptr);
    }
    void commit(int thread) { under_way.commit(thread); }
    template <int kNewest>
    void wait(int thread) {
        under_way.wait(thread, kNewest);
    }
};

#else

struct Copies {
    template <class T>
    SIMPRUNE_FN void copy_or_clear(
        int, void* target, const T* source, bool copy, [[maybe_unused]] const T* anywhere) const {
#if __CUDA_ARCH__ >= 800
        const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(target));
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(copy ? source : anywhere),
                     "r"(copy ? 16 : 0)
                     : "memory");
#else
        const uint4 zero = {0, 0, 0, 0};
        *static_cast<uint4*>(target) = copy ? *reinterpret_cast<const uint4*>(source) : zero;
#endif
    }
    SIMPRUNE_FN void commit(int) const {
#if __CUDA_ARCH__ >= 800
        asm volatile("cp.async.commit_group;" ::: "memory");
#endif
    }
    template <int kNewest>
    SIMPRUNE_FN void wait(int) const {
#if __CUDA_ARCH__ >= 800
        asm volatile("cp.async.wait_group %0;" ::"n"(kNewest) : "memory");
#endif
    }
};

#endif

}  // namespace simprune
