#include "pe/attention_decode.h"

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "bindings/gil.h"
#include "bindings/tensor.h"

namespace py = pybind11;

namespace pe {
namespace {

// The pages and who is where, checked once for both functions.
struct Cache {
  const Check& check;
  const Tensor& k_pages;  // [num_pages, num_kv_heads, page_size / 16, D, 16]
  const Tensor& v_pages;  // [num_pages, num_kv_heads, page_size, D]
  const Tensor& block_table;
  const Tensor& seq;
  const Tensor& position;
  const std::optional<Tensor>& k_scales;  // [num_pages, num_kv_heads, page_size] of int8 pages
  const std::optional<Tensor>& v_scales;
  int64_t num_pages, num_kv_heads, page_size, head_dim;

  Cache(const Check& check_, const Tensor& k_pages_, const Tensor& v_pages_, const Tensor& block_table_,
        const Tensor& seq_, const Tensor& position_, const std::optional<Tensor>& k_scales_,
        const std::optional<Tensor>& v_scales_, int64_t num_rows)
      : check(check_),
        k_pages(k_pages_),
        v_pages(v_pages_),
        block_table(block_table_),
        seq(seq_),
        position(position_),
        k_scales(k_scales_),
        v_scales(v_scales_) {
    check.dtype(v_pages, "v_pages", {DType::f32, DType::bf16, DType::i8});
    check.shape(v_pages, "v_pages", {-1, -1, -1, -1});
    num_pages = v_pages.shape[0];
    num_kv_heads = v_pages.shape[1];
    page_size = v_pages.shape[2];
    head_dim = v_pages.shape[3];
    if (num_kv_heads < 1) check.fail("v_pages", "at least 1 kv head", "0");
    if (page_size < kAttentionLaneKeys || page_size % kAttentionLaneKeys != 0)
      check.fail("v_pages", "a page size that is a multiple of 16", std::to_string(page_size));
    if (head_dim < 1 || head_dim > kAttentionMaxHeadDim)
      check.fail("v_pages", "a head_dim from 1 to 256", std::to_string(head_dim));
    page_contiguous(v_pages, "v_pages");
    check.dtype(k_pages, "k_pages", {v_pages.dtype});
    check.shape(k_pages, "k_pages",
                {num_pages, num_kv_heads, page_size / kAttentionLaneKeys, head_dim, kAttentionLaneKeys});
    page_contiguous(k_pages, "k_pages");
    check_scales(k_scales, "k_scales");
    check_scales(v_scales, "v_scales");
    check.dtype(block_table, "block_table", {DType::i32});
    check.unit_stride(check.shape(block_table, "block_table", {-1, -1}), "block_table");
    check.dtype(seq, "seq", {DType::i32});
    check.contiguous(check.shape(seq, "seq", {num_rows}), "seq");
    check.dtype(position, "position", {DType::i32});
    check.contiguous(check.shape(position, "position", {num_rows}), "position");
  }

  // Every page that row t uses, from `first_key` to its position, is one that exists.
  void check_row(int64_t t, int64_t first_key) const {
    const int64_t s = seq.ptr<int32_t>()[t], p = position.ptr<int32_t>()[t];
    if (s < 0 || s >= block_table.shape[0])
      check.fail("seq", "0 to " + std::to_string(block_table.shape[0] - 1) + " (rows of block_table)",
                 std::to_string(s) + at(t));
    if (p < 0 || p / page_size >= block_table.shape[1])
      check.fail("position",
                 "0 to " + std::to_string(block_table.shape[1] * page_size - 1) + " (pages of block_table * page_size)",
                 std::to_string(p) + at(t));
    for (int64_t i = std::max<int64_t>(first_key, 0) / page_size; i <= p / page_size; ++i)
      if (const int64_t page = page_of(s, i); page < 0 || page >= num_pages)
        check.fail("block_table", "0 to " + std::to_string(num_pages - 1) + " (number of pages)",
                   std::to_string(page) + " at [" + std::to_string(s) + ", " + std::to_string(i) + "]");
  }
  int64_t page_of(int64_t s, int64_t index) const {
    return block_table.ptr<int32_t>()[s * block_table.strides[0] + index];
  }

