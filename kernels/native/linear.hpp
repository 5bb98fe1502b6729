// Integer dot products of packed weights with activations rounded to 8 bits.
//
//   y[t, n] = f[n] sum_j s[n, j] x[t, j] ( sum_{k in j} u[n, k] a[t, k]  -  z[n, j] sum_{k in j} a[t, k] )
//   y[t, n] = f[n] sum_j x[t, j] ( s[n, j] sum_{k in j} u[n, k] a[t, k]  +  o[n, j] sum_{k in j} a[t, k] )
//
// The inner sums are integers and exact. The outer sum runs over the blocks j in order, one fused multiply-add each,
// for every output element alike: the result does not depend on how many tokens share the call, on the number of
// threads or on the instruction set.
#pragma once

#include <cstdint>

#include "packed.hpp"

namespace nibble {

inline constexpr int kTileTokens = 8;  // tokens that one pass over the codes serves

// Tokens go in tiles of 8, the rest in tiles of 4, 2 and 1.
struct Tile {
  int64_t first;
  int width;
};
static inline Tile tile_of(int64_t token, int64_t num_tokens) {
  int64_t first = token / kTileTokens * kTileTokens, left = num_tokens - first;
  if (left >= kTileTokens) return {first, kTileTokens};
  for (int width = kTileTokens / 2; width > 1; width /= 2) {
    if (!(left & width)) continue;
    if (token < first + width) return {first, width};
    first += width;
  }
  return {first, 1};
}

// Activations of one call: for every token, blocks of signed bytes, each with its scale and the sum of its bytes. The
// tokens of a tile lie together, as the kernels read them: 4 channels of each token, then the next 4 channels.
struct Activations {
  int64_t num_tokens;
  int num_blocks;
  int block_channels;   // of every block but the last
  int64_t stride;       // bytes of one token: num_blocks * block_channels, padded
  int8_t* values;       // tiles of [stride / 4, width, 4], zeros past the last channel
  float* scales;        // tiles of [num_blocks, width]
  int32_t* sums;        // tiles of [num_blocks, width]
  const int32_t* offsets;  // -zero * sums of the matrix that reads them; 0 where its zero points are not one constant
};

struct LinearOps {
  // Rounds blocks first to last - 1 of a tile: a = round(x * 127 / max|x|), scale = max|x| / 127; NaN when the block
  // holds no finite maximum. x: [num_tokens, num_channels].
  void (*quantize)(const float* x, int64_t num_channels, const Activations& to, Tile tile, int first, int last);
  // Row blocks first to last - 1 for all tokens. out: [num_tokens, num_rows].
  void (*row_blocks)(const Packed& weights, int64_t first, int64_t last, const Activations& x, float* out);
};

namespace avx512 {
extern const LinearOps linear_ops;
}
namespace avx2 {
extern const LinearOps linear_ops;
}
namespace scalar {
extern const LinearOps linear_ops;
}

}  // namespace nibble
