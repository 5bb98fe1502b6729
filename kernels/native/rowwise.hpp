// Row kernels over many rows, shared among threads where there is enough work. A row is computed by one thread in one
// order: its bits depend neither on the other rows nor on the number of threads. Sizes are the caller's to check.
#pragma once

#include <cstdint>

namespace nibble {

struct NormRows {
  const float* x;
  const float* delta;  // or nullptr: nothing to add
  const float* weight;  // [width]
  float* sum;          // x + delta, when there is a delta
  float* normed;
  int64_t num_rows, width;
};
void rms_norm(const NormRows& rows, float eps);

struct HeadRows {  // the heads of every token turn by the token's angles
  const float* x;  // [num_tokens, num_heads, head_dim]
  float* out;      // may be x
  int64_t num_heads;
};
// cos, sin: [num_tokens, head_dim / 2].
void rotate(const HeadRows& q, const HeadRows& k, const float* cos, const float* sin, int64_t num_tokens,
            int64_t head_dim);

// out = x op y. `repeated`: y is one row, which every row of x meets.
enum class Combine : int { add, subtract, multiply };
void combine_rows(Combine op, const float* x, const float* y, int64_t num_rows, int64_t width, bool repeated, float* out);

// NaN stays what it is.
void clamp(const float* x, float low, float high, int64_t count, float* out);

// out[t, h, c] = x[t, h, order[h, c]]. out may not be x.
void gather_heads(const float* x, const int64_t* order, int64_t num_tokens, int64_t num_heads, int64_t head_dim,
                  float* out);

void swiglu(const float* gate, const float* up, int64_t count, float* out);

}  // namespace nibble
