#include "pe/attention.h"

#include <optional>
#include <string>

#include "bindings/gil.h"
#include "bindings/tensor.h"

namespace py = pybind11;

namespace pe {
namespace {

constexpr Check kCheck{"attention"};

void check_heads(const Tensor& t, const char* name, DType dtype, int64_t num_tokens, int64_t num_heads,
                 int64_t head_dim) {
  kCheck.dtype(t, name, {dtype});
  kCheck.unit_stride(kCheck.shape(t, name, {num_tokens, num_heads, head_dim}), name);
}

// The offsets are data: they are read here, so that no kernel walks out of a tensor.
void check_segments(const Tensor& offsets, int64_t num_tokens) {
  kCheck.dtype(offsets, "segment_offsets", {DType::i32});
  kCheck.contiguous(kCheck.shape(offsets, "segment_offsets", {-1}), "segment_offsets");
  if (offsets.shape[0] < 1) kCheck.fail("segment_offsets", "at least 1 element", "none");
  const int32_t* p = offsets.ptr<int32_t>();
  const int64_t last = offsets.shape[0] - 1;
  if (p[0] != 0) kCheck.fail("segment_offsets", "0 first", std::to_string(p[0]));
  for (int64_t i = 0; i < last; ++i)
    if (p[i + 1] < p[i])
      kCheck.fail("segment_offsets", "ascending values",
                  std::to_string(p[i + 1]) + " after " + std::to_string(p[i]) + " at " + std::to_string(i + 1));
  if (p[last] != num_tokens)
    kCheck.fail("segment_offsets", std::to_string(num_tokens) + " last, the number of tokens", std::to_string(p[last]));
}

AttentionFwd describe(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& y,
                      const std::optional<Tensor>& lse, float scale, bool causal,
                      const std::optional<Tensor>& segment_offsets, std::optional<int64_t> sliding_window) {
  kCheck.dtype(q, "q", {DType::f32, DType::bf16});
  kCheck.unit_stride(kCheck.shape(q, "q", {-1, -1, -1}), "q");
  kCheck.shape(k, "k", {-1, -1, -1});
  const int64_t num_tokens = q.shape[0], num_heads = q.shape[1], head_dim = q.shape[2], num_kv_heads = k.shape[1];
  if (num_tokens > INT32_MAX) kCheck.fail("q", "at most 2^31 - 1 tokens", std::to_string(num_tokens));
  if (head_dim < 1 || head_dim > kAttentionMaxHeadDim)
    kCheck.fail("q", "a head_dim from 1 to 256", std::to_string(head_dim));
  if (num_kv_heads < 1 || num_heads < 1 || num_heads % num_kv_heads != 0)
    kCheck.fail("k", "a number of heads that divides " + std::to_string(num_heads), std::to_string(num_kv_heads));
  check_heads(k, "k", q.dtype, num_tokens, num_kv_heads, head_dim);
  check_heads(v, "v", q.dtype, num_tokens, num_kv_heads, head_dim);
  check_heads(y, "y", q.dtype, num_tokens, num_heads, head_dim);
  if (lse) {
    kCheck.dtype(*lse, "lse", {DType::f32});
    kCheck.contiguous(kCheck.shape(*lse, "lse", {num_tokens, num_heads}), "lse");
  }
  if (segment_offsets) check_segments(*segment_offsets, num_tokens);
  if (sliding_window && !causal) kCheck.fail("sliding_window", "None where attention is not causal", "a window");
  if (sliding_window && *sliding_window < 1)
    kCheck.fail("sliding_window", "at least 1 or None", std::to_string(*sliding_window));
  return {.q = q.data,
          .k = k.data,
          .v = v.data,
          .y = y.data,
          .lse = lse ? lse->ptr<float>() : nullptr,
          .segment_offsets = segment_offsets ? segment_offsets->ptr<int32_t>() : nullptr,
          .num_tokens = num_tokens,
          .num_segments = segment_offsets ? segment_offsets->shape[0] - 1 : 1,
          .num_heads = num_heads,
          .num_kv_heads = num_kv_heads,
          .head_dim = head_dim,
          .q_row_stride = q.strides[0],
          .k_row_stride = k.strides[0],
          .v_row_stride = v.strides[0],
          .y_row_stride = y.strides[0],
          .q_head_stride = q.strides[1],
          .k_head_stride = k.strides[1],
          .v_head_stride = v.strides[1],
          .y_head_stride = y.strides[1],
          .sliding_window = sliding_window.value_or(0),
          .scale = scale,
          .causal = causal,
          .dtype = q.dtype};
}

void fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& y, const std::optional<Tensor>& lse,
         float scale, bool causal, const std::optional<Tensor>& segment_offsets,
         std::optional<int64_t> sliding_window) {
  const AttentionFwd args = describe(q, k, v, y, lse, scale, causal, segment_offsets, sliding_window);
  kCheck.writable(y, "y");
  if (lse) kCheck.writable(*lse, "lse");
  const GilRelease release;
  attention_fwd_cpu(args);
}

void bwd(const Tensor& grad_y, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& y, const Tensor& lse,
         const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v, float scale, bool causal,
         const std::optional<Tensor>& segment_offsets, std::optional<int64_t> sliding_window) {
  const AttentionFwd fwd = describe(q, k, v, y, lse, scale, causal, segment_offsets, sliding_window);
  check_heads(grad_y, "grad_y", fwd.dtype, fwd.num_tokens, fwd.num_heads, fwd.head_dim);
  check_heads(grad_q, "grad_q", fwd.dtype, fwd.num_tokens, fwd.num_heads, fwd.head_dim);
  check_heads(grad_k, "grad_k", fwd.dtype, fwd.num_tokens, fwd.num_kv_heads, fwd.head_dim);
  check_heads(grad_v, "grad_v", fwd.dtype, fwd.num_tokens, fwd.num_kv_heads, fwd.head_dim);
  kCheck.writable(grad_q, "grad_q");
  kCheck.writable(grad_k, "grad_k");
  kCheck.writable(grad_v, "grad_v");
  const GilRelease release;
  attention_bwd_cpu({.fwd = fwd,
                     .grad_y = grad_y.data,
                     .grad_q = grad_q.data,
                     .grad_k = grad_k.data,
                     .grad_v = grad_v.data,
                     .grad_y_row_stride = grad_y.strides[0],
                     .grad_q_row_stride = grad_q.strides[0],
                     .grad_k_row_stride = grad_k.strides[0],
                     .grad_v_row_stride = grad_v.strides[0],
                     .grad_y_head_stride = grad_y.strides[1],
                     .grad_q_head_stride = grad_q.strides[1],
                     .grad_k_head_stride = grad_k.strides[1],
                     .grad_v_head_stride = grad_v.strides[1]});
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention_fwd_cpu", fwd, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("y"), py::arg("lse"),
        py::arg("scale"), py::arg("causal"), py::arg("segment_offsets"), py::arg("sliding_window"));
  m.def("attention_bwd_cpu", bwd, py::arg("grad_y"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("y"),
        py::arg("lse"), py::arg("grad_q"), py::arg("grad_k"), py::arg("grad_v"), py::arg("scale"), py::arg("causal"),
        py::arg("segment_offsets"), py::arg("sliding_window"));
}

}  // namespace pe
