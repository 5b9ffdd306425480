#include "pe/rope.h"

#include "bindings/gil.h"
#include "bindings/tensor.h"

namespace py = pybind11;

namespace pe {
namespace {

constexpr Check kCheck{"rope"};

void rotate(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& positions, const Tensor& y,
            bool inverse) {
  kCheck.dtype(x, "x", {DType::f32, DType::bf16});
  kCheck.unit_stride(kCheck.shape(x, "x", {-1, -1, -1}), "x");
  const int64_t num_tokens = x.shape[0], num_heads = x.shape[1], head_dim = x.shape[2];
  if (head_dim % 2 != 0) kCheck.fail("x", "an even last dimension", std::to_string(head_dim));
  kCheck.dtype(cos, "cos", {DType::f32});
  kCheck.contiguous(kCheck.shape(cos, "cos", {-1, head_dim / 2}), "cos");
  kCheck.dtype(sin, "sin", {DType::f32});
  kCheck.contiguous(kCheck.shape(sin, "sin", {cos.shape[0], head_dim / 2}), "sin");
  kCheck.dtype(positions, "positions", {DType::i32});
  kCheck.contiguous(kCheck.shape(positions, "positions", {num_tokens}), "positions");
  kCheck.dtype(y, "y", {x.dtype});
  kCheck.writable(kCheck.unit_stride(kCheck.shape(y, "y", {num_tokens, num_heads, head_dim}), "y"), "y");
  if (x.numel() > 0 && y.data == x.data && (y.strides[0] != x.strides[0] || y.strides[1] != x.strides[1]))
    kCheck.fail("y", "x itself or other memory", "x with other strides");
  const GilRelease release;
  rope_cpu({.x = x.data,
            .cos = cos.ptr<float>(),
            .sin = sin.ptr<float>(),
            .positions = positions.ptr<int32_t>(),
            .y = y.data,
            .num_tokens = num_tokens,
            .num_heads = num_heads,
            .head_dim = head_dim,
            .num_positions = cos.shape[0],
            .x_token_stride = x.strides[0],
            .x_head_stride = x.strides[1],
            .y_token_stride = y.strides[0],
            .y_head_stride = y.strides[1],
            .inverse = inverse,
            .dtype = x.dtype});
}

void table(const Tensor& inv_freq, const Tensor& cos_out, const Tensor& sin_out, double scale) {
  constexpr Check check{"rope_table"};
  check.dtype(inv_freq, "inv_freq", {DType::f64});
  check.contiguous(check.shape(inv_freq, "inv_freq", {-1}), "inv_freq");
  check.dtype(cos_out, "cos_out", {DType::f32});
  check.shape(cos_out, "cos_out", {-1, inv_freq.shape[0]});
  check.writable(check.contiguous(cos_out, "cos_out"), "cos_out");
  check.dtype(sin_out, "sin_out", {DType::f32});
  check.shape(sin_out, "sin_out", {cos_out.shape[0], inv_freq.shape[0]});
  check.writable(check.contiguous(sin_out, "sin_out"), "sin_out");
  const GilRelease release;
  rope_table(inv_freq.ptr<double>(), inv_freq.shape[0], cos_out.shape[0], scale, cos_out.ptr<float>(),
             sin_out.ptr<float>());
}

}  // namespace

void bind_rope(py::module_& m) {
  m.def("rope_cpu", rotate, py::arg("x"), py::arg("cos"), py::arg("sin"), py::arg("positions"), py::arg("y"),
        py::arg("inverse") = false);
  m.def("rope_table", table, py::arg("inv_freq"), py::arg("cos_out"), py::arg("sin_out"), py::arg("scale") = 1.0);
}

}  // namespace pe
