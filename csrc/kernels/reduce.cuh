// Reductions over the threads of a block, in a fixed order.
#pragma once

#include "device.cuh"

namespace bmt::kernels {

constexpr int kWarp = 32;
constexpr unsigned int kAllLanes = 0xffffffffu;

template <typename T>
__device__ __forceinline__ T shuffle_down(T value, int offset) {
    return __shfl_down_sync(kAllLanes, value, offset);
}

__device__ __forceinline__ ExponentialSum shuffle_down(ExponentialSum value, int offset) {
    ExponentialSum other;
    other.maximum = __shfl_down_sync(kAllLanes, value.maximum, offset);
    other.sum = __shfl_down_sync(kAllLanes, value.sum, offset);
    return other;
}

struct Add {
    template <typename T>
    __device__ __forceinline__ T operator()(T a, T b) const { return a + b; }
};

struct Merge {
    __device__ __forceinline__ ExponentialSum operator()(ExponentialSum a, const ExponentialSum& b) const {
        a.merge(b);
        return a;
    }
};

// The combination of all threads' values, valid in thread 0.  blockDim.x is a multiple of the warp size, at most 1024;
// every thread of the block calls this.
template <typename T, typename Combine>
__device__ T reduce_block(T value, T identity, Combine combine) {
    __shared__ alignas(sizeof(T)) unsigned char storage[sizeof(T) * kWarp];
    T* warps = reinterpret_cast<T*>(storage);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    for (int offset = kWarp / 2; offset > 0; offset /= 2) value = combine(value, shuffle_down(value, offset));
    __syncthreads();  // an earlier call may still be reading
    if (lane == 0) warps[warp] = value;
    __syncthreads();
    if (warp != 0) return identity;
    value = lane < static_cast<int>(blockDim.x) / kWarp ? warps[lane] : identity;
    for (int offset = kWarp / 2; offset > 0; offset /= 2) value = combine(value, shuffle_down(value, offset));
    return value;
}

}  // namespace bmt::kernels
