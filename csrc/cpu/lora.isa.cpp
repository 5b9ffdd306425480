// ISA: scalar avx2 avx512
#include "pe/lora.h"

#include "simd/for_each_vec.h"

namespace pe::PE_ISA {
namespace {

constexpr int kVecs = kMatmulPanel / VecF::size;  // of a panel
constexpr int kChains = 4;
// Rows that share a load of weights, as many as the registers hold.
#if defined(__AVX512F__)
constexpr int kShrinkRows = 4, kExpandRows = 4, kExpandPanels = 4;
#elif defined(__AVX2__)
constexpr int kShrinkRows = 1, kExpandRows = 4, kExpandPanels = 1;
#else
constexpr int kShrinkRows = 1, kExpandRows = 1, kExpandPanels = 1;
#endif
// Panels of one row: independent chains that hide the latency of each other.
constexpr int kRowPanels = 8 / kVecs;

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t row_of(const Lora& a, int64_t i) { return a.rows ? a.rows[i] : i; }
inline float* u_of(const Lora& a, int64_t i) { return a.u + row_of(a, i) * a.u_row_stride; }

// --- u = scale * x @ a^T --------------------------------------------------------------------------------------------

// Adds one K block of `Rows` rows of x times one panel to total [Rows][kMatmulPanel].
template <int Rows, class W>
void shrink_block(const float* x, const W* panel, int64_t depth, float* total) {
  VecF acc[Rows][kChains][kVecs];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c)
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) acc[r][c][v] = set1(0.0f);
  const auto step = [&](int64_t k, int c) __attribute__((always_inline)) {
    const W* w = panel + (k + c) * kMatmulPanel;
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
      const VecF weight = load(w + v * VecF::size);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) acc[r][c][v] = fma(set1(x[r * kMatmulKBlock + k + c]), weight, acc[r][c][v]);
    }
  };
  int64_t k = 0;
  for (; k + kChains <= depth; k += kChains) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) step(k, c);
  }
#pragma GCC unroll 4
  for (int c = 0; c < kChains - 1; ++c)
    if (k + c < depth) step(k, c);
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
      const VecF sum = add(add(acc[r][0][v], acc[r][1][v]), add(acc[r][2][v], acc[r][3][v]));
      float* to = total + r * kMatmulPanel + v * VecF::size;
      store(to, add(load(to), sum));
    }
}

template <int Rows, class X, class W>
void shrink_rows(const Lora& a, int64_t row, int64_t panel_begin, int64_t panel_end) {
  alignas(64) float x_block[Rows * kMatmulKBlock];
  alignas(64) float total[(kLoraMaxRank / kMatmulPanel) * Rows * kMatmulPanel];
  const int64_t num_panels = panel_end - panel_begin;
  for (int64_t i = 0; i < num_panels * Rows * kMatmulPanel; i += VecF::size) store(total + i, set1(0.0f));
  for (int64_t k = 0; k < a.depth; k += kMatmulKBlock) {
    const int64_t depth = min(kMatmulKBlock, a.depth - k);
    for (int r = 0; r < Rows; ++r) {
      const X* x = static_cast<const X*>(a.x) + row_of(a, row + r) * a.x_row_stride + k;
      float* to = x_block + r * kMatmulKBlock;
      for_each_vec(depth, [&](auto in, auto out) { out(to, in(x)); });
    }
    for (int64_t p = 0; p < num_panels; ++p) {
      const W* panel = static_cast<const W*>(a.a) + ((panel_begin + p) * a.depth + k) * kMatmulPanel;
      shrink_block<Rows>(x_block, panel, depth, total + p * Rows * kMatmulPanel);
    }
  }
  const VecF scale = set1(a.scale);
  for (int64_t p = 0; p < num_panels; ++p)
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < kVecs; ++v)
        store(u_of(a, row + r) + (panel_begin + p) * kMatmulPanel + v * VecF::size,
              mul(scale, load(total + (p * Rows + r) * kMatmulPanel + v * VecF::size)));
}

