// What every kernel file needs: scalar types, 128-bit packs, checked launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <string>

#include "../errors.h"
#include "api.h"

namespace bmt::kernels {

inline void check(cudaError_t error, const char* what, const char* file, int line) {
    if (error == cudaSuccess) return;
    throw DeviceError("CUDA: " + std::string(cudaGetErrorString(error)) + " (" + what + " at " + file + ":" +
                      std::to_string(line) + ")");
}

#define BMT_CUDA(call) ::bmt::kernels::check((call), #call, __FILE__, __LINE__)

// Makes `device` current for a scope.
class DeviceGuard {
public:
    explicit DeviceGuard(int device) {
        BMT_CUDA(cudaGetDevice(&previous_));
        if (device != previous_) BMT_CUDA(cudaSetDevice(device));
        changed_ = device != previous_;
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(previous_);
    }

private:
    int previous_ = 0;
    bool changed_ = false;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void store(float& to, float x) { to = x; }
__device__ __forceinline__ void store(__half& to, float x) { to = __float2half_rn(x); }
__device__ __forceinline__ void store(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

// N elements that are loaded and stored as one.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
    T values[N];
};

template <int N, typename T>
__host__ __device__ __forceinline__ bool is_aligned(const T* address) {
    return address == nullptr || reinterpret_cast<uintptr_t>(address) % (sizeof(T) * N) == 0;
}

// Blocks for a grid-stride loop over `items`, one a thread at first.
inline unsigned int blocks_for(int64_t items, int threads, int64_t most = 1 << 20) {
    return static_cast<unsigned int>(std::max<int64_t>(1, std::min<int64_t>((items + threads - 1) / threads, most)));
}

// Calls f with the array's data as a pointer of its own type.
template <typename F>
void dispatch(const Array& array, F&& f) {
    switch (array.type) {
        case Scalar::kFloat32: return f(static_cast<float*>(array.data));
        case Scalar::kFloat16: return f(static_cast<__half*>(array.data));
        case Scalar::kBFloat16: return f(static_cast<__nv_bfloat16*>(array.data));
    }
    throw DeviceError("Unknown scalar type " + std::to_string(static_cast<int>(array.type)) + ".");
}

}  // namespace bmt::kernels
