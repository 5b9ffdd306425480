// The AMX tile unit: eight tiles of at most 16 rows of 64 bytes.
//
//   Tiles scope(rows, depth_bytes)      configures the tiles, all zero; its end releases them. Other code of the thread
//                                       finds the unit as it left it, so a scope lies within one call
//   tile_zero<t>()
//   tile_load<t>(p, stride)             reads the bytes of the tile's shape and no others; strides in bytes
//   tile_store<t>(p, stride)
//   tile_dot<kind, c, a, b>()           c += a * b, with b in groups of four bytes: row i of b holds, for each column,
//                                       the four bytes that meet bytes 4i ... 4i + 3 of a row of a
//   multiply_tiles, for_each_tile_block a block of up to four accumulators
//
// Assembly, because the intrinsics of GCC 12 do not say that a load reads memory: it could move the stores that fill a
// buffer past the load of the tile.
#pragma once
#include <stdint.h>

#include "simd/unroll.h"

namespace pe::PE_ISA {

constexpr int64_t kTileRows = 16, kTileRowBytes = 64;

// Accumulators are tiles 0 ... 3, [rows, 16] of f32 or int32. Tiles 4 and 5 hold rows of the left operand, depth_bytes
// each; tiles 6 and 7 hold the right one, [depth_bytes / 4, 16] groups.
class Tiles {
 public:
  Tiles(int64_t rows, int64_t depth_bytes) {
    Config config = {};
    config.palette = 1;
    for (int t = 0; t < 8; ++t) {
      config.rows[t] = static_cast<uint8_t>(t < 6 ? rows : depth_bytes / 4);
      config.row_bytes[t] = static_cast<uint16_t>(t == 4 || t == 5 ? depth_bytes : kTileRowBytes);
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Tiles() { __asm__ volatile("tilerelease" ::: "memory"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  struct alignas(64) Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  static_assert(sizeof(Config) == 64);
};

template <int tile>
static inline void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(tile));
}
template <int tile>
static inline void tile_load(const void* p, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
static inline void tile_store(void* p, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(tile) : "memory");
}

// s8u8: int32, a signed and b unsigned; wraps. bf16: f32; for each pair of bf16 in a group a chain of fused
// multiply-adds from 0, ascending, then c += chain of the first + chain of the second of each pair. Rounds to nearest
// even, subnormal operands and results count as zero; MXCSR has no say.
enum class TileDot { s8u8, bf16 };

template <TileDot kind, int c, int a, int b>
static inline void tile_dot() {
  if constexpr (kind == TileDot::s8u8)
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
  else
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

// --- a block of accumulators: rows x panels, one tile each; panels are the 16 columns of a right operand -------------

struct TileRows {
  const void* first;
  int64_t stride;
};

// The tile of accumulator (r, p).
template <int panels>
constexpr int accumulator(int r, int p) {
  return r * panels + p;
}

template <int rows, int panels>
static inline void zero_accumulators() {
  unroll<rows * panels>([](auto i) PE_INLINE { tile_zero<i>(); });
}

// Accumulator (r, p) += left(r) * right(p), both TileRows.
template <TileDot kind, int rows, int panels, class Left, class Right>
[[gnu::always_inline]] static inline void multiply_tiles(const Left& left, const Right& right) {
  static_assert(rows <= 2 && rows * panels <= 4);
  unroll<rows>([&](auto r) PE_INLINE {
    const TileRows from = left(r);
    tile_load<4 + r>(from.first, from.stride);
  });
  unroll<panels>([&](auto p) PE_INLINE {
    const TileRows from = right(p);
    tile_load<6 + p % 2>(from.first, from.stride);
    unroll<rows>([&](auto r) PE_INLINE { tile_dot<kind, accumulator<panels>(r, p), 4 + r, 6 + p % 2>(); });
  });
}

// Calls body(Index<rows>, Index<panels>, row_tile, panel) until all are covered: 2 x 2 tiles where there are two rows of
// tiles, else 1 x 4, and less at the edges.
template <class Body>
static inline void for_each_tile_block(int64_t num_row_tiles, int64_t panel_begin, int64_t panel_end,
                                       const Body& body) {
  int64_t panel = panel_begin;
  if (num_row_tiles == 1)
    for (; panel + 4 <= panel_end; panel += 4) body(Index<1>{}, Index<4>{}, 0, panel);
  const auto down = [&](auto panels) {
    int64_t row_tile = 0;
    for (; row_tile + 2 <= num_row_tiles; row_tile += 2) body(Index<2>{}, panels, row_tile, panel);
    if (row_tile < num_row_tiles) body(Index<1>{}, panels, row_tile, panel);
  };
  for (; panel + 2 <= panel_end; panel += 2) down(Index<2>{});
  if (panel < panel_end) down(Index<1>{});
}

}  // namespace pe::PE_ISA
