// Walks over parts of the vocabulary: packs a part of w once, then all tokens pass over it.
#include "pe/linear_cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "pe/matmul.h"
#include "runtime/aligned_buffer.h"
#include "runtime/dispatch.h"
#include "runtime/error.h"
#include "runtime/parallel.h"

namespace pe {
namespace {

constexpr IsaEntry<LinearCrossEntropyIsa> kIsas[] = {PE_ISA_ENTRIES_VECTOR(linear_cross_entropy)};
// Whole tiles of matmul rows at every ISA level. Their logits of one block stay in the second-level cache.
constexpr int64_t kRowsPerTask = 48;
constexpr int64_t kElementsPerTask = 16 * 1024;
static_assert(kLseBlock % kMatmulKBlock == 0 && kLseBlock % kMatmulPanel == 0);

int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }
size_t size(int64_t n) { return static_cast<size_t>(n); }

template <class T>
T* advance(T* pointer, int64_t elements, DType dtype) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return static_cast<Byte*>(pointer) + elements * (dtype == DType::f32 ? 4 : 2);
}

void check_targets(const int64_t* targets, int64_t num_tokens, int64_t vocab_size, int64_t ignore_index) {
  for (int64_t t = 0; t < num_tokens; ++t)
    if (targets[t] != ignore_index && (targets[t] < 0 || targets[t] >= vocab_size))
      throw ArgumentError("[linear_cross_entropy] targets: expected 0 <= target < " + std::to_string(vocab_size) +
                          " or ignore_index " + std::to_string(ignore_index) + ", got " + std::to_string(targets[t]) +
                          " at index " + std::to_string(t));
}

size_t packed_row_bytes(int64_t num_channels, DType dtype) {
  return matmul_packed_bytes(kMatmulPanel, num_channels, dtype) / size(kMatmulPanel);
}

// Columns of the vocabulary that are worked on at a time: whole blocks, within both limits where one block is.
int64_t part_cols(int64_t vocab_size, size_t bytes_per_col, size_t max_bytes) {
  const int64_t fitting = static_cast<int64_t>(max_bytes / std::max<size_t>(bytes_per_col, 1));
  return std::clamp(fitting / kLseBlock, int64_t{1}, std::max<int64_t>(divide_up(vocab_size, kLseBlock), 1)) *
         kLseBlock;
}

// Calls body(row_begin, row_end, col_begin, col_end) for tiles of rows times blocks of kLseBlock columns.
template <class Body>
void for_each_block(int64_t num_rows, int64_t num_cols, const Body& body) {
  const int64_t row_tasks = divide_up(num_rows, kRowsPerTask);
  parallel_for(row_tasks * divide_up(num_cols, kLseBlock), 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task % row_tasks * kRowsPerTask, col = task / row_tasks * kLseBlock;
      body(row, std::min(row + kRowsPerTask, num_rows), col, std::min(col + kLseBlock, num_cols));
    }
  });
}

// Logits of a tile of rows and one block of columns of the part that is packed.
template <class Args>
void block_logits(const Args& args, const char* packed, int64_t row, int64_t row_end, int64_t col, int64_t col_end,
                  float* logits, int64_t row_stride) {
  const Matmul product = {.x = advance(args.x, row * args.x_row_stride, args.dtype),
                          .packed = advance(packed, col * args.num_channels, args.dtype),
                          .y = logits,
                          .num_rows = row_end - row,
                          .num_cols = col_end - col,
                          .depth = args.num_channels,
                          .x_row_stride = args.x_row_stride,
                          .y_row_stride = row_stride,
                          .x_dtype = args.dtype,
                          .w_dtype = args.dtype,
                          .y_dtype = DType::f32};
  matmul_isa().tile(product, 0, product.num_rows, 0, matmul_num_panels(product.num_cols));
}

