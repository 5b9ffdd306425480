#include "engine/prefix_index.h"

#include <algorithm>
#include <random>

namespace pe {
namespace {

// The finaliser of splitmix64: every bit of the input reaches every bit of the output.
uint64_t mix(uint64_t h) {
  h = (h ^ (h >> 30)) * 0xbf58476d1ce4e5b9ULL;
  h = (h ^ (h >> 27)) * 0x94d049bb133111ebULL;
  return h ^ (h >> 31);
}

uint64_t random_seed() {
  std::random_device device;
  return uint64_t{device()} << 32 | device();
}

}  // namespace

PrefixIndex::PrefixIndex(int hash_bits) : shift_(64 - hash_bits), seed_(random_seed()) {}

uint64_t PrefixIndex::hash(int32_t parent, std::string_view salt, std::span<const int32_t> tokens) const {
  uint64_t h = seed_;
  if (parent != kNoPage)
    h ^= entries_.at(parent).hash;
  else
    for (const char c : salt) h = mix(h + static_cast<uint8_t>(c) + 1);
  for (const int32_t token : tokens) h = mix(h + static_cast<uint32_t>(token) + 1);
  return h;
}

int32_t PrefixIndex::find(int32_t parent, std::string_view salt, std::span<const int32_t> tokens) const {
  const uint64_t h = hash(parent, salt, tokens);
  const auto [begin, end] = by_bucket_.equal_range(bucket(h));
  for (auto it = begin; it != end; ++it) {
    const Entry& entry = entries_.at(it->second);
    if (entry.parent == parent && (parent != kNoPage || entry.salt == salt) &&
        std::equal(tokens.begin(), tokens.end(), entry.tokens.begin(), entry.tokens.end()))
      return it->second;
  }
  return kNoPage;
}

void PrefixIndex::insert(int32_t page, int32_t parent, std::string_view salt, std::span<const int32_t> tokens) {
  const uint64_t h = hash(parent, salt, tokens);
  by_bucket_.emplace(bucket(h), page);
  entries_.emplace(page, Entry{.hash = h,
                               .parent = parent,
                               .salt = std::string(parent == kNoPage ? salt : std::string_view()),
                               .tokens = {tokens.begin(), tokens.end()}});
}

void PrefixIndex::erase(int32_t page) {
  const auto entry = entries_.find(page);
  const auto [begin, end] = by_bucket_.equal_range(bucket(entry->second.hash));
  by_bucket_.erase(std::find_if(begin, end, [&](const auto& item) { return item.second == page; }));
  entries_.erase(entry);
}

}  // namespace pe
