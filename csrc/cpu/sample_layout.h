// How the scratch of one sampled row is divided.
#pragma once
#include <cstdint>

namespace pe {

// Elements under one entry of block_max.
constexpr int64_t kSampleBlock = 64;

struct SampleScratch {
  uint64_t* keys;           // [V]
  uint64_t* spare;          // [V]
  float* logits;            // [V], after penalties
  float* weights;           // [V]
  int32_t* ids;             // [V]
  float* block_max;         // [ceil(V / kSampleBlock)]
  float* sorted_block_max;  // the same, largest first
};

static constexpr int64_t sample_num_blocks(int64_t vocab_size) {
  return (vocab_size + kSampleBlock - 1) / kSampleBlock;
}

static inline SampleScratch divide_sample_scratch(void* memory, int64_t vocab_size) {
  SampleScratch s;
  s.keys = static_cast<uint64_t*>(memory);
  s.spare = s.keys + vocab_size;
  s.logits = reinterpret_cast<float*>(s.spare + vocab_size);
  s.weights = s.logits + vocab_size;
  s.ids = reinterpret_cast<int32_t*>(s.weights + vocab_size);
  s.block_max = reinterpret_cast<float*>(s.ids + vocab_size);
  s.sorted_block_max = s.block_max + sample_num_blocks(vocab_size);
  return s;
}

}  // namespace pe
