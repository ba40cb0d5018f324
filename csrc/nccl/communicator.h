// One NCCL communicator.  Calls queue work on the given stream and return; the caller holds no Python lock.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "arena.h"
#include "library.h"

namespace bmt::nccl {

constexpr std::chrono::seconds kPatience{1};  // calls that wait for no peer leave within milliseconds

enum class CtaPolicy : int { kDefault = 0, kEfficiency = 1, kZero = 2 };

// NCCL's handle of one communicator, null once that is closed or aborted, and how many calls are using it.
struct Handle {
    std::atomic<Comm> comm{nullptr};
    std::atomic<int> calls{0};
};

// A call's use of a handle: while there is one, nobody frees the communicator, unless abort() has waited in vain.  In a
// group it lasts until the group's end, where NCCL does what was queued.
class Use {
public:
    explicit Use(std::shared_ptr<Handle> handle);  // throws when closed
    ~Use();
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;

    operator Comm() const { return comm_; }

private:
    std::shared_ptr<Handle> handle_;
    Comm comm_ = nullptr;
};

class Communicator {
public:
    // Collective; blocks until all ranks have joined.  The current CUDA device becomes this rank's.
    Communicator(const UniqueId& id, int rank, int world_size, CtaPolicy policy);

    // Does nothing: destroying is collective and may block, so it is never left to the garbage collector.
    ~Communicator() = default;
    Communicator(const Communicator&) = delete;
    Communicator& operator=(const Communicator&) = delete;

    int rank() const { return rank_; }
    int world_size() const { return world_size_; }
    bool is_open() const { return handle_->comm.load() != nullptr; }

    // Counts are elements of `dtype`, sizes are 64 bit.  all_gather and reduce_scatter count one rank's share.
    void all_gather(const void* shard, void* whole, size_t count, int dtype, Stream stream);
    void reduce_scatter(const void* whole, void* shard, size_t count, int dtype, int op, Stream stream);
    void all_reduce(const void* source, void* target, size_t count, int dtype, int op, Stream stream);
    void broadcast(const void* source, void* target, size_t count, int dtype, int root, Stream stream);
    void reduce(const void* source, void* target, size_t count, int dtype, int op, int root, Stream stream);
    void send(const void* data, size_t count, int dtype, int peer, Stream stream);
    void recv(void* data, size_t count, int dtype, int peer, Stream stream);

    // Collective.  Opens a symmetric window on the arena that holds `address`.
    // Returns an empty text, or why there is none (collectives then work all the same, only slower).
    std::string register_window(const void* address);

    // Collective.  Closes the window on the arena that holds `address`; false if there is none.
    bool deregister_window(const void* address);

    // Collective.  Ranks of equal color form a new communicator, ordered by key; null for a negative color.
    std::unique_ptr<Communicator> split(int color, int key, CtaPolicy policy);

    // Throws if an earlier operation failed on the device or on the network.
    void check_async_error();

    // Collective.  All queued work must have finished.  Safe to call twice.  Throws the first error of NCCL after giving
    // everything back all the same; refuses, and leaves all as it is, while another thread stays inside a call.
    void close();

    // Ends queued and running operations, from any thread.  Calls of other threads get kPatience to leave: NCCL frees
    // what they use.  Whoever is still inside then waits for a peer, and only NCCL's own abort gets it out.
    void abort();

private:
    struct OpenWindow {
        Window handle;
        std::shared_ptr<Arena> arena;  // keeps the memory while peers may read it
    };

    explicit Communicator(Comm comm);
    Use use() const { return Use(handle_); }
    bool calls_have_left() const;  // waits for kPatience at most
    std::vector<OpenWindow>::iterator find_window(const void* address);

    std::shared_ptr<Handle> handle_ = std::make_shared<Handle>();
    std::mutex ending_;  // close() and abort() take the handle one at a time
    int rank_ = 0;
    int world_size_ = 1;
    std::mutex windows_lock_;
    std::vector<OpenWindow> windows_;
};

UniqueId make_unique_id();
void group_start();
void group_end();

}  // namespace bmt::nccl
