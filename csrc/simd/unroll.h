// Loops of a fixed length written out before the compiler decides what is a register: arrays that are only indexed by
// the constants of such a loop become registers, which #pragma unroll comes too late for.
#pragma once

namespace pe::PE_ISA {

template <int kValue>
struct Index {
  constexpr operator int() const { return kValue; }
};

// Calls body(Index<0>{}) ... body(Index<kCount - 1>{}).
template <int kCount, class Body>
[[gnu::always_inline]] static inline void unroll(const Body& body) {
  if constexpr (kCount > 0) {
    unroll<kCount - 1>(body);
    body(Index<kCount - 1>{});
  }
}

}  // namespace pe::PE_ISA

// What a lambda passed to unroll() must carry: [&](auto i) PE_INLINE { ... }
#define PE_INLINE __attribute__((always_inline))
