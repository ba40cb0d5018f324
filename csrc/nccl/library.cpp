#include "library.h"

#include <dlfcn.h>

#include <atomic>
#include <memory>
#include <mutex>

#include "../errors.h"

namespace bmt::nccl {
namespace {

std::mutex loading;
std::atomic<const Library*> loaded{nullptr};  // written once; never freed, since memory is given back at exit too

void* open_library(const std::vector<std::string>& candidates, std::string& path) {
    path = "libnccl.so.2";
    if (void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD)) return handle;
    std::string tried;
    for (const std::string& candidate : candidates) {
        path = candidate;
        if (void* handle = dlopen(candidate.c_str(), RTLD_NOW | RTLD_LOCAL)) return handle;
        tried += "\n  " + std::string(dlerror());
    }
    throw CommunicationError("NCCL (libnccl.so.2) was not found; install a CUDA build of torch. Tried:" + tried);
}

template <typename Function>
void find(void* handle, const char* name, Function& function, bool required) {
    function = reinterpret_cast<Function>(dlsym(handle, name));
    if (function == nullptr && required) {
        throw CommunicationError(std::string("The NCCL library has no function ") + name + "; NCCL 2.7 or newer is needed.");
    }
}

std::unique_ptr<const Library> bind(void* handle, std::string path) {
    auto table = std::make_unique<Library>();
    table->path = std::move(path);
#define BMT_REQUIRED(name) find(handle, "nccl" #name, table->name, true)
#define BMT_OPTIONAL(name) find(handle, "nccl" #name, table->name, false)
    BMT_REQUIRED(GetVersion);
    BMT_REQUIRED(GetErrorString);
    BMT_REQUIRED(GetUniqueId);
    BMT_REQUIRED(CommInitRank);
    BMT_REQUIRED(CommDestroy);
    BMT_REQUIRED(CommAbort);
    BMT_REQUIRED(CommGetAsyncError);
    BMT_REQUIRED(CommCount);
    BMT_REQUIRED(CommUserRank);
    BMT_REQUIRED(AllGather);
    BMT_REQUIRED(ReduceScatter);
    BMT_REQUIRED(AllReduce);
    BMT_REQUIRED(Broadcast);
    BMT_REQUIRED(Reduce);
    BMT_REQUIRED(Send);
    BMT_REQUIRED(Recv);
    BMT_REQUIRED(GroupStart);
    BMT_REQUIRED(GroupEnd);
    BMT_OPTIONAL(GetLastError);
    BMT_OPTIONAL(CommInitRankConfig);
    BMT_OPTIONAL(CommSplit);
    BMT_OPTIONAL(MemAlloc);
    BMT_OPTIONAL(MemFree);
    BMT_OPTIONAL(CommWindowRegister);
    BMT_OPTIONAL(CommWindowDeregister);
#undef BMT_REQUIRED
#undef BMT_OPTIONAL
    if (table->GetVersion(&table->version) != kSuccess) throw CommunicationError("ncclGetVersion failed.");
    return table;
}

}  // namespace

const Library& load(const std::vector<std::string>& candidates) {
    std::lock_guard<std::mutex> lock(loading);
    if (loaded.load() == nullptr) {
        std::string path;
        void* handle = open_library(candidates, path);
        loaded = bind(handle, path).release();
    }
    return library();
}

const Library& library() {
    const Library* nccl = loaded.load(std::memory_order_acquire);
    if (nccl == nullptr) throw CommunicationError("NCCL is not loaded yet; call load() first.");
    return *nccl;
}

void check(Result result, Comm comm, const char* call, const char* file, int line) {
    if (result == kSuccess || result == kInProgress) return;
    const Library& nccl = library();
    std::string message = "NCCL: " + std::string(nccl.GetErrorString(result)) + " (" + call + " at " + file + ":" +
                          std::to_string(line) + ")";
    const char* last = nccl.GetLastError != nullptr ? nccl.GetLastError(comm) : nullptr;
    if (last != nullptr && last[0] != '\0') message += ". Last error: " + std::string(last);
    throw CommunicationError(message);
}

}  // namespace bmt::nccl
