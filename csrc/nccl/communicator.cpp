#include "communicator.h"

#include <algorithm>
#include <exception>
#include <thread>

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

// Groups are NCCL's state of a thread, and so are these.
thread_local int open_groups = 0;
thread_local std::vector<std::shared_ptr<Handle>> used_in_group;

}  // namespace

Use::Use(std::shared_ptr<Handle> handle) : handle_(std::move(handle)) {
    ++handle_->calls;  // before the look at comm: close() and abort() clear that before they look at the count
    comm_ = handle_->comm.load();
    if (comm_ != nullptr) return;
    --handle_->calls;
    throw CommunicationError("This communicator has been closed or aborted.");
}

Use::~Use() {
    if (open_groups > 0) used_in_group.push_back(std::move(handle_));
    else --handle_->calls;
}

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
    handle_->comm = comm;
}

Communicator::Communicator(Comm comm) {
    handle_->comm = comm;
    BMT_NCCL(comm, library().CommUserRank(comm, &rank_));
    BMT_NCCL(comm, library().CommCount(comm, &world_size_));
}

void Communicator::all_gather(const void* shard, void* whole, size_t count, int dtype, Stream stream) {
    Use c = use();
    BMT_NCCL(c, library().AllGather(shard, whole, count, dtype, c, stream));
}

void Communicator::reduce_scatter(const void* whole, void* shard, size_t count, int dtype, int op, Stream stream) {
    Use c = use();
    BMT_NCCL(c, library().ReduceScatter(whole, shard, count, dtype, op, c, stream));
}

void Communicator::all_reduce(const void* source, void* target, size_t count, int dtype, int op, Stream stream) {
    Use c = use();
    BMT_NCCL(c, library().AllReduce(source, target, count, dtype, op, c, stream));
}

void Communicator::broadcast(const void* source, void* target, size_t count, int dtype, int root, Stream stream) {
    Use c = use();
    BMT_NCCL(c, library().Broadcast(source, target, count, dtype, root, c, stream));
}

void Communicator::reduce(const void* source, void* target, size_t count, int dtype, int op, int root, Stream stream) {
    Use c = use();
    BMT_NCCL(c, library().Reduce(source, target, count, dtype, op, root, c, stream));
}

void Communicator::send(const void* data, size_t count, int dtype, int peer, Stream stream) {
    Use c = use();
    BMT_NCCL(c, library().Send(data, count, dtype, peer, c, stream));
}

void Communicator::recv(void* data, size_t count, int dtype, int peer, Stream stream) {
    Use c = use();
    BMT_NCCL(c, library().Recv(data, count, dtype, peer, c, stream));
}

std::vector<Communicator::OpenWindow>::iterator Communicator::find_window(const void* address) {
    return std::find_if(windows_.begin(), windows_.end(),
                        [address](const OpenWindow& window) { return window.arena->holds(address); });
}

std::string Communicator::register_window(const void* address) {
    const Library& nccl = library();
    Use c = use();
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
    Use c = use();
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
    Use c = use();
    Comm part = nullptr;
    Config config = make_config(nccl, policy);
    BMT_NCCL(c, nccl.CommSplit(c, color < 0 ? -1 : color, key, &part, has_config(nccl) ? &config : nullptr));
    if (part == nullptr) return nullptr;
    return std::unique_ptr<Communicator>(new Communicator(part));
}

void Communicator::check_async_error() {
    Use c = use();
    Result error = kSuccess;
    BMT_NCCL(c, library().CommGetAsyncError(c, &error));
    check(error, c, "asynchronous operation", __FILE__, __LINE__);
}

bool Communicator::calls_have_left() const {
    auto deadline = std::chrono::steady_clock::now() + kPatience;
    while (handle_->calls.load() > 0) {
        if (std::chrono::steady_clock::now() > deadline) return false;
        std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
    return true;
}

void Communicator::close() {
    Comm c;
    {
        std::lock_guard<std::mutex> lock(ending_);
        c = handle_->comm.exchange(nullptr);
        if (c == nullptr) return;
        if (!calls_have_left()) {
            handle_->comm = c;
            throw CommunicationError("A call or a group on this communicator has not ended yet; wait for it, or abort().");
        }
    }
    std::exception_ptr first_error;
    auto try_all_the_same = [&first_error](auto&& call) {
        try {
            call();
        } catch (const CommunicationError&) {
            if (!first_error) first_error = std::current_exception();
        }
    };
    std::lock_guard<std::mutex> lock(windows_lock_);
    for (const OpenWindow& window : windows_) {
        try_all_the_same([&] { BMT_NCCL(c, library().CommWindowDeregister(c, window.handle)); });
    }
    try_all_the_same([&] { BMT_NCCL(nullptr, library().CommDestroy(c)); });
    windows_.clear();  // only now: a window that could not be closed has gone with the communicator
    if (first_error) std::rethrow_exception(first_error);
}

void Communicator::abort() {
    Comm c;
    {
        std::lock_guard<std::mutex> lock(ending_);
        c = handle_->comm.exchange(nullptr);
        if (c == nullptr) return;
        calls_have_left();
    }
    BMT_NCCL(nullptr, library().CommAbort(c));
    if (!calls_have_left()) return;  // stuck for good, maybe with the lock below: the memory stays
    std::lock_guard<std::mutex> lock(windows_lock_);
    windows_.clear();
}

UniqueId make_unique_id() {
    UniqueId id;
    BMT_NCCL(nullptr, library().GetUniqueId(&id));
    return id;
}

void group_start() {
    BMT_NCCL(nullptr, library().GroupStart());
    ++open_groups;
}

void group_end() {
    std::vector<std::shared_ptr<Handle>> used;
    if (open_groups > 0 && --open_groups == 0) used.swap(used_in_group);
    Result result = library().GroupEnd();
    for (const auto& handle : used) --handle->calls;
    check(result, nullptr, "GroupEnd()", __FILE__, __LINE__);
}

}  // namespace bmt::nccl