// Packs rows [col, col_end) of w, for products over the channels.
template <class Args>
void pack_part(const Args& args, int64_t col, int64_t col_end, char* packed) {
  matmul_pack_cpu({.w = advance(args.w, col * args.w_row_stride, args.dtype),
                   .w_row_stride = args.w_row_stride,
                   .w_col_stride = 1,
                   .num_rows = col_end - col,
                   .num_cols = args.num_channels,
                   .w_dtype = args.dtype,
                   .packed_dtype = args.dtype,
                   .packed = packed});
}

// Packs the transpose of `matrix` [num_rows, num_channels], for products over its rows.
AlignedBuffer<char> pack_transposed(const void* matrix, int64_t row_stride, int64_t num_rows, int64_t num_channels,
                                    DType dtype) {
  AlignedBuffer<char> packed(matmul_packed_bytes(num_channels, num_rows, dtype));
  matmul_pack_cpu({.w = matrix,
                   .w_row_stride = 1,
                   .w_col_stride = row_stride,
                   .num_rows = num_channels,
                   .num_cols = num_rows,
                   .w_dtype = dtype,
                   .packed_dtype = dtype,
                   .packed = packed.data()});
  return packed;
}

}  // namespace

const LinearCrossEntropyIsa& linear_cross_entropy_isa() { return select(kIsas); }

float row_lse_cpu(const float* logits, int64_t num_logits) { return select(kIsas).row_lse(logits, num_logits); }

void linear_cross_entropy_fwd_cpu(const LinearCrossEntropyFwd& args) {
  const LinearCrossEntropyIsa& isa = select(kIsas);
  const int64_t num_tokens = args.num_tokens, num_channels = args.num_channels;
  check_targets(args.targets, num_tokens, args.vocab_size, args.ignore_index);
  const int64_t cols = part_cols(args.vocab_size, packed_row_bytes(num_channels, args.dtype), kMatmulScratchBytes);
  AlignedBuffer<char> packed(matmul_packed_bytes(std::min(cols, args.vocab_size), num_channels, args.dtype));
  std::vector<LogSumExp> total(size(num_tokens), {-INFINITY, 0.0f});
  std::vector<LogSumExp> blocks(size(cols / kLseBlock * num_tokens));
  std::vector<float> target_logits(size(num_tokens));
  for (int64_t part = 0; part < args.vocab_size; part += cols) {
    const int64_t part_end = std::min(part + cols, args.vocab_size);
    pack_part(args, part, part_end, packed.data());
    for_each_block(num_tokens, part_end - part, [&](int64_t row, int64_t row_end, int64_t col, int64_t col_end) {
      // Rows are one cache line apart from a power of two.
      constexpr int64_t kRowStride = kLseBlock + 16;
      AlignedBuffer<float> logits(size(kRowsPerTask * kRowStride));
      block_logits(args, packed.data(), row, row_end, col, col_end, logits.data(), kRowStride);
      isa.reduce_block(logits.data(), kRowStride, row_end - row, col_end - col,
                       blocks.data() + col / kLseBlock * num_tokens + row);
      for (int64_t t = row; t < row_end; ++t) {
        const int64_t target = args.targets[t] - part;
        if (target >= col && target < col_end)
          target_logits[size(t)] = logits.data()[(t - row) * kRowStride + target - col];
      }
    });
    parallel_for(num_tokens, 1024, [&](int64_t begin, int64_t end) {
      for (int64_t block = 0; block < divide_up(part_end - part, kLseBlock); ++block)
        isa.merge(total.data() + begin, blocks.data() + block * num_tokens + begin, end - begin);
    });
  }
  isa.finish(total.data(), args.lse, num_tokens);
  for (int64_t t = 0; t < num_tokens; ++t)
    args.nll[t] = args.targets[t] == args.ignore_index ? 0.0f : args.lse[t] - target_logits[size(t)];
}

