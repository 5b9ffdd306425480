// ISA: scalar avx2 avx512
#include "pe/matmul.h"

#include "simd/transpose.h"
#include "simd/vec.h"

namespace pe::PE_ISA {
namespace {

constexpr int64_t kVecsPerPanel = kMatmulPanel / VecF::size;
// Rows of x in the buffer are one cache line apart from a power of two, so that they do not compete for cache sets.
constexpr int64_t kXStride = kMatmulKBlock + 16;
constexpr int64_t kChunkPanels = 8;
constexpr int64_t kTotalStride = kChunkPanels * kMatmulPanel;
// The share of the second-level cache that panels may take while many rows pass over them.
constexpr int64_t kChunkBytes = 512 << 10;

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  __builtin_memcpy(&f, &bits, sizeof f);
  return f;
}

// --- the register tile
// ------------------------------------------------------------------------------------------------

// Where to prefetch while row k of a panel block is multiplied, relative to that row, in elements.
struct Prefetch {
  int64_t split;  // k < split: `before`, else `after`
  int64_t before, after;
};

// Adds the products of one K block to total: `Rows` rows of x times `Panels` panels.
template <int Rows, int Panels, class W>
void block(const float* x, const W* w, int64_t panel_stride, int64_t depth, Prefetch prefetch, float* total) {
  constexpr int kVecs = Panels * kVecsPerPanel;
  VecF acc[Rows][kVecs];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) acc[r][j] = set1(0.0f);
  for (int64_t k = 0; k < depth; ++k) {
    const int64_t ahead = k < prefetch.split ? prefetch.before : prefetch.after;
    VecF weight[kVecs];
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) {
      const W* panel = w + j / kVecsPerPanel * panel_stride + k * kMatmulPanel;
      weight[j] = load(panel + j % kVecsPerPanel * VecF::size);
      if (j % kVecsPerPanel == 0) __builtin_prefetch(panel + ahead, 0, 2);
    }
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const VecF value = set1(x[r * kXStride + k]);
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) acc[r][j] = fma(value, weight[j], acc[r][j]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) {
      float* sum = total + r * kTotalStride + j * VecF::size;
      store(sum, add(load(sum), acc[r][j]));
    }
}

template <class W>
struct Kernel {
  using Block = void (*)(const float*, const W*, int64_t, int64_t, Prefetch, float*);
  int rows, panels;
  Block wide, single;  // `panels` panels, one panel
};

template <int Rows, int Panels, class W>
constexpr Kernel<W> kernel() {
  return {Rows, Panels, block<Rows, Panels, W>, block<Rows, 1, W>};
}

// Few rows: many panels, for memory parallelism and independent chains. Many rows: the most products per load that the
// registers hold.
#if defined(__AVX512F__)
template <class W>
constexpr Kernel<W> kKernels[] = {kernel<1, 4, W>(), kernel<2, 4, W>(), kernel<3, 4, W>(), kernel<4, 4, W>(),
                                  kernel<6, 4, W>(), kernel<8, 2, W>(), kernel<12, 2, W>()};
constexpr int64_t kMaxRows = 12;
#elif defined(__AVX2__)
template <class W>
constexpr Kernel<W> kKernels[] = {kernel<1, 4, W>(), kernel<2, 2, W>(), kernel<3, 2, W>(), kernel<4, 1, W>(),
                                  kernel<6, 1, W>()};
constexpr int64_t kMaxRows = 6;
#else
template <class W>
constexpr Kernel<W> kKernels[] = {kernel<1, 1, W>(), kernel<2, 1, W>()};
constexpr int64_t kMaxRows = 2;
#endif

template <class W>
const Kernel<W>& kernel_for(int64_t num_rows) {
  const Kernel<W>* kernel = kKernels<W>;
  while (kernel->rows < num_rows) ++kernel;
  return *kernel;
}

// --- x and y
// ----------------------------------------------------------------------------------------------------------

