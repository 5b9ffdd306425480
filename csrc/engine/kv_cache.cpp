#include "engine/kv_cache.h"

#include <algorithm>
#include <cstring>

#include "runtime/checked.h"
#include "runtime/error.h"

namespace pe {
namespace {

int64_t element_bytes(DType dtype) { return dtype == DType::f32 ? 4 : dtype == DType::bf16 ? 2 : 1; }

Checked data_bytes(const KvCacheConfig& c) {
  return Checked(c.num_kv_heads) * c.page_size * c.head_dim * element_bytes(c.dtype);
}

// K or V of one layer of one page, with the scales behind it.
Checked block_bytes(const KvCacheConfig& c) {
  const Checked scales = c.dtype == DType::i8 ? Checked(c.num_kv_heads) * c.page_size * 4 : Checked(0);
  return (data_bytes(c) + scales).align_up(Arena::kAlignment);
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
      base_(arena_.allocate(arena_.capacity())) {}

float* KvCache::scales_behind(void* block) const {
  if (config_.dtype != DType::i8) return nullptr;
  const int64_t num_bytes = config_.num_kv_heads * config_.page_size * config_.head_dim;
  return reinterpret_cast<float*>(static_cast<uint8_t*>(block) + num_bytes);
}

int64_t KvCache::page_stride() const { return page_bytes() / element_bytes(config_.dtype); }

const KvCache::Sequence& KvCache::sequence(int32_t seq) const {
  if (seq < 0 || static_cast<size_t>(seq) >= sequences_.size() || !sequences_[static_cast<size_t>(seq)].live)
    throw ArgumentError("sequence: expected the number of a live sequence, got " + std::to_string(seq));
  return sequences_[static_cast<size_t>(seq)];
}

int32_t KvCache::add_sequence(std::optional<std::string> salt) {
  if (free_sequences_.empty()) {
    free_sequences_.push_back(static_cast<int32_t>(sequences_.size()));
    sequences_.emplace_back();
  }
  const int32_t seq = free_sequences_.back();
  free_sequences_.pop_back();
  sequences_[static_cast<size_t>(seq)] = {.live = true, .pages = {}, .salt = std::move(salt), .tokens = {}};
  return seq;
}

int32_t KvCache::fork_sequence(int32_t seq) {
  if (const Sequence& s = sequence(seq); s.num_committed != s.length)
    throw ArgumentError("sequence: expected one whose claimed tokens are all computed, got " +
                        std::to_string(s.num_committed) + " of " + std::to_string(s.length));
  const int32_t child = add_sequence();
  sequence(child) = sequence(seq);
  for (const int32_t i : sequence(child).pages) hold_page(i);
  return child;
}

void KvCache::free_sequence(int32_t seq) {
  truncate(seq, 0);
  sequence(seq) = {};
  free_sequences_.push_back(seq);
}

void KvCache::truncate(int32_t seq, int64_t length) {
  Sequence& s = sequence(seq);
  if (length < 0 || length > s.length)
    throw ArgumentError("length: expected 0 to " + std::to_string(s.length) + ", got " + std::to_string(length));
  s.length = length;
  s.num_committed = std::min(s.num_committed, length);
  if (s.salt) s.tokens.resize(static_cast<size_t>(s.num_committed));
  const size_t keep = static_cast<size_t>((length + config_.page_size - 1) / config_.page_size);
  while (s.pages.size() > keep) {
    drop_page(s.pages.back());
    s.pages.pop_back();
  }
}

int64_t KvCache::adopt_prefix(int32_t seq, std::span<const int32_t> next_tokens) {
  Sequence& s = sequence(seq);
  const auto size = static_cast<size_t>(config_.page_size);
  if (!s.salt || s.num_committed != s.length || s.length % config_.page_size != 0) return 0;
  const int64_t before = s.length;
  for (; next_tokens.size() >= size; next_tokens = next_tokens.subspan(size)) {
    const int32_t parent = s.pages.empty() ? PrefixIndex::kNoPage : s.pages.back();
    const int32_t found = index_.find(parent, *s.salt, next_tokens.first(size));
    if (found == PrefixIndex::kNoPage) break;
    hold_page(found);
    s.pages.push_back(found);
    s.tokens.insert(s.tokens.end(), next_tokens.begin(), next_tokens.begin() + config_.page_size);
    s.length = s.num_committed = s.length + config_.page_size;
  }
  return s.length - before;
}

bool KvCache::writes_shared_page(const Sequence& s) const {
  return s.length % config_.page_size != 0 && (page(s.pages.back()).num_holders > 1 || index_.contains(s.pages.back()));
}

int64_t KvCache::pages_needed(int32_t seq, int64_t num_tokens) const {
  const Sequence& s = sequence(seq);
  if (num_tokens == 0) return 0;
  return (s.length + num_tokens + config_.page_size - 1) / config_.page_size - static_cast<int64_t>(s.pages.size()) +
         (writes_shared_page(s) ? 1 : 0);
}

void KvCache::grow(int32_t seq, int64_t num_tokens) {
  if (num_tokens < 0) throw ArgumentError("num_tokens: expected 0 or more, got " + std::to_string(num_tokens));
  int64_t needed = pages_needed(seq, num_tokens);
  if (needed > num_free_pages())
    throw CapacityError("key/value cache: " + std::to_string(num_tokens) + " more tokens need " +
                        std::to_string(needed) + " pages of " + std::to_string(config_.page_size) + " tokens, " +
                        std::to_string(num_free_pages()) + " of " + std::to_string(config_.num_pages) + " are free");
  if (num_tokens == 0) return;
  Sequence& s = sequence(seq);
  if (writes_shared_page(s)) {
    const int32_t shared = s.pages.back();
    s.pages.back() = take_page();
    copy_page(shared, s.pages.back());
    drop_page(shared);
    --needed;
  }
  for (; needed > 0; --needed) s.pages.push_back(take_page());
  s.length += num_tokens;
}

void KvCache::commit(int32_t seq, int32_t token) {
  Sequence& s = sequence(seq);
  if (s.num_committed == s.length)
    throw ArgumentError("sequence: expected one with claimed tokens to commit, got none in " + std::to_string(seq));
  ++s.num_committed;
  if (!s.salt) return;
  s.tokens.push_back(token);
  if (s.num_committed % config_.page_size == 0) share_last_page(s);
}

// Lists the page that was just filled, or takes the one that is listed already: they hold the same bits.
void KvCache::share_last_page(Sequence& s) {
  const auto i = static_cast<size_t>(s.num_committed / config_.page_size - 1);
  const int32_t parent = i == 0 ? PrefixIndex::kNoPage : s.pages[i - 1];
  const auto tokens = std::span(s.tokens).last(static_cast<size_t>(config_.page_size));
  const int32_t found = index_.find(parent, *s.salt, tokens);
  if (found == PrefixIndex::kNoPage) {
    index_.insert(s.pages[i], parent, *s.salt, tokens);
    return;
  }
  hold_page(found);
  drop_page(std::exchange(s.pages[i], found));
  ++stats_.num_merged_pages;
}

int64_t KvCache::num_free_pages() const {
  return config_.num_pages - static_cast<int64_t>(pages_.size()) + static_cast<int64_t>(free_pages_.size()) +
         static_cast<int64_t>(idle_.size());
}

// Used memory first, then the lowest unused page, so that a short run touches little.
int32_t KvCache::take_page() {
  int32_t i;
  if (!free_pages_.empty()) {
    i = free_pages_.back();
    free_pages_.pop_back();
  } else if (static_cast<int64_t>(pages_.size()) < config_.num_pages) {
    i = static_cast<int32_t>(pages_.size());
    pages_.emplace_back();
  } else {
    i = idle_.front();
    idle_.pop_front();
    index_.erase(i);
    ++stats_.num_evicted_pages;
  }
  page(i).num_holders = 1;
  return i;
}

void KvCache::hold_page(int32_t i) {
  if (page(i).num_holders++ == 0) idle_.erase(page(i).idle);
}

void KvCache::drop_page(int32_t i) {
  if (--page(i).num_holders > 0) return;
  if (index_.contains(i))
    page(i).idle = idle_.insert(idle_.end(), i);
  else
    free_pages_.push_back(i);
}

void KvCache::copy_page(int32_t from, int32_t to) {
  std::memcpy(base_ + to * page_bytes(), base_ + from * page_bytes(), static_cast<size_t>(page_bytes()));
  ++stats_.num_copied_pages;
}

}  // namespace pe
