// One block of memory for weights or cache pages: mapped once, handed out in order, huge pages where the kernel grants them.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace pe {

class Arena {
 public:
  static constexpr size_t kAlignment = 64;  // a cache line, and the widest vector

  // Maps `capacity` bytes of zeros; `what` names the use in errors. Throws CapacityError when the system refuses.
  Arena(size_t capacity, std::string what);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // The next `num_bytes`, aligned to kAlignment. Throws CapacityError past the capacity.
  uint8_t* allocate(size_t num_bytes);

  size_t used() const { return used_; }
  size_t capacity() const { return capacity_; }
  static size_t rounded(size_t num_bytes) { return (num_bytes + kAlignment - 1) / kAlignment * kAlignment; }

 private:
  std::string what_;
  uint8_t* base_ = nullptr;
  size_t capacity_ = 0, used_ = 0;
};

}  // namespace pe
