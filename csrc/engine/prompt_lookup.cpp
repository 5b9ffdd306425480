#include "engine/prompt_lookup.h"

#include <algorithm>
#include <string>

#include "runtime/error.h"

namespace pe {
namespace {

constexpr size_t kFirstTableSize = 256;

}  // namespace

PromptLookup::PromptLookup(int64_t min_match, int64_t max_match)
    : min_match_(static_cast<size_t>(min_match)), max_match_(static_cast<size_t>(max_match)), before_(1) {
  if (min_match < 1 || min_match > max_match || max_match > kMaxMatch)
    throw ArgumentError("min_match, max_match: expected 1 to " + std::to_string(kMaxMatch) +
                        " in ascending order, got " + std::to_string(min_match) + " and " + std::to_string(max_match));
}

size_t PromptLookup::bucket(size_t end) const {
  uint64_t h = 0;
  for (size_t i = end - min_match_; i < end; ++i)
    h = (h + static_cast<uint32_t>(tokens_[i]) + 1) * 0x9e3779b97f4a7c15ULL;
  return static_cast<size_t>(h >> 32) & (latest_.size() - 1);
}

// How many tokens before `end` are those before the end of the text.
size_t PromptLookup::match_length(size_t end) const {
  const size_t most = std::min(max_match_, end);
  size_t length = 0;
  while (length < most && tokens_[end - 1 - length] == tokens_[tokens_.size() - 1 - length]) ++length;
  return length;
}

void PromptLookup::link(size_t end) {
  uint32_t& latest = latest_[bucket(end)];
  before_[end] = latest;
  latest = static_cast<uint32_t>(end);
}

void PromptLookup::grow_table() {
  size_t size = std::max(kFirstTableSize, latest_.size());
  while (size < tokens_.size()) size *= 2;
  if (size == latest_.size()) return;
  latest_.assign(size, 0);
  for (size_t end = min_match_; end < before_.size(); ++end) link(end);
}

void PromptLookup::extend(std::span<const int32_t> token_ids) {
  const size_t first = tokens_.size() + 1;
  tokens_.insert(tokens_.end(), token_ids.begin(), token_ids.end());
  grow_table();
  before_.resize(tokens_.size() + 1);
  for (size_t end = std::max(first, min_match_); end <= tokens_.size(); ++end) link(end);
}

std::vector<int32_t> PromptLookup::propose(int64_t limit) const {
  std::vector<int32_t> out;
  if (tokens_.size() < min_match_ || limit < 1) return out;
  size_t best = 0, best_length = min_match_ - 1;
  size_t end = before_[tokens_.size()];
  for (int i = 0; i < kMaxCandidates && end != 0; ++i, end = before_[end]) {
    const size_t length = match_length(end);
    if (length > best_length) best = end, best_length = length;
  }
  if (best == 0) return out;
  // Past the end of the text it repeats itself.
  for (size_t i = best; out.size() < static_cast<size_t>(limit); ++i)
    out.push_back(i < tokens_.size() ? tokens_[i] : out[i - tokens_.size()]);
  return out;
}

}  // namespace pe
