// The thread pool: persistent workers, no OpenMP. The calling thread is worker 0.
//
// Results never depend on who runs a chunk: bodies write disjoint outputs and reduce in an order fixed by indices.
// Calls from several threads take turns; a call from inside a body runs alone in its thread. After fork() the child
// starts its own workers on first use.
#pragma once
#include <atomic>
#include <cstdint>

namespace pe {

// Threads in use: set_num_threads, else PYENGINE_NUM_THREADS, else what affinity mask and cgroup quota allow.
int num_threads();
// Expects 1 <= count <= kMaxThreads; throws ArgumentError otherwise.
void set_num_threads(int count);
constexpr int kMaxThreads = 256;

// What affinity mask and cgroup CPU quota allow. `cgroup_root` is a parameter for tests.
int available_cpus(const char* cgroup_root = "/sys/fs/cgroup");

namespace detail {
using RangeFn = void (*)(const void* body, int64_t begin, int64_t end);
void parallel_for(int64_t n, int64_t grain, const void* body, RangeFn call);
using WorkerFn = void (*)(const void* body, int worker);
void parallel_region(int num_workers, const void* body, WorkerFn call);
}  // namespace detail

// Calls body(begin, end) for disjoint ranges that cover [0, n), each of `grain` indices but the last, claimed one by
// one.
template <class Body>
void parallel_for(int64_t n, int64_t grain, const Body& body) {
  detail::parallel_for(n, grain, &body,
                       [](const void* b, int64_t begin, int64_t end) { (*static_cast<const Body*>(b))(begin, end); });
}

// Workers that a region started here would have: num_threads(), or 1 inside a body.
int region_size();

// Calls body(0) here, and body(worker) at the same time on each of the other region_size() workers, as the caller read
// it before, that comes before body(0) returns: a worker whose core is busy may never come.
template <class Body>
void parallel_region(int num_workers, const Body& body) {
  detail::parallel_region(num_workers, &body,
                          [](const void* b, int worker) { (*static_cast<const Body*>(b))(worker); });
}

// Waits until `value` differs from `old`: spins for a bounded time, then sleeps. Returns the new value.
uint32_t wait_change(const std::atomic<uint32_t>& value, uint32_t old);

}  // namespace pe
