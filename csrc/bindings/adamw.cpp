#include "pe/adamw.h"

#include <optional>
#include <vector>

#include "bindings/gil.h"
#include "bindings/tensor.h"

namespace py = pybind11;

namespace pe {
namespace {

constexpr Check kCheck{"adamw"};

void check_scalar(const char* name, bool good, const char* expected, double value) {
  if (!good) kCheck.fail(name, expected, py::str(py::float_(value)));
}

// Contiguous memory of n elements that overlaps none of the arguments before it.
class Operands {
 public:
  void add(const Tensor& t, const char* name, int64_t n) {
    kCheck.contiguous(t, name);
    if (t.numel() != n) kCheck.fail(name, std::to_string(n) + " elements, as param has", std::to_string(t.numel()));
    const char* begin = t.ptr<const char>();
    const char* end = begin + static_cast<size_t>(n) * dtype_bytes(t.dtype);
    for (const Range& other : ranges_)
      if (begin < other.end && other.begin < end)
        kCheck.fail(name, "memory of its own", std::string("an overlap with ") + other.name);
    ranges_.push_back({name, begin, end});
  }

 private:
  struct Range {
    const char* name;
    const char* begin;
    const char* end;
  };
  std::vector<Range> ranges_;
};

void update(const Tensor& param, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
            const std::optional<Tensor>& master, double lr, double beta1, double beta2, double eps, double weight_decay,
            int64_t step, double grad_scale) {
  kCheck.writable(kCheck.dtype(param, "param", {DType::f32, DType::bf16}), "param");
  kCheck.dtype(grad, "grad", {DType::f32, DType::bf16});
  kCheck.writable(kCheck.dtype(exp_avg, "exp_avg", {DType::f32, DType::bf16}), "exp_avg");
  kCheck.writable(kCheck.dtype(exp_avg_sq, "exp_avg_sq", {exp_avg.dtype}), "exp_avg_sq");
  const int64_t n = param.numel();
  Operands operands;
  operands.add(param, "param", n);
  operands.add(grad, "grad", n);
  operands.add(exp_avg, "exp_avg", n);
  operands.add(exp_avg_sq, "exp_avg_sq", n);
  if (master) {
    if (param.dtype != DType::bf16) kCheck.fail("master", "none for a float32 param", "a tensor");
    kCheck.writable(kCheck.dtype(*master, "master", {DType::f32}), "master");
    operands.add(*master, "master", n);
  }
  check_scalar("lr", lr >= 0, "a number >= 0", lr);
  check_scalar("beta1", beta1 >= 0 && beta1 < 1, "a number in [0, 1)", beta1);
  check_scalar("beta2", beta2 >= 0 && beta2 < 1, "a number in [0, 1)", beta2);
  check_scalar("eps", eps >= 0, "a number >= 0", eps);
  check_scalar("weight_decay", weight_decay >= 0, "a number >= 0", weight_decay);
  if (step < 1) kCheck.fail("step", "a whole number >= 1", std::to_string(step));
  const GilRelease release;
  adamw_cpu({.param = param.data,
             .master = master ? master->ptr<float>() : nullptr,
             .grad = grad.data,
             .exp_avg = exp_avg.data,
             .exp_avg_sq = exp_avg_sq.data,
             .n = n,
             .lr = lr,
             .beta1 = beta1,
             .beta2 = beta2,
             .eps = eps,
             .weight_decay = weight_decay,
             .grad_scale = grad_scale,
             .step = step,
             .param_dtype = param.dtype,
             .grad_dtype = grad.dtype,
             .state_dtype = exp_avg.dtype});
}

double sum_of_squares(const Tensor& x) {
  constexpr Check check{"sum_of_squares"};
  check.contiguous(check.dtype(x, "x", {DType::f32, DType::bf16}), "x");
  const GilRelease release;
  return sum_of_squares_cpu({.x = x.data, .n = x.numel(), .dtype = x.dtype});
}

}  // namespace

void bind_adamw(py::module_& m) {
  m.def("adamw_cpu", update, py::arg("param"), py::arg("grad"), py::arg("exp_avg"), py::arg("exp_avg_sq"),
        py::arg("master"), py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"),
        py::arg("step"), py::arg("grad_scale"));
  m.def("sum_of_squares_cpu", sum_of_squares, py::arg("x"));
}

}  // namespace pe
