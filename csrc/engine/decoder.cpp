#include "engine/decoder.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <string>
#include <unordered_map>

#include "engine/norm_rows.h"
#include "engine/row_ops.h"
#include "pe/attention_decode.h"
#include "pe/gelu.h"
#include "pe/linear_cross_entropy.h"
#include "pe/rope.h"
#include "pe/swiglu.h"
#include "runtime/bf16.h"
#include "runtime/cpu_features.h"
#include "runtime/error.h"

namespace pe {
namespace {

// Rows whose logits exist at one time.
constexpr int64_t kHeadRows = 32;
// Rows of one item in the phases that go row by row.
constexpr int64_t kRowGrain = 4;
// The largest item of a product: enough items to balance the workers, enough rows to use a panel well.
constexpr int64_t kRowsPerProduct = 96;
constexpr int64_t kPanelsPerProduct = 8;

BlockWeights block_weights(const Matrix& part) {
  return {part.packed, part.num_rows, part.num_cols, block_format(part.format)};
}

// bf16 activations need no rounding.
bool rounds_x(const ModelConfig& c) { return c.product_input == ProductInput::bf16 && c.act_dtype == DType::f32; }

// Where products round their inputs, those of attention do, if the cache has the same dtype.
bool rounds_q(const ModelConfig& c, DType cache_dtype) {
  return c.product_input != ProductInput::unrounded && c.act_dtype == DType::f32 && cache_dtype == DType::bf16;
}

int64_t bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

uint8_t* at(void* base, int64_t elements, DType dtype) {
  return static_cast<uint8_t*>(base) + elements * bytes_of(dtype);
}
const uint8_t* at(const void* base, int64_t elements, DType dtype) {
  return static_cast<const uint8_t*>(base) + elements * bytes_of(dtype);
}

// Rows that lie as far apart as they are wide; residual and h may be nullptr.
RmsNormFwd norm_args(const ModelConfig& c, const void* x, const void* residual, const void* weight, void* h, void* y,
                     int64_t num_rows, int64_t num_cols) {
  return {.x = x,
          .residual = residual,
          .weight = weight,
          .h = h,
          .y = y,
          .rstd = nullptr,
          .num_rows = num_rows,
          .num_cols = num_cols,
          .x_row_stride = num_cols,
          .residual_row_stride = num_cols,
          .h_row_stride = num_cols,
          .y_row_stride = num_cols,
          .eps = c.norm_eps,
          .weight_offset = c.norm_weight_offset,
          .dtype = c.act_dtype};
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// out [num_cols] = row `token` of the embedding, times `multiplier`.
void embed_row(const Linear& parts, int64_t token, float multiplier, void* out, DType dtype, float* scratch) {
  const auto put = [&](int64_t k, float value) {
    if (dtype == DType::f32)
      store(static_cast<float*>(out) + k, value * multiplier);
    else
      store(static_cast<bf16*>(out) + k, value * multiplier);
  };
  const Matrix* part = &parts.front();
  for (const Matrix& candidate : parts)
    if (token >= candidate.offset) part = &candidate;
  const int64_t row = token - part->offset;
  if (is_block_format(part->format)) {
    block_weights_unpack_row(block_weights(*part), row, scratch);
    for (int64_t k = 0; k < part->num_cols; ++k) put(k, scratch[k]);
    return;
  }
  const int64_t base = row / kMatmulPanel * part->num_cols * kMatmulPanel + row % kMatmulPanel;
  for (int64_t k = 0; k < part->num_cols; ++k) {
    const int64_t i = base + k * kMatmulPanel;
    const float value = part->format == WeightFormat::f32 ? reinterpret_cast<const float*>(part->packed)[i]
                                                          : to_float(reinterpret_cast<const bf16*>(part->packed)[i]);
    put(k, value);
  }
}

using Widths = std::array<int64_t, 8>;

// Columns of h, y, qkv, attended, delta, gate_up, mlp and last.
Widths buffer_widths(const ModelConfig& c) {
  return {c.hidden_size, c.hidden_size,    c.qkv_size(),        c.q_size(),
          c.hidden_size, c.gate_up_size(), c.intermediate_size, c.hidden_size};
}

int64_t buffer_rows(int64_t max_tokens) { return std::max(max_tokens, kHeadRows); }

// The larger of what the two block kernels want beside the widest input.
size_t workspace_bytes(const ModelConfig& c, int64_t max_tokens) {
  const int64_t widest =
      (std::max({c.hidden_size, c.q_size(), c.intermediate_size}) + kGroupSize - 1) / kGroupSize * kGroupSize;
  const int64_t rows = buffer_rows(max_tokens);
  int64_t floats = rows * widest;  // of unpacked embeddings
  for (int i = 0; i < kNumBlockFormats; ++i)
    floats = std::max(floats, matmul_w4a16_workspace_floats(static_cast<BlockFormat>(i), true, rows, widest));
  return static_cast<size_t>(std::max(floats * 4, rows * quantized_row_bytes(widest)));
}

size_t buffer_bytes(const ModelConfig& c, int64_t max_tokens) {
  size_t total = Arena::rounded(workspace_bytes(c, max_tokens)) +
                 Arena::rounded(static_cast<size_t>(kHeadRows * c.vocab_size * 4));
  for (const int64_t width : buffer_widths(c))
    total += Arena::rounded(static_cast<size_t>(buffer_rows(max_tokens) * width * bytes_of(c.act_dtype)));
  return total;
}

}  // namespace

const char* phase_kind_name(PhaseKind kind) {
  constexpr const char* kNames[] = {"embed",   "norm",       "qkv",  "rope", "attention", "o",
                                    "gate_up", "activation", "down", "head", "logprob",   "lora"};
  return kNames[static_cast<int>(kind)];
}

Decoder::Decoder(std::shared_ptr<const Model> model, const KvCacheConfig& cache, int64_t max_tokens)
    : model_(std::move(model)),
      cache_(cache),
      max_tokens_(max_tokens),
      arena_(buffer_bytes(model_->config(), max_tokens), "activations") {
  const ModelConfig& c = model_->config();
  const Widths widths = buffer_widths(c);
  void** buffers[] = {&h_, &y_, &qkv_, &attended_, &delta_, &gate_up_, &mlp_, &last_};
  for (size_t i = 0; i < widths.size(); ++i)
    *buffers[i] = arena_.allocate(static_cast<size_t>(buffer_rows(max_tokens) * widths[i] * bytes_of(c.act_dtype)));
  workspace_ = arena_.allocate(workspace_bytes(c, max_tokens));
  logits_ = reinterpret_cast<float*>(arena_.allocate(static_cast<size_t>(kHeadRows * c.vocab_size * 4)));
  adapter_buffers_ = adapter_buffers();
}

int32_t Decoder::add_sequence(std::optional<std::string> salt, std::shared_ptr<Adapter> adapter) {
  if (adapter) adapter->freeze();
  if (salt) {
    const std::string of_adapter = adapter ? '#' + std::to_string(adapter->id()) : "";
    salt = isa_name(active_isa()) + of_adapter + ':' + *salt;
  }
  const int32_t seq = cache_.add_sequence(std::move(salt));
  adapters_.resize(std::max(adapters_.size(), static_cast<size_t>(seq) + 1));
  adapters_[static_cast<size_t>(seq)] = std::move(adapter);
  return seq;
}

int32_t Decoder::fork_sequence(int32_t seq) {
  const int32_t child = cache_.fork_sequence(seq);
  adapters_.resize(std::max(adapters_.size(), static_cast<size_t>(child) + 1));
  adapters_[static_cast<size_t>(child)] = adapters_[static_cast<size_t>(seq)];
  return child;
}

void Decoder::free_sequence(int32_t seq) {
  cache_.free_sequence(seq);
  adapters_[static_cast<size_t>(seq)] = nullptr;
}

void Decoder::check(const Step& step) {
  const auto range = [](const char* name, int64_t i, int64_t got, int64_t end) {
    if (got < 0 || got >= end)
      throw ArgumentError(std::string(name) + ": expected 0 to " + std::to_string(end - 1) + ", got " +
                          std::to_string(got) + " at " + std::to_string(i));
  };
  const auto num_tokens = static_cast<int64_t>(step.token_ids.size());
  if (num_tokens < 1 || num_tokens > max_tokens_)
    throw ArgumentError("token_ids: expected 1 to " + std::to_string(max_tokens_) + " tokens, got " +
                        std::to_string(num_tokens));
  if (step.seqs.size() != step.token_ids.size())
    throw ArgumentError("seqs: expected " + std::to_string(num_tokens) + " entries, one per token, got " +
                        std::to_string(step.seqs.size()));
  for (int64_t t = 0; t < num_tokens; ++t) {
    range("token_ids", t, step.token_ids[static_cast<size_t>(t)], model_->config().vocab_size);
    (void)cache_.length(step.seqs[static_cast<size_t>(t)]);
  }
  for (size_t r = 0; r < step.rows.size(); ++r) range("rows", static_cast<int64_t>(r), step.rows[r], num_tokens);
  if (step.hidden_rows.size() > step.token_ids.size())
    throw ArgumentError("hidden_rows: expected at most " + std::to_string(num_tokens) + ", one per token, got " +
                        std::to_string(step.hidden_rows.size()));
  for (size_t r = 0; r < step.hidden_rows.size(); ++r)
    range("hidden_rows", static_cast<int64_t>(r), step.hidden_rows[r], num_tokens);
  if (!step.targets.empty() && step.targets.size() != step.rows.size())
    throw ArgumentError("targets: expected " + std::to_string(step.rows.size()) + " entries, one per row, got " +
                        std::to_string(step.targets.size()));
  for (size_t r = 0; r < step.targets.size(); ++r)
    range("targets", static_cast<int64_t>(r), step.targets[r], model_->config().vocab_size);
}

// Numbers the sequences of this step from 0, finds each token's position, and lists the pages of each sequence.
void Decoder::place(const Step& step) {
  std::unordered_map<int32_t, int32_t> batch_index;
  std::vector<int32_t> order;
  std::unordered_map<int32_t, int64_t> next;
  positions_.clear();
  batch_seqs_.clear();
  for (const int32_t seq : step.seqs) {
    if (batch_index.emplace(seq, static_cast<int32_t>(order.size())).second) {
      order.push_back(seq);
      next[seq] = cache_.num_committed(seq);
    }
    if (next[seq] == cache_.length(seq))
      throw ArgumentError("seqs: sequence " + std::to_string(seq) + " has " + std::to_string(cache_.length(seq)) +
                          " tokens claimed, fewer than it would have after this step");
    const int64_t position = next[seq]++;
    if (position >= model_->num_positions())
      throw ArgumentError("seqs: sequence " + std::to_string(seq) + " grows past the " +
                          std::to_string(model_->num_positions()) + " positions of this model");
    positions_.push_back(static_cast<int32_t>(position));
    batch_seqs_.push_back(batch_index[seq]);
  }
  block_table_stride_ = 1;
  for (const int32_t seq : order)
    block_table_stride_ = std::max(block_table_stride_, static_cast<int64_t>(cache_.pages(seq).size()));
  block_table_.assign(order.size() * static_cast<size_t>(block_table_stride_), 0);
  for (size_t i = 0; i < order.size(); ++i)
    std::copy(cache_.pages(order[i]).begin(), cache_.pages(order[i]).end(),
              block_table_.begin() + static_cast<int64_t>(i) * block_table_stride_);
}

void Decoder::step(const Step& step) {
  compute(step);
  for (size_t t = 0; t < step.token_ids.size(); ++t) cache_.commit(step.seqs[t], step.token_ids[t]);
}

void Decoder::compute(const Step& step) {
  check(step);
  place(step);
  std::vector<const Adapter*> adapters;
  for (const int32_t seq : step.seqs) adapters.push_back(adapters_[static_cast<size_t>(seq)].get());
  adapter_plan_.update(adapters, adapter_buffers_, model_->config().act_dtype);
  const int num_workers = region_size();
  Phases phases(num_workers);
  reserve_scratch(num_workers);
  plan_attention(num_workers);
  parallel_region(num_workers, [&](int worker_index) {
    Phases::Worker worker(phases, worker_index);
    run(step, worker);
  });
  ++profile_.num_steps;
  profile_.num_tokens += static_cast<int64_t>(step.token_ids.size());
}

void Decoder::reserve_scratch(int num_workers) {
  const ModelConfig& c = model_->config();
  AttentionDecode shape{};
  shape.num_heads = c.num_heads;
  shape.num_kv_heads = c.num_kv_heads;
  shape.head_dim = c.head_dim;
  scratch_bytes_ = Arena::rounded(static_cast<size_t>(attention_decode_scratch_bytes(shape)));
  if (!scratch_ || scratch_->capacity() < scratch_bytes_ * static_cast<size_t>(num_workers)) {
    scratch_ = std::make_unique<Arena>(scratch_bytes_ * static_cast<size_t>(num_workers), "attention scratch");
    scratch_base_ = scratch_->allocate(scratch_->capacity());
  }
}

AttentionDecode Decoder::attention_of(int64_t layer) const {
  const ModelConfig& c = model_->config();
  return {.q = qkv_,
          .k_pages = cache_.k_pages(layer),
          .v_pages = cache_.v_pages(layer),
          .y = attended_,
          .seq = batch_seqs_.data(),
          .position = positions_.data(),
          .block_table = block_table_.data(),
          .num_rows = static_cast<int64_t>(positions_.size()),
          .num_heads = c.num_heads,
          .num_kv_heads = c.num_kv_heads,
          .head_dim = c.head_dim,
          .page_size = cache_.page_size(),
          .q_row_stride = c.qkv_size(),
          .q_head_stride = c.head_dim,
          .y_row_stride = c.q_size(),
          .y_head_stride = c.head_dim,
          .k_page_stride = cache_.page_stride(),
          .v_page_stride = cache_.page_stride(),
          .block_table_stride = block_table_stride_,
          .k_scales = cache_.k_scales(layer),
          .v_scales = cache_.v_scales(layer),
          .k_scale_page_stride = cache_.scale_page_stride(),
          .v_scale_page_stride = cache_.scale_page_stride(),
          .sliding_window = c.layers[static_cast<size_t>(layer)].sliding_window,
          .scale = c.attention_scale,
          .dtype = c.act_dtype,
          .cache_dtype = cache_.dtype(),
          .round_q = rounds_q(c, cache_.dtype())};
}

void Decoder::plan_attention(int num_workers) {
  attention_plans_.clear();
  size_t num_parts = 0;
  const auto planned = [&](int64_t sliding_window) {
    return std::ranges::any_of(attention_plans_, [&](const auto& p) { return p.sliding_window == sliding_window; });
  };
  for (int64_t layer = 0; layer < model_->config().num_layers; ++layer) {
    const AttentionDecode args = attention_of(layer);
    if (planned(args.sliding_window)) continue;
    AttentionPlan& plan = attention_plans_.emplace_back();
    plan.sliding_window = args.sliding_window;
    plan.items.resize(static_cast<size_t>(attention_decode_items(args, nullptr)));
    attention_decode_items(args, plan.items.data());
    const int64_t count = attention_decode_parts(args, nullptr);
    if (!attention_decode_splits(std::ssize(plan.items), count, num_workers)) continue;
    plan.parts.resize(static_cast<size_t>(count));
    attention_decode_parts(args, plan.parts.data());
    num_parts = std::max(num_parts, plan.parts.size());
  }
  const size_t bytes = num_parts * static_cast<size_t>(attention_decode_part_floats(attention_of(0))) * sizeof(float);
  if (bytes > 0 && (!part_states_ || part_states_->capacity() < bytes)) {
    part_states_ = std::make_unique<Arena>(bytes, "attention parts");
    part_states_base_ = reinterpret_cast<float*>(part_states_->allocate(bytes));
  }
}

void Decoder::attend(Phases::Worker& worker, int64_t layer) {
  const AttentionDecode args = attention_of(layer);
  const AttentionDecodeIsa& isa = attention_decode_isa();
  const AttentionPlan& plan = *std::ranges::find(attention_plans_, args.sliding_window, &AttentionPlan::sliding_window);
  const int64_t part_floats = attention_decode_part_floats(args);
  uint8_t* scratch = scratch_base_ + scratch_bytes_ * static_cast<size_t>(worker.index());
  const auto each = [&](const std::vector<AttentionDecodeItem>& items, const auto& body) {
    worker.run(std::ssize(items), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i, items[static_cast<size_t>(i)]);
    });
  };
  if (plan.parts.empty()) return each(plan.items, [&](int64_t, const auto& item) { isa.rows(args, item, scratch); });
  each(plan.parts,
       [&](int64_t i, const auto& part) { isa.part(args, part, part_states_base_ + i * part_floats, scratch); });
  each(plan.items, [&](int64_t, const auto& item) {
    isa.merge(args, item, part_states_base_ + item.first_part * part_floats, scratch);
  });
}

