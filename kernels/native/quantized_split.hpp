// One split of a unit over the quantized cache: which tokens its rows read how, where they lie, and memory to work in.
#pragma once

#include "quantized_tile.hpp"

namespace nibble::NIBBLE_ISA {
namespace {

struct Range {  // of tokens of a split
  int first, stop;
  bool empty() const { return first >= stop; }
  int first_vector() const { return first / 16; }
  int stop_vector() const { return (stop + 15) / 16; }
};

inline int clamp_to_split(int64_t token) { return token < 0 ? 0 : token > kSplit ? kSplit : (int)token; }

constexpr int kPagesAhead = 2;  // to fetch: a page of 2 bits is read in less time than the memory answers

struct QuantizedSplit {
  const QuantizedAttend& call;
  const QuantizedShape& shape;
  const Unit& unit;
  int64_t first_key;
  int64_t window;  // of the unit's sequence
  int dim, page_size, page_shift, num_rows, first_row;
  int* edges;  // of the rows
  const float* queries;
  const uint8_t* query_digits;
  float *packed_scores, *high, *part;  // both [num_rows, kSplit]; high: scores, then weights, of what is not packed
  float *peaks, *shares, *totals;      // of the rows, 16 each: of their blocks, of their blocks, of lanes
  float *parameters, *zeros, *units, *steps;
  uint8_t *digits, *codes, *unpacked;
  int64_t stride;   // of part
  Range packed;     // what some row reads packed
  Range recent[2];  // what some row reads in high precision: sinks, and the windows
  const uint8_t* pages[kSplit / 16 + kPagesAhead];
  const uint8_t* recent_keys[kSplit / 16 + 1];
  const uint8_t* recent_values[kSplit / 16 + 1];

  QuantizedSplit(const QuantizedAttend& call, const Place& at, const Place& next, float* scratch, float* parts)
      : call(call), shape(call.shape), unit(*at.unit), first_key((int64_t)at.split * kSplit),
        window(call.windows[unit.sequence]), dim(shape.heads.head_dim), page_size(shape.heads.page_size),
        page_shift(__builtin_ctz((unsigned)page_size)), stride(call.base.part_stride()) {
    int64_t hidden = first_key - unit.first_position;  // tokens before the split
    first_row = hidden > 0 ? (int)hidden * call.base.group : 0;
    num_rows = call.base.rows_of(unit) - first_row;
    int64_t row = call.first_row(unit) + first_row;
    queries = call.queries + row * dim;
    query_digits = call.digits + row * call.digits_stride();
    part = parts + first_row * stride;
    lay_out(scratch);
    for (int i = 0; i < num_rows; i++) edges[i] = clamp_to_split(position(i) - window + 1 - first_key);
    int last = num_rows - 1;
    packed = {clamp_to_split(shape.num_sinks - first_key), edge(last)};
    recent[0] = {0, min_of(packed.first, visible(last))};
    recent[1] = {max_of(edge(0), recent[0].stop), window ? visible(last) : 0};
    find_pages(next);
  }

  void lay_out(float* scratch) {
    int64_t groups = shape.num_groups(), rows = num_rows;
    auto take = [&](int64_t floats) {
      float* at = scratch;
      scratch += (floats + 15) / 16 * 16;
      return at;
    };
    packed_scores = take(rows * kSplit);
    high = take(rows * kSplit);
    peaks = take(rows * 16);
    shares = take(rows * 16);
    totals = take(rows * 16);
    parameters = take(2 * groups * kBlock);
    zeros = take(rows * groups * 16);
    units = take(rows * groups);
    steps = take(groups);
    edges = (int*)take(rows);
    digits = (uint8_t*)take(rows * groups * (2 * kBlock / 4));
    codes = (uint8_t*)take(kBlock * (dim + 64) / 4);
    unpacked = (uint8_t*)take(kBlock * (dim + 64) / 4);
  }

  const uint8_t* page(const Unit& of, int64_t i) const {
    return call.layer.pages + shape.chunk(of.block_table[i], of.kv_head);
  }

