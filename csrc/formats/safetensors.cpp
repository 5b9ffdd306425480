#include "formats/safetensors.h"

#include <algorithm>
#include <array>
#include <optional>
#include <utility>

#include "formats/byte_reader.h"
#include "formats/json.h"
#include "formats/sorted_names.h"
#include "runtime/checked.h"
#include "runtime/error.h"

namespace pe {
namespace {

struct DtypeBits {
  std::string_view name;
  uint64_t bits;
};

constexpr std::array<DtypeBits, 22> kDtypes = {{
    {"BOOL", 8},    {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6},     {"U8", 8},          {"I8", 8},
    {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"I16", 16},
    {"U16", 16},    {"F16", 16},    {"BF16", 16},   {"I32", 32},        {"U32", 32},        {"F32", 32},
    {"C64", 64},    {"F64", 64},    {"I64", 64},    {"U64", 64},
}};

constexpr uint64_t kHeaderStart = 8;

const std::string& name_of(const SafetensorsTensor& tensor) { return tensor.name; }

class Parser {
 public:
  Parser(std::span<const uint8_t> bytes, const std::string& path)
      : bytes_(bytes), path_(path), header_(read_header(bytes, path)), json_(header_, path, "header", kHeaderStart) {}

  SafetensorsIndex parse() {
    if (!header_.starts_with('{')) json_.fail("'{'");
    json_.enter_object();
    bool has_metadata = false;
    uint64_t entry_offset = json_.offset();
    for (std::string key; json_.next_key(key); entry_offset = json_.offset()) {
      if (key == "__metadata__") {
        if (has_metadata) fail(entry_offset, "__metadata__", "expected one entry, got two");
        has_metadata = true;
        parse_metadata();
      } else {
        if (index_.tensors.size() == kMaxSafetensorsTensors) {
          fail(entry_offset, "header", "expected at most " + std::to_string(kMaxSafetensorsTensors) + " tensors");
        }
        parse_tensor(std::move(key), entry_offset);
      }
    }
    json_.finish();
    check_unique_names();
    check_layout();
    return std::move(index_);
  }

 private:
  static std::string_view read_header(std::span<const uint8_t> bytes, const std::string& path) {
    ByteReader reader(bytes, path);
    const auto size = reader.read<uint64_t>({"header_size"});
    const uint64_t limit = std::min(kMaxSafetensorsHeaderBytes, reader.remaining());
    if (size > limit) {
      reader.fail_at(0, {"header_size"},
                     "expected at most " + std::to_string(limit) + " bytes, got " + std::to_string(size));
    }
    const std::span<const uint8_t> text = reader.read_bytes(size, {"header"});
    return {reinterpret_cast<const char*>(text.data()), text.size()};
  }

  [[noreturn]] void fail(uint64_t offset, std::string_view field, const std::string& message) const {
    throw ModelFileError(path_, offset, printable(field), message);
  }

  void parse_metadata() {
    json_.enter_object();
    for (std::string key; json_.next_key(key);) {
      if (index_.metadata.size() == kMaxSafetensorsMetadata) {
        fail(json_.offset(), "__metadata__",
             "expected at most " + std::to_string(kMaxSafetensorsMetadata) + " entries, got more");
      }
      std::string value = json_.read_string();
      index_.metadata.emplace_back(std::move(key), std::move(value));
    }
    const auto key_of = [](const auto& entry) -> const std::string& { return entry.first; };
    const std::vector<uint32_t> order = sort_by_name(index_.metadata, key_of);
    if (const auto repeated = find_duplicate(index_.metadata, order, key_of)) {
      fail(json_.offset(), "__metadata__",
           "expected each key once, got '" + printable(index_.metadata[*repeated].first) + "' twice");
    }
  }

  void parse_tensor(std::string name, uint64_t entry_offset) {
    if (name.empty() || name.find('\0') != std::string::npos) {
      fail(entry_offset, "header", "expected a tensor name without NUL, got '" + printable(name) + "'");
    }
    SafetensorsTensor tensor = {std::move(name), {}, {}, 0, 0, entry_offset};
    std::optional<DtypeBits> dtype;
    bool has_shape = false;
    std::optional<std::pair<uint64_t, uint64_t>> range;
    json_.enter_object();
    for (std::string key; json_.next_key(key);) {
      if (key == "dtype" && !dtype) {
        dtype = parse_dtype(tensor.name);
      } else if (key == "shape" && !has_shape) {
        has_shape = true;
        parse_shape(tensor);
      } else if (key == "data_offsets" && !range) {
        range = parse_range(tensor.name);
      } else {
        fail(json_.offset(), tensor.name,
             "expected dtype, shape and data_offsets once each, got '" + printable(key) + "'");
      }
    }
    if (!dtype || !has_shape || !range) {
      fail(entry_offset, tensor.name, "expected dtype, shape and data_offsets, got fewer");
    }
    tensor.dtype = dtype->name;
    tensor.num_bytes = num_bytes(tensor, dtype->bits);
    if (range->first > range->second || range->second - range->first != tensor.num_bytes) {
      fail(entry_offset, tensor.name,
           "expected data_offsets of " + std::to_string(tensor.num_bytes) + " bytes, got [" +
               std::to_string(range->first) + ", " + std::to_string(range->second) + "]");
    }
    tensor.offset = range->first;  // from the start of the data until check_layout has seen that all fit
    index_.tensors.push_back(std::move(tensor));
  }

