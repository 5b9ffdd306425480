// ISA: scalar avx2 avx512 avx512_bf16
#include "pe/attention_decode.h"

#include "simd/attention_rows.h"
#include "simd/quantize_row.h"
#include "simd/unroll.h"

namespace pe::PE_ISA {
namespace {

// One kv head of a run of rows. T of q and y, C of the cache; with kRound, q is f32 and rounded to bf16.
template <class T, class C, bool kRound>
struct Run {
  static constexpr bool kPairs = kBf16Pairs && sizeof(C) == sizeof(bf16) && (kRound || sizeof(T) == sizeof(bf16));

  const AttentionDecode& a;
  const AttentionDecodeItem& item;
  const int64_t group_size = a.num_heads / a.num_kv_heads, head_begin = item.kv_head * group_size;
  const ForwardRows rows;

  Run(const AttentionDecode& args, const AttentionDecodeItem& item_, void* scratch)
      : a(args),
        item(item_),
        rows((item_.row_end - item_.row_begin) * (args.num_heads / args.num_kv_heads), args.head_dim, scratch) {
    for (int64_t t = item.row_begin, r = 0; t < item.row_end; ++t) {
      const int64_t end = int64_t{a.position[t]} + 1;
      const int64_t begin = a.sliding_window > 0 ? max_of(end - a.sliding_window, 0) : 0;
      for (int64_t h = 0; h < group_size; ++h, ++r) {
        rows.ranges.begin[r] = begin;
        rows.ranges.end[r] = end;
      }
    }
  }

  void set_queries() const {
    for (int64_t t = item.row_begin, r = 0; t < item.row_end; ++t) {
      for (int64_t h = head_begin; h < head_begin + group_size; ++h, ++r) {
        const T* q = static_cast<const T*>(a.q) + t * a.q_row_stride + h * a.q_head_stride;
        if constexpr (kRound && !kPairs) {
          alignas(64) bf16 rounded[kAttentionMaxHeadDim];
          store_row(rounded, a.head_dim, q, [](VecF v) { return v; });
          rows.template set_q<false>(r, rounded);
        } else {
          rows.template set_q<kPairs>(r, q);
        }
      }
    }
  }

  // Walks lane blocks from one whose page is looked up by division.
  struct Cursor {
    const AttentionDecode& a;
    const int32_t* page;
    int64_t head, offset;  // of the lane block in its page

    Cursor(const AttentionDecode& args, const int32_t* pages, int64_t kv_head, int64_t key)
        : a(args), page(pages + key / args.page_size), head(kv_head), offset(key % args.page_size) {}
    int64_t slot() const { return head * a.page_size + offset; }
    const C* k() const { return static_cast<const C*>(a.k_pages) + *page * a.k_page_stride + slot() * a.head_dim; }
    const C* v() const { return static_cast<const C*>(a.v_pages) + *page * a.v_page_stride + slot() * a.head_dim; }
    void advance() {
      offset += kLaneKeys;
      if (offset == a.page_size) {
        offset = 0;
        ++page;
      }
    }
  };

  // Where the keys lie. Behind the last block of this item comes the first one of the next head, as items follow.
  auto kv_blocks() const {
    return [this, pages = a.block_table + a.seq[item.row_begin] * a.block_table_stride](int64_t base, int64_t key_begin,
                                                                                        int64_t key_end) {
      KvBlock<C> kv{};
      kv.v_row_stride = a.head_dim;
      const int64_t first = key_begin / kLaneKeys * kLaneKeys;
      const bool is_last = base + kBlockKeys >= item.key_end;
      int64_t next_key = is_last ? item.key_begin : first + kBlockKeys;
      const int64_t next_end = item.kv_head + is_last < a.num_kv_heads ? item.key_end : 0;
      Cursor here(a, pages, item.kv_head, first), next(a, pages, item.kv_head + is_last, next_key);
      for (int64_t key = first; key < key_end; key += kLaneKeys, here.advance()) {
        const int64_t b = (key - base) / kLaneKeys;
        kv.k[b] = kv.next_k[b] = here.k();
        kv.v[b] = kv.next_v[b] = here.v();
        if constexpr (sizeof(C) == 1) {
          kv.k_scales[b] = a.k_scales + *here.page * a.k_scale_page_stride + here.slot();
          kv.v_scales[b] = a.v_scales + *here.page * a.v_scale_page_stride + here.slot();
        }
        if (next_key < next_end) {
          kv.next_k[b] = next.k();
          kv.next_v[b] = next.v();
          next.advance();
          next_key += kLaneKeys;
        }
      }
      return kv;
    };
  }

  void finish() const {
    for (int64_t t = item.row_begin, r = 0; t < item.row_end; ++t)
      for (int64_t h = head_begin; h < head_begin + group_size; ++h, ++r)
        rows.finish_row(r, static_cast<T*>(a.y) + t * a.y_row_stride + h * a.y_head_stride, nullptr);
  }

  // All keys at once.
  void whole() const {
    set_queries();
    attend<C, kPairs>(rows, a.scale, kv_blocks());
    finish();
  }

  // One part, into `states`.
  void part(float* states) const {
    set_queries();
    attend_part<C, kPairs>(rows, item.key_begin, a.scale, kv_blocks());
    const int64_t num_floats = rows.ranges.num_rows * attention_state_floats(a.head_dim);
    for (int64_t i = 0; i < num_floats; ++i) states[i] = rows.part_states[i];
  }

  // The sum of all parts, whose states lie `stride` floats apart.
  void merge(float* states) const {
    const int64_t stride = a.num_kv_heads * attention_decode_part_floats(a);
    for (int64_t part = item.key_begin; part < item.key_end; part += kAttentionPartKeys, states += stride)
      rows.add_part(states, part);
    finish();
  }
};

// Calls body(run) with the run of `item`, of whichever types.
template <class Body>
void with_run(const AttentionDecode& a, const AttentionDecodeItem& item, void* scratch, const Body& body) {
  const auto with_cache = [&]<class T, int kRound>(T, Index<kRound>) {
    switch (a.cache_dtype) {
      case DType::f32:
        return body(Run<T, float, kRound>(a, item, scratch));
      case DType::bf16:
        return body(Run<T, bf16, kRound>(a, item, scratch));
      default:
        return body(Run<T, int8_t, kRound>(a, item, scratch));
    }
  };
  if (a.dtype == DType::bf16) return with_cache(bf16{}, Index<0>{});
  a.round_q ? with_cache(float{}, Index<1>{}) : with_cache(float{}, Index<0>{});
}

void rows(const AttentionDecode& a, const AttentionDecodeItem& item, void* scratch) {
  with_run(a, item, scratch, [](const auto& run) { run.whole(); });
}

void part(const AttentionDecode& a, const AttentionDecodeItem& item, float* states, void* scratch) {
  with_run(a, item, scratch, [&](const auto& run) { run.part(states); });
}

void merge(const AttentionDecode& a, const AttentionDecodeItem& item, float* states, void* scratch) {
  with_run(a, item, scratch, [&](const auto& run) { run.merge(states); });
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

constinit const AttentionDecodeIsa attention_decode = {rows, part, merge, append};

}  // namespace pe::PE_ISA
