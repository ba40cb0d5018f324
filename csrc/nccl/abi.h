// The part of NCCL's binary interface that we use.  Declared here so that building needs no NCCL and no CUDA header:
// the library is found at run time.
#pragma once

#include <climits>
#include <cstddef>

namespace bmt::nccl {

using Comm = void*;
using Window = void*;
using Stream = void*;

enum Result : int { kSuccess = 0, kInProgress = 7 };

struct UniqueId {
    char bytes[128];
};

constexpr int kUndefined = INT_MIN;
constexpr int kWindowSymmetric = 1;
constexpr size_t kWindowAlignment = 4096;

// Versions that first had a feature.
constexpr int kVersionFloat8 = 22400;
constexpr int kVersionConfig = 22800;  // the layout below, with the zero CTA policy

// ncclConfig_t as of 2.28.  Newer libraries read `version` and take defaults for fields added later.
struct Config {
    size_t size = sizeof(Config);
    unsigned int magic = 0xcafebeef;
    unsigned int version = 22809;
    int blocking = kUndefined;
    int cga_cluster_size = kUndefined;
    int min_ctas = kUndefined;
    int max_ctas = kUndefined;
    const char* net_name = nullptr;
    int split_share = kUndefined;
    int traffic_class = kUndefined;
    const char* comm_name = nullptr;
    int collnet_enable = kUndefined;
    int cta_policy = kUndefined;
    int shrink_share = kUndefined;
    int nvls_ctas = kUndefined;
    int channels_per_net_peer = kUndefined;
    int nvlink_centric_sched = kUndefined;
};

}  // namespace bmt::nccl
