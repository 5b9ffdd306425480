// The element types of ggml tensors: geometry of all of them, conversion to float of those with kernels.
// Values are defined by ggml-quants.c of https://github.com/ggml-org/ggml (dequantize_row_*).
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

namespace pe {

// A type stores rows in blocks of `block_elements` elements, each `block_bytes` bytes long.
struct GgmlType {
  uint32_t id;
  std::string_view name;
  uint32_t block_elements;
  uint32_t block_bytes;
};

// Null for ids and names that are unknown or withdrawn (Q4_2, Q4_0_4_4, ...).
const GgmlType* find_ggml_type(uint32_t id) noexcept;
const GgmlType* find_ggml_type(std::string_view name) noexcept;

// The scalar reference of every fast kernel. `output` takes input.size() / block_bytes * block_elements floats.
// F32, F16, BF16 and the formats of pe/block_weights.h are converted: each result is the float nearest to the exact value
// (scale times code is exact in a float, so there is one rounding at most, and none without a minimum).
// Throws ArgumentError where sizes do not match, BackendUnavailable for other types.
void dequantize_blocks(const GgmlType& type, std::span<const uint8_t> input, std::span<float> output);

}  // namespace pe
