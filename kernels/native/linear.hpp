// Integer dot products of packed weights with activations rounded to 8 bits.
//
//   y[t, n] = sum_j s[n, j] x[t, j] ( sum_{k in j} u[n, k] a[t, k]  -  z[n, j] sum_{k in j} a[t, k] )
//
// The inner sums are integers and exact. The outer sum runs over the blocks j in order, one fused multiply-add each, for
// every output element alike: the result does not depend on how many tokens share the call, on the number of threads or
// on the instruction set.
#pragma once

#include <cstdint>

#include "packed.hpp"

namespace nibble {

// Activations of one call: for every token, blocks of signed bytes, each with its scale and the sum of its bytes.
struct Activations {
  int64_t num_tokens;
  int num_blocks;
  int block_channels;   // of every block but the last
  int64_t stride;       // bytes from one token's values to the next: num_blocks * block_channels, padded
  int8_t* values;       // [num_tokens, stride], zeros past the last channel
  float* scales;        // [num_tokens, num_blocks]
  int32_t* sums;        // [num_tokens, num_blocks]
};

struct LinearOps {
  // Rounds one token: a = round(x * 127 / max|x|), scale = max|x| / 127; NaN when the block holds no finite maximum.
  void (*quantize)(const float* x, int64_t num_channels, Activations& to, int64_t token);
  // One row block for all tokens. out: element (t, n) at out[t * out_stride + n], n counted from the block's first row.
  void (*row_block)(const Packed& weights, int64_t row_block, const Activations& x, float* out, int64_t out_stride,
                    uint8_t* scratch);
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
