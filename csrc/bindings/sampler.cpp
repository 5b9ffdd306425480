// Drawing tokens for sequences that keep their settings and history on the native side.
#include "engine/sampler.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include "bindings/gil.h"
#include "bindings/tensor.h"
#include "engine/decoder.h"
#include "engine/prompt_lookup.h"
#include "runtime/error.h"

namespace py = pybind11;

namespace pe {
namespace {

constexpr Check kCheck{"sampler"};

using States = std::vector<std::shared_ptr<SampleState>>;

using Proposals = std::vector<std::span<const int32_t>>;

// What a caller gets of a batch: the tokens of the first state, of the second, ...
struct Drawn {
  std::vector<int32_t> counts;     // tokens of each state: its accepted proposals, and one more
  std::vector<int32_t> token_ids;  // -1: not finite, -2: no token (as SampleStatus)
  std::vector<float> logprobs;     // empty unless asked for
  std::vector<int32_t> top_ids;    // num_logprobs of each token
  std::vector<float> top_logprobs;
};

// Moves entry `from` to the end of the first `count` that are kept.
template <class T>
void keep(std::vector<T>& values, size_t from, size_t count, size_t width) {
  if (from == count) return;
  std::copy_n(values.begin() + static_cast<long>(from * width), width,
              values.begin() + static_cast<long>(count * width));
}

// Draws for all rows at once, as if every proposal had been drawn; a row counts if the rows before it did draw theirs.
// Row 1 + proposals[i].size() after the first of state i is the first of state i + 1.
Drawn draw(const float* logits, int64_t vocab_size, int64_t row_stride, const States& states,
           const Proposals& proposals, int64_t num_logprobs) {
  std::vector<SampleRow> rows;
  for (size_t i = 0; i < states.size(); ++i) states[i]->append_rows(proposals[i], rows);
  const size_t num_rows = rows.size();
  std::vector<SampleStatus> statuses(num_rows);
  Drawn out;
  out.token_ids.resize(num_rows);
  const bool has_logprobs = num_logprobs >= 0;
  const size_t width = has_logprobs ? static_cast<size_t>(num_logprobs) : 0;
  if (has_logprobs) out.logprobs.resize(num_rows, std::numeric_limits<float>::quiet_NaN());
  out.top_ids.resize(num_rows * width);
  out.top_logprobs.resize(num_rows * width);
  sample_cpu({.logits = logits,
              .rows = rows.data(),
              .token_ids = out.token_ids.data(),
              .logprobs = has_logprobs ? out.logprobs.data() : nullptr,
              .top_ids = width ? out.top_ids.data() : nullptr,
              .top_logprobs = width ? out.top_logprobs.data() : nullptr,
              .statuses = statuses.data(),
              .num_rows = static_cast<int64_t>(num_rows),
              .vocab_size = vocab_size,
              .logits_row_stride = row_stride,
              .num_logprobs = width ? num_logprobs : 0});
  size_t first = 0, count = 0;
  for (size_t i = 0; i < states.size(); ++i) {
    const size_t begin = count;
    size_t num_ok = 0;
    for (size_t j = 0; j <= proposals[i].size(); ++j) {
      const size_t r = first + j;
      const bool ok = statuses[r] == SampleStatus::ok;
      const int32_t token = ok ? out.token_ids[r] : -static_cast<int32_t>(statuses[r]);
      out.token_ids[count] = token;
      if (has_logprobs) keep(out.logprobs, r, count, 1);
      keep(out.top_ids, r, count, width);
      keep(out.top_logprobs, r, count, width);
      ++count;
      num_ok += ok;
      if (!ok || j == proposals[i].size() || token != proposals[i][j]) break;
    }
    states[i]->push(std::span(out.token_ids).subspan(begin, num_ok));
    out.counts.push_back(static_cast<int32_t>(count - begin));
    first += proposals[i].size() + 1;
  }
  out.token_ids.resize(count);
  if (has_logprobs) out.logprobs.resize(count);
  out.top_ids.resize(count * width);
  out.top_logprobs.resize(count * width);
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
  return draw(logits.ptr<const float>(), logits.shape[1], logits.strides[0], states, Proposals(states.size()),
              num_logprobs);
}

// A decoder's steps with draws after chosen tokens. Keeps the logits between calls: fresh pages would cost more than the
// draws.
class Sampler {
 public:
  explicit Sampler(std::shared_ptr<Decoder> decoder) : decoder_(std::move(decoder)) {}

