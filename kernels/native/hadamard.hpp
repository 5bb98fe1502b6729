// The Hadamard transform of a head (kernels/attention/quantized/transforms.py), with its bits.
#pragma once

#include "simd/simd.hpp"

namespace nibble::NIBBLE_ISA {
namespace {

// Sums of pairs of lanes `distance` apart in the lower, differences in the higher.
template <int distance>
inline Floats butterfly(Floats x) {
  static constexpr auto signs = [] {
    struct { float v[16]; } table{};
    for (int i = 0; i < 16; i++) table.v[i] = i & distance ? -1.0f : 1.0f;
    return table;
  }();
  return fma(x, load(signs.v), swap_lanes<distance>(x));  // the product is exact
}

// x: [head_dim], in place; blocks are the largest power of two that divides head_dim, at least 16.
inline void hadamard(float* x, int head_dim) {
  int block = head_dim & -head_dim;
  for (int i = 0; i < head_dim; i += 16) {
    Floats y = butterfly<2>(butterfly<1>(load(x + i)));
    store(x + i, butterfly<8>(butterfly<4>(y)));
  }
  for (int distance = 16; distance < block; distance *= 2)
    for (int i = 0; i < head_dim; i += 16) {
      if (i & distance) continue;
      Floats low = load(x + i), high = load(x + i + distance);
      store(x + i, add(low, high));
      store(x + i + distance, sub(low, high));
    }
  Floats scale = set1((float)(1 / __builtin_sqrt((double)block)));
  for (int i = 0; i < head_dim; i += 16) store(x + i, mul(load(x + i), scale));
}

}  // namespace
}  // namespace nibble::NIBBLE_ISA
