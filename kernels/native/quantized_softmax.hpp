// Weights of a split: what its packed blocks and its tokens of high precision weigh against each other.
#pragma once

#include "quantized_split.hpp"

namespace nibble::NIBBLE_ISA {
namespace {

// The highest score of a row, of each of its packed blocks, and 2^(the block's - the row's), its share: tokens of a
// block are weighed against their own highest.
inline void find_peaks(const QuantizedSplit& s, int row) {
  const float* scores = s.packed_scores + (int64_t)row * kSplit;
  const float* high = s.high + (int64_t)row * kSplit;
  const Floats hidden = set1(-__builtin_inff());
  const int first = s.packed.first, edge = s.edge(row), stop_vector = s.packed.stop_vector();
  Floats highest = hidden;
  float own[16];
  store(own, hidden);
  for (int block = first / kBlock, v = block * 4; v < stop_vector; block++, v += 4) {
    Floats peak = hidden;
    if (first <= 16 * v && edge >= 16 * v + kBlock)
      NIBBLE_UNROLL for (int i = 0; i < 4; i++) peak = max(load(scores + 16 * (v + i)), peak);
    else
      for (int i = v; i < min_of(v + 4, stop_vector); i++)
        peak = max(s.where_packed(row, i, load(scores + 16 * i), hidden), peak);
    own[block] = reduce_max(peak);
    highest = max(peak, highest);
  }
  s.each_high([&](int v) { highest = max(s.where_high(row, v, load(high + 16 * v), hidden), highest); });
  float peak = reduce_max(highest);
  store(s.peaks + 16 * row, load(own));
  store(s.shares + 16 * row, exp2_negative(sub(load(own), set1(peak))));
  store(s.totals + 16 * row, zero());
  s.part[(row + 1) * s.stride - 16] = peak;
}

// Scores of what is read in high precision to weights, zero elsewhere; adds them to the totals.
inline void weigh_high(const QuantizedSplit& s, int row) {
  float* high = s.high + (int64_t)row * kSplit;
  const Floats peak = set1(s.part[(row + 1) * s.stride - 16]);
  Floats total = load(s.totals + 16 * row);
  s.each_high([&](int v) {
    Floats weight = s.where_high(row, v, exp2_negative(sub(load(high + 16 * v), peak)), zero());
    store(high + 16 * v, weight);
    total = add(total, weight);
  });
  store(s.totals + 16 * row, total);
}

// The same of packed tokens whose values are floats.
inline void weigh_halves(const QuantizedSplit& s, int row) {
  float* scores = s.packed_scores + (int64_t)row * kSplit;
  const Floats peak = set1(s.part[(row + 1) * s.stride - 16]);
  Floats total = load(s.totals + 16 * row);
  for (int v = s.packed.first_vector(); v < s.packed.stop_vector(); v++) {
    Floats weight = s.where_packed(row, v, exp2_negative(sub(load(scores + 16 * v), peak)), zero());
    store(scores + 16 * v, weight);
    total = add(total, weight);
  }
  store(s.totals + 16 * row, total);
}

}  // namespace
}  // namespace nibble::NIBBLE_ISA
