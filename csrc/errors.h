// The two exceptions that csrc throws; module.cpp maps them to bmtrain.errors.
#pragma once

#include <stdexcept>

namespace bmt {

struct CommunicationError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct DeviceError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

}  // namespace bmt