  void find_pages(const Place& next) {
    const CacheShape heads = shape.recent();
    int64_t first_page = first_key >> page_shift, next_page = ((int64_t)next.split * kSplit) >> page_shift;
    int64_t last_page = (next.unit->context_len() - 1) >> page_shift;
    int num_pages = (packed.stop + page_size - 1) >> page_shift;
    for (int i = 0; i < num_pages; i++) pages[i] = page(unit, first_page + i);
    for (int i = 0; i < kPagesAhead; i++)
      pages[num_pages + i] = page(*next.unit, next_page + i < last_page ? next_page + i : last_page);
    const int64_t* recent_table = call.recent_tables + unit.sequence * call.max_recent + first_key / 16;
    for (int i = 0; i <= kSplit / 16; i++) recent_keys[i] = recent_values[i] = pages[0];
    for (const Range& range : recent)
      for (int i = range.first_vector(); i < range.stop_vector() && !range.empty(); i++) {
        recent_keys[i] = call.layer.recent + heads.keys_offset(recent_table[i], unit.kv_head);
        recent_values[i] = call.layer.recent + heads.values_offset(recent_table[i], unit.kv_head);
      }
  }

  int64_t position(int row) const { return unit.first_position + (first_row + row) / call.base.group; }
  // Tokens of the split that a row sees, at least 1.
  int visible(int row) const { return clamp_to_split(position(row) + 1 - first_key); }
  // The first token of the split in the row's window; it sees no packed one from there on.
  int edge(int row) const { return edges[row]; }
  // x in the lanes of the 16 tokens of vector v that the row reads packed, `other` elsewhere.
  Floats where_packed(int row, int v, Floats x, Floats other) const {
    return first(packed.first - 16 * v, other, first(edge(row) - 16 * v, x, other));
  }
  // x in the lanes of the 16 tokens of vector v that the row reads in high precision, `other` elsewhere.
  Floats where_high(int row, int v, Floats x, Floats other) const {
    return first(visible(row) - 16 * v, where_packed(row, v, other, x), other);
  }
  // All vectors of which some row reads a token in high precision, each once: one may hold sinks and window.
  template <class F>
  void each_high(F f) const {
    int done = 0;
    for (const Range& range : recent) {
      if (range.empty()) continue;
      for (int v = max_of(range.first_vector(), done); v < range.stop_vector(); v++) f(v);
      done = range.stop_vector();
    }
  }
  const uint8_t* page_of(int v) const { return pages[16 * v >> page_shift]; }
  int token_of(int v) const { return 16 * v & (page_size - 1); }  // in its page

  // The places of vectors v ... kPagesAhead pages later.
  const uint8_t* later(int v, int64_t base, int64_t token_bytes) const {
    return pages[(16 * v >> page_shift) + kPagesAhead] + base + token_of(v) * token_bytes;
  }
  // Whether tokens of vectors v .. v + count - 1 lie in one page.
  bool in_one_page(int v, int count) const { return token_of(v) + 16 * count <= page_size; }
  // Fetches what lies there of vectors v .. v + count - 1, of `token_bytes` a token.
  // Always inlined: gcc 12 takes a function that only fetches for one without effect, and drops its calls.
  NIBBLE_INLINE void fetch(int v, int count, int64_t base, int token_bytes) const {
    for (const int stop = v + count; v < stop;) {
      int vectors = min_of(stop - v, (page_size - token_of(v)) / 16);
      const uint8_t* from = later(v, base, token_bytes);
      for (int i = 0, bytes = 16 * vectors * token_bytes; i < bytes; i += 64) prefetch_l2(from + i);
      v += vectors;
    }
  }
  // While the packed keys of vectors v .. v + n - 1 are read, their share of what the split reads in high precision.
  NIBBLE_INLINE void fetch_recent(int v, int n) const {
    int at = v - packed.first_vector(), count = packed.stop_vector() - packed.first_vector();
    int64_t bytes = shape.recent().head_bytes();
    for (const Range& range : recent) {
      if (range.empty()) continue;
      int first = range.first_vector(), vectors = range.stop_vector() - first;
      for (int i = first + vectors * at / count; i < first + vectors * (at + n) / count; i++)
        for (int64_t j = 0; j < bytes; j += 64) prefetch_l2(recent_keys[i] + j), prefetch_l2(recent_values[i] + j);
    }
  }
};

}  // namespace
}  // namespace nibble::NIBBLE_ISA
