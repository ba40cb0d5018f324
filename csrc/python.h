// What the bindings share.  Addresses and stream handles are integers in Python; whoever takes more than one integer
// takes them by name alone (py::kw_only), so that none can stand in another's place.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace bmt {

namespace py = pybind11;

using Address = uintptr_t;
using Unlocked = py::call_guard<py::gil_scoped_release>;

template <typename T = void>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace bmt