void Decoder::mark(Phases::Worker& worker, PhaseKind kind) {
  if (worker.index() != 0) return;
  const double t = now();
  profile_.seconds[static_cast<int>(kind)] += t - last_mark_;
  last_mark_ = t;
}

void Decoder::run(const Step& step, Phases::Worker& worker) {
  if (worker.index() == 0) last_mark_ = now();
  const ModelConfig& c = model_->config();
  // Nothing has been multiplied yet, so the workspace is free for rows in f32.
  float* unpacked = reinterpret_cast<float*>(workspace_);
  worker.run(static_cast<int64_t>(step.token_ids.size()), kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      void* row = at(h_, t * c.hidden_size, c.act_dtype);
      embed_row(model_->embed(), step.token_ids[static_cast<size_t>(t)], c.embedding_multiplier, row, c.act_dtype,
                unpacked + t * c.hidden_size);
      if (c.num_learned_positions > 0)
        add_rows(row, 0, at(model_->positions(), positions_[static_cast<size_t>(t)] * c.hidden_size, c.act_dtype), 0,
                 c.hidden_size, 0, 1, c.act_dtype);
    }
  });
  mark(worker, PhaseKind::embed);
  layers(step, worker);
  if (!step.rows.empty()) head(step, worker);
  if (!step.hidden_rows.empty()) hidden(step, worker);
}

