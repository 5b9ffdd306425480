#include "engine/sampler.h"

#include <algorithm>
#include <string>
#include <utility>

#include "runtime/error.h"

namespace pe {
namespace {

void expect_ids(const std::vector<int32_t>& ids, int64_t vocab_size, const char* name) {
  for (const int32_t id : ids)
    if (id < 0 || id >= vocab_size)
      throw ArgumentError(std::string(name) + ": expected token ids below " + std::to_string(vocab_size) + ", got " +
                          std::to_string(id));
}

size_t num_words(int64_t vocab_size) { return static_cast<size_t>((vocab_size + 31) / 32); }

}  // namespace

SampleState::SampleState(int64_t vocab_size, SampleOptions options)
    : vocab_size_(vocab_size),
      num_prompt_ids_(static_cast<int64_t>(options.prompt_ids.size())),
      options_(std::move(options)) {
  if (vocab_size < 1) throw ArgumentError("vocab_size: expected at least 1, got " + std::to_string(vocab_size));
  expect_ids(options_.prompt_ids, vocab_size, "prompt_ids");
  expect_ids(options_.bias_ids, vocab_size, "bias_ids");
  expect_ids(options_.allowed_ids, vocab_size, "allowed_ids");
  expect_ids(options_.end_ids, vocab_size, "end_ids");
  if (options_.bias_ids.size() != options_.biases.size())
    throw ArgumentError("biases: expected " + std::to_string(options_.bias_ids.size()) + ", one per id, got " +
                        std::to_string(options_.biases.size()));
  for (const auto& word : options_.bad_words) {
    expect_ids(word, vocab_size, "bad_words");
    if (word.empty()) throw ArgumentError("bad_words: expected at least one token, got none");
  }
  if (!options_.allowed_ids.empty()) {
    allowed_.resize(num_words(vocab_size));
    for (const int32_t id : options_.allowed_ids) allowed_[static_cast<size_t>(id / 32)] |= 1u << (id % 32);
  }
  if (options_.repetition_penalty != 1.0f) ids_ = options_.prompt_ids;
  num_prompt_ids_kept_ = static_cast<int64_t>(ids_.size());
  options_.prompt_ids = {};
}

void SampleState::set_mask(std::span<const uint32_t> mask) {
  if (mask.size() != num_words(vocab_size_))
    throw ArgumentError("mask: expected " + std::to_string(num_words(vocab_size_)) + " words, got " +
                        std::to_string(mask.size()));
  mask_.assign(mask.begin(), mask.end());
  for (size_t i = 0; i < allowed_.size(); ++i) mask_[i] &= allowed_[i];
  has_mask_ = true;
}

void SampleState::find_banned_ids() {
  banned_ids_.clear();
  if (num_output_ids_ < options_.min_tokens) banned_ids_ = options_.end_ids;
  const auto output = std::span(ids_).subspan(static_cast<size_t>(num_prompt_ids_kept_));
  for (const auto& word : options_.bad_words) {
    const size_t length = word.size() - 1;
    if (length <= output.size() && std::equal(word.begin(), word.end() - 1, output.end() - static_cast<long>(length)))
      banned_ids_.push_back(word.back());
  }
}

SampleRow SampleState::row() {
  find_banned_ids();
  const std::vector<uint32_t>& mask = has_mask_ ? mask_ : allowed_;
  return {.temperature = options_.temperature,
          .top_k = options_.top_k,
          .top_p = options_.top_p,
          .min_p = options_.min_p,
          .repetition_penalty = options_.repetition_penalty,
          .seed = options_.seed,
          .sequence = options_.sequence,
          .position = static_cast<uint64_t>(num_prompt_ids_ + num_output_ids_),
          .previous_ids = ids_.data(),
          .num_previous_ids = static_cast<int64_t>(ids_.size()),
          .num_prompt_ids = num_prompt_ids_kept_,
          .frequency_penalty = options_.frequency_penalty,
          .presence_penalty = options_.presence_penalty,
          .bias_ids = options_.bias_ids.data(),
          .biases = options_.biases.data(),
          .num_biases = static_cast<int64_t>(options_.bias_ids.size()),
          .banned_ids = banned_ids_.data(),
          .num_banned_ids = static_cast<int64_t>(banned_ids_.size()),
          .allowed_mask = mask.empty() ? nullptr : mask.data()};
}

void SampleState::push(int32_t token_id) {
  ids_.push_back(token_id);
  ++num_output_ids_;
  has_mask_ = false;
}

}  // namespace pe
