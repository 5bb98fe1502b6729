// Functions of 16 lanes, the same bits in every instruction set.
#pragma once

#include "simd.hpp"

namespace nibble::NIBBLE_ISA {

// e^x.  x = n ln 2 + r, |r| <= ln 2 / 2;  e^x = 2^n (1 + r + r^2 P(r)), P of degree 5 with the coefficients of Cephes'
// expf. The largest error is 1.01 ulp (44 million floats over the whole range, subnormal results included); 0 below
// -103.98 and at -infinity, infinity above 88.73, NaN at NaN.
inline Floats exp(Floats x) {
  x = min(set1(100.0f), max(set1(-110.0f), x));  // in this order of operands NaN passes
  Floats n = round(mul(x, set1(1.44269504f)));
  Floats r = fnma(n, set1(0x1.62e4p-1f), x);  // 11 bits of ln 2: exact
  r = fnma(n, set1(0x1.7f7d1cp-20f), r);
  Floats p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  return scale_by_power_of_2(add(fma(mul(r, r), p, r), set1(1.0f)), n);
}

}  // namespace nibble::NIBBLE_ISA
