// ISA: scalar avx2 avx512
#include "pe/sample.h"

#include <string.h>

#include "cpu/radix_sort.h"
#include "cpu/sample_layout.h"
#include "simd/for_each_vec.h"
#include "simd/log_softmax.h"
#include "simd/row_max.h"

namespace pe::PE_ISA {
namespace {

constexpr int64_t kWeightBlock = 4096;  // weights whose sum is taken in f32

// --- ranking: (value descending, id ascending) is the descending order of one integer --------------------------------

inline uint64_t make_key(float value, int64_t id) {
  const float canonical = value + 0.0f;  // -0 equals +0
  uint32_t bits;
  memcpy(&bits, &canonical, sizeof bits);
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(bits) << 32 | static_cast<uint32_t>(~static_cast<uint32_t>(id));
}

inline int64_t key_id(uint64_t key) { return static_cast<int64_t>(~static_cast<uint32_t>(key)); }

// The largest value of each block; false where a value is NaN or +inf.
bool find_block_max(const float* values, int64_t n, float* block_max) {
  const VecF infinity = set1(INFINITY), zero = set1(0.0f), one = set1(1.0f);
  VecF bad = zero;
  for (int64_t begin = 0; begin < n; begin += kSampleBlock) {
    const int64_t count = n - begin < kSampleBlock ? n - begin : kSampleBlock;
    for_each_vec(count, [&](auto in, auto) { bad = max(bad, select_gt(infinity, in(values + begin), zero, one)); });
    block_max[begin / kSampleBlock] = row_max(values + begin, count);
  }
  return !(max_lane(bad) > 0.0f);
}

// The values of one row, ranked as far as anybody asks.
struct Ranking {
  const float* values;
  int64_t n, num_blocks;
  SampleScratch scratch;

  void sort_blocks() const {
    for (int64_t b = 0; b < num_blocks; ++b) scratch.keys[b] = make_key(scratch.block_max[b], b);
    sort_descending_by_high_half(scratch.keys, scratch.spare, num_blocks);
    for (int64_t b = 0; b < num_blocks; ++b) scratch.sorted_block_max[b] = scratch.block_max[key_id(scratch.keys[b])];
  }

