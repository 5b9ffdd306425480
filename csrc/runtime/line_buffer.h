// Uninitialised memory that begins on a cache line.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

namespace pe {

class LineBuffer {
 public:
  explicit LineBuffer(int64_t num_bytes)
      : lines_(std::make_unique_for_overwrite<Line[]>((static_cast<size_t>(num_bytes) + 63) / 64)) {}
  void* data() const { return lines_.get(); }

 private:
  struct alignas(64) Line {
    std::byte bytes[64];
  };
  std::unique_ptr<Line[]> lines_;
};

}  // namespace pe
