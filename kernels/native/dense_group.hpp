// Matrices that read the same float activations, multiplied in one pass over the threads.
#pragma once

#include <cstdint>
#include <vector>

#include "dense.hpp"

namespace nibble {

// Repacks weights: [num_rows, num_channels] of `type` on the pool's threads. Throws std::invalid_argument when it is
// empty; std::bad_alloc.
DenseMatrix pack_dense(const void* weights, FloatType type, int64_t num_rows, int64_t num_channels);

// Matrix: DenseMatrix, or Packed for float activations.
template <class Matrix>
class FloatGroup {
 public:
  // The matrices must outlive the group. Throws std::invalid_argument when they differ in channels.
  explicit FloatGroup(std::vector<const Matrix*> members);

  // x: [num_tokens, channels] float32; outs[i]: [num_tokens, rows of member i] float32.
  void run(const float* x, int64_t num_tokens, const std::vector<float*>& outs) const;

 private:
  std::vector<const Matrix*> members_;
  std::vector<int64_t> first_panel_;  // of each member, in the group's numbering; one more at the end
};

extern template class FloatGroup<DenseMatrix>;
extern template class FloatGroup<Packed>;
using DenseGroup = FloatGroup<DenseMatrix>;
using ExactGroup = FloatGroup<Packed>;

}  // namespace nibble
