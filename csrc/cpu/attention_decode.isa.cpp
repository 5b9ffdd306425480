// ISA: scalar avx2 avx512
#include "pe/attention_decode.h"

#include "simd/attention_rows.h"

namespace pe::PE_ISA {
namespace {

// The keys or values of one lane block, into the second-level cache.
template <class C>
void prefetch_lanes(const C* first, int64_t head_dim) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(C));
  for (int64_t i = 0; i < kLaneKeys * head_dim; i += kLine) __builtin_prefetch(first + i, 0, 2);
}

template <class T, class C>
void run_of_rows(const AttentionDecode& a, int64_t kv_head, int64_t row_begin, int64_t row_end, void* scratch) {
  const int64_t group_size = a.num_heads / a.num_kv_heads, head_begin = kv_head * group_size;
  const ForwardRows rows((row_end - row_begin) * group_size, a.head_dim, scratch);
  const T* q = static_cast<const T*>(a.q);
  for (int64_t t = row_begin, r = 0; t < row_end; ++t) {
    const int64_t end = int64_t{a.position[t]} + 1;
    const int64_t begin = a.sliding_window > 0 ? max_of(end - a.sliding_window, 0) : 0;
    for (int64_t h = head_begin; h < head_begin + group_size; ++h, ++r) {
      rows.ranges.begin[r] = begin;
      rows.ranges.end[r] = end;
      load_row(q + t * a.q_row_stride + h * a.q_head_stride, a.head_dim, rows.q_row(r));
    }
  }

  const int32_t* pages = a.block_table + a.seq[row_begin] * a.block_table_stride;
  const C* k_pages = static_cast<const C*>(a.k_pages);
  const C* v_pages = static_cast<const C*>(a.v_pages);
  const auto place = [&](int64_t key, const C** k, const C** v) {
    const int64_t page = pages[key / a.page_size];
    const int64_t offset = (kv_head * a.page_size + key % a.page_size) * a.head_dim;
    *k = k_pages + page * a.k_page_stride + offset;
    *v = v_pages + page * a.v_page_stride + offset;
  };
  const int64_t num_keys = int64_t{a.position[row_end - 1]} + 1;
  attend<C>(rows, a.scale, [&](int64_t base, int64_t key_begin, int64_t key_end) {
    KvBlock<C> kv{.k = {}, .v = {}, .v_row_stride = a.head_dim};
    for (int64_t b = (key_begin - base) / kLaneKeys; base + b * kLaneKeys < key_end; ++b)
      place(base + b * kLaneKeys, &kv.k[b], &kv.v[b]);
    // Pages lie anywhere, so no hardware foresees the next block.
    for (int64_t key = base + kBlockKeys; key < min_of(base + 2 * kBlockKeys, num_keys); key += kLaneKeys) {
      const C *k, *v;
      place(key, &k, &v);
      prefetch_lanes(k, a.head_dim);
      prefetch_lanes(v, a.head_dim);
    }
    return kv;
  });

  T* y = static_cast<T*>(a.y);
  for (int64_t t = row_begin, r = 0; t < row_end; ++t)
    for (int64_t h = head_begin; h < head_begin + group_size; ++h, ++r)
      rows.finish_row(r, y + t * a.y_row_stride + h * a.y_head_stride, nullptr);
}

void rows(const AttentionDecode& a, int64_t item_begin, int64_t item_end, void* scratch) {
  const bool f32 = a.dtype == DType::f32, cache_f32 = a.cache_dtype == DType::f32;
  const auto run = f32 ? (cache_f32 ? run_of_rows<float, float> : run_of_rows<float, bf16>)
                       : (cache_f32 ? run_of_rows<bf16, float> : run_of_rows<bf16, bf16>);
  // Items are numbered run by run, the kv heads of one run after each other.
  int64_t item = 0;
  for (int64_t begin = 0; begin < a.num_rows && item < item_end;) {
    const int64_t end = attention_decode_run_end(a, begin);
    for (int64_t kv_head = 0; kv_head < a.num_kv_heads; ++kv_head, ++item)
      if (item >= item_begin && item < item_end) run(a, kv_head, begin, end, scratch);
    begin = end;
  }
}

template <class T, class C>
void append_rows(const KvAppend& a, int64_t row_begin, int64_t row_end) {
  for (int64_t t = row_begin; t < row_end; ++t) {
    const int64_t position = a.position[t], slot = position % a.page_size;
    const int64_t page = a.block_table[a.seq[t] * a.block_table_stride + position / a.page_size];
    for (int64_t g = 0; g < a.num_kv_heads; ++g) {
      alignas(64) float row[kAttentionMaxHeadDim];
      alignas(64) C rounded[kAttentionMaxHeadDim];
      const auto keep = [](VecF v) { return v; };
      load_row(static_cast<const T*>(a.k) + t * a.k_row_stride + g * a.k_head_stride, a.head_dim, row);
      store_row(rounded, a.head_dim, row, keep);
      C* k = static_cast<C*>(a.k_pages) + page * a.k_page_stride +
             (g * a.page_size + slot / kLaneKeys * kLaneKeys) * a.head_dim + slot % kLaneKeys;
      for (int64_t d = 0; d < a.head_dim; ++d) k[d * kLaneKeys] = rounded[d];

      load_row(static_cast<const T*>(a.v) + t * a.v_row_stride + g * a.v_head_stride, a.head_dim, row);
      C* v = static_cast<C*>(a.v_pages) + page * a.v_page_stride + (g * a.page_size + slot) * a.head_dim;
      store_row(v, a.head_dim, row, keep);
    }
  }
}

void append(const KvAppend& a, int64_t row_begin, int64_t row_end) {
  const bool f32 = a.dtype == DType::f32, cache_f32 = a.cache_dtype == DType::f32;
  const auto run = f32 ? (cache_f32 ? append_rows<float, float> : append_rows<float, bf16>)
                       : (cache_f32 ? append_rows<bf16, float> : append_rows<bf16, bf16>);
  run(a, row_begin, row_end);
}

}  // namespace

constinit const AttentionDecodeIsa attention_decode = {rows, append};

}  // namespace pe::PE_ISA
