// Products of packed weights with activations that are not rounded.
//
//   y[t, n] = f[n] sum_j s[n, j] ( sum_{k in j} v[n, k] x[t, k] ),   v = u - z[n, j], or the table's own float entry
//
// Both sums run in order, the inner one by fused multiply-adds from zero, for every output element alike, as in
// dense.hpp. Four row blocks make a panel of 64 rows. A few tokens take their weights from registers; for more they are
// unpacked, a block at a time, into a float panel.
#pragma once

#include <cstdint>

#include "packed.hpp"

namespace nibble::NIBBLE_ISA {

void packed_panel(const Packed& weights, int64_t panel, const float* x, int64_t num_tokens, float* out,
                  int64_t out_stride, float* scratch);

}  // namespace nibble::NIBBLE_ISA
