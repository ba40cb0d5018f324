// A stand-in for libnccl.so.2 with one rank on the CPU: it keeps a journal of calls, and fails where a test asks.
// Built with -DVERSION=...; versions before 2.27 lack the functions that came later.
#include <cstdlib>
#include <cstring>
#include <string>

namespace {
std::string journal;
int communicator;  // its address serves as the handle

void note(const std::string& entry) { journal += entry + ";"; }

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
const char* fake_journal() { return journal.c_str(); }

int ncclGetVersion(int* version) { return *version = VERSION, 0; }
const char* ncclGetErrorString(int result) { return result == 4 ? "invalid argument" : "other error"; }
const char* ncclGetLastError(void*) { return "the fake was asked to fail"; }
int ncclGetUniqueId(UniqueId* id) { return std::memset(id->bytes, 'u', 128), 0; }
int ncclCommInitRank(void** comm, int, UniqueId, int) { return note("init"), *comm = &communicator, 0; }
int ncclCommDestroy(void*) { return note("destroy"), 0; }
int ncclCommAbort(void*) { return note("abort"), 0; }
int ncclCommGetAsyncError(void*, int* error) { return *error = std::getenv("FAKE_ASYNC_ERROR") ? 6 : 0, 0; }
int ncclCommCount(void*, int* count) { return *count = 1, 0; }
int ncclCommUserRank(void*, int* rank) { return *rank = 0, 0; }
int ncclAllGather(const void* from, void* to, size_t count, int type, void*, void*) {
    if (type > 9) return 4;
    return std::memmove(to, from, count * size_of(type)), note("all_gather"), 0;
}
int ncclReduceScatter(const void*, void*, size_t, int, int, void*, void*) { return 4; }
int ncclAllReduce(const void*, void*, size_t, int, int, void*, void*) { return 0; }
int ncclBroadcast(const void*, void*, size_t, int, int, void*, void*) { return 0; }
int ncclReduce(const void*, void*, size_t, int, int, int, void*, void*) { return 0; }
int ncclSend(const void*, size_t, int, int, void*, void*) { return 0; }
int ncclRecv(void*, size_t, int, int, void*, void*) { return 0; }
int ncclGroupStart() { return note("group_start"), 0; }
int ncclGroupEnd() { return note("group_end"), 0; }

#if VERSION >= 22700
int ncclCommInitRankConfig(void** comm, int, UniqueId id, int, Config* config) {
    note("init policy " + std::to_string(config->policy) + " id " + id.bytes[0]);
    return *comm = &communicator, config->magic == 0xcafebeef ? 0 : 4;
}
int ncclMemAlloc(void** data, size_t bytes) { return note("alloc"), *data = std::aligned_alloc(4096, bytes), 0; }
int ncclMemFree(void* data) { return note("free"), std::free(data), 0; }
int ncclCommWindowRegister(void*, void*, size_t, void** window, int) {
    const char* mode = std::getenv("FAKE_WINDOW");
    if (mode != nullptr && std::string(mode) == "error") return 4;
    return note("register"), *window = mode != nullptr ? nullptr : &communicator, 0;
}
int ncclCommWindowDeregister(void*, void*) { return note("deregister"), 0; }
#endif
}
