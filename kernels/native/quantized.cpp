#include "hadamard.hpp"
#include "quantized_keys.hpp"
#include "quantized_softmax.hpp"
#include "quantized_values.hpp"

namespace nibble::NIBBLE_ISA {

void store_quantized(const QuantizedStore& call, int head);  // quantized_store.cpp

namespace {

// C: the cells of recent pages.
template <class C>
struct QuantizedRun : QuantizedSplit {
  using Cell = typename C::Type;
  using QuantizedSplit::QuantizedSplit;

  // ---- scores

  void score_all() {
    if (!packed.empty()) {
      if (shape.keys.width == 16)
        score_halves();
      else
        by_width(shape.keys.width, [&](auto width) { score_codes<decltype(width)::value>(*this); });
    }
    for (const Range& range : recent)
      if (!range.empty()) score_floats<C>(range, (const Cell* const*)recent_keys, kRecentTokens, high);
  }

  // Keys of floats: the tiles of attention_tile.hpp.
  template <class K>
  void score_floats(const Range& range, const typename K::Type* const* keys, int64_t step, float* to) {
    int num_tiles = (num_rows + kTileRows - 1) / kTileRows;
    for (int v = range.first_vector(); v < range.stop_vector(); v += kTileVectors) {
      int vectors = min_of(kTileVectors, range.stop_vector() - v);
      for (int tile = 0; tile < num_tiles; tile++) {
        int row = num_rows * tile / num_tiles, rows = num_rows * (tile + 1) / num_tiles - row;
        score<K>(rows, vectors, queries + (int64_t)row * dim, dim, keys + v, keys + v, step,
                 to + (int64_t)row * kSplit + 16 * v);
      }
    }
  }

  void score_halves() {
    const uint16_t* keys[kSplit / 16];
    for (int v = packed.first_vector(); v < packed.stop_vector(); v++)
      keys[v] = (const uint16_t*)page_of(v) + token_of(v);
    score_floats<F16>(packed, keys, page_size, packed_scores);
  }

  // ---- values

  void mix_packed_values() {
    if (packed.empty()) return;
    if (shape.values.width != 16) return PackedValues(*this).run();
    for (int row = 0; row < num_rows; row++) weigh_halves(*this, row);
    mix_halves();
  }

  template <class V>
  void mix_floats(int row, int rows, const float* w, const Values<V>& v, int first, int stop) {
    for (int i = 0; i < dim / 16; i += kTileVectors)
      mix<V>(rows, min_of(kTileVectors, dim / 16 - i), w + (int64_t)row * kSplit, v, first, stop, 16 * i,
             part + row * stride, stride);
  }

  // A tile passes over the tokens that all its rows read; then each row over the few that are its own: what a row may
  // not see may be NaN. `stop(row)` grows with the row.
  template <class V, class Stop>
  void mix_tiles(const float* w, const Values<V>& v, int first, Stop stop) {
    int num_tiles = (num_rows + kTileRows - 1) / kTileRows;
    for (int tile = 0; tile < num_tiles; tile++) {
      int row = num_rows * tile / num_tiles, end = num_rows * (tile + 1) / num_tiles, common = max_of(stop(row), first);
      if (common > first) mix_floats(row, end - row, w, v, first, common);
      for (int r = row + 1; r < end; r++)
        if (stop(r) > common) mix_floats(r, 1, w, v, common, stop(r));
    }
  }

  void mix_halves() {
    const uint8_t* values[kSplit / 16 + 1];
    int num_pages = (packed.stop + page_size - 1) >> page_shift;
    for (int i = 0; i <= num_pages; i++) values[i] = pages[i] + shape.value_codes_at;
    mix_tiles<F16>(packed_scores, {values, page_size, dim}, packed.first, [&](int row) { return edge(row); });
  }

  void mix_recent(const Range& range) {
    mix_tiles<C>(high, {recent_values, kRecentTokens, dim}, range.first,
                 [&](int row) { return min_of(range.stop, visible(row)); });
  }

