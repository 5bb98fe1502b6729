#include "rows.hpp"

#include "simd/doubles.hpp"
#include "simd/math.hpp"

namespace nibble::NIBBLE_ISA {
namespace {

// A last vector that is not full goes through memory of its own; lanes past the end are 0.
inline Floats load_some(const float* x, int64_t left) {
  if (left >= 16) return load(x);
  float padded[16] = {};
  for (int i = 0; i < left; i++) padded[i] = x[i];
  return load(padded);
}
inline void store_some(float* out, Floats x, int64_t left) {
  if (left >= 16) return store(out, x);
  float padded[16];
  store(padded, x);
  for (int i = 0; i < left; i++) out[i] = padded[i];
}

float mean_square(const float* x, int64_t width) {
  Floats sums[4] = {zero(), zero(), zero(), zero()};  // four, because one sum waits for the last
  int64_t i = 0;
  for (; i + 64 <= width; i += 64)
    for (int j = 0; j < 4; j++) {
      Floats v = load(x + i + 16 * j);
      sums[j] = fma(v, v, sums[j]);
    }
  for (int j = 0; i < width; i += 16, j++) {
    Floats v = load_some(x + i, width - i);
    sums[j] = fma(v, v, sums[j]);
  }
  return reduce_add(add(add(sums[0], sums[1]), add(sums[2], sums[3]))) / (float)width;
}

void rms_norm(const float* x, const float* delta, const float* weight, int64_t width, float eps, float* sum,
              float* normed) {
  if (delta) {
    for (int64_t i = 0; i < width; i += 16)
      store_some(sum + i, add(load_some(x + i, width - i), load_some(delta + i, width - i)), width - i);
    x = sum;
  }
  Floats inverse = div(set1(1.0f), sqrt(set1(mean_square(x, width) + eps)));
  for (int64_t i = 0; i < width; i += 16) {
    int64_t left = width - i;
    store_some(normed + i, mul(load_some(weight + i, left), mul(load_some(x + i, left), inverse)), left);
  }
}

void rotate(const float* x, const float* cos, const float* sin, int64_t num_heads, int64_t head_dim, float* out) {
  int64_t half = head_dim / 2;
  for (int64_t head = 0; head < num_heads; head++) {
    for (int64_t i = 0; i < half; i += 16) {
      int64_t left = half - i;
      Floats c = load_some(cos + i, left), s = load_some(sin + i, left);
      Floats low = load_some(x + i, left), high = load_some(x + half + i, left);
      store_some(out + i, fnma(high, s, mul(low, c)), left);
      store_some(out + half + i, fma(low, s, mul(high, c)), left);
    }
    x += head_dim;
    out += head_dim;
  }
}

void swiglu(const float* gate, const float* up, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += 16) {
    int64_t left = count - i;
    Floats g = load_some(gate + i, left);
    Floats silu = div(g, add(set1(1.0f), exp(sub(zero(), g))));
    store_some(out + i, mul(silu, load_some(up + i, left)), left);
  }
}

float highest(const float* x, int64_t count) {
  Floats best = set1(x[0]);
  Ints magnitude = izero();  // magnitudes compare as integers, and NaN as the largest of them
  for (int64_t i = 0; i < count; i += 16) {
    Floats v = count - i >= 16 ? load(x + i) : first((int)(count - i), load_some(x + i, count - i), set1(x[0]));
    best = max(v, best);
    magnitude = imax_unsigned(magnitude, iand(bits(v), iset1(0x7fffffff)));
  }
  return ireduce_max_unsigned(magnitude) > 0x7f800000 ? __builtin_nanf("") : reduce_max(best);
}

// 16 sums, whatever the width of a vector: the same bits in every instruction set.
double exponentials(const float* logits, int64_t count, float highest, double temperature, double* weights) {
  constexpr int kParts = 16 / kDoubles;
  Doubles sums[kParts] = {};
  for (int64_t i = 0; i < count; i += 16) {
    float padded[16];
    const float* in = logits + i;
    if (count - i < 16) {
      for (int j = 0; j < 16; j++) padded[j] = i + j < count ? in[j] : -__builtin_inff();
      in = padded;
    }
    for (int part = 0; part < kParts; part++) {
      Doubles x = exp((load_doubles(in + part * kDoubles) - (double)highest) / temperature);
      sums[part] += x;
      int64_t at = i + part * kDoubles;
      if (weights && at + kDoubles <= count) store_doubles(weights + at, x);
      if (weights && at + kDoubles > count)
        for (int64_t j = 0; at + j < count; j++) weights[at + j] = x[j];
    }
  }
  double lanes[16];
  __builtin_memcpy(lanes, sums, sizeof lanes);
  for (int half = 8; half > 0; half /= 2)
    for (int j = 0; j < half; j++) lanes[j] += lanes[j + half];
  return lanes[0];
}

}  // namespace

const RowOps rows_ops = {rms_norm, rotate, swiglu, highest, exponentials};

}  // namespace nibble::NIBBLE_ISA
