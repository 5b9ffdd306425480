// The norm of the residual stream, of whichever kind the model has.
#pragma once
#include <cstdint>

#include "engine/model.h"
#include "pe/layer_norm.h"
#include "pe/rms_norm.h"

namespace pe {

inline void norm_rows(NormKind kind, const RmsNormFwd& args, const void* bias, int64_t begin, int64_t end) {
  if (kind == NormKind::rms) return rms_norm_isa().fwd(args, begin, end);
  layer_norm_isa().fwd({.x = args.x,
                        .residual = args.residual,
                        .weight = args.weight,
                        .bias = bias,
                        .h = args.h,
                        .y = args.y,
                        .mean = nullptr,
                        .rstd = nullptr,
                        .num_rows = args.num_rows,
                        .num_cols = args.num_cols,
                        .x_row_stride = args.x_row_stride,
                        .residual_row_stride = args.residual_row_stride,
                        .h_row_stride = args.h_row_stride,
                        .y_row_stride = args.y_row_stride,
                        .eps = args.eps,
                        .dtype = args.dtype},
                       begin, end);
}

}  // namespace pe
