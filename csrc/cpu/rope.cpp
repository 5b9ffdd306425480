// Checks the positions, chooses the ISA level and splits the tokens over threads; the tables.
#include "pe/rope.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "runtime/dispatch.h"
#include "runtime/error.h"
#include "runtime/parallel.h"

namespace pe {
namespace {

constexpr IsaEntry<RopeIsa> kIsas[] = {PE_ISA_ENTRIES_VECTOR(rope)};
// A task moves about 64 KiB: long enough to hide the hand-off, short enough to balance.
constexpr int64_t kElementsPerTask = 16 * 1024;
// About 20 ns an angle.
constexpr int64_t kAnglesPerTask = 1024;

}  // namespace

const RopeIsa& rope_isa() { return select(kIsas); }

void rope_cpu(const Rope& args) {
  for (int64_t t = 0; t < args.num_tokens; ++t) {
    const int32_t position = args.positions[t];
    if (position < 0 || position >= args.num_positions)
      throw ArgumentError("[rope] positions: expected 0 to " + std::to_string(args.num_positions - 1) +
                          " (the rows of cos), got " + std::to_string(position) + " at index " + std::to_string(t));
  }
  const RopeIsa& isa = select(kIsas);
  const int64_t elements_per_token = std::max<int64_t>(args.num_heads * args.head_dim, 1);
  parallel_for(args.num_tokens, 1 + kElementsPerTask / elements_per_token,
               [&](int64_t begin, int64_t end) { isa.rotate(args, begin, end); });
}

void rope_table(const double* inv_freq, int64_t num_freqs, int64_t num_positions, double scale, float* cos_out,
                float* sin_out) {
  parallel_for(num_positions, 1 + kAnglesPerTask / std::max<int64_t>(num_freqs, 1), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      for (int64_t i = 0; i < num_freqs; ++i) {
        const double angle = static_cast<double>(p) * inv_freq[i];
        cos_out[p * num_freqs + i] = static_cast<float>(scale * std::cos(angle));
        sin_out[p * num_freqs + i] = static_cast<float>(scale * std::sin(angle));
      }
    }
  });
}

}  // namespace pe
