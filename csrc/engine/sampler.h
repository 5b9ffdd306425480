// What drawing the tokens of one sequence needs from step to step: its settings, written once, and its tokens so far.
// The arithmetic is that of pe/sample.h.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "pe/sample.h"

namespace pe {

struct SampleOptions {
  float temperature = 0.0f, top_p = 1.0f, min_p = 0.0f;
  int32_t top_k = 0;
  float repetition_penalty = 1.0f, frequency_penalty = 0.0f, presence_penalty = 0.0f;
  uint64_t seed = 0, sequence = 0;
  std::vector<int32_t> prompt_ids;
  std::vector<int32_t> bias_ids;
  std::vector<float> biases;
  std::vector<int32_t> allowed_ids;  // empty: all
  std::vector<int32_t> end_ids;      // banned until there are min_tokens output tokens
  int64_t min_tokens = 0;
  // The last token of each is banned where the output ends with the others.
  std::vector<std::vector<int32_t>> bad_words;
};

class SampleState {
 public:
  // Throws ArgumentError for an id outside [0, vocab_size).
  SampleState(int64_t vocab_size, SampleOptions options);

  // Tokens that the next draws may take, beside what allowed_ids says: bit i % 32 of word i / 32, one row of
  // ceil(vocab_size / 32) words per draw. They hold until push(). Throws ArgumentError for other sizes.
  void set_masks(std::span<const uint32_t> masks);
  // Appends the views of this object for 1 + proposals.size() draws: each follows the output and as many proposals as
  // there are views before it, as if these had been drawn. They end with the next call of a method that changes it.
  // Throws ArgumentError for a proposal outside [0, vocab_size), or masks for another number of draws.
  void append_rows(std::span<const int32_t> proposals, std::vector<SampleRow>& rows);
  // After the draws: appends their tokens to the output, none where the first draw found none.
  void push(std::span<const int32_t> token_ids);

  int64_t vocab_size() const { return vocab_size_; }
  int64_t num_output_ids() const { return num_output_ids_; }

 private:
  // Appends to banned_ids_ what may not follow the first `num_ids` of ids_, `num_output_ids` of them output.
  void find_banned_ids(size_t num_ids, int64_t num_output_ids);

  int64_t vocab_size_, num_prompt_ids_, num_output_ids_ = 0;
  SampleOptions options_;
  std::vector<int32_t> ids_;  // the prompt, where a penalty reads it, the output, and proposals until push()
  int64_t num_prompt_ids_kept_;
  std::vector<uint32_t> allowed_, masks_;  // of allowed_ids; of the next draws, each both: empty if there are none
  std::vector<int32_t> banned_ids_;        // of all views
};

}  // namespace pe
