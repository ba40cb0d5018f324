// CPU references of the kernels in fp32: the same arithmetic (arithmetic.h) in plain loops.
#include <cmath>
#include <limits>

#include "../arithmetic.h"
#include "../python.h"

namespace bmt {
namespace {

void adamw(Address master, Address exp_avg, Address exp_avg_sq, Address gradient, int64_t count, const AdamW& adamw,
           float scale) {
    auto *p = pointer<float>(master), *m = pointer<float>(exp_avg), *v = pointer<float>(exp_avg_sq);
    auto* g = pointer<const float>(gradient);
    for (int64_t i = 0; i < count; ++i) adamw.update(g[i] * scale, p[i], m[i], v[i]);
}

double sum_of_squares(Address data, int64_t count) {
    auto* x = pointer<const float>(data);
    double sum = 0.0;
    for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(x[i]) * x[i];
    return sum;
}

void accumulate(Address accumulated, Address source, int64_t count, bool first) {
    auto* total = pointer<float>(accumulated);
    auto* x = pointer<const float>(source);
    for (int64_t i = 0; i < count; ++i) total[i] = first ? x[i] : total[i] + x[i];
}

void cross_entropy_forward(Address logits, int64_t stride, Address targets, int64_t rows, const CrossEntropy& entropy,
                           Address losses, Address statistics) {
    for (int64_t row = 0; row < rows; ++row) {
        auto* x = pointer<const float>(logits) + row * stride;
        ExponentialSum sum;
        float weighted = 0.0f;
        for (int64_t c = 0; c < entropy.classes; ++c) {
            sum.include<1>({x[c]});
            if (entropy.smoothing > 0.0f) weighted += entropy.class_weight(c) * x[c];
        }
        int64_t target = pointer<const int64_t>(targets)[row];
        float loss = std::numeric_limits<float>::quiet_NaN();
        if (target == entropy.ignore_index) loss = 0.0f;
        else if (entropy.is_class(target)) loss = entropy.loss(x[target], entropy.class_weight(target), sum.statistics(), weighted);
        pointer<float>(losses)[row] = loss;
        pointer<RowStatistics>(statistics)[row] = sum.statistics();
    }
}

void cross_entropy_backward(Address logits, int64_t stride, Address targets, int64_t rows, const CrossEntropy& entropy,
                            Address statistics, Address row_gradients) {
    for (int64_t row = 0; row < rows; ++row) {
        auto* x = pointer<float>(logits) + row * stride;
        int64_t target = pointer<const int64_t>(targets)[row];
        const RowStatistics& row_statistics = pointer<const RowStatistics>(statistics)[row];
        float scale = pointer<const float>(row_gradients)[row];
        bool ignored = target == entropy.ignore_index;
        float weight = entropy.is_class(target) ? entropy.class_weight(target) : std::numeric_limits<float>::quiet_NaN();
        for (int64_t c = 0; c < entropy.classes; ++c) {
            x[c] = ignored ? 0.0f : scale * entropy.derivative(x[c], c, target, weight, row_statistics);
        }
    }
}

}  // namespace

void bind_reference(py::module_& module) {
    py::class_<AdamW>(module, "AdamW")
        .def(py::init([](float decay, float beta2, float weight1, float weight2, float step_size,
                         float correction2_sqrt, float eps) {
            return AdamW{decay, beta2, weight1, weight2, step_size, correction2_sqrt, eps};
        }), py::kw_only(), py::arg("decay"), py::arg("beta2"), py::arg("weight1"), py::arg("weight2"),
            py::arg("step_size"), py::arg("correction2_sqrt"), py::arg("eps"));
    py::class_<CrossEntropy>(module, "CrossEntropy")
        .def(py::init([](int64_t classes, int64_t ignore_index, float smoothing, Address weight, Address total) {
            return CrossEntropy{classes, ignore_index, smoothing, pointer<const float>(weight),
                                pointer<const float>(total)};
        }), py::kw_only(), py::arg("classes"), py::arg("ignore_index"), py::arg("smoothing"), py::arg("weight"),
            py::arg("weight_total"));
    module.def("adamw", &adamw, py::kw_only(), py::arg("master"), py::arg("exp_avg"), py::arg("exp_avg_sq"),
               py::arg("gradient"), py::arg("count"), py::arg("adamw"), py::arg("scale"), Unlocked());
    module.def("sum_of_squares", &sum_of_squares, py::kw_only(), py::arg("data"), py::arg("count"), Unlocked());
    module.def("accumulate", &accumulate, py::kw_only(), py::arg("total"), py::arg("source"), py::arg("count"),
               py::arg("first"), Unlocked());
    module.def("cross_entropy_forward", &cross_entropy_forward, py::kw_only(), py::arg("logits"), py::arg("stride"),
               py::arg("targets"), py::arg("rows"), py::arg("entropy"), py::arg("losses"), py::arg("statistics"),
               Unlocked());
    module.def("cross_entropy_backward", &cross_entropy_backward, py::kw_only(), py::arg("logits"), py::arg("stride"),
               py::arg("targets"), py::arg("rows"), py::arg("entropy"), py::arg("statistics"),
               py::arg("row_gradients"), Unlocked());
}

}  // namespace bmt
