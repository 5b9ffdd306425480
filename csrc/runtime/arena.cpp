#include "runtime/arena.h"

#include <sys/mman.h>

#include "runtime/error.h"

namespace pe {

Arena::Arena(size_t capacity, std::string what) : what_(std::move(what)), capacity_(rounded(capacity)) {
  if (capacity == 0) return;
  void* base = MAP_FAILED;
  if (capacity_ >= capacity)  // the rounding did not wrap
    base = mmap(nullptr, capacity_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED)
    throw CapacityError(what_ + ": the system refuses " + std::to_string(capacity) + " bytes of memory");
  // A hint: weights are read in one ascending stream, and 2 MiB pages save most of its TLB misses.
  madvise(base, capacity_, MADV_HUGEPAGE);
  base_ = static_cast<uint8_t*>(base);
}

Arena::~Arena() {
  if (base_) munmap(base_, capacity_);
}

uint8_t* Arena::allocate(size_t num_bytes) {
  const size_t bytes = rounded(num_bytes);
  if (bytes < num_bytes || bytes > capacity_ - used_)
    throw CapacityError(what_ + ": needs " + std::to_string(num_bytes) + " bytes, " +
                        std::to_string(capacity_ - used_) + " of " + std::to_string(capacity_) + " are left");
  uint8_t* p = base_ + used_;
  used_ += bytes;
  return p;
}

}  // namespace pe
