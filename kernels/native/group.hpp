// Matrices that read the same activations (q, k and v; gate and up), multiplied in one pass over the threads.
#pragma once

#include <cstdint>
#include <vector>

#include "linear.hpp"
#include "packed.hpp"

namespace nibble {

class Group {
 public:
  // The matrices must outlive the group. Throws std::invalid_argument when they differ in channels or blocks.
  explicit Group(std::vector<const Packed*> members);

  // x: [num_tokens, channels] float32; outs[i]: [num_tokens, rows of member i] float32.
  void run(const float* x, int64_t num_tokens, const std::vector<float*>& outs) const;

 private:
  Activations quantize(const float* x, int64_t num_tokens) const;
  size_t zero_index(const Packed& member) const;

  std::vector<const Packed*> members_;
  std::vector<int64_t> first_row_block_;  // of each member, in the group's numbering; one more at the end
  std::vector<int32_t> zeros_;            // constant zero points of the members, each once
};

}  // namespace nibble
