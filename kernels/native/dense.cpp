#include "dense.hpp"

#include "exact.hpp"
#include "float_tile.hpp"
#include "simd/simd.hpp"

namespace nibble::NIBBLE_ISA {
namespace {

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
template <class W>
void all_blocks(const DenseMatrix& m, int64_t index, const float* x, int64_t num_tokens, float* out, int64_t stride,
                float* scratch) {
  const auto* w = (const typename W::Element*)m.panel(index);
  for (int64_t k = 0; k < m.num_channels; k += kPanelChannels, w += kPanelChannels * kPanelRows) {
    int64_t left = m.num_channels - k;
    int channels = (int)(left < kPanelChannels ? left : kPanelChannels);
    Totals to{out, stride, nullptr, k == 0};
    if (sizeof(typename W::Element) == 2 && num_tokens >= kWidenFrom) {
      for (int i = 0; i < channels * kPanelRows; i += 16) store(scratch + i, W::load(w + i));
      tiles<Widened>(scratch, channels, x + k, m.num_channels, num_tokens, to);
    } else {
      tiles<W>(w, channels, x + k, m.num_channels, num_tokens, to);
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

const DenseOps dense_ops = {panel, packed_panel};

}  // namespace nibble::NIBBLE_ISA
