// The native decoder.
#include <memory>

#include "bindings/gil.h"
#include "bindings/tensor.h"
#include "engine/decoder.h"
#include "runtime/error.h"

namespace py = pybind11;

namespace pe {
namespace {

constexpr Check kCheck{"decoder"};

DType parse_float(const char* name, const std::string& dtype) {
  if (dtype == "float32") return DType::f32;
  if (dtype == "bfloat16") return DType::bf16;
  throw ArgumentError(std::string(name) + ": expected float32 or bfloat16, got '" + dtype + "'");
}

int64_t positive(const char* name, int64_t value) {
  if (value < 1 || value > (int64_t{1} << 31))
    throw ArgumentError(std::string(name) + ": expected 1 to 2^31, got " + std::to_string(value));
  return value;
}

const Tensor& ids(const Tensor& t, const char* name) {
  kCheck.dtype(t, name, {DType::i32});
  return kCheck.contiguous(kCheck.shape(t, name, {-1}), name);
}

std::span<const int32_t> span_of(const Tensor& t) { return {t.ptr<const int32_t>(), static_cast<size_t>(t.shape[0])}; }

QkNorm parse_qk_norm(const std::optional<std::string>& kind) {
  if (!kind) return QkNorm::none;
  if (*kind == "head") return QkNorm::head;
  if (*kind == "full") return QkNorm::full;
  throw ArgumentError("qk_norm: expected None, 'head' or 'full', got '" + *kind + "'");
}

struct NormPlacement {
  bool before_attention, before_mlp, after;
};

NormPlacement parse_norm_placement(const std::string& placement) {
  if (placement == "pre") return {true, true, false};
  if (placement == "shared") return {true, false, false};
  if (placement == "post") return {false, false, true};
  if (placement == "both") return {true, true, true};
  throw ArgumentError("norm_placement: expected 'pre', 'shared', 'post' or 'both', got '" + placement + "'");
}

NormKind parse_norm(const std::string& name) {
  if (name == "rms") return NormKind::rms;
  if (name == "layer") return NormKind::layer;
  throw ArgumentError("norm: expected 'rms' or 'layer', got '" + name + "'");
}

void check_activation(const std::string& name, bool gated) {
  if (name != "gelu_tanh" && name != (gated ? "silu" : "gelu"))
    throw ArgumentError(std::string("activation: expected ") + (gated ? "'silu'" : "'gelu'") +
                        " or 'gelu_tanh', got '" + name + "'");
}

ProductInput parse_product_input(const std::string& name) {
  if (name == "unrounded") return ProductInput::unrounded;
  if (name == "bfloat16") return ProductInput::bf16;
  if (name == "int8") return ProductInput::int8;
  throw ArgumentError("product_input: expected 'unrounded', 'bfloat16' or 'int8', got '" + name + "'");
}

std::shared_ptr<Model> make_model(int64_t vocab_size, int64_t hidden_size, int64_t intermediate_size,
                                  int64_t num_layers, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                                  int64_t rotary_dim, const std::vector<int64_t>& sliding_windows,
                                  const std::vector<int>& rope_tables, float norm_eps, float norm_weight_offset,
                                  float embedding_multiplier, float residual_multiplier, float attention_scale,
                                  bool tie_word_embeddings, bool qkv_bias, bool o_bias, bool mlp_bias,
                                  const std::optional<std::string>& qk_norm, const std::string& norm, bool norm_bias,
                                  const std::string& norm_placement, bool parallel_blocks, bool gated_mlp,
                                  const std::string& activation, int64_t num_learned_positions,
                                  const std::string& act_dtype, const std::string& product_input,
                                  int64_t capacity_bytes) {
  if (num_heads < 1 || num_kv_heads < 1 || num_heads % num_kv_heads != 0)
    throw ArgumentError("num_heads: expected a multiple of num_kv_heads, got " + std::to_string(num_heads) + " and " +
                        std::to_string(num_kv_heads));
  if (head_dim < 2 || head_dim > 256 || head_dim % 2 != 0)
    throw ArgumentError("head_dim: expected an even number from 2 to 256, got " + std::to_string(head_dim));
  if (rotary_dim < 2 || rotary_dim > head_dim || rotary_dim % 2 != 0)
    throw ArgumentError("rotary_dim: expected an even number from 2 to " + std::to_string(head_dim) + ", got " +
                        std::to_string(rotary_dim));
  const auto num_entries = static_cast<size_t>(positive("num_layers", num_layers));
  const auto one_per_layer = [&](const char* name, size_t got) {
    if (got != num_entries)
      throw ArgumentError(std::string(name) + ": expected " + std::to_string(num_entries) +
                          " entries, one per layer, got " + std::to_string(got));
  };
  one_per_layer("sliding_windows", sliding_windows.size());
  one_per_layer("rope_tables", rope_tables.size());
  std::vector<LayerConfig> layers;
  for (size_t i = 0; i < num_entries; ++i) {
    if (sliding_windows[i] < 0)
      throw ArgumentError("sliding_windows: expected 0 or more, got " + std::to_string(sliding_windows[i]));
    if (rope_tables[i] < -1 || rope_tables[i] >= kNumRopeTables)
      throw ArgumentError("rope_tables: expected -1, 0 or 1, got " + std::to_string(rope_tables[i]));
    layers.push_back({sliding_windows[i], rope_tables[i]});
  }
  const NormPlacement placement = parse_norm_placement(norm_placement);
  const NormKind norm_kind = parse_norm(norm);
  if (norm_kind == NormKind::layer && (placement.after || qk_norm || norm_weight_offset != 0.0f))
    throw ArgumentError(
        "norm: expected 'rms' beside norms after a block, a qk_norm or a norm_weight_offset, got 'layer'");
  if (norm_kind == NormKind::rms && norm_bias) throw ArgumentError("norm_bias: expected False beside 'rms', got True");
  if (parallel_blocks ? placement.after : placement.before_attention != placement.before_mlp)
    throw ArgumentError(std::string("norm_placement: expected one for ") + (parallel_blocks ? "parallel" : "serial") +
                        " blocks, got '" + norm_placement + "'");
  check_activation(activation, gated_mlp);
  if (num_learned_positions < 0 || num_learned_positions > (int64_t{1} << 28))
    throw ArgumentError("num_learned_positions: expected 0 to 2^28, got " + std::to_string(num_learned_positions));
  const ModelConfig config{.vocab_size = positive("vocab_size", vocab_size),
                           .hidden_size = positive("hidden_size", hidden_size),
                           .intermediate_size = positive("intermediate_size", intermediate_size),
                           .num_layers = num_layers,
                           .num_heads = num_heads,
                           .num_kv_heads = num_kv_heads,
                           .head_dim = head_dim,
                           .rotary_dim = rotary_dim,
                           .layers = std::move(layers),
                           .norm_eps = norm_eps,
                           .norm_weight_offset = norm_weight_offset,
                           .embedding_multiplier = embedding_multiplier,
                           .residual_multiplier = residual_multiplier,
                           .attention_scale = attention_scale,
                           .tie_word_embeddings = tie_word_embeddings,
                           .qkv_bias = qkv_bias,
                           .o_bias = o_bias,
                           .mlp_bias = mlp_bias,
                           .norm = norm_kind,
                           .norm_bias = norm_bias,
                           .has_attention_norm = placement.before_attention,
                           .has_mlp_norm = placement.before_mlp,
                           .has_post_norm = placement.after,
                           .parallel_blocks = parallel_blocks,
                           .qk_norm = parse_qk_norm(qk_norm),
                           .gated_mlp = gated_mlp,
                           .gate_activation = activation == "silu" ? GateActivation::silu : GateActivation::gelu_tanh,
                           .plain_activation = activation == "gelu" ? GeluForm::erf : GeluForm::tanh,
                           .num_learned_positions = num_learned_positions,
                           .act_dtype = parse_float("act_dtype", act_dtype),
                           .product_input = parse_product_input(product_input)};
  return std::make_shared<Model>(config, static_cast<size_t>(positive("capacity_bytes", capacity_bytes)));
}

void set_vector(Model& model, const std::string& slot, const Tensor& values) {
  const int64_t width = model.config().act_dtype == DType::f32 ? 4 : 2;
  kCheck.dtype(values, "values", {DType::u8});
  kCheck.contiguous(kCheck.shape(values, "values", {model.vector_size(slot) * width}), "values");
  model.set_vector(slot, values.data);
}

// Stacks the rows of `parts`, each in its order.
void add_matrix(Model& model, const std::string& slot, const std::string& format_name, const std::vector<Tensor>& parts,
                const std::vector<std::optional<Tensor>>& row_orders, int64_t num_cols) {
  const WeightFormat format = parse_weight_format(format_name);
  if (row_orders.size() != parts.size())
    kCheck.fail("row_orders", std::to_string(parts.size()) + ", one per part", std::to_string(row_orders.size()));
  (void)packed_weight_bytes(format, 1, num_cols);
  std::vector<const uint8_t*> rows;
  for (size_t p = 0; p < parts.size(); ++p) {
    const Tensor& part = kCheck.dtype(parts[p], "parts", {DType::u8});
    kCheck.unit_stride(kCheck.shape(part, "parts", {-1, weight_row_bytes(format, num_cols)}), "parts");
    const std::optional<Tensor>& order = row_orders[p];
    if (order) {
      kCheck.dtype(*order, "row_orders", {DType::i32});
      kCheck.contiguous(kCheck.shape(*order, "row_orders", {-1}), "row_orders");
    }
    const int64_t num_rows = order ? order->shape[0] : part.shape[0];
    for (int64_t i = 0; i < num_rows; ++i) {
      const int64_t row = order ? order->ptr<int32_t>()[i] : i;
      if (row < 0 || row >= part.shape[0])
        kCheck.fail("row_orders", "rows of the part, 0 to " + std::to_string(part.shape[0] - 1), std::to_string(row));
      rows.push_back(part.ptr<uint8_t>() + row * part.strides[0]);
    }
  }
  (void)packed_weight_bytes(format, static_cast<int64_t>(rows.size()), num_cols);
  const GilRelease release;
  model.add_matrix(slot, format, rows, num_cols);
}

void set_rope(Model& model, const Tensor& cos, const Tensor& sin, int table) {
  if (table < 0 || table >= kNumRopeTables) throw ArgumentError("table: expected 0 or 1, got " + std::to_string(table));
  kCheck.dtype(cos, "cos", {DType::f32});
  kCheck.contiguous(kCheck.shape(cos, "cos", {-1, model.config().rotary_dim / 2}), "cos");
  kCheck.dtype(sin, "sin", {DType::f32});
  kCheck.contiguous(kCheck.shape(sin, "sin", {cos.shape[0], model.config().rotary_dim / 2}), "sin");
  model.set_rope(table, cos.ptr<float>(), sin.ptr<float>(), cos.shape[0]);
}

std::shared_ptr<Decoder> make_decoder(const std::shared_ptr<Model>& model, int64_t page_size, int64_t num_pages,
                                      const std::string& kv_dtype, int64_t max_tokens) {
  model->check();
  if (page_size < 16 || page_size > 4096 || page_size % 16 != 0)
    throw ArgumentError("page_size: expected a multiple of 16 up to 4096, got " + std::to_string(page_size));
  const ModelConfig& c = model->config();
  return std::make_shared<Decoder>(
      model,
      KvCacheConfig{.num_layers = c.num_layers,
                    .num_kv_heads = c.num_kv_heads,
                    .head_dim = c.head_dim,
                    .page_size = page_size,
                    .num_pages = positive("num_pages", num_pages),
                    .dtype = kv_dtype == "int8" ? DType::i8 : parse_float("kv_dtype", kv_dtype)},
      positive("max_tokens", max_tokens));
}

void step(Decoder& decoder, const Tensor& token_ids, const Tensor& seqs, const Tensor& rows,
          const std::optional<Tensor>& logits, const std::optional<Tensor>& targets,
          const std::optional<Tensor>& target_logprobs, const std::optional<Tensor>& hidden_rows,
          const std::optional<Tensor>& hidden) {
  Decoder::Step step;
  step.token_ids = span_of(ids(token_ids, "token_ids"));
  step.seqs = span_of(ids(seqs, "seqs"));
  step.rows = span_of(ids(rows, "rows"));
  if (logits) {
    kCheck.dtype(*logits, "logits", {DType::f32});
    kCheck.shape(*logits, "logits", {rows.shape[0], decoder.model().config().vocab_size});
    step.logits = kCheck.writable(kCheck.contiguous(*logits, "logits"), "logits").ptr<float>();
  }
  if (targets.has_value() != target_logprobs.has_value())
    kCheck.fail("target_logprobs", "an output exactly when there are targets", "the other");
  if (targets) {
    step.targets = span_of(ids(*targets, "targets"));
    kCheck.dtype(*target_logprobs, "target_logprobs", {DType::f32});
    kCheck.shape(*target_logprobs, "target_logprobs", {rows.shape[0]});
    step.target_logprobs =
        kCheck.writable(kCheck.contiguous(*target_logprobs, "target_logprobs"), "target_logprobs").ptr<float>();
  }
  if (hidden_rows.has_value() != hidden.has_value())
    kCheck.fail("hidden", "an output exactly when there are hidden_rows", "the other");
  if (hidden_rows) {
    step.hidden_rows = span_of(ids(*hidden_rows, "hidden_rows"));
    kCheck.dtype(*hidden, "hidden", {DType::f32});
    kCheck.shape(*hidden, "hidden", {hidden_rows->shape[0], decoder.model().config().hidden_size});
    step.hidden = kCheck.writable(kCheck.contiguous(*hidden, "hidden"), "hidden").ptr<float>();
  }
  const GilRelease release;
  decoder.step(step);
}

py::dict profile(const Decoder& decoder) {
  py::dict seconds;
  for (int i = 0; i < kNumPhaseKinds; ++i)
    seconds[phase_kind_name(static_cast<PhaseKind>(i))] = decoder.profile().seconds[i];
  py::dict d;
  d["num_steps"] = decoder.profile().num_steps;
  d["num_tokens"] = decoder.profile().num_tokens;
  d["seconds"] = seconds;
  return d;
}

py::dict cache_stats(Decoder& decoder) {
  const KvCache& cache = decoder.cache();
  py::dict d;
  d["num_indexed_pages"] = cache.num_indexed_pages();
  d["num_evicted_pages"] = cache.stats().num_evicted_pages;
  d["num_copied_pages"] = cache.stats().num_copied_pages;
  d["num_merged_pages"] = cache.stats().num_merged_pages;
  return d;
}

}  // namespace

void bind_engine(py::module_& m) {
  m.def(
      "packed_weight_bytes",
      [](const std::string& format, int64_t num_rows, int64_t num_cols) {
        return packed_weight_bytes(parse_weight_format(format), num_rows, num_cols);
      },
      py::arg("format"), py::arg("num_rows"), py::arg("num_cols"));

  py::class_<Model, std::shared_ptr<Model>>(m, "DecoderModel")
      .def(py::init(&make_model), py::kw_only(), py::arg("vocab_size"), py::arg("hidden_size"),
           py::arg("intermediate_size"), py::arg("num_layers"), py::arg("num_heads"), py::arg("num_kv_heads"),
           py::arg("head_dim"), py::arg("rotary_dim"), py::arg("sliding_windows"), py::arg("rope_tables"),
           py::arg("norm_eps"), py::arg("norm_weight_offset"), py::arg("embedding_multiplier"),
           py::arg("residual_multiplier"), py::arg("attention_scale"), py::arg("tie_word_embeddings"),
           py::arg("qkv_bias"), py::arg("o_bias"), py::arg("mlp_bias"), py::arg("qk_norm"), py::arg("norm"),
           py::arg("norm_bias"), py::arg("norm_placement"), py::arg("parallel_blocks"), py::arg("gated_mlp"),
           py::arg("activation"), py::arg("num_learned_positions"), py::arg("act_dtype"), py::arg("product_input"),
           py::arg("capacity_bytes"))
      .def("set_vector", set_vector, py::arg("slot"), py::arg("values"))
      .def("add_matrix", add_matrix, py::arg("slot"), py::arg("format"), py::arg("parts"), py::arg("row_orders"),
           py::arg("num_cols"))
      .def("set_rope", set_rope, py::arg("cos"), py::arg("sin"), py::kw_only(), py::arg("table") = 0)
      .def("check", &Model::check)
      .def_property_readonly("num_learned_positions", [](const Model& m) { return m.config().num_learned_positions; })
      .def_property_readonly("num_bytes", &Model::num_bytes)
      .def_property_readonly("bytes_per_token", &Model::bytes_per_token);

  py::class_<Decoder, std::shared_ptr<Decoder>>(m, "Decoder")
      .def(py::init(&make_decoder), py::arg("model"), py::kw_only(), py::arg("page_size"), py::arg("num_pages"),
           py::arg("kv_dtype"), py::arg("max_tokens"))
      .def("step", step, py::arg("token_ids"), py::arg("seqs"), py::arg("rows"), py::kw_only(),
           py::arg("logits") = py::none(), py::arg("targets") = py::none(), py::arg("target_logprobs") = py::none(),
           py::arg("hidden_rows") = py::none(), py::arg("hidden") = py::none())
      .def("add_sequence", &Decoder::add_sequence, py::arg("salt") = py::none(), py::arg("adapter") = py::none())
      .def("fork_sequence", &Decoder::fork_sequence, py::arg("seq"))
      .def(
          "adopt_prefix",
          [](Decoder& d, int32_t seq, const Tensor& next_token_ids) {
            return d.cache().adopt_prefix(seq, span_of(ids(next_token_ids, "next_token_ids")));
          },
          py::arg("seq"), py::arg("next_token_ids"))
      .def("free_sequence", &Decoder::free_sequence, py::arg("seq"))
      .def(
          "pages_needed", [](Decoder& d, int32_t seq, int64_t n) { return d.cache().pages_needed(seq, n); },
          py::arg("seq"), py::arg("num_tokens"))
      .def(
          "grow", [](Decoder& d, int32_t seq, int64_t n) { d.cache().grow(seq, n); }, py::arg("seq"),
          py::arg("num_tokens"))
      .def(
          "truncate", [](Decoder& d, int32_t seq, int64_t n) { d.cache().truncate(seq, n); }, py::arg("seq"),
          py::arg("length"))
      .def(
          "length", [](Decoder& d, int32_t seq) { return d.cache().length(seq); }, py::arg("seq"))
      .def_property_readonly("num_free_pages", [](Decoder& d) { return d.cache().num_free_pages(); })
      .def_property_readonly("num_pages", [](Decoder& d) { return d.cache().num_pages(); })
      .def_property_readonly("page_size", [](Decoder& d) { return d.cache().page_size(); })
      .def_property_readonly("cache_bytes", [](Decoder& d) { return d.cache().num_bytes(); })
      .def_property_readonly("max_tokens", &Decoder::max_tokens)
      .def("cache_stats", cache_stats)
      .def("profile", profile)
      .def("reset_profile", &Decoder::reset_profile);
}

}  // namespace pe
