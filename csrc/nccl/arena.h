// Device memory from ncclMemAlloc, which NCCL can map into other ranks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace bmt::nccl {

// Lives as long as anything refers to it: a tensor that views it, or a communicator that holds a window on it.
class Arena {
public:
    // Allocates on the current CUDA device, whose index is `device`.  `bytes` is rounded up to a window's alignment.
    // The last owner calls `free`, which deletes the arena; that waits for the device.
    static std::shared_ptr<Arena> make(size_t bytes, int device, void (*free)(Arena*));

    // The arena that holds `address`, or null.
    static std::shared_ptr<Arena> find(const void* address);

    // Bytes of all arenas that are alive.
    static size_t total_bytes();

    ~Arena();
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    void* data() const { return data_; }
    size_t bytes() const { return bytes_; }
    int device() const { return device_; }
    bool holds(const void* address) const {
        auto offset = reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(data_);
        return reinterpret_cast<uintptr_t>(address) >= reinterpret_cast<uintptr_t>(data_) && offset < bytes_;
    }

private:
    Arena(void* data, size_t bytes, int device, void* context);

    void* data_;
    size_t bytes_;
    int device_;
    void* context_;  // the CUDA context it was made in; null if the driver library was not found
};

}  // namespace bmt::nccl
