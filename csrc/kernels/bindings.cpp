// Python face of the kernels.
#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "../python.h"
#include "api.h"

namespace bmt {
namespace {

using kernels::Array;
using kernels::Queue;
using kernels::Scalar;

Queue queue(int device, Address stream) { return {.device = device, .stream = pointer(stream)}; }

Array array(Address data, int type) { return {.data = pointer(data), .type = static_cast<Scalar>(type)}; }

}  // namespace

void bind_kernels(py::module_& module) {
    // `runs`: for each run master, remainder, exp_avg, exp_avg_sq, gradient, out, count.
    module.def("adamw", [](int device, Address stream, const std::vector<std::array<uint64_t, 7>>& runs,
                           int gradient_type, int out_type, bool is_split, const AdamW& adamw, float scale,
                           Address clip, Address skip) {
        std::vector<kernels::AdamWRun> all;
        all.reserve(runs.size());
        for (const auto& [master, remainder, exp_avg, exp_avg_sq, gradient, out, count] : runs) {
            all.push_back({.master = pointer(master), .remainder = pointer<int16_t>(remainder),
                           .exp_avg = pointer<float>(exp_avg), .exp_avg_sq = pointer<float>(exp_avg_sq),
                           .gradient = pointer(gradient), .out = pointer(out),
                           .count = static_cast<int64_t>(count)});
        }
        kernels::adamw(queue(device, stream), adamw, all,
                       {.gradient = static_cast<Scalar>(gradient_type), .out = static_cast<Scalar>(out_type),
                        .is_split = is_split, .scale = scale, .clip = pointer<const float>(clip)},
                       pointer<const float>(skip));
    }, py::kw_only(), py::arg("device"), py::arg("stream"), py::arg("runs"), py::arg("gradient_type"),
       py::arg("out_type"), py::arg("is_split"), py::arg("adamw"), py::arg("scale"), py::arg("clip"), py::arg("skip"),
       Unlocked());
    module.def("sum_of_squares_partials", &kernels::sum_of_squares_partials, py::arg("count"));
    module.def("sum_of_squares", [](int device, Address stream, Address data, int type, int64_t count,
                                    Address partials) {
        kernels::sum_of_squares(queue(device, stream), array(data, type), count, pointer<double>(partials));
    }, py::kw_only(), py::arg("device"), py::arg("stream"), py::arg("data"), py::arg("type"), py::arg("count"),
       py::arg("partials"), Unlocked());
    module.def("sum_partials", [](int device, Address stream, Address partials, int64_t count, Address total) {
        kernels::sum_partials(queue(device, stream), pointer<const double>(partials), count, pointer<double>(total));
    }, py::kw_only(), py::arg("device"), py::arg("stream"), py::arg("partials"), py::arg("count"), py::arg("total"),
       Unlocked());
    module.def("accumulate", [](int device, Address stream, Address total, Address source, int type, int64_t count,
                                bool first) {
        kernels::accumulate(queue(device, stream), pointer<float>(total), array(source, type), count, first);
    }, py::kw_only(), py::arg("device"), py::arg("stream"), py::arg("total"), py::arg("source"), py::arg("type"),
       py::arg("count"), py::arg("first"), Unlocked());
    module.def("cross_entropy_forward", [](int device, Address stream, Address logits, int type, int64_t stride,
                                           Address targets, int64_t rows, const CrossEntropy& entropy, Address losses,
                                           Address statistics) {
        kernels::cross_entropy_forward(queue(device, stream), entropy,
                                       {.logits = array(logits, type), .stride = stride, .count = rows,
                                        .targets = pointer<const int64_t>(targets)},
                                       pointer<float>(losses), pointer<RowStatistics>(statistics));
    }, py::kw_only(), py::arg("device"), py::arg("stream"), py::arg("logits"), py::arg("type"), py::arg("stride"),
       py::arg("targets"), py::arg("rows"), py::arg("entropy"), py::arg("losses"), py::arg("statistics"), Unlocked());
    module.def("cross_entropy_backward", [](int device, Address stream, Address logits, int type, int64_t stride,
                                            Address targets, int64_t rows, const CrossEntropy& entropy,
                                            Address statistics, Address row_gradients) {
        kernels::cross_entropy_backward(queue(device, stream), entropy,
                                        {.logits = array(logits, type), .stride = stride, .count = rows,
                                         .targets = pointer<const int64_t>(targets)},
                                        pointer<const RowStatistics>(statistics), pointer<const float>(row_gradients));
    }, py::kw_only(), py::arg("device"), py::arg("stream"), py::arg("logits"), py::arg("type"), py::arg("stride"),
       py::arg("targets"), py::arg("rows"), py::arg("entropy"), py::arg("statistics"), py::arg("row_gradients"),
       Unlocked());
}

}  // namespace bmt
