// ISA: avx512_bf16
#include "pe/matmul_w4a16.h"
#include "simd/bf16_codes.h"
#include "simd/bf16_pairs.h"
#include "simd/panel_store.h"
#include "simd/unroll.h"
#include "simd/w4a16_group.h"

namespace pe::PE_ISA {
namespace {

// Bytes between the group in work and the one being fetched.
constexpr int64_t kPrefetchBytes = 6 * 1024;
// Running totals of a row block take 6 KB of L1.
constexpr int64_t kRowBlock = 96;
// Rows whose chains run side by side: two for each.
constexpr int kTileRows = 4;
constexpr int kHalf = kGroupSize / 2, kPairs = kHalf / 2;  // of one half of a group

// --- activations ----------------------------------------------------------------------------------------------------

// x of a group: its pairs in the order in which they are added.
__m512i pair_up(__m512i x) {
  const __m256i order = _mm256_setr_epi16(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
  return _mm512_permutexvar_epi16(
      _mm512_inserti64x4(_mm512_castsi256_si512(order), _mm256_add_epi16(order, _mm256_set1_epi16(16)), 1), x);
}

bf16* paired_row(const MatmulW4A16& a, int64_t row) {
  return reinterpret_cast<bf16*>(a.workspace) + row * a.weight.num_cols;
}

// --- codes ----------------------------------------------------------------------------------------------------------

// The pairs of one half of a group, for the 16 rows of the panel: bf16 codes k and k + 2 in a lane.
template <BlockFormat format, int half>
[[gnu::always_inline]] inline void decode_half(const uint8_t* group, __m512i (&pairs)[kPairs]) {
  unroll<kPairs / 2>([&](auto j) PE_INLINE {
    if constexpr (stored_bits(format) == 8) {
      const CodeRun<4> run = code_run<format, half * 4 + j>(group);
      pairs[2 * j] = bf16_pair(run.code[0], run.code[2]);
      pairs[2 * j + 1] = bf16_pair(run.code[1], run.code[3]);
    } else if constexpr (stored_bits(format) == 4) {
      const Codes codes = load_codes(group + j * 64);
      pairs[2 * j] = bf16_of_words<format>(half ? _mm512_srli_epi16(codes, 4) : codes);
      pairs[2 * j + 1] = bf16_of_words<format>(_mm512_srli_epi16(codes, 8 + 4 * half));
    } else {
      const Codes codes = quad<format, half * 4 + j>(group);
      pairs[2 * j] = bf16_of_words<format>(codes);
      pairs[2 * j + 1] = bf16_of_words<format>(_mm512_srli_epi16(codes, 8));
    }
  });
}

struct GroupCodes {
  __m512i half[2][kPairs];
};

template <BlockFormat format>
[[gnu::always_inline]] inline GroupCodes decode(const uint8_t* group) {
  GroupCodes codes;
  decode_half<format, 0>(group, codes.half[0]);
  decode_half<format, 1>(group, codes.half[1]);
  return codes;
}

// --- products -------------------------------------------------------------------------------------------------------

// s[r][part]: scale group `part` of rows x, x + x_row_stride, ...: the only place where codes meet activations.
template <int num_rows, int parts>
[[gnu::always_inline]] inline void dot_group(const GroupCodes& codes, const bf16* x, int64_t x_row_stride,
                                             PanelF (&s)[num_rows][parts]) {
  VecF sum[num_rows][2];
  PE_UNROLL for (int r = 0; r < num_rows; ++r) sum[r][0] = sum[r][1] = set1(0.0f);
  PE_UNROLL for (int i = 0; i < kPairs; ++i) {
    PE_UNROLL for (int r = 0; r < num_rows; ++r) {
      PE_UNROLL for (int half = 0; half < 2; ++half) {
        sum[r][half] = add_pair(sum[r][half], codes.half[half][i], x + r * x_row_stride + half * kHalf + i * 2);
      }
    }
  }
  PE_UNROLL for (int r = 0; r < num_rows; ++r) {
    if constexpr (parts == 1) {
      s[r][0].part[0] = add(sum[r][0], sum[r][1]);
    } else {
      s[r][0].part[0] = sum[r][0];
      s[r][1].part[0] = sum[r][1];
    }
  }
}

template <BlockFormat format>
struct PanelGroup {
  static constexpr int kParts = scale_groups(format);
  GroupCodes codes;
  W4A16Scales scales[kParts];

  [[gnu::always_inline]] PanelGroup(const uint8_t* panel, int64_t g)
      : codes(decode<format>(panel + group_offset(format, g))) {
    unroll<kParts>([&](auto part) PE_INLINE { scales[part] = load_w4a16_scales<format>(panel, g, part); });
  }
  [[gnu::always_inline]] PanelF add(const PanelF (&s)[kParts], const GroupSums& sum_x, int64_t row, int64_t g,
                                    PanelF total) const {
    unroll<kParts>([&](auto part) PE_INLINE {
      total = add_w4a16_group<has_min(format)>(scales[part], s[part], sum_x, row, g * kParts + part, total);
    });
    return total;
  }
};

// --- one row: weights go from the stream to the sums, one panel at a time -------------------------------------------

template <BlockFormat format>
void stream_panel(const MatmulW4A16& a, int64_t row, int64_t panel) {
  const GroupSums sum_x = group_sums(a);
  const uint8_t* packed = a.weight.packed + panel * panel_bytes(format, a.weight.num_cols);
  const bf16* x = paired_row(a, row);
  PanelF total = panel_set1(0.0f);
  for (int64_t g = 0; g < a.weight.num_cols / kGroupSize; ++g, x += kGroupSize) {
    prefetch_group<format>(packed, g, kPrefetchBytes);
    const PanelGroup<format> group(packed, g);
    PanelF s[1][scale_groups(format)];
    dot_group(group.codes, x, 0, s);
    total = group.add(s[0], sum_x, row, g, total);
  }
  store_panel(a, row, panel, total);
}

// --- several rows: the codes of a group stay in registers for all rows of a block -----------------------------------

template <BlockFormat format>
void block_panel(const MatmulW4A16& a, int64_t row_begin, int64_t row_end, int64_t panel) {
  const int64_t num_cols = a.weight.num_cols;
  const GroupSums sum_x = group_sums(a);
  const uint8_t* packed = a.weight.packed + panel * panel_bytes(format, num_cols);
  alignas(64) float totals[kRowBlock][kPanelRows];
  for (int64_t r = 0; r < row_end - row_begin; ++r) panel_store(totals[r], panel_set1(0.0f));

  for (int64_t g = 0; g < num_cols / kGroupSize; ++g) {
    prefetch_group<format>(packed, g, kPrefetchBytes);
    const PanelGroup<format> group(packed, g);
    const bf16* x = paired_row(a, row_begin) + g * kGroupSize;
    int64_t row = row_begin;
    const auto add_rows = [&]<int num_rows>(Index<num_rows>) PE_INLINE {
      PanelF s[num_rows][scale_groups(format)];
      dot_group(group.codes, x, num_cols, s);
      PE_UNROLL for (int r = 0; r < num_rows; ++r) {
        float* total = totals[row - row_begin + r];
        panel_store(total, group.add(s[r], sum_x, row + r, g, panel_load(total)));
      }
      row += num_rows;
      x += num_rows * num_cols;
    };
    while (row + kTileRows <= row_end) add_rows(Index<kTileRows>{});
    while (row < row_end) add_rows(Index<1>{});
  }
  for (int64_t row = row_begin; row < row_end; ++row) store_panel(a, row, panel, panel_load(totals[row - row_begin]));
}

template <BlockFormat format>
void tile_format(const MatmulW4A16& a, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
  for (int64_t row = row_begin; row < row_end; row += kRowBlock) {
    const int64_t end = row + kRowBlock < row_end ? row + kRowBlock : row_end;
    for (int64_t panel = panel_begin; panel < panel_end; ++panel)
      end - row == 1 ? stream_panel<format>(a, row, panel) : block_panel<format>(a, row, end, panel);
  }
}

// x in bf16 takes the pairs for any number of rows, so that a row has the same bits in every batch.
void tile(const MatmulW4A16& a, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
  if (!a.x_is_bf16()) return avx512::matmul_w4a16.tile(a, row_begin, row_end, panel_begin, panel_end);
  with_format(a.weight.format,
              [&](auto format) { tile_format<format.value>(a, row_begin, row_end, panel_begin, panel_end); });
}

// Pairs take half of the workspace that a copy in f32 would.
void prepare(const MatmulW4A16& a, int64_t row_begin, int64_t row_end) {
  if (!a.x_is_bf16()) return avx512::matmul_w4a16.prepare(a, row_begin, row_end);
  const auto prepare_rows = [&](const auto* x) {
    for (int64_t row = row_begin; row < row_end; ++row) {
      bf16* paired = paired_row(a, row);
      for (int64_t k = 0; k < a.weight.num_cols; k += VecF::size) store(paired + k, load(x + row * a.x_row_stride + k));
      if (has_min(a.weight.format)) store_group_sums(a, row, paired);
      for (int64_t k = 0; k < a.weight.num_cols; k += kGroupSize)
        _mm512_storeu_si512(paired + k, pair_up(_mm512_loadu_si512(paired + k)));
    }
  };
  a.x_dtype == DType::f32 ? prepare_rows(static_cast<const float*>(a.x)) : prepare_rows(static_cast<const bf16*>(a.x));
}

}  // namespace

constinit const MatmulW4A16Isa matmul_w4a16 = {prepare, tile};

}  // namespace pe::PE_ISA
