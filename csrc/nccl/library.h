// The NCCL library of this process: the one torch has loaded if there is one, so that both share one copy.
#pragma once

#include <string>
#include <vector>

#include "abi.h"

namespace bmt::nccl {

struct Library {
    int version = 0;
    std::string path;

    Result (*GetVersion)(int*);
    const char* (*GetErrorString)(Result);
    Result (*GetUniqueId)(UniqueId*);
    Result (*CommInitRank)(Comm*, int, UniqueId, int);
    Result (*CommDestroy)(Comm);
    Result (*CommAbort)(Comm);
    Result (*CommGetAsyncError)(Comm, Result*);
    Result (*CommCount)(Comm, int*);
    Result (*CommUserRank)(Comm, int*);
    Result (*AllGather)(const void*, void*, size_t, int, Comm, Stream);
    Result (*ReduceScatter)(const void*, void*, size_t, int, int, Comm, Stream);
    Result (*AllReduce)(const void*, void*, size_t, int, int, Comm, Stream);
    Result (*Broadcast)(const void*, void*, size_t, int, int, Comm, Stream);
    Result (*Reduce)(const void*, void*, size_t, int, int, int, Comm, Stream);
    Result (*Send)(const void*, size_t, int, int, Comm, Stream);
    Result (*Recv)(void*, size_t, int, int, Comm, Stream);
    Result (*GroupStart)();
    Result (*GroupEnd)();

    // Null when the library is too old to have them.
    const char* (*GetLastError)(Comm);
    Result (*CommInitRankConfig)(Comm*, int, UniqueId, int, Config*);
    Result (*CommSplit)(Comm, int, int, Comm*, Config*);
    Result (*MemAlloc)(void**, size_t);
    Result (*MemFree)(void*);
    Result (*CommWindowRegister)(Comm, void*, size_t, Window*, int);
    Result (*CommWindowDeregister)(Comm, Window);
};

// Loads NCCL on the first call: the copy already in the process, else the first of `candidates` (file names or paths)
// that opens.  Throws CommunicationError naming what was tried.
const Library& load(const std::vector<std::string>& candidates);

// The loaded library; throws CommunicationError if load() has not succeeded.
const Library& library();

// Throws CommunicationError with NCCL's own explanation unless `result` is success.  `comm` may be null.
void check(Result result, Comm comm, const char* call, const char* file, int line);

#define BMT_NCCL(comm, call) ::bmt::nccl::check((call), (comm), #call, __FILE__, __LINE__)

}  // namespace bmt::nccl
