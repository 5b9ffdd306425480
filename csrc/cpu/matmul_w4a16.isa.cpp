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
constexpr int kHalf = kBlockSize / 2;

struct Rows {
  const float* x;
  int64_t x_row_stride;
  GroupSums sum_x;
  int64_t num_groups;
};

Rows prepared_rows(const MatmulW4A16& a) {
  const int64_t num_groups = a.weight.num_cols / kBlockSize;
  const GroupSums sum_x = group_sums(a);
  if (!a.x_is_bf16()) return {static_cast<const float*>(a.x), a.x_row_stride, sum_x, num_groups};
  return {a.workspace, a.weight.num_cols, sum_x, num_groups};
}

// --- one group of weights -------------------------------------------------------------------------------------------

// Consecutive codes, as floats.
template <int count>
struct CodeRun {
  PanelF code[count];
};

// The codes k ... k + 3, which are one vector of words. Half 0 of a group is its k below 16, half 1 the others.
template <BlockFormat format, int half>
[[gnu::always_inline]] inline CodeRun<4> decode(const uint8_t* group, int k) {
  if constexpr (format == BlockFormat::q8_0) {
    const Codes codes = load_codes(group + k * kPanelRows);
    return {{byte<0>(codes), byte<1>(codes), byte<2>(codes), byte<3>(codes)}};
  } else {
    const Codes codes = load_codes(group + (k - kHalf * half) * kPanelRows);
    return {{nibble<half>(codes), nibble<half + 2>(codes), nibble<half + 4>(codes), nibble<half + 6>(codes)}};
  }
}

template <BlockFormat format>
struct PackedGroup {
  const uint8_t* first;  // of the first panel
  int64_t panel_stride;
  static constexpr int kRun = 4;
  template <int half>
  [[gnu::always_inline]] CodeRun<kRun> codes(int panel, int k) const {
    return decode<format, half>(first + panel * panel_stride, k);
  }
};

struct DecodedGroup {
  const float* first;             // [panel][k][16]
  static constexpr int kRun = 1;  // no more: the sums need the registers
  template <int half>
  [[gnu::always_inline]] CodeRun<kRun> codes(int panel, int k) const {
    return {{panel_load(first + (panel * kBlockSize + k) * kPanelRows)}};
  }
};

// The only place where codes meet activations: k ascending, whatever the number of rows and panels.
template <int half, int num_rows, int num_panels, class Group>
[[gnu::always_inline]] inline void add_half(const Group& group, const float* x, int64_t x_row_stride,
                                            PanelF (&s)[num_rows][num_panels]) {
  for (int k = kHalf * half; k < kHalf * (half + 1); k += Group::kRun) {
    CodeRun<Group::kRun> run[num_panels];
    PE_UNROLL for (int p = 0; p < num_panels; ++p) run[p] = group.template codes<half>(p, k);
    PE_UNROLL for (int i = 0; i < Group::kRun; ++i) {
      PE_UNROLL for (int r = 0; r < num_rows; ++r) {
        const PanelF value = panel_set1(x[r * x_row_stride + k + i]);
        PE_UNROLL for (int p = 0; p < num_panels; ++p) s[r][p] = fma(run[p].code[i], value, s[r][p]);
      }
    }
  }
}

template <int num_rows, int num_panels, class Group>
[[gnu::always_inline]] inline void dot_group(const Group& group, const float* x, int64_t x_row_stride,
                                             PanelF (&s)[num_rows][num_panels]) {
  PE_UNROLL for (int r = 0; r < num_rows; ++r) {
    PE_UNROLL for (int p = 0; p < num_panels; ++p) s[r][p] = panel_set1(0.0f);
  }
  add_half<0>(group, x, x_row_stride, s);
  add_half<1>(group, x, x_row_stride, s);
}

// --- few rows: weights go from the stream to the sums ---------------------------------------------------------------

