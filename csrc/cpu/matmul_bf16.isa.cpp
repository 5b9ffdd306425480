// ISA: avx512_bf16
#include "pe/matmul.h"
#include "simd/bf16_pairs.h"
#include "simd/matmul_totals.h"
#include "simd/transpose.h"
#include "simd/unroll.h"

namespace pe::PE_ISA {
namespace {

constexpr int64_t kRowBlock = 96;
constexpr int64_t kTogether = 4;     // panels that are interleaved before the rows pass over them
constexpr int64_t kChunkPanels = 8;  // panels whose totals are kept
constexpr int64_t kDirectRows = 6;   // up to this many rows, panels go from the stream to the sums
// Rows of x are one cache line apart from a power of two, so that they do not compete for cache sets.
constexpr int64_t kXStride = kMatmulKBlock + 32;

struct alignas(64) Buffers {
  bf16 x[kRowBlock][kXStride];
  bf16 w[kTogether][kMatmulKBlock * kMatmulPanel];
  float total[kRowBlock][kChunkPanels][kMatmulPanel];
};

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// --- the register tile ----------------------------------------------------------------------------------------------

// total += the products of one K block, whose pairs pairs_of(panel, k) gives: a chain over k, two at a time.
template <int kRows, int kPanels, class PairsOf>
[[gnu::always_inline]] inline void multiply_tile(const bf16 (*x)[kXStride], int64_t depth, const PairsOf& pairs_of,
                                                 float (*total)[kChunkPanels][kMatmulPanel]) {
  VecF sum[kRows][kPanels];
  unroll<kRows>([&](auto r) PE_INLINE { unroll<kPanels>([&](auto p) PE_INLINE { sum[r][p] = set1(0.0f); }); });
  for (int64_t k = 0; k < depth; k += 2) {
    __m512i pairs[kPanels];
    unroll<kPanels>([&](auto p) PE_INLINE { pairs[p] = pairs_of(p, k); });
    unroll<kRows>([&](auto r) PE_INLINE {
      unroll<kPanels>([&](auto p) PE_INLINE { sum[r][p] = add_pair(sum[r][p], pairs[p], x[r] + k); });
    });
  }
  unroll<kRows>([&](auto r) PE_INLINE {
    unroll<kPanels>([&](auto p) PE_INLINE { store(total[r][p], add(load(total[r][p]), sum[r][p])); });
  });
}

// All rows over kPanels panels; the last rows in smaller tiles.
template <int kRows, int kPanels, class PairsOf>
void multiply_rows(int64_t num_rows, const bf16 (*x)[kXStride], int64_t depth, const PairsOf& pairs_of,
                   float (*total)[kChunkPanels][kMatmulPanel]) {
  for (; num_rows >= kRows; num_rows -= kRows, x += kRows, total += kRows)
    multiply_tile<kRows, kPanels>(x, depth, pairs_of, total);
  if constexpr (kRows > 1) {
    if (num_rows > 0) multiply_rows<(kRows + 1) / 2, kPanels>(num_rows, x, depth, pairs_of, total);
  }
}

// --- x, w and y -----------------------------------------------------------------------------------------------------

// x of the block and of one K block; a zero behind an odd depth.
void copy_x(const Matmul& a, const MatmulBlock& block, int64_t k, int64_t depth, Buffers& buffers) {
  const bf16* x = static_cast<const bf16*>(a.x) + block.row * a.x_row_stride + k * a.x_col_stride;
  if (a.x_col_stride != 1 && a.x_row_stride == 1) {
    for (int64_t r = 0; r < block.num_rows; r += 16)
      for (int64_t i = 0; i < depth; i += 16)
        transpose_tile(x + i * a.x_col_stride + r, a.x_col_stride, min(16, depth - i), min(16, block.num_rows - r),
                       &buffers.x[r][i], kXStride, min(16, depth - i));
  } else {
    for (int64_t r = 0; r < block.num_rows; ++r, x += a.x_row_stride) {
      if (a.x_col_stride == 1)
        memcpy(buffers.x[r], x, static_cast<size_t>(depth) * sizeof(bf16));
      else
        for (int64_t i = 0; i < depth; ++i) buffers.x[r][i] = x[i * a.x_col_stride];
    }
  }
  if (depth % 2)
    for (int64_t r = 0; r < block.num_rows; ++r) buffers.x[r][depth] = {0};
}

// Columns k and k + 1 of a panel, or k and zeros.
[[gnu::always_inline]] inline __m512i panel_pairs(const bf16* panel, int64_t k, int64_t depth) {
  const bf16* from = panel + k * kMatmulPanel;
  return interleave_halves(k + 2 <= depth ? load_32(from) : load_16(from));
}

// Where the 16 totals of row r and panel p of a block lie.
auto totals(Buffers& buffers) {
  return [&](int64_t r, int64_t p) { return buffers.total[r][p]; };
}

void load_total(const Matmul& a, const MatmulBlock& block, Buffers& buffers) {
  memset(buffers.total, 0, sizeof buffers.total[0] * static_cast<size_t>(block.num_rows));
  load_y(a, block, totals(buffers));
}

// --- the loops ------------------------------------------------------------------------------------------------------

// Where the totals of the panels from `begin` on start.
auto totals_from(Buffers& buffers, int64_t begin) {
  return reinterpret_cast<float (*)[kChunkPanels][kMatmulPanel]>(buffers.total[0][begin]);
}

// Few rows: panels as they lie, kTogether at once.
void multiply_stream(const Matmul& a, const MatmulBlock& block, int64_t k, int64_t depth, Buffers& buffers) {
  const int64_t panel_stride = a.depth * kMatmulPanel, ahead = min(kMatmulKBlock, a.depth) * kMatmulPanel;
  const auto pass = [&](auto num_panels, int64_t begin) {
    const bf16* w = static_cast<const bf16*>(a.packed) + (block.panel + begin) * panel_stride + k * kMatmulPanel;
    // Behind the last K block of a panel comes the first one of the panel that takes its place.
    const int64_t fetch = ahead + (k + depth < a.depth ? 0 : (num_panels - 1) * panel_stride);
    multiply_rows<kDirectRows, decltype(num_panels){}>(
        block.num_rows, buffers.x, depth,
        [=](int p, int64_t i) PE_INLINE {
          const bf16* panel = w + p * panel_stride;
          __builtin_prefetch(panel + i * kMatmulPanel + fetch, 0, 2);
          return panel_pairs(panel, i, depth);
        },
        totals_from(buffers, begin));
  };
  int64_t begin = 0;
  for (; begin + kTogether <= block.num_panels; begin += kTogether) pass(Index<kTogether>{}, begin);
  for (; begin < block.num_panels; ++begin) pass(Index<1>{}, begin);
}

// Many rows: panels are interleaved once, two at a time stay in the first-level cache.
void multiply_block(const Matmul& a, const MatmulBlock& block, int64_t k, int64_t depth, Buffers& buffers) {
  constexpr int kTileRows = 12, kTilePanels = 2;
  for (int64_t begin = 0; begin < block.num_panels; begin += kTogether) {
    const int64_t num_panels = min(kTogether, block.num_panels - begin);
    for (int64_t p = 0; p < num_panels; ++p) {
      const bf16* panel = static_cast<const bf16*>(a.packed) + ((block.panel + begin + p) * a.depth + k) * kMatmulPanel;
      for (int64_t i = 0; i < depth; i += 2)
        _mm512_store_si512(buffers.w[p] + i * kMatmulPanel, panel_pairs(panel, i, depth));
    }
    const auto pass = [&](auto together, int64_t first) {
      const bf16* w = buffers.w[first];
      multiply_rows<kTileRows, decltype(together){}>(
          block.num_rows, buffers.x, depth,
          [=](int p, int64_t i) PE_INLINE { return load_32(w + (p * kMatmulKBlock + i) * kMatmulPanel); },
          totals_from(buffers, begin + first));
    };
    int64_t p = 0;
    for (; p + kTilePanels <= num_panels; p += kTilePanels) pass(Index<kTilePanels>{}, p);
    if (p < num_panels) pass(Index<1>{}, p);
  }
}

// bf16 times bf16 takes the pairs for any number of rows, so that a row has the same bits in every batch.
void tile(const Matmul& a, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
  if (a.x_dtype != DType::bf16 || a.w_dtype != DType::bf16)
    return avx512::matmul.tile(a, row_begin, row_end, panel_begin, panel_end);
  Buffers buffers;
  for (int64_t panel = panel_begin; panel < panel_end; panel += kChunkPanels)
    for (int64_t row = row_begin; row < row_end; row += kRowBlock) {
      const MatmulBlock block = {row, min(kRowBlock, row_end - row), panel, min(kChunkPanels, panel_end - panel)};
      load_total(a, block, buffers);
      for (int64_t k = 0; k < a.depth; k += kMatmulKBlock) {
        const int64_t depth = min(kMatmulKBlock, a.depth - k);
        copy_x(a, block, k, depth, buffers);
        (block.num_rows <= kDirectRows ? multiply_stream : multiply_block)(a, block, k, depth, buffers);
      }
      store_y(a, block, totals(buffers));
    }
}

void pack(const MatmulPack& a, int64_t panel_begin, int64_t panel_end) {
  avx512::matmul.pack(a, panel_begin, panel_end);
}

}  // namespace

constinit const MatmulIsa matmul = {pack, tile};

}  // namespace pe::PE_ISA
