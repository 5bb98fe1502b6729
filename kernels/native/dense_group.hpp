// Dense matrices that read the same activations, multiplied in one pass over the threads.
#pragma once

#include <cstdint>
#include <vector>

#include "dense.hpp"

namespace nibble {

// Repacks weights: [num_rows, num_channels] of `type` on the pool's threads. Throws std::invalid_argument when it is
// empty; std::bad_alloc.
DenseMatrix pack_dense(const void* weights, FloatType type, int64_t num_rows, int64_t num_channels);

class DenseGroup {
 public:
  // The matrices must outlive the group. Throws std::invalid_argument when they differ in channels.
  explicit DenseGroup(std::vector<const DenseMatrix*> members);

  // x: [num_tokens, channels] float32; outs[i]: [num_tokens, rows of member i] float32.
  void run(const float* x, int64_t num_tokens, const std::vector<float*>& outs) const;

 private:
  std::vector<const DenseMatrix*> members_;
  std::vector<int64_t> first_panel_;  // of each member, in the group's numbering; one more at the end
};

}  // namespace nibble
