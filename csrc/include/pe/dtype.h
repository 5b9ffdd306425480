// Element types of tensors that cross a native interface.
#pragma once
#include <cstdint>

namespace pe {

enum class DType : uint8_t { f32, bf16, f16, f64, u8, i8, u16, i32, u32, i64, boolean };

// Storage of one bfloat16. Arithmetic happens in f32; conversions live where they are compiled (simd/vec.h,
// runtime/bf16.h).
struct bf16 {
  uint16_t bits;
};

}  // namespace pe