template <class X, class W>
void shrink_of(const Lora& a, const LoraTile& tile) {
  int64_t row = tile.row_begin;
  for (; row + kShrinkRows <= tile.row_end; row += kShrinkRows)
    shrink_rows<kShrinkRows, X, W>(a, row, tile.panel_begin, tile.panel_end);
  for (; row < tile.row_end; ++row) shrink_rows<1, X, W>(a, row, tile.panel_begin, tile.panel_end);
}

void shrink(const Lora& a, const LoraTile& tile) {
  const bool f32_x = a.dtype == DType::f32, f32_a = a.a_dtype == DType::f32;
  (f32_x ? (f32_a ? shrink_of<float, float> : shrink_of<float, bf16>)
         : (f32_a ? shrink_of<bf16, float> : shrink_of<bf16, bf16>))(a, tile);
}

// --- y += u @ b^T ---------------------------------------------------------------------------------------------------

template <int Rows, int Panels, class Y, class W>
void expand_block(const Lora& a, int64_t row, int64_t panel) {
  const W* w = static_cast<const W*>(a.b) + panel * a.rank * kMatmulPanel;
  const float* u[Rows];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) u[r] = u_of(a, row + r);
  VecF acc[Rows][Panels * kVecs];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < Panels * kVecs; ++v) acc[r][v] = set1(0.0f);
  for (int64_t j = 0; j < a.rank; ++j) {
#pragma GCC unroll 8
    for (int v = 0; v < Panels * kVecs; ++v) {
      const VecF weight =
          load(w + (v / kVecs * a.rank + j) * kMatmulPanel + static_cast<int64_t>(v % kVecs) * VecF::size);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) acc[r][v] = fma(set1(u[r][j]), weight, acc[r][v]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    Y* y = static_cast<Y*>(a.y) + row_of(a, row + r) * a.y_row_stride + panel * kMatmulPanel;
    const int64_t num_cols = a.num_cols - panel * kMatmulPanel;
#pragma GCC unroll 8
    for (int v = 0; v < Panels * kVecs; ++v) {
      const int64_t n = num_cols - v * VecF::size;
      Y* to = y + v * VecF::size;
      if (n >= VecF::size)
        store(to, add(load(to), acc[r][v]));
      else if (n > 0)
        store(to, add(load(to, n), acc[r][v]), n);
    }
  }
}

template <int Rows, int Panels, class Y, class W>
void expand_rows(const Lora& a, int64_t row, int64_t panel_begin, int64_t panel_end) {
  int64_t panel = panel_begin;
  for (; panel + Panels <= panel_end; panel += Panels) expand_block<Rows, Panels, Y, W>(a, row, panel);
  for (; panel < panel_end; ++panel) expand_block<Rows, 1, Y, W>(a, row, panel);
}

template <class Y, class W>
void expand_of(const Lora& a, const LoraTile& tile) {
  int64_t row = tile.row_begin;
  for (; row + kExpandRows <= tile.row_end; row += kExpandRows)
    expand_rows<kExpandRows, kExpandPanels, Y, W>(a, row, tile.panel_begin, tile.panel_end);
  for (; row < tile.row_end; ++row) expand_rows<1, kRowPanels, Y, W>(a, row, tile.panel_begin, tile.panel_end);
}

void expand(const Lora& a, const LoraTile& tile) {
  const bool f32_y = a.dtype == DType::f32, f32_b = a.b_dtype == DType::f32;
  (f32_y ? (f32_b ? expand_of<float, float> : expand_of<float, bf16>)
         : (f32_b ? expand_of<bf16, float> : expand_of<bf16, bf16>))(a, tile);
}

}  // namespace

constinit const LoraIsa lora = {shrink, expand};

}  // namespace pe::PE_ISA
