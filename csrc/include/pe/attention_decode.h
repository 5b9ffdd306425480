// attention_decode -- attention of any rows of several sequences over a paged cache of keys and values
//
// Serves decode (one row a sequence) and prefill in chunks (many rows); kv_append writes the cache. Inference only.
//
// Math       attention (pe/attention.h), causal: row t sees keys 0..position[t] of sequence seq[t], with a window only
//            the last sliding_window of them
// Cache      key j of a sequence lies in page block_table[seq][j / page_size], at o = j % page_size:
//            K page [num_kv_heads][page_size / 16][D][16]: (g, d) at [g][o / 16][d][o % 16], so that scores of 16 keys
//            are one chain of vector operations;  V page [num_kv_heads][page_size][D]: (g, d) at [g][o][d];  of an int8
//            cache also f32 scales of K and of V, a page of each [num_kv_heads][page_size]: g at [g][o]
// Shapes     q, y [T, H, D]; k, v [T, K, D] (append): last dimension contiguous, other strides in elements; H % K == 0,
//            1 <= D <= 256; seq, position [T]; block_table [num_seqs, block_table_stride]; page_size % 16 == 0
// Numerics   f32 | bf16 q and y, f32 | bf16 | int8 cache; arithmetic in f32; one rounding at the store of y, one in append.
//            int8: append quantises each head of a token as a row of quantize_int8; a score is (the dot product with the
//            int8 key) * its scale, a weight is multiplied by the scale of its value, nothing is dequantised on the way
//            round_q: f32 q is rounded to bf16, and q counts as bf16. Levels avx512_bf16 and above, q and cache bf16: as
//            attention
// Writes     y and the named slots are overwritten. What no row sees counts for nothing: pages may hold NaN there, and
//            table entries before a window or past the last position may be anything
// Order      a row of y has the same bits in any batch, chunk, page size and number of threads, and those of attention
//            on the stored k and v (in f32, unless q and cache are bf16). Rows of one append name different slots
// Cost       decode is memory bound: 2 * K * D * (position + 1) cache elements a row; rows of one sequence at
//            neighbouring positions share them
// Reference  pyengine/reference/attention_decode.py; Kwon et al. 2023, arXiv:2309.06180
#pragma once
#include <cstdint>

#include "pe/attention.h"
#include "pe/dtype.h"
#include "pe/isa.h"

namespace pe {

struct AttentionDecode {
  const void* q;
  const void* k_pages;
  const void* v_pages;
  void* y;
  const int32_t* seq;
  const int32_t* position;
  const int32_t* block_table;
  int64_t num_rows, num_heads, num_kv_heads, head_dim, page_size;
  int64_t q_row_stride, q_head_stride, y_row_stride, y_head_stride;
  int64_t k_page_stride, v_page_stride, block_table_stride;
  const float *k_scales, *v_scales;  // of an int8 cache, else nullptr
  int64_t k_scale_page_stride, v_scale_page_stride;
  int64_t sliding_window;  // 0: none
  float scale;
  DType dtype;           // of q and y
  DType cache_dtype;     // of k_pages and v_pages
  bool round_q = false;  // dtype f32 only: q is rounded to bf16 first
};

struct KvAppend {
  const void* k;
  const void* v;
  void* k_pages;
  void* v_pages;
  const int32_t* seq;
  const int32_t* position;
  const int32_t* block_table;
  int64_t num_rows, num_kv_heads, head_dim, page_size;
  int64_t k_row_stride, k_head_stride, v_row_stride, v_head_stride;
  int64_t k_page_stride, v_page_stride, block_table_stride;
  float *k_scales, *v_scales;  // of an int8 cache, else nullptr
  int64_t k_scale_page_stride, v_scale_page_stride;
  DType dtype;  // of k and v
  DType cache_dtype;
};

void attention_decode_cpu(const AttentionDecode& args);
void kv_append_cpu(const KvAppend& args);
void attention_decode_cuda(const AttentionDecode& args, void* stream);
void kv_append_cuda(const KvAppend& args, void* stream);

// A work item: one kv head and a run of rows, of one sequence, at positions that follow each other. All keys that some
// of its rows see, from key_begin (a multiple of kAttentionPartKeys) to key_end; or one part of them.
struct AttentionDecodeItem {
  int64_t row_begin, row_end, kv_head, key_begin, key_end;
  int64_t first_part;  // of a whole item: its parts are first_part, first_part + num_kv_heads, ... of the list of parts
};
// Writes the whole items, or all their parts, and returns how many there are; `items` nullptr: only counts.
int64_t attention_decode_items(const AttentionDecode& args, AttentionDecodeItem* items);
int64_t attention_decode_parts(const AttentionDecode& args, AttentionDecodeItem* parts);
// Whether so many whole items leave workers idle that parts are worth their merging; both give the same bits.
bool attention_decode_splits(int64_t num_items, int64_t num_parts, int num_workers);

// Scratch of one call of rows(), part() or merge(), which must be 64-byte aligned; it does not depend on the rows.
int64_t attention_decode_scratch_bytes(const AttentionDecode& args);
// Floats of the states of one part; those of part i lie i times as far from the first.
static inline int64_t attention_decode_part_floats(const AttentionDecode& args) {
  const int64_t group_size = args.num_heads / args.num_kv_heads;
  return attention_item_positions(group_size) * group_size * attention_state_floats(args.head_dim);
}

// What one ISA level provides. Threads are the caller's business.
struct AttentionDecodeIsa {
  void (*rows)(const AttentionDecode& args, const AttentionDecodeItem& item, void* scratch);
  // In place of rows(): every part of the item, then merge(). states: of the part; of the first part.
  void (*part)(const AttentionDecode& args, const AttentionDecodeItem& part, float* states, void* scratch);
  void (*merge)(const AttentionDecode& args, const AttentionDecodeItem& item, float* states, void* scratch);
  void (*append)(const KvAppend& args, int64_t row_begin, int64_t row_end);
};
PE_DECLARE_ISA_TABLE(AttentionDecodeIsa, attention_decode);
const AttentionDecodeIsa& attention_decode_isa();

}  // namespace pe