  // Sorts at least the `count` first into scratch.keys and returns how many; needs sort_blocks. `count` blocks have a
  // maximum of at least the count-th largest maximum, so at least `count` values reach it.
  int64_t first(int64_t count) const {
    const float bound = count <= num_blocks ? scratch.sorted_block_max[count - 1] : -INFINITY;
    int64_t found = 0;
    for (int64_t b = 0; b < num_blocks; ++b) {
      if (scratch.block_max[b] < bound) continue;
      const int64_t end = (b + 1) * kSampleBlock < n ? (b + 1) * kSampleBlock : n;
      for (int64_t i = b * kSampleBlock; i < end; ++i)
        if (values[i] >= bound) scratch.keys[found++] = make_key(values[i], i);
    }
    sort_descending_by_high_half(scratch.keys, scratch.spare, found);
    return found;
  }
};

// --- weights ---------------------------------------------------------------------------------------------------------

// out[i] = exp((in[i] - largest) / temperature); out may be in.
void make_weights(const float* in_values, float* weights, int64_t n, float largest, float temperature) {
  const VecF shift = set1(largest), divisor = set1(temperature);
  for_each_vec(n, [&](auto in, auto out) { out(weights, exp(div(sub(in(in_values), shift), divisor))); });
}

inline float block_sum(const float* weights, int64_t n) {
  VecF acc = set1(0.0f);
  for_each_vec(n, [&](auto in, auto) { acc = add(acc, in(weights)); });
  return sum(acc);
}

inline int64_t block_length(int64_t begin, int64_t n) { return n - begin < kWeightBlock ? n - begin : kWeightBlock; }

double total_weight(const float* weights, int64_t n) {
  double total = 0.0;
  for (int64_t b = 0; b < n; b += kWeightBlock)
    total += static_cast<double>(block_sum(weights + b, block_length(b, n)));
  return total;
}

// The lowest i at which the running sum exceeds u * total; never one of weight 0.
int64_t draw(const float* weights, int64_t n, double u) {
  const double target = u * total_weight(weights, n);
  double running = 0.0;
  int64_t end = n;
  for (int64_t b = 0; b < n; b += kWeightBlock) {
    const int64_t length = block_length(b, n);
    const double after = running + static_cast<double>(block_sum(weights + b, length));
    if (after > target) {
      end = b + length;
      for (int64_t i = b; i < end; ++i) {
        running += static_cast<double>(weights[i]);
        if (running > target) return i;
      }
      break;
    }
    running = after;
  }
  // Rounding put the target past the end of its block, or of all: the last token that has a weight.
  while (!(weights[end - 1] > 0.0f)) --end;
  return end - 1;
}

// --- cuts and draws --------------------------------------------------------------------------------------------------

// The weights of the first `count` ranked tokens, into scratch.weights.
void rank_weights(const Ranking& ranking, int64_t count, float largest, float temperature) {
  const SampleScratch& scratch = ranking.scratch;
  for (int64_t i = 0; i < count; ++i) scratch.weights[i] = ranking.values[key_id(scratch.keys[i])];
  make_weights(scratch.weights, scratch.weights, count, largest, temperature);
}

// How many ranked tokens it takes for their weights to reach `target`; count + 1 if all of them do not.
int64_t nucleus_size(const float* weights, int64_t count, double target) {
  double before = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    before += static_cast<double>(weights[i]);
    if (before >= target) return i + 1;
  }
  return count + 1;
}

// The key of the last token that top_k and top_p keep; 0 keeps all.
uint64_t find_cut(const Ranking& ranking, float largest, const SampleRow& row) {
  const SampleScratch& scratch = ranking.scratch;
  const bool has_top_k = row.top_k > 0 && row.top_k < ranking.n, has_top_p = row.top_p < 1.0f;
  if (!has_top_k && !has_top_p) return 0;
  ranking.sort_blocks();
  const double top_p = static_cast<double>(row.top_p);
  if (has_top_k) {
    ranking.first(row.top_k);
    int64_t kept = row.top_k;
    if (has_top_p) {
      rank_weights(ranking, kept, largest, row.temperature);
      double total = 0.0;
      for (int64_t i = 0; i < kept; ++i) total += static_cast<double>(scratch.weights[i]);
      const int64_t size = nucleus_size(scratch.weights, kept, top_p * total);
      kept = size < kept ? size : kept;
    }
    return scratch.keys[kept - 1];
  }
  make_weights(ranking.values, scratch.weights, ranking.n, largest, row.temperature);
  const double target = top_p * total_weight(scratch.weights, ranking.n);
  for (int64_t wanted = kSampleBlock;; wanted *= 8) {
    const int64_t count = ranking.first(wanted);
    rank_weights(ranking, count, largest, row.temperature);
    const int64_t kept = nucleus_size(scratch.weights, count, target);
    if (kept <= count) return scratch.keys[kept - 1];
    if (count == ranking.n) return 0;
  }
}

int64_t sample_token(const Ranking& ranking, float largest, const SampleRow& row) {
  const float* values = ranking.values;
  const SampleScratch& scratch = ranking.scratch;
  if (row.temperature == 0.0f) {
    int64_t i = 0;
    while (scratch.block_max[i / kSampleBlock] != largest) i += kSampleBlock;
    while (values[i] != largest) ++i;
    return i;
  }
  const double u = sample_uniform(row.seed, row.sequence, row.position);
  const uint64_t cut = find_cut(ranking, largest, row);
  if (cut == 0 && row.min_p == 0.0f) {
    make_weights(values, scratch.weights, ranking.n, largest, row.temperature);
    return draw(scratch.weights, ranking.n, u);
  }
  const float min_scaled = row.min_p > 0.0f ? static_cast<float>(log(static_cast<double>(row.min_p))) : -INFINITY;
  const auto keeps = [&](float value, uint64_t key) {
    return key >= cut && (value - largest) / row.temperature >= min_scaled;
  };
  int64_t kept = 0;
  for (int64_t b = 0; b < ranking.num_blocks; ++b) {
    if (!keeps(scratch.block_max[b], make_key(scratch.block_max[b], b * kSampleBlock))) continue;
    const int64_t end = (b + 1) * kSampleBlock < ranking.n ? (b + 1) * kSampleBlock : ranking.n;
    for (int64_t i = b * kSampleBlock; i < end; ++i) {
      if (!keeps(values[i], make_key(values[i], i))) continue;
      scratch.ids[kept] = static_cast<int32_t>(i);
      scratch.weights[kept++] = values[i];
    }
  }
  make_weights(scratch.weights, scratch.weights, kept, largest, row.temperature);
  return scratch.ids[draw(scratch.weights, kept, u)];
}

// --- masks, biases, penalties ----------------------------------------------------------------------------------------

// out = logits where the mask has a 1, -inf elsewhere; a NaN or +inf stays not finite in either case.
void mask_logits(const float* logits, int64_t n, const uint32_t* mask, float* out) {
  const VecF minus_infinity = set1(-INFINITY);
  for (int64_t begin = 0; begin < n; begin += 32) {
    const uint32_t word = mask[begin / 32];
    const int64_t count = n - begin < 32 ? n - begin : 32;
    const float* in_values = logits + begin;
    float* out_values = out + begin;
    if (word == 0) {
      for_each_vec(count, [&](auto in, auto store) { store(out_values, add(in(in_values), minus_infinity)); });
    } else {
      for (int64_t i = 0; i < count; ++i) out_values[i] = in_values[i] + (word >> i & 1 ? 0.0f : -INFINITY);
    }
  }
}

// counts: how often an id occurs in the output; only the entries of previous_ids are touched.
void penalise(const SampleRow& row, float* out, int32_t* counts) {
  const bool counts_output = row.frequency_penalty != 0.0f || row.presence_penalty != 0.0f;
  for (int64_t i = 0; i < row.num_previous_ids; ++i) counts[row.previous_ids[i]] = 0;
  if (counts_output)
    for (int64_t i = row.num_prompt_ids; i < row.num_previous_ids; ++i) ++counts[row.previous_ids[i]];
  constexpr int32_t kDone = -1;
  for (int64_t i = 0; i < row.num_previous_ids; ++i) {
    const int32_t id = row.previous_ids[i], count = counts[id];
    if (count == kDone) continue;
    counts[id] = kDone;
    float logit = out[id];
    if (row.repetition_penalty != 1.0f)
      logit = logit > 0.0f ? logit / row.repetition_penalty : logit * row.repetition_penalty;
    if (count > 0) {
      logit -= row.frequency_penalty * static_cast<float>(count);
      logit -= row.presence_penalty;
    }
    out[id] = logit;
  }
}

// The logits after steps 1 to 4: `logits` themselves where none is on, `scratch.logits` otherwise.
const float* adjust(const float* logits, int64_t n, const SampleRow& row, const SampleScratch& scratch) {
  const bool has_penalty = row.num_previous_ids > 0 && (row.repetition_penalty != 1.0f ||
                                                        row.frequency_penalty != 0.0f || row.presence_penalty != 0.0f);
  if (!has_penalty && !row.allowed_mask && row.num_banned_ids == 0 && row.num_biases == 0) return logits;
  float* out = scratch.logits;
  if (row.allowed_mask) {
    mask_logits(logits, n, row.allowed_mask, out);
  } else {
    memcpy(out, logits, static_cast<size_t>(n) * sizeof(float));
  }
  for (int64_t i = 0; i < row.num_banned_ids; ++i) out[row.banned_ids[i]] -= INFINITY;
  for (int64_t i = 0; i < row.num_biases; ++i) out[row.bias_ids[i]] += row.biases[i];
  if (has_penalty) penalise(row, out, scratch.ids);
  return out;
}

// --- one row ---------------------------------------------------------------------------------------------------------

SampleStatus sample_row(const Sample& a, int64_t r, const SampleScratch& scratch) {
  const float* logits = a.logits + r * a.logits_row_stride;
  const SampleRow& row = a.rows[r];
  const int64_t num_blocks = sample_num_blocks(a.vocab_size);
  const Ranking ranking{adjust(logits, a.vocab_size, row, scratch), a.vocab_size, num_blocks, scratch};
  if (!find_block_max(ranking.values, a.vocab_size, scratch.block_max)) return SampleStatus::not_finite;
  const float largest = row_max(scratch.block_max, num_blocks);
  if (largest == -INFINITY) return SampleStatus::no_token;

  const int64_t token = sample_token(ranking, largest, row);
  a.token_ids[r] = static_cast<int32_t>(token);
  if (!a.logprobs && a.num_logprobs == 0) return SampleStatus::ok;
  const float lse = lse_row(logits, a.vocab_size);
  if (a.logprobs) a.logprobs[r] = logits[token] - lse;
  if (a.num_logprobs > 0) {
    const Ranking raw{logits, a.vocab_size, num_blocks, scratch};
    if (ranking.values != logits) find_block_max(logits, a.vocab_size, scratch.block_max);
    raw.sort_blocks();
    raw.first(a.num_logprobs);
    for (int64_t i = 0; i < a.num_logprobs; ++i) {
      const int64_t id = key_id(scratch.keys[i]);
      a.top_ids[r * a.num_logprobs + i] = static_cast<int32_t>(id);
      a.top_logprobs[r * a.num_logprobs + i] = logits[id] - lse;
    }
  }
  return SampleStatus::ok;
}

void rows(const Sample& a, int64_t row_begin, int64_t row_end, void* memory) {
  const SampleScratch scratch = divide_sample_scratch(memory, a.vocab_size);
  for (int64_t r = row_begin; r < row_end; ++r) a.statuses[r] = sample_row(a, r, scratch);
}

}  // namespace

constinit const SampleIsa sample = {rows};

}  // namespace pe::PE_ISA
