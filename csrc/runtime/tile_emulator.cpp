#include "runtime/tile_emulator.h"

#include <immintrin.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

namespace pe {
namespace {

constexpr int kNumTiles = 8, kMaxRows = 16, kMaxRowBytes = 64, kConfigBytes = 64;
constexpr unsigned kConfigRowBytes = 16, kConfigRows = 48;  // offsets in a configuration

struct Tile {
  int rows, row_bytes;  // both 0: not configured
  alignas(64) uint8_t bytes[kMaxRows][kMaxRowBytes];
};

struct Unit {
  bool configured;
  uint8_t config[kConfigBytes];
  Tile tiles[kNumTiles];
};

thread_local Unit t_unit;

// --- decoding -------------------------------------------------------------------------------------------------------

// The prefix that VEX.pp stands for.
enum Prefix { kNone, k66, kF3, kF2 };

struct Instruction {
  Prefix prefix;
  uint8_t opcode;
  int reg, rm, vvvv;
  bool memory;  // rm is a memory operand
  uintptr_t address, index;
  int length;
};

struct Error {
  const char* name;
  [[noreturn]] void fail(const char* what, int tile = -1) const {
    if (tile < 0)
      fprintf(stderr, "tile emulator: %s: %s\n", name, what);
    else
      fprintf(stderr, "tile emulator: %s: tile %d: %s\n", name, tile, what);
    abort();
  }
};

uintptr_t general_register(const ucontext_t& context, int number) {
  constexpr int kOrder[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                              REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return static_cast<uintptr_t>(context.uc_mcontext.gregs[kOrder[number]]);
}

// False where the bytes are no instruction VEX.128.0F38.W0 with an opcode of the tile unit.
bool decode(const uint8_t* code, const ucontext_t& context, Instruction& out) {
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 0x02 || (code[2] & 0x84) != 0) return false;
  const bool r = !(code[1] & 0x80), x = !(code[1] & 0x40), b = !(code[1] & 0x20);
  out = {};
  out.prefix = static_cast<Prefix>(code[2] & 3);
  out.vvvv = ~(code[2] >> 3) & 15;
  out.opcode = code[3];
  if (out.opcode != 0x49 && out.opcode != 0x4b && out.opcode != 0x5c && out.opcode != 0x5e) return false;
  const int mod = code[4] >> 6, low = code[4] & 7;
  out.reg = (code[4] >> 3 & 7) + 8 * r;
  out.memory = mod != 3;
  out.length = 5;
  if (!out.memory) {
    out.rm = low + 8 * b;
    return true;
  }
  out.rm = low;
  int displacement_bytes = mod == 1 ? 1 : mod == 2 ? 4 : 0;
  bool relative = false;
  if (low == 4) {
    const uint8_t sib = code[out.length++];
    const int index = (sib >> 3 & 7) + 8 * x, base = (sib & 7) + 8 * b;
    if (index != 4) out.index = general_register(context, index) << (sib >> 6);
    if ((sib & 7) == 5 && mod == 0)
      displacement_bytes = 4;
    else
      out.address = general_register(context, base);
  } else if (low == 5 && mod == 0) {
    displacement_bytes = 4;
    relative = true;
  } else {
    out.address = general_register(context, low + 8 * b);
  }
  int32_t displacement = 0;
  if (displacement_bytes == 1) displacement = static_cast<int8_t>(code[out.length]);
  if (displacement_bytes == 4) memcpy(&displacement, code + out.length, 4);
  out.length += displacement_bytes;
  out.address += static_cast<uintptr_t>(static_cast<intptr_t>(displacement));
  if (relative) out.address += reinterpret_cast<uintptr_t>(code) + static_cast<uintptr_t>(out.length);
  return true;
}

// --- tiles ----------------------------------------------------------------------------------------------------------

void release(Unit& unit) { memset(&unit, 0, sizeof unit); }

void configure(Unit& unit, const uint8_t* config) {
  const Error error{"ldtilecfg"};
  if (unit.configured) error.fail("the configuration before was not released");
  release(unit);
  if (config[0] == 0) return;
  if (config[0] != 1) error.fail("the palette is neither 0 nor 1");
  if (config[1] != 0) error.fail("start_row is not 0");
  for (unsigned i = 2; i < 16; ++i)
    if (config[i]) error.fail("a reserved byte is not 0");
  for (int t = 0; t < 16; ++t) {
    uint16_t row_bytes;
    memcpy(&row_bytes, config + kConfigRowBytes + 2 * t, 2);
    const int rows = config[kConfigRows + static_cast<unsigned>(t)];
    if (t >= kNumTiles && (rows || row_bytes)) error.fail("not a tile of palette 1", t);
    if (rows > kMaxRows) error.fail("more than 16 rows", t);
    if (row_bytes > kMaxRowBytes) error.fail("more than 64 bytes a row", t);
    if ((rows == 0) != (row_bytes == 0)) error.fail("rows without bytes, or bytes without rows", t);
    if (t < kNumTiles) {
      unit.tiles[t].rows = rows;
      unit.tiles[t].row_bytes = row_bytes;
    }
  }
  memcpy(unit.config, config, kConfigBytes);
  unit.configured = true;
}

Tile& configured_tile(Unit& unit, const Error& error, int t) {
  if (!unit.configured) error.fail("no tiles are configured");
  if (t >= kNumTiles || unit.tiles[t].rows == 0) error.fail("not configured", t);
  return unit.tiles[t];
}

void load(Tile& tile, const Instruction& i) {
  memset(tile.bytes, 0, sizeof tile.bytes);
  for (int r = 0; r < tile.rows; ++r)
    memcpy(tile.bytes[r], reinterpret_cast<const void*>(i.address + static_cast<uintptr_t>(r) * i.index),
           static_cast<size_t>(tile.row_bytes));
}

void store(const Tile& tile, const Instruction& i) {
  for (int r = 0; r < tile.rows; ++r)
    memcpy(reinterpret_cast<void*>(i.address + static_cast<uintptr_t>(r) * i.index), tile.bytes[r],
           static_cast<size_t>(tile.row_bytes));
}

// --- products -------------------------------------------------------------------------------------------------------

void dot_bytes(Tile& c, const Tile& a, const Tile& b, bool a_signed, bool b_signed) {
  const auto value = [](uint8_t byte, bool is_signed) { return is_signed ? static_cast<int8_t>(byte) : int{byte}; };
  for (int m = 0; m < c.rows; ++m)
    for (int n = 0; n < c.row_bytes / 4; ++n) {
      uint32_t sum;
      memcpy(&sum, c.bytes[m] + 4 * n, 4);
      for (int k = 0; k < a.row_bytes / 4; ++k)
        for (int i = 0; i < 4; ++i)
          sum += static_cast<uint32_t>(value(a.bytes[m][4 * k + i], a_signed) * value(b.bytes[k][4 * n + i], b_signed));
      memcpy(c.bytes[m] + 4 * n, &sum, 4);
    }
}

// One row: lanes past the shape hold zeros, and stay zero. Under an MXCSR with DAZ and FTZ, nearest even, no traps.
[[gnu::noinline]] void dot_bf16_row(uint8_t* c, const uint8_t* a, const Tile& b, int groups) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  __m512 first = _mm512_setzero_ps(), second = _mm512_setzero_ps();
  for (int k = 0; k < groups; ++k) {
    uint32_t pair;
    memcpy(&pair, a + 4 * k, 4);
    const __m512i x = _mm512_set1_epi32(static_cast<int>(pair)), w = _mm512_load_si512(b.bytes[k]);
    first = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)),
                            _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), first);
    second = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(x, high)),
                             _mm512_castsi512_ps(_mm512_and_si512(w, high)), second);
  }
  _mm512_store_ps(c, _mm512_add_ps(_mm512_load_ps(c), _mm512_add_ps(first, second)));
}

