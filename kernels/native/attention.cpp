#include "attention_tile.hpp"

namespace nibble::NIBBLE_ISA {
namespace {

// ---- one split ------------------------------------------------------------------------------------------------------

template <class C>
struct SplitRun {
  using Type = typename C::Type;

  const Attend& call;
  const Unit& unit;
  int64_t first_key;
  int num_rows, first_row;  // rows that see the split: the last num_rows of the unit
  int num_tiles;
  float *q, *weights, *part;
  int64_t stride;  // of part
  const uint8_t* keys[kSplit / 16 + 1];
  const uint8_t* values[kSplit / 16 + 1];

  SplitRun(const Attend& call, const Unit& unit, int split, float* scratch, float* parts)
      : call(call), unit(unit), first_key((int64_t)split * kSplit), stride(call.part_stride()) {
    int64_t hidden = first_key - unit.first_position;  // tokens before the split
    first_row = hidden > 0 ? (int)hidden * call.group : 0;
    num_rows = call.rows_of(unit) - first_row;
    num_tiles = (num_rows + kTileRows - 1) / kTileRows;
    q = scratch;
    weights = scratch + ((int64_t)num_rows * call.shape.head_dim + 15) / 16 * 16;
    part = parts + first_row * stride;
    int page_size = call.shape.page_size, num_pages = (visible(num_rows - 1) + page_size - 1) / page_size;
    const int64_t* table = unit.block_table + first_key / page_size;
    for (int i = 0; i < num_pages; i++) {
      keys[i] = call.pages + call.shape.keys_offset(table[i], unit.kv_head);
      values[i] = call.pages + call.shape.values_offset(table[i], unit.kv_head);
    }
    bool more = first_key + kSplit < unit.context_len();
    keys[num_pages] = values[0];
    values[num_pages] = more ? call.pages + call.shape.keys_offset(table[num_pages], unit.kv_head) : values[0];
  }

  // Tokens of the split that a row sees, at least 1.
  int visible(int row) const {
    int64_t seen = unit.first_position + (first_row + row) / call.group + 1 - first_key;
    return seen < kSplit ? (int)seen : kSplit;
  }
  int tile_start(int tile) const { return (int)((int64_t)num_rows * tile / num_tiles); }  // tiles differ by 1 at most

  void load_queries() {
    int head_dim = call.shape.head_dim;
    int64_t num_heads = (int64_t)call.shape.num_kv_heads * call.group;
    float scale = call.scale * kLog2E;
    for (int row = 0; row < num_rows; row++) {
      int at = first_row + row;
      int64_t head = (int64_t)unit.kv_head * call.group + at % call.group;
      const float* from = call.q + ((unit.first_token + at / call.group) * num_heads + head) * head_dim;
      for (int d = 0; d < head_dim; d++) q[row * head_dim + d] = from[d] * scale;
    }
  }

  void score_all() {
    int head_dim = call.shape.head_dim, page_size = call.shape.page_size, per_page = page_size / 16;
    int num_vectors = (visible(num_rows - 1) + 15) / 16;
    int num_pages = (num_vectors + per_page - 1) / per_page;
    int step = max_of(per_page, kTileVectors);  // how far ahead to fetch: the same place of the next page
    for (int i = 0; i < num_vectors; i += kTileVectors) {
      int vectors = min_of(kTileVectors, num_vectors - i);
      const Type *from[kTileVectors], *ahead[kTileVectors];
      for (int n = 0; n < vectors; n++) {
        int v = i + n;
        from[n] = (const Type*)keys[v / per_page] + v % per_page * 16;
        ahead[n] = (const Type*)keys[min_of((v + step) / per_page, num_pages)] + v % per_page * 16;
      }
      for (int tile = 0; tile < num_tiles; tile++) {
        int row = tile_start(tile), rows = tile_start(tile + 1) - row;
        score<C>(rows, vectors, q + (int64_t)row * head_dim, head_dim, from, ahead, page_size,
                 weights + (int64_t)row * kSplit + 16 * i);
      }
    }
  }

  // A tile passes over the tokens that all its rows see; then each row over the few that are its own.
  void mix_tokens(int tile, const Values<C>& v) {
    int row = tile_start(tile), end = tile_start(tile + 1), common = visible(row);
    mix_channels(row, end - row, v, 0, common);
    for (int r = row + 1; r < end; r++)
      if (visible(r) > common) mix_channels(r, 1, v, common, visible(r));
  }

  void mix_channels(int row, int rows, const Values<C>& v, int first, int stop) {
    int whole = call.shape.head_dim / 16;
    const float* w = weights + (int64_t)row * kSplit;
    float* out = part + row * stride;
    for (int i = 0; i < whole; i += kTileVectors)
      mix<C>(rows, min_of(kTileVectors, whole - i), w, v, first, stop, 16 * i, out, stride);
    if (call.shape.head_dim % 16) mix_half<C>(rows, w, v, first, stop, 16 * whole, out, stride);
  }

