// Paged key/value memory of all sequences of one decoder.
//
// A page holds `page_size` tokens of one sequence for every layer, so the memory touched follows the tokens held:
// [page][layer][k | v] blocks, whose layout belongs to attention_decode (pe/attention_decode.h). Pages are claimed when a
// sequence grows and returned when it is freed or cut.
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

#include "pe/dtype.h"
#include "runtime/arena.h"

namespace pe {

struct KvCacheConfig {
  int64_t num_layers, num_kv_heads, head_dim;
  int64_t page_size, num_pages;
  DType dtype;
};

class KvCache {
 public:
  explicit KvCache(const KvCacheConfig& config);

  // A new, empty sequence. Numbers of freed sequences are used again.
  int32_t add_sequence();
  void free_sequence(int32_t seq);
  // Drops the tokens from `length` on.
  void truncate(int32_t seq, int64_t length);

  int64_t length(int32_t seq) const { return sequence(seq).length; }
  // Pages that growing `seq` by `num_tokens` would claim.
  int64_t pages_needed(int32_t seq, int64_t num_tokens) const;
  // Claims pages for `num_tokens` more and counts them. All or nothing: throws CapacityError and changes nothing.
  void grow(int32_t seq, int64_t num_tokens);

  int64_t num_free_pages() const { return static_cast<int64_t>(free_pages_.size()); }
  int64_t num_pages() const { return config_.num_pages; }
  int64_t page_size() const { return config_.page_size; }
  DType dtype() const { return config_.dtype; }
  size_t num_bytes() const { return arena_.capacity(); }

  // First K (V) block of a layer; that of page p starts p * page_stride() elements further.
  void* k_pages(int64_t layer) const { return base_ + static_cast<size_t>(2 * layer) * block_bytes_; }
  void* v_pages(int64_t layer) const { return base_ + static_cast<size_t>(2 * layer + 1) * block_bytes_; }
  int64_t page_stride() const {
    return 2 * config_.num_layers * config_.num_kv_heads * config_.page_size * config_.head_dim;
  }
  const std::vector<int32_t>& pages(int32_t seq) const { return sequence(seq).pages; }

 private:
  struct Sequence {
    bool live = false;
    int64_t length = 0;
    std::vector<int32_t> pages;
  };
  const Sequence& sequence(int32_t seq) const;
  Sequence& sequence(int32_t seq) { return const_cast<Sequence&>(std::as_const(*this).sequence(seq)); }

  KvCacheConfig config_;
  Arena arena_;
  size_t block_bytes_;  // K or V of one layer of one page
  uint8_t* base_;
  std::vector<int32_t> free_pages_;
  std::vector<Sequence> sequences_;
  std::vector<int32_t> free_sequences_;
};

}  // namespace pe
