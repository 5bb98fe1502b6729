#include "hadamard.hpp"
#include "quantized_tile.hpp"

namespace nibble::NIBBLE_ISA {

void store_quantized(const QuantizedStore& call, int head);  // quantized_store.cpp

namespace {

struct Range {  // of tokens of a split
  int first, stop;
  bool empty() const { return first >= stop; }
  int first_vector() const { return first / 16; }
  int stop_vector() const { return (stop + 15) / 16; }
};

inline int clamp_to_split(int64_t token) { return token < 0 ? 0 : token > kSplit ? kSplit : (int)token; }

template <class C>
struct QuantizedRun {
  using Cell = typename C::Type;

  const QuantizedAttend& call;
  const QuantizedShape& shape;
  const Unit& unit;
  int64_t first_key;
  int64_t window;  // of the unit's sequence
  int dim, page_size, num_rows, first_row;
  const float* queries;
  const uint8_t* query_digits;
  float *weights, *high, *part;
  float *zeros, *units, *parameters;
  float largest[kMaxHeadDim / 16];  // scale of each group of a block
  uint8_t *digits, *codes, *unpacked;
  int64_t stride;  // of part
  Range packed;     // what some row reads packed
  Range recent[2];  // what some row reads in high precision: sinks, and the windows
  const uint8_t* pages[kSplit / 16 + 2];
  const uint8_t* recent_keys[kSplit / 16 + 1];
  const uint8_t* recent_values[kSplit / 16 + 1];

  QuantizedRun(const QuantizedAttend& call, const Unit& unit, int split, float* scratch, float* parts)
      : call(call), shape(call.shape), unit(unit), first_key((int64_t)split * kSplit),
        window(call.windows[unit.sequence]), dim(shape.heads.head_dim),
        page_size(shape.heads.page_size), stride(call.base.part_stride()) {
    int64_t hidden = first_key - unit.first_position;  // tokens before the split
    first_row = hidden > 0 ? (int)hidden * call.base.group : 0;
    num_rows = call.base.rows_of(unit) - first_row;
    int64_t row = call.first_row(unit) + first_row;
    queries = call.queries + row * dim;
    query_digits = call.digits + row * call.digits_stride();
    part = parts + first_row * stride;
    lay_out(scratch);
    int last = num_rows - 1;
    packed = {clamp_to_split(shape.num_sinks - first_key), edge(last)};
    recent[0] = {0, min_of(packed.first, visible(last))};
    recent[1] = {max_of(edge(0), recent[0].stop), window ? visible(last) : 0};
    find_pages();
  }

  void lay_out(float* scratch) {
    int64_t groups = shape.num_groups(), rows = num_rows;
    auto take = [&](int64_t floats) {
      float* at = scratch;
      scratch += (floats + 15) / 16 * 16;
      return at;
    };
    weights = take(rows * kSplit);
    high = take(rows * kSplit);
    zeros = take(rows * groups * 16);
    units = take(rows * groups);
    parameters = take(2 * groups * kBlock);
    digits = (uint8_t*)take(rows * groups * (kBlock / 2));
    codes = (uint8_t*)take(kBlock * (dim + 64) / 4);
    unpacked = (uint8_t*)take(kBlock * (dim + 64) / 4);
  }

