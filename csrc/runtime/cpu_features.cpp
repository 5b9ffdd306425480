#include "runtime/cpu_features.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "runtime/error.h"

#if defined(PE_EMULATE_AMX)
#include "runtime/tile_emulator.h"
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pe {
namespace {

enum : uint32_t {
  kCpu_avx2 = 1u << 0,
  kCpu_fma = 1u << 1,
  kCpu_f16c = 1u << 2,
  kCpu_avx512f = 1u << 3,
  kCpu_avx512bw = 1u << 4,
  kCpu_avx512vl = 1u << 5,
  kCpu_avx512dq = 1u << 6,
  kCpu_avx512vnni = 1u << 7,
  kCpu_avx512bf16 = 1u << 8,
  kCpu_amx_tile = 1u << 9,
  kCpu_amx_int8 = 1u << 10,
  kCpu_amx_bf16 = 1u << 11,
};

enum class OsState { none, ymm, zmm, tile };

struct Level {
  const char* name;
  uint32_t features;
  OsState os;
};

constexpr Level kLevels[] = {
#include "pe/isa_table.inc"
};
constexpr int kNumLevels = sizeof(kLevels) / sizeof(kLevels[0]);

#if defined(__x86_64__)

uint32_t detect_features() {
  uint32_t eax, ebx, ecx, edx, found = 0;
  const auto add = [&](uint32_t reg, int bit, uint32_t feature) { found |= (reg >> bit & 1u) ? feature : 0u; };
  if (__get_cpuid(1, &eax, &ebx, &ecx, &edx)) {
    add(ecx, 12, kCpu_fma);
    add(ecx, 29, kCpu_f16c);
  }
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) {
    add(ebx, 5, kCpu_avx2);
    add(ebx, 16, kCpu_avx512f);
    add(ebx, 17, kCpu_avx512dq);
    add(ebx, 30, kCpu_avx512bw);
    add(ebx, 31, kCpu_avx512vl);
    add(ecx, 11, kCpu_avx512vnni);
    add(edx, 22, kCpu_amx_bf16);
    add(edx, 24, kCpu_amx_tile);
    add(edx, 25, kCpu_amx_int8);
  }
  if (__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) add(eax, 5, kCpu_avx512bf16);
  return found;
}

uint64_t read_xcr0() {
  uint32_t eax, ebx, ecx, edx;
  constexpr uint32_t kOsxsave = 1u << 27;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & kOsxsave)) return 0;
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}

// Linux grants the 8 KiB tile state on request only; a refusal means "no AMX", never an error.
bool request_tile_state() {
  constexpr long kArchGetXcompPerm = 0x1022, kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;
  if (syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) != 0) return false;
  uint64_t granted = 0;
  return syscall(SYS_arch_prctl, kArchGetXcompPerm, &granted) == 0 && (granted >> kXfeatureXtiledata & 1u);
}

bool os_saves(OsState state) {
  static const uint64_t xcr0 = read_xcr0();
  const auto has = [](uint64_t bits) { return (xcr0 & bits) == bits; };
  switch (state) {
    case OsState::none:
      return true;
    case OsState::ymm:
      return has(0x6);
    case OsState::zmm:
      return has(0xe6);
    case OsState::tile:
      return has(0x600e6) && request_tile_state();
  }
  return false;
}

#else

uint32_t detect_features() { return 0; }
bool os_saves(OsState state) { return state == OsState::none; }

#endif

struct Detected {
  std::vector<Isa> isas;
  std::string limit_reason;
};

Detected detect() {
  Detected out;
  const uint32_t features = detect_features();
  for (int i = 0; i < kNumLevels; ++i) {
    const Level& level = kLevels[i];
    if ((features & level.features) != level.features) {
      out.limit_reason = std::string(level.name) + ": the CPU lacks the instructions";
      break;
    }
    if (!os_saves(level.os)) {
      out.limit_reason = std::string(level.name) + ": the operating system does not save or grant its registers";
      break;
    }
    out.isas.push_back(static_cast<Isa>(i));
  }
#if defined(PE_EMULATE_AMX)
  if (out.isas.back() == Isa::amx) install_tile_emulator();
#endif
  return out;
}

const Detected& detected() {
  static const Detected once = detect();
  return once;
}

Isa parse_isa(const char* source, const std::string& name) {
  std::string known;
  for (const Isa isa : available_isas()) {
    if (name == isa_name(isa)) return isa;
    known += (known.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  throw ArgumentError(std::string(source) + ": expected one of the levels of this machine (" + known + "), got '" +
                      name + "'");
}

constexpr int kUnset = -1;
constinit std::atomic<int> g_active{kUnset};

}  // namespace

const char* isa_name(Isa isa) { return kLevels[static_cast<int>(isa)].name; }

const std::vector<Isa>& available_isas() { return detected().isas; }

Isa active_isa() {
  int active = g_active.load(std::memory_order_relaxed);
  if (active == kUnset) {
    const char* wanted = std::getenv("PYENGINE_ISA");
    const Isa isa = wanted && *wanted ? parse_isa("PYENGINE_ISA", wanted) : available_isas().back();
    active = static_cast<int>(isa);
    g_active.store(active, std::memory_order_relaxed);
  }
  return static_cast<Isa>(active);
}

Isa set_active_isa(const std::string& name) {
  const Isa previous = active_isa();
  g_active.store(static_cast<int>(parse_isa("isa", name)), std::memory_order_relaxed);
  return previous;
}

std::string isa_limit_reason() { return detected().limit_reason; }

const char* isa_emulation() {
#if defined(PE_EMULATE_AMX)
  return "amx: the tile unit is emulated; a build for tests, not a release";
#else
  return "";
#endif
}

std::string cpu_name() {
#if defined(__x86_64__)
  uint32_t brand[12] = {};
  for (uint32_t i = 0; i < 3; ++i)
    if (!__get_cpuid(0x80000002u + i, &brand[4 * i], &brand[4 * i + 1], &brand[4 * i + 2], &brand[4 * i + 3]))
      return "";
  std::string name(reinterpret_cast<const char*>(brand), strnlen(reinterpret_cast<const char*>(brand), sizeof brand));
  const size_t end = name.find_last_not_of(' ');
  return name.substr(0, end == std::string::npos ? 0 : end + 1);
#else
  return "";
#endif
}

}  // namespace pe
