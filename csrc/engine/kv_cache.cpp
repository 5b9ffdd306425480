#include "engine/kv_cache.h"

#include <string>
#include <utility>

#include "runtime/checked.h"
#include "runtime/error.h"

namespace pe {
namespace {

// A multiple of a cache line: page_size is one of 16, and head_dim even.
Checked block_bytes(const KvCacheConfig& c) {
  return Checked(c.num_kv_heads) * c.page_size * c.head_dim * (c.dtype == DType::f32 ? 4 : 2);
}

size_t total_bytes(const KvCacheConfig& c) {
  return (block_bytes(c) * 2 * c.num_layers * c.num_pages).get_or<size_t>([&] {
    throw CapacityError("key/value cache: " + std::to_string(c.num_pages) + " pages of " + std::to_string(c.page_size) +
                        " tokens need more than 2^64 bytes");
  });
}

}  // namespace

KvCache::KvCache(const KvCacheConfig& config)
    : config_(config),
      arena_(total_bytes(config), "key/value cache"),
      block_bytes_(arena_.capacity() / static_cast<size_t>(2 * config.num_layers * config.num_pages)),
      base_(arena_.allocate(arena_.capacity())) {
  // The lowest page is taken first, so a short run touches little memory.
  for (int64_t page = config.num_pages; page-- > 0;) free_pages_.push_back(static_cast<int32_t>(page));
}

const KvCache::Sequence& KvCache::sequence(int32_t seq) const {
  if (seq < 0 || static_cast<size_t>(seq) >= sequences_.size() || !sequences_[static_cast<size_t>(seq)].live)
    throw ArgumentError("sequence: expected the number of a live sequence, got " + std::to_string(seq));
  return sequences_[static_cast<size_t>(seq)];
}

int32_t KvCache::add_sequence() {
  if (free_sequences_.empty()) {
    free_sequences_.push_back(static_cast<int32_t>(sequences_.size()));
    sequences_.emplace_back();
  }
  const int32_t seq = free_sequences_.back();
  free_sequences_.pop_back();
  sequences_[static_cast<size_t>(seq)] = {.live = true, .length = 0, .pages = {}};
  return seq;
}

void KvCache::free_sequence(int32_t seq) {
  truncate(seq, 0);
  sequence(seq).live = false;
  free_sequences_.push_back(seq);
}

void KvCache::truncate(int32_t seq, int64_t length) {
  Sequence& s = sequence(seq);
  if (length < 0 || length > s.length)
    throw ArgumentError("length: expected 0 to " + std::to_string(s.length) + ", got " + std::to_string(length));
  s.length = length;
  const size_t keep = static_cast<size_t>((length + config_.page_size - 1) / config_.page_size);
  while (s.pages.size() > keep) {
    free_pages_.push_back(s.pages.back());
    s.pages.pop_back();
  }
}

int64_t KvCache::pages_needed(int32_t seq, int64_t num_tokens) const {
  const Sequence& s = sequence(seq);
  return (s.length + num_tokens + config_.page_size - 1) / config_.page_size - static_cast<int64_t>(s.pages.size());
}

void KvCache::grow(int32_t seq, int64_t num_tokens) {
  const int64_t needed = pages_needed(seq, num_tokens);
  if (needed > num_free_pages())
    throw CapacityError("key/value cache: " + std::to_string(num_tokens) + " more tokens need " +
                        std::to_string(needed) + " pages of " + std::to_string(config_.page_size) + " tokens, " +
                        std::to_string(num_free_pages()) + " of " + std::to_string(config_.num_pages) + " are free");
  Sequence& s = sequence(seq);
  for (int64_t i = 0; i < needed; ++i) {
    s.pages.push_back(free_pages_.back());
    free_pages_.pop_back();
  }
  s.length += num_tokens;
}

}  // namespace pe
