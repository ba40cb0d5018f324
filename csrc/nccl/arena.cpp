#include "arena.h"

#include <dlfcn.h>

#include <atomic>
#include <map>
#include <mutex>

#include "../errors.h"
#include "library.h"

namespace bmt::nccl {
namespace {

// The few driver functions that freeing safely needs; the driver library is in any process that uses CUDA.
struct Driver {
    int (*CtxGetCurrent)(void**) = nullptr;
    int (*CtxPushCurrent)(void*) = nullptr;
    int (*CtxPopCurrent)(void**) = nullptr;
    int (*CtxSynchronize)() = nullptr;

    Driver() {
        void* handle = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
        if (handle == nullptr) return;
        CtxGetCurrent = reinterpret_cast<int (*)(void**)>(dlsym(handle, "cuCtxGetCurrent"));
        CtxPushCurrent = reinterpret_cast<int (*)(void*)>(dlsym(handle, "cuCtxPushCurrent_v2"));
        CtxPopCurrent = reinterpret_cast<int (*)(void**)>(dlsym(handle, "cuCtxPopCurrent_v2"));
        CtxSynchronize = reinterpret_cast<int (*)()>(dlsym(handle, "cuCtxSynchronize"));
    }
    bool complete() const { return CtxGetCurrent && CtxPushCurrent && CtxPopCurrent && CtxSynchronize; }
};

const Driver& driver() {
    static const Driver instance;
    return instance;
}

std::atomic<size_t> live_bytes{0};
std::mutex registry_lock;
// By address.  Never destroyed: tensors may outlive static destruction.
std::map<uintptr_t, std::weak_ptr<Arena>>& registry() {
    static auto* instance = new std::map<uintptr_t, std::weak_ptr<Arena>>();
    return *instance;
}

}  // namespace

Arena::Arena(void* data, size_t bytes, int device, void* context)
    : data_(data), bytes_(bytes), device_(device), context_(context) {
    live_bytes += bytes;
}

std::shared_ptr<Arena> Arena::make(size_t bytes, int device, void (*free)(Arena*)) {
    const Library& nccl = library();
    if (nccl.MemAlloc == nullptr || nccl.MemFree == nullptr) {
        throw CommunicationError("This NCCL has no ncclMemAlloc; 2.19 or newer is needed.");
    }
    bytes = (bytes + kWindowAlignment - 1) / kWindowAlignment * kWindowAlignment;
    if (bytes == 0) bytes = kWindowAlignment;
    void* data = nullptr;
    BMT_NCCL(nullptr, nccl.MemAlloc(&data, bytes));
    void* context = nullptr;
    if (driver().complete()) driver().CtxGetCurrent(&context);
    std::shared_ptr<Arena> arena(new Arena(data, bytes, device, context), free);
    std::lock_guard<std::mutex> lock(registry_lock);
    registry()[reinterpret_cast<uintptr_t>(data)] = arena;
    return arena;
}

size_t Arena::total_bytes() { return live_bytes; }

std::shared_ptr<Arena> Arena::find(const void* address) {
    std::shared_ptr<Arena> arena;  // outlives the lock: dropping the last reference takes it too
    std::lock_guard<std::mutex> lock(registry_lock);
    auto next = registry().upper_bound(reinterpret_cast<uintptr_t>(address));
    if (next == registry().begin()) return nullptr;
    arena = std::prev(next)->second.lock();
    return arena && arena->holds(address) ? arena : nullptr;
}

// Unmapping memory does not wait for kernels that still use it, hence the synchronisation.  At interpreter exit the
// driver is already gone, took the memory with it, and reports an error here.
Arena::~Arena() {
    live_bytes -= bytes_;
    {
        std::lock_guard<std::mutex> lock(registry_lock);
        registry().erase(reinterpret_cast<uintptr_t>(data_));
    }
    const Library& nccl = library();
    if (context_ == nullptr) {
        nccl.MemFree(data_);
        return;
    }
    if (driver().CtxPushCurrent(context_) != 0) return;
    if (driver().CtxSynchronize() == 0) nccl.MemFree(data_);
    driver().CtxPopCurrent(nullptr);
}

}  // namespace bmt::nccl
