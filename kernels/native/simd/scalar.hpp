// 16 lanes in plain C++: the definition the other instruction sets are held to, bit for bit.
#pragma once

#include <cstdint>
#include <cstring>

#define NIBBLE_UNROLL  // lanes are loops already: unrolled, a kernel takes minutes to compile

namespace nibble::scalar {

struct Floats {
  float v[16];
};
struct Ints {
  int32_t v[16];
};
struct Bytes {
  uint8_t v[64];
};

inline constexpr bool kFastDot = false;
inline constexpr int kRegisters = 0;

template <class Out, int N, class F>
inline Out lanes(F f) {
  Out out;
  for (int i = 0; i < N; i++) out.v[i] = f(i);
  return out;
}
template <class F>
inline Floats each(F f) { return lanes<Floats, 16>(f); }
template <class F>
inline Ints ieach(F f) { return lanes<Ints, 16>(f); }
template <class F>
inline Bytes beach(F f) { return lanes<Bytes, 64>(f); }

inline float widen_f16(uint16_t h) {  // exact; every half is a float
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 0x3ff, out;
  if (exponent == 31) {
    out = sign | 0x7f800000 | (fraction << 13) | (fraction ? 0x400000 : 0);
  } else if (exponent != 0) {
    out = sign | ((exponent + 112) << 23) | (fraction << 13);
  } else {
    float value = (float)fraction * 0x1p-24f;
    std::memcpy(&out, &value, 4);
    out |= sign;
  }
  float value;
  std::memcpy(&value, &out, 4);
  return value;
}
inline uint16_t narrow_f16(float x) {  // to nearest, ties to even; beyond the range an infinity
  uint32_t in;
  std::memcpy(&in, &x, 4);
  uint16_t sign = (uint16_t)(in >> 16 & 0x8000);
  uint32_t magnitude = in & 0x7fffffff;
  if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
  if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
  if (magnitude < 0x38800000) {  // below the smallest normal half: a multiple of 2^-24
    float scaled;
    std::memcpy(&scaled, &magnitude, 4);
    return (uint16_t)(sign | (uint16_t)__builtin_nearbyintf(scaled * 0x1p24f));
  }
  uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return (uint16_t)(sign | ((rounded - 0x38000000) >> 13));
}

inline Floats zero() { return each([](int) { return 0.0f; }); }
inline Floats set1(float x) { return each([=](int) { return x; }); }
inline Floats load(const float* p) { return each([=](int i) { return p[i]; }); }
inline void store(float* p, Floats x) { std::memcpy(p, x.v, sizeof x.v); }
inline Floats add(Floats a, Floats b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
inline Floats sub(Floats a, Floats b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
inline Floats mul(Floats a, Floats b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
inline Floats div(Floats a, Floats b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
inline Floats fma(Floats a, Floats b, Floats c) {
  return each([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
}
inline Floats fnma(Floats a, Floats b, Floats c) {
  return each([&](int i) { return __builtin_fmaf(-a.v[i], b.v[i], c.v[i]); });
}
inline Floats max(Floats a, Floats b) { return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline Floats min(Floats a, Floats b) { return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
inline Floats sqrt(Floats a) { return each([&](int i) { return __builtin_sqrtf(a.v[i]); }); }
inline Floats round(Floats a) { return each([&](int i) { return __builtin_nearbyintf(a.v[i]); }); }
inline Floats load_f16(const uint16_t* p) { return each([=](int i) { return widen_f16(p[i]); }); }
inline void store_f16(uint16_t* p, Floats x) {
  for (int i = 0; i < 16; i++) p[i] = narrow_f16(x.v[i]);
}
inline Floats load_e4m3(const uint8_t* p) {
  return each([=](int i) {
    uint16_t half = (uint16_t)((p[i] & 0x80) << 8 | (p[i] & 0x7f) << 7);
    return widen_f16((uint16_t)(half | ((half + 0x80) & 0x4000)));
  });
}
inline Floats load_bf16(const uint16_t* p) {
  return each([=](int i) {
    uint32_t wide = (uint32_t)p[i] << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  });
}

inline Ints izero() { return ieach([](int) { return 0; }); }
inline Ints iset1(int32_t x) { return ieach([=](int) { return x; }); }
inline Ints iload(const int32_t* p) { return ieach([=](int i) { return p[i]; }); }
inline void istore(int32_t* p, Ints x) { std::memcpy(p, x.v, sizeof x.v); }
inline int32_t wrap(uint32_t x) { return (int32_t)x; }  // sums wrap around, as the vector instructions do
inline Ints iadd(Ints a, Ints b) { return ieach([&](int i) { return wrap((uint32_t)a.v[i] + (uint32_t)b.v[i]); }); }
inline Ints isub(Ints a, Ints b) { return ieach([&](int i) { return wrap((uint32_t)a.v[i] - (uint32_t)b.v[i]); }); }
inline Ints imul(Ints a, Ints b) { return ieach([&](int i) { return wrap((uint32_t)a.v[i] * (uint32_t)b.v[i]); }); }
inline Ints iand(Ints a, Ints b) { return ieach([&](int i) { return a.v[i] & b.v[i]; }); }
inline Ints imax_unsigned(Ints a, Ints b) {
  return ieach([&](int i) { return (uint32_t)a.v[i] > (uint32_t)b.v[i] ? a.v[i] : b.v[i]; });
}
template <int N>
inline Ints ishl(Ints a) { return ieach([&](int i) { return wrap((uint32_t)a.v[i] << N); }); }
template <int N>
inline Ints isra(Ints a) { return ieach([&](int i) { return a.v[i] >> N; }); }
inline Ints load_u8(const uint8_t* p) { return ieach([=](int i) { return (int32_t)p[i]; }); }
inline void store_i8(int8_t* p, Ints x) {  // saturates
  for (int i = 0; i < 16; i++) p[i] = (int8_t)(x.v[i] > 127 ? 127 : x.v[i] < -128 ? -128 : x.v[i]);
}
inline Bytes pack_u8(Ints a, Ints b, Ints c, Ints d) {
  const Ints* parts[4] = {&a, &b, &c, &d};
  return beach([&](int i) {
    int32_t x = parts[i / 16]->v[i % 16];
    return (uint8_t)(x > 255 ? 255 : x < 0 ? 0 : x);
  });
}
inline Floats to_float(Ints x) { return each([&](int i) { return (float)x.v[i]; }); }
inline Ints to_int(Floats x) {  // to nearest, ties to even; what does not fit becomes the lowest integer, as in SSE
  return ieach([&](int i) {
    float r = __builtin_nearbyintf(x.v[i]);
    return r >= -0x1p31f && r < 0x1p31f ? (int32_t)r : INT32_MIN;
  });
}
inline Ints bits(Floats x) {
  Ints out;
  std::memcpy(out.v, x.v, sizeof x.v);
  return out;
}
inline Floats as_float(Ints x) {
  Floats out;
  std::memcpy(out.v, x.v, sizeof x.v);
  return out;
}
inline Floats scale_by_power_of_2(Floats x, Floats n) {  // in two steps, of which only the second rounds
  Ints whole = to_int(n), half = isra<1>(whole), bias = iset1(127);
  x = mul(x, as_float(ishl<23>(iadd(half, bias))));
  return mul(x, as_float(ishl<23>(iadd(isub(whole, half), bias))));
}
inline Floats first(int count, Floats x, Floats other) {
  return each([&](int i) { return i < count ? x.v[i] : other.v[i]; });
}

inline Bytes bload(const void* p) {
  Bytes out;
  std::memcpy(out.v, p, 64);
  return out;
}
inline void bstore(void* p, Bytes x) { std::memcpy(p, x.v, 64); }
inline Bytes bset1(uint8_t x) { return beach([=](int) { return x; }); }
inline Bytes band(Bytes a, Bytes b) { return beach([&](int i) { return (uint8_t)(a.v[i] & b.v[i]); }); }
inline Bytes bor(Bytes a, Bytes b) { return beach([&](int i) { return (uint8_t)(a.v[i] | b.v[i]); }); }
inline Bytes badd(Bytes a, Bytes b) { return beach([&](int i) { return (uint8_t)(a.v[i] + b.v[i]); }); }
template <int N>
inline Bytes bshr(Bytes a) {
  return beach([&](int i) {
    uint32_t word = (uint32_t)a.v[i & ~1] | (uint32_t)a.v[i | 1] << 8;
    return (uint8_t)(word >> N >> (i & 1 ? 8 : 0));
  });
}
template <int N>
inline Bytes bshl(Bytes a) {
  return beach([&](int i) {
    uint32_t word = (uint32_t)a.v[i & ~1] | (uint32_t)a.v[i | 1] << 8;
    return (uint8_t)(word << N >> (i & 1 ? 8 : 0));
  });
}
inline Bytes lookup(Bytes table, Bytes index) { return beach([&](int i) { return table.v[index.v[i] & 15]; }); }
inline Bytes load_table(const uint8_t* p) { return beach([=](int i) { return p[i & 15]; }); }
inline Bytes bspread(const uint8_t* mask, uint8_t value) {
  return beach([=](int i) { return (uint8_t)(mask[i / 8] >> (i % 8) & 1 ? value : 0); });
}
inline Ints dot(Ints acc, Bytes u, const int8_t* s) {
  return ieach([&](int i) {
    int32_t sum = acc.v[i];
    for (int j = 0; j < 4; j++) sum += (int32_t)u.v[4 * i + j] * s[j];
    return sum;
  });
}
struct Four {
  int8_t v[4];
};
inline Four four(const int8_t* s) {
  Four out;
  std::memcpy(out.v, s, 4);
  return out;
}
inline Ints dot(Ints acc, Bytes u, Four s) { return dot(acc, u, s.v); }
inline Ints dot_small(Ints acc, Bytes u, Four s) { return dot(acc, u, s.v); }
inline Ints dot_codes(Ints acc, Bytes u, Four s) { return dot_small(acc, u, s); }
inline Ints dot_unsigned(Ints acc, Four u, Bytes s) {
  return ieach([&](int i) {
    int32_t sum = acc.v[i];
    for (int j = 0; j < 4; j++) sum += (int32_t)(uint8_t)u.v[j] * (int8_t)s.v[4 * i + j];
    return sum;
  });
}
inline Bytes badd_where(Bytes a, const uint8_t* mask, uint8_t value) { return badd(a, bspread(mask, value)); }
inline Ints word_shr(Bytes a, int n) {
  return ieach([&](int i) {
    uint32_t word;
    std::memcpy(&word, a.v + 4 * i, 4);
    return wrap(word >> n);
  });
}
inline Bytes bword_shr(Bytes a, int n) {
  Ints shifted = word_shr(a, n);
  Bytes out;
  std::memcpy(out.v, shifted.v, 64);
  return out;
}
inline Bytes interleave(const uint8_t* rows, int64_t row_bytes) {
  return beach([&](int i) { return rows[i % 4 * row_bytes + i / 4]; });
}
inline void interleave_pair(const uint8_t* rows, int64_t row_bytes, Bytes& first, Bytes& second) {
  first = interleave(rows, row_bytes), second = interleave(rows + 16, row_bytes);
}
inline Bytes take_trit(Bytes& x) {
  Bytes trits = beach([&](int i) { return (uint8_t)(3 * x.v[i] >> 8); });
  x = beach([&](int i) { return (uint8_t)(3 * x.v[i]); });
  return trits;
}
template <int distance>
inline Floats swap_lanes(Floats x) { return each([&](int i) { return x.v[i ^ distance]; }); }
inline Floats choose(Floats table, Ints index) { return each([&](int i) { return table.v[index.v[i] & 15]; }); }
inline void prefetch(const void*) {}
inline void prefetch_l2(const void*) {}

inline float reduce_add(Floats x) {
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; i++) x.v[i] += x.v[i + half];
  return x.v[0];
}
inline float reduce_max(Floats x) {
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; i++) x.v[i] = x.v[i] > x.v[i + half] ? x.v[i] : x.v[i + half];
  return x.v[0];
}
inline int32_t ireduce_add(Ints x) {
  uint32_t sum = 0;
  for (int i = 0; i < 16; i++) sum += (uint32_t)x.v[i];
  return wrap(sum);
}
inline uint32_t ireduce_max_unsigned(Ints x) {
  uint32_t best = 0;
  for (int i = 0; i < 16; i++) best = (uint32_t)x.v[i] > best ? (uint32_t)x.v[i] : best;
  return best;
}

}  // namespace nibble::scalar
