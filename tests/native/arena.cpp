// The arena: alignment, exhaustion, zeros, and sizes that would wrap.
#include "runtime/arena.h"

#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "runtime/error.h"

using pe::Arena;
using pe::CapacityError;

int main() {
  {
    Arena arena(1 << 20, "test");
    std::vector<std::pair<uint8_t*, size_t>> blocks;
    for (size_t size = 0; arena.used() + Arena::rounded(size) <= arena.capacity(); size = size * 2 + 1) {
      uint8_t* p = arena.allocate(size);
      CHECK(reinterpret_cast<uintptr_t>(p) % Arena::kAlignment == 0);
      for (size_t i = 0; i < size; ++i) CHECK(p[i] == 0);
      std::memset(p, static_cast<int>(blocks.size()) + 1, size);
      blocks.emplace_back(p, size);
    }
    for (size_t b = 0; b < blocks.size(); ++b)
      for (size_t i = 0; i < blocks[b].second; ++i) CHECK(blocks[b].first[i] == b + 1);
  }
  {
    Arena arena(128, "two lines");
    arena.allocate(65);
    CHECK(arena.used() == 128);
    CHECK(throws<CapacityError>([&] { arena.allocate(1); }));
    CHECK(arena.used() == 128);
    arena.allocate(0);
    try {
      arena.allocate(100);
    } catch (const CapacityError& error) {
      CHECK(std::string(error.what()) == "two lines: needs 100 bytes, 0 of 128 are left");
    }
  }
  {
    constexpr size_t kHuge = std::numeric_limits<size_t>::max();
    Arena arena(4096, "test");
    for (size_t less = 0; less < 130; ++less) CHECK(throws<CapacityError>([&] { arena.allocate(kHuge - less); }));
    CHECK(arena.used() == 0);
    CHECK(throws<CapacityError>([] { Arena impossible(size_t{1} << 62, "test"); }));
    for (size_t less = 0; less < 63; ++less) CHECK(throws<CapacityError>([&] { Arena wrapped(kHuge - less, "test"); }));
  }
  Arena empty(0, "nothing");
  CHECK(empty.capacity() == 0);
  CHECK(throws<CapacityError>([&] { empty.allocate(1); }));
  // Memory that is never touched costs nothing, and is given back.
  for (int i = 0; i < 1000; ++i) {
    Arena arena(size_t{1} << 32, "test");
    arena.allocate(size_t{1} << 31)[0] = 1;
  }
  return g_failures != 0;
}
