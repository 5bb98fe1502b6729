// Attention of one step over a quantized cache. The same for every layer of one layout, windows and sinks.
#pragma once

#include <vector>

#include "paged.hpp"
#include "quantized.hpp"

namespace nibble {

struct RecentInputs {
  int64_t num_pages;
  const int64_t* tables;  // [num_seqs, max_pages], -1 where there is none
  int64_t max_pages;
  const int64_t* slots;   // [num_rows], -1 where a row is not kept; null where none is
  std::vector<int64_t> windows;  // [num_seqs], tokens that each sequence reads in high precision
};

class QuantizedAttention {
 public:
  // Copies what it needs. Throws std::invalid_argument as PagedWork, and when a position that is read in high precision
  // has no recent page.
  QuantizedAttention(const PagedInputs& inputs, const QuantizedShape& shape, const RecentInputs& recent);

  // k, v: [num_tokens, num_kv_heads, head_dim].
  void store(const float* k, const float* v, const QuantizedLayer& layer) const;

  // As PagedAttention::attend.
  void attend(const float* q, const QuantizedLayer& layer, float* out, int num_heads, float scale);

 private:
  QuantizedShape shape_;
  PagedWork work_;
  std::vector<int64_t> recent_tables_, recent_slots_, windows_;
  int64_t max_recent_;
};

}  // namespace nibble
