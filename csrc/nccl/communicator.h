// One NCCL communicator.  Calls queue work on the given stream and return; the caller holds no Python lock.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "arena.h"
#include "library.h"

namespace bmt::nccl {

enum class CtaPolicy : int { kDefault = 0, kEfficiency = 1, kZero = 2 };

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
    bool is_open() const { return comm_.load() != nullptr; }

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

    // Collective.  All queued work must have finished.  Safe to call twice.
    void close();

    // Ends queued and running operations at once, from any thread.
    void abort();

private:
    struct OpenWindow {
        Window handle;
        std::shared_ptr<Arena> arena;  // keeps the memory while peers may read it
    };

    explicit Communicator(Comm comm);
    Comm comm() const;  // throws when closed
    std::vector<OpenWindow>::iterator find_window(const void* address);

    std::atomic<Comm> comm_{nullptr};
    int rank_ = 0;
    int world_size_ = 1;
    std::mutex windows_lock_;
    std::vector<OpenWindow> windows_;
};

UniqueId make_unique_id();
void group_start();
void group_end();

}  // namespace bmt::nccl
