#include "attention.hpp"

#include "simd/simd.hpp"

namespace nibble::NIBBLE_ISA {
namespace {

// A tile is kTileRows x kTileVectors sums in registers: 24 of 32 in AVX-512, 12 of 16 halves in AVX2.
constexpr int kTileRows = 6;
#if defined(NIBBLE_ISA_avx512)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 1;
#endif
constexpr float kLog2E = 1.4426950408889634f;

struct F16 {
  using Type = uint16_t;
  static constexpr int per_line = 2;  // vectors of a cache line
  static constexpr float limit = 65504.0f;
  static Floats read(const uint16_t* p) { return load_f16(p); }
  static void write(uint16_t* p, Floats x) { store_f16(p, x); }
};
struct F32 {
  using Type = float;
  static constexpr int per_line = 1;
  static constexpr float limit = 0x1.fffffep127f;
  static Floats read(const float* p) { return load(p); }
  static void write(float* p, Floats x) { NIBBLE_ISA::store(p, x); }
};

// 2^x for x <= 0, NaN for NaN. x = n + f with |f| <= 1/2; 2^f by a polynomial of degree 6, fitted for the least largest
// relative error (2e-9, far below a rounding); n goes into the exponent. Within 1 ulp; below -125 it stays at 2^-125.
inline Floats exp2_negative(Floats x) {
  x = max(set1(-125.0f), x);
  Floats n = round(x);
  Floats f = sub(x, n);
  Floats p = set1(0x1.41fbbcp-13f);
  p = fma(p, f, set1(0x1.5f3e54p-10f));
  p = fma(p, f, set1(0x1.3b2d4cp-7f));
  p = fma(p, f, set1(0x1.c6aee8p-5f));
  p = fma(p, f, set1(0x1.ebfbdcp-3f));
  p = fma(p, f, set1(0x1.62e430p-1f));
  p = fma(p, f, set1(1.0f));
  return as_float(iadd(bits(p), ishl<23>(to_int(n))));
}
inline float exp2_negative(float x) {
  float lanes[16];
  store(lanes, exp2_negative(set1(x)));
  return lanes[0];
}

inline int min_of(int a, int b) { return a < b ? a : b; }
inline int max_of(int a, int b) { return a > b ? a : b; }

// ---- the two products -----------------------------------------------------------------------------------------------
//
// Both fetch a page while they read the one before, into the second cache: the first keeps few misses in flight, which
// held a thread to 11 GB/s where it now reads 21.

// scores[r, 16 n + lane] = sum over channels of q[r, d] k[d, token]; keys[n] is the first channel of 16 tokens.
template <class C, int kRows, int kVectors>
void score_tile(const float* q, int head_dim, const typename C::Type* const* keys, const typename C::Type* const* ahead,
                int64_t stride, float* scores) {
  Floats sums[kRows][kVectors];
  for (int r = 0; r < kRows; r++)
    for (int n = 0; n < kVectors; n++) sums[r][n] = zero();
  const typename C::Type *from[kVectors], *next[kVectors];
  for (int n = 0; n < kVectors; n++) from[n] = keys[n], next[n] = ahead[n];
  for (int d = 0; d < head_dim; d++) {
    Floats k[kVectors];
    for (int n = 0; n < kVectors; n++) {
      k[n] = C::read(from[n] + d * stride);
      if (n % C::per_line == 0) prefetch_l2(next[n] + d * stride);
    }
    for (int r = 0; r < kRows; r++) {
      Floats x = set1(q[r * head_dim + d]);
      for (int n = 0; n < kVectors; n++) sums[r][n] = fma(x, k[n], sums[r][n]);
    }
  }
  for (int r = 0; r < kRows; r++)
    for (int n = 0; n < kVectors; n++) store(scores + r * kSplit + 16 * n, sums[r][n]);
}

// Reads the last 8 channels of a row whose length is no multiple of 16, and not what follows them.
template <class C>
struct Half {
  using Type = typename C::Type;
  static constexpr int per_line = 1;
  static Floats read(const Type* p) {
    Type padded[16] = {};
    __builtin_memcpy(padded, p, 8 * sizeof(Type));
    return C::read(padded);
  }
};

// Values of consecutive tokens: page i holds tokens i * page_size ... of the split.
template <class C>
struct Values {
  const uint8_t* const* pages;  // one more than there are: what to fetch while the last is read
  int page_size, head_dim;
};

// out[r, 16 n + lane] += sum over tokens first .. stop - 1 of weights[r, t] v[t, channel + 16 n + lane].
template <class C, int kRows, int kVectors>
void mix_tile(const float* weights, const Values<C>& v, int first, int stop, int channel, float* out, int64_t stride) {
  using Type = typename C::Type;
  Floats sums[kRows][kVectors];
  for (int r = 0; r < kRows; r++)
    for (int n = 0; n < kVectors; n++) sums[r][n] = load(out + r * stride + channel + 16 * n);
  while (first < stop) {
    int page = first / v.page_size, row = first % v.page_size;
    int count = min_of(stop - first, v.page_size - row);
    int64_t offset = (int64_t)row * v.head_dim + channel;
    const Type* from = (const Type*)v.pages[page] + offset;
    const Type* next = (const Type*)v.pages[page + 1] + offset;
    const float* w = weights + first;
    for (int t = 0; t < count; t++, from += v.head_dim, next += v.head_dim) {
      Floats values[kVectors];
      for (int n = 0; n < kVectors; n++) {
        values[n] = C::read(from + 16 * n);
        if (n % C::per_line == 0) prefetch_l2(next + 16 * n);
      }
      for (int r = 0; r < kRows; r++) {
        Floats x = set1(w[r * kSplit + t]);
        for (int n = 0; n < kVectors; n++) sums[r][n] = fma(x, values[n], sums[r][n]);
      }
    }
    first += count;
  }
  for (int r = 0; r < kRows; r++)
    for (int n = 0; n < kVectors; n++) store(out + r * stride + channel + 16 * n, sums[r][n]);
}

#define NIBBLE_BY_ROWS(function, vectors, ...)            \
  switch (rows) {                                         \
    case 1: return function<C, 1, vectors>(__VA_ARGS__);  \
    case 2: return function<C, 2, vectors>(__VA_ARGS__);  \
    case 3: return function<C, 3, vectors>(__VA_ARGS__);  \
    case 4: return function<C, 4, vectors>(__VA_ARGS__);  \
    case 5: return function<C, 5, vectors>(__VA_ARGS__);  \
    default: return function<C, 6, vectors>(__VA_ARGS__); \
  }

#if defined(NIBBLE_ISA_avx512)
#define NIBBLE_BY_SHAPE(function, ...)                            \
  switch (vectors) {                                              \
    case 1: NIBBLE_BY_ROWS(function, 1, __VA_ARGS__) break;       \
    case 2: NIBBLE_BY_ROWS(function, 2, __VA_ARGS__) break;       \
    case 3: NIBBLE_BY_ROWS(function, 3, __VA_ARGS__) break;       \
    default: NIBBLE_BY_ROWS(function, 4, __VA_ARGS__)             \
  }
#else
#define NIBBLE_BY_SHAPE(function, ...) NIBBLE_BY_ROWS(function, 1, __VA_ARGS__)
#endif

template <class C>
void score(int rows, [[maybe_unused]] int vectors, const float* q, int head_dim, const typename C::Type* const* keys,
           const typename C::Type* const* ahead, int64_t stride, float* scores) {
  NIBBLE_BY_SHAPE(score_tile, q, head_dim, keys, ahead, stride, scores)
}

template <class C>
void mix(int rows, [[maybe_unused]] int vectors, const float* weights, const Values<C>& v, int first, int stop,
         int channel, float* out, int64_t stride) {
  NIBBLE_BY_SHAPE(mix_tile, weights, v, first, stop, channel, out, stride)
}

template <class C>
void mix_half(int rows, const float* weights, const Values<C>& v, int first, int stop, int channel, float* out,
              int64_t stride) {
  const Values<Half<C>> half{v.pages, v.page_size, v.head_dim};
  for (int r = 0; r < rows; r++)
    mix_tile<Half<C>, 1, 1>(weights + r * kSplit, half, first, stop, channel, out + r * stride, stride);
}

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

  // Scores to weights, in place; the row's maximum and the sum of its weights go behind its sums.
  void weigh(int row) {
    float* w = weights + (int64_t)row * kSplit;
    int seen = visible(row), last = (seen - 1) / 16, in_last = seen - 16 * last;
    Floats hidden = set1(-__builtin_inff()), highest = hidden;
    store(w + 16 * last, first(in_last, load(w + 16 * last), hidden));
    for (int i = 0; i <= last; i++) highest = max(load(w + 16 * i), highest);
    float peak = reduce_max(highest);
    Floats peaks = set1(peak), total = zero();
    for (int i = 0; i < last; i++) {
      Floats weight = exp2_negative(sub(load(w + 16 * i), peaks));
      store(w + 16 * i, weight);
      total = add(total, weight);
    }
    Floats weight = first(in_last, exp2_negative(sub(load(w + 16 * last), peaks)), zero());
    store(w + 16 * last, weight);
    float* tail = part + row * stride + stride - 16;
    tail[0] = peak;
    tail[1] = reduce_add(add(total, weight));
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
      weigh(row);
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