// Copies x[row .. row + num_rows, k .. k + depth] to `buffer` as f32; rows up to buffer_rows are zero.
template <class X>
void copy_x(const Matmul& a, int64_t row, int64_t num_rows, int64_t k, int64_t depth, int64_t buffer_rows,
            float* buffer) {
  const X* x = static_cast<const X*>(a.x) + row * a.x_row_stride + k * a.x_col_stride;
  const int64_t tail = depth % VecF::size, full = depth - tail;
  if (a.x_col_stride != 1 && a.x_row_stride == 1) {
    for (int64_t i = 0; i < depth; i += 16)
      transpose_tile(x + i * a.x_col_stride, a.x_col_stride, min(16, depth - i), num_rows, buffer + i, kXStride,
                     min(16, depth - i));
  } else {
    for (int64_t r = 0; r < num_rows; ++r) {
      const X* from = x + r * a.x_row_stride;
      float* to = buffer + r * kXStride;
      if (a.x_col_stride == 1) {
        for (int64_t i = 0; i < full; i += VecF::size) store(to + i, load(from + i));
        if (tail) store(to + full, load(from + full, tail), tail);
      } else {
        for (int64_t i = 0; i < depth; ++i) to[i] = to_float(from[i * a.x_col_stride]);
      }
    }
  }
  for (int64_t r = num_rows; r < buffer_rows; ++r)
    for (int64_t i = 0; i < kMatmulKBlock; i += VecF::size) store(buffer + r * kXStride + i, set1(0.0f));
}

// Calls body(y, total, num) for each run of at most a vector of the row.
template <class Y, class Body>
void for_each_vec(const Matmul& a, int64_t row, int64_t num_rows, int64_t col, int64_t num_cols, float* total,
                  const Body& body) {
  for (int64_t r = 0; r < num_rows; ++r) {
    Y* y = static_cast<Y*>(a.y) + (row + r) * a.y_row_stride + col;
    for (int64_t c = 0; c < num_cols; c += VecF::size)
      body(y + c, total + r * kTotalStride + c, min(VecF::size, num_cols - c));
  }
}

template <class Y>
void store_y(const Matmul& a, int64_t row, int64_t num_rows, int64_t col, int64_t num_cols, float* total) {
  for_each_vec<Y>(a, row, num_rows, col, num_cols, total, [](Y* y, const float* sum, int64_t n) {
    n == VecF::size ? store(y, load(sum)) : store(y, load(sum), n);
  });
}

void load_total(const Matmul& a, int64_t row, int64_t num_rows, int64_t col, int64_t num_cols, float* total) {
  for (int64_t i = 0; i < kMaxRows * kTotalStride; i += VecF::size) store(total + i, set1(0.0f));
  if (a.accumulate)
    for_each_vec<float>(a, row, num_rows, col, num_cols, total, [](const float* y, float* sum, int64_t n) {
      n == VecF::size ? store(sum, load(y)) : store(sum, load(y, n), n);
    });
}

// --- the loops around the register tile
// -------------------------------------------------------------------------------

// One tile of rows against the panels [begin, end) of one chunk.
template <class W>
void row_tile(const Matmul& a, int64_t row, int64_t num_rows, int64_t begin, int64_t end) {
  alignas(64) float x_block[kMaxRows * kXStride];
  alignas(64) float total[kMaxRows * kTotalStride];
  const Kernel<W>& kernel = kernel_for<W>(num_rows);
  const int64_t panel_stride = a.depth * kMatmulPanel;
  const int64_t col = begin * kMatmulPanel, num_cols = min(end * kMatmulPanel, a.num_cols) - col;
  // The weights one K block ahead; at the end of the panels, those at the start of the next ones.
  const int64_t distance = min(kMatmulKBlock, a.depth);
  load_total(a, row, num_rows, col, num_cols, total);
  for (int64_t k = 0; k < a.depth; k += kMatmulKBlock) {
    const int64_t depth = min(kMatmulKBlock, a.depth - k);
    const auto copy = a.x_dtype == DType::f32 ? copy_x<float> : copy_x<bf16>;
    copy(a, row, num_rows, k, depth, kernel.rows, x_block);
    for (int64_t p = begin; p < end;) {
      const bool wide = end - p >= kernel.panels;
      const int64_t panels = wide ? kernel.panels : 1;
      const W* w = static_cast<const W*>(a.packed) + p * panel_stride + k * kMatmulPanel;
      const Prefetch prefetch = {a.depth - distance - k, distance * kMatmulPanel,
                                 distance * kMatmulPanel + (panels - 1) * panel_stride};
      (wide ? kernel.wide : kernel.single)(x_block, w, panel_stride, depth, prefetch,
                                           total + (p - begin) * kMatmulPanel);
      p += panels;
    }
  }
  (a.y_dtype == DType::f32 ? store_y<float> : store_y<bf16>)(a, row, num_rows, col, num_cols, total);
}

