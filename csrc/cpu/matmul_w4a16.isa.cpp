// ISA: scalar avx2 avx512
#include "pe/matmul_w4a16.h"

#include "simd/panel.h"
#include "simd/panel_store.h"
#include "simd/w4a16_group.h"

namespace pe::PE_ISA {
namespace {

// Bytes between the group in work and the one being fetched: an L3 access takes the time of about 3 KB of stream.
constexpr int64_t kPrefetchBytes = 6 * 1024;

// The register tile: kTileRows * kTilePanels running sums.
constexpr bool kWide = VecF::size == 16;  // 32 registers of one panel each; else 16 of half a panel
constexpr int kTileRows = kWide ? 12 : 6, kTilePanels = kWide ? 2 : 1;
// Up to this many rows, codes are decoded in registers; for more, once per row block into L1.
constexpr int64_t kDirectRows = kWide ? 4 : 2;
// Running totals of a row block and two panels take 12 KB of L1.
constexpr int64_t kRowBlock = 96;

struct Rows {
  const float* x;
  int64_t x_row_stride;
  GroupSums sum_x;
  int64_t num_groups;
};

Rows prepared_rows(const MatmulW4A16& a) {
  const int64_t num_groups = a.weight.num_cols / kGroupSize;
  const GroupSums sum_x = group_sums(a);
  if (!a.x_is_bf16()) return {static_cast<const float*>(a.x), a.x_row_stride, sum_x, num_groups};
  return {a.workspace, a.weight.num_cols, sum_x, num_groups};
}

// --- one group of weights -------------------------------------------------------------------------------------------

template <int num_rows, int num_panels>
using Sums = PanelF[num_rows][num_panels];

template <int num_rows, int num_panels>
[[gnu::always_inline]] inline void clear(Sums<num_rows, num_panels>& s) {
  PE_UNROLL for (int r = 0; r < num_rows; ++r) {
    PE_UNROLL for (int p = 0; p < num_panels; ++p) s[r][p] = panel_set1(0.0f);
  }
}

// The only place where codes meet activations: k ascending, whatever the number of rows and panels.
template <int count, int num_rows, int num_panels>
[[gnu::always_inline]] inline void add_run(const CodeRun<count> (&run)[num_panels], const float* x,
                                           int64_t x_row_stride, Sums<num_rows, num_panels>& s) {
  PE_UNROLL for (int i = 0; i < count; ++i) {
    PE_UNROLL for (int r = 0; r < num_rows; ++r) {
      const PanelF value = panel_set1(x[r * x_row_stride + i]);
      PE_UNROLL for (int p = 0; p < num_panels; ++p) s[r][p] = fma(run[p].code[i], value, s[r][p]);
    }
  }
}

// --- few rows: weights go from the stream to the sums ---------------------------------------------------------------

// The sums of scale group `part`.
template <BlockFormat format, int part, int num_rows, int num_panels>
[[gnu::always_inline]] inline void dot_packed(const uint8_t* group, int64_t panel_stride, const float* x,
                                              int64_t x_row_stride, Sums<num_rows, num_panels>& s) {
  constexpr int quads = info(format).scale_group / 4;
  clear<num_rows, num_panels>(s);
  unroll<quads>([&](auto j) PE_INLINE {
    constexpr int i = part * quads + decltype(j){};
    CodeRun<4> run[num_panels];
    PE_UNROLL for (int p = 0; p < num_panels; ++p) run[p] = code_run<format, i>(group + p * panel_stride);
    add_run<4, num_rows, num_panels>(run, x + 4 * i, x_row_stride, s);
  });
}

template <BlockFormat format, int num_rows, int num_panels>
void stream_panels(const MatmulW4A16& a, int64_t row, int64_t panel) {
  constexpr int64_t group_bytes = packed_group_bytes(format);
  constexpr int64_t ahead = (kPrefetchBytes + num_panels * group_bytes - 1) / (num_panels * group_bytes);
  constexpr int parts = scale_groups(format);
  const Rows rows = prepared_rows(a);
  const int64_t num_groups = rows.num_groups, panel_stride = panel_bytes(format, a.weight.num_cols);
  const uint8_t* packed = a.weight.packed + panel * panel_stride;
  const float* x = rows.x + row * rows.x_row_stride;
  Sums<num_rows, num_panels> total;
  clear<num_rows, num_panels>(total);
  for (int64_t g = 0; g < num_groups; ++g, x += kGroupSize) {
    const uint8_t* group = packed + group_offset(format, g);
    // Past the last group of a panel come the groups of the panel that takes its place.
    const int64_t skip = g + ahead < num_groups ? 0 : (num_panels - 1) * panel_stride;
    PE_UNROLL for (int p = 0; p < num_panels; ++p) {
      prefetch_group<format>(packed + p * panel_stride, g, ahead * group_bytes + skip);
    }
    unroll<parts>([&](auto part) PE_INLINE {
      Sums<num_rows, num_panels> s;
      dot_packed<format, part, num_rows, num_panels>(group, panel_stride, x, rows.x_row_stride, s);
      PE_UNROLL for (int p = 0; p < num_panels; ++p) {
        const W4A16Scales scales = load_w4a16_scales<format>(packed + p * panel_stride, g, part);
        PE_UNROLL for (int r = 0; r < num_rows; ++r) {
          total[r][p] =
              add_w4a16_group<has_min(format)>(scales, s[r][p], rows.sum_x, row + r, g * parts + part, total[r][p]);
        }
      }
    });
  }
  PE_UNROLL for (int r = 0; r < num_rows; ++r) {
    PE_UNROLL for (int p = 0; p < num_panels; ++p) { store_panel(a, row + r, panel + p, total[r][p]); }
  }
}

template <BlockFormat format, int num_rows, int num_panels>
void stream_rows(const MatmulW4A16& a, int64_t row, int64_t panel_begin, int64_t panel_end) {
  int64_t panel = panel_begin;
  for (; panel + num_panels <= panel_end; panel += num_panels)
    stream_panels<format, num_rows, num_panels>(a, row, panel);
  for (; panel < panel_end; ++panel) stream_panels<format, num_rows, 1>(a, row, panel);
}

// --- many rows: each group is decoded once per row block ------------------------------------------------------------

struct BlockBuffers {
  alignas(64) float codes[kTilePanels][kGroupSize][kPanelRows];
  alignas(64) float total[kRowBlock][kTilePanels][kPanelRows];
  W4A16Scales scales[kGroupHalves][kTilePanels];
};

template <BlockFormat format>
[[gnu::always_inline]] inline void decode_group(const uint8_t* group, float (&codes)[kGroupSize][kPanelRows]) {
  unroll<kGroupQuads>([&](auto j) PE_INLINE {
    const CodeRun<4> run = code_run<format, j>(group);
    PE_UNROLL for (int i = 0; i < 4; ++i) panel_store(codes[4 * j + i], run.code[i]);
  });
}

// Rows `row` ... of `total` with a decoded group added, which is all that is left of the format.
template <bool has_min, int parts, int num_rows, int num_panels>
void block_rows(const BlockBuffers& in, const Rows& rows, int64_t row, int64_t group,
                float (*total)[kTilePanels][kPanelRows]) {
  const float* x = rows.x + row * rows.x_row_stride + group * kGroupSize;
  Sums<num_rows, num_panels> s;
  unroll<kGroupHalves>([&](auto half) PE_INLINE {
    constexpr int part = half * parts / kGroupHalves, size = static_cast<int>(kGroupSize) / kGroupHalves;
    if constexpr (parts == kGroupHalves || half == 0) clear<num_rows, num_panels>(s);
    for (int k = half * size; k < (half + 1) * size; ++k) {
      CodeRun<1> run[num_panels];
      PE_UNROLL for (int p = 0; p < num_panels; ++p) run[p].code[0] = panel_load(in.codes[p][k]);
      add_run<1, num_rows, num_panels>(run, x + k, rows.x_row_stride, s);
    }
    if constexpr (parts == 1 && half == 0) return;
    PE_UNROLL for (int r = 0; r < num_rows; ++r) {
      PE_UNROLL for (int p = 0; p < num_panels; ++p) {
        panel_store(total[r][p], add_w4a16_group<has_min>(in.scales[part][p], s[r][p], rows.sum_x, row + r,
                                                          group * parts + part, panel_load(total[r][p])));
      }
    }
  });
}

template <BlockFormat format, int num_panels>
void block_panels(const MatmulW4A16& a, int64_t row_begin, int64_t row_end, int64_t panel) {
  constexpr int parts = scale_groups(format);
  constexpr bool min = has_min(format);
  const Rows rows = prepared_rows(a);
  const int64_t num_groups = rows.num_groups, panel_stride = panel_bytes(format, a.weight.num_cols);
  BlockBuffers buffers;
  for (int64_t r = 0; r < row_end - row_begin; ++r)
    for (int p = 0; p < num_panels; ++p) panel_store(buffers.total[r][p], panel_set1(0.0f));

  for (int64_t g = 0; g < num_groups; ++g) {
    PE_UNROLL for (int p = 0; p < num_panels; ++p) {
      const uint8_t* packed = a.weight.packed + (panel + p) * panel_stride;
      prefetch_group<format>(packed, g, kPrefetchBytes / num_panels);
      unroll<parts>([&](auto part) PE_INLINE { buffers.scales[part][p] = load_w4a16_scales<format>(packed, g, part); });
      decode_group<format>(packed + group_offset(format, g), buffers.codes[p]);
    }
    int64_t row = row_begin;
    const auto total = [&] { return buffers.total + (row - row_begin); };
    for (; row + kTileRows <= row_end; row += kTileRows)
      block_rows<min, parts, kTileRows, num_panels>(buffers, rows, row, g, total());
    for (; row + kTileRows / 3 <= row_end; row += kTileRows / 3)
      block_rows<min, parts, kTileRows / 3, num_panels>(buffers, rows, row, g, total());
    for (; row < row_end; ++row) block_rows<min, parts, 1, num_panels>(buffers, rows, row, g, total());
  }
  for (int64_t r = row_begin; r < row_end; ++r)
    for (int p = 0; p < num_panels; ++p) store_panel(a, r, panel + p, panel_load(buffers.total[r - row_begin][p]));
}

template <BlockFormat format>
void tile_format(const MatmulW4A16& a, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
  if (row_end - row_begin <= kDirectRows) {
    int64_t row = row_begin;
    if constexpr (kWide)
      for (; row + 4 <= row_end; row += 4) stream_rows<format, 4, 2>(a, row, panel_begin, panel_end);
    for (; row + 2 <= row_end; row += 2) stream_rows<format, 2, 2>(a, row, panel_begin, panel_end);
    // Bytes of q8_0 come faster in one stream; nibbles take longer to decode than to come, and overlap over panels.
    constexpr int num_panels = format == BlockFormat::q8_0 ? 1 : kWide ? 4 : 2;
    for (; row < row_end; ++row) stream_rows<format, 1, num_panels>(a, row, panel_begin, panel_end);
    return;
  }
  for (int64_t row = row_begin; row < row_end; row += kRowBlock) {
    const int64_t end = row + kRowBlock < row_end ? row + kRowBlock : row_end;
    int64_t panel = panel_begin;
    for (; panel + kTilePanels <= panel_end; panel += kTilePanels)
      block_panels<format, kTilePanels>(a, row, end, panel);
    for (; panel < panel_end; ++panel) block_panels<format, 1>(a, row, end, panel);
  }
}

void tile(const MatmulW4A16& a, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
  with_format(a.weight.format,
              [&](auto format) { tile_format<format.value>(a, row_begin, row_end, panel_begin, panel_end); });
}

// The row's x in f32, rounded where it is to be.
void copy_row(const MatmulW4A16& a, int64_t row, float* copy) {
  const auto each_vec = [&](const auto* x, const auto& op) {
    for (int64_t k = 0; k < a.weight.num_cols; k += VecF::size) store(copy + k, op(load(x + row * a.x_row_stride + k)));
  };
  if (a.x_dtype == DType::bf16) return each_vec(static_cast<const bf16*>(a.x), [](VecF v) { return v; });
  each_vec(static_cast<const float*>(a.x), [](VecF v) {
    bf16 rounded[VecF::size];
    store(rounded, v);
    return load(rounded);
  });
}

void prepare(const MatmulW4A16& a, int64_t row_begin, int64_t row_end) {
  const Rows rows = prepared_rows(a);
  for (int64_t row = row_begin; row < row_end; ++row) {
    const float* x = rows.x + row * rows.x_row_stride;
    if (a.x_is_bf16()) copy_row(a, row, a.workspace + row * a.weight.num_cols);
    if (has_min(a.weight.format)) store_group_sums(a, row, x);
  }
}

}  // namespace

constinit const MatmulW4A16Isa matmul_w4a16 = {prepare, tile};

}  // namespace pe::PE_ISA
