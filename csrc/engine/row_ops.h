// Small arithmetic on rows of activations, in f32, rounded once at the store: the bits of the same torch operation.
#pragma once
#include <cstdint>

#include "pe/dtype.h"
#include "runtime/bf16.h"

namespace pe {

inline float to_float(float x) { return x; }
inline void store(float* out, float value) { *out = value; }
inline void store(bf16* out, float value) { *out = to_bf16(value); }

// rows[r, c] = f(rows[r, c], other[r, c]) for rows [begin, end); with other_row_stride 0, `other` is one vector.
template <class T, class F>
void combine_rows(void* rows, int64_t row_stride, const void* other, int64_t other_row_stride, int64_t num_cols,
                  int64_t begin, int64_t end, const F& f) {
  for (int64_t r = begin; r < end; ++r) {
    T* row = static_cast<T*>(rows) + r * row_stride;
    const T* row_of_other = static_cast<const T*>(other) + r * other_row_stride;
    for (int64_t c = 0; c < num_cols; ++c) store(row + c, f(to_float(row[c]), to_float(row_of_other[c])));
  }
}

inline void add_rows(void* rows, int64_t row_stride, const void* other, int64_t other_row_stride, int64_t num_cols,
                     int64_t begin, int64_t end, DType dtype) {
  const auto add = [](float a, float b) { return a + b; };
  if (dtype == DType::f32)
    combine_rows<float>(rows, row_stride, other, other_row_stride, num_cols, begin, end, add);
  else
    combine_rows<bf16>(rows, row_stride, other, other_row_stride, num_cols, begin, end, add);
}

inline void scale_rows(void* rows, int64_t row_stride, float factor, int64_t num_cols, int64_t begin, int64_t end,
                       DType dtype) {
  const auto scale = [factor](float a, float) { return a * factor; };
  if (dtype == DType::f32)
    combine_rows<float>(rows, row_stride, rows, row_stride, num_cols, begin, end, scale);
  else
    combine_rows<bf16>(rows, row_stride, rows, row_stride, num_cols, begin, end, scale);
}

}  // namespace pe
