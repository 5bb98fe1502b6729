#include "probe.hpp"

#include "simd/simd.hpp"

namespace nibble::NIBBLE_ISA {
namespace {

constexpr int kPrefetchBytes = 2048;
// Enough to hide a multiply-add's latency, few enough for the registers. They start from different numbers, or the
// compiler would see that they are one.
constexpr int kChains = kFastDot ? 12 : 6;

uint8_t read(const uint8_t* p, int64_t num_bytes) {
  Bytes sums[4] = {bset1(0), bset1(0), bset1(0), bset1(0)};
  for (int64_t i = 0; i < num_bytes; i += 256)
    for (int j = 0; j < 4; j++) {
      prefetch(p + i + 64 * j + kPrefetchBytes);
      sums[j] = badd(sums[j], bload(p + i + 64 * j));
    }
  uint8_t bytes[64];
  bstore(bytes, badd(badd(sums[0], sums[1]), badd(sums[2], sums[3])));
  return bytes[0];
}

int64_t dots(int64_t count) {
  uint8_t codes[64] = {1, 2, 3};
  int8_t activations[4 * kChains] = {4, 5, 6, 7};
  Ints sums[kChains];
#pragma GCC unroll 16
  for (int j = 0; j < kChains; j++) sums[j] = iset1(j);
  for (int64_t i = 0; i < count; i++) {
    asm volatile("" : : "r"(codes), "r"(activations) : "memory");  // they may have changed: no turn can be left out
    Bytes u = bload(codes);
#pragma GCC unroll 16  // or the sums are kept in memory
    for (int j = 0; j < kChains; j++) sums[j] = dot(sums[j], u, activations + 4 * j);
  }
  int32_t lanes[16];
#pragma GCC unroll 16
  for (int j = 0; j < kChains; j++) {
    istore(lanes, sums[j]);
    asm volatile("" : : "r"(lanes) : "memory");
  }
  return count * kChains * 128;
}

int64_t fmas(int64_t count) {
  float factors[16] = {1e-9f};
  Floats sums[kChains];
#pragma GCC unroll 16
  for (int j = 0; j < kChains; j++) sums[j] = set1((float)j);
  for (int64_t i = 0; i < count; i++) {
    asm volatile("" : : "r"(factors) : "memory");
    Floats x = load(factors);
#pragma GCC unroll 16
    for (int j = 0; j < kChains; j++) sums[j] = fma(x, x, sums[j]);
  }
  float lanes[16];
#pragma GCC unroll 16
  for (int j = 0; j < kChains; j++) {
    store(lanes, sums[j]);
    asm volatile("" : : "r"(lanes) : "memory");
  }
  return count * kChains * 32;
}

}  // namespace

const ProbeOps probe_ops = {read, dots, fmas};

}  // namespace nibble::NIBBLE_ISA
