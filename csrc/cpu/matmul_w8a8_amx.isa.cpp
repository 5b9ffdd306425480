// ISA: amx
#include <string.h>

#include "pe/matmul_w8a8.h"
#include "simd/tile.h"
#include "simd/w8a8_columns.h"

namespace pe::PE_ISA {
namespace {

constexpr int64_t kDepth = 64;        // of k in a tile
constexpr int64_t kTileBytes = 1024;  // 16 lines of a panel
constexpr int64_t kPrefetchBytes = 4096;

// Copies `num_rows` rows of `bytes` bytes into a tile; the rest of it is zero.
void copy_tile(const void* from, int64_t stride, int64_t num_rows, int64_t bytes, uint8_t* tile) {
  memset(tile, 0, kTileBytes);
  for (int64_t r = 0; r < num_rows; ++r)
    memcpy(tile + r * kTileRowBytes, static_cast<const uint8_t*>(from) + r * stride, static_cast<size_t>(bytes));
}

// Tiles of tile_rows rows, from `row`, times panels; all of K.
template <int kRows, int kPanels>
void block(const MatmulW8A8& a, int64_t row, int64_t tile_rows, int64_t panel) {
  const int64_t panel_bytes = matmul_w8a8_num_steps(a.k) * kTileRowBytes, tail = a.k % kDepth, full = a.k - tail;
  const uint8_t* packed = a.packed + panel * panel_bytes;
  const int64_t x_row_stride = a.x_row_stride;
  const int8_t* x = a.x + row * x_row_stride;
  // By value, so that nothing is read again after an instruction that touches memory.
  const auto rows_of = [=](int r) { return x + r * tile_rows * x_row_stride; };
  const auto panel_of = [=](int p) { return packed + p * panel_bytes; };
  zero_accumulators<kRows, kPanels>();
  for (int64_t k = 0; k < full; k += kDepth) {
    const int64_t lines = k * kMatmulW8A8PanelRows;
    for (int p = 0; p < kPanels; ++p)
      for (int64_t i = 0; i < kTileBytes; i += 64) __builtin_prefetch(panel_of(p) + lines + kPrefetchBytes + i);
    multiply_tiles<TileDot::s8u8, kRows, kPanels>([=](int r) { return TileRows{rows_of(r) + k, x_row_stride}; },
                                                  [=](int p) { return TileRows{panel_of(p) + lines, kTileRowBytes}; });
  }
  if (tail) {
    alignas(64) uint8_t left[kRows][kTileBytes], right[kPanels][kTileBytes];
    for (int r = 0; r < kRows; ++r) copy_tile(rows_of(r) + full, x_row_stride, tile_rows, tail, left[r]);
    for (int p = 0; p < kPanels; ++p)
      copy_tile(panel_of(p) + full * kMatmulW8A8PanelRows, kTileRowBytes, matmul_w8a8_num_steps(tail), kTileRowBytes,
                right[p]);
    multiply_tiles<TileDot::s8u8, kRows, kPanels>([&](int r) { return TileRows{left[r], kTileRowBytes}; },
                                                  [&](int p) { return TileRows{right[p], kTileRowBytes}; });
  }
  alignas(64) int32_t raw[kRows * kPanels][kTileRows][kMatmulW8A8PanelRows];
  unroll<kRows * kPanels>([&](auto i) PE_INLINE { tile_store<i>(raw[i], kTileRowBytes); });
  for (int r = 0; r < kRows; ++r)
    for (int64_t i = 0; i < tile_rows; ++i)
      for (int p = 0; p < kPanels; ++p)
        store_columns(a, row + r * tile_rows + i, panel + p, raw[accumulator<kPanels>(r, p)][i]);
}

void row_tiles(const MatmulW8A8& a, int64_t row, int64_t num_tiles, int64_t tile_rows, int64_t panel_begin,
               int64_t panel_end) {
  const Tiles tiles(tile_rows, kDepth);
  for_each_tile_block(num_tiles, panel_begin, panel_end, [&](auto rows, auto panels, int64_t row_tile, int64_t panel) {
    block<rows, panels>(a, row + row_tile * tile_rows, tile_rows, panel);
  });
}

// The rows of the last tile, where it is not full, are tiles of another shape: nothing is copied.
void tile(const MatmulW8A8& a, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
  const int64_t rest = (row_end - row_begin) % kTileRows, full = row_end - rest;
  if (full > row_begin) row_tiles(a, row_begin, (full - row_begin) / kTileRows, kTileRows, panel_begin, panel_end);
  if (rest) row_tiles(a, full, 1, rest, panel_begin, panel_end);
}

void x_sum(const int8_t* x, int64_t x_row_stride, int64_t k, int64_t row_begin, int64_t row_end, int32_t* out) {
  avx512_vnni::matmul_w8a8.x_sum(x, x_row_stride, k, row_begin, row_end, out);
}

}  // namespace

constinit const MatmulW8A8Isa matmul_w8a8 = {x_sum, tile};

}  // namespace pe::PE_ISA