  DtypeBits parse_dtype(const std::string& name) {
    const uint64_t offset = json_.offset();
    const std::string dtype = json_.read_string();
    const auto* const found =
        std::find_if(kDtypes.begin(), kDtypes.end(), [&](const DtypeBits& known) { return known.name == dtype; });
    if (found == kDtypes.end()) fail(offset, name, "expected a known dtype, got '" + printable(dtype) + "'");
    return *found;
  }

  void parse_shape(SafetensorsTensor& tensor) {
    json_.enter_array();
    while (json_.next_element()) {
      if (tensor.shape.size() == kMaxSafetensorsDims) {
        fail(json_.offset(), tensor.name, "expected at most " + std::to_string(kMaxSafetensorsDims) + " dimensions");
      }
      tensor.shape.push_back(json_.read_uint64());
    }
  }

  std::pair<uint64_t, uint64_t> parse_range(const std::string& name) {
    const uint64_t offset = json_.offset();
    std::array<uint64_t, 2> range = {};
    size_t count = 0;
    json_.enter_array();
    for (; json_.next_element(); ++count) {
      if (count == 2) fail(offset, name, "expected two data_offsets, got more");
      range[count] = json_.read_uint64();
    }
    if (count != 2) fail(offset, name, "expected two data_offsets, got " + std::to_string(count));
    return {range[0], range[1]};
  }

  uint64_t num_bytes(const SafetensorsTensor& tensor, uint64_t bits) const {
    // The product without zeros is bounded too, so that a consumer may compute strides.
    Checked num_bits = bits;
    bool is_empty = false;
    for (const uint64_t dim : tensor.shape) {
      is_empty = is_empty || dim == 0;
      num_bits = num_bits * std::max<uint64_t>(dim, 1);
    }
    const auto total = num_bits.get_or<int64_t>(
        [&] { fail(tensor.header_offset, tensor.name, "expected a shape of fewer than 2^63 bits, got more"); });
    if (is_empty) return 0;
    if (total % 8 != 0) {
      fail(tensor.header_offset, tensor.name,
           "expected a whole number of bytes, got " + std::to_string(total) + " bits");
    }
    return static_cast<uint64_t>(total) / 8;
  }

  void check_unique_names() const {
    const std::vector<uint32_t> order = sort_by_name(index_.tensors, name_of);
    if (const auto repeated = find_duplicate(index_.tensors, order, name_of)) {
      const SafetensorsTensor& tensor = index_.tensors[*repeated];
      fail(tensor.header_offset, tensor.name, "expected each tensor once, got this name twice");
    }
  }

  void check_layout() {
    std::stable_sort(index_.tensors.begin(), index_.tensors.end(), [](const auto& a, const auto& b) {
      return std::pair(a.offset, a.num_bytes) < std::pair(b.offset, b.num_bytes);
    });
    const uint64_t data_offset = kHeaderStart + header_.size();
    const uint64_t data_size = bytes_.size() - data_offset;
    uint64_t end = 0;
    for (SafetensorsTensor& tensor : index_.tensors) {
      if (tensor.offset != end) {
        fail(tensor.header_offset, tensor.name,
             "expected data_offsets to go on at " + std::to_string(end) + ", got " + std::to_string(tensor.offset));
      }
      if (tensor.num_bytes > data_size - end) {
        fail(tensor.header_offset, tensor.name,
             "expected data_offsets up to " + std::to_string(data_size) + ", where the file ends, got " +
                 std::to_string(tensor.offset) + " + " + std::to_string(tensor.num_bytes));
      }
      end += tensor.num_bytes;
      tensor.offset += data_offset;
    }
    if (end != data_size) {
      fail(data_offset + end, "header",
           "expected the tensors to fill the file, got " + std::to_string(data_size - end) + " bytes after the last");
    }
  }

  std::span<const uint8_t> bytes_;
  const std::string& path_;
  std::string_view header_;
  JsonReader json_;
  SafetensorsIndex index_;
};

}  // namespace

SafetensorsIndex parse_safetensors(std::span<const uint8_t> bytes, const std::string& path) {
  return Parser(bytes, path).parse();
}

SafetensorsFile::SafetensorsFile(const std::string& path)
    : file_(MappedFile::open(path)),
      index_(parse_safetensors(file_->bytes(), path)),
      by_name_(sort_by_name(index_.tensors, name_of)) {}

const SafetensorsTensor* SafetensorsFile::find(std::string_view name) const {
  return find_by_name(index_.tensors, by_name_, name, name_of);
}

std::span<const uint8_t> SafetensorsFile::data(const SafetensorsTensor& tensor) const {
  return file_->bytes().subspan(tensor.offset, tensor.num_bytes);
}

}  // namespace pe
