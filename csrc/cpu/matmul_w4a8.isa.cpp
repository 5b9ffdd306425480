// ISA: scalar avx2 avx512 avx512_vnni
#include "pe/matmul_w4a8.h"

#include <math.h>

#include "simd/panel_dot.h"
#include "simd/panel_store.h"
#include "simd/w4a8_group.h"

namespace pe::PE_ISA {
namespace {

// Bytes between the group in work and the one being fetched: an L3 access takes the time of about 3 KB of stream.
constexpr int64_t kPrefetchBytes = 6 * 1024;

// Codes of two panels fill half of 32 wide registers.
constexpr bool kWide = VecF::size == 16;
constexpr int kBlockPanels = kWide ? 2 : 1;
// Running totals of a row block and two panels take 12 KB of L1.
constexpr int64_t kRowBlock = 96;

// --- activations ----------------------------------------------------------------------------------------------------

// Rounds one group; bits of magnitudes order like the magnitudes, with infinities and NaNs on top.
void quantize_group(const float* x, int8_t* values, float* scale, int32_t* sum, int32_t* first_sum) {
  constexpr uint32_t kInfinity = 0x7f800000u;
  uint32_t bits[kGroupSize], largest = 0;
  memcpy(bits, x, sizeof bits);
  for (int k = 0; k < kGroupSize; ++k) {
    const uint32_t magnitude = bits[k] & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  float max_abs;
  memcpy(&max_abs, &largest, sizeof max_abs);
  const bool finite = largest < kInfinity;
  if (!finite || max_abs < 0x1p-100f) {
    memset(values, 0, kGroupSize);
    *scale = finite ? 0.0f : NAN;
    *sum = *first_sum = 0;
    return;
  }
  const float inverse = 127.0f / max_abs;
  int32_t rounded[kGroupSize], total = 0;
  for (int k = 0; k < kGroupSize; ++k) rounded[k] = static_cast<int32_t>(rintf(x[k] * inverse));
  for (int k = 0; k < kGroupSize / 2; ++k) total += rounded[k];
  *first_sum = total;
  for (int k = kGroupSize / 2; k < kGroupSize; ++k) total += rounded[k];
  for (int k = 0; k < kGroupSize; ++k) values[k] = static_cast<int8_t>(rounded[k]);
  *scale = max_abs / 127.0f;
  *sum = total;
}

template <class T>
void quantize(const MatmulW4A8& a, int64_t row_begin, int64_t row_end) {
  const int64_t num_groups = a.weight.num_cols / kGroupSize;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_row_stride;
    const QuantizedRow q = quantized_row(a, row);
    for (int64_t g = 0; g < num_groups; ++g) {
      alignas(64) float group[kGroupSize];
      for (int64_t k = 0; k < kGroupSize; k += VecF::size) store(group + k, load(x + g * kGroupSize + k));
      quantize_group(group, const_cast<int8_t*>(q.values) + g * kGroupSize, const_cast<float*>(q.scales) + g,
                     const_cast<int32_t*>(q.sums) + g, const_cast<int32_t*>(q.first_sums) + g);
    }
  }
}

void quantize_rows(const MatmulW4A8& a, int64_t row_begin, int64_t row_end) {
  a.x_dtype == DType::f32 ? quantize<float>(a, row_begin, row_end) : quantize<bf16>(a, row_begin, row_end);
}

// --- one group of a panel -------------------------------------------------------------------------------------------

template <BlockFormat format>
struct PanelGroup {
  DotCodes<format> codes;
  W4A8Scales scales[scale_groups(format)];
};

template <BlockFormat format>
[[gnu::always_inline]] inline PanelGroup<format> load_group(const uint8_t* panel, int64_t g) {
  PanelGroup<format> group;
  group.codes = load_dot_codes<format>(panel + group_offset(format, g));
  unroll<scale_groups(format)>([&](auto part)
                                   PE_INLINE { group.scales[part] = load_group_scales<format>(panel, g, part); });
  return group;
}

// total + the contribution of group g: the only place where codes meet activations.
template <BlockFormat format>
[[gnu::always_inline]] inline PanelF add_group(const PanelGroup<format>& group, const QuantizedRow& x, int64_t g,
                                               PanelF total) {
  constexpr int parts = scale_groups(format);
  unroll<parts>([&](auto part) PE_INLINE {
    const int32_t sum = x.sum<parts>(g, part);
    const PanelI i = dot<part>(group.codes, x.values + g * kGroupSize, panel_int(-zero_code(format) * sum));
    total = add_w4a8_group<has_min(format)>(group.scales[part], i, x.scales[g], sum, total);
  });
  return total;
}

// --- one row: weights go from the stream to the dot product; one panel at a time keeps that a single stream ---------

template <BlockFormat format>
void stream_panel(const MatmulW4A8& a, int64_t row, int64_t panel) {
  const uint8_t* packed = a.weight.packed + panel * panel_bytes(format, a.weight.num_cols);
  const QuantizedRow x = quantized_row(a, row);
  PanelF total = panel_set1(0.0f);
  for (int64_t g = 0; g < a.weight.num_cols / kGroupSize; ++g) {
    prefetch_group<format>(packed, g, kPrefetchBytes);
    total = add_group(load_group<format>(packed, g), x, g, total);
  }
  store_panel(a, row, panel, total);
}

// --- several rows: a group stays in registers for all rows of a block -----------------------------------------------

template <BlockFormat format, int num_panels>
void block_panels(const MatmulW4A8& a, int64_t row_begin, int64_t row_end, int64_t panel) {
  const int64_t num_cols = a.weight.num_cols, panel_stride = panel_bytes(format, num_cols);
  const int64_t num_rows = row_end - row_begin, x_row_bytes = quantized_row_bytes(num_cols);
  const uint8_t* packed = a.weight.packed + panel * panel_stride;
  alignas(64) float totals[kRowBlock][num_panels][kPanelRows];
  for (int64_t r = 0; r < num_rows; ++r)
    for (int p = 0; p < num_panels; ++p) panel_store(totals[r][p], panel_set1(0.0f));

  for (int64_t g = 0; g < num_cols / kGroupSize; ++g) {
    PanelGroup<format> group[num_panels];
    PE_UNROLL for (int p = 0; p < num_panels; ++p) {
      prefetch_group<format>(packed + p * panel_stride, g, kPrefetchBytes / num_panels);
      group[p] = load_group<format>(packed + p * panel_stride, g);
    }
    QuantizedRow x = quantized_row(a, row_begin);
    for (int64_t r = 0; r < num_rows; ++r) {
      PE_UNROLL for (int p = 0; p < num_panels; ++p) {
        panel_store(totals[r][p], add_group(group[p], x, g, panel_load(totals[r][p])));
      }
      x.values += x_row_bytes;
      x.scales += x_row_bytes / static_cast<int64_t>(sizeof(float));
      x.sums += x_row_bytes / static_cast<int64_t>(sizeof(int32_t));
      x.first_sums += x_row_bytes / static_cast<int64_t>(sizeof(int32_t));
    }
  }
  for (int64_t r = 0; r < num_rows; ++r)
    for (int p = 0; p < num_panels; ++p) store_panel(a, row_begin + r, panel + p, panel_load(totals[r][p]));
}

template <BlockFormat format>
void tile_format(const MatmulW4A8& a, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
  for (int64_t row = row_begin; row < row_end; row += kRowBlock) {
    const int64_t end = row + kRowBlock < row_end ? row + kRowBlock : row_end;
    if (end - row == 1) {
      for (int64_t panel = panel_begin; panel < panel_end; ++panel) stream_panel<format>(a, row, panel);
      continue;
    }
    int64_t panel = panel_begin;
    for (; panel + kBlockPanels <= panel_end; panel += kBlockPanels)
      block_panels<format, kBlockPanels>(a, row, end, panel);
    for (; panel < panel_end; ++panel) block_panels<format, 1>(a, row, end, panel);
  }
}

void tile(const MatmulW4A8& a, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
  with_format(a.weight.format,
              [&](auto format) { tile_format<format.value>(a, row_begin, row_end, panel_begin, panel_end); });
}

}  // namespace

constinit const MatmulW4A8Isa matmul_w4a8 = {quantize_rows, tile};

}  // namespace pe::PE_ISA