template <BlockFormat format, int num_rows, int num_panels>
void stream_panels(const MatmulW4A16& a, int64_t row, int64_t panel) {
  constexpr int64_t group_bytes = packed_group_bytes(format);
  constexpr int64_t ahead = (kPrefetchBytes + num_panels * group_bytes - 1) / (num_panels * group_bytes);
  const Rows rows = prepared_rows(a);
  const int64_t num_groups = rows.num_groups, panel_stride = num_groups * group_bytes;
  const uint8_t* group = a.weight.packed + panel * panel_stride;
  const float* x = rows.x + row * rows.x_row_stride;
  PanelF total[num_rows][num_panels];
  PE_UNROLL for (int r = 0; r < num_rows; ++r) {
    PE_UNROLL for (int p = 0; p < num_panels; ++p) total[r][p] = panel_set1(0.0f);
  }
  for (int64_t g = 0; g < num_groups; ++g, group += group_bytes, x += kBlockSize) {
    // Past the last group of a panel come the groups of the panel that takes its place.
    const int64_t skip = g + ahead < num_groups ? 0 : (num_panels - 1) * panel_stride;
    PE_UNROLL for (int p = 0; p < num_panels; ++p) {
      prefetch<group_bytes>(group + p * panel_stride + ahead * group_bytes + skip);
    }
    PanelF s[num_rows][num_panels];
    dot_group(PackedGroup<format>{group, panel_stride}, x, rows.x_row_stride, s);
    PE_UNROLL for (int p = 0; p < num_panels; ++p) {
      const W4A16Scales scales = load_w4a16_scales<format>(group + p * panel_stride);
      PE_UNROLL for (int r = 0; r < num_rows; ++r) {
        total[r][p] = add_w4a16_group<format>(scales, s[r][p], rows.sum_x, row + r, g, total[r][p]);
      }
    }
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
  alignas(64) float codes[kTilePanels][kBlockSize][kPanelRows];
  alignas(64) float total[kRowBlock][kTilePanels][kPanelRows];
};

template <BlockFormat format, int half>
[[gnu::always_inline]] inline void decode_half(const uint8_t* group, float (&codes)[kBlockSize][kPanelRows]) {
  for (int k = kHalf * half; k < kHalf * (half + 1); k += 4) {
    const CodeRun<4> run = decode<format, half>(group, k);
    PE_UNROLL for (int i = 0; i < 4; ++i) panel_store(codes[k + i], run.code[i]);
  }
}

template <BlockFormat format, int num_rows, int num_panels>
void block_rows(const BlockBuffers& in, const W4A16Scales* scales, const Rows& rows, int64_t row, int64_t group,
                float (*total)[kTilePanels][kPanelRows]) {
  PanelF s[num_rows][num_panels];
  dot_group(DecodedGroup{in.codes[0][0]}, rows.x + row * rows.x_row_stride + group * kBlockSize, rows.x_row_stride, s);
  PE_UNROLL for (int r = 0; r < num_rows; ++r) {
    PE_UNROLL for (int p = 0; p < num_panels; ++p) {
      panel_store(total[r][p],
                  add_w4a16_group<format>(scales[p], s[r][p], rows.sum_x, row + r, group, panel_load(total[r][p])));
    }
  }
}

template <BlockFormat format, int num_panels>
void block_panels(const MatmulW4A16& a, int64_t row_begin, int64_t row_end, int64_t panel) {
  constexpr int64_t group_bytes = packed_group_bytes(format);
  const Rows rows = prepared_rows(a);
  const int64_t num_groups = rows.num_groups, panel_stride = num_groups * group_bytes;
  const uint8_t* packed = a.weight.packed + panel * panel_stride;
  BlockBuffers buffers;
  for (int64_t r = 0; r < row_end - row_begin; ++r)
    for (int p = 0; p < num_panels; ++p) panel_store(buffers.total[r][p], panel_set1(0.0f));

  for (int64_t g = 0; g < num_groups; ++g, packed += group_bytes) {
    W4A16Scales scales[num_panels];
    PE_UNROLL for (int p = 0; p < num_panels; ++p) {
      const uint8_t* group = packed + p * panel_stride;
      prefetch<group_bytes>(group + kPrefetchBytes / num_panels);
      scales[p] = load_w4a16_scales<format>(group);
      decode_half<format, 0>(group, buffers.codes[p]);
      decode_half<format, 1>(group, buffers.codes[p]);
    }
    int64_t row = row_begin;
    const auto total = [&] { return buffers.total + (row - row_begin); };
    for (; row + kTileRows <= row_end; row += kTileRows)
      block_rows<format, kTileRows, num_panels>(buffers, scales, rows, row, g, total());
    for (; row + kTileRows / 3 <= row_end; row += kTileRows / 3)
      block_rows<format, kTileRows / 3, num_panels>(buffers, scales, rows, row, g, total());
    for (; row < row_end; ++row) block_rows<format, 1, num_panels>(buffers, scales, rows, row, g, total());
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
  switch (a.weight.format) {
    case BlockFormat::q4_0:
      return tile_format<BlockFormat::q4_0>(a, row_begin, row_end, panel_begin, panel_end);
    case BlockFormat::q4_1:
      return tile_format<BlockFormat::q4_1>(a, row_begin, row_end, panel_begin, panel_end);
    case BlockFormat::q8_0:
      return tile_format<BlockFormat::q8_0>(a, row_begin, row_end, panel_begin, panel_end);
  }
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
    if (a.weight.format == BlockFormat::q4_1) store_group_sums(rows.sum_x, row, x);
  }
}

}  // namespace

constinit const MatmulW4A16Isa matmul_w4a16 = {prepare, tile};

}  // namespace pe::PE_ISA
