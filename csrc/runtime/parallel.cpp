#include "runtime/parallel.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "runtime/error.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pe {
namespace {

// About 50 us at 3 GHz: a phase of decode is shorter, an idle engine must not burn a core.
constexpr int kSpins = 2000;

inline void cpu_relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

thread_local bool t_inside = false;  // this thread runs a body: nested calls run alone

struct Job {
  const void* body = nullptr;
  detail::RangeFn range = nullptr;
  detail::WorkerFn worker = nullptr;
  int64_t n = 0, grain = 1;
};

class Pool {
 public:
  explicit Pool(int num_threads) : num_threads_(num_threads) {
    for (int i = 1; i < num_threads; ++i) threads_.emplace_back([this, i] { work(i); });
  }

  ~Pool() {
    stop_.store(true, std::memory_order_relaxed);
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  int size() const { return num_threads_; }

  void run(const Job& job) {
    job_ = job;
    next_.store(0, std::memory_order_relaxed);
    const uint32_t epoch = epoch_.load(std::memory_order_relaxed) + 1;
    gate_.store(uint64_t{epoch} << 32, std::memory_order_release);
    epoch_.store(epoch, std::memory_order_release);
    epoch_.notify_all();
    execute(0);
    const uint32_t emptied = emptied_.load(std::memory_order_relaxed);
    if (gate_.fetch_or(kClosed, std::memory_order_acq_rel) & kInside) wait_change(emptied_, emptied);
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  void work(int worker) {
    uint32_t seen = 0;
    for (;;) {
      seen = wait_change(epoch_, seen);
      if (stop_.load(std::memory_order_relaxed)) return;
      if (!enter(seen)) continue;
      execute(worker);
      const uint64_t gate = gate_.fetch_sub(1, std::memory_order_acq_rel) - 1;
      if ((gate & kClosed) && !(gate & kInside)) {
        emptied_.fetch_add(1, std::memory_order_release);
        emptied_.notify_all();
      }
    }
  }

  // Whether the job of this epoch is still open; if so, its caller waits until this worker has left.
  bool enter(uint32_t epoch) {
    uint64_t gate = gate_.load(std::memory_order_relaxed);
    do {
      if (gate >> 32 != epoch || (gate & kClosed)) return false;
    } while (!gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel, std::memory_order_relaxed));
    return true;
  }

  void execute(int worker) {
    t_inside = true;
    try {
      if (job_.worker) {
        job_.worker(job_.body, worker);
      } else {
        for (;;) {
          const int64_t begin = next_.fetch_add(job_.grain, std::memory_order_relaxed);
          if (begin >= job_.n) break;
          job_.range(job_.body, begin, std::min(begin + job_.grain, job_.n));
        }
      }
    } catch (...) {
      const std::lock_guard lock(error_mutex_);
      if (!error_) error_ = std::current_exception();
    }
    t_inside = false;
  }

  const int num_threads_;
  Job job_;
  std::vector<std::thread> threads_;
  std::mutex error_mutex_;
  std::exception_ptr error_;
  std::atomic<bool> stop_{false};
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<uint32_t> epoch_{0};
  // [epoch | closed | number of workers inside]. Once its caller has found nothing left to do, a job is closed: a worker
  // that the system wakes later than that is not waited for.
  static constexpr uint64_t kClosed = uint64_t{1} << 31, kInside = kClosed - 1;
  alignas(64) std::atomic<uint64_t> gate_{kClosed};
  std::atomic<uint32_t> emptied_{0};  // counts jobs that were closed while workers were inside
};

std::mutex g_mutex;                 // one job at a time; also guards g_pool
constinit Pool* g_pool = nullptr;   // never freed at exit: daemon threads may still use it
std::atomic<int> g_num_threads{0};  // 0: not decided yet

// The child of fork() has this thread only: the old pool's threads are gone, so its memory is left behind, not joined.
void forget_pool_in_child() {
  g_pool = nullptr;
  new (&g_mutex) std::mutex;
  t_inside = false;
}

// At load, not at first use: a fork while another thread makes the first pool would miss it.
[[maybe_unused]] const int g_registered = pthread_atfork(nullptr, nullptr, forget_pool_in_child);

int default_num_threads() {
  if (const char* text = std::getenv("PYENGINE_NUM_THREADS"); text && *text) {
    char* end = nullptr;
    const long count = std::strtol(text, &end, 10);
    if (*end != '\0' || count < 1 || count > kMaxThreads)
      throw ArgumentError("PYENGINE_NUM_THREADS: expected a whole number from 1 to " + std::to_string(kMaxThreads) +
                          ", got '" + text + "'");
    return static_cast<int>(count);
  }
  return available_cpus();
}

void run(const Job& job, int count) {
  const std::lock_guard lock(g_mutex);
  if (!g_pool || g_pool->size() != count) {
    delete std::exchange(g_pool, nullptr);
    g_pool = new Pool(count);
  }
  g_pool->run(job);
}

}  // namespace

uint32_t wait_change(const std::atomic<uint32_t>& value, uint32_t old) {
  for (int i = 0; i < kSpins; ++i) {
    const uint32_t now = value.load(std::memory_order_acquire);
    if (now != old) return now;
    cpu_relax();
  }
  value.wait(old, std::memory_order_acquire);
  return value.load(std::memory_order_acquire);
}

int available_cpus(const char* cgroup_root) {
  cpu_set_t set;
  int count = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
  if (FILE* file = std::fopen((std::string(cgroup_root) + "/cpu.max").c_str(), "r")) {
    double quota = 0, period = 0;
    if (std::fscanf(file, "%lf %lf", &quota, &period) == 2 && quota > 0 && period > 0)
      count = static_cast<int>(std::min<double>(count, std::ceil(quota / period)));
    std::fclose(file);
  }
  return std::clamp(count, 1, kMaxThreads);
}

int num_threads() {
  int count = g_num_threads.load(std::memory_order_relaxed);
  if (count == 0) {
    count = default_num_threads();
    g_num_threads.store(count, std::memory_order_relaxed);
  }
  return count;
}

void set_num_threads(int count) {
  if (count < 1 || count > kMaxThreads)
    throw ArgumentError("num_threads: expected 1 to " + std::to_string(kMaxThreads) + ", got " + std::to_string(count));
  g_num_threads.store(count, std::memory_order_relaxed);
}

void detail::parallel_for(int64_t n, int64_t grain, const void* body, RangeFn call) {
  if (n <= 0) return;
  const int num_workers = region_size();
  if (n <= grain || num_workers == 1) {
    for (int64_t begin = 0; begin < n; begin += grain) call(body, begin, std::min(begin + grain, n));
    return;
  }
  run(Job{body, call, nullptr, n, grain}, num_workers);
}

int region_size() { return t_inside ? 1 : num_threads(); }

void detail::parallel_region(int num_workers, const void* body, WorkerFn call) {
  if (num_workers == 1) return call(body, 0);
  run(Job{body, nullptr, call, 0, 1}, num_workers);
}

}  // namespace pe
