// The integer type of all file arithmetic. A result that leaves 64 bits is remembered through later steps, so that
// sums, products and paddings cannot wrap between two checks, and the value can only be had by naming the failure.
#pragma once

#include <concepts>
#include <cstdint>
#include <utility>

namespace pe {

class Checked {
 public:
  // A negative number is an overflow from the start.
  template <std::integral T>
  constexpr Checked(T value) noexcept  // NOLINT: implicit, so that mixed expressions stay checked
      : value_(std::in_range<uint64_t>(value) ? static_cast<uint64_t>(value) : 0),
        overflow_(!std::in_range<uint64_t>(value)) {}

  friend constexpr Checked operator+(Checked a, Checked b) noexcept {
    uint64_t sum = 0;
    const bool wrapped = __builtin_add_overflow(a.value_, b.value_, &sum);
    return Checked(sum, wrapped || a.overflow_ || b.overflow_);
  }

  friend constexpr Checked operator-(Checked a, Checked b) noexcept {
    uint64_t difference = 0;
    const bool wrapped = __builtin_sub_overflow(a.value_, b.value_, &difference);
    return Checked(difference, wrapped || a.overflow_ || b.overflow_);
  }

  friend constexpr Checked operator*(Checked a, Checked b) noexcept {
    uint64_t product = 0;
    const bool wrapped = __builtin_mul_overflow(a.value_, b.value_, &product);
    return Checked(product, wrapped || a.overflow_ || b.overflow_);
  }

  // The next multiple of `alignment`, which is a power of two; any other alignment is an overflow.
  constexpr Checked align_up(uint64_t alignment) const noexcept {
    if (alignment == 0 || (alignment & (alignment - 1)) != 0) return Checked(0, true);
    const Checked raised = *this + (alignment - 1);
    return Checked(raised.value_ & ~(alignment - 1), raised.overflow_);
  }

  constexpr bool overflowed() const noexcept { return overflow_; }

  // Whether the value is known and at most `limit`.
  constexpr bool at_most(uint64_t limit) const noexcept { return !overflow_ && value_ <= limit; }

  // The value as a T, or what `fail()` does, which must throw, where it overflowed or does not fit.
  template <std::integral T = uint64_t, class Fail>
  constexpr T get_or(Fail&& fail) const {
    if (overflow_ || !std::in_range<T>(value_)) std::forward<Fail>(fail)();
    return static_cast<T>(value_);
  }

 private:
  constexpr Checked(uint64_t value, bool overflow) noexcept : value_(overflow ? 0 : value), overflow_(overflow) {}

  uint64_t value_;
  bool overflow_;
};

}  // namespace pe
