#include "dense.hpp"

#include "simd/simd.hpp"

namespace nibble::NIBBLE_ISA {
namespace {

constexpr int kVectors = kPanelRows / 16;  // of one channel
constexpr int kTile = 6;                   // tokens whose sums stay in registers: 4 x 6 of 32
constexpr int kPrefetchBytes = 2048;       // ahead of the weights
constexpr int kWidenFrom = 2 * kTile + 1;  // tokens from which halves are widened once for all of them

struct F16 {
  using Element = uint16_t;
  static constexpr int lines = 2;  // of 64 bytes a channel, to ask for ahead of time
  static Floats load(const uint16_t* p) { return load_f16(p); }
};
struct Bf16 {
  using Element = uint16_t;
  static constexpr int lines = 2;
  static Floats load(const uint16_t* p) { return load_bf16(p); }
};
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

// kTokens tokens and kRows vectors of rows, over the channels of one block. Left to itself gcc 12 unrolls some of the
// short loops too late, and stores every sum of a pair of registers to memory each time round.
template <class W, int kRows, int kTokens>
inline void tile(const typename W::Element* w, int channels, const float* x, int64_t x_stride, bool first, float* out,
                 int64_t stride) {
  Floats sums[kTokens][kRows];
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; t++)
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) sums[t][r] = zero();
  for (int k = 0; k < channels; k++) {
    Floats weights[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) weights[r] = W::load(w + k * kPanelRows + 16 * r);
#pragma GCC unroll 8
    for (int line = 0; line < W::lines; line++) prefetch((const char*)(w + k * kPanelRows) + kPrefetchBytes + 64 * line);
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; t++) {
      Floats value = set1(x[t * x_stride + k]);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; r++) sums[t][r] = fma(weights[r], value, sums[t][r]);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; t++)
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
      float* to = out + t * stride + 16 * r;
      store(to, add(first ? zero() : load(to), sums[t][r]));
    }
}

// All tokens and rows of the panel, over the channels of one block.
template <class W, int kTokens>
void tiles(const typename W::Element* w, int channels, const float* x, int64_t x_stride, int64_t num_tokens, bool first,
           float* out, int64_t stride) {
  constexpr int rows = vectors_for(kTokens);
  int64_t token = 0;
  for (; token + kTokens <= num_tokens; token += kTokens)
    for (int r = 0; r < kVectors; r += rows)
      tile<W, rows, kTokens>(w + 16 * r, channels, x + token * x_stride, x_stride, first, out + token * stride + 16 * r,
                             stride);
  if constexpr (kTokens > 1)
    if (token < num_tokens)
      tiles<W, kTokens - 1>(w, channels, x + token * x_stride, x_stride, num_tokens - token, first,
                            out + token * stride, stride);
}

template <class W>
void all_blocks(const DenseMatrix& m, int64_t index, const float* x, int64_t num_tokens, float* out, int64_t stride,
                float* scratch) {
  const auto* w = (const typename W::Element*)m.panel(index);
  for (int64_t k = 0; k < m.num_channels; k += kPanelChannels, w += kPanelChannels * kPanelRows) {
    int64_t left = m.num_channels - k;
    int channels = (int)(left < kPanelChannels ? left : kPanelChannels);
    if (sizeof(typename W::Element) == 2 && num_tokens >= kWidenFrom) {
      for (int i = 0; i < channels * kPanelRows; i += 16) store(scratch + i, W::load(w + i));
      tiles<Widened, kTile>(scratch, channels, x + k, m.num_channels, num_tokens, k == 0, out, stride);
    } else {
      tiles<W, kTile>(w, channels, x + k, m.num_channels, num_tokens, k == 0, out, stride);
    }
  }
}

void panel(const DenseMatrix& m, int64_t index, const float* x, int64_t num_tokens, float* out, int64_t stride,
           float* scratch) {
  switch (m.type) {
    case FloatType::f16: return all_blocks<F16>(m, index, x, num_tokens, out, stride, scratch);
    case FloatType::bf16: return all_blocks<Bf16>(m, index, x, num_tokens, out, stride, scratch);
    default: return all_blocks<F32>(m, index, x, num_tokens, out, stride, scratch);
  }
}

}  // namespace

const DenseOps dense_ops = {panel};

}  // namespace nibble::NIBBLE_ISA
