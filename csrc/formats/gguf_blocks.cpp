#include "formats/gguf_blocks.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <string>

#include "runtime/checked.h"
#include "runtime/error.h"

namespace pe {
namespace {

constexpr std::array<GgmlType, 34> kTypes = {{
    {0, "F32", 1, 4},         {1, "F16", 1, 2},         {2, "Q4_0", 32, 18},      {3, "Q4_1", 32, 20},
    {6, "Q5_0", 32, 22},      {7, "Q5_1", 32, 24},      {8, "Q8_0", 32, 34},      {9, "Q8_1", 32, 40},
    {10, "Q2_K", 256, 84},    {11, "Q3_K", 256, 110},   {12, "Q4_K", 256, 144},   {13, "Q5_K", 256, 176},
    {14, "Q6_K", 256, 210},   {15, "Q8_K", 256, 292},   {16, "IQ2_XXS", 256, 66}, {17, "IQ2_XS", 256, 74},
    {18, "IQ3_XXS", 256, 98}, {19, "IQ1_S", 256, 50},   {20, "IQ4_NL", 32, 18},   {21, "IQ3_S", 256, 110},
    {22, "IQ2_S", 256, 82},   {23, "IQ4_XS", 256, 136}, {24, "I8", 1, 1},         {25, "I16", 1, 2},
    {26, "I32", 1, 4},        {27, "I64", 1, 8},        {28, "F64", 1, 8},        {29, "IQ1_M", 256, 56},
    {30, "BF16", 1, 2},       {34, "TQ1_0", 256, 54},   {35, "TQ2_0", 256, 66},   {39, "MXFP4", 32, 17},
    {40, "NVFP4", 64, 36},    {41, "Q1_0", 128, 18},
}};

constexpr size_t kBlock = 32;  // elements of every block converted here

uint16_t load_u16(const uint8_t* bytes) noexcept {
  uint16_t value = 0;
  std::memcpy(&value, bytes, sizeof(value));
  return value;
}

uint32_t load_u32(const uint8_t* bytes) noexcept {
  uint32_t value = 0;
  std::memcpy(&value, bytes, sizeof(value));
  return value;
}

// Calls block(input, output) for each block of kBlock elements.
template <class Block>
void for_each_block(std::span<const uint8_t> input, std::span<float> output, size_t block_bytes, Block block) {
  const uint8_t* in = input.data();
  for (size_t i = 0; i < output.size(); i += kBlock, in += block_bytes) block(in, output.data() + i);
}

// 16 bytes hold 32 codes: the low halves are elements 0..15, the high halves 16..31. Bit i of `high_bits` is the fifth
// bit of element i.
template <class Decode>
void decode_nibbles(const uint8_t* codes, uint32_t high_bits, float* output, Decode decode) {
  for (uint32_t i = 0; i < kBlock / 2; ++i) {
    const uint32_t low = (codes[i] & 15u) | (((high_bits >> i) & 1u) << 4);
    const uint32_t high = (codes[i] >> 4) | (((high_bits >> (i + 16)) & 1u) << 4);
    output[i] = decode(static_cast<int32_t>(low));
    output[i + 16] = decode(static_cast<int32_t>(high));
  }
}

void dequantize_q4_0(const uint8_t* in, float* out) {
  const float scale = half_to_float(load_u16(in));
  decode_nibbles(in + 2, 0, out, [=](int32_t code) { return scale * static_cast<float>(code - 8); });
}

void dequantize_q4_1(const uint8_t* in, float* out) {
  const float scale = half_to_float(load_u16(in));
  const float minimum = half_to_float(load_u16(in + 2));
  decode_nibbles(in + 4, 0, out, [=](int32_t code) { return scale * static_cast<float>(code) + minimum; });
}

void dequantize_q5_0(const uint8_t* in, float* out) {
  const float scale = half_to_float(load_u16(in));
  decode_nibbles(in + 6, load_u32(in + 2), out, [=](int32_t code) { return scale * static_cast<float>(code - 16); });
}

void dequantize_q5_1(const uint8_t* in, float* out) {
  const float scale = half_to_float(load_u16(in));
  const float minimum = half_to_float(load_u16(in + 2));
  decode_nibbles(in + 8, load_u32(in + 4), out,
                 [=](int32_t code) { return scale * static_cast<float>(code) + minimum; });
}

void dequantize_q8_0(const uint8_t* in, float* out) {
  const float scale = half_to_float(load_u16(in));
  for (size_t i = 0; i < kBlock; ++i) out[i] = scale * static_cast<float>(static_cast<int8_t>(in[2 + i]));
}

}  // namespace

const GgmlType* find_ggml_type(uint32_t id) noexcept {
  const auto* const found = std::find_if(kTypes.begin(), kTypes.end(), [&](const GgmlType& t) { return t.id == id; });
  return found == kTypes.end() ? nullptr : found;
}

const GgmlType* find_ggml_type(std::string_view name) noexcept {
  const auto* const found =
      std::find_if(kTypes.begin(), kTypes.end(), [&](const GgmlType& t) { return t.name == name; });
  return found == kTypes.end() ? nullptr : found;
}

float half_to_float(uint16_t half) noexcept {
  const uint32_t sign = (half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 31u;
  const uint32_t fraction = half & 0x3ffu;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | (fraction << 13));
  if (exponent != 0) return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (fraction << 13));
  // Zero or subnormal: fraction * 2^-24, exact in a float.
  const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
}

void dequantize_blocks(const GgmlType& type, std::span<const uint8_t> input, std::span<float> output) {
  const size_t num_blocks = output.size() / type.block_elements;
  if (output.size() % type.block_elements != 0) {
    throw ArgumentError("num_elements", "expected a multiple of " + std::to_string(type.block_elements) + " for " +
                                            std::string(type.name) + ", got " + std::to_string(output.size()));
  }
  const Checked expected = Checked(num_blocks) * type.block_bytes;
  if (!expected.at_most(input.size()) || !(Checked(input.size()) - expected).at_most(0)) {
    throw ArgumentError("data", "expected " + std::to_string(num_blocks) + " blocks of " +
                                    std::to_string(type.block_bytes) + " bytes, got " + std::to_string(input.size()) +
                                    " bytes");
  }
  if (type.name == "F32") {
    if (!input.empty()) std::memcpy(output.data(), input.data(), input.size());
  } else if (type.name == "F16") {
    for (size_t i = 0; i < output.size(); ++i) output[i] = half_to_float(load_u16(&input[2 * i]));
  } else if (type.name == "BF16") {
    for (size_t i = 0; i < output.size(); ++i) {
      output[i] = std::bit_cast<float>(uint32_t{load_u16(&input[2 * i])} << 16);
    }
  } else if (type.name == "Q4_0") {
    for_each_block(input, output, type.block_bytes, dequantize_q4_0);
  } else if (type.name == "Q4_1") {
    for_each_block(input, output, type.block_bytes, dequantize_q4_1);
  } else if (type.name == "Q5_0") {
    for_each_block(input, output, type.block_bytes, dequantize_q5_0);
  } else if (type.name == "Q5_1") {
    for_each_block(input, output, type.block_bytes, dequantize_q5_1);
  } else if (type.name == "Q8_0") {
    for_each_block(input, output, type.block_bytes, dequantize_q8_0);
  } else {
    throw BackendUnavailable("dequantisation of " + std::string(type.name) +
                             ": expected F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0");
  }
}

}  // namespace pe
