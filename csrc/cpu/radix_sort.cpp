#include "cpu/radix_sort.h"

#include <utility>

namespace pe {
namespace {

constexpr int64_t kInsertionLimit = 48;  // below it, counting 256 digits costs more than moving keys

void insertion_sort(uint64_t* keys, int64_t n) {
  for (int64_t i = 1; i < n; ++i) {
    const uint64_t key = keys[i];
    int64_t j = i;
    for (; j > 0 && keys[j - 1] >> 32 < key >> 32; --j) keys[j] = keys[j - 1];
    keys[j] = key;
  }
}

}  // namespace

void sort_descending_by_high_half(uint64_t* keys, uint64_t* spare, int64_t n) {
  if (n <= kInsertionLimit) return insertion_sort(keys, n);
  for (int shift = 32; shift < 64; shift += 8) {  // an even number of passes: the result ends in `keys`
    int64_t count[256] = {};
    for (int64_t i = 0; i < n; ++i) ++count[keys[i] >> shift & 255];
    int64_t next = 0;
    for (int digit = 255; digit >= 0; --digit) next += std::exchange(count[digit], next);
    for (int64_t i = 0; i < n; ++i) spare[count[keys[i] >> shift & 255]++] = keys[i];
    std::swap(keys, spare);
  }
}

}  // namespace pe
