// Products with packed block weights on the tile unit: one short tile product per scale group, then the float arithmetic
// of the group on its sums. The level amx only.
//
// An op describes itself by
//   kFormat, kDot               of the weights; kind of product
//   kElementBytes               of an element of x
//   Raw, Scales                 a sum of a scale group (int32_t or float); the scales of one, of a panel
//   weights                     BlockWeights
//   x(row)                      a row of x; x_row_bytes() from one to the next
//   codes(group, tile)          where the codes lie as a right operand: in the packed group, or written to `tile`
//   scales(panel, g, part)
//   add(scales, sums, row, g, part, total) -> PanelF
//   store(row, panel, total)
#pragma once
#include <string.h>

#include "simd/panel_codes.h"
#include "simd/tile.h"

namespace pe::PE_ISA {

// Totals of a row block and two panels take 12 KB of L1; six tiles of rows share each group that is unpacked.
constexpr int64_t kGroupRowBlock = 96;
// Bytes between the group in work and the one being fetched.
constexpr int64_t kGroupPrefetchBytes = 6 * 1024;

// Rows [row_begin, row_begin + num_rows) times `panels` panels. Row tile t starts at row 16 t.
template <int panels, class Op>
static inline void group_tile_panels(const Op& op, int64_t row_begin, int64_t num_rows, int64_t panel) {
  constexpr BlockFormat format = Op::kFormat;
  constexpr int parts = scale_groups(format);
  constexpr int64_t kTileBytes = kTileRows * kTileRowBytes, kDepth = kGroupSize / parts;
  constexpr int64_t kDepthBytes = kDepth * Op::kElementBytes;
  constexpr int64_t rows_kept = panels == 4 ? kTileRows : kGroupRowBlock;
  const int64_t panel_stride = panel_bytes(format, op.weights.num_cols);
  const int64_t num_row_tiles = (num_rows + kTileRows - 1) / kTileRows, tail = num_rows % kTileRows;
  const bool copies_tail = tail && num_row_tiles > 1;  // else the tiles have num_rows rows
  const uint8_t* packed = op.weights.packed + panel * panel_stride;
  alignas(64) float total[rows_kept][panels][kPanelRows];
  alignas(64) uint8_t unpacked[panels][kTileBytes], x_tail[kTileRows * kDepthBytes];
  alignas(64) typename Op::Raw sums[4][kTileRows][kPanelRows];
  for (int64_t r = 0; r < num_rows; ++r)
    for (int p = 0; p < panels; ++p) panel_store(total[r][p], panel_set1(0.0f));
  memset(x_tail, 0, sizeof x_tail);

  const uint8_t* codes[panels];
  for (int64_t i = 0; i < op.weights.num_cols / kDepth; ++i) {
    const int64_t g = i / parts;
    const int part = static_cast<int>(i % parts);
    typename Op::Scales scales[panels];
    for (int p = 0; p < panels; ++p) {
      const uint8_t* from = packed + p * panel_stride;
      if (part == 0) {
        prefetch_group<format>(from, g, kGroupPrefetchBytes / panels);
        codes[p] = op.codes(from + group_offset(format, g), unpacked[p]);
      }
      scales[p] = op.scales(from, g, part);
    }
    // A row of a tile holds the codes of four bytes of x.
    const int64_t first_code = part * (kDepthBytes / 4) * kTileRowBytes;
    const auto x_at = [&](int64_t row) { return op.x(row) + i * kDepth; };
    if (copies_tail)
      for (int64_t r = 0; r < tail; ++r)
        memcpy(x_tail + r * kDepthBytes, x_at(row_begin + num_rows - tail + r), kDepthBytes);
    const auto x_tile = [&](int64_t t) -> TileRows {
      if (copies_tail && t == num_row_tiles - 1) return {x_tail, kDepthBytes};
      return {x_at(row_begin + t * kTileRows), op.x_row_bytes()};
    };
    const auto multiply = [&](auto row_tiles, int64_t t) PE_INLINE {
      constexpr int rows = decltype(row_tiles){};
      zero_accumulators<rows, panels>();
      multiply_tiles<Op::kDot, rows, panels>([&](int r) { return x_tile(t + r); },
                                             [&](int p) { return TileRows{codes[p] + first_code, kTileRowBytes}; });
      unroll<rows * panels>([&](auto i) PE_INLINE { tile_store<i>(sums[i], kTileRowBytes); });
      const int64_t first = t * kTileRows,
                    end = first + rows * kTileRows < num_rows ? first + rows * kTileRows : num_rows;
      for (int64_t r = first; r < end; ++r)
        for (int p = 0; p < panels; ++p) {
          const int tile = accumulator<panels>(static_cast<int>((r - first) / kTileRows), p);
          float* to = total[r][p];
          panel_store(to,
                      op.add(scales[p], sums[tile][(r - first) % kTileRows], row_begin + r, g, part, panel_load(to)));
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
    const Tiles tiles(num_rows < kTileRows ? num_rows : kTileRows, info(Op::kFormat).scale_group * Op::kElementBytes);
    int64_t panel = panel_begin;
    if (num_rows <= kTileRows)
      for (; panel + 4 <= panel_end; panel += 4) group_tile_panels<4>(op, row, num_rows, panel);
    for (; panel + 2 <= panel_end; panel += 2) group_tile_panels<2>(op, row, num_rows, panel);
    if (panel < panel_end) group_tile_panels<1>(op, row, num_rows, panel);
  }
}

}  // namespace pe::PE_ISA
