// Matrices that read activations which their format rounds to integers by token, in one pass over the threads.
#pragma once

#include <cstdint>
#include <vector>

#include "int8.hpp"
#include "packed.hpp"

namespace nibble {

class Int8Group {
 public:
  // The matrices must outlive the group. code_sums: for each of them the sums of its codes, [num_rows, num_blocks];
  // none at all where the rounding has no zero point. Throws std::invalid_argument when the matrices differ in
  // channels, groups or a constant zero point, or hold no integers of 4 or 8 bits, and for a rounding of other than 2
  // to 8 bits.
  Int8Group(std::vector<const Packed*> members, const TokenRounding& rounding,
            const std::vector<const int32_t*>& code_sums);

  // x: [num_tokens, channels] float32; outs[i]: [num_tokens, rows of member i] float32.
  void run(const float* x, int64_t num_tokens, const std::vector<float*>& outs) const;

 private:
  TokenCodes round(const float* x, int64_t num_tokens) const;
  int num_runs() const;
  std::vector<int32_t> runs_of(const Packed& member, const int32_t* code_sums) const;

  std::vector<const Packed*> members_;
  TokenRounding rounding_;
  std::vector<int64_t> first_row_block_;         // of each member, in the group's numbering; one more at the end
  std::vector<std::vector<int32_t>> code_sums_;  // of each member, [row block, run, 16]; empty without a zero point
};

}  // namespace nibble