 private:
  void check_scales(const std::optional<Tensor>& scales, const char* name) const {
    const bool wanted = v_pages.dtype == DType::i8;
    if (scales.has_value() != wanted)
      check.fail(name, wanted ? "a tensor, for int8 pages" : "None, for pages that are not int8",
                 wanted ? "None" : "one");
    if (!wanted) return;
    check.dtype(*scales, name, {DType::f32});
    page_contiguous(check.shape(*scales, name, {num_pages, num_kv_heads, page_size}), name);
  }
  static std::string at(int64_t t) { return " at row " + std::to_string(t); }
  // Pages may lie apart, but each is one piece.
  void page_contiguous(const Tensor& pages, const char* name) const {
    Tensor page = pages;
    page.ndim -= 1;
    std::copy(pages.shape + 1, pages.shape + pages.ndim, page.shape);
    std::copy(pages.strides + 1, pages.strides + pages.ndim, page.strides);
    check.contiguous(page, name);
  }
};

void check_rows(const Check& check, const Tensor& t, const char* name, std::initializer_list<int64_t> shape) {
  check.dtype(t, name, {DType::f32, DType::bf16});
  check.unit_stride(check.shape(t, name, shape), name);
}

void decode(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages, const Tensor& block_table, const Tensor& seq,
            const Tensor& position, const Tensor& y, float scale, std::optional<int64_t> sliding_window,
            const std::optional<Tensor>& k_scales, const std::optional<Tensor>& v_scales, bool round_q) {
  constexpr Check check{"attention_decode"};
  check_rows(check, q, "q", {-1, -1, -1});
  if (round_q) check.dtype(q, "q", {DType::f32});
  const int64_t num_rows = q.shape[0], num_heads = q.shape[1];
  const Cache cache(check, k_pages, v_pages, block_table, seq, position, k_scales, v_scales, num_rows);
  check.shape(q, "q", {num_rows, num_heads, cache.head_dim});
  if (num_heads < 1 || num_heads % cache.num_kv_heads != 0)
    check.fail("q", "a number of heads that is a multiple of " + std::to_string(cache.num_kv_heads) + " (kv heads)",
               std::to_string(num_heads));
  check.dtype(y, "y", {q.dtype});
  check_rows(check, y, "y", {num_rows, num_heads, cache.head_dim});
  check.writable(y, "y");
  if (sliding_window && *sliding_window < 1)
    check.fail("sliding_window", "at least 1 or None", std::to_string(*sliding_window));
  for (int64_t t = 0; t < num_rows; ++t)
    cache.check_row(t, sliding_window ? position.ptr<int32_t>()[t] + 1 - *sliding_window : 0);
  const GilRelease release;
  attention_decode_cpu({.q = q.data,
                        .k_pages = k_pages.data,
                        .v_pages = v_pages.data,
                        .y = y.data,
                        .seq = seq.ptr<int32_t>(),
                        .position = position.ptr<int32_t>(),
                        .block_table = block_table.ptr<int32_t>(),
                        .num_rows = num_rows,
                        .num_heads = num_heads,
                        .num_kv_heads = cache.num_kv_heads,
                        .head_dim = cache.head_dim,
                        .page_size = cache.page_size,
                        .q_row_stride = q.strides[0],
                        .q_head_stride = q.strides[1],
                        .y_row_stride = y.strides[0],
                        .y_head_stride = y.strides[1],
                        .k_page_stride = k_pages.strides[0],
                        .v_page_stride = v_pages.strides[0],
                        .block_table_stride = block_table.strides[0],
                        .k_scales = k_scales ? k_scales->ptr<const float>() : nullptr,
                        .v_scales = v_scales ? v_scales->ptr<const float>() : nullptr,
                        .k_scale_page_stride = k_scales ? k_scales->strides[0] : 0,
                        .v_scale_page_stride = v_scales ? v_scales->strides[0] : 0,
                        .sliding_window = sliding_window.value_or(0),
                        .scale = scale,
                        .dtype = q.dtype,
                        .cache_dtype = v_pages.dtype,
                        .round_q = round_q});
}

void append(const Tensor& k, const Tensor& v, const Tensor& k_pages, const Tensor& v_pages, const Tensor& block_table,
            const Tensor& seq, const Tensor& position, const std::optional<Tensor>& k_scales,
            const std::optional<Tensor>& v_scales) {
  constexpr Check check{"kv_append"};
  check_rows(check, k, "k", {-1, -1, -1});
  const int64_t num_rows = k.shape[0];
  const Cache cache(check, k_pages, v_pages, block_table, seq, position, k_scales, v_scales, num_rows);
  check.shape(k, "k", {num_rows, cache.num_kv_heads, cache.head_dim});
  check.dtype(v, "v", {k.dtype});
  check_rows(check, v, "v", {num_rows, cache.num_kv_heads, cache.head_dim});
  check.writable(k_pages, "k_pages");
  check.writable(v_pages, "v_pages");
  if (k_scales) check.writable(*k_scales, "k_scales");
  if (v_scales) check.writable(*v_scales, "v_scales");
  std::vector<int64_t> slots(static_cast<size_t>(num_rows));
  for (int64_t t = 0; t < num_rows; ++t) {
    const int64_t p = position.ptr<int32_t>()[t];
    cache.check_row(t, p);
    slots[static_cast<size_t>(t)] =
        cache.page_of(seq.ptr<int32_t>()[t], p / cache.page_size) * cache.page_size + p % cache.page_size;
  }
  std::sort(slots.begin(), slots.end());
  if (const auto twice = std::adjacent_find(slots.begin(), slots.end()); twice != slots.end())
    check.fail("position", "rows that name different slots",
               "slot " + std::to_string(*twice % cache.page_size) + " of page " +
                   std::to_string(*twice / cache.page_size) + " twice");
  const GilRelease release;
  kv_append_cpu({.k = k.data,
                 .v = v.data,
                 .k_pages = k_pages.data,
                 .v_pages = v_pages.data,
                 .seq = seq.ptr<int32_t>(),
                 .position = position.ptr<int32_t>(),
                 .block_table = block_table.ptr<int32_t>(),
                 .num_rows = num_rows,
                 .num_kv_heads = cache.num_kv_heads,
                 .head_dim = cache.head_dim,
                 .page_size = cache.page_size,
                 .k_row_stride = k.strides[0],
                 .k_head_stride = k.strides[1],
                 .v_row_stride = v.strides[0],
                 .v_head_stride = v.strides[1],
                 .k_page_stride = k_pages.strides[0],
                 .v_page_stride = v_pages.strides[0],
                 .block_table_stride = block_table.strides[0],
                 .k_scales = k_scales ? k_scales->ptr<float>() : nullptr,
                 .v_scales = v_scales ? v_scales->ptr<float>() : nullptr,
                 .k_scale_page_stride = k_scales ? k_scales->strides[0] : 0,
                 .v_scale_page_stride = v_scales ? v_scales->strides[0] : 0,
                 .dtype = k.dtype,
                 .cache_dtype = v_pages.dtype});
}

}  // namespace

void bind_attention_decode(py::module_& m) {
  m.def("attention_decode_cpu", decode, py::arg("q"), py::arg("k_pages"), py::arg("v_pages"), py::arg("block_table"),
        py::arg("seq"), py::arg("position"), py::arg("y"), py::arg("scale"), py::arg("sliding_window"),
        py::arg("k_scales") = py::none(), py::arg("v_scales") = py::none(), py::kw_only(), py::arg("round_q") = false);
  m.def("kv_append_cpu", append, py::arg("k"), py::arg("v"), py::arg("k_pages"), py::arg("v_pages"),
        py::arg("block_table"), py::arg("seq"), py::arg("position"), py::arg("k_scales") = py::none(),
        py::arg("v_scales") = py::none());
}

}  // namespace pe
