#include "pe/sample.h"

#include <array>
#include <cmath>
#include <optional>
#include <vector>

#include "bindings/gil.h"
#include "bindings/tensor.h"
#include "runtime/error.h"

namespace py = pybind11;

namespace pe {
namespace {

constexpr Check kCheck{"sample"};

template <class T>
const T* vector_of(const Tensor& t, const char* name, DType dtype, int64_t n) {
  kCheck.dtype(t, name, {dtype});
  return kCheck.contiguous(kCheck.shape(t, name, {n}), name).template ptr<const T>();
}

// The token that made a row impossible, for the message.
[[noreturn]] void raise_status(const Sample& a, int64_t r) {
  const std::string row = " at row " + std::to_string(r);
  if (a.statuses[r] == SampleStatus::no_token) kCheck.fail("logits", "a token with a logit above -inf", "none" + row);
  const float* logits = a.logits + r * a.logits_row_stride;
  for (int64_t i = 0; i < a.vocab_size; ++i)
    if (!(logits[i] < INFINITY))
      kCheck.fail("logits", "numbers or -inf",
                  (std::isnan(logits[i]) ? "nan" : "inf") + row + ", token " + std::to_string(i));
  kCheck.fail("repetition_penalty", "one that keeps logits finite", std::to_string(a.rows[r].repetition_penalty) + row);
}

void sample(const Tensor& logits, const Tensor& temperature, const Tensor& top_k, const Tensor& top_p,
            const Tensor& min_p, const Tensor& repetition_penalty, const Tensor& seed, const Tensor& sequence,
            const Tensor& position, const std::optional<Tensor>& previous_ids,
            const std::optional<Tensor>& previous_offsets, const Tensor& token_ids,
            const std::optional<Tensor>& logprobs, const std::optional<Tensor>& top_ids,
            const std::optional<Tensor>& top_logprobs) {
  kCheck.dtype(logits, "logits", {DType::f32});
  kCheck.unit_stride(kCheck.shape(logits, "logits", {-1, -1}), "logits");
  const int64_t num_rows = logits.shape[0], vocab_size = logits.shape[1];
  if (vocab_size < 1 || vocab_size > INT32_MAX)
    kCheck.fail("logits", "1 to 2147483647 columns", std::to_string(vocab_size));
  const float* temperatures = vector_of<float>(temperature, "temperature", DType::f32, num_rows);
  const int32_t* top_ks = vector_of<int32_t>(top_k, "top_k", DType::i32, num_rows);
  const float* top_ps = vector_of<float>(top_p, "top_p", DType::f32, num_rows);
  const float* min_ps = vector_of<float>(min_p, "min_p", DType::f32, num_rows);
  const float* penalties = vector_of<float>(repetition_penalty, "repetition_penalty", DType::f32, num_rows);
  const int64_t* seeds = vector_of<int64_t>(seed, "seed", DType::i64, num_rows);
  const int64_t* sequences = vector_of<int64_t>(sequence, "sequence", DType::i64, num_rows);
  const int64_t* positions = vector_of<int64_t>(position, "position", DType::i64, num_rows);
  const int32_t* ids = nullptr;
  const int64_t* offsets = nullptr;
  if (previous_ids.has_value() != previous_offsets.has_value())
    kCheck.fail("previous_offsets", "offsets exactly when there are previous_ids", "the other");
  if (previous_ids) {
    ids = vector_of<int32_t>(*previous_ids, "previous_ids", DType::i32, -1);
    offsets = vector_of<int64_t>(*previous_offsets, "previous_offsets", DType::i64, num_rows + 1);
    for (int64_t r = 0; r <= num_rows; ++r)
      if (offsets[r] < (r == 0 ? 0 : offsets[r - 1]) || offsets[r] > previous_ids->shape[0])
        kCheck.fail("previous_offsets", "ascending offsets into previous_ids",
                    std::to_string(offsets[r]) + " at index " + std::to_string(r));
  }
  kCheck.writable(token_ids, "token_ids");
  vector_of<int32_t>(token_ids, "token_ids", DType::i32, num_rows);
  if (logprobs) {
    kCheck.writable(*logprobs, "logprobs");
    vector_of<float>(*logprobs, "logprobs", DType::f32, num_rows);
  }
  if (top_ids.has_value() != top_logprobs.has_value())
    kCheck.fail("top_logprobs", "an output exactly when there is top_ids", "the other");
  int64_t num_logprobs = 0;
  if (top_ids) {
    kCheck.shape(kCheck.dtype(*top_ids, "top_ids", {DType::i32}), "top_ids", {num_rows, -1});
    num_logprobs = top_ids->shape[1];
    if (num_logprobs > vocab_size)
      kCheck.fail("top_ids", "at most " + std::to_string(vocab_size) + " columns, the vocabulary size",
                  std::to_string(num_logprobs));
    kCheck.writable(kCheck.contiguous(*top_ids, "top_ids"), "top_ids");
    kCheck.dtype(*top_logprobs, "top_logprobs", {DType::f32});
    kCheck.shape(*top_logprobs, "top_logprobs", {num_rows, num_logprobs});
    kCheck.writable(kCheck.contiguous(*top_logprobs, "top_logprobs"), "top_logprobs");
  }

  const GilRelease release;
  std::vector<SampleRow> rows(static_cast<size_t>(num_rows));
  std::vector<SampleStatus> statuses(static_cast<size_t>(num_rows));
  for (int64_t r = 0; r < num_rows; ++r)
    rows[static_cast<size_t>(r)] = {.temperature = temperatures[r],
                                    .top_k = top_ks[r],
                                    .top_p = top_ps[r],
                                    .min_p = min_ps[r],
                                    .repetition_penalty = penalties[r],
                                    .seed = static_cast<uint64_t>(seeds[r]),
                                    .sequence = static_cast<uint64_t>(sequences[r]),
                                    .position = static_cast<uint64_t>(positions[r]),
                                    .previous_ids = ids ? ids + offsets[r] : nullptr,
                                    .num_previous_ids = ids ? offsets[r + 1] - offsets[r] : 0};
  const Sample args{.logits = logits.ptr<float>(),
                    .rows = rows.data(),
                    .token_ids = token_ids.ptr<int32_t>(),
                    .logprobs = logprobs ? logprobs->ptr<float>() : nullptr,
                    .top_ids = top_ids ? top_ids->ptr<int32_t>() : nullptr,
                    .top_logprobs = top_logprobs ? top_logprobs->ptr<float>() : nullptr,
                    .statuses = statuses.data(),
                    .num_rows = num_rows,
                    .vocab_size = vocab_size,
                    .logits_row_stride = logits.strides[0],
                    .num_logprobs = num_logprobs};
  sample_cpu(args);
  for (int64_t r = 0; r < num_rows; ++r)
    if (statuses[static_cast<size_t>(r)] != SampleStatus::ok) raise_status(args, r);
}

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  philox4x32_10(counter.data(), key[0], key[1]);
  return counter;
}

}  // namespace

void bind_sample(py::module_& m) {
  m.def("sample_cpu", sample, py::arg("logits"), py::arg("temperature"), py::arg("top_k"), py::arg("top_p"),
        py::arg("min_p"), py::arg("repetition_penalty"), py::arg("seed"), py::arg("sequence"), py::arg("position"),
        py::arg("previous_ids"), py::arg("previous_offsets"), py::arg("token_ids"), py::arg("logprobs"),
        py::arg("top_ids"), py::arg("top_logprobs"));
  m.def("sample_uniform", sample_uniform, py::arg("seed"), py::arg("sequence"), py::arg("position"));
  m.def("philox4x32_10", philox, py::arg("counter"), py::arg("key"));
}

}  // namespace pe