  void run() {
    score_all();
    for (int row = 0; row < num_rows; row++) {
      find_peaks(*this, row);
      float* out = part + row * stride;
      for (int i = 0; i < stride - 16; i += 16) store(out + i, zero());
    }
    mix_packed_values();
    for (int row = 0; row < num_rows; row++) {
      weigh_high(*this, row);
      part[(row + 1) * stride - 15] = reduce_add(load(totals + 16 * row));
    }
    for (const Range& range : recent)
      if (!range.empty()) mix_recent(range);
  }
};

void split(const QuantizedAttend& call, const Place& at, const Place& next, float* scratch, float* part) {
  if (call.shape.heads.cell == Cell::f16)
    QuantizedRun<F16>(call, at, next, scratch, part).run();
  else
    QuantizedRun<F32>(call, at, next, scratch, part).run();
}

// ---- queries and results --------------------------------------------------------------------------------------------

// Of one row: for every group the digits, d, and the sum of the query as its digits count it, both times the factor of
// the keys' parameters. What is no number makes d a NaN.
void cut_query(const float* q, const RowFormat& format, float factor, int dim, uint8_t* to) {
  float* units = (float*)(to + 2 * dim);
  const bool two = has_two_digits(format.width);
  const float levels = (float)query_levels(format.width);
  for (int g = 0; g < format.num_groups; g++) {
    const float* from = q + g * format.group_size;
    Floats peak = zero(), poison = zero();
    for (int i = 0; i < format.group_size; i += 16) {
      Floats x = load(from + i);
      peak = max(max(x, sub(zero(), x)), peak);
      poison = fma(x, zero(), poison);
    }
    float largest = reduce_max(peak), unit = largest / levels + reduce_add(poison);
    Floats inverse = set1(inverse_of(levels, largest));
    Ints sum = izero();
    for (int i = 0; i < format.group_size; i += 16) {
      Ints x = to_int(mul(load(from + i), inverse));
      write_digits(x, two, (int8_t*)to + g * format.group_size + i, dim);
      sum = iadd(sum, x);
    }
    units[g] = factor * unit;
    units[format.num_groups + g] = factor * unit * (float)ireduce_add(sum);
  }
}

void prepare(const QuantizedAttend& call, int64_t token) {
  int dim = call.shape.heads.head_dim, group = call.base.group, num_kv_heads = call.shape.heads.num_kv_heads;
  Floats scale = set1(call.base.scale * kLog2E);
  for (int head = 0; head < num_kv_heads; head++) {
    float factor = factor_of(call.shape.keys, call.layer.key_prescale[head]);
    for (int h = 0; h < group; h++) {
      const float* from = call.base.q + ((token * num_kv_heads + head) * group + h) * dim;
      int64_t row = (head * call.num_tokens + token) * group + h;
      float* q = call.queries + row * dim;
      __builtin_memcpy(q, from, sizeof(float) * (size_t)dim);
      if (call.shape.keys.hadamard) hadamard(q, dim);
      for (int i = 0; i < dim; i += 16) store(q + i, mul(load(q + i), scale));
      cut_query(q, call.shape.keys, factor, dim, call.digits + row * call.digits_stride());
    }
  }
}

void turn_back(const QuantizedAttend& call, const Unit& unit) {
  int dim = call.shape.heads.head_dim, group = call.base.group;
  if (!call.shape.values.hadamard) return;
  for (int row = 0; row < call.base.rows_of(unit); row++) {
    int64_t head = (int64_t)unit.kv_head * group + row % group;
    int64_t at = (unit.first_token + row / group) * call.shape.heads.num_kv_heads * group + head;
    hadamard(call.base.out + at * dim, dim);
  }
}

}  // namespace

const QuantizedOps quantized_ops = {prepare, split, turn_back, store_quantized};

}  // namespace nibble::NIBBLE_ISA
