// What the kernels of integer products share: units of codes times the activations of a tile of tokens, and how these
// activations lie.
#pragma once

#include "linear.hpp"
#include "simd/simd.hpp"

namespace nibble::NIBBLE_ISA {
namespace {

// Ahead of the codes. For one token 8-bit codes come from memory at 32 GB/s a core with 128 to 384 bytes, at 29 with
// 512 or more; codes of 4 and 2 bits come 4 % slower with 512 than with 256. Eight tokens take longer over a line, and
// still 15 % less with 16 units of codes (2048 bytes of 4 bits, 4096 of 8) than with 512 bytes. Fetching 48 units ahead
// into the second cache as well saves them another 25 % of the time at 8 bits, 5 to 7 % at 6 and 2, 1 % at 4.
constexpr int kPrefetchBytes = 256;
constexpr int kPrefetchUnits = 16, kFarUnits = 48;

// Where a pass reads: the units of one block.
struct Source {
  const uint8_t* codes;
  int units;
};

template <class C, int T, class Unpack>
inline void add_units(Ints (&dots)[T], Source from, const int8_t* a, Unpack unpack) {
  const uint8_t* codes = from.codes;
  const uint8_t* extra = codes + (int64_t)from.units * C::main;
  constexpr bool whole_tile = T == kTileTokens;
  constexpr int unit_bytes = C::main + C::extra;
  const uint8_t* ahead = codes + (whole_tile ? kPrefetchUnits * C::main : kPrefetchBytes);
  const uint8_t* far = codes + kFarUnits * C::main;
  for (int unit = 0; unit < from.units; unit++) {
    for (int line = 0; line < unit_bytes; line += 64) prefetch(ahead + line);
    if constexpr (whole_tile)
      for (int line = 0; line < unit_bytes; line += 64) prefetch_l2(far + line);
    Bytes u[C::steps];
    unpack(codes, extra, u);
    NIBBLE_UNROLL
    for (int s = 0; s < C::steps; s++)
      NIBBLE_UNROLL
      for (int t = 0; t < T; t++) {
        Four x = four(a + 4 * (s * T + t));
        dots[t] = C::small ? dot_small(dots[t], u[s], x) : dot(dots[t], u[s], x);
      }
    codes += C::main;
    extra += C::extra;
    ahead += unit_bytes;
    far += unit_bytes;
    a += 4 * C::steps * T;
  }
}

inline void store_rows(float* out, Floats x, int64_t rows) {
  if (rows >= kRows) return store(out, x);
  float all[kRows];
  store(all, x);
  for (int64_t i = 0; i < rows; i++) out[i] = all[i];
}

// A last vector that is not full is read through a copy padded with zeros.
inline Floats load_some(const float* x, int64_t left) {
  if (left >= 16) return load(x);
  float padded[16] = {};
  for (int i = 0; i < left; i++) padded[i] = x[i];
  return load(padded);
}

// 16 channels into their place among `width` tokens.
inline void spread(int8_t* to, int width, Ints q) {
  if (width == 1) return store_i8(to, q);
  int8_t bytes[16];
  store_i8(bytes, q);
  for (int i = 0; i < 4; i++) __builtin_memcpy(to + 4 * i * width, bytes + 4 * i, 4);
}

}  // namespace
}  // namespace nibble::NIBBLE_ISA
