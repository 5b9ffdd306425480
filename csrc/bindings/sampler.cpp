// Drawing tokens for sequences that keep their settings and history on the native side.
#include "engine/sampler.h"

#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "bindings/gil.h"
#include "bindings/tensor.h"
#include "engine/decoder.h"
#include "runtime/error.h"

namespace py = pybind11;

namespace pe {
namespace {

constexpr Check kCheck{"sampler"};

using States = std::vector<std::shared_ptr<SampleState>>;

// What a caller gets of a batch, row after row.
struct Drawn {
  std::vector<int32_t> token_ids;  // -1: not finite, -2: no token (as SampleStatus)
  std::vector<float> logprobs;     // empty unless asked for
  std::vector<int32_t> top_ids;    // [B * num_logprobs]
  std::vector<float> top_logprobs;
};

Drawn draw(const float* logits, int64_t vocab_size, int64_t row_stride, const States& states, int64_t num_logprobs) {
  const size_t num_rows = states.size();
  std::vector<SampleRow> rows(num_rows);
  std::vector<SampleStatus> statuses(num_rows);
  for (size_t r = 0; r < num_rows; ++r) rows[r] = states[r]->row();
  Drawn out;
  out.token_ids.resize(num_rows);
  const bool has_logprobs = num_logprobs >= 0;
  const size_t num_top = has_logprobs ? num_rows * static_cast<size_t>(num_logprobs) : 0;
  if (has_logprobs) out.logprobs.resize(num_rows, std::numeric_limits<float>::quiet_NaN());
  out.top_ids.resize(num_top);
  out.top_logprobs.resize(num_top);
  sample_cpu({.logits = logits,
              .rows = rows.data(),
              .token_ids = out.token_ids.data(),
              .logprobs = has_logprobs ? out.logprobs.data() : nullptr,
              .top_ids = num_top ? out.top_ids.data() : nullptr,
              .top_logprobs = num_top ? out.top_logprobs.data() : nullptr,
              .statuses = statuses.data(),
              .num_rows = static_cast<int64_t>(num_rows),
              .vocab_size = vocab_size,
              .logits_row_stride = row_stride,
              .num_logprobs = num_top ? num_logprobs : 0});
  for (size_t r = 0; r < num_rows; ++r) {
    if (statuses[r] == SampleStatus::ok) {
      states[r]->push(out.token_ids[r]);
    } else {
      states[r]->push_nothing();
      out.token_ids[r] = -static_cast<int32_t>(statuses[r]);
    }
  }
  return out;
}

void check_states(const States& states, int64_t vocab_size, int64_t num_logprobs) {
  for (size_t r = 0; r < states.size(); ++r) {
    if (!states[r]) kCheck.fail("states", "a state for every row", "None at row " + std::to_string(r));
    if (states[r]->vocab_size() != vocab_size)
      kCheck.fail("states", "vocabularies of " + std::to_string(vocab_size),
                  std::to_string(states[r]->vocab_size()) + " at row " + std::to_string(r));
    for (size_t other = 0; other < r; ++other)
      if (states[other] == states[r]) kCheck.fail("states", "each once", "row " + std::to_string(r) + " again");
  }
  if (num_logprobs > vocab_size)
    kCheck.fail("num_logprobs", "at most " + std::to_string(vocab_size), std::to_string(num_logprobs));
}

Drawn draw_from_logits(const Tensor& logits, const States& states, int64_t num_logprobs) {
  kCheck.dtype(logits, "logits", {DType::f32});
  kCheck.unit_stride(kCheck.shape(logits, "logits", {static_cast<int64_t>(states.size()), -1}), "logits");
  check_states(states, logits.shape[1], num_logprobs);
  const GilRelease release;
  return draw(logits.ptr<const float>(), logits.shape[1], logits.strides[0], states, num_logprobs);
}

// A decoder's steps with a draw after chosen tokens. Keeps the logits between calls: fresh pages would cost more than
// the draw.
class Sampler {
 public:
  explicit Sampler(std::shared_ptr<Decoder> decoder) : decoder_(std::move(decoder)) {}

