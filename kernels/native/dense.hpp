// Products with weights of plain floating point.
//
//   y[t, n] = sum_b ( sum_{k in b} w[n, k] x[t, k] ),   b blocks of 256 channels
//
// Both sums run in order, the inner one by fused multiply-adds from zero, for every output element alike: the result
// does not depend on how many tokens share the call, on the number of threads or on the instruction set.
#pragma once

#include <cstdint>

#include "memory.hpp"
#include "packed.hpp"
#include "quantize.hpp"

namespace nibble {

inline constexpr int kPanelRows = 64;        // four vectors of 16 lanes
inline constexpr int kPanelChannels = 256;   // summed before they join the total; a float panel of them fills 64 KiB

// Weights in panels of 64 rows, channel by channel: element (n, k) is [n / 64][k][n % 64]. Rows past the last are zero.
struct DenseMatrix {
  int64_t num_rows, num_channels;
  FloatType type;
  Buffer memory;

  int element_bytes() const { return type == FloatType::f32 ? 4 : 2; }
  int64_t num_panels() const { return (num_rows + kPanelRows - 1) / kPanelRows; }
  int64_t panel_bytes() const { return num_channels * kPanelRows * element_bytes(); }
  const uint8_t* panel(int64_t i) const { return memory.data() + i * panel_bytes(); }
};

struct DenseOps {
  // The 64 rows of one panel for all tokens. x: [num_tokens, num_channels]; element (t, n) at out[t * out_stride + n],
  // n counted from the panel's first row; scratch: kPanelChannels * kPanelRows floats.
  void (*panel)(const DenseMatrix& weights, int64_t panel, const float* x, int64_t num_tokens, float* out,
                int64_t out_stride, float* scratch);
  // The same for packed weights (exact.hpp).
  void (*packed_panel)(const Packed& weights, int64_t panel, const float* x, int64_t num_tokens, float* out,
                       int64_t out_stride, float* scratch);
};

namespace avx512 {
extern const DenseOps dense_ops;
}
namespace avx2 {
extern const DenseOps dense_ops;
}
namespace scalar {
extern const DenseOps dense_ops;
}

}  // namespace nibble
