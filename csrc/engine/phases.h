// Phases: steps of one native call that workers take together. Each worker begins at a range of items of its own, so that
// what it reads is one stream of memory, and then helps with the ranges of others: a slow core does less. A phase ends
// when its last item is done: a worker that holds none, because the system runs something else on its core, delays
// nobody. Which worker runs an item never changes a result.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

#include "runtime/parallel.h"

namespace pe {

class Phases {
 public:
  explicit Phases(int num_workers) : num_workers_(num_workers), claims_(new Claim[static_cast<size_t>(num_workers)]) {}

  // One per worker, inside parallel_region. All workers call run() with the same sequence of phases, fewer than 2^32.
  class Worker {
   public:
    Worker(Phases& shared, int index) : shared_(shared), index_(index) {}

    // Calls body(begin, end) on claimed ranges of at most `grain` items of [0, n), n < 2^31, and returns when all are
    // done. The body may not throw.
    template <class Body>
    void run(int64_t n, int64_t grain, const Body& body) {
      if (n <= 0) return;
      const uint32_t phase = phase_++;
      const int64_t num_ranges = std::min<int64_t>(shared_.num_workers_, (n + grain - 1) / grain);
      for (int64_t i = 0; i < num_ranges; ++i) {
        const int64_t range = (index_ + i) % num_ranges, first = range * n / num_ranges;
        const int64_t size = (range + 1) * n / num_ranges - first;
        std::atomic<uint64_t>& next = shared_.claims_[static_cast<size_t>(range)].next;
        uint64_t claim = next.load(std::memory_order_acquire);
        while (claim >> 32 == phase) {
          const auto begin = static_cast<int64_t>(claim & 0xffffffffu);
          if (begin >= size) break;
          const int64_t end = std::min(begin + grain, size);
          if (!next.compare_exchange_weak(claim, uint64_t{phase} << 32 | static_cast<uint64_t>(end),
                                          std::memory_order_acq_rel, std::memory_order_acquire))
            continue;
          body(first + begin, first + end);
          if (shared_.done_.fetch_add(end - begin, std::memory_order_acq_rel) + end - begin == n)
            return shared_.end(phase);
          claim = next.load(std::memory_order_acquire);
        }
      }
      shared_.wait_for_end(phase);
    }

    int index() const { return index_; }

   private:
    Phases& shared_;
    const int index_;
    uint32_t phase_ = 0;
  };

 private:
  struct Claim {
    alignas(64) std::atomic<uint64_t> next{0};  // [phase in work | next item of the range]
  };

  // Called by the worker that did the last item of `phase`. Nobody is past that phase before num_ended_ changes.
  void end(uint32_t phase) {
    done_.store(0, std::memory_order_relaxed);
    for (int i = 0; i < num_workers_; ++i)
      claims_[static_cast<size_t>(i)].next.store(uint64_t{phase + 1} << 32, std::memory_order_relaxed);
    num_ended_.fetch_add(1, std::memory_order_release);
    num_ended_.notify_all();
  }

  void wait_for_end(uint32_t phase) {
    while (num_ended_.load(std::memory_order_acquire) == phase) wait_change(num_ended_, phase);
  }

  const int num_workers_;
  const std::unique_ptr<Claim[]> claims_;     // one per range
  alignas(64) std::atomic<int64_t> done_{0};  // items of the phase in work
  alignas(64) std::atomic<uint32_t> num_ended_{0};
};

}  // namespace pe
