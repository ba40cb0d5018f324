#include "communicator.h"

#include <algorithm>

#include "../errors.h"

namespace bmt::nccl {
namespace {

Config make_config(const Library& nccl, CtaPolicy policy) {
    Config config;
    config.version = static_cast<unsigned int>(std::min(nccl.version, 22809));
    config.cta_policy = static_cast<int>(policy);
    return config;
}

bool has_config(const Library& nccl) { return nccl.version >= kVersionConfig && nccl.CommInitRankConfig != nullptr; }

}  // namespace

Communicator::Communicator(const UniqueId& id, int rank, int world_size, CtaPolicy policy)
    : rank_(rank), world_size_(world_size) {
    const Library& nccl = library();
    Comm comm = nullptr;
    if (has_config(nccl)) {
        Config config = make_config(nccl, policy);
        BMT_NCCL(nullptr, nccl.CommInitRankConfig(&comm, world_size, id, rank, &config));
    } else {
        BMT_NCCL(nullptr, nccl.CommInitRank(&comm, world_size, id, rank));
    }
    comm_ = comm;
}

Communicator::Communicator(Comm comm) : comm_(comm) {
    BMT_NCCL(comm, library().CommUserRank(comm, &rank_));
    BMT_NCCL(comm, library().CommCount(comm, &world_size_));
}

Comm Communicator::comm() const {
    Comm comm = comm_.load();
    if (comm == nullptr) throw CommunicationError("This communicator has been closed or aborted.");
    return comm;
}

void Communicator::all_gather(const void* shard, void* whole, size_t count, int dtype, Stream stream) {
    Comm c = comm();
    BMT_NCCL(c, library().AllGather(shard, whole, count, dtype, c, stream));
}

void Communicator::reduce_scatter(const void* whole, void* shard, size_t count, int dtype, int op, Stream stream) {
    Comm c = comm();
    BMT_NCCL(c, library().ReduceScatter(whole, shard, count, dtype, op, c, stream));
}

void Communicator::all_reduce(const void* source, void* target, size_t count, int dtype, int op, Stream stream) {
    Comm c = comm();
    BMT_NCCL(c, library().AllReduce(source, target, count, dtype, op, c, stream));
}

void Communicator::broadcast(const void* source, void* target, size_t count, int dtype, int root, Stream stream) {
    Comm c = comm();
    BMT_NCCL(c, library().Broadcast(source, target, count, dtype, root, c, stream));
}

void Communicator::reduce(const void* source, void* target, size_t count, int dtype, int op, int root, Stream stream) {
    Comm c = comm();
    BMT_NCCL(c, library().Reduce(source, target, count, dtype, op, root, c, stream));
}

void Communicator::send(const void* data, size_t count, int dtype, int peer, Stream stream) {
    Comm c = comm();
    BMT_NCCL(c, library().Send(data, count, dtype, peer, c, stream));
}

void Communicator::recv(void* data, size_t count, int dtype, int peer, Stream stream) {
    Comm c = comm();
    BMT_NCCL(c, library().Recv(data, count, dtype, peer, c, stream));
}

std::vector<Communicator::OpenWindow>::iterator Communicator::find_window(const void* address) {
    return std::find_if(windows_.begin(), windows_.end(),
                        [address](const OpenWindow& window) { return window.arena->holds(address); });
}

std::string Communicator::register_window(const void* address) {
    const Library& nccl = library();
    Comm c = comm();
    std::shared_ptr<Arena> arena = Arena::find(address);
    if (!arena) throw CommunicationError("Only memory from alloc() can be registered.");
    if (nccl.CommWindowRegister == nullptr) return "NCCL before 2.27 has no symmetric windows";
    std::lock_guard<std::mutex> lock(windows_lock_);
    if (find_window(address) != windows_.end()) return "";
    Window handle = nullptr;
    Result result = nccl.CommWindowRegister(c, arena->data(), arena->bytes(), &handle, kWindowSymmetric);
    if (result != kSuccess) return nccl.GetErrorString(result);
    if (handle == nullptr) return "NCCL does not support symmetric windows between these devices";
    windows_.push_back({handle, std::move(arena)});
    return "";
}

bool Communicator::deregister_window(const void* address) {
    Comm c = comm();
    std::lock_guard<std::mutex> lock(windows_lock_);
    auto window = find_window(address);
    if (window == windows_.end()) return false;
    BMT_NCCL(c, library().CommWindowDeregister(c, window->handle));
    windows_.erase(window);
    return true;
}

std::unique_ptr<Communicator> Communicator::split(int color, int key, CtaPolicy policy) {
    const Library& nccl = library();
    if (nccl.CommSplit == nullptr) throw CommunicationError("Splitting a communicator needs NCCL 2.18 or newer.");
    Comm c = comm();
    Comm part = nullptr;
    Config config = make_config(nccl, policy);
    BMT_NCCL(c, nccl.CommSplit(c, color < 0 ? -1 : color, key, &part, has_config(nccl) ? &config : nullptr));
    if (part == nullptr) return nullptr;
    return std::unique_ptr<Communicator>(new Communicator(part));
}

void Communicator::check_async_error() {
    Comm c = comm();
    Result error = kSuccess;
    BMT_NCCL(c, library().CommGetAsyncError(c, &error));
    check(error, c, "asynchronous operation", __FILE__, __LINE__);
}

void Communicator::close() {
    Comm c = comm_.exchange(nullptr);
    if (c == nullptr) return;
    std::lock_guard<std::mutex> lock(windows_lock_);
    for (const OpenWindow& window : windows_) {
        BMT_NCCL(c, library().CommWindowDeregister(c, window.handle));
    }
    windows_.clear();
    BMT_NCCL(nullptr, library().CommDestroy(c));
}

void Communicator::abort() {
    Comm c = comm_.exchange(nullptr);
    if (c == nullptr) return;
    BMT_NCCL(nullptr, library().CommAbort(c));
    std::lock_guard<std::mutex> lock(windows_lock_);
    windows_.clear();
}

UniqueId make_unique_id() {
    UniqueId id;
    BMT_NCCL(nullptr, library().GetUniqueId(&id));
    return id;
}

void group_start() { BMT_NCCL(nullptr, library().GroupStart()); }

void group_end() { BMT_NCCL(nullptr, library().GroupEnd()); }

}  // namespace bmt::nccl
