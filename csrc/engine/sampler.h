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

  // Tokens that the next draw may take, beside what allowed_ids says: bit i % 32 of word i / 32. Holds for one draw.
  // Throws ArgumentError unless mask has ceil(vocab_size / 32) words.
  void set_mask(std::span<const uint32_t> mask);
  // A view of this object for the next draw; ends with the next call of a method that changes it.
  SampleRow row();
  // After the draw: appends its token to the output.
  void push(int32_t token_id);
  // After a draw that found no token.
  void push_nothing() { has_mask_ = false; }

  int64_t vocab_size() const { return vocab_size_; }
  int64_t num_output_ids() const { return num_output_ids_; }

 private:
  void find_banned_ids();

  int64_t vocab_size_, num_prompt_ids_, num_output_ids_ = 0;
  SampleOptions options_;
  std::vector<int32_t> ids_;  // the prompt, where a penalty reads it, and the output
  int64_t num_prompt_ids_kept_;
  std::vector<uint32_t> allowed_, mask_;  // of allowed_ids; of the next draw: both
  bool has_mask_ = false;
  std::vector<int32_t> banned_ids_;
};

}  // namespace pe
