// libFuzzer target: the safetensors parser with its JSON reader, and every byte that it vouches for.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <string>
#include <vector>

#include "formats/safetensors.h"
#include "formats/utf8.h"
#include "runtime/error.h"

namespace {

// Tensors must cover the data from its first to its last byte, once.
void visit(const pe::SafetensorsIndex& index, std::span<const uint8_t> file) {
  uint64_t end = 0;
  for (const pe::SafetensorsTensor& tensor : index.tensors) {
    if (end != 0 && tensor.offset != end) abort();
    if (tensor.offset > file.size() || tensor.num_bytes > file.size() - tensor.offset) abort();
    if (tensor.shape.size() > pe::kMaxSafetensorsDims || !pe::is_valid_utf8(tensor.name)) abort();
    end = tensor.offset + tensor.num_bytes;
  }
  if (!index.tensors.empty() && end != file.size()) abort();
  for (const auto& [key, value] : index.metadata) {
    if (!pe::is_valid_utf8(key) || !pe::is_valid_utf8(value)) abort();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  // An exact copy on the heap: reading one byte more is seen.
  const std::vector<uint8_t> file(data, data + size);
  try {
    visit(pe::parse_safetensors(file, "fuzz"), file);
  } catch (const pe::ModelFileError&) {
  }
  return 0;
}