void dot_bf16(Tile& c, const Tile& a, const Tile& b) {
  constexpr unsigned kDazFtzMasked = 0x9fc0;
  const unsigned mxcsr = _mm_getcsr();
  _mm_setcsr(kDazFtzMasked);
  for (int m = 0; m < c.rows; ++m) dot_bf16_row(c.bytes[m], a.bytes[m], b, a.row_bytes / 4);
  _mm_setcsr(mxcsr);
}

void dot(Unit& unit, const Instruction& i) {
  constexpr const char* kBytes[] = {"tdpbuud", "tdpbusd", "tdpbsud", "tdpbssd"};
  const Error error{i.opcode == 0x5c ? "tdpbf16ps" : kBytes[i.prefix]};
  Tile& c = configured_tile(unit, error, i.reg);
  const Tile &a = configured_tile(unit, error, i.rm), &b = configured_tile(unit, error, i.vvvv);
  if (i.reg == i.rm || i.reg == i.vvvv || i.rm == i.vvvv) error.fail("an operand is named twice", i.reg);
  if (a.row_bytes % 4 || b.row_bytes % 4 || c.row_bytes % 4) error.fail("a row is no whole number of groups");
  if (c.rows != a.rows) error.fail("rows differ from those of the left operand", i.reg);
  if (c.row_bytes != b.row_bytes) error.fail("columns differ from those of the right operand", i.reg);
  if (a.row_bytes / 4 != b.rows) error.fail("groups of a row differ from the rows of the right operand", i.rm);
  if (i.opcode == 0x5c)
    dot_bf16(c, a, b);
  else
    dot_bytes(c, a, b, i.prefix == kF3 || i.prefix == kF2, i.prefix == k66 || i.prefix == kF2);
}

