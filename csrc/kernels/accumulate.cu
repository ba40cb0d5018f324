#include "device.cuh"

namespace bmt::kernels {
namespace {

constexpr int kThreads = 256;

template <int N, bool kFirst, typename T>
__global__ void __launch_bounds__(kThreads)
    accumulate_kernel(float* __restrict__ total, const T* __restrict__ source, int64_t count) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads * N;
    for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N; i + N <= count; i += step) {
        auto x = *reinterpret_cast<const Pack<T, N>*>(source + i);
        Pack<float, N> sum;
        if (!kFirst) sum = *reinterpret_cast<Pack<float, N>*>(total + i);
#pragma unroll
        for (int k = 0; k < N; ++k) {
            float value = to_float(x.values[k]);
            sum.values[k] = kFirst ? value : sum.values[k] + value;
        }
        *reinterpret_cast<Pack<float, N>*>(total + i) = sum;
    }
}

template <int N, typename T>
void launch(const Queue& queue, float* total, const T* source, int64_t count, bool first) {
    if (count == 0) return;
    auto stream = static_cast<cudaStream_t>(queue.stream);
    unsigned int blocks = blocks_for(count / N, kThreads);
    if (first) accumulate_kernel<N, true><<<blocks, kThreads, 0, stream>>>(total, source, count);
    else accumulate_kernel<N, false><<<blocks, kThreads, 0, stream>>>(total, source, count);
    BMT_CUDA(cudaGetLastError());
}

}  // namespace

void accumulate(const Queue& queue, float* total, const Array& source, int64_t count, bool first) {
    DeviceGuard guard(queue.device);
    dispatch(source, [&](auto* x) {
        int64_t packed = is_aligned<4>(total) && is_aligned<4>(x) ? count / 4 * 4 : 0;
        launch<4>(queue, total, x, packed, first);
        launch<1>(queue, total + packed, x + packed, count - packed, first);
    });
}

}  // namespace bmt::kernels
