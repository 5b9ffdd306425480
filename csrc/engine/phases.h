// Phases: steps of one native call that all workers take together. Items of a phase are claimed one by one, so a slow
// core does less; a barrier ends the phase. Which worker runs an item never changes a result.
#pragma once
#include <atomic>
#include <cstdint>

#include "runtime/parallel.h"

namespace pe {

class Phases {
 public:
  explicit Phases(int num_workers) : barrier_(num_workers), num_workers_(num_workers) {}

  // One per worker, inside parallel_region. All workers call run() with the same sequence of phases.
  class Worker {
   public:
    Worker(Phases& shared, int index) : shared_(shared), index_(index) {}

    // Calls body(begin, end) on claimed ranges of at most `grain` items of [0, n).
    template <class Body>
    void run(int64_t n, int64_t grain, const Body& body) {
      if (n <= 0) return;
      std::atomic<int64_t>& next = shared_.next_[phase_ % 3].value;
      for (;;) {
        const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
        if (begin >= n) break;
        body(begin, begin + grain < n ? begin + grain : n);
      }
      if (shared_.num_workers_ > 1) shared_.barrier_.wait();
      // Everybody has left the phase before this one, and nobody enters the phase after the next one before worker 0
      // has passed another barrier: its counter is idle.
      if (index_ == 0) shared_.next_[(phase_ + 2) % 3].value.store(0, std::memory_order_relaxed);
      ++phase_;
    }

    int index() const { return index_; }

   private:
    Phases& shared_;
    const int index_;
    uint32_t phase_ = 0;
  };

 private:
  struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
  };
  SpinBarrier barrier_;
  const int num_workers_;
  Counter next_[3];
};

}  // namespace pe
