// The arithmetic of each operation on single elements, shared by the CUDA kernels and their CPU references.
//
// Products and sums are spelled out, so that no compiler fuses them differently: the CPU and the GPU round alike.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define BMT_INLINE __host__ __device__ __forceinline__
#else
#define BMT_INLINE inline
#endif

namespace bmt {

BMT_INLINE float multiply(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

BMT_INLINE float add(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fadd_rn(a, b);
#else
    return a + b;
#endif
}

// One AdamW step.  Bias corrections and decay are folded into these numbers on the host, in double precision.
struct AdamW {
    float decay;             // 1 - lr * weight_decay
    float beta2;
    float weight1;           // 1 - beta1
    float weight2;           // 1 - beta2
    float step_size;         // lr / (1 - beta1^step)
    float correction2_sqrt;  // sqrt(1 - beta2^step)
    float eps;

    // In torch.optim.AdamW's order of operations.
    BMT_INLINE void update(float gradient, float& parameter, float& exp_avg, float& exp_avg_sq) const {
        float decayed = multiply(parameter, decay);
        float difference = add(gradient, -exp_avg);
        exp_avg = weight1 < 0.5f ? fmaf(weight1, difference, exp_avg)
                                 : fmaf(-difference, add(1.0f, -weight1), gradient);
        exp_avg_sq = fmaf(multiply(weight2, gradient), gradient, multiply(exp_avg_sq, beta2));
        float denominator = add(sqrtf(exp_avg_sq) / correction2_sqrt, eps);
        parameter = add(decayed, multiply(-step_size, exp_avg) / denominator);
    }
};

// What backward needs of a row: log(sum(exp(x))) = maximum + log_sum.  Kept apart, since a large maximum would swallow
// the digits of log_sum.
struct RowStatistics {
    float maximum;
    float log_sum;
};

// Maximum of a row and sum(exp(x - maximum)), a few elements at a time.  The maximum starts finite, so that -inf
// elements add nothing instead of NaN.
struct ExponentialSum {
    float maximum = -FLT_MAX;
    float sum = 0.0f;

    template <int N>
    BMT_INLINE void include(const float (&x)[N]) {
        float larger = maximum;
        for (int k = 0; k < N; ++k) larger = fmaxf(larger, x[k]);
        if (larger > maximum) {
            sum *= expf(maximum - larger);
            maximum = larger;
        }
        for (int k = 0; k < N; ++k) sum += expf(x[k] - maximum);
    }

    BMT_INLINE void merge(const ExponentialSum& other) {
        float larger = fmaxf(maximum, other.maximum);
        sum = sum * expf(maximum - larger) + other.sum * expf(other.maximum - larger);
        maximum = larger;
    }

    BMT_INLINE RowStatistics statistics() const { return {maximum, logf(sum)}; }
};

// Cross entropy of one row against one class, optionally weighted and smoothed.
struct CrossEntropy {
    int64_t classes;
    int64_t ignore_index;
    float smoothing;
    const float* weight;        // per class, or null
    const float* weight_total;  // their sum, or null

    BMT_INLINE float class_weight(int64_t c) const { return weight != nullptr ? weight[c] : 1.0f; }
    BMT_INLINE float total() const { return weight_total != nullptr ? *weight_total : static_cast<float>(classes); }
    BMT_INLINE bool is_class(int64_t target) const { return target >= 0 && target < classes; }

    // `weighted_sum` is the sum of class_weight(c) * x[c]; it is read only when smoothing.
    BMT_INLINE float loss(float target_logit, float target_weight, const RowStatistics& row, float weighted_sum) const {
        float value = (1.0f - smoothing) * target_weight * ((row.maximum - target_logit) + row.log_sum);
        if (smoothing > 0.0f) {
            value += smoothing / classes * ((total() * row.maximum - weighted_sum) + total() * row.log_sum);
        }
        return value;
    }

    // Derivative of loss with respect to the logit x of class c.
    BMT_INLINE float derivative(float x, int64_t c, int64_t target, float target_weight,
                                const RowStatistics& row) const {
        float probability = expf((x - row.maximum) - row.log_sum);
        float value = (1.0f - smoothing) * target_weight * (probability - (c == target ? 1.0f : 0.0f));
        if (smoothing > 0.0f) value += smoothing / classes * (total() * probability - class_weight(c));
        return value;
    }
};

}  // namespace bmt
