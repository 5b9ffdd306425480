// ISA: scalar avx2 avx512
#include "pe/op_name.h"

#include "simd/for_each_vec.h"

namespace pe::PE_ISA {
namespace {

template <class T>
void fwd_rows(const OpNameFwd& a, int64_t row_begin, int64_t row_end) {
  for (int64_t r = row_begin; r < row_end; ++r) {
    const T* x = static_cast<const T*>(a.x) + r * a.x_row_stride;
    T* y = static_cast<T*>(a.y) + r * a.y_row_stride;
    for_each_vec(a.num_cols, [&](auto in, auto out) { out(y, in(x)); });
  }
}

template <class T>
void bwd_rows(const OpNameBwd& a, int64_t row_begin, int64_t row_end) {
  for (int64_t r = row_begin; r < row_end; ++r) {
    const T* grad_y = static_cast<const T*>(a.grad_y) + r * a.grad_y_row_stride;
    T* grad_x = static_cast<T*>(a.grad_x) + r * a.grad_x_row_stride;
    for_each_vec(a.num_cols, [&](auto in, auto out) { out(grad_x, in(grad_y)); });
  }
}

void fwd(const OpNameFwd& a, int64_t row_begin, int64_t row_end) {
  a.dtype == DType::f32 ? fwd_rows<float>(a, row_begin, row_end) : fwd_rows<bf16>(a, row_begin, row_end);
}
void bwd(const OpNameBwd& a, int64_t row_begin, int64_t row_end) {
  a.dtype == DType::f32 ? bwd_rows<float>(a, row_begin, row_end) : bwd_rows<bf16>(a, row_begin, row_end);
}

}  // namespace

constinit const OpNameIsa op_name = {fwd, bwd};

}  // namespace pe::PE_ISA
