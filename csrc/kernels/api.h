// Entry points of the CUDA kernels.  All queue work on `stream` of device `device` and return at once; a launch that
// fails throws DeviceError.  Counts and strides are elements, 64 bit.
#pragma once

#include <cstdint>
#include <vector>

#include "../arithmetic.h"

namespace bmt::kernels {

enum class Scalar : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

struct Queue {
    int device;
    void* stream;
};

// Device memory whose type is known at run time.
struct Array {
    void* data;
    Scalar type;
};

// What AdamW updates of one run of parameters, `count` elements of each.
struct AdamWRun {
    void* master;        // fp32; bf16, the rounding of fp32 parameters, where there is a remainder
    int16_t* remainder;  // null, or what the rounding leaves out of the parameters' bits
    float* exp_avg;
    float* exp_avg_sq;
    const void* gradient;
    void* out;  // receives the new parameters in its own type; may be null, and is null where there is a remainder
    int64_t count;
};

// What is the same for all runs of one call: the types, and that a gradient counts times scale * *clip, where clip may
// be null.
struct AdamWKind {
    Scalar gradient;
    Scalar out;
    bool is_split;  // whether there are remainders
    float scale;
    const float* clip;
};

// Rows of logits, `stride` apart, and the class that each should be.
struct Rows {
    Array logits;
    int64_t stride;
    int64_t count;
    const int64_t* targets;
};

// One launch for dozens of runs.  Where *skip (unless null) is not zero, nothing is changed.
void adamw(const Queue& queue, const AdamW& adamw, const std::vector<AdamWRun>& runs, const AdamWKind& kind,
           const float* skip);

// How many partial sums sum_of_squares writes for `count` elements.  It depends on nothing else, and neither does the
// order of summation.
int64_t sum_of_squares_partials(int64_t count);
void sum_of_squares(const Queue& queue, const Array& data, int64_t count, double* partials);
void sum_partials(const Queue& queue, const double* partials, int64_t count, double* total);

// total += source, or total = source when `first`.
void accumulate(const Queue& queue, float* total, const Array& source, int64_t count, bool first);

// The loss of an ignored row is 0, of a target that is no class NaN.
void cross_entropy_forward(const Queue& queue, const CrossEntropy& entropy, const Rows& rows, float* losses,
                           RowStatistics* statistics);

// Overwrites logits by row_gradients[row] times the derivative of that row's loss.
void cross_entropy_backward(const Queue& queue, const CrossEntropy& entropy, const Rows& rows,
                            const RowStatistics* statistics, const float* row_gradients);

}  // namespace bmt::kernels
