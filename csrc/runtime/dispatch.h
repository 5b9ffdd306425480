// Chooses the function table of an op for the ISA level in use.
#pragma once
#include <cstddef>

#include "runtime/cpu_features.h"

namespace pe {

template <class Table>
struct IsaEntry {
  Isa isa;
  const Table* table;
};

// `entries` is ordered best first and ends with scalar, so one always matches.
template <class Table, size_t N>
const Table& select(const IsaEntry<Table> (&entries)[N]) {
  const Isa active = active_isa();
  for (size_t i = 0; i + 1 < N; ++i)
    if (entries[i].isa <= active) return *entries[i].table;
  return *entries[N - 1].table;
}

}  // namespace pe

// The usual rows, for ops without a matrix product. On other architectures only `scalar` is compiled.
#if defined(__x86_64__)
#define PE_ISA_ENTRIES_VECTOR(name)                                                 \
  {::pe::Isa::avx512, &::pe::avx512::name}, {::pe::Isa::avx2, &::pe::avx2::name}, { \
    ::pe::Isa::scalar, &::pe::scalar::name                                          \
  }
#else
#define PE_ISA_ENTRIES_VECTOR(name) {::pe::Isa::scalar, &::pe::scalar::name}
#endif
