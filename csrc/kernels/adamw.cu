#include "device.cuh"

namespace bmt::kernels {
namespace {

constexpr int kThreads = 256;

// N elements a thread and turn: 4 (128-bit accesses of fp32) when everything is aligned, else 1.
template <int N, typename Gradient, typename Out>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(float* __restrict__ master, float* __restrict__ exp_avg, float* __restrict__ exp_avg_sq,
                 const Gradient* __restrict__ gradient, Out* __restrict__ out, int64_t count, AdamW adamw, float scale,
                 const float* __restrict__ clip, const float* __restrict__ skip) {
    if (skip != nullptr && *skip != 0.0f) return;
    const float factor = clip != nullptr ? scale * *clip : scale;
    const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads * N;
    for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N; i + N <= count; i += step) {
        auto g = *reinterpret_cast<const Pack<Gradient, N>*>(gradient + i);
        auto p = *reinterpret_cast<Pack<float, N>*>(master + i);
        auto m = *reinterpret_cast<Pack<float, N>*>(exp_avg + i);
        auto v = *reinterpret_cast<Pack<float, N>*>(exp_avg_sq + i);
        Pack<Out, N> o;
#pragma unroll
        for (int k = 0; k < N; ++k) {
            adamw.update(multiply(to_float(g.values[k]), factor), p.values[k], m.values[k], v.values[k]);
            store(o.values[k], p.values[k]);
        }
        *reinterpret_cast<Pack<float, N>*>(master + i) = p;
        *reinterpret_cast<Pack<float, N>*>(exp_avg + i) = m;
        *reinterpret_cast<Pack<float, N>*>(exp_avg_sq + i) = v;
        if (out != nullptr) *reinterpret_cast<Pack<Out, N>*>(out + i) = o;
    }
}

template <int N, typename Gradient, typename Out>
void launch(const Queue& queue, float* master, float* exp_avg, float* exp_avg_sq, const Gradient* gradient, Out* out,
            int64_t count, const AdamW& adamw, float scale, const float* clip, const float* skip) {
    if (count == 0) return;
    adamw_kernel<N, Gradient, Out><<<blocks_for(count / N, kThreads), kThreads, 0,
                                     static_cast<cudaStream_t>(queue.stream)>>>(
        master, exp_avg, exp_avg_sq, gradient, out, count, adamw, scale, clip, skip);
    BMT_CUDA(cudaGetLastError());
}

}  // namespace

void adamw(const Queue& queue, float* master, float* exp_avg, float* exp_avg_sq, const void* gradient,
           Scalar gradient_type, void* out, Scalar out_type, int64_t count, const AdamW& adamw, float scale,
           const float* clip, const float* skip) {
    DeviceGuard guard(queue.device);
    dispatch(gradient_type, [&](auto* gradient_tag) {
        dispatch(out_type, [&](auto* out_tag) {
            auto* g = static_cast<decltype(gradient_tag)>(const_cast<void*>(gradient));
            auto* o = static_cast<decltype(out_tag)>(out);
            bool aligned = is_aligned<4>(master) && is_aligned<4>(exp_avg) && is_aligned<4>(exp_avg_sq) &&
                           is_aligned<4>(g) && is_aligned<4>(o);
            int64_t packed = aligned ? count / 4 * 4 : 0;
            launch<4>(queue, master, exp_avg, exp_avg_sq, g, o, packed, adamw, scale, clip, skip);
            launch<1>(queue, master + packed, exp_avg + packed, exp_avg_sq + packed, g + packed,
                      o != nullptr ? o + packed : nullptr, count - packed, adamw, scale, clip, skip);
        });
    });
}

}  // namespace bmt::kernels