  // states[i] draws after token rows[i] of the step, and after each of the num_proposals[i] tokens behind it as long as
  // they are what it drew; the others are taken back from the cache.
  Drawn step(const std::vector<int32_t>& token_ids, const std::vector<int32_t>& seqs, const std::vector<int32_t>& rows,
             const States& states, int64_t num_logprobs, const std::vector<int32_t>& num_proposals) {
    const int64_t vocab_size = check(rows, states, num_logprobs);
    if (!num_proposals.empty() && num_proposals.size() != rows.size())
      kCheck.fail("num_proposals", std::to_string(rows.size()) + ", one per row", std::to_string(num_proposals.size()));
    Proposals proposals(rows.size());
    std::vector<int32_t> wanted;
    for (size_t i = 0; i < rows.size(); ++i) {
      const int32_t count = num_proposals.empty() ? 0 : num_proposals[i];
      wanted.push_back(rows[i]);
      if (count == 0) continue;  // the decoder checks the row
      check_proposals(token_ids, seqs, rows[i], count);
      proposals[i] = std::span(token_ids).subspan(static_cast<size_t>(rows[i]) + 1, static_cast<size_t>(count));
      for (int32_t j = 1; j <= count; ++j) wanted.push_back(rows[i] + j);
    }
    const GilRelease release;
    compute(token_ids, seqs, wanted);
    Drawn drawn = draw(logits_.data(), vocab_size, vocab_size, states, proposals, num_logprobs);
    std::vector<bool> is_rejected(token_ids.size());
    for (size_t i = 0; i < rows.size(); ++i)
      for (size_t j = static_cast<size_t>(drawn.counts[i]); j <= proposals[i].size(); ++j)
        is_rejected[static_cast<size_t>(rows[i]) + j] = true;
    KvCache& cache = decoder_->cache();
    for (size_t t = 0; t < token_ids.size(); ++t)
      if (!is_rejected[t]) cache.commit(seqs[t], token_ids[t]);
    for (size_t t = 0; t < token_ids.size(); ++t)
      if (is_rejected[t]) cache.truncate(seqs[t], cache.num_committed(seqs[t]));
    return drawn;
  }

  // What states[i] would draw after token rows[i] if these were its logits: limits[i] tokens, one step after the other.
  // The states stay as they are. The decoder's sequences go on by the tokens and all but the last of the proposals.
  std::vector<std::vector<int32_t>> propose(std::vector<int32_t> token_ids, std::vector<int32_t> seqs,
                                            std::vector<int32_t> rows, const States& states,
                                            const std::vector<int32_t>& limits) {
    const int64_t vocab_size = check(rows, states, -1);
    if (limits.size() != rows.size())
      kCheck.fail("limits", std::to_string(rows.size()) + ", one per row", std::to_string(limits.size()));
    for (const int32_t limit : limits)
      if (limit < 1) kCheck.fail("limits", "at least 1", std::to_string(limit));
    const GilRelease release;
    std::vector<std::vector<int32_t>> proposals(states.size());
    std::vector<size_t> active(states.size());
    std::iota(active.begin(), active.end(), size_t{0});
    while (!active.empty()) {
      compute(token_ids, seqs, rows);
      for (size_t t = 0; t < token_ids.size(); ++t) decoder_->cache().commit(seqs[t], token_ids[t]);
      draw_next(vocab_size, states, active, proposals);
      std::vector<int32_t> next_ids, next_seqs, next_rows;
      std::vector<size_t> still_active;
      for (size_t r = 0; r < active.size(); ++r) {
        const size_t i = active[r];
        if (proposals[i].back() < 0) {
          proposals[i].pop_back();
        } else if (static_cast<int32_t>(proposals[i].size()) < limits[i]) {
          next_rows.push_back(static_cast<int32_t>(next_ids.size()));
          next_ids.push_back(proposals[i].back());
          next_seqs.push_back(seqs[static_cast<size_t>(rows[r])]);
          still_active.push_back(i);
        }
      }
      token_ids = std::move(next_ids), seqs = std::move(next_seqs), rows = std::move(next_rows);
      active = std::move(still_active);
    }
    return proposals;
  }

 private:
  int64_t check(const std::vector<int32_t>& rows, const States& states, int64_t num_logprobs) const {
    const int64_t vocab_size = decoder_->model().config().vocab_size;
    if (states.size() != rows.size())
      kCheck.fail("states", std::to_string(rows.size()) + ", one per row", std::to_string(states.size()));
    check_states(states, vocab_size, num_logprobs);
    return vocab_size;
  }

