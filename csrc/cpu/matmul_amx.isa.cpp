// ISA: amx
#include <string.h>

#include "pe/matmul.h"
#include "simd/bf16_pairs.h"
#include "simd/matmul_totals.h"
#include "simd/tile.h"
#include "simd/transpose.h"

namespace pe::PE_ISA {
namespace {

constexpr int64_t kDepth = 32;  // of k in a tile
constexpr int64_t kSteps = kMatmulKBlock / kDepth;
constexpr int64_t kRowTiles = 6;     // of a row block
constexpr int64_t kTogether = 4;     // panels that are interleaved before the rows pass over them
constexpr int64_t kChunkPanels = 8;  // panels whose totals are kept

using TileBf16 = bf16[kTileRows][kDepth];

struct alignas(64) Buffers {
  TileBf16 x[kRowTiles][kSteps];
  TileBf16 w[kTogether][kSteps];
  float total[kRowTiles][kChunkPanels][kTileRows][kMatmulPanel];
};

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t steps_of(int64_t depth) { return (depth + kDepth - 1) / kDepth; }

// Rows in tiles of tile_rows.
struct Block : MatmulBlock {
  int64_t tile_rows;
  int64_t num_tiles() const { return (num_rows + tile_rows - 1) / tile_rows; }
  int64_t rows_of(int64_t tile) const { return min(tile_rows, num_rows - tile * tile_rows); }
};

// --- w --------------------------------------------------------------------------------------------------------------

// `depth` rows of a panel as right operands, zeros behind them; fetches what comes `ahead` of them.
void interleave_panel(const bf16* panel, int64_t depth, int64_t ahead, TileBf16* tiles) {
  bf16* to = tiles[0][0];
  for (int64_t k = 0; k < steps_of(depth) * kDepth; k += 2, to += kDepth) {
    const bf16* from = panel + k * kMatmulPanel;
    const __m512i rows = k + 2 <= depth ? load_32(from) : k < depth ? load_16(from) : _mm512_setzero_si512();
    __builtin_prefetch(from + ahead);
    _mm512_store_si512(to, interleave_halves(rows));
  }
}

// --- x --------------------------------------------------------------------------------------------------------------

// Where the rows of a tile lie: `step` elements from one tile of k to the next.
struct Rows {
  const bf16* first;
  int64_t step, row_stride;
};

const bf16* x_at(const Matmul& a, int64_t row, int64_t k) {
  return static_cast<const bf16*>(a.x) + row * a.x_row_stride + k * a.x_col_stride;
}

// 32 columns of x, which lie apart, as the rows of a tile: pairs of columns become words, which are transposed.
void transpose_columns(const Matmul& a, const bf16* x, int64_t num_rows, int64_t num_cols, TileBf16& tile) {
  const __mmask16 rows = lanes(num_rows);
  const auto column = [&](int64_t k) {
    return k < num_cols ? _mm256_maskz_loadu_epi16(rows, x + k * a.x_col_stride) : _mm256_setzero_si256();
  };
  VecF pairs[16];
  for (int64_t i = 0; i < 16; ++i)
    pairs[i].v = _mm512_castsi512_ps(
        interleave_halves(_mm512_inserti64x4(_mm512_castsi256_si512(column(2 * i)), column(2 * i + 1), 1)));
  transpose_square(pairs);
  for (int64_t i = 0; i < 16; ++i) _mm512_store_ps(tile[i], pairs[i].v);
}

// A tile of rows of one K block; zeros to the end of the tile.
void copy_x(const Matmul& a, int64_t row, int64_t num_rows, int64_t k, int64_t depth, TileBf16* tiles) {
  for (int64_t s = 0; s < steps_of(depth); ++s) {
    const bf16* x = x_at(a, row, k + s * kDepth);
    const int64_t num_cols = min(kDepth, depth - s * kDepth);
    if (a.x_col_stride != 1 && a.x_row_stride == 1) {
      transpose_columns(a, x, num_rows, num_cols, tiles[s]);
      continue;
    }
    memset(tiles[s], 0, sizeof tiles[s]);
    for (int64_t r = 0; r < num_rows; ++r, x += a.x_row_stride)
      if (a.x_col_stride == 1)
        memcpy(tiles[s][r], x, static_cast<size_t>(num_cols) * sizeof(bf16));
      else
        for (int64_t c = 0; c < num_cols; ++c) tiles[s][r][c] = x[c * a.x_col_stride];
  }
}

// --- y --------------------------------------------------------------------------------------------------------------

// Where the 16 totals of row r and panel p of a block lie.
auto totals(const Block& block, Buffers& buffers) {
  return [&](int64_t r, int64_t p) { return buffers.total[r / block.tile_rows][p][r % block.tile_rows]; };
}

void load_total(const Matmul& a, const Block& block, Buffers& buffers) {
  for (int64_t t = 0; t < block.num_tiles(); ++t)
    memset(buffers.total[t], 0, sizeof buffers.total[t][0] * static_cast<size_t>(block.num_panels));
  load_y(a, block, totals(block, buffers));
}

// --- the loops ------------------------------------------------------------------------------------------------------

// All of K for one block: total += products of 32 k's, ascending from k = 0.
void multiply(const Matmul& a, const Block& block, Buffers& buffers) {
  const int64_t panel_stride = a.depth * kMatmulPanel, num_tiles = block.num_tiles();
  for (int64_t k = 0; k < a.depth; k += kMatmulKBlock) {
    const int64_t depth = min(kMatmulKBlock, a.depth - k), num_steps = steps_of(depth);
    Rows rows[kRowTiles];
    for (int64_t t = 0; t < num_tiles; ++t) {
      const int64_t row = block.row + t * block.tile_rows;
      if (a.x_col_stride == 1 && depth % kDepth == 0 && block.rows_of(t) == block.tile_rows) {
        rows[t] = {x_at(a, row, k), kDepth, a.x_row_stride};
      } else {
        copy_x(a, row, block.rows_of(t), k, depth, buffers.x[t]);
        rows[t] = {buffers.x[t][0][0], kTileRows * kDepth, kDepth};
      }
    }
    for (int64_t begin = 0; begin < block.num_panels; begin += kTogether) {
      const int64_t end = min(begin + kTogether, block.num_panels);
      // The next K block of a panel; past its end come the panels that take its place.
      const int64_t skip = k + depth < a.depth ? 0 : (end - begin - 1) * panel_stride;
      for (int64_t p = begin; p < end; ++p)
        interleave_panel(static_cast<const bf16*>(a.packed) + (block.panel + p) * panel_stride + k * kMatmulPanel,
                         depth, min(kMatmulKBlock, a.depth) * kMatmulPanel + skip, buffers.w[p - begin]);
      for_each_tile_block(num_tiles, begin, end, [&](auto row_tiles, auto panels, int64_t tile, int64_t panel) {
        constexpr int kRows = decltype(row_tiles){}, kPanels = decltype(panels){};
        const auto total = [&](int r, int p) { return buffers.total[tile + r][panel + p]; };
        unroll<kRows>([&](auto r) PE_INLINE {
          unroll<kPanels>([&](auto p) PE_INLINE { tile_load<accumulator<kPanels>(r, p)>(total(r, p), kTileRowBytes); });
        });
        // Copies, which stay in registers over instructions that touch memory.
        const Rows left[2] = {rows[tile], rows[tile + kRows - 1]};
        const TileBf16* right = buffers.w[panel - begin];
        for (int64_t s = 0, steps = num_steps; s < steps; ++s)
          multiply_tiles<TileDot::bf16, kRows, kPanels>(
              [=](int r) { return TileRows{left[r].first + s * left[r].step, left[r].row_stride * 2}; },
              [=](int p) { return TileRows{right[p * kSteps + s], kTileRowBytes}; });
        unroll<kRows>([&](auto r) PE_INLINE {
          unroll<kPanels>([&](auto p)
                              PE_INLINE { tile_store<accumulator<kPanels>(r, p)>(total(r, p), kTileRowBytes); });
        });
      });
    }
  }
}

// bf16 times bf16 takes the tiles for any number of rows, so that a row has the same bits in every batch.
void tile(const Matmul& a, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
  if (a.x_dtype != DType::bf16 || a.w_dtype != DType::bf16)
    return avx512::matmul.tile(a, row_begin, row_end, panel_begin, panel_end);
  if (row_begin == row_end) return;  // tiles have at least one row
  Buffers buffers;
  const int64_t num_rows = row_end - row_begin, tile_rows = min(num_rows, kTileRows);
  // One tile of rows reads few panels at a time, each in one stream.
  const int64_t chunk = num_rows <= kTileRows ? kTogether : kChunkPanels;
  const Tiles tiles(tile_rows, kDepth * 2);
  for (int64_t panel = panel_begin; panel < panel_end; panel += chunk)
    for (int64_t row = row_begin; row < row_end; row += kRowTiles * kTileRows) {
      const Block block = {{row, min(kRowTiles * kTileRows, row_end - row), panel, min(chunk, panel_end - panel)},
                           tile_rows};
      load_total(a, block, buffers);
      multiply(a, block, buffers);
      store_y(a, block, totals(block, buffers));
    }
}

void pack(const MatmulPack& a, int64_t panel_begin, int64_t panel_end) {
  avx512::matmul.pack(a, panel_begin, panel_end);
}

}  // namespace

constinit const MatmulIsa matmul = {pack, tile};

}  // namespace pe::PE_ISA
