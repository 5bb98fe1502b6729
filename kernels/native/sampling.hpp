// Ids from logits over vocabularies of 100,000 and more, without sorting them. kernels/sampling/reference.py is the
// definition. Sums are taken over pieces of kPiece ids, each in one order, and then piece after piece: a result depends
// neither on the number of threads nor on the instruction set.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace nibble {

struct Filters {
  double temperature;  // above 0
  int64_t top_k;       // 0 keeps all
  double top_p, min_p;
};

// The first id of the largest logit; -1 when one is NaN or the largest is not finite. size > 0.
int64_t argmax(const float* logits, int64_t size);

// The id that `uniform`, in [0, 1), picks; -1 as for argmax.
int64_t draw(const float* logits, int64_t size, const Filters& filters, double uniform);

struct LogProbs {
  double token;
  std::vector<std::pair<int64_t, double>> top;  // most likely first, ties by id
};
// log softmax at `token` (in [0, size)) and at the `num_top` most likely ids.
LogProbs log_probs(const float* logits, int64_t size, int64_t token, int64_t num_top);

}  // namespace nibble