void Decoder::prepare(const Linear& parts, const void* x, int64_t x_row_stride, int64_t row_begin, int64_t row_end,
                      int64_t num_rows) const {
  const ModelConfig& c = model_->config();
  for (const Matrix& part : parts) {
    if (!is_block_format(part.format)) continue;
    if (c.product_input == ProductInput::int8) {
      matmul_w4a8_isa().quantize_rows(int8_product(part, x, x_row_stride, nullptr, 0, num_rows, c.act_dtype), row_begin,
                                      row_end);
      return;  // the same rows serve every part
    }
    matmul_w4a16_isa().prepare(float_product(part, x, x_row_stride, nullptr, 0, num_rows, c.act_dtype), row_begin,
                               row_end);
  }
}

Matmul Decoder::dense_product(const Matrix& part, const void* x, int64_t x_row_stride, void* y, int64_t y_row_stride,
                              int64_t num_rows, DType y_dtype) const {
  return {.x = x,
          .packed = part.packed,
          .y = y,
          .num_rows = num_rows,
          .num_cols = part.num_rows,
          .depth = part.num_cols,
          .x_row_stride = x_row_stride,
          .y_row_stride = y_row_stride,
          .x_dtype = model_->config().act_dtype,
          .w_dtype = dense_dtype(part.format),
          .y_dtype = y_dtype};
}