template <class W>
void tile_of(const Matmul& a, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
  const int64_t panel_bytes = a.depth * kMatmulPanel * static_cast<int64_t>(sizeof(W));
  const int64_t fitting = min(kChunkPanels, max(4, kChunkBytes / max(panel_bytes, 1) / 4 * 4));
  // One tile of rows reads each panel once and in one stream.
  const int64_t chunk = row_end - row_begin <= 6 ? 4 : fitting;
  for (int64_t p = panel_begin; p < panel_end; p += chunk)
    for (int64_t row = row_begin; row < row_end; row += kMaxRows)
      row_tile<W>(a, row, min(kMaxRows, row_end - row), p, min(p + chunk, panel_end));
}

void tile(const Matmul& a, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
  (a.w_dtype == DType::f32 ? tile_of<float> : tile_of<bf16>)(a, row_begin, row_end, panel_begin, panel_end);
}

// --- packing
// ----------------------------------------------------------------------------------------------------------

template <class W, class Packed>
void pack_panel(const MatmulPack& a, int64_t panel) {
  const int64_t row = panel * kMatmulPanel, rows = min(kMatmulPanel, a.num_rows - row);
  const W* w = static_cast<const W*>(a.w) + row * a.w_row_stride;
  Packed* packed = static_cast<Packed*>(a.packed) + panel * kMatmulPanel * a.num_cols;
  if (a.w_col_stride == 1) {
    for (int64_t k = 0; k < a.num_cols; k += 16)
      transpose_tile(w + k, a.w_row_stride, rows, min(16, a.num_cols - k), packed + k * kMatmulPanel, kMatmulPanel,
                     kMatmulPanel);
    return;
  }
  for (int64_t k = 0; k < a.num_cols; ++k) {
    const W* column = w + k * a.w_col_stride;
    alignas(64) float gathered[kMatmulPanel] = {};
    if (a.w_row_stride != 1)
      for (int64_t r = 0; r < rows; ++r) gathered[r] = to_float(column[r * a.w_row_stride]);
    for (int64_t r = 0; r < kMatmulPanel; r += VecF::size) {
      VecF v = set1(0.0f);
      if (a.w_row_stride != 1)
        v = load(gathered + r);
      else if (rows - r >= VecF::size)
        v = load(column + r);
      else if (rows > r)
        v = load(column + r, rows - r);
      store(packed + k * kMatmulPanel + r, v);
    }
  }
}

void pack(const MatmulPack& a, int64_t panel_begin, int64_t panel_end) {
  const bool from_f32 = a.w_dtype == DType::f32, to_f32 = a.packed_dtype == DType::f32;
  const auto one = from_f32 ? (to_f32 ? pack_panel<float, float> : pack_panel<float, bf16>)
                            : (to_f32 ? pack_panel<bf16, float> : pack_panel<bf16, bf16>);
  for (int64_t p = panel_begin; p < panel_end; ++p) one(a, p);
}

}  // namespace

constinit const MatmulIsa matmul = {pack, tile};

}  // namespace pe::PE_ISA
