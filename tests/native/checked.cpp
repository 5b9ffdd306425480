// Checked integers against arithmetic in 128 bits.
#include "runtime/checked.h"

#include <cstdint>
#include <limits>
#include <random>
#include <stdexcept>
#include <vector>

#include "check.h"

using pe::Checked;

namespace {

using Wide = __int128;  // NOLINT: the oracle
constexpr Wide kMax = std::numeric_limits<uint64_t>::max();

// The value of `got`, or -1 where it overflowed.
Wide value(Checked got) {
  bool failed = false;
  const uint64_t out = [&] {
    try {
      return got.get_or([] { throw std::overflow_error("overflow"); });
    } catch (const std::overflow_error&) {
      failed = true;
      return uint64_t{0};
    }
  }();
  return failed ? -1 : static_cast<Wide>(out);
}

Wide bounded(Wide exact) { return exact < 0 || exact > kMax ? -1 : exact; }

void compare(uint64_t a, uint64_t b) {
  const Wide x = a, y = b;
  CHECK(value(Checked(a) + b) == bounded(x + y));
  CHECK(value(Checked(a) - b) == bounded(x - y));
  // The product of two 64-bit numbers may pass 127 bits; compare by division.
  const bool fits = a == 0 || b <= std::numeric_limits<uint64_t>::max() / a;
  CHECK(value(Checked(a) * b) == (fits ? x * y : Wide{-1}));
  CHECK(Checked(a).at_most(b) == (x <= y));
}

}  // namespace

int main() {
  std::vector<uint64_t> edges = {0, 1, 2, 3};
  for (int bit = 2; bit < 64; ++bit)
    for (const int64_t offset : {-1, 0, 1}) edges.push_back((uint64_t{1} << bit) + static_cast<uint64_t>(offset));
  for (const uint64_t offset : {0, 1, 2}) edges.push_back(std::numeric_limits<uint64_t>::max() - offset);
  for (const uint64_t a : edges)
    for (const uint64_t b : edges) compare(a, b);
  std::mt19937_64 random(0);
  for (int i = 0; i < 200'000; ++i) compare(random() >> (random() % 64), random() >> (random() % 64));

  // An overflow is never forgotten.
  const Checked lost = Checked(std::numeric_limits<uint64_t>::max()) + 1;
  CHECK(lost.overflowed());
  CHECK((lost - lost).overflowed());
  CHECK((lost * 0).overflowed());
  CHECK((Checked(0) * lost).overflowed());
  CHECK((Checked(0) + lost).overflowed());
  CHECK(lost.align_up(8).overflowed());
  CHECK(!lost.at_most(std::numeric_limits<uint64_t>::max()));

  // A negative number is an overflow from the start, of any width.
  CHECK(Checked(-1).overflowed());
  CHECK(Checked(std::numeric_limits<int64_t>::min()).overflowed());
  CHECK(Checked(int8_t{-128}).overflowed());
  CHECK(!Checked(int8_t{127}).overflowed());

  for (const uint64_t alignment : {uint64_t{1}, uint64_t{2}, uint64_t{64}, uint64_t{1} << 63}) {
    for (const uint64_t a : edges) {
      const Wide step = alignment, exact = (Wide{a} + step - 1) / step * step;
      CHECK(value(Checked(a).align_up(alignment)) == bounded(exact));
    }
  }
  for (const uint64_t alignment : {0, 3, 6, 12, 100}) CHECK(Checked(8).align_up(alignment).overflowed());

  // A type that is too narrow for the value is a failure too.
  CHECK(throws<int>([] { (void)Checked(256).get_or<uint8_t>([] { throw 1; }); }));
  CHECK(Checked(255).get_or<uint8_t>([] { throw 1; }) == 255);
  CHECK(throws<int>([] { (void)Checked(uint64_t{1} << 63).get_or<int64_t>([] { throw 1; }); }));
  return g_failures != 0;
}
