// VecF in plain C++: 8 lanes, the specification of the other two and the only level on other architectures.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "pe/dtype.h"

namespace pe::PE_ISA {

struct VecF {
  static constexpr int64_t size = 8;
  float v[8];
};

static inline float widen_bf16(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}
static inline bf16 narrow_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  bits = x != x ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u);
  return {static_cast<uint16_t>(bits >> 16)};
}

template <class LaneFn>
static inline VecF make(LaneFn lane) {
  VecF r;
  for (int i = 0; i < 8; ++i) r.v[i] = lane(i);
  return r;
}

static inline VecF load(const float* p) {
  return make([&](int i) { return p[i]; });
}
static inline VecF load(const float* p, int64_t n) {
  return make([&](int i) { return i < n ? p[i] : 0.0f; });
}
static inline VecF load(const bf16* p) {
  return make([&](int i) { return widen_bf16(p[i]); });
}
static inline VecF load(const bf16* p, int64_t n) {
  return make([&](int i) { return i < n ? widen_bf16(p[i]) : 0.0f; });
}
static inline void store(float* p, VecF a, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = a.v[i];
}
static inline void store(float* p, VecF a) { store(p, a, 8); }
static inline void store(bf16* p, VecF a, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = narrow_bf16(a.v[i]);
}
static inline void store(bf16* p, VecF a) { store(p, a, 8); }

static inline VecF set1(float s) {
  return make([&](int) { return s; });
}
static inline VecF add(VecF a, VecF b) {
  return make([&](int i) { return a.v[i] + b.v[i]; });
}
static inline VecF sub(VecF a, VecF b) {
  return make([&](int i) { return a.v[i] - b.v[i]; });
}
static inline VecF mul(VecF a, VecF b) {
  return make([&](int i) { return a.v[i] * b.v[i]; });
}
static inline VecF div(VecF a, VecF b) {
  return make([&](int i) { return a.v[i] / b.v[i]; });
}
static inline VecF fma(VecF a, VecF b, VecF c) {
  return make([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
static inline VecF neg(VecF a) {
  return make([&](int i) { return -a.v[i]; });
}
static inline VecF max(VecF a, VecF b) {
  return make([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
static inline VecF min(VecF a, VecF b) {
  return make([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
static inline VecF sqrt(VecF a) {
  return make([&](int i) { return sqrtf(a.v[i]); });
}
// a > b ? yes : no, lane by lane; a comparison with NaN is false.
static inline VecF select_gt(VecF a, VecF b, VecF yes, VecF no) {
  return make([&](int i) { return a.v[i] > b.v[i] ? yes.v[i] : no.v[i]; });
}
static inline VecF round(VecF a) {
  return make([&](int i) { return rintf(a.v[i]); });
}
// a * 2^n for integral n.
static inline VecF scale_by_power_of_2(VecF a, VecF n) {
  return make([&](int i) { return ldexpf(a.v[i], static_cast<int>(n.v[i])); });
}
static inline float sum(VecF a) {
  for (int width = 4; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) a.v[i] += a.v[i + width];
  return a.v[0];
}
static inline float max_lane(VecF a) {
  for (int i = 1; i < 8; ++i) a.v[0] = a.v[i] > a.v[0] ? a.v[i] : a.v[0];
  return a.v[0];
}

}  // namespace pe::PE_ISA
