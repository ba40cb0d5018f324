#include "device.cuh"

namespace bmt::kernels {
namespace {

constexpr int kThreads = 256;

// fp32 parameters, and a copy of them in another type unless that is null.
template <typename Out>
struct Plain {
    float* master;
    Out* out;

    template <int N>
    __device__ Pack<float, N> load(int64_t i) const {
        return *reinterpret_cast<const Pack<float, N>*>(master + i);
    }

    template <int N>
    __device__ void save(int64_t i, const Pack<float, N>& values) const {
        *reinterpret_cast<Pack<float, N>*>(master + i) = values;
        if (out == nullptr) return;
        Pack<Out, N> copy;
#pragma unroll
        for (int k = 0; k < N; ++k) store(copy.values[k], values.values[k]);
        *reinterpret_cast<Pack<Out, N>*>(out + i) = copy;
    }

    Plain from(int64_t i) const { return {master + i, out != nullptr ? out + i : nullptr}; }
    bool aligned() const { return is_aligned<4>(master) && is_aligned<4>(out); }
};

// fp32 parameters as their bf16 rounding and the 16 bits that it leaves out (bmtrain/split_float.py).
struct Split {
    __nv_bfloat16* rounded;
    int16_t* remainder;

    template <int N>
    __device__ Pack<float, N> load(int64_t i) const {
        auto high = *reinterpret_cast<const Pack<__nv_bfloat16, N>*>(rounded + i);
        auto low = *reinterpret_cast<const Pack<int16_t, N>*>(remainder + i);
        Pack<float, N> values;
#pragma unroll
        for (int k = 0; k < N; ++k) {
            values.values[k] = __int_as_float(__float_as_int(to_float(high.values[k])) + low.values[k]);
        }
        return values;
    }

    template <int N>
    __device__ void save(int64_t i, const Pack<float, N>& values) const {
        Pack<__nv_bfloat16, N> high;
        Pack<int16_t, N> low;
#pragma unroll
        for (int k = 0; k < N; ++k) {
            store(high.values[k], values.values[k]);
            auto difference = __float_as_uint(values.values[k]) - __float_as_uint(to_float(high.values[k]));
            low.values[k] = static_cast<int16_t>(min(static_cast<int>(difference), 0x7fff));
        }
        *reinterpret_cast<Pack<__nv_bfloat16, N>*>(rounded + i) = high;
        *reinterpret_cast<Pack<int16_t, N>*>(remainder + i) = low;
    }

    Split from(int64_t i) const { return {rounded + i, remainder + i}; }
    bool aligned() const { return is_aligned<4>(rounded) && is_aligned<4>(remainder); }
};

// N elements a thread and turn: 4 (128-bit accesses of fp32) when everything is aligned, else 1.
template <int N, typename Gradient, typename Parameters>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(Parameters parameters, float* __restrict__ exp_avg, float* __restrict__ exp_avg_sq,
                 const Gradient* __restrict__ gradient, int64_t count, AdamW adamw, float scale,
                 const float* __restrict__ clip, const float* __restrict__ skip) {
    if (skip != nullptr && *skip != 0.0f) return;
    const float factor = clip != nullptr ? scale * *clip : scale;
    const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads * N;
    for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N; i + N <= count; i += step) {
        auto g = *reinterpret_cast<const Pack<Gradient, N>*>(gradient + i);
        auto p = parameters.template load<N>(i);
        auto m = *reinterpret_cast<Pack<float, N>*>(exp_avg + i);
        auto v = *reinterpret_cast<Pack<float, N>*>(exp_avg_sq + i);
#pragma unroll
        for (int k = 0; k < N; ++k) {
            adamw.update(multiply(to_float(g.values[k]), factor), p.values[k], m.values[k], v.values[k]);
        }
        parameters.template save<N>(i, p);
        *reinterpret_cast<Pack<float, N>*>(exp_avg + i) = m;
        *reinterpret_cast<Pack<float, N>*>(exp_avg_sq + i) = v;
    }
}

// Elements from `first` on, `count` of them.
template <int N, typename Gradient, typename Parameters>
void launch(const Queue& queue, const AdamW& adamw, const AdamWStates& states, Parameters parameters,
            const Gradient* values, const ScaledGradient& gradient, const float* skip, int64_t first, int64_t count) {
    if (count == 0) return;
    adamw_kernel<N><<<blocks_for(count / N, kThreads), kThreads, 0, static_cast<cudaStream_t>(queue.stream)>>>(
        parameters.from(first), states.exp_avg + first, states.exp_avg_sq + first, values + first, count, adamw,
        gradient.scale, gradient.clip, skip);
    BMT_CUDA(cudaGetLastError());
}

}  // namespace

void adamw(const Queue& queue, const AdamW& adamw, const AdamWStates& states, const ScaledGradient& gradient,
           const Array& out, const float* skip) {
    DeviceGuard guard(queue.device);
    dispatch(gradient.values, [&](auto* values) {
        auto run = [&](auto parameters) {
            bool aligned = parameters.aligned() && is_aligned<4>(states.exp_avg) && is_aligned<4>(states.exp_avg_sq) &&
                           is_aligned<4>(values);
            int64_t packed = aligned ? states.count / 4 * 4 : 0;
            launch<4>(queue, adamw, states, parameters, values, gradient, skip, 0, packed);
            launch<1>(queue, adamw, states, parameters, values, gradient, skip, packed, states.count - packed);
        };
        if (states.remainder != nullptr) {
            return run(Split{static_cast<__nv_bfloat16*>(states.master), states.remainder});
        }
        dispatch(out, [&](auto* copy) {
            run(Plain<std::remove_pointer_t<decltype(copy)>>{static_cast<float*>(states.master), copy});
        });
    });
}

}  // namespace bmt::kernels