MatmulW4A16 Decoder::float_product(const Matrix& part, const void* x, int64_t x_row_stride, void* y,
                                   int64_t y_row_stride, int64_t num_rows, DType y_dtype) const {
  return {.x = x,
          .weight = block_weights(part),
          .y = y,
          .workspace = reinterpret_cast<float*>(workspace_),
          .num_rows = num_rows,
          .x_row_stride = x_row_stride,
          .y_row_stride = y_row_stride,
          .x_dtype = model_->config().act_dtype,
          .y_dtype = y_dtype,
          .round_x = rounds_x(model_->config())};
}

MatmulW4A8 Decoder::int8_product(const Matrix& part, const void* x, int64_t x_row_stride, void* y, int64_t y_row_stride,
                                 int64_t num_rows, DType y_dtype) const {
  return {.x = x,
          .weight = block_weights(part),
          .y = y,
          .quantized = workspace_,
          .num_rows = num_rows,
          .x_row_stride = x_row_stride,
          .y_row_stride = y_row_stride,
          .x_dtype = model_->config().act_dtype,
          .y_dtype = y_dtype};
}

void Decoder::linear(Phases::Worker& worker, const Linear& parts, const void* x, int64_t x_row_stride, void* y,
                     int64_t y_row_stride, int64_t num_rows, DType y_dtype) const {
  for (const Matrix& part : parts) {
    const int64_t num_part_panels = num_panels(part.num_rows);
    const int64_t rows_per_item = std::min(num_rows, kRowsPerProduct);
    const int64_t panels_per_item = std::clamp<int64_t>(num_part_panels / 16, 1, kPanelsPerProduct);
    const int64_t row_items = (num_rows + rows_per_item - 1) / rows_per_item;
    const int64_t panel_items = (num_part_panels + panels_per_item - 1) / panels_per_item;
    void* out = at(y, part.offset, y_dtype);
    const auto multiply = [&](auto tile, const auto& product) {
      worker.run(row_items * panel_items, 1, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
          // Rows run fastest: the same panels serve all rows while they are in cache.
          const int64_t row_begin = item % row_items * rows_per_item;
          const int64_t panel_begin = item / row_items * panels_per_item;
          tile(product, row_begin, std::min(row_begin + rows_per_item, num_rows), panel_begin,
               std::min(panel_begin + panels_per_item, num_part_panels));
        }
      });
    };
    if (!is_block_format(part.format))
      multiply(matmul_isa().tile, dense_product(part, x, x_row_stride, out, y_row_stride, num_rows, y_dtype));
    else if (model_->config().product_input == ProductInput::int8)
      multiply(matmul_w4a8_isa().tile, int8_product(part, x, x_row_stride, out, y_row_stride, num_rows, y_dtype));
    else
      multiply(matmul_w4a16_isa().tile, float_product(part, x, x_row_stride, out, y_row_stride, num_rows, y_dtype));
  }
}

