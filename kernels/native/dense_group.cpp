#include "dense_group.hpp"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "isa.hpp"
#include "pool.hpp"

namespace nibble {
namespace {

constexpr int64_t kChunksPerThread = 8;  // of panels: enough that a thread held up by others costs little
constexpr int64_t kTransposed = 32;      // channels turned at a time: 64 rows of them stay in the first-level cache

template <class T>
void turn_panel(const T* from, int64_t num_rows, int64_t num_channels, T* to) {
  for (int64_t k0 = 0; k0 < num_channels; k0 += kTransposed) {
    int64_t stop = std::min(k0 + kTransposed, num_channels);
    for (int64_t n = 0; n < num_rows; n++)
      for (int64_t k = k0; k < stop; k++) to[k * kPanelRows + n] = from[n * num_channels + k];
  }
}

int64_t panels_of(const DenseMatrix& w) { return w.num_panels(); }
int64_t panels_of(const Packed& w) { return (w.num_rows + kPanelRows - 1) / kPanelRows; }

auto panel_kernel(const DenseMatrix&) { return active_isa().dense->panel; }
auto panel_kernel(const Packed&) { return active_isa().dense->packed_panel; }

template <class Matrix>
void multiply_panel(const Matrix& w, int64_t index, const float* x, int64_t num_tokens, float* out) {
  thread_local Buffer scratch, whole;
  scratch.reserve(kPanelChannels * kPanelRows * sizeof(float));
  auto kernel = panel_kernel(w);
  int64_t first = index * kPanelRows;
  if (first + kPanelRows <= w.num_rows) {
    kernel(w, index, x, num_tokens, out + first, w.num_rows, (float*)scratch.data());
    return;
  }
  whole.reserve((size_t)(num_tokens * kPanelRows) * sizeof(float));  // the last rows: those that exist are copied
  float* all = (float*)whole.data();
  kernel(w, index, x, num_tokens, all, kPanelRows, (float*)scratch.data());
  for (int64_t t = 0; t < num_tokens; t++)
    std::copy(all + t * kPanelRows, all + t * kPanelRows + w.num_rows - first, out + t * w.num_rows + first);
}

}  // namespace

DenseMatrix pack_dense(const void* weights, FloatType type, int64_t num_rows, int64_t num_channels) {
  if (num_rows < 1 || num_channels < 1) throw std::invalid_argument("a matrix needs at least one row and one channel");
  DenseMatrix to{num_rows, num_channels, type, {}};
  to.memory = Buffer::of_slab((size_t)(to.num_panels() * to.panel_bytes()));
  Pool::instance().run(to.num_panels(), [&](int64_t i) {
    int64_t first = i * kPanelRows, rows = std::min<int64_t>(kPanelRows, num_rows - first);
    const uint8_t* from = (const uint8_t*)weights + first * num_channels * to.element_bytes();
    uint8_t* panel = to.memory.data() + i * to.panel_bytes();
    if (type == FloatType::f32)
      turn_panel((const uint32_t*)from, rows, num_channels, (uint32_t*)panel);
    else
      turn_panel((const uint16_t*)from, rows, num_channels, (uint16_t*)panel);
  });
  return to;
}

template <class Matrix>
FloatGroup<Matrix>::FloatGroup(std::vector<const Matrix*> members) : members_(std::move(members)), first_panel_{0} {
  if (members_.empty()) throw std::invalid_argument("a group needs at least one matrix");
  for (const Matrix* m : members_) {
    if (m->num_channels != members_[0]->num_channels)
      throw std::invalid_argument("matrices that share activations must have the same channels");
    first_panel_.push_back(first_panel_.back() + panels_of(*m));
  }
}

template <class Matrix>
void FloatGroup<Matrix>::run(const float* x, int64_t num_tokens, const std::vector<float*>& outs) const {
  if (outs.size() != members_.size()) throw std::invalid_argument("a group needs one output for each matrix");
  if (num_tokens <= 0) return;
  int64_t total = first_panel_.back();
  int64_t per_chunk = std::max<int64_t>(1, total / (Pool::instance().num_threads() * kChunksPerThread));
  Pool::instance().run((total + per_chunk - 1) / per_chunk, [&](int64_t chunk) {
    int64_t stop = std::min(total, (chunk + 1) * per_chunk);
    size_t member = 0;
    for (int64_t panel = chunk * per_chunk; panel < stop; panel++) {
      while (panel >= first_panel_[member + 1]) member++;
      multiply_panel(*members_[member], panel - first_panel_[member], x, num_tokens, outs[member]);
    }
  });
}

template class FloatGroup<DenseMatrix>;
template class FloatGroup<Packed>;

}  // namespace nibble
