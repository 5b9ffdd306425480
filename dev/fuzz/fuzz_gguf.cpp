// libFuzzer target: the GGUF parser, and every byte that it vouches for.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <string>
#include <vector>

#include "formats/gguf.h"
#include "formats/gguf_blocks.h"
#include "runtime/error.h"

namespace {

// Read through this, so that the sanitizer sees each access.
volatile uint8_t sink;

void touch(std::span<const uint8_t> bytes) {
  uint8_t sum = 0;
  for (const uint8_t byte : bytes) sum = static_cast<uint8_t>(sum + byte);
  sink = sum;
}

void visit(const pe::GgufIndex& index, std::span<const uint8_t> file, const std::string& path) {
  for (const pe::GgufEntry& entry : index.metadata) {
    touch(entry.value.bytes);
    if (!entry.value.is_array || entry.value.type != pe::GgufValueType::kString) continue;
    entry.value.for_each_string(
        path, [](std::string_view text) { touch({reinterpret_cast<const uint8_t*>(text.data()), text.size()}); });
  }
  uint64_t end = 0;
  for (const pe::GgufTensor& tensor : index.tensors) {
    if (tensor.offset < end || tensor.offset > file.size() || tensor.num_bytes > file.size() - tensor.offset) abort();
    end = tensor.offset + tensor.num_bytes;
    const std::span<const uint8_t> data = file.subspan(tensor.offset, tensor.num_bytes);
    touch(data);
    std::vector<float> values(tensor.num_bytes / tensor.type->block_bytes * tensor.type->block_elements);
    try {
      pe::dequantize_blocks(*tensor.type, data, values);
    } catch (const pe::BackendUnavailable&) {
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  // An exact copy on the heap: reading one byte more is seen.
  const std::vector<uint8_t> file(data, data + size);
  const std::string path = "fuzz";
  try {
    visit(pe::parse_gguf(file, path), file, path);
  } catch (const pe::ModelFileError&) {
  }
  return 0;
}