std::vector<AdapterBuffers> Decoder::adapter_buffers() const {
  const ModelConfig& c = model_->config();
  std::vector<AdapterBuffers> buffers;
  for (int64_t i = 0; i < c.num_layers; ++i) {
    const LayerWeights& layer = model_->layer(i);
    buffers.push_back({layer.attention_norm ? y_ : h_, qkv_, c.hidden_size, c.qkv_size()});
    buffers.push_back({attended_, delta_, c.q_size(), c.hidden_size});
    buffers.push_back({c.parallel_blocks || layer.mlp_norm ? y_ : h_, gate_up_, c.hidden_size, c.gate_up_size()});
    buffers.push_back({mlp_, delta_, c.intermediate_size, c.hidden_size});
  }
  return buffers;
}

void Decoder::adapt(Phases::Worker& worker, int64_t layer, AdapterSlot slot) {
  const AdapterPlan::Product* product = adapter_plan_.product(layer, slot);
  if (!product) return;
  for (const LoraProduct part : {LoraProduct::shrink, LoraProduct::expand})
    worker.run(product->num_tiles(part), 1, [&](int64_t begin, int64_t end) { product->run(part, begin, end); });
  mark(worker, PhaseKind::lora);
}

void Decoder::settle(const void* bias, const void* post_norm, int64_t begin, int64_t end) const {
  const ModelConfig& c = model_->config();
  if (bias) add_rows(delta_, c.hidden_size, bias, 0, c.hidden_size, begin, end, c.act_dtype);
  if (post_norm)
    rms_norm_isa().fwd(norm_args(c, delta_, nullptr, post_norm, nullptr, delta_, end, c.hidden_size), begin, end);
  if (c.residual_multiplier != 1.0f)
    scale_rows(delta_, c.hidden_size, c.residual_multiplier, c.hidden_size, begin, end, c.act_dtype);
}

