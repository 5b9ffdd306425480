// bfloat16 <-> f32 outside the kernels: round to nearest even, NaN kept quiet.
#pragma once
#include <bit>
#include <cstdint>

#include "pe/dtype.h"

namespace pe {

inline float to_float(bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

inline bf16 to_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = x != x ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u);
  return {static_cast<uint16_t>(rounded >> 16)};
}

}  // namespace pe