void linear_cross_entropy_bwd_cpu(const LinearCrossEntropyBwd& args) {
  const LinearCrossEntropyIsa& isa = select(kIsas);
  const int64_t num_tokens = args.num_tokens, num_channels = args.num_channels;
  check_targets(args.targets, num_tokens, args.vocab_size, args.ignore_index);
  std::vector<float> grad_nll(size(num_tokens));
  for (int64_t t = 0; t < num_tokens; ++t)
    grad_nll[size(t)] = args.targets[t] == args.ignore_index ? 0.0f : args.grad_nll[t];

  const int64_t cols =
      std::min(part_cols(args.vocab_size, packed_row_bytes(num_channels, args.dtype), kMatmulScratchBytes),
               part_cols(args.vocab_size, size(num_tokens) * sizeof(float), kGradLogitsBytes));
  const int64_t row_stride = cols + 16;  // one cache line apart from a power of two
  AlignedBuffer<float> grad_logits(size(num_tokens * row_stride));
  AlignedBuffer<char> packed(matmul_packed_bytes(std::min(cols, args.vocab_size), num_channels, args.dtype));

  // grad_x sums over the parts in f32; in f32 it is its own sum.
  const bool rounds = args.dtype != DType::f32;
  std::vector<float> grad_x_sum(args.grad_x && rounds ? size(num_tokens * num_channels) : 0);
  float* grad_x = rounds ? grad_x_sum.data() : static_cast<float*>(args.grad_x);
  const int64_t grad_x_row_stride = rounds ? num_channels : args.grad_x_row_stride;
  if (args.grad_x && !rounds)
    for (int64_t t = 0; t < num_tokens; ++t) std::fill_n(grad_x + t * grad_x_row_stride, num_channels, 0.0f);
  AlignedBuffer<char> packed_x;
  if (args.grad_w) packed_x = pack_transposed(args.x, args.x_row_stride, num_tokens, num_channels, args.dtype);

  for (int64_t part = 0; part < args.vocab_size; part += cols) {
    const int64_t part_end = std::min(part + cols, args.vocab_size), num_cols = part_end - part;
    pack_part(args, part, part_end, packed.data());
    for_each_block(num_tokens, num_cols, [&](int64_t row, int64_t row_end, int64_t col, int64_t col_end) {
      float* logits = grad_logits.data() + row * row_stride + col;
      block_logits(args, packed.data(), row, row_end, col, col_end, logits, row_stride);
      int64_t target_cols[kRowsPerTask];
      for (int64_t t = row; t < row_end; ++t) {
        const int64_t target = args.targets[t] - part;
        target_cols[t - row] = target >= col && target < col_end ? target - col : -1;
      }
      isa.grad_logits(logits, row_stride, row_end - row, col_end - col, args.lse + row, grad_nll.data() + row,
                      target_cols);
    });
    if (args.grad_x) {
      const AlignedBuffer<char> packed_w = pack_transposed(advance(args.w, part * args.w_row_stride, args.dtype),
                                                           args.w_row_stride, num_cols, num_channels, args.dtype);
      matmul_cpu({.x = grad_logits.data(),
                  .packed = packed_w.data(),
                  .y = grad_x,
                  .num_rows = num_tokens,
                  .num_cols = num_channels,
                  .depth = num_cols,
                  .x_row_stride = row_stride,
                  .y_row_stride = grad_x_row_stride,
                  .x_dtype = DType::f32,
                  .w_dtype = args.dtype,
                  .y_dtype = DType::f32,
                  .accumulate = true});
    }
    if (args.grad_w)
      matmul_cpu({.x = grad_logits.data(),
                  .packed = packed_x.data(),
                  .y = advance(args.grad_w, part * args.grad_w_row_stride, args.dtype),
                  .num_rows = num_cols,
                  .num_cols = num_channels,
                  .depth = num_tokens,
                  .x_row_stride = 1,
                  .y_row_stride = args.grad_w_row_stride,
                  .x_dtype = DType::f32,
                  .w_dtype = args.dtype,
                  .y_dtype = args.dtype,
                  .x_col_stride = row_stride});
  }
  if (args.grad_x && rounds)
    parallel_for(num_tokens, 1 + kElementsPerTask / std::max<int64_t>(num_channels, 1),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t t = begin; t < end; ++t)
                     isa.narrow(grad_x + t * num_channels, static_cast<bf16*>(args.grad_x) + t * args.grad_x_row_stride,
                                num_channels);
                 });
}

}  // namespace pe