void Decoder::finish_qk(const LayerWeights& layer, int64_t begin, int64_t end) const {
  const ModelConfig& c = model_->config();
  const int64_t qkv = c.qkv_size();
  if (layer.qkv_bias) add_rows(qkv_, qkv, layer.qkv_bias, 0, qkv, begin, end, c.act_dtype);
  if (c.qk_norm == QkNorm::none) return;
  const auto norm = [&](int64_t offset, int64_t width, const void* weight) {
    const int64_t num_cols = c.qk_norm == QkNorm::head ? c.head_dim : width;
    for (int64_t t = begin; t < end; ++t) {
      void* row = at(qkv_, t * qkv + offset, c.act_dtype);
      const int64_t num_rows = width / num_cols;
      rms_norm_isa().fwd(norm_args(c, row, nullptr, weight, nullptr, row, num_rows, num_cols), 0, num_rows);
    }
  };
  norm(0, c.q_size(), layer.q_norm);
  norm(c.q_size(), c.kv_size(), layer.k_norm);
}

void Decoder::layers(const Step& step, Phases::Worker& worker) {
  const ModelConfig& c = model_->config();
  const auto num_tokens = static_cast<int64_t>(step.token_ids.size());
  const DType act = c.act_dtype;
  const int64_t qkv = c.qkv_size();

  // Adds what the block before left in delta to the residual stream; returns the input of the next block.
  struct Leaving {
    const void *bias, *post_norm;
  };
  const auto enter = [&](const Leaving* before, const void* weight, const void* norm_bias,
                         const Linear& next) -> const void* {
    const RmsNormFwd args = norm_args(c, before ? delta_ : h_, before ? h_ : nullptr, weight, before ? h_ : nullptr, y_,
                                      num_tokens, c.hidden_size);
    const void* input = weight ? y_ : h_;
    worker.run(num_tokens, kRowGrain, [&](int64_t begin, int64_t end) {
      if (before) settle(before->bias, before->post_norm, begin, end);
      if (weight)
        norm_rows(c.norm, args, norm_bias, begin, end);
      else if (before)
        add_rows(h_, c.hidden_size, delta_, c.hidden_size, c.hidden_size, begin, end, act);
      prepare(next, input, c.hidden_size, begin, end, num_tokens);
    });
    mark(worker, PhaseKind::norm);
    return input;
  };

  // The same between blocks that are parallel: the next one starts from h as it was, or from what attention started from.
  const auto join = [&](const Leaving& before, const LayerWeights& layer) -> const void* {
    const RmsNormFwd args = norm_args(c, h_, nullptr, layer.mlp_norm, nullptr, y_, num_tokens, c.hidden_size);
    worker.run(num_tokens, kRowGrain, [&](int64_t begin, int64_t end) {
      if (layer.mlp_norm) norm_rows(c.norm, args, layer.mlp_norm_bias, begin, end);
      settle(before.bias, before.post_norm, begin, end);
      add_rows(h_, c.hidden_size, delta_, c.hidden_size, c.hidden_size, begin, end, act);
      prepare(layer.gate_up, y_, c.hidden_size, begin, end, num_tokens);
    });
    mark(worker, PhaseKind::norm);
    return y_;
  };

  Leaving before{};
  for (int64_t i = 0; i < c.num_layers; ++i) {
    const LayerWeights& layer = model_->layer(i);
    const LayerConfig& layer_config = c.layers[static_cast<size_t>(i)];
    const void* x = enter(i > 0 ? &before : nullptr, layer.attention_norm, layer.attention_norm_bias, layer.qkv);
    linear(worker, layer.qkv, x, c.hidden_size, qkv_, qkv, num_tokens, act);
    mark(worker, PhaseKind::qkv);
    adapt(worker, i, AdapterSlot::qkv);

    // Query and key heads lie side by side in a row of qkv, so one rotation takes both.
    const Rope rope{.x = qkv_,
                    .cos = model_->rope_cos(std::max(layer_config.rope_table, 0)),
                    .sin = model_->rope_sin(std::max(layer_config.rope_table, 0)),
                    .positions = positions_.data(),
                    .y = qkv_,
                    .num_tokens = num_tokens,
                    .num_heads = c.num_heads + c.num_kv_heads,
                    .head_dim = c.rotary_dim,
                    .num_positions = model_->num_positions(),
                    .x_token_stride = qkv,
                    .x_head_stride = c.head_dim,
                    .y_token_stride = qkv,
                    .y_head_stride = c.head_dim,
                    .inverse = false,
                    .dtype = act};
    const KvAppend append{.k = at(qkv_, c.q_size(), act),
                          .v = at(qkv_, c.q_size() + c.kv_size(), act),
                          .k_pages = cache_.k_pages(i),
                          .v_pages = cache_.v_pages(i),
                          .seq = batch_seqs_.data(),
                          .position = positions_.data(),
                          .block_table = block_table_.data(),
                          .num_rows = num_tokens,
                          .num_kv_heads = c.num_kv_heads,
                          .head_dim = c.head_dim,
                          .page_size = cache_.page_size(),
                          .k_row_stride = qkv,
                          .k_head_stride = c.head_dim,
                          .v_row_stride = qkv,
                          .v_head_stride = c.head_dim,
                          .k_page_stride = cache_.page_stride(),
                          .v_page_stride = cache_.page_stride(),
                          .block_table_stride = block_table_stride_,
                          .k_scales = cache_.k_scales(i),
                          .v_scales = cache_.v_scales(i),
                          .k_scale_page_stride = cache_.scale_page_stride(),
                          .v_scale_page_stride = cache_.scale_page_stride(),
                          .dtype = act,
                          .cache_dtype = cache_.dtype()};
    worker.run(num_tokens, kRowGrain, [&](int64_t begin, int64_t end) {
      finish_qk(layer, begin, end);
      if (layer_config.rope_table >= 0) rope_isa().rotate(rope, begin, end);
      attention_decode_isa().append(append, begin, end);
    });
    mark(worker, PhaseKind::rope);

    attend(worker, i);
    mark(worker, PhaseKind::attention);

    if (is_block_format(layer.o.front().format)) {
      worker.run(num_tokens, kRowGrain,
                 [&](int64_t begin, int64_t end) { prepare(layer.o, attended_, c.q_size(), begin, end, num_tokens); });
    }
    linear(worker, layer.o, attended_, c.q_size(), delta_, c.hidden_size, num_tokens, act);
    mark(worker, PhaseKind::o);
    adapt(worker, i, AdapterSlot::o);

    before = {layer.o_bias, layer.attention_post_norm};
    x = c.parallel_blocks ? join(before, layer) : enter(&before, layer.mlp_norm, layer.mlp_norm_bias, layer.gate_up);
    linear(worker, layer.gate_up, x, c.hidden_size, gate_up_, c.gate_up_size(), num_tokens, act);
    mark(worker, PhaseKind::gate_up);
    adapt(worker, i, AdapterSlot::gate_up);

    const SwigluFwd swiglu{.gate = gate_up_,
                           .up = at(gate_up_, c.intermediate_size, act),
                           .y = mlp_,
                           .num_rows = num_tokens,
                           .num_cols = c.intermediate_size,
                           .gate_row_stride = 2 * c.intermediate_size,
                           .up_row_stride = 2 * c.intermediate_size,
                           .y_row_stride = c.intermediate_size,
                           .activation = c.gate_activation,
                           .dtype = act};
    const GeluFwd gelu{.x = gate_up_,
                       .y = mlp_,
                       .num_rows = num_tokens,
                       .num_cols = c.intermediate_size,
                       .x_row_stride = c.intermediate_size,
                       .y_row_stride = c.intermediate_size,
                       .form = c.plain_activation,
                       .dtype = act};
    worker.run(num_tokens, kRowGrain, [&](int64_t begin, int64_t end) {
      if (layer.gate_up_bias)
        add_rows(gate_up_, c.gate_up_size(), layer.gate_up_bias, 0, c.gate_up_size(), begin, end, act);
      if (c.gated_mlp)
        swiglu_isa().fwd(swiglu, begin, end);
      else
        gelu_isa().fwd(gelu, begin, end);
      prepare(layer.down, mlp_, c.intermediate_size, begin, end, num_tokens);
    });
    mark(worker, PhaseKind::activation);
    linear(worker, layer.down, mlp_, c.intermediate_size, delta_, c.hidden_size, num_tokens, act);
    mark(worker, PhaseKind::down);
    adapt(worker, i, AdapterSlot::down);
    before = {layer.down_bias, layer.mlp_post_norm};
  }
  // The head adds delta as it finds it, to a row as often as it is asked for.
  if (before.bias || before.post_norm || c.residual_multiplier != 1.0f) {
    worker.run(num_tokens, kRowGrain,
               [&](int64_t begin, int64_t end) { settle(before.bias, before.post_norm, begin, end); });
    mark(worker, PhaseKind::norm);
  }
}

