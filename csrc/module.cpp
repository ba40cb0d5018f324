// bmtrain._C: raw pointers and stream handles only, so that one build serves every version of torch.
#include <pybind11/pybind11.h>

#include "errors.h"

namespace py = pybind11;

namespace bmt {
void bind_nccl(py::module_& module);
void bind_reference(py::module_& module);
void bind_cpu(py::module_& module);
#ifdef BMT_WITH_CUDA
void bind_kernels(py::module_& module);
#endif
}  // namespace bmt

namespace {

// Raises bmtrain.errors.<name>; our errors derive from built-in ones, so callers need no special case.
void raise(const char* name, const char* message) {
    py::object type = py::module_::import("bmtrain.errors").attr(name);
    PyErr_SetString(type.ptr(), message);
}

void translate(std::exception_ptr pointer) {
    try {
        if (pointer) std::rethrow_exception(pointer);
    } catch (const bmt::CommunicationError& error) {
        raise("CommunicationError", error.what());
    } catch (const bmt::DeviceError& error) {
        raise("DeviceError", error.what());
    }
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Compiled part of bmtrain: NCCL communicators, CUDA kernels and their CPU references.";
    py::register_exception_translator(&translate);
    py::module_ nccl = module.def_submodule("nccl", "Communicators over the NCCL library found at run time.");
    bmt::bind_nccl(nccl);
    py::module_ reference = module.def_submodule("reference", "CPU references of the kernels.");
    bmt::bind_reference(reference);
    py::module_ cpu = module.def_submodule("cpu", "Fast loops over host memory.");
    bmt::bind_cpu(cpu);
#ifdef BMT_WITH_CUDA
    py::module_ kernels = module.def_submodule("kernels", "CUDA kernels on raw device pointers.");
    bmt::bind_kernels(kernels);
    module.attr("with_cuda") = true;
#else
    module.attr("with_cuda") = false;
#endif
}
