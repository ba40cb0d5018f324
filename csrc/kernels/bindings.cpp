// Python face of the kernels: device addresses and stream handles are integers.
#include <pybind11/pybind11.h>

#include "api.h"

namespace py = pybind11;

namespace bmt {
namespace {

using Address = uintptr_t;
using Unlocked = py::call_guard<py::gil_scoped_release>;
using kernels::Queue;
using kernels::Scalar;

template <typename T = void>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

void bind_kernels(py::module_& module) {
    module.def("adamw", [](int device, Address stream, Address master, Address exp_avg, Address exp_avg_sq,
                           Address gradient, int gradient_type, Address out, int out_type, int64_t count,
                           const AdamW& adamw, float scale, Address clip, Address skip, Address remainder) {
        kernels::adamw(Queue{device, pointer(stream)}, pointer(master), pointer<float>(exp_avg),
                       pointer<float>(exp_avg_sq), pointer(gradient), static_cast<Scalar>(gradient_type), pointer(out),
                       static_cast<Scalar>(out_type), count, adamw, scale, pointer<const float>(clip),
                       pointer<const float>(skip), pointer<int16_t>(remainder));
    }, Unlocked());
    module.def("sum_of_squares_partials", &kernels::sum_of_squares_partials);
    module.def("sum_of_squares", [](int device, Address stream, Address data, int type, int64_t count,
                                    Address partials) {
        kernels::sum_of_squares(Queue{device, pointer(stream)}, pointer(data), static_cast<Scalar>(type), count,
                                pointer<double>(partials));
    }, Unlocked());
    module.def("sum_partials", [](int device, Address stream, Address partials, int64_t count, Address total) {
        kernels::sum_partials(Queue{device, pointer(stream)}, pointer<const double>(partials), count,
                              pointer<double>(total));
    }, Unlocked());
    module.def("accumulate", [](int device, Address stream, Address total, Address source, int type, int64_t count,
                                bool first) {
        kernels::accumulate(Queue{device, pointer(stream)}, pointer<float>(total), pointer(source),
                            static_cast<Scalar>(type), count, first);
    }, Unlocked());
    module.def("cross_entropy_forward", [](int device, Address stream, Address logits, int type, int64_t stride,
                                           Address targets, int64_t rows, const CrossEntropy& entropy, Address losses,
                                           Address statistics) {
        kernels::cross_entropy_forward(Queue{device, pointer(stream)}, pointer(logits), static_cast<Scalar>(type),
                                       stride, pointer<const int64_t>(targets), rows, entropy, pointer<float>(losses),
                                       pointer<RowStatistics>(statistics));
    }, Unlocked());
    module.def("cross_entropy_backward", [](int device, Address stream, Address logits, int type, int64_t stride,
                                            Address targets, int64_t rows, const CrossEntropy& entropy,
                                            Address statistics, Address row_gradients) {
        kernels::cross_entropy_backward(Queue{device, pointer(stream)}, pointer(logits), static_cast<Scalar>(type),
                                        stride, pointer<const int64_t>(targets), rows, entropy,
                                        pointer<const RowStatistics>(statistics), pointer<const float>(row_gradients));
    }, Unlocked());
}

}  // namespace bmt
