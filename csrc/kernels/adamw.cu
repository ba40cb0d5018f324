#include "device.cuh"

namespace bmt::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kPerBlock = 16 * kThreads;  // elements
constexpr int kMostRuns = 48;                 // of one launch, whose arguments may take 4 KiB

// The runs of one launch; blocks from first[i] to before first[i + 1] work on runs[i], each on its own elements.
struct Batch {
    AdamWRun runs[kMostRuns];
    uint32_t first[kMostRuns + 1];
    int count;
};

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

    __device__ explicit Plain(const AdamWRun& run)
        : master(static_cast<float*>(run.master)), out(static_cast<Out*>(run.out)) {}
    __device__ bool aligned() const { return is_aligned<4>(master) && is_aligned<4>(out); }
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

    __device__ explicit Split(const AdamWRun& run)
        : rounded(static_cast<__nv_bfloat16*>(run.master)), remainder(run.remainder) {}
    __device__ bool aligned() const { return is_aligned<4>(rounded) && is_aligned<4>(remainder); }
};

// Elements from `begin` to before `end` of one run, N a thread and turn.
template <int N, typename Gradient, typename Parameters>
__device__ void update(const Parameters& parameters, const AdamWRun& run, const AdamW& adamw, float factor,
                       int64_t begin, int64_t end) {
    auto* gradient = static_cast<const Gradient*>(run.gradient);
    for (int64_t i = begin + threadIdx.x * N; i + N <= end; i += kThreads * N) {
        auto g = *reinterpret_cast<const Pack<Gradient, N>*>(gradient + i);
        auto p = parameters.template load<N>(i);
        auto m = *reinterpret_cast<Pack<float, N>*>(run.exp_avg + i);
        auto v = *reinterpret_cast<Pack<float, N>*>(run.exp_avg_sq + i);
#pragma unroll
        for (int k = 0; k < N; ++k) {
            adamw.update(multiply(to_float(g.values[k]), factor), p.values[k], m.values[k], v.values[k]);
        }
        parameters.template save<N>(i, p);
        *reinterpret_cast<Pack<float, N>*>(run.exp_avg + i) = m;
        *reinterpret_cast<Pack<float, N>*>(run.exp_avg_sq + i) = v;
    }
}

// 4 elements at a time (128-bit accesses of fp32) where everything is aligned, the rest one by one.
template <typename Gradient, typename Parameters>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(const __grid_constant__ Batch batch, AdamW adamw, float scale, const float* __restrict__ clip,
                 const float* __restrict__ skip) {
    if (skip != nullptr && *skip != 0.0f) return;
    const float factor = clip != nullptr ? scale * *clip : scale;
    int index = 0;
    while (blockIdx.x >= batch.first[index + 1]) ++index;
    const AdamWRun& run = batch.runs[index];
    const Parameters parameters(run);
    const int64_t begin = (blockIdx.x - batch.first[index]) * kPerBlock;
    const int64_t end = begin + kPerBlock < run.count ? begin + kPerBlock : run.count;
    const bool aligned = parameters.aligned() && is_aligned<4>(run.exp_avg) && is_aligned<4>(run.exp_avg_sq) &&
                         is_aligned<4>(static_cast<const Gradient*>(run.gradient));
    const int64_t packed = aligned ? end / 4 * 4 : begin;
    update<4, Gradient>(parameters, run, adamw, factor, begin, packed);
    update<1, Gradient>(parameters, run, adamw, factor, packed, end);
}

}  // namespace

void adamw(const Queue& queue, const AdamW& adamw, const std::vector<AdamWRun>& runs, const AdamWKind& kind,
           const float* skip) {
    DeviceGuard guard(queue.device);
    auto launch = [&](auto* kernel) {
        for (size_t at = 0; at < runs.size();) {
            Batch batch{};
            uint32_t blocks = 0;
            for (; at < runs.size() && batch.count < kMostRuns; ++at) {
                batch.runs[batch.count] = runs[at];
                blocks += static_cast<uint32_t>((runs[at].count + kPerBlock - 1) / kPerBlock);
                batch.first[++batch.count] = blocks;
            }
            if (blocks == 0) continue;
            kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(queue.stream)>>>(batch, adamw, kind.scale,
                                                                                    kind.clip, skip);
            BMT_CUDA(cudaGetLastError());
        }
    };
    dispatch({.data = nullptr, .type = kind.gradient}, [&](auto* gradient) {
        using Gradient = std::remove_pointer_t<decltype(gradient)>;
        if (kind.is_split) return launch(adamw_kernel<Gradient, Split>);
        dispatch({.data = nullptr, .type = kind.out}, [&](auto* out) {
            launch(adamw_kernel<Gradient, Plain<std::remove_pointer_t<decltype(out)>>>);
        });
    });
}

}  // namespace bmt::kernels
