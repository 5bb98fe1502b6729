// Tiles of attention over floating-point pages: what a tile of query rows computes of a few tokens, in registers.
#pragma once

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

// Scores of the first `seen` tokens to weights, in place; their maximum and the sum of the weights to tail.
inline void weigh(float* w, int seen, float* tail) {
  int last = (seen - 1) / 16, in_last = seen - 16 * last;
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
  tail[0] = peak;
  tail[1] = reduce_add(add(total, weight));
}

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

}  // namespace
}  // namespace nibble::NIBBLE_ISA
