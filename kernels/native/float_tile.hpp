// Tiles of float products: panels of 64 rows, channel by channel, times a few tokens.
#pragma once

#include "dense.hpp"
#include "simd/simd.hpp"

namespace nibble::NIBBLE_ISA {
namespace {

constexpr int kVectors = kPanelRows / 16;  // of one channel
constexpr int kTile = 6;                   // tokens whose sums stay in registers: 4 x 6 of 32
constexpr int kPrefetchBytes = 2048;       // ahead of the weights
constexpr int kUnroll = kRegisters ? 20 : 1;  // lanes in a loop need no more, and would compile for minutes

struct F32 {
  using Element = float;
  static constexpr int lines = 4;
  static Floats load(const float* p) { return NIBBLE_ISA::load(p); }
};
struct Widened : F32 {  // in the cache already
  static constexpr int lines = 0;
};

// Vectors of rows that fit the registers beside the sums of `tokens` tokens.
constexpr int vectors_for(int tokens) {
  if (kRegisters >= 32 || tokens == 1) return kVectors;
  return tokens == 2 ? 2 : 1;
}

// What a block adds to the totals in `out`: its sum, times a scale of each row where there are scales.
struct Totals {
  float* out;  // element (t, n) at out[t * stride + n]
  int64_t stride;
  const float* scales;  // [64], or nullptr
  bool first;           // nothing was added before
};

template <int kRows, int kTokens>
inline void add_to(const Totals& to, const Floats (&sums)[kTokens][kRows]) {
#pragma GCC unroll kUnroll
  for (int t = 0; t < kTokens; t++)
#pragma GCC unroll kUnroll
    for (int r = 0; r < kRows; r++) {
      float* out = to.out + t * to.stride + 16 * r;
      Floats before = to.first ? zero() : load(out);
      store(out, to.scales ? fma(sums[t][r], load(to.scales + 16 * r), before) : add(before, sums[t][r]));
    }
}

inline Totals from(const Totals& to, int64_t token, int row) {
  return {to.out + token * to.stride + row, to.stride, to.scales ? to.scales + row : nullptr, to.first};
}

// kTokens tokens and kRows vectors of rows, over the channels of one block. Left to itself gcc 12 unrolls some of the
// short loops too late, and stores every sum of a pair of registers to memory each time round.
template <class W, int kRows, int kTokens>
inline void tile(const typename W::Element* w, int channels, const float* x, int64_t x_stride, const Totals& to) {
  Floats sums[kTokens][kRows];
#pragma GCC unroll kUnroll
  for (int t = 0; t < kTokens; t++)
#pragma GCC unroll kUnroll
    for (int r = 0; r < kRows; r++) sums[t][r] = zero();
  for (int k = 0; k < channels; k++) {
    Floats weights[kRows];
#pragma GCC unroll kUnroll
    for (int r = 0; r < kRows; r++) weights[r] = W::load(w + k * kPanelRows + 16 * r);
#pragma GCC unroll kUnroll
    for (int line = 0; line < W::lines; line++)
      prefetch((const char*)(w + k * kPanelRows) + kPrefetchBytes + 64 * line);
#pragma GCC unroll kUnroll
    for (int t = 0; t < kTokens; t++) {
      Floats value = set1(x[t * x_stride + k]);
#pragma GCC unroll kUnroll
      for (int r = 0; r < kRows; r++) sums[t][r] = fma(weights[r], value, sums[t][r]);
    }
  }
  add_to(to, sums);
}

// All tokens and rows of the panel, over the channels of one block.
template <class W, int kTokens = kTile>
void tiles(const typename W::Element* w, int channels, const float* x, int64_t x_stride, int64_t num_tokens,
           const Totals& to) {
  constexpr int rows = vectors_for(kTokens);
  int64_t token = 0;
  for (; token + kTokens <= num_tokens; token += kTokens)
    for (int r = 0; r < kVectors; r += rows)
      tile<W, rows, kTokens>(w + 16 * r, channels, x + token * x_stride, x_stride, from(to, token, 16 * r));
  if constexpr (kTokens > 1)
    if (token < num_tokens)
      tiles<W, kTokens - 1>(w, channels, x + token * x_stride, x_stride, num_tokens - token, from(to, token, 0));
}

}  // namespace
}  // namespace nibble::NIBBLE_ISA
