#include "engine/sampler.h"

#include <algorithm>
#include <string>
#include <utility>

#include "runtime/error.h"

namespace pe {
namespace {

void expect_id(int32_t id, int64_t vocab_size, const char* name) {
  if (id < 0 || id >= vocab_size)
    throw ArgumentError(std::string(name) + ": expected token ids below " + std::to_string(vocab_size) + ", got " +
                        std::to_string(id));
}

void expect_ids(const std::vector<int32_t>& ids, int64_t vocab_size, const char* name) {
  for (const int32_t id : ids) expect_id(id, vocab_size, name);
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

void SampleState::set_masks(std::span<const uint32_t> masks) {
  const size_t words = num_words(vocab_size_);
  if (masks.empty() || masks.size() % words != 0)
    throw ArgumentError("mask: expected rows of " + std::to_string(words) + " words, got " +
                        std::to_string(masks.size()) + " words");
  masks_.assign(masks.begin(), masks.end());
  if (allowed_.empty()) return;
  for (size_t i = 0; i < masks_.size(); ++i) masks_[i] &= allowed_[i % words];
}

void SampleState::find_banned_ids(size_t num_ids, int64_t num_output_ids) {
  if (num_output_ids < options_.min_tokens)
    banned_ids_.insert(banned_ids_.end(), options_.end_ids.begin(), options_.end_ids.end());
  const auto output = std::span(ids_).first(num_ids).last(static_cast<size_t>(num_output_ids));
  for (const auto& word : options_.bad_words) {
    const size_t length = word.size() - 1;
    if (length <= output.size() && std::equal(word.begin(), word.end() - 1, output.end() - static_cast<long>(length)))
      banned_ids_.push_back(word.back());
  }
}

void SampleState::append_rows(std::span<const int32_t> proposals, std::vector<SampleRow>& rows) {
  const size_t words = num_words(vocab_size_), num_draws = proposals.size() + 1;
  if (!masks_.empty() && masks_.size() != num_draws * words)
    throw ArgumentError("mask: expected " + std::to_string(num_draws) + " rows, one per draw, got " +
                        std::to_string(masks_.size() / words));
  for (const int32_t id : proposals) expect_id(id, vocab_size_, "proposals");
  const size_t num_ids = static_cast<size_t>(num_prompt_ids_kept_ + num_output_ids_);
  ids_.resize(num_ids);
  ids_.insert(ids_.end(), proposals.begin(), proposals.end());
  banned_ids_.clear();
  const size_t first = rows.size();
  for (size_t j = 0; j < num_draws; ++j) {
    const size_t num_banned_before = banned_ids_.size();
    find_banned_ids(num_ids + j, num_output_ids_ + static_cast<int64_t>(j));
    const uint32_t* allowed = allowed_.empty() ? nullptr : allowed_.data();
    rows.push_back({.temperature = options_.temperature,
                    .top_k = options_.top_k,
                    .top_p = options_.top_p,
                    .min_p = options_.min_p,
                    .repetition_penalty = options_.repetition_penalty,
                    .seed = options_.seed,
                    .sequence = options_.sequence,
                    .position = static_cast<uint64_t>(num_prompt_ids_ + num_output_ids_) + j,
                    .previous_ids = ids_.data(),
                    .num_previous_ids = static_cast<int64_t>(num_ids + j),
                    .num_prompt_ids = num_prompt_ids_kept_,
                    .frequency_penalty = options_.frequency_penalty,
                    .presence_penalty = options_.presence_penalty,
                    .bias_ids = options_.bias_ids.data(),
                    .biases = options_.biases.data(),
                    .num_biases = static_cast<int64_t>(options_.bias_ids.size()),
                    .num_banned_ids = static_cast<int64_t>(banned_ids_.size() - num_banned_before),
                    .allowed_mask = masks_.empty() ? allowed : masks_.data() + j * words});
  }
  // Only now do they stay where they are.
  const int32_t* banned = banned_ids_.data();
  for (size_t r = first; r < rows.size(); ++r) {
    rows[r].banned_ids = banned;
    banned += rows[r].num_banned_ids;
  }
}

void SampleState::push(std::span<const int32_t> token_ids) {
  ids_.resize(static_cast<size_t>(num_prompt_ids_kept_ + num_output_ids_));
  ids_.insert(ids_.end(), token_ids.begin(), token_ids.end());
  num_output_ids_ += static_cast<int64_t>(token_ids.size());
  masks_.clear();
}

}  // namespace pe
