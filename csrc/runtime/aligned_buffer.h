// Memory that starts at a cache line, uninitialised, for scratch and packed weights.
#pragma once
#include <cstddef>
#include <memory>
#include <new>
#include <type_traits>

namespace pe {

template <class T>
class AlignedBuffer {
  static_assert(std::is_trivially_destructible_v<T> && std::is_trivially_copyable_v<T>);

 public:
  AlignedBuffer() = default;
  // Throws std::bad_alloc.
  explicit AlignedBuffer(size_t size) : data_(static_cast<T*>(operator new[](size * sizeof(T), kAlignment))) {}

  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(T* p) const { operator delete[](p, kAlignment); }
  };
  std::unique_ptr<T[], Free> data_;
};

}  // namespace pe
