// f16 to f32 in plain C++: exact, subnormals included; a NaN keeps its payload.
#pragma once
#include <stdint.h>
#include <string.h>

namespace pe {
namespace {

[[maybe_unused]] inline float f16_to_f32(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = half >> 10 & 31u, fraction = half & 1023u;
  uint32_t bits = sign;
  if (exponent == 31) {
    bits |= 0x7f800000u | fraction << 13 | (fraction ? 0x400000u : 0u);
  } else if (exponent) {
    bits |= (exponent + 112) << 23 | fraction << 13;
  } else {
    // fraction * 2^-24, exact in f32.
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    uint32_t magnitude_bits;
    memcpy(&magnitude_bits, &magnitude, sizeof bits);
    bits |= magnitude_bits;
  }
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace
}  // namespace pe
