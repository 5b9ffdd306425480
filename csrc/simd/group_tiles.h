// Products with packed block weights on the tile unit: one short tile product per group of 32, then the float arithmetic
// of the group on its sums. The level amx only.
//
// An op describes itself by
//   kDot, kDepthBytes           kind of product; bytes of 32 elements of x
//   kGroupBytes                 packed_group_bytes
//   Raw, Scales                 a sum of a group (int32_t or float); the scales of a group of a panel
//   weights                     BlockWeights
//   x(row, g)                   32 elements of x; x_row_bytes() from one row to the next
//   codes(group, tile)          where the codes lie as a right operand: in the packed group, or written to `tile`
//   scales(group)
//   add(scales, sums, row, g, total) -> PanelF
//   store(row, panel, total)
#pragma once
#include <string.h>

#include "simd/panel.h"
#include "simd/tile.h"

namespace pe::PE_ISA {

// Totals of a row block and two panels take 12 KB of L1; six tiles of rows share each group that is unpacked.
constexpr int64_t kGroupRowBlock = 96;
// Bytes between the group in work and the one being fetched.
constexpr int64_t kGroupPrefetchBytes = 6 * 1024;

// Rows [row_begin, row_begin + num_rows) times `panels` panels. Row tile t starts at row 16 t.
template <int panels, class Op>
static inline void group_tile_panels(const Op& op, int64_t row_begin, int64_t num_rows, int64_t panel) {
  constexpr int64_t kTileBytes = kTileRows * kTileRowBytes;
  constexpr int64_t rows_kept = panels == 4 ? kTileRows : kGroupRowBlock;
  const int64_t num_groups = op.weights.num_cols / kBlockSize, panel_stride = num_groups * Op::kGroupBytes;
  const int64_t num_row_tiles = (num_rows + kTileRows - 1) / kTileRows, tail = num_rows % kTileRows;
  const bool copies_tail = tail && num_row_tiles > 1;  // else the tiles have num_rows rows
  const uint8_t* packed = op.weights.packed + panel * panel_stride;
  alignas(64) float total[rows_kept][panels][kPanelRows];
  alignas(64) uint8_t unpacked[panels][kTileBytes], x_tail[kTileRows * Op::kDepthBytes];
  alignas(64) typename Op::Raw sums[4][kTileRows][kPanelRows];
  for (int64_t r = 0; r < num_rows; ++r)
    for (int p = 0; p < panels; ++p) panel_store(total[r][p], panel_set1(0.0f));
  memset(x_tail, 0, sizeof x_tail);

  for (int64_t g = 0; g < num_groups; ++g, packed += Op::kGroupBytes) {
    const uint8_t* codes[panels];
    typename Op::Scales scales[panels];
    for (int p = 0; p < panels; ++p) {
      const uint8_t* group = packed + p * panel_stride;
      prefetch<Op::kGroupBytes>(group + kGroupPrefetchBytes / panels);
      codes[p] = op.codes(group, unpacked[p]);
      scales[p] = op.scales(group);
    }
    if (copies_tail)
      for (int64_t r = 0; r < tail; ++r)
        memcpy(x_tail + r * Op::kDepthBytes, op.x(row_begin + num_rows - tail + r, g), Op::kDepthBytes);
    const auto x_tile = [&](int64_t t) -> TileRows {
      if (copies_tail && t == num_row_tiles - 1) return {x_tail, Op::kDepthBytes};
      return {op.x(row_begin + t * kTileRows, g), op.x_row_bytes()};
    };
    const auto multiply = [&](auto row_tiles, int64_t t) PE_INLINE {
      constexpr int rows = decltype(row_tiles){};
      zero_accumulators<rows, panels>();
      multiply_tiles<Op::kDot, rows, panels>([&](int r) { return x_tile(t + r); },
                                             [&](int p) { return TileRows{codes[p], kTileRowBytes}; });
      unroll<rows * panels>([&](auto i) PE_INLINE { tile_store<i>(sums[i], kTileRowBytes); });
      const int64_t first = t * kTileRows,
                    end = first + rows * kTileRows < num_rows ? first + rows * kTileRows : num_rows;
      for (int64_t r = first; r < end; ++r)
        for (int p = 0; p < panels; ++p) {
          const int tile = accumulator<panels>(static_cast<int>((r - first) / kTileRows), p);
          float* to = total[r][p];
          panel_store(to, op.add(scales[p], sums[tile][(r - first) % kTileRows], row_begin + r, g, panel_load(to)));
        }
    };
    int64_t t = 0;
    if constexpr (panels <= 2)
      for (; t + 2 <= num_row_tiles; t += 2) multiply(Index<2>{}, t);
    if (t < num_row_tiles) multiply(Index<1>{}, t);
  }
  for (int64_t r = 0; r < num_rows; ++r)
    for (int p = 0; p < panels; ++p) op.store(row_begin + r, panel + p, panel_load(total[r][p]));
}

template <class Op>
static inline void group_tiles(const Op& op, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                               int64_t panel_end) {
  for (int64_t row = row_begin; row < row_end; row += kGroupRowBlock) {
    const int64_t num_rows = row_end - row < kGroupRowBlock ? row_end - row : kGroupRowBlock;
    const Tiles tiles(num_rows < kTileRows ? num_rows : kTileRows, Op::kDepthBytes);
    int64_t panel = panel_begin;
    if (num_rows <= kTileRows)
      for (; panel + 4 <= panel_end; panel += 4) group_tile_panels<4>(op, row, num_rows, panel);
    for (; panel + 2 <= panel_end; panel += 2) group_tile_panels<2>(op, row, num_rows, panel);
    if (panel < panel_end) group_tile_panels<1>(op, row, num_rows, panel);
  }
}

}  // namespace pe::PE_ISA
