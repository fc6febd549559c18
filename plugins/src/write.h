// Kernel 3: the outputs, one warp a slot (steps 4 and 5 of the definition).
#pragma once

#include "similarity.h"
#include "tensor_core.h"

namespace simprune {

// The patches that went to a slot, ascending. Up to kWarp of them lane m has the m-th; of more, the
// image's assignment tells.
struct Members {
    int count;
    Lanes<int> token;
    Lanes<float> size;  // relative to the head's
};

// What a warp does for a slot: kColumns of it a pass, kVector of them together in a lane.
template <class T, int kVector>
class SlotMerge {
public:
    SIMPRUNE_FN SlotMerge(const Job& job, int64_t image, int head, int64_t slot)
        : job_(job),
          head_(head),
          slot_(slot),
          log_size_(job.log_size + image * job.num_tokens),
          assignment_(job.assignment + image * job.num_tokens),
          tokens_(static_cast<const T*>(job.tokens) + image * job.num_tokens * job.dim) {}

    // Takes the members from what compact left, in whatever order.
    SIMPRUNE_FN void read_members(const Warp& warp, const Slot& slot, const uint16_t* order, Members& members) const {
        members.count = slot.members;
        if (members.count == 0 || members.count > kWarp) return;
        Lanes<int> found, place;
        warp.each([&](int lane) {
            found[lane] = lane < members.count ? order[slot.first + lane] : 0;
            place[lane] = members.token[lane] = 0;
        });
        for (int m = 0; m < members.count; ++m) {
            const int other = warp.broadcast(found, m);
            warp.each([&](int lane) { place[lane] += other < found[lane]; });
        }
        for (int m = 0; m < members.count; ++m) {
            const int patch = warp.broadcast(found, m), its_place = warp.broadcast(place, m);
            warp.each([&](int lane) {
                if (lane == its_place) members.token[lane] = job_.prefix + patch;
            });
        }
    }

    // Sum of the members' sizes, relative to the head's; the head itself (1) is not in it.
    SIMPRUNE_FN float others(const Warp& warp, Members& members) const {
        Lanes<Sum> sum;
        warp.each([&](int lane) {
            members.size[lane] = 0.0f;
            if (members.count <= kWarp) {
                if (lane < members.count) members.size[lane] = relative_size(members.token[lane]);
                sum[lane].value = members.size[lane];
                return;
            }
            sum[lane].value = 0.0f;
            for (int token = job_.prefix + lane; token < job_.num_tokens; token += kWarp) {
                if (went_here(token)) sum[lane].value += relative_size(token);
            }
        });
        return warp_sum(warp, sum);
    }

    // Weights are divided before they are summed: a mean of large tokens must not overflow.
    SIMPRUNE_FN void merge(const Warp& warp, Members& members, float size, T* out) const {
        if (members.count <= kWarp) {
            merge_members<true>(warp, members, size, out);
        } else {
            merge_members<false>(warp, members, size, out);
        }
    }

    SIMPRUNE_FN void copy(const Warp& warp, T* out) const {
        const T* in = tokens_ + int64_t{head_} * job_.dim;
        warp.each([&](int lane) {
            for (int first = lane * kVector; first < job_.dim; first += kCopied * kWarp * kVector) {
                Vector x[kCopied];  // all loads before the first store
#pragma unroll
                for (int v = 0; v < kCopied; ++v) {
                    const int column = first + v * kWarp * kVector;
                    if (column < job_.dim) x[v] = *reinterpret_cast<const Vector*>(in + column);
                }
#pragma unroll
                for (int v = 0; v < kCopied; ++v) {
                    const int column = first + v * kWarp * kVector;
                    if (column < job_.dim) *reinterpret_cast<Vector*>(out + column) = x[v];
                }
            }
        });
    }

    SIMPRUNE_FN void clear(const Warp& warp, T* out) const {
        warp.each([&](int lane) {
            Vector zero;
#pragma unroll
            for (int e = 0; e < kVector; ++e) zero.value[e] = from_float<T>(0.0f);
            for (int column = lane * kVector; column < job_.dim; column += kWarp * kVector) {
                *reinterpret_cast<Vector*>(out + column) = zero;
            }
        });
    }

private:
    static constexpr int kCopied = 4;                      // vectors of a lane on their way at once
    static constexpr int kVectors = kVector == 1 ? 8 : 2;  // of a lane in a pass of a merge
    static constexpr int kTogether = 2;                    // members whose rows are on their way at once
    static constexpr int kColumns = kVectors * kWarp * kVector;

    struct alignas(kVector * sizeof(T)) Vector {
        T value[kVector];
    };
    struct Accumulator {
        float value[kVectors][kVector];
    };

    struct Some {
        bool present[kTogether];  // the first ones
        int token[kTogether];
        float weight[kTogether];
    };

