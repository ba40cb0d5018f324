// A stand-in for libnccl.so.2 with one rank on the CPU: it keeps a journal of calls, fails where a test asks, and holds
// a call that a test names until the test lets it go.
// Built with -DVERSION=...; versions before 2.27 lack the functions that came later.
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <string>

namespace {

// Like NCCL's, freed by destroy and abort: a sanitizer sees a call that uses one afterwards.
struct Comm {
    int calls = 0;  // that are inside
    bool aborted = false;
};

std::mutex mutex;  // over everything below
std::condition_variable changed;
std::string journal;
std::string to_hold;  // name of the call that is held
bool holding = false;
thread_local std::set<Comm*> grouped;  // what the end of the group will use
thread_local bool in_group = false;

void note(const std::string& entry) { journal += entry + ";"; }

void note_locked(const std::string& entry) {
    std::lock_guard<std::mutex> lock(mutex);
    note(entry);
}

bool asked(const char* variable) { return std::getenv(variable) != nullptr; }

// Stays while the test holds calls of this name, and ends with an error once one of `comms` is aborted.
int pass(const std::string& name, const std::set<Comm*>& comms) {
    std::unique_lock<std::mutex> lock(mutex);
    auto aborted = [&] {
        for (Comm* comm : comms) {
            if (comm->aborted) return true;
        }
        return false;
    };
    for (Comm* comm : comms) ++comm->calls;
    holding = to_hold == name;
    changed.notify_all();
    bool passed = changed.wait_for(lock, std::chrono::seconds(20), [&] { return to_hold != name || aborted(); });
    holding = false;
    int result = !passed || aborted() ? 6 : 0;
    note(result == 0 ? name : name + " failed");
    for (Comm* comm : comms) --comm->calls;
    changed.notify_all();
    return result;
}

int pass(const std::string& name, void* comm) {
    if (in_group) grouped.insert(static_cast<Comm*>(comm));
    return pass(name, std::set<Comm*>{static_cast<Comm*>(comm)});
}

// ncclConfig_t up to the CTA policy.
struct Config {
    size_t size;
    unsigned int magic, version;
    int blocking, cga, min_ctas, max_ctas;
    const char* net;
    int split_share, traffic_class;
    const char* name;
    int collnet, policy;
};
struct UniqueId {
    char bytes[128];
};
size_t size_of(int type) { return type <= 1 ? 1 : type == 6 || type == 9 ? 2 : type == 7 || type == 2 || type == 3 ? 4 : 8; }

}  // namespace

extern "C" {
// What has been called, in order of return.
const char* fake_journal() {
    static std::string copy;
    std::lock_guard<std::mutex> lock(mutex);
    copy = journal;
    return copy.c_str();
}

// From now on calls of this name ("all_reduce", "group_end", "free", ...) stay inside; "" lets them go.
void fake_hold(const char* name) {
    std::lock_guard<std::mutex> lock(mutex);
    to_hold = name;
    changed.notify_all();
}

// Waits until a call is held; 0 if none came within 10 s.
int fake_wait_until_held() {
    std::unique_lock<std::mutex> lock(mutex);
    return changed.wait_for(lock, std::chrono::seconds(10), [] { return holding; });
}

int ncclGetVersion(int* version) { return *version = VERSION, 0; }
const char* ncclGetErrorString(int result) { return result == 4 ? "invalid argument" : "other error"; }
const char* ncclGetLastError(void*) { return "the fake was asked to fail"; }
int ncclGetUniqueId(UniqueId* id) { return std::memset(id->bytes, 'u', 128), 0; }
int ncclCommInitRank(void** comm, int, UniqueId, int) { return note_locked("init"), *comm = new Comm, 0; }
int ncclCommDestroy(void* comm) {
    std::lock_guard<std::mutex> lock(mutex);
    note(static_cast<Comm*>(comm)->calls > 0 ? "destroy under a call" : "destroy");
    delete static_cast<Comm*>(comm);
    return asked("FAKE_DESTROY_ERROR") ? 4 : 0;
}
int ncclCommAbort(void* handle) {
    auto* comm = static_cast<Comm*>(handle);
    std::unique_lock<std::mutex> lock(mutex);
    note(comm->calls > 0 ? "abort under a call" : "abort");
    comm->aborted = true;
    changed.notify_all();
    changed.wait(lock, [&] { return comm->calls == 0; });
    delete comm;
    return 0;
}
int ncclCommGetAsyncError(void*, int* error) { return *error = asked("FAKE_ASYNC_ERROR") ? 6 : 0, 0; }
int ncclCommCount(void*, int* count) { return *count = 1, 0; }
int ncclCommUserRank(void*, int* rank) { return *rank = 0, 0; }
int ncclAllGather(const void* from, void* to, size_t count, int type, void* comm, void*) {
    if (type > 9) return 4;
    return std::memmove(to, from, count * size_of(type)), pass("all_gather", comm);
}
int ncclReduceScatter(const void*, void*, size_t, int, int, void*, void*) { return 4; }
int ncclAllReduce(const void*, void*, size_t, int, int, void* comm, void*) { return pass("all_reduce", comm); }
int ncclBroadcast(const void*, void*, size_t, int, int, void*, void*) { return 0; }
int ncclReduce(const void*, void*, size_t, int, int, int, void*, void*) { return 0; }
int ncclSend(const void*, size_t, int, int, void* comm, void*) { return pass("send", comm); }
int ncclRecv(void*, size_t, int, int, void* comm, void*) { return pass("recv", comm); }
int ncclGroupStart() { return in_group = true, note_locked("group_start"), 0; }
int ncclGroupEnd() {
    in_group = false;
    std::set<Comm*> comms;
    comms.swap(grouped);
    return pass("group_end", comms);
}

#if VERSION >= 22700
int ncclCommInitRankConfig(void** comm, int, UniqueId id, int, Config* config) {
    note_locked("init policy " + std::to_string(config->policy) + " id " + id.bytes[0]);
    return *comm = new Comm, config->magic == 0xcafebeef ? 0 : 4;
}
int ncclMemAlloc(void** data, size_t bytes) { return note_locked("alloc"), *data = std::aligned_alloc(4096, bytes), 0; }
int ncclMemFree(void* data) { return pass("free", std::set<Comm*>()), std::free(data), 0; }
int ncclCommWindowRegister(void*, void*, size_t, void** window, int) {
    const char* mode = std::getenv("FAKE_WINDOW");
    if (mode != nullptr && std::string(mode) == "error") return 4;
    return note_locked("register"), *window = mode != nullptr ? nullptr : &journal, 0;
}
int ncclCommWindowDeregister(void*, void*) {
    static bool failed = false;  // as asked, once
    bool fails = asked("FAKE_DEREGISTER_ERROR") && !failed;
    failed = failed || fails;
    return note_locked(fails ? "deregister failed" : "deregister"), fails ? 4 : 0;
}
#endif
}
