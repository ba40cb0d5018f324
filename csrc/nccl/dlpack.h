// The exchange structures of DLPack (its stable, unversioned form), which torch.from_dlpack reads.
#pragma once

#include <cstdint>

namespace bmt::dlpack {

struct Device {
    int32_t type;  // kCuda
    int32_t index;
};

struct DataType {
    uint8_t code;  // kUInt
    uint8_t bits;
    uint16_t lanes;
};

struct Tensor {
    void* data;
    Device device;
    int32_t ndim;
    DataType dtype;
    int64_t* shape;
    int64_t* strides;  // null: contiguous
    uint64_t byte_offset;
};

struct ManagedTensor {
    Tensor tensor;
    void* manager;
    void (*deleter)(ManagedTensor*);
};

constexpr int32_t kCuda = 2;
constexpr uint8_t kUInt = 1;
constexpr const char* kCapsuleName = "dltensor";  // a consumer renames the capsule when it takes ownership

}  // namespace bmt::dlpack
