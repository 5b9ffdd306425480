#include "formats/gguf_blocks.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <optional>
#include <string>

#include "pe/f16.h"
#include "pe/gguf_block.h"
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

// The format of a type whose name it has in lower case.
std::optional<BlockFormat> block_format_of(const GgmlType& type) {
  const auto equal = [](char upper, char lower) {
    return (upper >= 'A' && upper <= 'Z' ? upper + 32 : upper) == lower;
  };
  for (int i = 0; i < kNumBlockFormats; ++i)
    if (std::ranges::equal(type.name, std::string_view(kBlockFormats[i].name), equal))
      return static_cast<BlockFormat>(i);
  return std::nullopt;
}

template <BlockFormat format>
void dequantize(std::span<const uint8_t> input, std::span<float> output) {
  constexpr BlockFormatInfo f = info(format);
  const uint8_t* in = input.data();
  GgufBlock block;
  for (auto out = output.begin(); out != output.end(); out += f.block_size, in += f.gguf_block_bytes) {
    read_gguf_block<format>(in, &block);
    const float scale = f16_to_f32(block.d), min = f16_to_f32(block.m);
    for (int k = 0; k < f.block_size; ++k) {
      const int group = k / f.scale_group;
      out[k] = block_weight<format>(scale * static_cast<float>(block.scales[group]),
                                    min * static_cast<float>(block.mins[group]), block.codes[k]);
    }
  }
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
    for (size_t i = 0; i < output.size(); ++i) output[i] = f16_to_f32(read_u16(&input[2 * i]));
  } else if (type.name == "BF16") {
    for (size_t i = 0; i < output.size(); ++i) {
      output[i] = std::bit_cast<float>(uint32_t{read_u16(&input[2 * i])} << 16);
    }
  } else if (const std::optional<BlockFormat> format = block_format_of(type)) {
    with_format(*format, [&](auto known) { dequantize<known.value>(input, output); });
  } else {
    std::string known;
    for (const BlockFormatInfo& f : kBlockFormats) known += std::string(", ") + f.name;
    throw BackendUnavailable("dequantisation of " + std::string(type.name) + ": expected f32, f16, bf16" + known);
  }
}

}  // namespace pe
