// ISA: scalar avx2 avx512 avx512_vnni
#include "pe/matmul_w8a8.h"

#include "simd/dot_int8.h"
#include "simd/unroll.h"
#include "simd/w8a8_columns.h"

namespace pe::PE_ISA {
namespace {

// Rows x panels of one register tile: as many accumulators as the registers hold beside the lines and one quad.
#if defined(__AVX512VNNI__)
constexpr int kTileRows = 6, kTilePanels = 4;
#elif defined(__AVX512BW__)
constexpr int kTileRows = 6, kTilePanels = 2;
#else
constexpr int kTileRows = 2, kTilePanels = 1;
#endif
// Far enough for the memory, near enough for L1.
constexpr int64_t kPrefetchBytes = 4096;

template <int kRows, int kPanels>
void register_tile(const MatmulW8A8& a, int64_t row, int64_t panel) {
  const int64_t num_steps = matmul_w8a8_num_steps(a.k), panel_bytes = num_steps * 64, full_steps = a.k / 4;
  const int64_t x_row_stride = a.x_row_stride;
  const uint8_t* packed = a.packed + panel * panel_bytes;
  const int8_t* x = a.x + row * x_row_stride;
  Dot16 dots[kRows][kPanels];
  unroll<kRows>([&](auto r) PE_INLINE { unroll<kPanels>([&](auto p) PE_INLINE { dots[r][p] = zero_dots(); }); });
  const auto step = [&](int64_t s, auto quad_of) PE_INLINE {
    Line lines[kPanels];
    unroll<kPanels>([&](auto p) PE_INLINE {
      const uint8_t* line = packed + p * panel_bytes + s * 64;
      __builtin_prefetch(line + kPrefetchBytes);
      lines[p] = load_line(line);
    });
    unroll<kRows>([&](auto r) PE_INLINE {
      const Quad quad = quad_of(x + r * x_row_stride + 4 * s);
      unroll<kPanels>([&](auto p) PE_INLINE { dots[r][p] = accumulate(dots[r][p], lines[p], quad); });
    });
  };
  for (int64_t s = 0; s < full_steps; ++s) step(s, [](const int8_t* q) PE_INLINE { return load_quad(q); });
  if (full_steps < num_steps) step(full_steps, [&](const int8_t* q) PE_INLINE { return load_quad(q, a.k % 4); });
  int32_t raw[kRows][kPanels][kMatmulW8A8PanelRows];
  unroll<kRows>([&](auto r)
                    PE_INLINE { unroll<kPanels>([&](auto p) PE_INLINE { store_dots(raw[r][p], dots[r][p]); }); });
  for (int r = 0; r < kRows; ++r)
    for (int p = 0; p < kPanels; ++p) store_columns(a, row + r, panel + p, raw[r][p]);
}

// All rows over kPanels panels, which stay in cache; the last rows in smaller tiles.
template <int kRows, int kPanels>
void panel_tiles(const MatmulW8A8& a, int64_t row, int64_t row_end, int64_t panel) {
  for (; row + kRows <= row_end; row += kRows) register_tile<kRows, kPanels>(a, row, panel);
  if constexpr (kRows > 1) {
    if (row < row_end) panel_tiles<(kRows + 1) / 2, kPanels>(a, row, row_end, panel);
  }
}

void tile(const MatmulW8A8& a, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
  int64_t panel = panel_begin;
  for (; panel + kTilePanels <= panel_end; panel += kTilePanels)
    panel_tiles<kTileRows, kTilePanels>(a, row_begin, row_end, panel);
  for (; panel < panel_end; ++panel) panel_tiles<kTileRows, 1>(a, row_begin, row_end, panel);
}

void x_sum(const int8_t* x, int64_t x_row_stride, int64_t k, int64_t row_begin, int64_t row_end, int32_t* out) {
  for (int64_t r = row_begin; r < row_end; ++r) {
    int32_t total = 0;
    for (int64_t i = 0; i < k; ++i) total += x[r * x_row_stride + i];
    out[r] = total;
  }
}

}  // namespace

constinit const MatmulW8A8Isa matmul_w8a8 = {x_sum, tile};

}  // namespace pe::PE_ISA
