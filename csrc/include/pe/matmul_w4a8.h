#pragma once
#include "pe/matmul_w4a16.h"
namespace pe {
struct TmpQ { const void* x; int64_t x_row_stride; DType x_dtype; };
struct TmpT {};
struct TmpIsa { void (*quantize_rows)(const TmpQ&, int64_t, int64_t); void (*tile)(const TmpT&, int64_t,int64_t,int64_t,int64_t); };
inline const TmpIsa& matmul_w4a8_isa() { static TmpIsa t{}; return t; }
inline int64_t matmul_w4a8_workspace_bytes(int64_t, int64_t) { return 0; }
}
