// sample -- the next token of each row of logits.
//
// Math       l = logits[r], of raw logits; then, in the order of vLLM:
//            1. masks: l[i] = -inf where bit i of allowed_mask is 0, and for every i in banned_ids
//            2. biases: l[bias_ids[j]] += biases[j], in the order of j
//            3. repetition penalty: l[i] = l[i] > 0 ? l[i] / penalty : l[i] * penalty, once per id in previous_ids
//            4. l[i] -= frequency_penalty * count[i], then l[i] -= presence_penalty, for every i that occurs count[i]
//               times in previous_ids after the first num_prompt_ids
//            5. temperature 0: the token is the lowest i with the largest l[i]; otherwise
//               s[i] = (l[i] - max l) / temperature, weight[i] = exp(s[i])
//            6. top_k: keep the k first in the order (l descending, i ascending)
//            7. top_p: of those, in that order, keep the ones before which the kept weights sum to less than
//               top_p * their total, and the first in any case
//            8. min_p: of those, keep s[i] >= log(min_p), that is a probability of at least min_p times the largest
//            9. draw: the lowest kept i at which the running sum of kept weights, by ascending i, exceeds u * total
//            u = (floor(x0 / 2^5) * 2^26 + floor(x1 / 2^6)) / 2^53, x = Philox4x32-10(key = seed, counter = (sequence,
//            position)), low words first
//            logprob = logits[r, token] - lse(logits[r]): of the raw logits, before steps 1 to 8. top_ids,
//            top_logprobs: the num_logprobs first of raw logits in the order (logit descending, id ascending)
// Shapes     logits [B, V] f32, last dimension contiguous, row stride in elements; V >= 1; outputs contiguous
// Numerics   steps 1 to 5 and s in f32, exact to the operation; weights f32; sums of a block of 4096 weights in f32, of
//            blocks in double; lse as in simd/log_softmax.h. A logit of -inf is never drawn
// Writes     outputs are overwritten; those of a row with a bad status are not written
// Errors     per row, in `status`: a logit that is NaN or +inf; no logit above -inf after steps 1 to 4. Other rows
//            are not affected
// Order      a row depends on its logits and its SampleRow alone: same bits for any batch and number of threads on one
//            ISA level
// Cost       one to four passes over V, in cache; a sort of the tokens above a bound that prunes most of them; steps 1 to
//            4 add one pass, and three over previous_ids where a penalty is on
// Reference  pyengine/reference/sample.py; Salmon et al. 2011 (Philox); Holtzman et al. 2020, arXiv:1904.09751 (top_p);
//            Nguyen et al. 2024, arXiv:2407.01082 (min_p); Keskar et al. 2019, arXiv:1909.05858 (repetition penalty)
#pragma once
#include <cstdint>

#include "pe/isa.h"

namespace pe {

struct SampleRow {
  float temperature;         // >= 0; 0: greedy
  int32_t top_k;             // >= 0; 0: off
  float top_p;               // 0 to 1; 1: off
  float min_p;               // 0 to 1; 0: off
  float repetition_penalty;  // > 0; 1: off
  uint64_t seed, sequence, position;
  const int32_t* previous_ids = nullptr;  // each in [0, V): the prompt, then the output
  int64_t num_previous_ids = 0;
  int64_t num_prompt_ids = 0;  // how many of previous_ids frequency and presence do not count
  float frequency_penalty = 0.0f;
  float presence_penalty = 0.0f;
  const int32_t* bias_ids = nullptr;  // each in [0, V)
  const float* biases = nullptr;      // finite
  int64_t num_biases = 0;
  const int32_t* banned_ids = nullptr;  // each in [0, V)
  int64_t num_banned_ids = 0;
  const uint32_t* allowed_mask = nullptr;  // [ceil(V / 32)], token i is bit i % 32 of word i / 32; nullptr: all
};

enum class SampleStatus : int32_t { ok, not_finite, no_token };

struct Sample {
  const float* logits;
  const SampleRow* rows;   // [B]
  int32_t* token_ids;      // [B]
  float* logprobs;         // [B], or nullptr
  int32_t* top_ids;        // [B, num_logprobs], or nullptr
  float* top_logprobs;     // [B, num_logprobs], or nullptr
  SampleStatus* statuses;  // [B]; where not ok, the other outputs of the row are not written
  int64_t num_rows, vocab_size, logits_row_stride;
  int64_t num_logprobs;  // 0 to V
};

// Throws ArgumentError for a SampleRow out of its ranges, before anything is written.
void sample_cpu(const Sample& args);

// Random123's Philox4x32 with 10 rounds; counter is replaced by the result.
void philox4x32_10(uint32_t counter[4], uint32_t key0, uint32_t key1);
// The u of a draw, in [0, 1).
double sample_uniform(uint64_t seed, uint64_t sequence, uint64_t position);

// Scratch of one caller of SampleIsa::rows; 64-byte aligned.
int64_t sample_scratch_bytes(int64_t vocab_size);

// What one ISA level provides. Rows are valid; threads are the caller's business.
struct SampleIsa {
  void (*rows)(const Sample& args, int64_t row_begin, int64_t row_end, void* scratch);
};
PE_DECLARE_ISA_TABLE(SampleIsa, sample);
const SampleIsa& sample_isa();  // of the level in use

}  // namespace pe
