// AdamW on host memory, by several threads, for states that are kept beside a GPU.  It is the kernels' arithmetic: results
// are those of a GPU to the bit, whichever thread and vector an element falls into.
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#include "../kernels/api.h"
#include "../python.h"

namespace bmt {
namespace {

using kernels::AdamWRun;
using kernels::Scalar;

// Runs a loop, compiled also for vectors of eight with fused products, where the processor has them.
#if defined(__x86_64__)
template <auto Loop, typename... Arguments>
__attribute__((target("avx2,fma"), flatten)) void by_eight(Arguments... arguments) {
    Loop(arguments...);
}

template <auto Loop, typename... Arguments>
void vectorised(Arguments... arguments) {
    static const bool has_eight = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    has_eight ? by_eight<Loop>(arguments...) : Loop(arguments...);
}
#else
template <auto Loop, typename... Arguments>
void vectorised(Arguments... arguments) {
    Loop(arguments...);
}
#endif

constexpr int64_t kPiece = 1 << 14;  // elements that a thread takes at a time: its scratch stays in the cache

uint32_t bits(float value) {
    uint32_t found;
    std::memcpy(&found, &value, sizeof found);
    return found;
}

float from_bits(uint32_t value) {
    float found;
    std::memcpy(&found, &value, sizeof found);
    return found;
}

inline void widen_bf16(const uint16_t* __restrict from, float* __restrict to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = from_bits(static_cast<uint32_t>(from[i]) << 16);
}

// To nearest, ties to even; not a number stays one.
inline void narrow_bf16(const float* __restrict from, uint16_t* __restrict to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        uint32_t value = bits(from[i]);
        uint32_t rounded = (value + 0x7fff + ((value >> 16) & 1)) >> 16;
        to[i] = static_cast<uint16_t>((value & 0x7fffffff) > 0x7f800000 ? 0x7fff : rounded);
    }
}

// The exponent of a half is moved by a product, which also makes its subnormal numbers normal.
inline void widen_half(const uint16_t* __restrict from, float* __restrict to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        uint32_t sign = static_cast<uint32_t>(from[i] & 0x8000) << 16, rest = from[i] & 0x7fff;
        uint32_t finite = bits(from_bits(rest << 13) * 0x1p112f);
        uint32_t value = rest >= 0x7c00 ? (rest << 13) | 0x7f800000 : finite;
        to[i] = from_bits(sign | value);
    }
}

// To nearest, ties to even.  Where the result is subnormal a sum with 0.5 rounds: that has the half's last bit as its own.
inline void narrow_half(const float* __restrict from, uint16_t* __restrict to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        uint32_t sign = (bits(from[i]) >> 16) & 0x8000, value = bits(from[i]) & 0x7fffffff;
        uint32_t normal = (value - (112u << 23) + 0xfff + ((value >> 13) & 1)) >> 13;
        uint32_t small = bits(from_bits(std::min(value, 113u << 23)) + 0.5f) - bits(0.5f);
        uint32_t large = value > 0x7f800000 ? 0x7fff : 0x7c00;
        uint32_t found = value >= 0x477ff000 ? large : value < (113u << 23) ? small : normal;
        to[i] = static_cast<uint16_t>(sign | found);
    }
}

inline void update(const AdamW* adamw, float factor, const float* __restrict gradient, float* __restrict master,
                   float* __restrict exp_avg, float* __restrict exp_avg_sq, int64_t count) {
    const AdamW numbers = *adamw;
    for (int64_t i = 0; i < count; ++i) {
        numbers.update(multiply(gradient[i], factor), master[i], exp_avg[i], exp_avg_sq[i]);
    }
}

const float* widened(const void* from, Scalar type, int64_t at, int64_t count, float* scratch) {
    if (type == Scalar::kFloat32) return static_cast<const float*>(from) + at;
    auto* narrow = static_cast<const uint16_t*>(from) + at;
    type == Scalar::kFloat16 ? vectorised<widen_half>(narrow, scratch, count)
                             : vectorised<widen_bf16>(narrow, scratch, count);
    return scratch;
}

void narrowed(const float* from, void* to, Scalar type, int64_t at, int64_t count) {
    if (type == Scalar::kFloat32) {
        std::memcpy(static_cast<float*>(to) + at, from, count * sizeof(float));
        return;
    }
    auto* narrow = static_cast<uint16_t*>(to) + at;
    type == Scalar::kFloat16 ? vectorised<narrow_half>(from, narrow, count)
                             : vectorised<narrow_bf16>(from, narrow, count);
}

struct Piece {
    const AdamWRun* run;
    int64_t begin, count;
};

void adamw(const std::vector<AdamWRun>& runs, Scalar gradient, Scalar out, const AdamW& adamw, float factor, int threads) {
    std::vector<Piece> pieces;
    for (const AdamWRun& run : runs) {
        for (int64_t at = 0; at < run.count; at += kPiece) pieces.push_back({&run, at, std::min(kPiece, run.count - at)});
    }
    auto work = [&](size_t from, size_t to) {
        std::vector<float> scratch(gradient == Scalar::kFloat32 ? 0 : kPiece);
        for (size_t i = from; i < to; ++i) {
            const auto& [run, at, count] = pieces[i];
            auto* master = static_cast<float*>(run->master) + at;
            vectorised<update>(&adamw, factor, widened(run->gradient, gradient, at, count, scratch.data()), master,
                               run->exp_avg + at, run->exp_avg_sq + at, count);
            if (run->out != nullptr) narrowed(master, run->out, out, at, count);
        }
    };
    // Each thread always has the same part, so that its memory is near its processor.
    const size_t shares = std::clamp<size_t>(pieces.size() / 4, 1, std::max(threads, 1));
    std::vector<std::thread> others;
    for (size_t i = 1; i < shares; ++i) {
        const size_t from = pieces.size() * i / shares, to = pieces.size() * (i + 1) / shares;
        try {
            others.emplace_back(work, from, to);
        } catch (const std::system_error&) {  // the host lets this process start no more
            work(from, to);
        }
    }
    work(0, pieces.size() / shares);
    for (std::thread& other : others) other.join();
}

}  // namespace

void bind_cpu(py::module_& module) {
    // `runs`: for each run master, remainder (none here), exp_avg, exp_avg_sq, gradient, out, count.
    module.def("adamw", [](const std::vector<std::array<uint64_t, 7>>& runs, int gradient_type, int out_type,
                           const AdamW& numbers, float factor, int threads) {
        std::vector<AdamWRun> all;
        all.reserve(runs.size());
        for (const auto& [master, remainder, exp_avg, exp_avg_sq, gradient, out, count] : runs) {
            all.push_back({.master = pointer(master), .remainder = pointer<int16_t>(remainder), .exp_avg = pointer<float>(exp_avg),
                           .exp_avg_sq = pointer<float>(exp_avg_sq), .gradient = pointer(gradient),
                           .out = pointer(out), .count = static_cast<int64_t>(count)});
        }
        adamw(all, static_cast<Scalar>(gradient_type), static_cast<Scalar>(out_type), numbers, factor, threads);
    }, py::kw_only(), py::arg("runs"), py::arg("gradient_type"), py::arg("out_type"), py::arg("adamw"),
       py::arg("factor"), py::arg("threads"), Unlocked());
}

}  // namespace bmt
