#include "pe/quantize_int8.h"

#include "bindings/tensor.h"

namespace py = pybind11;

namespace pe {
namespace {

void quantize(const Tensor& x, const Tensor& q, const Tensor& scale) {
  constexpr Check check{"quantize_int8"};
  check.dtype(x, "x", {DType::f32, DType::bf16});
  check.unit_stride(check.shape(x, "x", {-1, -1}), "x");
  const int64_t num_rows = x.shape[0], num_cols = x.shape[1];
  check.writable(check.rows(q, "q", DType::i8, num_rows, num_cols), "q");
  check.dtype(scale, "scale", {DType::f32});
  check.writable(check.contiguous(check.shape(scale, "scale", {num_rows}), "scale"), "scale");
  const py::gil_scoped_release release;
  quantize_int8_cpu({.x = x.data,
                     .q = q.ptr<int8_t>(),
                     .scale = scale.ptr<float>(),
                     .num_rows = num_rows,
                     .num_cols = num_cols,
                     .x_row_stride = x.strides[0],
                     .q_row_stride = q.strides[0],
                     .dtype = x.dtype});
}

void dequantize(const Tensor& q, const Tensor& scale, const Tensor& x) {
  constexpr Check check{"dequantize_int8"};
  check.dtype(q, "q", {DType::i8});
  check.unit_stride(check.shape(q, "q", {-1, -1}), "q");
  const int64_t num_rows = q.shape[0], num_cols = q.shape[1];
  check.dtype(scale, "scale", {DType::f32});
  check.contiguous(check.shape(scale, "scale", {num_rows}), "scale");
  check.dtype(x, "x", {DType::f32, DType::bf16});
  check.writable(check.rows(x, "x", x.dtype, num_rows, num_cols), "x");
  const py::gil_scoped_release release;
  dequantize_int8_cpu({.q = q.ptr<int8_t>(),
                       .scale = scale.ptr<float>(),
                       .x = x.data,
                       .num_rows = num_rows,
                       .num_cols = num_cols,
                       .q_row_stride = q.strides[0],
                       .x_row_stride = x.strides[0],
                       .dtype = x.dtype});
}

}  // namespace

void bind_quantize_int8(py::module_& m) {
  m.def("quantize_int8_cpu", quantize, py::arg("x"), py::arg("q"), py::arg("scale"));
  m.def("dequantize_int8_cpu", dequantize, py::arg("q"), py::arg("scale"), py::arg("x"));
}

}  // namespace pe
