// Paged key/value memory of all sequences of one decoder.
//
// A page holds `page_size` tokens of one history for every layer, so the memory touched follows the tokens held:
// [page][layer][k | v] blocks, whose layout belongs to attention_decode (pe/attention_decode.h). Sequences may hold the
// same page: it is counted, and copied before a holder writes into it. A full page of a sequence with a salt is listed in
// a PrefixIndex; when nobody holds it any more it stays, until its memory is needed: least recently used first.
#pragma once
#include <cstdint>
#include <list>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "engine/prefix_index.h"
#include "pe/dtype.h"
#include "runtime/arena.h"

namespace pe {

struct KvCacheConfig {
  int64_t num_layers, num_kv_heads, head_dim;
  int64_t page_size, num_pages;
  DType dtype;  // f32, bf16 or i8
};

class KvCache {
 public:
  struct Stats {
    int64_t num_evicted_pages = 0;  // idle pages whose memory was taken
    int64_t num_copied_pages = 0;   // before a write into a page that others hold
    int64_t num_merged_pages = 0;   // filled again while a page of the same history was there, and given back
  };

  explicit KvCache(const KvCacheConfig& config);

  // A new, empty sequence. Numbers of freed sequences are used again. Full pages are shared with sequences of an equal
  // salt, and not at all without one.
  int32_t add_sequence(std::optional<std::string> salt = std::nullopt);
  // A new sequence with the tokens and pages of `seq`, all of whose tokens are committed.
  int32_t fork_sequence(int32_t seq);
  void free_sequence(int32_t seq);
  // Drops the tokens from `length` on.
  void truncate(int32_t seq, int64_t length);
  // Appends the pages that hold the next tokens of `seq`, as many as are there and full; returns their tokens.
  int64_t adopt_prefix(int32_t seq, std::span<const int32_t> next_tokens);

  // Claimed tokens, and those of them whose keys and values are written.
  int64_t length(int32_t seq) const { return sequence(seq).length; }
  int64_t num_committed(int32_t seq) const { return sequence(seq).num_committed; }
  // Pages that growing `seq` by `num_tokens` would claim, copies included.
  int64_t pages_needed(int32_t seq, int64_t num_tokens) const;
  // Claims memory for `num_tokens` more. All or nothing: throws CapacityError and changes nothing.
  void grow(int32_t seq, int64_t num_tokens);
  // The next claimed slot of `seq` now holds `token`.
  void commit(int32_t seq, int32_t token);

  // Pages that can be claimed: unused ones, and idle ones of the index.
  int64_t num_free_pages() const;
  int64_t num_pages() const { return config_.num_pages; }
  int64_t num_indexed_pages() const { return index_.size(); }
  int64_t page_size() const { return config_.page_size; }
  DType dtype() const { return config_.dtype; }
  size_t num_bytes() const { return arena_.capacity(); }
  const Stats& stats() const { return stats_; }

  // First K (V) block of a layer; that of page p starts p * page_stride() elements further.
  void* k_pages(int64_t layer) const { return base_ + static_cast<size_t>(2 * layer) * block_bytes_; }
  void* v_pages(int64_t layer) const { return base_ + static_cast<size_t>(2 * layer + 1) * block_bytes_; }
  int64_t page_stride() const;
  // The scales of the first block, with their stride from page to page; nullptr unless the cache is int8.
  float* k_scales(int64_t layer) const { return scales_behind(k_pages(layer)); }
  float* v_scales(int64_t layer) const { return scales_behind(v_pages(layer)); }
  int64_t scale_page_stride() const { return page_bytes() / 4; }
  const std::vector<int32_t>& pages(int32_t seq) const { return sequence(seq).pages; }

 private:
  struct Page {
    int32_t num_holders = 0;
    std::list<int32_t>::iterator idle;  // its place in idle_, if it is there
  };
  struct Sequence {
    bool live = false;
    int64_t length = 0, num_committed = 0;
    std::vector<int32_t> pages;
    std::optional<std::string> salt;
    std::vector<int32_t> tokens;  // the committed ones, if there is a salt
  };
  const Sequence& sequence(int32_t seq) const;
  Sequence& sequence(int32_t seq) { return const_cast<Sequence&>(std::as_const(*this).sequence(seq)); }

  Page& page(int32_t i) { return pages_[static_cast<size_t>(i)]; }
  const Page& page(int32_t i) const { return pages_[static_cast<size_t>(i)]; }
  int64_t page_bytes() const { return static_cast<int64_t>(block_bytes_) * 2 * config_.num_layers; }
  float* scales_behind(void* block) const;
  int32_t take_page();
  void hold_page(int32_t i);
  void drop_page(int32_t i);
  void copy_page(int32_t from, int32_t to);
  // Whether the next token of `s` goes into a page that must stay as it is.
  bool writes_shared_page(const Sequence& s) const;
  void share_last_page(Sequence& s);

  KvCacheConfig config_;
  Arena arena_;
  size_t block_bytes_;  // K or V of one layer of one page
  uint8_t* base_;
  std::vector<Page> pages_;  // those that were ever in use
  std::vector<int32_t> free_pages_;
  // Pages of the index that nobody holds, least recently used first. Who holds a page holds its ancestors, and lets the
  // last page go first: so a page stands before its parent.
  std::list<int32_t> idle_;
  PrefixIndex index_;
  std::vector<Sequence> sequences_;
  std::vector<int32_t> free_sequences_;
  Stats stats_;
};

}  // namespace pe
