// Sums of squares in double precision.  Squares of fp32 cannot overflow there, so the sum is finite exactly when every
// element is: one pass gives the norm and the overflow check.
#include "reduce.cuh"

namespace bmt::kernels {
namespace {

constexpr int kThreads = 512;
constexpr int64_t kMostBlocks = 1024;
constexpr int64_t kElementsPerBlock = 16 * kThreads;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    sum_of_squares_kernel(const T* __restrict__ data, int64_t count, bool aligned, double* __restrict__ partials) {
    constexpr int N = 16 / sizeof(T);
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
    const int64_t packs = aligned ? count / N : 0;
    double sum = 0.0;
    for (int64_t i = thread; i < packs; i += threads) {
        auto pack = reinterpret_cast<const Pack<T, N>*>(data)[i];
#pragma unroll
        for (int k = 0; k < N; ++k) {
            double x = to_float(pack.values[k]);
            sum = fma(x, x, sum);
        }
    }
    for (int64_t i = packs * N + thread; i < count; i += threads) {
        double x = to_float(data[i]);
        sum = fma(x, x, sum);
    }
    sum = reduce_block(sum, 0.0, Add());
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads)
    sum_partials_kernel(const double* __restrict__ partials, int64_t count, double* __restrict__ total) {
    double sum = 0.0;
    for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += partials[i];
    sum = reduce_block(sum, 0.0, Add());
    if (threadIdx.x == 0) *total = sum;
}

}  // namespace

int64_t sum_of_squares_partials(int64_t count) {
    return std::max<int64_t>(1, std::min((count + kElementsPerBlock - 1) / kElementsPerBlock, kMostBlocks));
}

void sum_of_squares(const Queue& queue, const Array& data, int64_t count, double* partials) {
    DeviceGuard guard(queue.device);
    dispatch(data, [&](auto* x) {
        constexpr int N = 16 / sizeof(*x);
        sum_of_squares_kernel<<<static_cast<unsigned int>(sum_of_squares_partials(count)), kThreads, 0,
                                static_cast<cudaStream_t>(queue.stream)>>>(
            x, count, is_aligned<N>(x), partials);
        BMT_CUDA(cudaGetLastError());
    });
}

void sum_partials(const Queue& queue, const double* partials, int64_t count, double* total) {
    DeviceGuard guard(queue.device);
    sum_partials_kernel<<<1, kThreads, 0, static_cast<cudaStream_t>(queue.stream)>>>(partials, count, total);
    BMT_CUDA(cudaGetLastError());
}

}  // namespace bmt::kernels
