// One step of the decoder: any number of tokens of any sequences in, logits or log-probabilities out. A step is one
// native call; all workers walk through its phases together (engine/phases.h).
//
// A row's results depend on the tokens before it in its own sequence only: every kernel computes a row by one
// arithmetic, so batch, chunking, page size and threads change no bit.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "engine/adapters.h"
#include "engine/kv_cache.h"
#include "engine/model.h"
#include "engine/phases.h"
#include "pe/attention_decode.h"
#include "pe/matmul.h"
#include "pe/matmul_w4a16.h"
#include "pe/matmul_w4a8.h"

namespace pe {

// Kinds of phases, for the profile.
enum class PhaseKind : int { embed, norm, qkv, rope, attention, o, gate_up, activation, down, head, logprob, lora };
constexpr int kNumPhaseKinds = 12;
const char* phase_kind_name(PhaseKind kind);

struct Profile {
  int64_t num_steps = 0, num_tokens = 0;
  double seconds[kNumPhaseKinds] = {};
};

class Decoder {
 public:
  // max_tokens: the most tokens of one step.
  Decoder(std::shared_ptr<const Model> model, const KvCacheConfig& cache, int64_t max_tokens);

  // A new sequence, computed with `adapter` if there is one, which is frozen, and kept alive until the sequence is freed;
  // with a salt it shares full pages with others of the same salt, adapter, tokens and ISA level.
  int32_t add_sequence(std::optional<std::string> salt, std::shared_ptr<Adapter> adapter = nullptr);
  int32_t fork_sequence(int32_t seq);
  void free_sequence(int32_t seq);

  // Appends token_ids[t] to sequence seqs[t] for every t (tokens of one sequence in order; slots claimed by grow
  // before) and computes what `outputs` asks for. Throws ArgumentError for bad ids, sequences or rows, and changes
  // nothing then.
  struct Step {
    std::span<const int32_t> token_ids, seqs;  // [T]
    std::span<const int32_t> rows;             // [R] tokens of this step whose logits are wanted
    float* logits = nullptr;                   // [R, vocab_size] or nullptr
    std::span<const int32_t> targets;          // [R] or empty
    float* target_logprobs = nullptr;          // [R]: log-probability of the target after its row
    std::span<const int32_t> hidden_rows;      // [S] tokens of this step, S <= T, whose hidden state is wanted
    float* hidden = nullptr;                   // [S, hidden_size], after the last norm
  };
  void step(const Step& step);
  // The same without the end: the tokens stay claimed and are not committed, so that the caller may commit the first of
  // each sequence and truncate the others. The next step of a sequence writes after its committed tokens.
  void compute(const Step& step);

  KvCache& cache() { return cache_; }
  const Model& model() const { return *model_; }
  int64_t max_tokens() const { return max_tokens_; }
  const Profile& profile() const { return profile_; }
  void reset_profile() { profile_ = {}; }

 private:
  void check(const Step& step);
  void place(const Step& step);
  // Lists the work of attention, for every width of window that a layer has.
  void plan_attention(int num_workers);
  void reserve_scratch(int num_workers);
  void run(const Step& step, Phases::Worker& worker);
  void layers(const Step& step, Phases::Worker& worker);
  void head(const Step& step, Phases::Worker& worker);
  void hidden(const Step& step, Phases::Worker& worker);
  // Row r of y = the last norm of token `row` of this step.
  void last_norm(int32_t row, int64_t r) const;
  // Rows of delta on their way into the residual stream: bias, norm after the block, multiplier.
  void settle(const void* bias, const void* post_norm, int64_t begin, int64_t end) const;
  // Rows of qkv on their way to rotation: bias, norm of q and k.
  void finish_qk(const LayerWeights& layer, int64_t begin, int64_t end) const;
  void linear(Phases::Worker& worker, const Linear& parts, const void* x, int64_t x_row_stride, void* y,
              int64_t y_row_stride, int64_t num_rows, DType y_dtype) const;
  // Fills the workspace that block formats read beside x.
  void prepare(const Linear& parts, const void* x, int64_t x_row_stride, int64_t row_begin, int64_t row_end,
               int64_t num_rows) const;
  // The same product in the terms of each kernel.
  Matmul dense_product(const Matrix& part, const void* x, int64_t x_row_stride, void* y, int64_t y_row_stride,
                       int64_t num_rows, DType y_dtype) const;
  MatmulW4A16 float_product(const Matrix& part, const void* x, int64_t x_row_stride, void* y, int64_t y_row_stride,
                            int64_t num_rows, DType y_dtype) const;
  MatmulW4A8 int8_product(const Matrix& part, const void* x, int64_t x_row_stride, void* y, int64_t y_row_stride,
                          int64_t num_rows, DType y_dtype) const;
  // Rows, positions and pages of this step; the buffers of layer i.
  AttentionDecode attention_of(int64_t layer) const;
  void attend(Phases::Worker& worker, int64_t layer);
  std::vector<AdapterBuffers> adapter_buffers() const;
  // Adds what the adapters of the rows add to a product of the layer.
  void adapt(Phases::Worker& worker, int64_t layer, AdapterSlot slot);
  void mark(Phases::Worker& worker, PhaseKind kind);

  std::shared_ptr<const Model> model_;
  KvCache cache_;
  const int64_t max_tokens_;
  Arena arena_;
  // Activations [max_tokens, ...] of act_dtype.
  void *h_, *y_, *qkv_, *attended_, *delta_, *gate_up_, *mlp_, *last_;
  uint8_t* workspace_;
  float* logits_;  // [kHeadRows, vocab_size]
  std::vector<int32_t> positions_, batch_seqs_, block_table_;
  int64_t block_table_stride_ = 0;
  struct AttentionPlan {
    int64_t sliding_window;
    std::vector<AttentionDecodeItem> items, parts;  // parts: empty where items are not split
  };
  std::vector<AttentionPlan> attention_plans_;
  std::unique_ptr<Arena> part_states_;
  float* part_states_base_ = nullptr;
  std::unique_ptr<Arena> scratch_;  // of attention, scratch_bytes_ per worker
  uint8_t* scratch_base_ = nullptr;
  size_t scratch_bytes_ = 0;
  std::vector<std::shared_ptr<const Adapter>> adapters_;  // of each sequence
  std::vector<AdapterBuffers> adapter_buffers_;           // [num_layers * kNumAdapterSlots]
  AdapterPlan adapter_plan_;
  Profile profile_;
  double last_mark_ = 0;
};

}  // namespace pe
