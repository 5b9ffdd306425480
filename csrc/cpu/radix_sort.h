// A stable sort by the upper half of 64-bit keys, in time linear in their number whatever their values.
#pragma once
#include <cstdint>

namespace pe {

// Largest upper 32 bits first; equal ones keep their order. `spare` holds n keys too and is overwritten.
void sort_descending_by_high_half(uint64_t* keys, uint64_t* spare, int64_t n);

}  // namespace pe
