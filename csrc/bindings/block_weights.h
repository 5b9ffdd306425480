// What the bindings over packed block weights share.
#pragma once
#include <string>

#include "bindings/tensor.h"
#include "pe/block_weights.h"

namespace pe {

BlockFormat parse_block_format(const Check& check, const std::string& name);

// block_weights_packed_bytes of sizes from outside: ArgumentError on a bad or overflowing one.
int64_t checked_packed_bytes(const Check& check, BlockFormat format, int64_t num_rows, int64_t num_cols);

// A view of `packed`, whose size must be that of [num_rows, num_cols].
BlockWeights read_block_weights(const Check& check, const Tensor& packed, const std::string& format_name,
                                int64_t num_rows, int64_t num_cols);

}  // namespace pe