  Drawn step(const std::vector<int32_t>& token_ids, const std::vector<int32_t>& seqs, const std::vector<int32_t>& rows,
             const States& states, int64_t num_logprobs) {
    const int64_t vocab_size = decoder_->model().config().vocab_size;
    if (states.size() != rows.size())
      kCheck.fail("states", std::to_string(rows.size()) + ", one per row", std::to_string(states.size()));
    check_states(states, vocab_size, num_logprobs);
    const GilRelease release;
    const size_t num_logits = rows.size() * static_cast<size_t>(vocab_size);
    if (logits_.size() < num_logits) logits_.resize(num_logits);
    Decoder::Step step;
    step.token_ids = token_ids;
    step.seqs = seqs;
    step.rows = rows;
    if (!rows.empty()) step.logits = logits_.data();
    decoder_->step(step);
    return draw(logits_.data(), vocab_size, vocab_size, states, num_logprobs);
  }

 private:
  std::shared_ptr<Decoder> decoder_;
  std::vector<float> logits_;
};

std::shared_ptr<SampleState> make_state(int64_t vocab_size, float temperature, int32_t top_k, float top_p, float min_p,
                                        float repetition_penalty, float frequency_penalty, float presence_penalty,
                                        uint64_t seed, uint64_t sequence, std::vector<int32_t> prompt_ids,
                                        std::vector<int32_t> bias_ids, std::vector<float> biases,
                                        std::vector<int32_t> allowed_ids, std::vector<int32_t> end_ids,
                                        int64_t min_tokens, std::vector<std::vector<int32_t>> bad_words) {
  return std::make_shared<SampleState>(vocab_size, SampleOptions{.temperature = temperature,
                                                                 .top_p = top_p,
                                                                 .min_p = min_p,
                                                                 .top_k = top_k,
                                                                 .repetition_penalty = repetition_penalty,
                                                                 .frequency_penalty = frequency_penalty,
                                                                 .presence_penalty = presence_penalty,
                                                                 .seed = seed,
                                                                 .sequence = sequence,
                                                                 .prompt_ids = std::move(prompt_ids),
                                                                 .bias_ids = std::move(bias_ids),
                                                                 .biases = std::move(biases),
                                                                 .allowed_ids = std::move(allowed_ids),
                                                                 .end_ids = std::move(end_ids),
                                                                 .min_tokens = min_tokens,
                                                                 .bad_words = std::move(bad_words)});
}

void set_mask(SampleState& state, const Tensor& mask) {
  kCheck.dtype(mask, "mask", {DType::i32});
  kCheck.contiguous(kCheck.shape(mask, "mask", {-1}), "mask");
  state.set_mask({mask.ptr<const uint32_t>(), static_cast<size_t>(mask.shape[0])});
}

}  // namespace

void bind_sampler(py::module_& m) {
  py::class_<SampleState, std::shared_ptr<SampleState>>(m, "SampleState")
      .def(py::init(&make_state), py::arg("vocab_size"), py::kw_only(), py::arg("temperature") = 0.0f,
           py::arg("top_k") = 0, py::arg("top_p") = 1.0f, py::arg("min_p") = 0.0f, py::arg("repetition_penalty") = 1.0f,
           py::arg("frequency_penalty") = 0.0f, py::arg("presence_penalty") = 0.0f, py::arg("seed") = 0,
           py::arg("sequence") = 0, py::arg("prompt_ids") = std::vector<int32_t>(),
           py::arg("bias_ids") = std::vector<int32_t>(), py::arg("biases") = std::vector<float>(),
           py::arg("allowed_ids") = std::vector<int32_t>(), py::arg("end_ids") = std::vector<int32_t>(),
           py::arg("min_tokens") = 0, py::arg("bad_words") = std::vector<std::vector<int32_t>>())
      .def("set_mask", set_mask, py::arg("mask"))
      .def_property_readonly("num_output_ids", &SampleState::num_output_ids);

  py::class_<Drawn>(m, "Drawn")
      .def_readonly("token_ids", &Drawn::token_ids)
      .def_readonly("logprobs", &Drawn::logprobs)
      .def_readonly("top_ids", &Drawn::top_ids)
      .def_readonly("top_logprobs", &Drawn::top_logprobs);

  py::class_<Sampler>(m, "Sampler")
      .def(py::init<std::shared_ptr<Decoder>>(), py::arg("decoder"))
      .def("step", &Sampler::step, py::arg("token_ids"), py::arg("seqs"), py::arg("rows"), py::arg("states"),
           py::arg("num_logprobs"));
  m.def("draw", draw_from_logits, py::arg("logits"), py::arg("states"), py::arg("num_logprobs"));
}

}  // namespace pe
