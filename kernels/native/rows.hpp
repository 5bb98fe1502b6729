// Operations on rows: norms, rotary embedding, gates, and the two passes over logits that sampling needs.
// One call is one row (one token); rowwise.hpp and sampling.hpp share rows among threads.
#pragma once

#include <cstdint>

namespace nibble {

struct RowOps {
  // normed = weight x / sqrt(mean(x^2) + eps). With a delta, x + delta takes the place of x and is kept in `sum`.
  // Squares are summed in 64 lanes, lanes by halves: the same bits everywhere.
  void (*rms_norm)(const float* x, const float* delta, const float* weight, int64_t width, float eps, float* sum,
                   float* normed);
  // Turns channels i and i + D/2 of every head by angle i. out may be x.
  void (*rotate)(const float* x, const float* cos, const float* sin, int64_t num_heads, int64_t head_dim, float* out);
  // out = gate / (1 + e^-gate) up
  void (*swiglu)(const float* gate, const float* up, int64_t count, float* out);
  // The largest of count > 0 numbers, NaN when one of them is.
  float (*highest)(const float* x, int64_t count);
  // weights[i] = e^((logits[i] - highest) / temperature) for logits of at most `highest`; returns their sum. An
  // exponent below -700 gives 0. Without `weights` only the sum is taken.
  double (*exponentials)(const float* logits, int64_t count, float highest, double temperature, double* weights);
};

namespace avx512 {
extern const RowOps rows_ops;
}
namespace avx2 {
extern const RowOps rows_ops;
}
namespace scalar {
extern const RowOps rows_ops;
}

}  // namespace nibble
