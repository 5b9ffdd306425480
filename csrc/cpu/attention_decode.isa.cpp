// ISA: scalar avx2 avx512 avx512_bf16
#include "pe/attention_decode.h"

#include "simd/attention_rows.h"
#include "simd/quantize_row.h"

namespace pe::PE_ISA {
namespace {

// T of q and y, C of the cache; with kRound, q is f32 and rounded to bf16.
template <class T, class C, bool kRound>
void run_of_rows(const AttentionDecode& a, int64_t kv_head, int64_t row_begin, int64_t row_end, void* scratch) {
  constexpr bool kPairs = kBf16Pairs && sizeof(C) == sizeof(bf16) && (kRound || sizeof(T) == sizeof(bf16));
  const int64_t group_size = a.num_heads / a.num_kv_heads, head_begin = kv_head * group_size;
  const ForwardRows rows((row_end - row_begin) * group_size, a.head_dim, scratch);
  const T* q = static_cast<const T*>(a.q);
  for (int64_t t = row_begin, r = 0; t < row_end; ++t) {
    const int64_t end = int64_t{a.position[t]} + 1;
    const int64_t begin = a.sliding_window > 0 ? max_of(end - a.sliding_window, 0) : 0;
    for (int64_t h = head_begin; h < head_begin + group_size; ++h, ++r) {
      rows.ranges.begin[r] = begin;
      rows.ranges.end[r] = end;
      const T* q_row = q + t * a.q_row_stride + h * a.q_head_stride;
      if constexpr (kRound && !kPairs) {
        alignas(64) bf16 rounded[kAttentionMaxHeadDim];
        store_row(rounded, a.head_dim, q_row, [](VecF v) { return v; });
        rows.template set_q<false>(r, rounded);
      } else {
        rows.template set_q<kPairs>(r, q_row);
      }
    }
  }

  const int32_t* pages = a.block_table + a.seq[row_begin] * a.block_table_stride;
  const C* k_pages = static_cast<const C*>(a.k_pages);
  const C* v_pages = static_cast<const C*>(a.v_pages);
  const auto slot_of = [&](int64_t key) { return kv_head * a.page_size + key % a.page_size; };
  const int64_t num_keys = int64_t{a.position[row_end - 1]} + 1;
  attend<C, kPairs>(rows, a.scale, [&](int64_t base, int64_t key_begin, int64_t key_end) {
    KvBlock<C> kv{};
    kv.v_row_stride = a.head_dim;
    for (int64_t b = (key_begin - base) / kLaneKeys; base + b * kLaneKeys < key_end; ++b) {
      const int64_t key = base + b * kLaneKeys, page = pages[key / a.page_size], slot = slot_of(key);
      kv.k[b] = k_pages + page * a.k_page_stride + slot * a.head_dim;
      kv.v[b] = v_pages + page * a.v_page_stride + slot * a.head_dim;
      if constexpr (sizeof(C) == 1) {
        kv.k_scales[b] = a.k_scales + page * a.k_scale_page_stride + slot;
        kv.v_scales[b] = a.v_scales + page * a.v_scale_page_stride + slot;
      }
    }
    for (int64_t b = 0; b < kLaneBlocks; ++b) {
      const int64_t key = base + kBlockKeys + b * kLaneKeys;
      if (key < num_keys) {
        const int64_t page = pages[key / a.page_size], slot = slot_of(key);
        kv.next_k[b] = k_pages + page * a.k_page_stride + slot * a.head_dim;
        kv.next_v[b] = v_pages + page * a.v_page_stride + slot * a.head_dim;
      } else {
        kv.next_k[b] = kv.k[b];
        kv.next_v[b] = kv.v[b];
      }
    }
    return kv;
  });

  T* y = static_cast<T*>(a.y);
  for (int64_t t = row_begin, r = 0; t < row_end; ++t)
    for (int64_t h = head_begin; h < head_begin + group_size; ++h, ++r)
      rows.finish_row(r, y + t * a.y_row_stride + h * a.y_head_stride, nullptr);
}

template <class T, bool kRound>
auto run_for(DType cache_dtype) {
  return cache_dtype == DType::f32    ? run_of_rows<T, float, kRound>
         : cache_dtype == DType::bf16 ? run_of_rows<T, bf16, kRound>
                                      : run_of_rows<T, int8_t, kRound>;
}

void rows(const AttentionDecode& a, int64_t item_begin, int64_t item_end, void* scratch) {
  const auto run = a.dtype == DType::bf16 ? run_for<bf16, false>(a.cache_dtype)
                   : a.round_q            ? run_for<float, true>(a.cache_dtype)
                                          : run_for<float, false>(a.cache_dtype);
  // Items are numbered run by run, the kv heads of one run after each other.
  int64_t item = 0;
  for (int64_t begin = 0; begin < a.num_rows && item < item_end;) {
    const int64_t end = attention_decode_run_end(a, begin);
    for (int64_t kv_head = 0; kv_head < a.num_kv_heads; ++kv_head, ++item)
      if (item >= item_begin && item < item_end) run(a, kv_head, begin, end, scratch);
    begin = end;
  }
}

// Writes one head of a token as the cache holds it; the scale is what an int8 cache needs beside it.
template <class T, class C>
float round_head(const T* head, int64_t head_dim, C* out) {
  if constexpr (sizeof(C) == 1) {
    return quantize_row(head, head_dim, out);
  } else {
    alignas(64) float row[kAttentionMaxHeadDim];
    load_row(head, head_dim, row);
    store_row(out, head_dim, row, [](VecF v) { return v; });
    return 1.0f;
  }
}

template <class T, class C>
void append_rows(const KvAppend& a, int64_t row_begin, int64_t row_end) {
  for (int64_t t = row_begin; t < row_end; ++t) {
    const int64_t position = a.position[t], slot = position % a.page_size;
    const int64_t page = a.block_table[a.seq[t] * a.block_table_stride + position / a.page_size];
    for (int64_t g = 0; g < a.num_kv_heads; ++g) {
      alignas(64) C rounded[kAttentionMaxHeadDim];
      const float k_scale =
          round_head(static_cast<const T*>(a.k) + t * a.k_row_stride + g * a.k_head_stride, a.head_dim, rounded);
      C* k = static_cast<C*>(a.k_pages) + page * a.k_page_stride +
             (g * a.page_size + slot / kLaneKeys * kLaneKeys) * a.head_dim + slot % kLaneKeys;
      for (int64_t d = 0; d < a.head_dim; ++d) k[d * kLaneKeys] = rounded[d];

      C* v = static_cast<C*>(a.v_pages) + page * a.v_page_stride + (g * a.page_size + slot) * a.head_dim;
      const float v_scale =
          round_head(static_cast<const T*>(a.v) + t * a.v_row_stride + g * a.v_head_stride, a.head_dim, v);
      if constexpr (sizeof(C) == 1) {
        a.k_scales[page * a.k_scale_page_stride + g * a.page_size + slot] = k_scale;
        a.v_scales[page * a.v_scale_page_stride + g * a.page_size + slot] = v_scale;
      }
    }
  }
}

template <class T>
auto append_for(DType cache_dtype) {
  return cache_dtype == DType::f32    ? append_rows<T, float>
         : cache_dtype == DType::bf16 ? append_rows<T, bf16>
                                      : append_rows<T, int8_t>;
}

void append(const KvAppend& a, int64_t row_begin, int64_t row_end) {
  const auto run = a.dtype == DType::f32 ? append_for<float>(a.cache_dtype) : append_for<bf16>(a.cache_dtype);
  run(a, row_begin, row_end);
}

}  // namespace

constinit const AttentionDecodeIsa attention_decode = {rows, append};

}  // namespace pe::PE_ISA
