// Runs tile instructions and says what came of them; tests/native/test_tile_emulator.py knows what should.
//
//   tile_unit emulated|silicon products    reads records from stdin until it ends, writes c of each to stdout
//   tile_unit emulated|silicon <misuse>    does what the manual forbids
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>

#include "check.h"
#include "runtime/tile_emulator.h"

namespace {

constexpr long kRowBytes = 64;

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

struct alignas(64) Record {
  Config config;  // c is tile 0, a tile 1, b tile 2; the second set of numbers is 6, 3, 5
  uint8_t kind[64];
  uint8_t c[16][64], a[16][64], b[16][64];
};
static_assert(sizeof(Record) == 128 + 3 * 1024);

void configure(const Config& config) { __asm__ volatile("ldtilecfg %0" ::"m"(config)); }
void release() { __asm__ volatile("tilerelease" ::: "memory"); }

template <int tile>
void load(const void* p) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(kRowBytes), "i"(tile) : "memory");
}
template <int tile>
void store(void* p) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(kRowBytes), "i"(tile) : "memory");
}

#define DOT(name) __asm__ volatile(name " %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b))
template <int c, int a, int b>
void dot(int kind) {
  switch (kind) {
    case 0:
      DOT("tdpbuud");
      break;
    case 1:
      DOT("tdpbusd");
      break;
    case 2:
      DOT("tdpbsud");
      break;
    case 3:
      DOT("tdpbssd");
      break;
    default:
      DOT("tdpbf16ps");
  }
}

template <int c, int a, int b>
void product(Record& record) {
  load<c>(record.c);
  load<a>(record.a);
  load<b>(record.b);
  dot<c, a, b>(record.kind[0]);
  store<c>(record.c);
}

int products() {
  Record record;
  while (fread(&record, sizeof record, 1, stdin) == 1) {
    configure(record.config);
    record.kind[1] ? product<6, 3, 5>(record) : product<0, 1, 2>(record);
    release();
    fwrite(record.c, sizeof record.c, 1, stdout);
  }
  return 0;
}

Config shapes(int rows, int row_bytes) {
  Config config;
  for (int t = 0; t < 8; ++t) {
    config.rows[t] = static_cast<uint8_t>(rows);
    config.row_bytes[t] = static_cast<uint16_t>(row_bytes);
  }
  return config;
}

// Every way to write an address; a tile keeps its bytes beyond a zeroed and a reloaded neighbour.
int addresses() {
  static uint8_t memory[4096], out[1024];
  for (size_t i = 0; i < sizeof memory; ++i) memory[i] = static_cast<uint8_t>(i * 7 + i / 256);
  static Config config = shapes(3, 20);
  __asm__ volatile("ldtilecfg %0" ::"m"(config));
  const auto check = [&](const uint8_t* first, long stride) {
    memset(out, 0xee, sizeof out);
    store<4>(out);
    for (int r = 0; r < 16; ++r)
      for (int i = 0; i < 64; ++i) CHECK(out[r * 64 + i] == (r < 3 && i < 20 ? first[r * stride + i] : 0xee));
  };
  long stride = 100;
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm4" ::"r"(memory), "r"(stride) : "memory");
  check(memory, 100);
  __asm__ volatile("tileloadd 33(%0,%1,4), %%tmm4" ::"r"(memory), "r"(stride) : "memory");
  check(memory + 33, 400);
  __asm__ volatile("tileloadd 1000(%0,%1,2), %%tmm4" ::"r"(memory), "r"(stride) : "memory");
  check(memory + 1000, 200);
  __asm__ volatile("mov %0, %%r13\n mov %1, %%r12\n tileloadd -5(%%r13,%%r12,8), %%tmm4" ::"r"(memory + 9), "r"(stride)
                   : "memory", "r12", "r13");
  check(memory + 4, 800);
  __asm__ volatile("tileloadd (%0), %%tmm4" ::"r"(memory + 64) : "memory");  // no index: every row is the same
  check(memory + 64, 0);
  stride = -100;
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm4" ::"r"(memory + 700), "r"(stride) : "memory");
  check(memory + 700, -100);
  __asm__ volatile("tilezero %tmm5");
  load<3>(memory);
  check(memory + 700, -100);
  alignas(64) uint8_t kept[64];
  __asm__ volatile("sttilecfg %0" : "=m"(kept));
  CHECK(memcmp(kept, &config, 64) == 0);
  release();
  __asm__ volatile("sttilecfg %0" : "=m"(kept));
  for (const uint8_t byte : kept) CHECK(byte == 0);
  configure(shapes(16, 64));
  memset(out, 0xee, sizeof out);
  store<4>(out);  // configured anew: zeros
  for (const uint8_t byte : out) CHECK(byte == 0);
  release();
  return g_failures != 0;
}

int misuse(const char* what) {
  static uint8_t memory[1024];
  const auto is = [what](const char* name) { return strcmp(what, name) == 0; };
  Config config = shapes(16, 64);
  if (is("palette")) config.palette = 2;
  if (is("start_row")) config.start_row = 1;
  if (is("reserved")) config.reserved[3] = 1;
  if (is("ninth_tile")) config.rows[8] = 1, config.row_bytes[8] = 4;
  if (is("rows")) config.rows[2] = 17;
  if (is("row_bytes")) config.row_bytes[2] = 65;
  if (is("no_bytes")) config.row_bytes[7] = 0;
  if (is("one_missing")) config.rows[7] = 0, config.row_bytes[7] = 0;
  if (is("groups")) config.rows[2] = 8;
  if (is("left_rows")) config.rows[1] = 8;
  if (is("columns")) config.row_bytes[2] = 60;
  if (is("half_groups")) config.row_bytes[1] = 62;
  if (is("foreign")) __asm__ volatile("ud2");
  if (!is("unconfigured")) configure(config);
  if (is("released")) release();
  if (is("not_released")) configure(config);
  if (is("same_operands")) __asm__ volatile(".byte 0xc4, 0xe2, 0x73, 0x5e, 0xc1");  // tdpbssd tmm0, tmm1, tmm1
  if (is("one_missing")) load<7>(memory);
  load<1>(memory);
  dot<0, 1, 2>(3);
  release();
  return 0;
}

bool request_silicon() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

}  // namespace

int main(int argc, char** argv) {
  CHECK(argc == 3);
  if (strcmp(argv[1], "silicon") == 0)
    CHECK(request_silicon());
  else
    pe::install_tile_emulator();
  if (strcmp(argv[2], "products") == 0) return products();
  if (strcmp(argv[2], "addresses") == 0) return addresses();
  return misuse(argv[2]);
}
