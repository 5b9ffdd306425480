#include "pe/block_weights.h"

#include <optional>
#include <string>
#include <vector>

#include "bindings/block_weights.h"
#include "bindings/gil.h"
#include "bindings/tensor.h"
#include "runtime/checked.h"

namespace py = pybind11;

namespace pe {
namespace {

constexpr Check kCheck{"block_weights"};

int64_t packed_bytes(const std::string& format, int64_t num_rows, int64_t num_cols) {
  return checked_packed_bytes(kCheck, parse_block_format(kCheck, format), num_rows, num_cols);
}

void pack(const std::string& format_name, const Tensor& raw, const std::optional<Tensor>& row_order,
          const Tensor& packed) {
  const BlockFormat format = parse_block_format(kCheck, format_name);
  kCheck.dtype(raw, "raw", {DType::u8});
  kCheck.unit_stride(kCheck.shape(raw, "raw", {-1, -1}), "raw");
  const int64_t block_bytes = info(format).gguf_block_bytes;
  if (raw.shape[1] % block_bytes != 0)
    kCheck.fail("raw", "rows of whole " + format_name + " blocks of " + std::to_string(block_bytes) + " bytes",
                "rows of " + std::to_string(raw.shape[1]) + " bytes");
  const int64_t num_raw_rows = raw.shape[0], num_cols = raw.shape[1] / block_bytes * info(format).block_size;
  int64_t num_rows = num_raw_rows;
  if (row_order) {
    kCheck.dtype(*row_order, "row_order", {DType::i32});
    kCheck.contiguous(kCheck.shape(*row_order, "row_order", {-1}), "row_order");
    num_rows = row_order->shape[0];
    for (int64_t i = 0; i < num_rows; ++i)
      if (const int32_t row = row_order->ptr<int32_t>()[i]; row < 0 || row >= num_raw_rows)
        kCheck.fail("row_order", "rows of raw, 0 to " + std::to_string(num_raw_rows - 1),
                    std::to_string(row) + " at index " + std::to_string(i));
  }
  std::vector<const uint8_t*> rows(static_cast<size_t>(num_rows));
  for (int64_t i = 0; i < num_rows; ++i)
    rows[static_cast<size_t>(i)] = raw.ptr<uint8_t>() + (row_order ? row_order->ptr<int32_t>()[i] : i) * raw.strides[0];
  kCheck.dtype(packed, "packed", {DType::u8});
  kCheck.shape(packed, "packed", {checked_packed_bytes(kCheck, format, num_rows, num_cols)});
  kCheck.writable(kCheck.contiguous(packed, "packed"), "packed");
  const GilRelease release;
  block_weights_pack({.rows = rows.data(),
                      .packed = packed.ptr<uint8_t>(),
                      .num_rows = num_rows,
                      .num_cols = num_cols,
                      .format = format});
}

void unpack(const std::string& format, const Tensor& packed, const Tensor& out) {
  kCheck.dtype(out, "out", {DType::f32});
  kCheck.shape(out, "out", {-1, -1});
  kCheck.writable(kCheck.contiguous(out, "out"), "out");
  const BlockWeights weights = read_block_weights(kCheck, packed, format, out.shape[0], out.shape[1]);
  const GilRelease release;
  for (int64_t row = 0; row < weights.num_rows; ++row)
    block_weights_unpack_row(weights, row, out.ptr<float>() + row * weights.num_cols);
}

// Name -> (k of a block, bytes of a GGUF block of a row, bytes of a packed block of a panel).
py::dict block_formats() {
  py::dict formats;
  for (int i = 0; i < kNumBlockFormats; ++i)
    formats[kBlockFormats[i].name] = py::make_tuple(kBlockFormats[i].block_size, kBlockFormats[i].gguf_block_bytes,
                                                    packed_block_bytes(static_cast<BlockFormat>(i)));
  return formats;
}

}  // namespace

BlockFormat parse_block_format(const Check& check, const std::string& name) {
  std::string known;
  for (int i = 0; i < kNumBlockFormats; ++i) {
    if (name == kBlockFormats[i].name) return static_cast<BlockFormat>(i);
    known += (i ? ", " : "") + std::string(kBlockFormats[i].name);
  }
  check.fail("block_format", "one of " + known, "'" + name + "'");
}

int64_t checked_packed_bytes(const Check& check, BlockFormat format, int64_t num_rows, int64_t num_cols) {
  if (num_rows < 0) check.fail("num_rows", "a count", std::to_string(num_rows));
  const int64_t block_size = info(format).block_size;
  if (num_cols < 0 || num_cols % block_size != 0)
    check.fail("num_cols", "a multiple of " + std::to_string(block_size), std::to_string(num_cols));
  const Checked panels = num_rows / kPanelRows + (num_rows % kPanelRows != 0);
  const Checked bytes = panels * Checked(num_cols / block_size) * Checked(packed_block_bytes(format));
  return bytes.get_or<int64_t>([&] { check.fail("num_rows", "a size that fits memory", std::to_string(num_rows)); });
}

BlockWeights read_block_weights(const Check& check, const Tensor& packed, const std::string& format_name,
                                int64_t num_rows, int64_t num_cols) {
  const BlockFormat format = parse_block_format(check, format_name);
  check.dtype(packed, "packed", {DType::u8});
  check.contiguous(check.shape(packed, "packed", {-1}), "packed");
  const int64_t bytes = checked_packed_bytes(check, format, num_rows, num_cols);
  if (packed.shape[0] != bytes)
    check.fail("packed",
               std::to_string(bytes) + " bytes (" + format_name + ", " + std::to_string(num_rows) + " rows of " +
                   std::to_string(num_cols) + ")",
               std::to_string(packed.shape[0]));
  return {packed.ptr<const uint8_t>(), num_rows, num_cols, format};
}

void bind_block_weights(py::module_& m) {
  m.def("block_formats", block_formats);
  m.def("block_weights_packed_bytes", packed_bytes, py::arg("block_format"), py::arg("num_rows"), py::arg("num_cols"));
  m.def("block_weights_pack", pack, py::arg("block_format"), py::arg("raw"), py::arg("row_order"), py::arg("packed"));
  m.def("block_weights_unpack", unpack, py::arg("block_format"), py::arg("packed"), py::arg("out"));
}

}  // namespace pe