  void run() {
    load_queries();
    score_all();
    for (int row = 0; row < num_rows; row++) {
      weigh(weights + (int64_t)row * kSplit, visible(row), part + row * stride + stride - 16);
      for (int i = 0; i < stride - 16; i += 16) store(part + row * stride + i, zero());
    }
    const Values<C> v{values, call.shape.page_size, call.shape.head_dim};
    for (int tile = 0; tile < num_tiles; tile++) mix_tokens(tile, v);
  }
};

void split(const Attend& call, const Unit& unit, int split, float* scratch, float* part) {
  if (call.shape.cell == Cell::f16)
    SplitRun<F16>(call, unit, split, scratch, part).run();
  else
    SplitRun<F32>(call, unit, split, scratch, part).run();
}

void merge(const Attend& call, const Unit& unit, int split, float* merged, const float* part) {
  int64_t stride = call.part_stride(), hidden = (int64_t)split * kSplit - unit.first_position;
  int num_rows = call.rows_of(unit);
  for (int row = hidden > 0 ? (int)hidden * call.group : 0; row < num_rows; row++) {
    float* to = merged + row * stride;
    const float* from = part + row * stride;
    float *to_tail = to + stride - 16;
    const float* from_tail = from + stride - 16;
    float peak = to_tail[0] > from_tail[0] ? to_tail[0] : from_tail[0];
    float keep = exp2_negative(to_tail[0] - peak), take = exp2_negative(from_tail[0] - peak);
    to_tail[0] = peak;
    to_tail[1] = __builtin_fmaf(from_tail[1], take, to_tail[1] * keep);
    Floats keeps = set1(keep), takes = set1(take);
    for (int i = 0; i < stride - 16; i += 16) store(to + i, fma(load(from + i), takes, mul(load(to + i), keeps)));
  }
}

void finish(const Attend& call, const Unit& unit, const float* merged) {
  int64_t stride = call.part_stride(), num_heads = (int64_t)call.shape.num_kv_heads * call.group;
  int head_dim = call.shape.head_dim;
  for (int row = 0; row < call.rows_of(unit); row++) {
    const float* from = merged + row * stride;
    int64_t head = (int64_t)unit.kv_head * call.group + row % call.group;
    float* out = call.out + ((unit.first_token + row / call.group) * num_heads + head) * head_dim;
    Floats total = set1(from[stride - 15]);
    float lanes[16];
    for (int d = 0; d < head_dim; d += 16) {
      Floats y = div(load(from + d), total);
      store(lanes, y);
      __builtin_memcpy(out + d, lanes, sizeof(float) * (size_t)min_of(16, head_dim - d));
    }
  }
}

// ---- store ----------------------------------------------------------------------------------------------------------

template <class C>
void store_head(const CacheShape& shape, const float* k, const float* v, const int64_t* slots, int64_t num_tokens,
                uint8_t* pages, int head) {
  using Type = typename C::Type;
  int head_dim = shape.head_dim, page_size = shape.page_size;
  Floats limit = set1(C::limit), lowest = set1(-C::limit);
  for (int64_t token = 0; token < num_tokens; token++) {
    int64_t page = slots[token] / page_size, row = slots[token] % page_size;
    Type* keys = (Type*)(pages + shape.keys_offset(page, head)) + row;
    Type* values = (Type*)(pages + shape.values_offset(page, head)) + row * head_dim;
    int64_t at = (token * shape.num_kv_heads + head) * head_dim;
    for (int d = 0; d < head_dim; d += 16) {
      int count = min_of(16, head_dim - d);
      float in[16] = {};
      Type cells[16];
      __builtin_memcpy(in, k + at + d, sizeof(float) * (size_t)count);
      C::write(cells, max(lowest, min(limit, load(in))));
      for (int i = 0; i < count; i++) keys[(int64_t)(d + i) * page_size] = cells[i];
      __builtin_memcpy(in, v + at + d, sizeof(float) * (size_t)count);
      C::write(cells, max(lowest, min(limit, load(in))));
      __builtin_memcpy(values + d, cells, sizeof(Type) * (size_t)count);
    }
  }
}

void store_tokens(const CacheShape& shape, const float* k, const float* v, const int64_t* slots, int64_t num_tokens,
                  uint8_t* pages, int head) {
  if (shape.cell == Cell::f16)
    store_head<F16>(shape, k, v, slots, num_tokens, pages, head);
  else
    store_head<F32>(shape, k, v, slots, num_tokens, pages, head);
}

void exp2_of(const float* x, float* y, int count) {
  float lanes[16] = {};
  __builtin_memcpy(lanes, x, sizeof(float) * (size_t)count);
  store(lanes, exp2_negative(load(lanes)));
  __builtin_memcpy(y, lanes, sizeof(float) * (size_t)count);
}

}  // namespace

const AttentionOps attention_ops = {split, merge, finish, store_tokens, exp2_of};

}  // namespace nibble::NIBBLE_ISA
