// Integer products of packed weights with activations that a format rounds to integers, one scale for each token.
//
//   y[t, n] = x[t] f[n] sum_j s[n, j] I[t, n, j],   I[t, n, j] = sum_{k in j} (u[n, k] - z[n, j]) (a[t, k] - z[t])
//
// Every I is exact:  sum u a - z[n, j] sum (a - z[t]) - z[t] sum u.  Its j, a *run*, is a block where weights have
// groups, and otherwise a span of up to 32,768 channels of the row: 32,768 x 255 x 255 < 2^31, and sums of u a stay
// within 32,768 x 255 x 128 on the way. Runs are added in order in float32, so that a result has the same bits for any
// batch, any number of threads and any instruction set.
#pragma once

#include <cstdint>

#include "linear.hpp"

namespace nibble {

inline constexpr int64_t kSpanChannels = 32768;
static_assert(kSpanChannels % kSlabChannels == 0);

// code = round(x / scale + zero), to the nearest, ties to even, within the signed integers of `bits`.
struct TokenRounding {
  int bits;        // 2..8
  bool symmetric;  // the zero point is 0; otherwise it follows the token's smallest activation
  bool fixed;      // scale and zero are those below; otherwise they follow each token
  float scale;
  int32_t zero;    // -128..127
};

// Activations of one call. Those of a tile lie as in Activations.
struct TokenCodes {
  int64_t num_tokens;
  int64_t stride;        // bytes of one token
  int64_t run_channels;  // of every run but the last
  int num_runs;
  int32_t sum_factor;    // what sums are multiplied by: -zero of weights that have one zero point, else 1
  int8_t* values;        // tiles of [stride / 4, width, 4]
  float* scales;         // [num_tokens], NaN where a token holds what has no code
  int32_t* zeros;        // [num_tokens]
  int32_t* sums;         // tiles of [num_runs, width], of values less their zero
};

struct Int8Ops {
  // Rounds a tile. x: [num_tokens, num_channels].
  void (*round_tile)(const float* x, int64_t num_channels, const TokenRounding& rounding, const TokenCodes& to,
                     Tile tile);
  // Row blocks first to last - 1 for all tokens. code_sums: sums of codes, [row block, run, 16], or nullptr where no
  // token has a zero point. out: [num_tokens, num_rows].
  void (*row_blocks)(const Packed& weights, int64_t first, int64_t last, const TokenCodes& x, const int32_t* code_sums,
                     float* out);
};

namespace avx512 {
extern const Int8Ops int8_ops;
}
namespace avx2 {
extern const Int8Ops int8_ops;
}
namespace scalar {
extern const Int8Ops int8_ops;
}

}  // namespace nibble
