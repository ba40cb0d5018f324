// Python face of the kernels.
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
    module.def("adamw", [](int device, Address stream, Address master, Address remainder, Address exp_avg,
                           Address exp_avg_sq, int64_t count, Address gradient, int gradient_type, Address out,
                           int out_type, const AdamW& adamw, float scale, Address clip, Address skip) {
        kernels::adamw(queue(device, stream), adamw,
                       {.master = pointer(master), .remainder = pointer<int16_t>(remainder),
                        .exp_avg = pointer<float>(exp_avg), .exp_avg_sq = pointer<float>(exp_avg_sq), .count = count},
                       {.values = array(gradient, gradient_type), .scale = scale, .clip = pointer<const float>(clip)},
                       array(out, out_type), pointer<const float>(skip));
    }, py::kw_only(), py::arg("device"), py::arg("stream"), py::arg("master"), py::arg("remainder"), py::arg("exp_avg"),
       py::arg("exp_avg_sq"), py::arg("count"), py::arg("gradient"), py::arg("gradient_type"), py::arg("out"),
       py::arg("out_type"), py::arg("adamw"), py::arg("scale"), py::arg("clip"), py::arg("skip"), Unlocked());
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
