// Philox, the checks of a SampleRow, the choice of the ISA level, rows over threads.
#include "pe/sample.h"

#include <cmath>
#include <new>
#include <string>
#include <vector>

#include "cpu/sample_layout.h"
#include "runtime/dispatch.h"
#include "runtime/error.h"
#include "runtime/parallel.h"

namespace pe {
namespace {

constexpr IsaEntry<SampleIsa> kIsas[] = {PE_ISA_ENTRIES_VECTOR(sample)};

struct alignas(64) Line {
  char bytes[64];
};

void check_row(const Sample& args, int64_t r) {
  const SampleRow& row = args.rows[r];
  const auto expect = [&](bool good, const char* name, const char* expected, const std::string& got) {
    if (!good)
      throw ArgumentError("[sample] " + std::string(name) + ": expected " + expected + ", got " + got + " at row " +
                          std::to_string(r));
  };
  expect(row.temperature >= 0 && std::isfinite(row.temperature), "temperature", "a finite number >= 0",
         std::to_string(row.temperature));
  expect(row.top_k >= 0, "top_k", "a number >= 0", std::to_string(row.top_k));
  expect(row.top_p >= 0 && row.top_p <= 1, "top_p", "a number from 0 to 1", std::to_string(row.top_p));
  expect(row.min_p >= 0 && row.min_p <= 1, "min_p", "a number from 0 to 1", std::to_string(row.min_p));
  expect(row.repetition_penalty > 0 && std::isfinite(row.repetition_penalty), "repetition_penalty",
         "a finite number > 0", std::to_string(row.repetition_penalty));
  expect(std::isfinite(row.frequency_penalty), "frequency_penalty", "a finite number",
         std::to_string(row.frequency_penalty));
  expect(std::isfinite(row.presence_penalty), "presence_penalty", "a finite number",
         std::to_string(row.presence_penalty));
  const auto expect_ids = [&](const int32_t* ids, int64_t count, const char* name) {
    for (int64_t i = 0; i < count; ++i)
      expect(ids[i] >= 0 && ids[i] < args.vocab_size, name, "token ids below the vocabulary size",
             std::to_string(ids[i]));
  };
  expect_ids(row.previous_ids, row.num_previous_ids, "previous_ids");
  expect_ids(row.bias_ids, row.num_biases, "bias_ids");
  expect_ids(row.banned_ids, row.num_banned_ids, "banned_ids");
  for (int64_t i = 0; i < row.num_biases; ++i)
    expect(std::isfinite(row.biases[i]), "biases", "finite numbers", std::to_string(row.biases[i]));
}

}  // namespace

const SampleIsa& sample_isa() { return select(kIsas); }

void philox4x32_10(uint32_t counter[4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * counter[0], b = uint64_t{0xCD9E8D57} * counter[2];
    const uint32_t next0 = static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key0;
    const uint32_t next2 = static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key1;
    counter[0] = next0;
    counter[1] = static_cast<uint32_t>(b);
    counter[2] = next2;
    counter[3] = static_cast<uint32_t>(a);
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
}

double sample_uniform(uint64_t seed, uint64_t sequence, uint64_t position) {
  uint32_t x[4] = {static_cast<uint32_t>(sequence), static_cast<uint32_t>(sequence >> 32),
                   static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32)};
  philox4x32_10(x, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  return (static_cast<double>(x[0] >> 5) * 0x1p26 + static_cast<double>(x[1] >> 6)) * 0x1p-53;
}

int64_t sample_scratch_bytes(int64_t vocab_size) {
  return vocab_size * static_cast<int64_t>(2 * sizeof(uint64_t) + 2 * sizeof(float) + sizeof(int32_t)) +
         sample_num_blocks(vocab_size) * static_cast<int64_t>(2 * sizeof(float));
}

void sample_cpu(const Sample& args) {
  for (int64_t r = 0; r < args.num_rows; ++r) check_row(args, r);
  const SampleIsa& isa = select(kIsas);
  const size_t num_lines = static_cast<size_t>(sample_scratch_bytes(args.vocab_size)) / sizeof(Line) + 1;
  const int64_t rows_per_task = 1 + 1024 / args.vocab_size;
  parallel_for(args.num_rows, rows_per_task, [&](int64_t begin, int64_t end) {
    thread_local std::vector<Line> scratch;  // a few MB, kept: fresh pages would cost more than the sampling
    if (scratch.size() < num_lines) scratch.resize(num_lines);
    isa.rows(args, begin, end, scratch.data());
  });
}

}  // namespace pe