// False where the manual defines no such instruction.
bool execute(Unit& unit, const Instruction& i) {
  if (i.opcode == 0x5e || i.opcode == 0x5c) {
    if (i.memory || (i.opcode == 0x5c && i.prefix != kF3)) return false;
    dot(unit, i);
    return true;
  }
  if (i.vvvv != 0) return false;
  if (i.opcode == 0x4b) {
    if (!i.memory || i.rm != 4 || i.prefix == kNone) return false;
    const Error error{i.prefix == kF3 ? "tilestored" : "tileloadd"};
    Tile& tile = configured_tile(unit, error, i.reg);
    i.prefix == kF3 ? store(tile, i) : load(tile, i);
    return true;
  }
  if (i.memory && i.reg == 0 && i.prefix == kNone) {
    configure(unit, reinterpret_cast<const uint8_t*>(i.address));
  } else if (i.memory && i.reg == 0 && i.prefix == k66) {
    memcpy(reinterpret_cast<void*>(i.address), unit.config, kConfigBytes);
  } else if (!i.memory && i.prefix == kF2 && i.rm == 0) {
    memset(configured_tile(unit, Error{"tilezero"}, i.reg).bytes, 0, sizeof(Tile::bytes));
  } else if (!i.memory && i.prefix == kNone && i.reg == 0 && i.rm == 0) {
    release(unit);
  } else {
    return false;
  }
  return true;
}

// --- the handler ----------------------------------------------------------------------------------------------------

struct sigaction g_previous;

void handle(int signal, siginfo_t*, void* opaque) {
  ucontext_t& context = *static_cast<ucontext_t*>(opaque);
  greg_t& next = context.uc_mcontext.gregs[REG_RIP];
  bool any = false;
  // Tile instructions come in runs; one signal serves a run.
  for (Instruction i; decode(reinterpret_cast<const uint8_t*>(next), context, i) && execute(t_unit, i); any = true)
    next += i.length;
  if (!any) sigaction(signal, &g_previous, nullptr);  // the instruction runs again, and raises it again
}

}  // namespace

void install_tile_emulator() {
  struct sigaction action = {}, current = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, nullptr, &current);
  if (current.sa_flags & SA_SIGINFO && current.sa_sigaction == handle) return;
  sigaction(SIGILL, &action, &g_previous);
}

}  // namespace pe
