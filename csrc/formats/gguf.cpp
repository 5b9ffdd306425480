#include "formats/gguf.h"

#include <algorithm>
#include <utility>

#include "formats/byte_reader.h"
#include "formats/sorted_names.h"
#include "formats/utf8.h"
#include "runtime/checked.h"
#include "runtime/error.h"

namespace pe {
namespace {

constexpr std::string_view kAlignmentKey = "general.alignment";
// The shortest entry: key length, one byte of key, type, one byte of value.
constexpr uint64_t kMinEntryBytes = 8 + 1 + 4 + 1;
// The shortest tensor description: name length, one byte of name, number of dimensions, type, offset.
constexpr uint64_t kMinTensorBytes = 8 + 1 + 4 + 4 + 8;

struct ValueTypeInfo {
  std::string_view name;
  uint64_t num_bytes;  // 0 where the length is in the file
};

constexpr std::array<ValueTypeInfo, 13> kValueTypes = {{
    {"uint8", 1},
    {"int8", 1},
    {"uint16", 2},
    {"int16", 2},
    {"uint32", 4},
    {"int32", 4},
    {"float32", 4},
    {"bool", 1},
    {"string", 0},
    {"array", 0},
    {"uint64", 8},
    {"int64", 8},
    {"float64", 8},
}};

const ValueTypeInfo& info_of(GgufValueType type) { return kValueTypes[static_cast<size_t>(type)]; }

std::string_view key_of(const GgufEntry& entry) { return entry.key; }
std::string_view name_of(const GgufTensor& tensor) { return tensor.name; }

std::string_view as_text(std::span<const uint8_t> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

std::string_view read_text(ByteReader& reader, uint64_t max_bytes, const FieldName& field) {
  const uint64_t start = reader.offset();
  const auto length = reader.read<uint64_t>(field);
  if (length > max_bytes) {
    reader.fail_at(start, field,
                   "expected at most " + std::to_string(max_bytes) + " bytes, got " + std::to_string(length));
  }
  return as_text(reader.read_bytes(length, field));
}

std::string_view read_name(ByteReader& reader, uint64_t max_bytes, const FieldName& field) {
  const uint64_t start = reader.offset();
  const std::string_view name = read_text(reader, max_bytes, field);
  if (name.empty() || name.find('\0') != std::string_view::npos || !is_valid_utf8(name)) {
    reader.fail_at(start, field, "expected a name in UTF-8 without NUL, got '" + printable(name) + "'");
  }
  return name;
}

class Parser {
 public:
  Parser(std::span<const uint8_t> bytes, const std::string& path) : bytes_(bytes), reader_(bytes, path) {}

  GgufIndex parse() {
    const uint64_t counts_offset = read_header();
    const uint64_t num_tensors = read_count({"n_tensors"}, kMaxGgufTensors, kMinTensorBytes);
    const uint64_t num_entries = read_count({"n_kv"}, kMaxGgufEntries, kMinEntryBytes);
    const Checked least = Checked(num_tensors) * kMinTensorBytes + Checked(num_entries) * kMinEntryBytes;
    if (!least.at_most(reader_.remaining())) {
      reader_.fail_at(counts_offset, {"n_tensors"}, "expected a file that holds all entries and tensors");
    }
    for (uint64_t i = 0; i < num_entries; ++i) read_entry(i);
    check_unique(index_.metadata, key_of, {"metadata"});
    read_alignment();
    for (uint64_t i = 0; i < num_tensors; ++i) read_tensor(i);
    check_unique(index_.tensors, name_of, {"tensors"});
    if (num_tensors > 0) place_tensors();
    return std::move(index_);
  }

 private:
  uint64_t read_header() {
    const std::string_view magic = as_text(reader_.read_bytes(4, {"magic"}));
    if (magic != "GGUF") reader_.fail_at(0, {"magic"}, "expected 'GGUF', got '" + printable(magic) + "'");
    index_.version = reader_.read<uint32_t>({"version"});
    if (index_.version != 2 && index_.version != 3) {
      const bool is_swapped = index_.version != 0 && (index_.version & 0xffff) == 0;
      reader_.fail_at(
          4, {"version"},
          "expected 2 or 3, got " + std::to_string(index_.version) + (is_swapped ? ", as in a big-endian file" : ""));
    }
    return reader_.offset();
  }

  uint64_t read_count(const FieldName& field, uint64_t limit, uint64_t min_bytes) {
    const uint64_t start = reader_.offset();
    const auto count = reader_.read<uint64_t>(field);
    const uint64_t most = std::min(limit, reader_.remaining() / min_bytes);
    if (count > most) {
      reader_.fail_at(start, field,
                      "expected at most " + std::to_string(most) + " in this file, got " + std::to_string(count));
    }
    return count;
  }

  GgufValueType read_value_type(const FieldName& field) {
    const uint64_t start = reader_.offset();
    const auto id = reader_.read<uint32_t>(field);
    if (id >= kValueTypes.size()) {
      reader_.fail_at(start, field, "expected a value type from 0 to 12, got " + std::to_string(id));
    }
    return static_cast<GgufValueType>(id);
  }

  void read_entry(uint64_t i) {
    const std::string_view key = read_name(reader_, kMaxGgufKeyBytes, {"metadata", i, "key"});
    const uint64_t type_offset = reader_.offset();
    GgufValue value = {read_value_type({key, {}, "type"}), false, 1, {}};
    if (value.type == GgufValueType::kArray) {
      value.is_array = true;
      value.type = read_value_type({key, {}, "element_type"});
      if (value.type == GgufValueType::kArray) {
        reader_.fail_at(type_offset, {key}, "expected an array of scalars or strings, got an array of arrays");
      }
      const uint64_t min_bytes = value.type == GgufValueType::kString ? 8 : info_of(value.type).num_bytes;
      value.num_elements = read_count({key, {}, "length"}, reader_.remaining(), min_bytes);
    }
    const uint64_t start = reader_.offset();
    if (value.type == GgufValueType::kString) {
      read_strings(key, value);
    } else {
      const Checked num_bytes = Checked(value.num_elements) * info_of(value.type).num_bytes;
      value.bytes = reader_.read_bytes(
          num_bytes.get_or([&] { reader_.fail_at(start, {key}, "expected fewer than 2^64 bytes"); }), {key});
    }
    if (value.type == GgufValueType::kBool) {
      const auto other = std::find_if(value.bytes.begin(), value.bytes.end(), [](uint8_t byte) { return byte > 1; });
      if (other != value.bytes.end()) {
        reader_.fail_at(start + static_cast<uint64_t>(other - value.bytes.begin()), {key},
                        "expected a bool of 0 or 1, got " + std::to_string(*other));
      }
    }
    index_.metadata.push_back({key, value});
  }

  void read_strings(std::string_view key, GgufValue& value) {
    if (value.is_array) {
      if (value.num_elements > kMaxGgufArrayStrings - num_array_strings_) {
        reader_.fail({key}, "expected at most " + std::to_string(kMaxGgufArrayStrings) +
                                " strings in all arrays of the file, got more");
      }
      num_array_strings_ += value.num_elements;
    }
    const bool allows_raw_bytes = value.is_array && gguf_allows_raw_bytes(key);
    const uint64_t first = reader_.offset();
    for (uint64_t i = 0; i < value.num_elements; ++i) {
      const uint64_t start = reader_.offset();
      const std::string_view text = read_text(reader_, kMaxGgufStringBytes, {key, i});
      if (!allows_raw_bytes && !is_valid_utf8(text)) {
        reader_.fail_at(start, {key, i}, "expected UTF-8, got '" + printable(text) + "'");
      }
    }
    const uint64_t begin = value.is_array ? first : first + sizeof(uint64_t);
    value.bytes = bytes_.subspan(begin, reader_.offset() - begin);
  }

  void read_alignment() {
    const auto entry = std::find_if(index_.metadata.begin(), index_.metadata.end(),
                                    [](const GgufEntry& candidate) { return candidate.key == kAlignmentKey; });
    if (entry == index_.metadata.end()) return;
    const auto alignment = entry->value.scalar<uint32_t>(GgufValueType::kUint32);
    const auto offset = static_cast<uint64_t>(entry->value.bytes.data() - bytes_.data());
    if (!alignment) reader_.fail_at(offset, {kAlignmentKey}, "expected a uint32, got another type");
    if (*alignment == 0 || (*alignment & (*alignment - 1)) != 0 || *alignment > kMaxGgufAlignment) {
      reader_.fail_at(
          offset, {kAlignmentKey},
          "expected a power of two up to " + std::to_string(kMaxGgufAlignment) + ", got " + std::to_string(*alignment));
    }
    index_.alignment = *alignment;
  }

  void read_tensor(uint64_t i) {
    GgufTensor tensor = {};
    tensor.name = read_name(reader_, kMaxGgufTensorNameBytes, {"tensors", i, "name"});
    const uint64_t start = reader_.offset();
    tensor.num_dims = reader_.read<uint32_t>({tensor.name, {}, "n_dims"});
    if (tensor.num_dims > kMaxGgufDims) {
      reader_.fail_at(start, {tensor.name, {}, "n_dims"},
                      "expected at most " + std::to_string(kMaxGgufDims) + ", got " + std::to_string(tensor.num_dims));
    }
    for (uint32_t d = 0; d < tensor.num_dims; ++d) {
      tensor.shape[tensor.num_dims - 1 - d] = reader_.read<uint64_t>({tensor.name, {}, "shape"});
    }
    const uint64_t type_offset = reader_.offset();
    const auto type_id = reader_.read<uint32_t>({tensor.name, {}, "type"});
    tensor.type = find_ggml_type(type_id);
    if (tensor.type == nullptr) {
      reader_.fail_at(type_offset, {tensor.name, {}, "type"},
                      "expected a known tensor type, got " + std::to_string(type_id));
    }
    tensor.num_bytes = num_bytes(tensor, start);
    offset_fields_.push_back(reader_.offset());
    tensor.offset = reader_.read<uint64_t>({tensor.name, {}, "offset"});
    index_.tensors.push_back(tensor);
  }

  uint64_t num_bytes(const GgufTensor& tensor, uint64_t start) const {
    const FieldName field = {tensor.name, {}, "shape"};
    const uint64_t row = tensor.num_dims == 0 ? 1 : tensor.shape[tensor.num_dims - 1];
    if (row % tensor.type->block_elements != 0) {
      reader_.fail_at(start, field,
                      "expected rows in blocks of " + std::to_string(tensor.type->block_elements) + " for " +
                          std::string(tensor.type->name) + ", got " + std::to_string(row) + " elements");
    }
    // The product without zeros is bounded too, so that a consumer may compute strides.
    Checked count = 1;
    bool is_empty = false;
    for (uint32_t d = 0; d < tensor.num_dims; ++d) {
      is_empty = is_empty || tensor.shape[d] == 0;
      count = count * std::max<uint64_t>(tensor.shape[d], 1);
    }
    const auto fail = [&] { reader_.fail_at(start, field, "expected fewer than 2^63 elements and bytes, got more"); };
    const auto num_elements = static_cast<uint64_t>(count.get_or<int64_t>(fail));
    const Checked bytes = Checked(num_elements / tensor.type->block_elements) * tensor.type->block_bytes;
    const auto total = static_cast<uint64_t>(bytes.get_or<int64_t>(fail));
    return is_empty ? 0 : total;
  }

  void place_tensors() {
    const auto overflow = [&] { reader_.fail({"tensors"}, "expected data offsets below 2^64, got more"); };
    const uint64_t data_offset = Checked(reader_.offset()).align_up(index_.alignment).get_or(overflow);
    Checked expected = 0;  // from the start of the data
    for (size_t i = 0; i < index_.tensors.size(); ++i) {
      GgufTensor& tensor = index_.tensors[i];
      const FieldName field = {tensor.name, {}, "offset"};
      const uint64_t start = expected.get_or(overflow);
      if (tensor.offset != start) {
        reader_.fail_at(offset_fields_[i], field,
                        "expected " + std::to_string(start) + ", where the tensor before ends, got " +
                            std::to_string(tensor.offset));
      }
      const Checked begin = Checked(data_offset) + tensor.offset;
      if (!(begin + tensor.num_bytes).at_most(bytes_.size())) {
        reader_.fail_at(offset_fields_[i], field,
                        "expected data inside the file of " + std::to_string(bytes_.size()) + " bytes, got " +
                            std::to_string(tensor.num_bytes) + " bytes at " + std::to_string(start) + " after byte " +
                            std::to_string(data_offset));
      }
      tensor.offset = begin.get_or(overflow);
      expected = (expected + tensor.num_bytes).align_up(index_.alignment);
    }
  }

  template <class Item, class Name>
  void check_unique(const std::vector<Item>& items, Name name, const FieldName& field) const {
    const std::vector<uint32_t> order = sort_by_name(items, name);
    if (const auto repeated = find_duplicate(items, order, name)) {
      const std::string_view text = name(items[*repeated]);
      const auto offset = reinterpret_cast<const uint8_t*>(text.data()) - bytes_.data();
      reader_.fail_at(static_cast<uint64_t>(offset), field,
                      "expected each name once, got '" + printable(text) + "' twice");
    }
  }

  std::span<const uint8_t> bytes_;
  ByteReader reader_;
  GgufIndex index_;
  std::vector<uint64_t> offset_fields_;  // where each tensor's offset stands in the file
  uint64_t num_array_strings_ = 0;
};

}  // namespace

std::string_view gguf_value_type_name(GgufValueType type) noexcept { return info_of(type).name; }

bool gguf_allows_raw_bytes(std::string_view key) noexcept {
  return key == "tokenizer.ggml.tokens" || key == "tokenizer.ggml.merges" || key == "tokenizer.ggml.added_tokens";
}

void GgufValue::for_each_string(const std::string& path, const std::function<void(std::string_view)>& visit) const {
  ByteReader reader(bytes, path);
  for (uint64_t i = 0; i < num_elements; ++i) visit(read_text(reader, kMaxGgufStringBytes, {"array", i}));
}

GgufIndex parse_gguf(std::span<const uint8_t> bytes, const std::string& path) { return Parser(bytes, path).parse(); }

GgufFile::GgufFile(const std::string& path)
    : file_(MappedFile::open(path)),
      index_(parse_gguf(file_->bytes(), path)),
      by_name_(sort_by_name(index_.tensors, name_of)) {}

const GgufTensor* GgufFile::find_tensor(std::string_view name) const {
  return find_by_name(index_.tensors, by_name_, name, name_of);
}

std::span<const uint8_t> GgufFile::data(const GgufTensor& tensor) const {
  return file_->bytes().subspan(tensor.offset, tensor.num_bytes);
}

}  // namespace pe
