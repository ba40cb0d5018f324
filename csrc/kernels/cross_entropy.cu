// Cross entropy, one block a row.  Forward reads the row once; backward reads it once and overwrites it.
#include <climits>

#include "reduce.cuh"

namespace bmt::kernels {
namespace {

// Calls f(index, values) for this thread's share of the row, where values is an array of neighbours from index on:
// 128 bits of them wherever the address allows, else one.
template <bool kWrite, typename T, typename F>
__device__ __forceinline__ void visit_row(T* row, int64_t count, F&& f) {
    constexpr int N = 16 / sizeof(T);
    const int64_t misaligned = (reinterpret_cast<uintptr_t>(row) % 16) / sizeof(T);
    const int64_t head = misaligned == 0 ? 0 : (N - misaligned < count ? N - misaligned : count);
    const int64_t packs = (count - head) / N;
    auto visit = [&](int64_t i) {
        T value[1] = {row[i]};
        f(i, value);
        if (kWrite) row[i] = value[0];
    };
    for (int64_t i = threadIdx.x; i < head; i += blockDim.x) visit(i);
    for (int64_t p = threadIdx.x; p < packs; p += blockDim.x) {
        auto* address = reinterpret_cast<Pack<T, N>*>(row + head) + p;
        auto pack = *address;
        f(head + p * N, pack.values);
        if (kWrite) *address = pack;
    }
    for (int64_t i = head + packs * N + threadIdx.x; i < count; i += blockDim.x) visit(i);
}

template <typename T>
__global__ void forward_kernel(T* logits, int64_t stride, const int64_t* __restrict__ targets, int64_t rows,
                               CrossEntropy entropy, float* __restrict__ losses,
                               RowStatistics* __restrict__ statistics) {
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
        T* x = logits + row * stride;
        ExponentialSum sum;
        float weighted = 0.0f;
        visit_row<false>(x, entropy.classes, [&](int64_t c, auto& values) {
            constexpr int N = sizeof(values) / sizeof(T);
            float numbers[N];
#pragma unroll
            for (int k = 0; k < N; ++k) numbers[k] = to_float(values[k]);
            sum.include(numbers);
            if (entropy.smoothing > 0.0f) {
#pragma unroll
                for (int k = 0; k < N; ++k) weighted += entropy.class_weight(c + k) * numbers[k];
            }
        });
        sum = reduce_block(sum, ExponentialSum(), Merge());
        if (entropy.smoothing > 0.0f) weighted = reduce_block(weighted, 0.0f, Add());
        if (threadIdx.x != 0) continue;
        statistics[row] = sum.statistics();
        const int64_t target = targets[row];
        float loss = nanf("");
        if (target == entropy.ignore_index) loss = 0.0f;
        else if (entropy.is_class(target))
            loss = entropy.loss(to_float(x[target]), entropy.class_weight(target), statistics[row], weighted);
        losses[row] = loss;
    }
}

template <typename T>
__global__ void backward_kernel(T* logits, int64_t stride, const int64_t* __restrict__ targets, int64_t rows,
                                CrossEntropy entropy, const RowStatistics* __restrict__ statistics,
                                const float* __restrict__ row_gradients) {
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
        const int64_t target = targets[row];
        const bool ignored = target == entropy.ignore_index;
        const RowStatistics row_statistics = statistics[row];
        const float scale = row_gradients[row];
        const float weight = entropy.is_class(target) ? entropy.class_weight(target) : nanf("");
        visit_row<true>(logits + row * stride, entropy.classes, [&](int64_t c, auto& values) {
            constexpr int N = sizeof(values) / sizeof(T);
#pragma unroll
            for (int k = 0; k < N; ++k) {
                float value = entropy.derivative(to_float(values[k]), c + k, target, weight, row_statistics);
                store(values[k], ignored ? 0.0f : scale * value);
            }
        });
    }
}

// At least 16 classes a thread, so that a row is worth its reductions.
int threads_for(int64_t classes) {
    int threads = kWarp;
    while (threads < 1024 && threads * 16 < classes) threads *= 2;
    return threads;
}

unsigned int blocks_for_rows(int64_t rows) { return static_cast<unsigned int>(std::min<int64_t>(rows, INT_MAX)); }

}  // namespace

void cross_entropy_forward(const Queue& queue, const CrossEntropy& entropy, const Rows& rows, float* losses,
                           RowStatistics* statistics) {
    if (rows.count == 0) return;
    DeviceGuard guard(queue.device);
    dispatch(rows.logits, [&](auto* logits) {
        forward_kernel<<<blocks_for_rows(rows.count), threads_for(entropy.classes), 0,
                         static_cast<cudaStream_t>(queue.stream)>>>(logits, rows.stride, rows.targets, rows.count,
                                                                    entropy, losses, statistics);
        BMT_CUDA(cudaGetLastError());
    });
}

void cross_entropy_backward(const Queue& queue, const CrossEntropy& entropy, const Rows& rows,
                            const RowStatistics* statistics, const float* row_gradients) {
    if (rows.count == 0) return;
    DeviceGuard guard(queue.device);
    dispatch(rows.logits, [&](auto* logits) {
        backward_kernel<<<blocks_for_rows(rows.count), threads_for(entropy.classes), 0,
                          static_cast<cudaStream_t>(queue.stream)>>>(logits, rows.stride, rows.targets, rows.count,
                                                                     entropy, statistics, row_gradients);
        BMT_CUDA(cudaGetLastError());
    });
}

}  // namespace bmt::kernels
