// ISA: scalar avx2 avx512
#include "pe/rope.h"

#include "simd/for_each_vec.h"

namespace pe::PE_ISA {
namespace {

template <class T>
void rotate_tokens(const Rope& a, int64_t token_begin, int64_t token_end) {
  const int64_t half = a.head_dim / 2;
  for (int64_t t = token_begin; t < token_end; ++t) {
    const float* cos = a.cos + a.positions[t] * half;
    const float* sin = a.sin + a.positions[t] * half;
    for (int64_t h = 0; h < a.num_heads; ++h) {
      const T* x = static_cast<const T*>(a.x) + t * a.x_token_stride + h * a.x_head_stride;
      T* y = static_cast<T*>(a.y) + t * a.y_token_stride + h * a.y_head_stride;
      for_each_vec(half, [&](auto in, auto out) {
        const VecF low = in(x), high = in(x + half), c = in(cos), s = a.inverse ? neg(in(sin)) : in(sin);
        out(y, sub(mul(low, c), mul(high, s)));
        out(y + half, add(mul(high, c), mul(low, s)));
      });
    }
  }
}

void rotate(const Rope& a, int64_t token_begin, int64_t token_end) {
  a.dtype == DType::f32 ? rotate_tokens<float>(a, token_begin, token_end)
                        : rotate_tokens<bf16>(a, token_begin, token_end);
}

}  // namespace

constinit const RopeIsa rope = {rotate};

}  // namespace pe::PE_ISA
