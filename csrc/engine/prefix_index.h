// Which page holds which tokens after which history, so that a sequence can start from pages that another one filled.
//
// A tree over full pages: a page is named by the page before it and its own tokens, the first page of a sequence by a
// salt and its tokens. Hashes are chained from parent to child and seeded per process; they only say where to look:
// parent, salt and tokens are compared. So no hit is ever wrong, and nobody can aim at one bucket.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace pe {

class PrefixIndex {
 public:
  static constexpr int32_t kNoPage = -1;

  // Fewer hash_bits make more pages look alike at first; what is found stays the same.
  explicit PrefixIndex(int hash_bits = 64);

  // The page that holds `tokens` after page `parent`, or kNoPage. Without a parent, `salt` names the root.
  int32_t find(int32_t parent, std::string_view salt, std::span<const int32_t> tokens) const;
  // `page` is not in the index, and find() does not find its like; `parent` is in the index or kNoPage.
  void insert(int32_t page, int32_t parent, std::string_view salt, std::span<const int32_t> tokens);
  // No page in the index has `page` as its parent.
  void erase(int32_t page);

  bool contains(int32_t page) const { return entries_.contains(page); }
  int64_t size() const { return static_cast<int64_t>(entries_.size()); }

 private:
  struct Entry {
    uint64_t hash;
    int32_t parent;
    std::string salt;  // of a root, else empty
    std::vector<int32_t> tokens;
  };
  uint64_t hash(int32_t parent, std::string_view salt, std::span<const int32_t> tokens) const;
  uint64_t bucket(uint64_t hash) const { return shift_ < 64 ? hash >> shift_ : 0; }

  const int shift_;
  const uint64_t seed_;
  std::unordered_map<int32_t, Entry> entries_;  // by page
  std::unordered_multimap<uint64_t, int32_t> by_bucket_;
};

}  // namespace pe
