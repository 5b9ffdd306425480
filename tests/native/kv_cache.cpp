// The paged cache: where blocks lie, who shares them, what is evicted, and thousands of random events.
#include "engine/kv_cache.h"

#include <algorithm>
#include <cstdint>
#include <map>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "runtime/error.h"

using pe::ArgumentError;
using pe::CapacityError;
using pe::DType;
using pe::KvCache;
using pe::KvCacheConfig;
using pe::PrefixIndex;

namespace {

constexpr KvCacheConfig kConfig{
    .num_layers = 3, .num_kv_heads = 2, .head_dim = 6, .page_size = 16, .num_pages = 12, .dtype = DType::f32};

// Blocks do not overlap, fill the cache, and those of one page lie together; the scales of an int8 block lie behind it.
void test_layout(DType dtype, int64_t page_size, int64_t element_bytes) {
  KvCacheConfig config = kConfig;
  config.dtype = dtype;
  config.page_size = page_size;
  const KvCache cache(config);
  const int64_t num_values = config.num_kv_heads * config.page_size * config.head_dim;
  const int64_t num_scales = dtype == DType::i8 ? config.num_kv_heads * config.page_size : 0;
  const int64_t block_bytes =
      static_cast<int64_t>(pe::Arena::rounded(static_cast<size_t>(num_values * element_bytes + num_scales * 4)));
  const int64_t page_bytes = 2 * config.num_layers * block_bytes;
  CHECK(cache.num_bytes() == static_cast<size_t>(config.num_pages * page_bytes));
  CHECK(cache.scale_page_stride() * 4 == page_bytes && cache.page_stride() * element_bytes == page_bytes);
  for (int64_t layer = 0; layer < config.num_layers; ++layer) {
    CHECK((cache.k_scales(layer) != nullptr) == (dtype == DType::i8));
    if (dtype != DType::i8) continue;
    CHECK(reinterpret_cast<uint8_t*>(cache.k_scales(layer)) ==
          static_cast<uint8_t*>(cache.k_pages(layer)) + num_values);
    CHECK(reinterpret_cast<uint8_t*>(cache.v_scales(layer)) ==
          static_cast<uint8_t*>(cache.v_pages(layer)) + num_values);
  }
  const auto* base = static_cast<const uint8_t*>(cache.k_pages(0));
  std::vector<bool> taken(static_cast<size_t>(config.num_pages * 2 * config.num_layers));
  for (int64_t page = 0; page < config.num_pages; ++page)
    for (int64_t layer = 0; layer < config.num_layers; ++layer)
      for (const void* blocks : {cache.k_pages(layer), cache.v_pages(layer)}) {
        const int64_t begin = static_cast<const uint8_t*>(blocks) - base + page * cache.page_stride() * element_bytes;
        CHECK(begin % 64 == 0 && begin % block_bytes == 0);
        CHECK(begin / page_bytes == page);
        CHECK(!taken[static_cast<size_t>(begin / block_bytes)]);
        taken[static_cast<size_t>(begin / block_bytes)] = true;
      }
}

void test_sizes_that_wrap() {
  KvCacheConfig config = kConfig;
  config.num_layers = config.num_kv_heads = config.num_pages = int64_t{1} << 31;
  CHECK(throws<CapacityError>([&] { KvCache cache(config); }));
}

using Tokens = std::vector<int32_t>;

Tokens count_from(int32_t first, int64_t count) {
  Tokens tokens(static_cast<size_t>(count));
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

void append(KvCache& cache, int32_t seq, const Tokens& tokens) {
  cache.grow(seq, static_cast<int64_t>(tokens.size()));
  for (const int32_t token : tokens) cache.commit(seq, token);
}

// A sequence of `tokens` that came and went.
void pass(KvCache& cache, const std::string& salt, const Tokens& tokens) {
  const int32_t seq = cache.add_sequence(salt);
  cache.adopt_prefix(seq, tokens);
  append(cache, seq, Tokens(tokens.begin() + cache.length(seq), tokens.end()));
  cache.free_sequence(seq);
}

int64_t hit(KvCache& cache, const std::optional<std::string>& salt, const Tokens& tokens) {
  const int32_t seq = cache.add_sequence(salt);
  const int64_t num_tokens = cache.adopt_prefix(seq, tokens);
  cache.free_sequence(seq);
  return num_tokens;
}

void test_full_pages_are_found_again() {
  KvCache cache(kConfig);
  const Tokens tokens = count_from(0, 50);
  pass(cache, "a", tokens);
  CHECK(cache.num_free_pages() == kConfig.num_pages);
  CHECK(hit(cache, "a", tokens) == 48);
  CHECK(hit(cache, "a", count_from(0, 47)) == 32);
  CHECK(hit(cache, "a", count_from(0, 15)) == 0);
  CHECK(hit(cache, "a", count_from(1, 50)) == 0);
  CHECK(hit(cache, "b", tokens) == 0);
  CHECK(hit(cache, "", tokens) == 0);
  CHECK(hit(cache, std::nullopt, tokens) == 0);
  Tokens other = tokens;
  other[20] = 99;
  CHECK(hit(cache, "a", other) == 16);
  // The second page is the same, its history is not.
  other = tokens;
  other[3] = 99;
  CHECK(hit(cache, "a", other) == 0);
}

void test_without_salt_nothing_stays() {
  KvCache cache(kConfig);
  const int32_t seq = cache.add_sequence();
  append(cache, seq, count_from(0, 40));
  CHECK(cache.num_indexed_pages() == 0);
  cache.free_sequence(seq);
  CHECK(hit(cache, std::nullopt, count_from(0, 40)) == 0);
}

void test_equal_pages_become_one() {
  KvCache cache(kConfig);
  const int32_t a = cache.add_sequence("s"), b = cache.add_sequence("s"), c = cache.add_sequence("t");
  for (const int32_t seq : {a, b, c}) append(cache, seq, count_from(0, 40));
  CHECK(cache.stats().num_merged_pages == 2);
  CHECK(cache.num_free_pages() == kConfig.num_pages - 2 - 1 - 1 - 3);
  CHECK(cache.pages(a)[1] == cache.pages(b)[1] && cache.pages(a)[2] != cache.pages(b)[2]);
  CHECK(cache.pages(a)[0] != cache.pages(c)[0]);
}

// The last page of a history goes before its first, the history that was used long ago before the recent one, and what
// is held stays.
void test_eviction() {
  KvCache cache(kConfig);
  const Tokens old_tokens = count_from(0, 48), new_tokens = count_from(100, 48), held_tokens = count_from(200, 48);
  pass(cache, "", old_tokens);
  pass(cache, "", new_tokens);
  const int32_t held = cache.add_sequence("");
  append(cache, held, held_tokens);
  const int32_t filler = cache.add_sequence();
  cache.grow(filler, 3 * 16);
  CHECK(cache.stats().num_evicted_pages == 0);
  CHECK(hit(cache, "", old_tokens) == 48);  // now new_tokens are the older ones
  for (const auto& [old_hit, new_hit] : {std::pair{48, 32}, {48, 16}, {48, 0}, {32, 0}, {16, 0}, {0, 0}}) {
    cache.grow(filler, 16);
    const int32_t probe_old = cache.add_sequence(""), probe_new = cache.add_sequence("");
    // Newest first, so that the probes keep the order of the two.
    CHECK(cache.adopt_prefix(probe_new, new_tokens) == new_hit);
    CHECK(cache.adopt_prefix(probe_old, old_tokens) == old_hit);
    cache.free_sequence(probe_new);
    cache.free_sequence(probe_old);
  }
  CHECK(hit(cache, "", held_tokens) == 48);
  CHECK(cache.num_free_pages() == 0);
  CHECK(cache.stats().num_evicted_pages == 6);
  CHECK(throws<CapacityError>([&] { cache.grow(filler, 1); }));
  CHECK(cache.length(filler) == 9 * 16 && cache.pages(filler).size() == 9);
}

void test_fork_shares_and_copies() {
  KvCache cache(kConfig);
  const int32_t parent = cache.add_sequence();
  append(cache, parent, count_from(0, 20));
  const int32_t child = cache.fork_sequence(parent), grandchild = cache.fork_sequence(child);
  CHECK(cache.num_free_pages() == kConfig.num_pages - 2);
  CHECK(cache.length(child) == 20 && cache.pages(child) == cache.pages(parent));
  CHECK(cache.pages_needed(child, 1) == 1 && cache.pages_needed(child, 13) == 2 && cache.pages_needed(child, 0) == 0);
  append(cache, child, {50});
  append(cache, parent, {60});
  CHECK(cache.stats().num_copied_pages == 2);
  // The last holder writes in place.
  CHECK(cache.pages_needed(grandchild, 1) == 0);
  append(cache, grandchild, {70});
  CHECK(cache.stats().num_copied_pages == 2);
  CHECK(cache.pages(parent)[0] == cache.pages(child)[0] && cache.pages(child)[0] == cache.pages(grandchild)[0]);
  for (const int32_t seq : {parent, grandchild, child}) cache.free_sequence(seq);
  CHECK(cache.num_free_pages() == kConfig.num_pages);

  const int32_t pending = cache.add_sequence();
  cache.grow(pending, 1);
  CHECK(throws<ArgumentError>([&] { cache.fork_sequence(pending); }));
  CHECK(throws<ArgumentError>([&] { cache.fork_sequence(child); }));
}

void test_a_listed_page_is_not_written_after_truncate() {
  KvCache cache(kConfig);
  const int32_t seq = cache.add_sequence("");
  append(cache, seq, count_from(0, 32));
  cache.truncate(seq, 20);
  CHECK(cache.pages_needed(seq, 1) == 1);
  append(cache, seq, count_from(90, 12));
  CHECK(cache.stats().num_copied_pages == 1);
  CHECK(hit(cache, "", count_from(0, 32)) == 32);
  Tokens other = count_from(0, 20);
  for (const int32_t token : count_from(90, 12)) other.push_back(token);
  CHECK(hit(cache, "", other) == 32);
}

// Tokens that are claimed and not committed can be taken back, full pages of them too: nobody finds these.
void test_rejected_tokens() {
  for (const std::optional<std::string>& salt : {std::optional<std::string>(), std::optional<std::string>("")}) {
    KvCache cache(kConfig);
    const int32_t seq = cache.add_sequence(salt);
    const int64_t num_listed = salt ? 1 : 0;
    append(cache, seq, count_from(0, 14));
    cache.grow(seq, 40);
    for (int32_t token = 14; token < 17; ++token) cache.commit(seq, token);
    CHECK(cache.num_committed(seq) == 17 && cache.length(seq) == 54 && cache.pages(seq).size() == 4);
    cache.truncate(seq, cache.num_committed(seq));
    CHECK(cache.length(seq) == 17 && cache.pages(seq).size() == 2);
    CHECK(cache.num_free_pages() == kConfig.num_pages - 2 && cache.num_indexed_pages() == num_listed);
    // The same slots again, now for other tokens.
    append(cache, seq, count_from(60, 15));
    CHECK(cache.stats().num_copied_pages == 0 && cache.num_indexed_pages() == 2 * num_listed);
    CHECK(hit(cache, salt, count_from(0, 32)) == 16 * num_listed);
    cache.free_sequence(seq);
    CHECK(cache.num_free_pages() == kConfig.num_pages);
  }
}

// A fork writes proposals into a copy; taking them back leaves the page of its parent alone.
void test_rejected_tokens_of_a_fork() {
  KvCache cache(kConfig);
  const int32_t parent = cache.add_sequence("");
  append(cache, parent, count_from(0, 20));
  const int32_t child = cache.fork_sequence(parent);
  cache.grow(child, 30);
  CHECK(cache.stats().num_copied_pages == 1 && cache.pages(child).size() == 4);
  cache.commit(child, 20);
  cache.truncate(child, 21);
  CHECK(cache.pages(child)[0] == cache.pages(parent)[0] && cache.pages(child)[1] != cache.pages(parent)[1]);
  CHECK(cache.length(parent) == 20 && cache.num_free_pages() == kConfig.num_pages - 3);
  // Whoever starts behind the shared page of both finds one page, not the proposals.
  CHECK(cache.num_indexed_pages() == 1);
  cache.free_sequence(parent);
  cache.free_sequence(child);
  CHECK(cache.num_free_pages() == kConfig.num_pages);
}

void test_arguments() {
  KvCache cache(kConfig);
  const int32_t seq = cache.add_sequence();
  CHECK(throws<ArgumentError>([&] { cache.commit(seq, 0); }));
  CHECK(throws<ArgumentError>([&] { cache.grow(seq, -1); }));
  CHECK(throws<ArgumentError>([&] { cache.truncate(seq, 1); }));
  for (const int32_t bad : {-1, seq + 1, 1 << 30}) CHECK(throws<ArgumentError>([&] { cache.length(bad); }));
  cache.free_sequence(seq);
  CHECK(throws<ArgumentError>([&] { cache.free_sequence(seq); }));
}

// With every hash in one bucket the index finds what a map finds.
void test_index_against_a_map(int hash_bits) {
  PrefixIndex index(hash_bits);
  struct Key {
    int32_t parent;
    std::string salt;
    Tokens tokens;
    auto operator<=>(const Key&) const = default;
  };
  std::map<Key, int32_t> model;
  std::map<int32_t, int> num_children;
  std::mt19937 rng(3);
  const auto below = [&](int n) { return static_cast<int>(rng() % static_cast<unsigned>(n)); };
  for (int i = 0; i < 4000; ++i) {
    Key key{PrefixIndex::kNoPage, std::string(static_cast<size_t>(below(3)), 's'), {below(3), below(2)}};
    if (!model.empty() && below(3) > 0)
      key = {std::next(model.begin(), below(static_cast<int>(model.size())))->second, "", {below(3), below(2)}};
    const int32_t found = index.find(key.parent, key.salt, key.tokens);
    const auto expected = model.find(key);
    CHECK(found == (expected == model.end() ? PrefixIndex::kNoPage : expected->second));
    if (expected == model.end() && model.size() < 60) {
      int32_t page = 0;
      while (index.contains(page)) ++page;
      index.insert(page, key.parent, key.salt, key.tokens);
      model[key] = page;
      ++num_children[key.parent];
    } else if (expected != model.end() && num_children[expected->second] == 0) {
      index.erase(expected->second);
      --num_children[key.parent];
      model.erase(expected);
    }
    CHECK(index.size() == static_cast<int64_t>(model.size()));
  }
}

// Random events on a small cache. Slots are filled with a fingerprint of the history that they stand for, at the two ends
// of the page; whatever is shared, merged, copied or evicted, every sequence must see its own history.
class RandomRun {
 public:
  explicit RandomRun(uint32_t seed) : cache_(kConfig), rng_(seed) {}

  void go(int num_events) {
    for (int i = 0; i < num_events; ++i) {
      event();
      for (const auto& [seq, s] : live_) check(seq, s);
    }
    while (!live_.empty()) drop(live_.begin()->first);
    CHECK(cache_.num_free_pages() == kConfig.num_pages);
    CHECK(cache_.stats().num_evicted_pages > 0 && cache_.stats().num_copied_pages > 0 &&
          cache_.stats().num_merged_pages > 0 && num_hits_ > 0);
  }

 private:
  struct Expected {
    std::optional<std::string> salt;
    Tokens tokens;
  };

  int below(size_t n) { return static_cast<int>(rng_() % n); }
  int32_t any() { return std::next(live_.begin(), below(live_.size()))->first; }

  void event() {
    const int kind = below(10);
    if (live_.empty() || (kind < 2 && live_.size() < 8)) {
      std::optional<std::string> salt;
      if (below(4) > 0) salt = below(2) ? "a" : "b";
      const int32_t seq = cache_.add_sequence(salt);
      CHECK(!live_.contains(seq));
      live_[seq] = {salt, {}};
      adopt(seq);
    } else if (kind == 2 && live_.size() < 8) {
      const int32_t seq = any(), child = cache_.fork_sequence(seq);
      CHECK(!live_.contains(child));
      live_[child] = live_[seq];
    } else if (kind == 3) {
      drop(any());
    } else if (kind == 4) {
      const int32_t seq = any();
      Tokens& tokens = live_[seq].tokens;
      tokens.resize(static_cast<size_t>(below(tokens.size() + 1)));
      cache_.truncate(seq, static_cast<int64_t>(tokens.size()));
    } else if (kind == 5) {
      adopt(any());
    } else {
      grow(any());
    }
  }

  void adopt(int32_t seq) {
    Tokens next(48);
    for (size_t i = 0; i < next.size(); ++i) next[i] = token(live_[seq].tokens.size() + i);
    const int64_t num_tokens = cache_.adopt_prefix(seq, next);
    CHECK(num_tokens % kConfig.page_size == 0 && num_tokens <= 48);
    live_[seq].tokens.insert(live_[seq].tokens.end(), next.begin(), next.begin() + num_tokens);
    num_hits_ += num_tokens > 0;
  }

  void grow(int32_t seq) {
    const int num_tokens = below(40);
    const int64_t needed = cache_.pages_needed(seq, num_tokens), num_free = cache_.num_free_pages();
    if (needed > num_free) {
      const std::vector<int32_t> before = cache_.pages(seq);
      CHECK(throws<CapacityError>([&] { cache_.grow(seq, num_tokens); }));
      CHECK(cache_.pages(seq) == before && cache_.num_free_pages() == num_free);
      drop(any());
      return;
    }
    cache_.grow(seq, num_tokens);
    CHECK(cache_.num_free_pages() >= num_free - needed);
    Expected& s = live_[seq];
    const size_t first = s.tokens.size();
    for (int i = 0; i < num_tokens; ++i) s.tokens.push_back(token(s.tokens.size()));
    for (size_t i = first; i < s.tokens.size(); ++i)
      for (uint64_t* slot : slots(seq, i)) *slot = fingerprint(s, i);
    // Now and then only the first of them are accepted.
    if (below(2) == 0) s.tokens.resize(first + static_cast<size_t>(below(static_cast<size_t>(num_tokens) + 1)));
    for (size_t i = first; i < s.tokens.size(); ++i) cache_.commit(seq, s.tokens[i]);
    cache_.truncate(seq, cache_.num_committed(seq));
  }

  void drop(int32_t seq) {
    cache_.free_sequence(seq);
    live_.erase(seq);
  }

  // Few histories, so that many are met again.
  int32_t token(size_t position) { return static_cast<int32_t>(position) * 2 + (below(60) == 0); }

  static uint64_t fingerprint(const Expected& s, size_t position) {
    uint64_t h = s.salt ? std::hash<std::string>()(*s.salt) : 1;
    for (size_t i = 0; i <= position; ++i) h = (h ^ static_cast<uint64_t>(s.tokens[i])) * 0x9e3779b97f4a7c15ULL;
    return h;
  }

  std::vector<uint64_t*> slots(int32_t seq, size_t position) {
    const int64_t page = cache_.pages(seq)[position / static_cast<size_t>(kConfig.page_size)];
    const size_t i = position % static_cast<size_t>(kConfig.page_size);
    auto* k = static_cast<float*>(cache_.k_pages(0)) + page * cache_.page_stride();
    auto* v = static_cast<float*>(cache_.v_pages(kConfig.num_layers - 1)) + page * cache_.page_stride();
    return {reinterpret_cast<uint64_t*>(k) + i, reinterpret_cast<uint64_t*>(v) + i};
  }

  void check(int32_t seq, const Expected& s) {
    CHECK(cache_.length(seq) == static_cast<int64_t>(s.tokens.size()));
    for (size_t i = 0; i < s.tokens.size(); i += 5)
      for (const uint64_t* slot : slots(seq, i)) CHECK(*slot == fingerprint(s, i));
  }

  KvCache cache_;
  std::mt19937 rng_;
  std::map<int32_t, Expected> live_;
  int num_hits_ = 0;
};

}  // namespace

int main() {
  for (const int64_t page_size : {16, 48}) {
    test_layout(DType::f32, page_size, 4);
    test_layout(DType::bf16, page_size, 2);
    test_layout(DType::i8, page_size, 1);
  }
  test_sizes_that_wrap();
  test_full_pages_are_found_again();
  test_without_salt_nothing_stays();
  test_equal_pages_become_one();
  test_eviction();
  test_fork_shares_and_copies();
  test_a_listed_page_is_not_written_after_truncate();
  test_rejected_tokens();
  test_rejected_tokens_of_a_fork();
  test_arguments();
  for (const int hash_bits : {0, 2, 64}) test_index_against_a_map(hash_bits);
  for (uint32_t seed = 0; seed < 4; ++seed) RandomRun(seed).go(1500);
  return g_failures != 0;
}