  void find_pages() {
    const CacheShape heads = shape.recent();
    int num_pages = (visible(num_rows - 1) + page_size - 1) / page_size;
    const int64_t* table = unit.block_table + first_key / page_size;
    bool more = first_key + kSplit < unit.context_len();
    for (int i = 0; i <= num_pages; i++)
      pages[i] = call.layer.pages + shape.chunk(table[i < num_pages || more ? i : 0], unit.kv_head);
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
  int edge(int row) const { return clamp_to_split(position(row) - window + 1 - first_key); }
  // x in the lanes of the 16 tokens of vector v that the row reads packed, `other` elsewhere.
  Floats where_packed(int row, int v, Floats x, Floats other) const {
    return first(packed.first - 16 * v, other, first(edge(row) - 16 * v, x, other));
  }
  const uint8_t* page_of(int v) const { return pages[16 * v / page_size]; }
  int token_of(int v) const { return 16 * v % page_size; }  // in its page

  // ---- scores

  void score_all() {
    if (!packed.empty()) {
      if (shape.keys.width == 16)
        score_halves();
      else
        by_width(shape.keys.width, [&](auto width) { score_codes<decltype(width)::value>(); });
    }
    for (const Range& range : recent)
      if (!range.empty()) score_recent(range);
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
    score_floats<F16>(packed, keys, page_size, weights);
  }

  void score_recent(const Range& range) {
    score_floats<C>(range, (const Cell* const*)recent_keys, kRecentTokens, high);
    for (int row = 0; row < num_rows; row++)
      for (int v = range.first_vector(); v < range.stop_vector(); v++) {
        float* to = weights + (int64_t)row * kSplit + 16 * v;
        store(to, where_packed(row, v, load(to), load(high + (int64_t)row * kSplit + 16 * v)));
      }
  }

  template <int kWidth>
  void score_codes() {
    const float prescale = call.layer.key_prescale[unit.kv_head];
    int num_tiles = (num_rows + kPackedRows - 1) / kPackedRows, per_page = page_size / 16;
    int num_pages = (packed.stop + page_size - 1) / page_size;
    KeyTile tile{};
    tile.stride = kWidth == 1 ? 64 : 4 * page_size;
    tile.high = (int64_t)shape.keys.plane_bytes * page_size;
    tile.head_dim = dim, tile.group_size = shape.keys.group_size, tile.num_groups = shape.keys.num_groups;
    tile.digits_stride = call.digits_stride();
    tile.parameters = parameters;
    for (int v = packed.first_vector(); v < packed.stop_vector(); v += kPackedVectors) {
      int vectors = min_of(kPackedVectors, packed.stop_vector() - v);
      for (int n = 0; n < vectors; n++) {
        const uint8_t* page = page_of(v + n);
        int token = token_of(v + n);
        load_parameters(shape.keys, page + shape.key_parameters_at + token * shape.keys.parameter_bytes, page_size,
                        prescale, parameters + 16 * n, 16 * kPackedVectors);
        tile.keys[n] = kWidth == 1 ? unpack_keys(n, page + token) : page + 4 * token;
        int next = min_of((v + n + max_of(per_page, kPackedVectors)) / per_page, num_pages);
        tile.ahead[n] = pages[next] + 4 * token;
      }
      for (int i = 0; i < num_tiles; i++) {
        int row = num_rows * i / num_tiles, rows = num_rows * (i + 1) / num_tiles - row;
        by_rows(rows, [&](auto r) {
          by_vectors(vectors, [&](auto n) {
            score_packed<kWidth, decltype(r)::value, decltype(n)::value>(
                tile, query_digits + row * tile.digits_stride, weights + (int64_t)row * kSplit + 16 * v);
          });
        });
      }
    }
  }

  // Trits of 16 tokens to units of 4 bytes.
  const uint8_t* unpack_keys(int n, const uint8_t* from) {
    int rows = shape.keys.row_bytes;
    uint8_t* packed_rows = unpacked;
    uint8_t* channels = unpacked + 16 * (dim + 64) / 2;
    for (int j = 0; j < rows; j++) __builtin_memcpy(packed_rows + 16 * j, from + (int64_t)j * page_size, 16);
    unpack_trits(16 * rows, packed_rows, channels);
    uint8_t* to = codes + (int64_t)n * 16 * dim;
    for (int c = 0; c < dim; c += 4) {
      const uint8_t* p = channels + 16 * c;
      bstore(to + 16 * c, interleave(p, p + 16, p + 32, p + 48));
    }
    return to;
  }

  // ---- values

  void mix_all() {
    if (!packed.empty()) {
      if (shape.values.width == 16)
        mix_halves();
      else
        mix_codes();
    }
    for (const Range& range : recent)
      if (!range.empty()) mix_recent(range);
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
    int num_pages = (packed.stop + page_size - 1) / page_size;
    for (int i = 0; i <= num_pages; i++) values[i] = pages[i] + shape.value_codes_at;
    mix_tiles<F16>(weights, {values, page_size, dim}, packed.first, [&](int row) { return edge(row); });
  }

  void mix_recent(const Range& range) {
    for (int row = 0; row < num_rows; row++)
      for (int v = range.first_vector(); v < range.stop_vector(); v++) {
        int64_t at = (int64_t)row * kSplit + 16 * v;
        store(high + at, where_packed(row, v, zero(), load(weights + at)));
      }
    // A vector of 16 may hold sinks and window: each token once.
    mix_tiles<C>(high, {recent_values, kRecentTokens, dim}, range.first,
                 [&](int row) { return min_of(range.stop, visible(row)); });
  }

  // Values whose codes lie 16 channels of one shift to 16 bytes are read as they are, others unpacked to bytes first.
  bool is_direct() const {
    int width = shape.values.width;
    return width == 8 || (width == 4 && dim % 32 == 0) || (width == 2 && dim % 64 == 0);
  }

  void mix_codes() {
    int num_groups = shape.values.num_groups;
    for (int i = 0; i < num_rows * num_groups; i++) store(zeros + 16 * i, zero());
    for (int token = packed.first / kBlock * kBlock; token < packed.stop; token += kBlock) {
      int vectors = (min_of(packed.stop - token, kBlock) + 15) / 16;
      load_block(token / 16, vectors);
      center_parameters(vectors);
      for (int row = 0; row < num_rows; row++) cut_weights(row, token / 16, vectors);
      if (is_direct())
        by_width(shape.values.width, [&](auto width) { mix_block<decltype(width)::value>(4 * vectors); });
      else
        mix_block<1>(4 * vectors);
    }
    for (int row = 0; row < num_rows; row++)
      for (int c = 0; c < dim; c += 16) {
        int g = c / shape.values.group_size;
        float* to = part + row * stride + c;
        store(to, add(load(to), set1(reduce_add(load(zeros + (row * num_groups + g) * 16)))));
      }
  }

  // Codes of a block, four tokens side by side, and its parameters.
  void load_block(int first_vector, int vectors) {
    const RowFormat& format = shape.values;
    bool direct = is_direct();
    int row_bytes = direct ? format.row_bytes : dim + 64, chunks = direct ? format.row_bytes / 16 : dim / 16;
    for (int i = 0; i < vectors; i++) {
      int v = first_vector + i, token = token_of(v);
      const uint8_t* page = page_of(v);
      load_parameters(format, page + shape.value_parameters_at + token * format.parameter_bytes, page_size,
                      call.layer.value_prescale[unit.kv_head], parameters + 16 * i, kBlock);
      const uint8_t* from = page + shape.value_codes_at + (int64_t)token * format.row_bytes;
      const uint8_t* ahead = pages[(16 * v + max_of(page_size, 16)) / page_size];
      ahead += shape.value_codes_at + (int64_t)token * format.row_bytes;
      for (int j = 0; j < 16 * format.row_bytes; j += 64) prefetch_l2(ahead + j);
      if (!direct) from = unpack_values(from);
      for (int quad = 0; quad < 4; quad++) {
        const uint8_t* p = from + (int64_t)4 * quad * row_bytes;
        for (int b = 0; b < chunks; b++)
          bstore(codes + (b * (kBlock / 4) + 4 * i + quad) * 64,
                 interleave(p + 16 * b, p + 16 * b + row_bytes, p + 16 * b + 2 * row_bytes, p + 16 * b + 3 * row_bytes));
      }
    }
  }

  const uint8_t* unpack_values(const uint8_t* from) {
    int row_bytes = shape.values.row_bytes;
    for (int t = 0; t < 16; t++) {
      uint8_t row[kMaxHeadDim + 128];
      __builtin_memcpy(row, from + t * row_bytes, (size_t)row_bytes);
      unpack_row(shape.values, dim, row, unpacked + t * (dim + 64));
    }
    return unpacked;
  }

  // Of a block's parameters: scales to shares of the group's largest, zeros to values of the middle code.
  void center_parameters(int vectors) {
    int num_groups = shape.values.num_groups;
    for (int g = 0; g < num_groups; g++) {
      float *scales = parameters + g * kBlock, *offsets = parameters + (num_groups + g) * kBlock;
      largest[g] = relate(scales, offsets, vectors, [](int, Floats x) { return x; });
    }
  }

  template <class Keep>
  float relate(float* scales, float* offsets, int vectors, Keep keep) const {
    Floats middle = set1((float)shape.values.max_code * 0.5f), peak = zero();
    for (int i = 0; i < vectors; i++) {
      Floats x = keep(i, load(scales + 16 * i));
      store(scales + 16 * i, x);
      peak = max(x, peak);
      store(offsets + 16 * i, fma(x, middle, keep(i, load(offsets + 16 * i))));
    }
    float most = reduce_max(peak);
    Floats inverse = set1(inverse_of(1.0f, most));
    for (int i = 0; i < vectors; i++) store(scales + 16 * i, mul(load(scales + 16 * i), inverse));
    return most;
  }

  // The digits of a row's weights times scales, for every group, and what they leave to the middle code.
  void cut_weights(int row, int first_vector, int vectors) {
    const int num_groups = shape.values.num_groups;
    const bool two = has_two_digits(shape.values.width);
    const float levels = (float)levels_of(shape.values.width), middle = (float)shape.values.max_code * 0.5f;
    const float* w = weights + (int64_t)row * kSplit + 16 * first_vector;
    bool whole = is_whole(row, first_vector);
    auto keep = [&](int i, Floats x) { return whole ? x : where_packed(row, first_vector + i, x, zero()); };
    Floats kept[kBlock / 16], relative[kBlock / 16], peak = zero();
    for (int i = 0; i < vectors; i++) {
      kept[i] = keep(i, load(w + 16 * i));
      peak = max(kept[i], peak);
    }
    float highest = reduce_max(peak);
    Floats inverse = set1(inverse_of(levels, highest));
    for (int i = 0; i < vectors; i++) relative[i] = mul(kept[i], inverse);
    for (int g = 0; g < num_groups; g++) {
      const float *scales = parameters + g * kBlock, *offsets = parameters + (num_groups + g) * kBlock;
      float own[2 * kBlock], most = largest[g];
      if (!whole) {
        load_own(first_vector, vectors, g, own);
        scales = own, offsets = own + kBlock;
        most = relate(own, own + kBlock, vectors, keep);
      }
      float* sum = zeros + (row * num_groups + g) * 16;
      float unit = highest * most / levels;
      Floats total = load(sum), left = set1(unit * middle);
      int8_t* to = (int8_t*)digits + (row * num_groups + g) * 2 * kBlock;
      for (int i = 0; i < vectors; i++) {
        Floats digit = round(mul(relative[i], load(scales + 16 * i)));
        total = fnma(digit, left, fma(kept[i], load(offsets + 16 * i), total));
        write_digits(to_int(digit), two, to + 16 * i, kBlock);
      }
      store(sum, total);
      units[row * num_groups + g] = unit;
    }
  }

  // Whether the row reads all tokens of a block packed.
  bool is_whole(int row, int first_vector) const {
    return packed.first <= 16 * first_vector && edge(row) >= 16 * first_vector + kBlock;
  }

  // The parameters of one group as stored: a row that reads a part of a block has its own largest.
  void load_own(int first_vector, int vectors, int g, float* to) const {
    const RowFormat& format = shape.values;
    for (int i = 0; i < vectors; i++)
      for (int part = 0; part < 2; part++) {
        int v = first_vector + i;
        const uint8_t* p = page_of(v) + shape.value_parameters_at +
                           ((int64_t)(part * format.num_groups + g) * page_size + token_of(v)) * format.parameter_bytes;
        store(to + part * kBlock + 16 * i,
              load_parameter(format, p, set1(call.layer.value_prescale[unit.kv_head])));
      }
  }

  template <int kWidth>
  void mix_block(int num_quads) {
    int num_groups = shape.values.num_groups, group_size = shape.values.group_size;
    int num_tiles = (num_rows + kPackedRows - 1) / kPackedRows, run = channels_of_a_shift<kWidth>(dim);
    for (int c = 0; c < dim;) {
      int g = c / group_size, vectors = min_of(kPackedVectors, ((g + 1) * group_size - c) / 16);
      ValueTile tile{};
      for (int n = 0; n < vectors; n++) {
        int channel = c + 16 * n;
        tile.codes[n] = codes + channel % run / 16 * (kBlock * 16);
        tile.shift[n] = channel / run * kWidth;
      }
      tile.num_quads = num_quads;
      tile.digits_stride = num_groups * 2 * kBlock;
      tile.units_stride = num_groups;
      for (int i = 0; i < num_tiles; i++) {
        int row = num_rows * i / num_tiles, rows = num_rows * (i + 1) / num_tiles - row;
        tile.units = units + row * num_groups + g;
        const uint8_t* from = digits + (row * num_groups + g) * 2 * kBlock;
        by_rows(rows, [&](auto r) {
          by_vectors(vectors, [&](auto n) {
            mix_packed<kWidth, decltype(r)::value, decltype(n)::value>(tile, from, part + row * stride + c, stride);
          });
        });
      }
      c += 16 * vectors;
    }
  }

  void run() {
    score_all();
    for (int row = 0; row < num_rows; row++) {
      float* out = part + row * stride;
      weigh(weights + (int64_t)row * kSplit, visible(row), out + stride - 16);
      for (int i = 0; i < stride - 16; i += 16) store(out + i, zero());
    }
    mix_all();
  }
};

void split(const QuantizedAttend& call, const Unit& unit, int split, float* scratch, float* part) {
  if (call.shape.heads.cell == Cell::f16)
    QuantizedRun<F16>(call, unit, split, scratch, part).run();
  else
    QuantizedRun<F32>(call, unit, split, scratch, part).run();
}

// ---- queries and results --------------------------------------------------------------------------------------------

// Of one row: for every group the digits, d, and the sum of the query as its digits count it. What is no number makes d
// a NaN.
void cut_query(const float* q, const RowFormat& format, int dim, uint8_t* to) {
  float* units = (float*)(to + 2 * dim);
  const bool two = has_two_digits(format.width);
  const float levels = (float)levels_of(format.width);
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
    units[g] = unit;
    units[format.num_groups + g] = unit * (float)ireduce_add(sum);
  }
}

void prepare(const QuantizedAttend& call, int64_t token) {
  int dim = call.shape.heads.head_dim, group = call.base.group, num_kv_heads = call.shape.heads.num_kv_heads;
  Floats scale = set1(call.base.scale * kLog2E);
  for (int head = 0; head < num_kv_heads; head++)
    for (int h = 0; h < group; h++) {
      const float* from = call.base.q + ((token * num_kv_heads + head) * group + h) * dim;
      int64_t row = (head * call.num_tokens + token) * group + h;
      float* q = call.queries + row * dim;
      __builtin_memcpy(q, from, sizeof(float) * (size_t)dim);
      if (call.shape.keys.hadamard) hadamard(q, dim);
      for (int i = 0; i < dim; i += 16) store(q + i, mul(load(q + i), scale));
      cut_query(q, call.shape.keys, dim, call.digits + row * call.digits_stride());
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
