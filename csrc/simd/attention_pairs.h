// The two products of attention in pairs of bf16 (VDPBF16PS): q, k, v, and the weights rounded to bf16. A step adds two
// elements of one row: neighbours in d for scores, keys 2i and 2i + 1 by absolute index for values. Included by
// simd/attention_rows.h.
#pragma once
#if defined(__AVX512BF16__)
#include "simd/bf16_pairs.h"
#endif

namespace pe::PE_ISA {

#if defined(__AVX512BF16__)
constexpr bool kBf16Pairs = true;
#else
constexpr bool kBf16Pairs = false;
#endif

#if defined(__AVX512BF16__)

constexpr int64_t kPairVec = 32;  // elements of one row that a vector holds

// As the dot_vecs of floats. A last odd d is paired with zero; rows are zero behind it.
template <int R, int N>
static inline void dot_vecs(const bf16* const* rows, const bf16* const* lanes, const bf16* const* next, int64_t begin,
                            int64_t end, float* const* scores) {
  VecF acc[R][N];
  PE_UNROLL for (int r = 0; r < R; ++r) { PE_UNROLL for (int n = 0; n < N; ++n) acc[r][n] = set1(0.0f); }
  const auto add_step = [&](int64_t d, const auto& load_two) PE_INLINE {
    __m512i key[N];
    PE_UNROLL for (int n = 0; n < N; ++n) {
      key[n] = interleave_halves(load_two(lanes[n] + d * kLaneKeys));
      __builtin_prefetch(next[n] + d * kLaneKeys, 0, 2);
    }
    PE_UNROLL for (int r = 0; r < R; ++r) {
      PE_UNROLL for (int n = 0; n < N; ++n) acc[r][n] = add_pair(acc[r][n], key[n], rows[r] + d);
    }
  };
  for (int64_t d = begin; d + 2 <= end; d += 2) add_step(d, load_32);
  if ((end - begin) % 2) add_step(end - 1, load_16);
  PE_UNROLL for (int r = 0; r < R; ++r) {
    PE_UNROLL for (int n = 0; n < N; ++n) {
      float* score = scores[r] + n * VecF::size;
      store(score, begin == 0 ? acc[r][n] : add(load(score), acc[r][n]));
    }
  }
}

// sums[r] += the pairs of keys [lo, hi) times values[.][d0 ...], N vectors of 32, the last cut by `mask`. Sums stand in
// the order of the two halves of each 128 bits: unpacked() brings them back.
template <int R, int N>
static inline void accumulate_pair_vecs(const bf16* const* weights, int lo, int hi, const bf16* const* values,
                                        const bf16* const* next_values, int64_t row_stride, int64_t d0, __mmask32 mask,
                                        float* const* sums) {
  VecF sum[R][N][2];
  const auto each_sum = [&](const auto& body) PE_INLINE {
    PE_UNROLL for (int r = 0; r < R; ++r) {
      PE_UNROLL for (int n = 0; n < N; ++n) {
        PE_UNROLL for (int half = 0; half < 2; ++half) body(sum[r][n][half], sums[r] + d0 + n * kPairVec + half * 16);
      }
    }
  };
  each_sum([](VecF& s, const float* p) PE_INLINE { s = load(p); });
  // Keys j and j + 1, or one of them and zero.
  const auto add_keys = [&](int64_t j, auto has_first, auto has_second) PE_INLINE {
    const int64_t lane_block = j / kLaneKeys, first_row = j % kLaneKeys * row_stride + d0;
    const bf16 *row = values[lane_block] + first_row, *next = next_values[lane_block] + first_row;
    __m512i pairs[N][2];
    PE_UNROLL for (int n = 0; n < N; ++n) {
      const __mmask32 here = n + 1 == N ? mask : ~__mmask32{0};
      const bf16* at = row + n * kPairVec;
      __builtin_prefetch(next + n * kPairVec, 0, 2);
      __builtin_prefetch(next + n * kPairVec + row_stride, 0, 2);
      const __m512i zero = _mm512_setzero_si512();
      const __m512i first = has_first ? _mm512_maskz_loadu_epi16(here, at) : zero;
      const __m512i second = has_second ? _mm512_maskz_loadu_epi16(here, at + row_stride) : zero;
      pairs[n][0] = _mm512_unpacklo_epi16(first, second);
      pairs[n][1] = _mm512_unpackhi_epi16(first, second);
    }
    PE_UNROLL for (int r = 0; r < R; ++r) {
      PE_UNROLL for (int n = 0; n < N; ++n) {
        PE_UNROLL for (int half = 0; half < 2; ++half) sum[r][n][half] =
            add_pair(sum[r][n][half], pairs[n][half], weights[r] + j);
      }
    }
  };
  if (lo % 2) add_keys(lo - 1, Index<0>{}, Index<1>{});
  int64_t j = (lo + 1) / 2 * 2;
  for (; j + 2 <= hi; j += 2) add_keys(j, Index<1>{}, Index<1>{});
  if (j < hi) add_keys(j, Index<1>{}, Index<0>{});
  each_sum([](const VecF& s, float* p) PE_INLINE { store(p, s); });
}

template <int R>
static void accumulate_pair_range(const bf16* const* weights, int lo, int hi, const bf16* const* values,
                                  const bf16* const* next, int64_t row_stride, int64_t head_dim, float* const* sums) {
  int64_t d = 0;
  for (; head_dim - d >= 2 * kPairVec; d += 2 * kPairVec)
    accumulate_pair_vecs<R, 2>(weights, lo, hi, values, next, row_stride, d, ~__mmask32{0}, sums);
  for (; d < head_dim; d += kPairVec) {
    const int64_t left = head_dim - d;
    const __mmask32 mask = left >= kPairVec ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
    accumulate_pair_vecs<R, 1>(weights, lo, hi, values, next, row_stride, d, mask, sums);
  }
}

// acc[d ... d + 32) = acc * scale + sums, of which the last may lie past the padded head.
static inline void add_unpacked(float* acc, const float* sums, VecF scale, bool has_second) {
  const __m512 low = load(sums).v, high = load(sums + 16).v;
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  store(acc, fma(load(acc), scale, {_mm512_permutex2var_ps(low, first, high)}));
  if (has_second) store(acc + 16, fma(load(acc + 16), scale, {_mm512_permutex2var_ps(low, second, high)}));
}

// As the accumulate_tile of floats. Rows that end at different keys share whole pairs only, so that a pair is one step
// for every row that sees both of its keys.
template <int R>
static inline void accumulate_tile(const RowTile& tile, const bf16 (*weights)[kBlockKeys], const bf16* const* values,
                                   const bf16* const* next, int64_t row_stride, int64_t head_dim, const float* factor,
                                   float* const* acc) {
  alignas(64) float block_sums[R][kAttentionMaxHeadDim];
  const bf16* w[R];
  float* sums[R];
  int lo = tile.lo[0], hi = tile.hi[0];
  bool same_lo = true, same_hi = true;
  for (int r = 0; r < R; ++r) {
    w[r] = weights[r];
    sums[r] = block_sums[r];
    fill_zero(sums[r], (head_dim + kPairVec - 1) / kPairVec * kPairVec);
    same_lo = same_lo && tile.lo[r] == tile.lo[0];
    same_hi = same_hi && tile.hi[r] == tile.hi[0];
    lo = tile.lo[r] > lo ? tile.lo[r] : lo;
    hi = tile.hi[r] < hi ? tile.hi[r] : hi;
  }
  if (!same_lo) lo = (lo + 1) / 2 * 2;
  if (!same_hi) hi = hi / 2 * 2;
  if (lo >= hi) lo = hi = kBlockKeys;  // nothing in common: each row is its own first part
  for (int r = 0; r < R; ++r) {
    const int end = tile.hi[r] < lo ? tile.hi[r] : lo;
    if (tile.lo[r] < end)
      accumulate_pair_range<1>(w + r, tile.lo[r], end, values, next, row_stride, head_dim, sums + r);
  }
  if (lo < hi) accumulate_pair_range<R>(w, lo, hi, values, next, row_stride, head_dim, sums);
  for (int r = 0; r < R; ++r) {
    if (hi < tile.hi[r]) accumulate_pair_range<1>(w + r, hi, tile.hi[r], values, next, row_stride, head_dim, sums + r);
    for (int64_t d = 0; d < head_dim; d += kPairVec)
      add_unpacked(acc[r] + d, sums[r] + d, set1(factor[r]), padded(head_dim) - d > 16);
  }
}

#endif

}  // namespace pe::PE_ISA
