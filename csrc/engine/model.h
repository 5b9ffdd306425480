// Weights of one decoder in the form that the kernels read, in order of execution, in one arena.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "pe/block_weights.h"
#include "pe/dtype.h"
#include "pe/gelu.h"
#include "pe/swiglu.h"
#include "runtime/arena.h"

namespace pe {

// The dense formats, then every BlockFormat.
enum class WeightFormat : uint8_t {
  f32,
  bf16,
#define PE_NAME(name, ...) name,
  PE_BLOCK_FORMATS(PE_NAME)
#undef PE_NAME
};

const char* weight_format_name(WeightFormat format);
WeightFormat parse_weight_format(const std::string& name);  // throws ArgumentError
bool is_block_format(WeightFormat format);
BlockFormat block_format(WeightFormat format);                    // of a block format
DType dense_dtype(WeightFormat format);                           // of f32 and bf16
int64_t weight_row_bytes(WeightFormat format, int64_t num_cols);  // of one row as it comes from a file
// Bytes of `num_rows` x `num_cols` weights after packing. Throws ArgumentError for a shape that the format does not
// take.
int64_t packed_weight_bytes(WeightFormat format, int64_t num_rows, int64_t num_cols);

// A packed matrix [num_rows, num_cols], or the part of one: its outputs start at column `offset`.
struct Matrix {
  WeightFormat format;
  int64_t num_rows, num_cols, offset;
  const uint8_t* packed;
};

// y = x @ w^T where w is one or more matrices stacked; one of them when all parts have the same format.
using Linear = std::vector<Matrix>;

// What products with block weights read: activations as they are, or rounded to bf16, or to int8 per 32.
enum class ProductInput : uint8_t { unrounded, bf16, int8 };

// RMS norm of q and k before rotation: of each head, or of all heads together.
enum class QkNorm : uint8_t { none, head, full };

enum class NormKind : uint8_t { rms, layer };

constexpr int kNumRopeTables = 2;

struct LayerConfig {
  int64_t sliding_window;  // 0: none
  int rope_table;          // -1: the layer does not turn q and k
};

struct ModelConfig {
  int64_t vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim;
  int64_t rotary_dim;               // leading elements of a head that turn
  std::vector<LayerConfig> layers;  // [num_layers]
  float norm_eps, norm_weight_offset;
  float embedding_multiplier, residual_multiplier, attention_scale;
  bool tie_word_embeddings;
  bool qkv_bias, o_bias, mlp_bias;
  NormKind norm;
  bool norm_bias;
  bool has_attention_norm, has_mlp_norm, has_post_norm;  // before attention, before the MLP, after each
  bool parallel_blocks;  // attention and MLP of a layer start from the same residual stream
  QkNorm qk_norm;
  bool gated_mlp;  // down(gate_activation(gate) * up), or down(plain_activation(up))
  GateActivation gate_activation;
  GeluForm plain_activation;
  int64_t num_learned_positions;  // 0: none are added to the embedding
  DType act_dtype;                // f32 or bf16: of activations between kernels
  ProductInput product_input;     // of block formats

  int64_t q_size() const { return num_heads * head_dim; }
  int64_t kv_size() const { return num_kv_heads * head_dim; }
  int64_t qkv_size() const { return q_size() + 2 * kv_size(); }
  int64_t gate_up_size() const { return gated_mlp ? 2 * intermediate_size : intermediate_size; }
};

// A vector is nullptr where the model has none. Without a gate, gate_up is up alone.
struct LayerWeights {
  Linear qkv, o, gate_up, down;
  const void *attention_norm = nullptr, *attention_post_norm = nullptr;
  const void *mlp_norm = nullptr, *mlp_post_norm = nullptr;
  const void *attention_norm_bias = nullptr, *mlp_norm_bias = nullptr;
  const void *q_norm = nullptr, *k_norm = nullptr;
  const void *qkv_bias = nullptr, *o_bias = nullptr, *gate_up_bias = nullptr, *down_bias = nullptr;
};

class Model {
 public:
  Model(const ModelConfig& config, size_t capacity_bytes);

  // slot: "norm", "norm_bias", "positions" (of the learned positions, one after the other) or
  // "layers.<i>.<a vector of LayerWeights>"; `values` [vector_size(slot)] of act_dtype, copied.
  void set_vector(const std::string& slot, const void* values);
  // Throws ArgumentError for a vector that this model does not have.
  int64_t vector_size(const std::string& slot) const;
  // slot: "embed", "head", "layers.<i>.qkv" | "o" | "gate_up" | "down". Several calls stack parts in order.
  // `rows`: of the format (f32, bf16 or GGUF blocks), wherever each lies; copied.
  void add_matrix(const std::string& slot, WeightFormat format, std::span<const uint8_t* const> rows, int64_t num_cols);
  // Rotation tables f32 [num_positions, rotary_dim / 2], copied; as many positions in each table.
  void set_rope(int table, const float* cos, const float* sin, int64_t num_positions);
  // Throws ArgumentError that names the first slot that is missing or has a wrong shape.
  void check() const;

  const ModelConfig& config() const { return config_; }
  const LayerWeights& layer(int64_t i) const { return layers_[static_cast<size_t>(i)]; }
  const void* norm() const { return norm_; }
  const void* norm_bias() const { return norm_bias_; }
  const void* positions() const { return positions_; }  // [num_learned_positions, hidden_size]
  const Linear& embed() const { return embed_; }
  const Linear& head() const { return config_.tie_word_embeddings ? embed_ : head_; }
  const float* rope_cos(int table) const { return rope_[table].cos; }
  const float* rope_sin(int table) const { return rope_[table].sin; }
  int64_t num_positions() const { return num_positions_; }
  size_t num_bytes() const { return arena_.used(); }
  // Bytes of weights that one decode step reads.
  int64_t bytes_per_token() const;

 private:
  struct VectorSlot {
    const void* LayerWeights::* member;  // nullptr: not of a layer
    size_t layer;
    int64_t size;
    const void* Model::* own = nullptr;
  };
  VectorSlot vector_slot(const std::string& slot) const;
  Linear* matrix_slot(const std::string& slot);

  ModelConfig config_;
  Arena arena_;
  std::vector<LayerWeights> layers_;
  const void *norm_ = nullptr, *norm_bias_ = nullptr, *positions_ = nullptr;
  Linear embed_, head_;
  struct RopeTable {
    const float* cos = nullptr;
    const float* sin = nullptr;
  };
  RopeTable rope_[kNumRopeTables];
  int64_t num_positions_ = 0;
};

}  // namespace pe
