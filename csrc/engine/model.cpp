#include "engine/model.h"

#include <array>
#include <cstring>

#include "pe/block_weights.h"
#include "pe/matmul.h"
#include "runtime/error.h"

namespace pe {
namespace {

constexpr int kNumDenseFormats = 2;
constexpr const char* kDenseNames[kNumDenseFormats] = {"float32", "bfloat16"};

int64_t act_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

[[noreturn]] void bad_slot(const std::string& slot) {
  throw ArgumentError("slot: expected the name of a weight of this model, got '" + slot + "'");
}

bool is_one_block(std::span<const uint8_t* const> rows, size_t row_bytes) {
  for (size_t i = 1; i < rows.size(); ++i)
    if (rows[i] != rows[i - 1] + row_bytes) return false;
  return true;
}

// Splits "layers.<i>.<part>"; returns the part, or "" where `slot` has another form or i is out of range.
std::string layer_part(const std::string& slot, int64_t num_layers, size_t* layer) {
  if (slot.rfind("layers.", 0) != 0) return "";
  const size_t dot = slot.find('.', 7);
  if (dot == std::string::npos || dot == 7 || dot > 17) return "";
  size_t i = 0;
  for (size_t at = 7; at < dot; ++at) {
    if (slot[at] < '0' || slot[at] > '9') return "";
    i = i * 10 + static_cast<size_t>(slot[at] - '0');
  }
  if (i >= static_cast<size_t>(num_layers)) return "";
  *layer = i;
  return slot.substr(dot + 1);
}

struct LayerVector {
  const char* name;
  const void* LayerWeights::* member;
  int64_t size;  // 0: this model has no such vector
};

std::array<LayerVector, 12> layer_vectors(const ModelConfig& c) {
  const auto when = [](bool present, int64_t size) { return present ? size : 0; };
  const bool full = c.qk_norm == QkNorm::full;
  const bool qk = c.qk_norm != QkNorm::none;
  return {{{"attention_norm", &LayerWeights::attention_norm, when(c.has_attention_norm, c.hidden_size)},
           {"attention_norm_bias", &LayerWeights::attention_norm_bias,
            when(c.has_attention_norm && c.norm_bias, c.hidden_size)},
           {"attention_post_norm", &LayerWeights::attention_post_norm, when(c.has_post_norm, c.hidden_size)},
           {"mlp_norm", &LayerWeights::mlp_norm, when(c.has_mlp_norm, c.hidden_size)},
           {"mlp_norm_bias", &LayerWeights::mlp_norm_bias, when(c.has_mlp_norm && c.norm_bias, c.hidden_size)},
           {"mlp_post_norm", &LayerWeights::mlp_post_norm, when(c.has_post_norm, c.hidden_size)},
           {"q_norm", &LayerWeights::q_norm, when(qk, full ? c.q_size() : c.head_dim)},
           {"k_norm", &LayerWeights::k_norm, when(qk, full ? c.kv_size() : c.head_dim)},
           {"qkv_bias", &LayerWeights::qkv_bias, when(c.qkv_bias, c.qkv_size())},
           {"o_bias", &LayerWeights::o_bias, when(c.o_bias, c.hidden_size)},
           {"gate_up_bias", &LayerWeights::gate_up_bias, when(c.mlp_bias, c.gate_up_size())},
           {"down_bias", &LayerWeights::down_bias, when(c.mlp_bias, c.hidden_size)}}};
}

}  // namespace

bool is_block_format(WeightFormat format) { return static_cast<int>(format) >= kNumDenseFormats; }

BlockFormat block_format(WeightFormat format) {
  return static_cast<BlockFormat>(static_cast<int>(format) - kNumDenseFormats);
}

DType dense_dtype(WeightFormat format) { return format == WeightFormat::f32 ? DType::f32 : DType::bf16; }

const char* weight_format_name(WeightFormat format) {
  return is_block_format(format) ? info(block_format(format)).name : kDenseNames[static_cast<int>(format)];
}

WeightFormat parse_weight_format(const std::string& name) {
  std::string known;
  for (int i = 0; i < kNumDenseFormats + kNumBlockFormats; ++i) {
    const auto format = static_cast<WeightFormat>(i);
    if (name == weight_format_name(format)) return format;
    known += (i ? ", " : "") + std::string(weight_format_name(format));
  }
  throw ArgumentError("format: expected one of " + known + ", got '" + name + "'");
}

int64_t packed_weight_bytes(WeightFormat format, int64_t num_rows, int64_t num_cols) {
  // Far above any model, far below where a product of two sizes leaves 63 bits.
  constexpr int64_t kMaxExtent = int64_t{1} << 26;
  if (num_rows < 1 || num_rows > kMaxExtent || num_cols < 1 || num_cols > kMaxExtent)
    throw ArgumentError("shape: expected 1 to 2^26 rows and columns, got " + std::to_string(num_rows) + " x " +
                        std::to_string(num_cols));
  if (!is_block_format(format))
    return static_cast<int64_t>(matmul_packed_bytes(num_rows, num_cols, dense_dtype(format)));
  if (const int64_t block_size = info(block_format(format)).block_size; num_cols % block_size != 0)
    throw ArgumentError("num_cols: expected a multiple of " + std::to_string(block_size) + " for " +
                        std::string(weight_format_name(format)) + ", got " + std::to_string(num_cols));
  return block_weights_packed_bytes(block_format(format), num_rows, num_cols);
}

int64_t weight_row_bytes(WeightFormat format, int64_t num_cols) {
  if (!is_block_format(format)) return num_cols * act_bytes(dense_dtype(format));
  return block_weights_row_bytes(block_format(format), num_cols);
}

Model::Model(const ModelConfig& config, size_t capacity_bytes)
    : config_(config), arena_(capacity_bytes, "model weights"), layers_(static_cast<size_t>(config.num_layers)) {}

Model::VectorSlot Model::vector_slot(const std::string& slot) const {
  if (slot == "norm") return {nullptr, 0, config_.hidden_size, &Model::norm_};
  if (slot == "norm_bias" && config_.norm_bias) return {nullptr, 0, config_.hidden_size, &Model::norm_bias_};
  if (slot == "positions" && config_.num_learned_positions > 0)
    return {nullptr, 0, config_.num_learned_positions * config_.hidden_size, &Model::positions_};
  size_t i = 0;
  const std::string part = layer_part(slot, config_.num_layers, &i);
  for (const LayerVector& vector : layer_vectors(config_))
    if (part == vector.name && vector.size != 0) return {vector.member, i, vector.size};
  bad_slot(slot);
}

int64_t Model::vector_size(const std::string& slot) const { return vector_slot(slot).size; }

Linear* Model::matrix_slot(const std::string& slot) {
  if (slot == "embed") return &embed_;
  if (slot == "head" && !config_.tie_word_embeddings) return &head_;
  size_t i = 0;
  const std::string part = layer_part(slot, config_.num_layers, &i);
  if (part == "qkv") return &layers_[i].qkv;
  if (part == "o") return &layers_[i].o;
  if (part == "gate_up") return &layers_[i].gate_up;
  if (part == "down") return &layers_[i].down;
  bad_slot(slot);
}

void Model::set_vector(const std::string& slot, const void* values) {
  const VectorSlot target = vector_slot(slot);
  const auto num_bytes = static_cast<size_t>(target.size * act_bytes(config_.act_dtype));
  uint8_t* copy = arena_.allocate(num_bytes);
  std::memcpy(copy, values, num_bytes);
  if (target.member)
    layers_[target.layer].*target.member = copy;
  else
    this->*target.own = copy;
}

void Model::add_matrix(const std::string& slot, WeightFormat format, std::span<const uint8_t* const> rows,
                       int64_t num_cols) {
  Linear* parts = matrix_slot(slot);
  const auto num_rows = static_cast<int64_t>(rows.size());
  uint8_t* packed = arena_.allocate(static_cast<size_t>(packed_weight_bytes(format, num_rows, num_cols)));
  if (is_block_format(format)) {
    block_weights_pack({.rows = rows.data(),
                        .packed = packed,
                        .num_rows = num_rows,
                        .num_cols = num_cols,
                        .format = block_format(format)});
  } else {
    const DType dtype = dense_dtype(format);
    const auto row_bytes = static_cast<size_t>(weight_row_bytes(format, num_cols));
    std::vector<uint8_t> stacked;
    const uint8_t* w = num_rows > 0 ? rows[0] : nullptr;
    if (!is_one_block(rows, row_bytes)) {
      stacked.resize(rows.size() * row_bytes);
      for (size_t i = 0; i < rows.size(); ++i) std::memcpy(stacked.data() + i * row_bytes, rows[i], row_bytes);
      w = stacked.data();
    }
    matmul_pack_cpu({.w = w,
                     .w_row_stride = num_cols,
                     .w_col_stride = 1,
                     .num_rows = num_rows,
                     .num_cols = num_cols,
                     .w_dtype = dtype,
                     .packed_dtype = dtype,
                     .packed = packed});
  }
  const int64_t offset = parts->empty() ? 0 : parts->back().offset + parts->back().num_rows;
  parts->push_back({format, num_rows, num_cols, offset, packed});
}

void Model::set_rope(int table, const float* cos, const float* sin, int64_t num_positions) {
  if (num_positions_ != 0 && num_positions != num_positions_)
    throw ArgumentError("cos: expected the " + std::to_string(num_positions_) + " positions of the other table, got " +
                        std::to_string(num_positions));
  const size_t num_bytes = static_cast<size_t>(num_positions * config_.rotary_dim / 2) * sizeof(float);
  auto* cos_copy = reinterpret_cast<float*>(arena_.allocate(num_bytes));
  auto* sin_copy = reinterpret_cast<float*>(arena_.allocate(num_bytes));
  std::memcpy(cos_copy, cos, num_bytes);
  std::memcpy(sin_copy, sin, num_bytes);
  rope_[table] = {cos_copy, sin_copy};
  num_positions_ = num_positions;
}

void Model::check() const {
  const auto expect = [](const std::string& slot, const Linear& parts, int64_t num_rows, int64_t num_cols) {
    int64_t rows = 0;
    bool same_cols = true;
    for (const Matrix& part : parts) {
      rows += part.num_rows;
      same_cols = same_cols && part.num_cols == num_cols;
    }
    if (rows != num_rows || !same_cols)
      throw ArgumentError(slot + ": expected " + std::to_string(num_rows) + " x " + std::to_string(num_cols) +
                          " weights, got " + std::to_string(rows) + " rows" + (same_cols ? "" : " of another length"));
  };
  const ModelConfig& c = config_;
  expect("embed", embed_, c.vocab_size, c.hidden_size);
  if (!c.tie_word_embeddings) expect("head", head_, c.vocab_size, c.hidden_size);
  for (size_t i = 0; i < layers_.size(); ++i) {
    const LayerWeights& layer = layers_[i];
    const std::string prefix = "layers." + std::to_string(i) + ".";
    for (const LayerVector& vector : layer_vectors(c))
      if (vector.size != 0 && !(layer.*vector.member))
        throw ArgumentError(prefix + vector.name + ": expected values, got none");
    expect(prefix + "qkv", layer.qkv, c.qkv_size(), c.hidden_size);
    expect(prefix + "o", layer.o, c.hidden_size, c.q_size());
    expect(prefix + "gate_up", layer.gate_up, c.gate_up_size(), c.hidden_size);
    expect(prefix + "down", layer.down, c.hidden_size, c.intermediate_size);
  }
  if (!norm_) throw ArgumentError("norm: expected values, got none");
  if (c.norm_bias && !norm_bias_) throw ArgumentError("norm_bias: expected values, got none");
  if (c.num_learned_positions > 0 && !positions_) throw ArgumentError("positions: expected values, got none");
  if (num_positions_ == 0) throw ArgumentError("rope: expected tables, got none");
  if (c.num_learned_positions > 0 && c.num_learned_positions < num_positions_)
    throw ArgumentError("num_learned_positions: expected at least " + std::to_string(num_positions_) +
                        ", the positions of the rotary tables, got " + std::to_string(c.num_learned_positions));
  for (const LayerConfig& layer : c.layers)
    if (layer.rope_table >= 0 && !rope_[layer.rope_table].cos)
      throw ArgumentError("rope: expected table " + std::to_string(layer.rope_table) + ", got none");
}

int64_t Model::bytes_per_token() const {
  int64_t total = 0;
  const auto add = [&](const Linear& parts) {
    for (const Matrix& part : parts) total += packed_weight_bytes(part.format, part.num_rows, part.num_cols);
  };
  for (const LayerWeights& layer : layers_) {
    add(layer.qkv);
    add(layer.o);
    add(layer.gate_up);
    add(layer.down);
  }
  add(head());
  return total;
}

}  // namespace pe
