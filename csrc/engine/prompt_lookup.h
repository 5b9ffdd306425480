// Guesses how a text goes on by where its end stood before: copies, edits and summaries repeat what they read.
//
// The chains of LZ77: a table leads from the last `min_match` tokens to the latest place where tokens of the same hash
// end, and each place to the one before it. A lookup follows a chain for kMaxCandidates places at most, and takes the one
// with the longest match that ends there, of equals the latest. Cost: O(1) per token, 12 to 20 bytes of memory each.
// After Saxena 2023, prompt lookup decoding.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

namespace pe {

class PromptLookup {
 public:
  static constexpr int64_t kMaxMatch = 64;
  static constexpr int kMaxCandidates = 16;

  // Ends of fewer than min_match tokens are not looked for; more than max_match are not compared.
  // Throws ArgumentError unless 1 <= min_match <= max_match <= kMaxMatch.
  PromptLookup(int64_t min_match, int64_t max_match);

  // The text goes on.
  void extend(std::span<const int32_t> token_ids);
  // At most `limit` tokens that may come next; none where the end of the text has not been there before.
  std::vector<int32_t> propose(int64_t limit) const;

  int64_t num_tokens() const { return static_cast<int64_t>(tokens_.size()); }

 private:
  size_t bucket(size_t end) const;  // of the min_match tokens before `end`
  size_t match_length(size_t end) const;
  void link(size_t end);
  void grow_table();

  const size_t min_match_, max_match_;
  std::vector<int32_t> tokens_;
  // Ends of matches are counted from 1: 0 is none.
  std::vector<uint32_t> latest_;  // by bucket; a power of two, at least as many as tokens
  std::vector<uint32_t> before_;  // by end: the end before it in the same bucket
};

}  // namespace pe