  static void check_proposals(const std::vector<int32_t>& token_ids, const std::vector<int32_t>& seqs, int32_t row,
                              int32_t count) {
    const auto num_tokens = static_cast<int64_t>(std::min(token_ids.size(), seqs.size()));
    bool good = count > 0 && row >= 0 && int64_t{row} + count < num_tokens;
    for (int32_t j = 1; good && j <= count; ++j)
      good = seqs[static_cast<size_t>(row + j)] == seqs[static_cast<size_t>(row)];
    if (!good)
      kCheck.fail("num_proposals", "tokens of one sequence behind their row",
                  std::to_string(count) + " behind " + std::to_string(row));
  }

  void compute(const std::vector<int32_t>& token_ids, const std::vector<int32_t>& seqs,
               const std::vector<int32_t>& rows) {
    const size_t num_logits = rows.size() * static_cast<size_t>(decoder_->model().config().vocab_size);
    if (logits_.size() < num_logits) logits_.resize(num_logits);
    Decoder::Step step;
    step.token_ids = token_ids;
    step.seqs = seqs;
    step.rows = rows;
    if (!rows.empty()) step.logits = logits_.data();
    decoder_->compute(step);
  }

  // Appends to proposals[i] of each active i what states[i] draws from its row of logits: negative for no token.
  void draw_next(int64_t vocab_size, const States& states, const std::vector<size_t>& active,
                 std::vector<std::vector<int32_t>>& proposals) const {
    std::vector<SampleRow> views, rows;
    for (const size_t i : active) {
      views.clear();
      states[i]->append_rows(proposals[i], views);
      rows.push_back(views.back());
    }
    std::vector<int32_t> drawn(active.size());
    std::vector<SampleStatus> statuses(active.size());
    sample_cpu({.logits = logits_.data(),
                .rows = rows.data(),
                .token_ids = drawn.data(),
                .logprobs = nullptr,
                .top_ids = nullptr,
                .top_logprobs = nullptr,
                .statuses = statuses.data(),
                .num_rows = static_cast<int64_t>(rows.size()),
                .vocab_size = vocab_size,
                .logits_row_stride = vocab_size,
                .num_logprobs = 0});
    for (size_t r = 0; r < active.size(); ++r)
      proposals[active[r]].push_back(statuses[r] == SampleStatus::ok ? drawn[r] : -1);
  }

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

// One mask for the next draw [words], or one for each of the next draws [draws, words].
void set_mask(SampleState& state, const Tensor& mask) {
  kCheck.dtype(mask, "mask", {DType::i32});
  const auto num_words = (state.vocab_size() + 31) / 32;
  const bool is_one = mask.ndim == 1;
  const int64_t got = is_one || mask.ndim == 2 ? mask.shape[mask.ndim - 1] : 0;
  if (got != num_words)
    throw ArgumentError("mask: expected " + std::to_string(num_words) + " words, got " + std::to_string(got));
  kCheck.contiguous(mask, "mask");
  const int64_t num_masks = is_one ? 1 : mask.shape[0];
  state.set_masks({mask.ptr<const uint32_t>(), static_cast<size_t>(num_masks * num_words)});
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
      .def_readonly("counts", &Drawn::counts)
      .def_readonly("token_ids", &Drawn::token_ids)
      .def_readonly("logprobs", &Drawn::logprobs)
      .def_readonly("top_ids", &Drawn::top_ids)
      .def_readonly("top_logprobs", &Drawn::top_logprobs);

  py::class_<Sampler>(m, "Sampler")
      .def(py::init<std::shared_ptr<Decoder>>(), py::arg("decoder"))
      .def("step", &Sampler::step, py::arg("token_ids"), py::arg("seqs"), py::arg("rows"), py::arg("states"),
           py::arg("num_logprobs"), py::arg("num_proposals") = std::vector<int32_t>())
      .def("propose", &Sampler::propose, py::arg("token_ids"), py::arg("seqs"), py::arg("rows"), py::arg("states"),
           py::arg("limits"));

  py::class_<PromptLookup>(m, "PromptLookup")
      .def(py::init<int64_t, int64_t>(), py::kw_only(), py::arg("min_match"), py::arg("max_match"))
      .def(
          "extend", [](PromptLookup& l, const std::vector<int32_t>& token_ids) { l.extend(token_ids); },
          py::arg("token_ids"))
      .def("propose", &PromptLookup::propose, py::arg("limit"))
      .def_property_readonly("num_tokens", &PromptLookup::num_tokens);
  m.def("draw", draw_from_logits, py::arg("logits"), py::arg("states"), py::arg("num_logprobs"));
}

}  // namespace pe