void Decoder::last_norm(int32_t row, int64_t r) const {
  const ModelConfig& c = model_->config();
  // h is left as it is: a row may be asked for twice.
  const auto row_of = [&](void* base, int64_t i) { return at(base, i * c.hidden_size, c.act_dtype); };
  norm_rows(c.norm,
            norm_args(c, row_of(delta_, row), row_of(h_, row), model_->norm(), row_of(last_, r), row_of(y_, r), 1,
                      c.hidden_size),
            model_->norm_bias(), 0, 1);
}

void Decoder::hidden(const Step& step, Phases::Worker& worker) {
  const ModelConfig& c = model_->config();
  worker.run(static_cast<int64_t>(step.hidden_rows.size()), kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      last_norm(step.hidden_rows[static_cast<size_t>(r)], r);
      float* out = step.hidden + r * c.hidden_size;
      const void* row = at(y_, r * c.hidden_size, c.act_dtype);
      for (int64_t i = 0; i < c.hidden_size; ++i)
        out[i] =
            c.act_dtype == DType::f32 ? static_cast<const float*>(row)[i] : to_float(static_cast<const bf16*>(row)[i]);
    }
  });
  mark(worker, PhaseKind::norm);
}

// The rows that want logits, kHeadRows at a time.
void Decoder::head(const Step& step, Phases::Worker& worker) {
  const ModelConfig& c = model_->config();
  const auto num_wanted = static_cast<int64_t>(step.rows.size());
  for (int64_t first = 0; first < num_wanted; first += kHeadRows) {
    const int64_t num_rows = std::min(kHeadRows, num_wanted - first);
    worker.run(num_rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) last_norm(step.rows[static_cast<size_t>(first + r)], r);
      prepare(model_->head(), y_, c.hidden_size, begin, end, num_rows);
    });
    mark(worker, PhaseKind::norm);
    float* logits = step.logits ? step.logits + first * c.vocab_size : logits_;
    linear(worker, model_->head(), y_, c.hidden_size, logits, c.vocab_size, num_rows, DType::f32);
    mark(worker, PhaseKind::head);
    if (!step.targets.empty()) {
      worker.run(num_rows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          const float* row = logits + r * c.vocab_size;
          const float lse = linear_cross_entropy_isa().row_lse(row, c.vocab_size);
          step.target_logprobs[first + r] = row[step.targets[static_cast<size_t>(first + r)]] - lse;
        }
      });
      mark(worker, PhaseKind::logprob);
    }
  }
}

}  // namespace pe
