// Entry points of the CUDA kernels.  All queue work on `stream` of device `device` and return at once; a launch that
// fails throws DeviceError.  Counts and strides are elements, 64 bit.
#pragma once

#include <cstdint>

#include "../arithmetic.h"

namespace bmt::kernels {

enum class Scalar : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

struct Queue {
    int device;
    void* stream;
};

// AdamW on flat fp32 states.  The gradient is multiplied by scale and, unless null, *clip.  `out` (may be null)
// receives the new parameters in its own type.  Where *skip (unless null) is not zero, nothing is changed.  Unless
// `remainder` is null, `master` is bf16, the rounding of fp32 parameters, which are that plus the remainder in their bits.
void adamw(const Queue& queue, void* master, float* exp_avg, float* exp_avg_sq, const void* gradient,
           Scalar gradient_type, void* out, Scalar out_type, int64_t count, const AdamW& adamw, float scale,
           const float* clip, const float* skip, int16_t* remainder);

// How many partial sums sum_of_squares writes for `count` elements.  It depends on nothing else, and neither does the
// order of summation.
int64_t sum_of_squares_partials(int64_t count);
void sum_of_squares(const Queue& queue, const void* data, Scalar type, int64_t count, double* partials);
void sum_partials(const Queue& queue, const double* partials, int64_t count, double* total);

// total += source, or total = source when `first`.
void accumulate(const Queue& queue, float* total, const void* source, Scalar type, int64_t count, bool first);

// Rows of logits are `stride` apart.  The loss of an ignored row is 0, of a target that is no class NaN.
void cross_entropy_forward(const Queue& queue, const void* logits, Scalar type, int64_t stride, const int64_t* targets,
                           int64_t rows, const CrossEntropy& entropy, float* losses, RowStatistics* statistics);

// Overwrites logits by row_gradients[row] times the derivative of that row's loss.
void cross_entropy_backward(const Queue& queue, void* logits, Scalar type, int64_t stride, const int64_t* targets,
                            int64_t rows, const CrossEntropy& entropy, const RowStatistics* statistics,
                            const float* row_gradients);

}  // namespace bmt::kernels
