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
  const int64_t block_bytes = block_weights_row_bytes(format, kBlockSize);
  if (raw.shape[1] % block_bytes != 0)
    kCheck.fail("raw", "rows of whole " + format_name + " blocks of " + std::to_string(block_bytes) + " bytes",
                "rows of " + std::to_string(raw.shape[1]) + " bytes");
  const int64_t num_raw_rows = raw.shape[0], num_cols = raw.shape[1] / block_bytes * kBlockSize;
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

}  // namespace

BlockFormat parse_block_format(const Check& check, const std::string& name) {
  if (name == "q4_0") return BlockFormat::q4_0;
  if (name == "q4_1") return BlockFormat::q4_1;
  if (name == "q8_0") return BlockFormat::q8_0;
  check.fail("block_format", "q4_0, q4_1 or q8_0", "'" + name + "'");
}

int64_t checked_packed_bytes(const Check& check, BlockFormat format, int64_t num_rows, int64_t num_cols) {
  if (num_rows < 0) check.fail("num_rows", "a count", std::to_string(num_rows));
  if (num_cols < 0 || num_cols % kBlockSize != 0)
    check.fail("num_cols", "a multiple of " + std::to_string(kBlockSize), std::to_string(num_cols));
  const Checked panels = Checked(num_rows).align_up(kPanelRows);
  const Checked bytes =
      panels * Checked(num_cols / kBlockSize) * Checked(block_scale_bytes(format) + block_code_bytes(format));
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
  m.def("block_weights_packed_bytes", packed_bytes, py::arg("block_format"), py::arg("num_rows"), py::arg("num_cols"));
  m.def("block_weights_pack", pack, py::arg("block_format"), py::arg("raw"), py::arg("row_order"), py::arg("packed"));
  m.def("block_weights_unpack", unpack, py::arg("block_format"), py::arg("packed"), py::arg("out"));
}

}  // namespace pe
