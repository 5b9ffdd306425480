// One row, vector by vector.
#pragma once

#include "simd/vec.h"

namespace pe::PE_ISA {

// Calls body(load, store) for every vector of [0, n); both take the start of a row. The last call sees partial loads
// and stores where n is no multiple of VecF::size.
template <class Body>
static inline void for_each_vec(int64_t n, const Body& body) {
  const int64_t tail = n % VecF::size, full = n - tail;
  for (int64_t i = 0; i < full; i += VecF::size)
    body([i](const auto* p) { return load(p + i); }, [i](auto* p, VecF v) { store(p + i, v); });
  if (tail)
    body([full, tail](const auto* p) { return load(p + full, tail); },
         [full, tail](auto* p, VecF v) { store(p + full, v, tail); });
}

}  // namespace pe::PE_ISA
