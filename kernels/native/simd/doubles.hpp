// Vectors of double, as wide as the instruction set has them, through the compiler's own vector types: + - * / and
// comparisons act lane by lane, each rounded by itself, so a lane's bits are the same in every instruction set. How
// many lanes there are is not: sums over lanes must be arranged by the caller.
#pragma once

#include <cstdint>

namespace nibble::NIBBLE_ISA {

#if defined(NIBBLE_ISA_avx512)
inline constexpr int kDoubles = 8;
#elif defined(NIBBLE_ISA_avx2)
inline constexpr int kDoubles = 4;
#else
inline constexpr int kDoubles = 2;
#endif

using Doubles = double __attribute__((vector_size(8 * kDoubles)));
using Longs = int64_t __attribute__((vector_size(8 * kDoubles)));
using HalfFloats = float __attribute__((vector_size(4 * kDoubles)));

inline Doubles load_doubles(const float* p) {
  HalfFloats x;
  __builtin_memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, Doubles);
}
inline void store_doubles(double* p, Doubles x) { __builtin_memcpy(p, &x, sizeof x); }

// e^x for x of at most 0; 0 below -700; NaN at NaN. x = n ln 2 + r, |r| <= ln 2 / 2, and Taylor's series of e^r to
// r^12 / 12!, whose remainder is 2e-16. Adding 1.5 * 2^52 rounds to an integer, which the sum's low bits then hold.
inline Doubles exp(Doubles x) {
  constexpr double shift = 0x1.8p52;
  constexpr double taylor[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
                               1.0 / 720,       1.0 / 120,      1.0 / 24,      1.0 / 6,      0.5,         1.0, 1.0};
  auto vanishes = x < -700.0;
  Doubles clamped = vanishes ? Doubles{} : x;
  Doubles shifted = clamped * 0x1.71547652b82fep0 + shift;
  Doubles n = shifted - shift;
  Doubles r = clamped - n * 0x1.62e42fee00000p-1 - n * 0x1.a39ef35793c76p-33;
  Doubles p = Doubles{} + taylor[0];
  for (int k = 1; k < 13; k++) p = p * r + taylor[k];
  Longs exponent = ((Longs)shifted + 1023) << 52;
  return vanishes ? Doubles{} : p * (Doubles)exponent;
}

}  // namespace nibble::NIBBLE_ISA