    // Listed: the members are those in the lanes.
    template <bool kListed>
    SIMPRUNE_FN void merge_members(const Warp& warp, Members& members, float size, T* out) const {
        for (int first = 0; first < job_.dim; first += kColumns) {
            Lanes<Accumulator> sum;
            warp.each([&](int lane) { start_with_head(lane, first, 1.0f / size, sum[lane]); });
            const int end = kListed ? kWarp : job_.num_tokens;
            for (int start = kListed ? 0 : job_.prefix; start < end; start += kWarp) {
                Lanes<bool> is_member;
                Lanes<int> token;
                Lanes<float> weight;
                warp.each([&](int lane) {
                    if (kListed) {
                        token[lane] = members.token[lane];
                        is_member[lane] = lane < members.count;
                        weight[lane] = members.size[lane] / size;
                    } else {
                        token[lane] = start + lane;
                        is_member[lane] = start + lane < end && went_here(start + lane);
                        weight[lane] = is_member[lane] ? relative_size(start + lane) / size : 0.0f;
                    }
                });
                uint32_t open = warp.ballot(is_member);
                while (open != 0) {
                    Some some;
#pragma unroll
                    for (int m = 0; m < kTogether; ++m, open &= open - 1) {
                        const int from = open != 0 ? lowest_bit(open) : 0;
                        some.present[m] = open != 0;
                        some.token[m] = warp.broadcast(token, from);
                        some.weight[m] = warp.broadcast(weight, from);
                    }
                    warp.each([&](int lane) { add(lane, first, some, sum[lane]); });
                }
            }
            warp.each([&](int lane) {
#pragma unroll
                for (int v = 0; v < kVectors; ++v) {
                    const int column = first + (v * kWarp + lane) * kVector;
                    if (column >= job_.dim) break;
                    Vector result;
#pragma unroll
                    for (int e = 0; e < kVector; ++e) {
                        result.value[e] = from_float<T>(sum[lane].value[v][e]);
                    }
                    *reinterpret_cast<Vector*>(out + column) = result;
                }
            });
        }
    }

    SIMPRUNE_FN bool went_here(int token) const {
        return assignment_[token] == slot_ && token != head_;
    }

    SIMPRUNE_FN float relative_size(int token) const {
        return exponential(log_size_[token] - log_size_[head_]);
    }

    SIMPRUNE_FN void start_with_head(int lane, int first, float weight, Accumulator& sum) const {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            const int column = first + (v * kWarp + lane) * kVector;
            if (column >= job_.dim) break;
            const Vector x = *reinterpret_cast<const Vector*>(tokens_ + int64_t{head_} * job_.dim + column);
#pragma unroll
            for (int e = 0; e < kVector; ++e) sum.value[v][e] = weight * to_float(x.value[e]);
        }
    }

    // sum += weight * row of each member, in their order; the loads of all of them are on the way at once.
    SIMPRUNE_FN void add(int lane, int first, const Some& members, Accumulator& sum) const {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            const int column = first + (v * kWarp + lane) * kVector;
            if (column >= job_.dim) break;
            Vector x[kTogether];
#pragma unroll
            for (int m = 0; m < kTogether; ++m) {
                if (!members.present[m]) break;
                x[m] = *reinterpret_cast<const Vector*>(tokens_ + int64_t{members.token[m]} * job_.dim + column);
            }
#pragma unroll
            for (int m = 0; m < kTogether; ++m) {
                if (!members.present[m]) break;
#pragma unroll
                for (int e = 0; e < kVector; ++e) {
                    sum.value[v][e] = multiply_add(members.weight[m], to_float(x[m].value[e]), sum.value[v][e]);
                }
            }
        }
    }

    const Job& job_;
    const int head_;
    const int64_t slot_;
    const float* log_size_;
    const int64_t* assignment_;
    const T* tokens_;
};

template <class T, int kVector>
SIMPRUNE_FN void write_slots(const Block& block, const Job& job) {
    const int most_slots = job.capacity > 0 ? job.prefix + job.capacity : job.num_tokens;
    const int blocks_per_image = (most_slots + kSlotsPerBlock - 1) / kSlotsPerBlock;
    const int64_t image = block.index / blocks_per_image;
    block.warps([&](const Warp& warp) {
        const int slot = block.index % blocks_per_image * kSlotsPerBlock + warp.index, rank = slot - job.prefix;
        // What compact left, all of it at once; what lies behind an image's slots is not used
        Slot left = {};
        if (rank >= 0 && rank < job.num_patches) left = job.slots[image * job.num_patches + rank];
        const bool padding = rank >= job.kept[image];
        const int64_t slots = num_slots(job);
        if (block.index == 0 && warp.index == 0 && job.num_kept != nullptr) {
            warp.each([&](int lane) {
                if (lane == 0) *job.num_kept = static_cast<int32_t>(slots);
            });
        }
        if (slot >= slots) return;
        const int64_t out = image * slots + slot;
        int head = slot;
        if (padding) {
            head = 0;
        } else if (rank >= 0) {
            head = job.prefix + left.patch;
        }

        const SlotMerge<T, kVector> slot_merge(job, image, head, slot);
        T* kept = static_cast<T*>(job.kept_tokens) + out * job.dim;
        float log_size = SIMPRUNE_PAD_LOG_SIZE;
        if (padding) {
            slot_merge.clear(warp, kept);
        } else if (left.members == 0) {  // a token that stands alone goes as it is, bit for bit
            slot_merge.copy(warp, kept);
            log_size = job.log_size[image * job.num_tokens + head];
        } else {
            Members members;
            slot_merge.read_members(warp, left, job.order + image * job.num_patches, members);
            const float size = 1.0f + slot_merge.others(warp, members);
            if (job.merge) {
                slot_merge.merge(warp, members, size, kept);
            } else {
                slot_merge.copy(warp, kept);
            }
            log_size = job.log_size[image * job.num_tokens + head] + logarithm(size);
        }
        warp.each([&](int lane) {
            if (lane != 0) return;
            job.kept_log_size[out] = log_size;
            job.kept_index[out] = head;
        });
    });
}

// Two kernels, by whether rows start on 16 bytes: in one they would take more registers than either.
template <class T, bool kAligned>
SIMPRUNE_FN void write_kernel(const Block& block, const Job& job) {
    write_slots<T, kAligned ? Pack<T>::kCount : 1>(block, job);
}

}  // namespace simprune
