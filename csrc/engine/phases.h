// Phases: steps of one native call that workers take together. Items of a phase are claimed one by one, so a slow core
// does less, and a phase ends when its last item is done: a worker that holds none, because the system runs something
// else on its core, delays nobody. Which worker runs an item never changes a result.
#pragma once
#include <atomic>
#include <cstdint>

#include "runtime/parallel.h"

namespace pe {

class Phases {
 public:
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
      uint64_t claim = shared_.claim_.load(std::memory_order_acquire);
      while (claim >> 32 == phase) {
        const auto begin = static_cast<int64_t>(claim & 0xffffffffu);
        if (begin >= n) return shared_.wait_for_end(phase);
        const int64_t end = begin + grain < n ? begin + grain : n;
        if (!shared_.claim_.compare_exchange_weak(claim, uint64_t{phase} << 32 | static_cast<uint64_t>(end),
                                                  std::memory_order_acq_rel, std::memory_order_acquire))
          continue;
        body(begin, end);
        if (shared_.done_.fetch_add(end - begin, std::memory_order_acq_rel) + end - begin == n)
          return shared_.end(phase);
        claim = shared_.claim_.load(std::memory_order_acquire);
      }
    }

    int index() const { return index_; }

   private:
    Phases& shared_;
    const int index_;
    uint32_t phase_ = 0;
  };

 private:
  // Called by the worker that did the last item of `phase`.
  void end(uint32_t phase) {
    done_.store(0, std::memory_order_relaxed);
    claim_.store(uint64_t{phase + 1} << 32, std::memory_order_release);
    // A count, not the number of the phase: this worker may be stopped here until later phases have ended.
    num_ended_.fetch_add(1, std::memory_order_release);
    num_ended_.notify_all();
  }

  void wait_for_end(uint32_t phase) {
    for (;;) {
      const uint32_t num_ended = num_ended_.load(std::memory_order_acquire);
      if (claim_.load(std::memory_order_acquire) >> 32 != phase) return;
      wait_change(num_ended_, num_ended);
    }
  }

  alignas(64) std::atomic<uint64_t> claim_{0};  // [phase in work | its next item]
  alignas(64) std::atomic<int64_t> done_{0};    // items of that phase
  alignas(64) std::atomic<uint32_t> num_ended_{0};
};

}  // namespace pe
