// 16 lanes in AVX2, FMA and F16C: two registers each.
#pragma once

#include <immintrin.h>

#include <cstdint>

#define NIBBLE_UNROLL _Pragma("GCC unroll 16")  // before a loop whose arrays are to stay in registers

namespace nibble::avx2 {

struct Floats {
  __m256 a, b;
};
struct Ints {
  __m256i a, b;
};
struct Bytes {
  __m256i a, b;
};

inline constexpr bool kFastDot = false;
inline constexpr int kRegisters = 8;

#define NIBBLE_PAIR(type, expression_a, expression_b) \
  return type { expression_a, expression_b }

inline Floats zero() { NIBBLE_PAIR(Floats, _mm256_setzero_ps(), _mm256_setzero_ps()); }
inline Floats set1(float x) { NIBBLE_PAIR(Floats, _mm256_set1_ps(x), _mm256_set1_ps(x)); }
inline Floats load(const float* p) { NIBBLE_PAIR(Floats, _mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)); }
inline void store(float* p, Floats x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline Floats add(Floats x, Floats y) { NIBBLE_PAIR(Floats, _mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)); }
inline Floats sub(Floats x, Floats y) { NIBBLE_PAIR(Floats, _mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)); }
inline Floats mul(Floats x, Floats y) { NIBBLE_PAIR(Floats, _mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)); }
inline Floats div(Floats x, Floats y) { NIBBLE_PAIR(Floats, _mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)); }
inline Floats fma(Floats x, Floats y, Floats z) {
  NIBBLE_PAIR(Floats, _mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b));
}
inline Floats fnma(Floats x, Floats y, Floats z) {
  NIBBLE_PAIR(Floats, _mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b));
}
inline Floats max(Floats x, Floats y) { NIBBLE_PAIR(Floats, _mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)); }
inline Floats min(Floats x, Floats y) { NIBBLE_PAIR(Floats, _mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)); }
inline Floats sqrt(Floats x) { NIBBLE_PAIR(Floats, _mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)); }
inline Floats round(Floats x) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  NIBBLE_PAIR(Floats, _mm256_round_ps(x.a, nearest), _mm256_round_ps(x.b, nearest));
}
inline Floats load_f16(const uint16_t* p) {
  NIBBLE_PAIR(Floats, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
              _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8))));
}
inline Floats load_e4m3(const uint8_t* p) {
  __m256i x = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)), 7);
  x = _mm256_and_si256(x, _mm256_set1_epi16((int16_t)0xbfff));
  __m256i carry = _mm256_add_epi16(x, _mm256_set1_epi16(0x80));
  x = _mm256_or_si256(x, _mm256_and_si256(carry, _mm256_set1_epi16(0x4000)));
  NIBBLE_PAIR(Floats, _mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1)));
}
inline void store_f16(uint16_t* p, Floats x) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.a, nearest));
  _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(x.b, nearest));
}
inline __m256 widen_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline Floats load_bf16(const uint16_t* p) { NIBBLE_PAIR(Floats, widen_bf16(p), widen_bf16(p + 8)); }

inline Ints izero() { NIBBLE_PAIR(Ints, _mm256_setzero_si256(), _mm256_setzero_si256()); }
inline Ints iset1(int32_t x) { NIBBLE_PAIR(Ints, _mm256_set1_epi32(x), _mm256_set1_epi32(x)); }
inline Ints iload(const int32_t* p) {
  NIBBLE_PAIR(Ints, _mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 8)));
}
inline void istore(int32_t* p, Ints x) {
  _mm256_storeu_si256((__m256i*)p, x.a);
  _mm256_storeu_si256((__m256i*)(p + 8), x.b);
}
inline Ints iadd(Ints x, Ints y) { NIBBLE_PAIR(Ints, _mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)); }
inline Ints isub(Ints x, Ints y) { NIBBLE_PAIR(Ints, _mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)); }
inline Ints imul(Ints x, Ints y) { NIBBLE_PAIR(Ints, _mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)); }
inline Ints iand(Ints x, Ints y) { NIBBLE_PAIR(Ints, _mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)); }
inline Ints imax_unsigned(Ints x, Ints y) { NIBBLE_PAIR(Ints, _mm256_max_epu32(x.a, y.a), _mm256_max_epu32(x.b, y.b)); }
template <int N>
inline Ints ishl(Ints x) { NIBBLE_PAIR(Ints, _mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)); }
template <int N>
inline Ints isra(Ints x) { NIBBLE_PAIR(Ints, _mm256_srai_epi32(x.a, N), _mm256_srai_epi32(x.b, N)); }
inline Ints load_u8(const uint8_t* p) {
  NIBBLE_PAIR(Ints, _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)),
              _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))));
}
inline void store_i8(int8_t* p, Ints x) {  // saturates
  __m256i words = _mm256_packs_epi32(x.a, x.b);                // a0-3 b0-3 | a4-7 b4-7
  words = _mm256_permute4x64_epi64(words, 0b11011000);         // a0-7 | b0-7
  __m128i packed = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128((__m128i*)p, packed);
}
inline __m256i pack_u8_half(Ints a, Ints b) {
  __m256i words = _mm256_packus_epi16(_mm256_packs_epi32(a.a, a.b), _mm256_packs_epi32(b.a, b.b));
  return _mm256_permutevar8x32_epi32(words, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
inline Bytes pack_u8(Ints a, Ints b, Ints c, Ints d) {
  NIBBLE_PAIR(Bytes, pack_u8_half(a, b), pack_u8_half(c, d));
}
inline Floats to_float(Ints x) { NIBBLE_PAIR(Floats, _mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)); }
inline Ints to_int(Floats x) { NIBBLE_PAIR(Ints, _mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)); }
inline Ints bits(Floats x) { NIBBLE_PAIR(Ints, _mm256_castps_si256(x.a), _mm256_castps_si256(x.b)); }
inline Floats as_float(Ints x) { NIBBLE_PAIR(Floats, _mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)); }
inline Floats scale_by_power_of_2(Floats x, Floats n) {  // in two steps, of which only the second rounds
  Ints whole = to_int(n), half = isra<1>(whole), bias = iset1(127);
  x = mul(x, as_float(ishl<23>(iadd(half, bias))));
  return mul(x, as_float(ishl<23>(iadd(isub(whole, half), bias))));
}
inline Floats first(int count, Floats x, Floats other) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  __m256i low = _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lanes);
  __m256i high = _mm256_cmpgt_epi32(_mm256_set1_epi32(count - 8), lanes);
  NIBBLE_PAIR(Floats, _mm256_blendv_ps(other.a, x.a, _mm256_castsi256_ps(low)),
              _mm256_blendv_ps(other.b, x.b, _mm256_castsi256_ps(high)));
}

inline Bytes bload(const void* p) {
  NIBBLE_PAIR(Bytes, _mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1));
}
inline void bstore(void* p, Bytes x) {
  _mm256_storeu_si256((__m256i*)p, x.a);
  _mm256_storeu_si256((__m256i*)p + 1, x.b);
}
inline Bytes bset1(uint8_t x) { NIBBLE_PAIR(Bytes, _mm256_set1_epi8((char)x), _mm256_set1_epi8((char)x)); }
inline Bytes band(Bytes x, Bytes y) { NIBBLE_PAIR(Bytes, _mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)); }
inline Bytes bor(Bytes x, Bytes y) { NIBBLE_PAIR(Bytes, _mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)); }
inline Bytes badd(Bytes x, Bytes y) { NIBBLE_PAIR(Bytes, _mm256_add_epi8(x.a, y.a), _mm256_add_epi8(x.b, y.b)); }
template <int N>
inline Bytes bshr(Bytes x) { NIBBLE_PAIR(Bytes, _mm256_srli_epi16(x.a, N), _mm256_srli_epi16(x.b, N)); }
template <int N>
inline Bytes bshl(Bytes x) { NIBBLE_PAIR(Bytes, _mm256_slli_epi16(x.a, N), _mm256_slli_epi16(x.b, N)); }
inline Bytes lookup(Bytes table, Bytes index) {
  NIBBLE_PAIR(Bytes, _mm256_shuffle_epi8(table.a, index.a), _mm256_shuffle_epi8(table.b, index.b));
}
inline Bytes load_table(const uint8_t* p) {
  __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
  NIBBLE_PAIR(Bytes, table, table);
}
inline __m256i spread_half(const uint8_t* mask, __m256i value) {
  int32_t m;
  __builtin_memcpy(&m, mask, 4);
  const __m256i source = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit = _mm256_set1_epi64x((long long)0x8040201008040201);
  __m256i spread = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(m), source), bit);
  return _mm256_and_si256(_mm256_cmpeq_epi8(spread, bit), value);
}
inline Bytes bspread(const uint8_t* mask, uint8_t value) {
  __m256i v = _mm256_set1_epi8((char)value);
  NIBBLE_PAIR(Bytes, spread_half(mask, v), spread_half(mask + 4, v));
}
// maddubs would saturate from 7 bits on, so even and odd bytes are multiplied as words: the sum of two products of
// 255 and 127 fits 32 bits.
inline __m256i dot_half(__m256i acc, __m256i u, __m256i s) {
  const __m256i low = _mm256_set1_epi16(0x00ff);
  __m256i even = _mm256_madd_epi16(_mm256_and_si256(u, low), _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
  __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8));
  return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
}
inline Ints dot(Ints acc, Bytes u, const int8_t* s) {
  int32_t four;
  __builtin_memcpy(&four, s, 4);
  __m256i v = _mm256_set1_epi32(four);
  NIBBLE_PAIR(Ints, dot_half(acc.a, u.a, v), dot_half(acc.b, u.b, v));
}
struct Four {
  __m256i word;
};
inline Four four(const int8_t* s) {
  int32_t word;
  __builtin_memcpy(&word, s, 4);
  return {_mm256_set1_epi32(word)};
}
inline Ints dot(Ints acc, Bytes u, Four s) {
  NIBBLE_PAIR(Ints, dot_half(acc.a, u.a, s.word), dot_half(acc.b, u.b, s.word));
}
// Two products of 127 and -128 fit 16 bits.
inline __m256i dot_small_half(__m256i acc, __m256i u, __m256i s) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
}
inline Ints dot_small(Ints acc, Bytes u, Four s) {
  NIBBLE_PAIR(Ints, dot_small_half(acc.a, u.a, s.word), dot_small_half(acc.b, u.b, s.word));
}
inline Ints dot_codes(Ints acc, Bytes u, Four s) { return dot_small(acc, u, s); }
inline Ints dot_unsigned(Ints acc, Four u, Bytes s) {
  NIBBLE_PAIR(Ints, dot_small_half(acc.a, u.word, s.a), dot_small_half(acc.b, u.word, s.b));
}
inline Bytes badd_where(Bytes a, const uint8_t* mask, uint8_t value) { return badd(a, bspread(mask, value)); }
inline Ints word_shr(Bytes x, int n) { NIBBLE_PAIR(Ints, _mm256_srli_epi32(x.a, n), _mm256_srli_epi32(x.b, n)); }
inline Bytes bword_shr(Bytes x, int n) { NIBBLE_PAIR(Bytes, _mm256_srli_epi32(x.a, n), _mm256_srli_epi32(x.b, n)); }
inline __m256i join(__m128i low, __m128i high) { return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1); }
inline Bytes interleave(const uint8_t* rows, int64_t row_bytes) {
  auto row = [&](int i) { return _mm_loadu_si128((const __m128i*)(rows + i * row_bytes)); };
  __m128i x = row(0), y = row(1), z = row(2), w = row(3);
  __m128i xy = _mm_unpacklo_epi8(x, y), zw = _mm_unpacklo_epi8(z, w);
  __m256i first = join(_mm_unpacklo_epi16(xy, zw), _mm_unpackhi_epi16(xy, zw));
  xy = _mm_unpackhi_epi8(x, y), zw = _mm_unpackhi_epi8(z, w);
  NIBBLE_PAIR(Bytes, first, join(_mm_unpacklo_epi16(xy, zw), _mm_unpackhi_epi16(xy, zw)));
}
inline void interleave_pair(const uint8_t* rows, int64_t row_bytes, Bytes& first, Bytes& second) {
  first = interleave(rows, row_bytes), second = interleave(rows + 16, row_bytes);
}
inline __m256i take_trit_half(__m256i& x) {
  const __m256i low = _mm256_set1_epi16(0x00ff), three = _mm256_set1_epi16(3);
  __m256i even = _mm256_mullo_epi16(_mm256_and_si256(x, low), three);
  __m256i odd = _mm256_mullo_epi16(_mm256_srli_epi16(x, 8), three);
  x = _mm256_or_si256(_mm256_and_si256(even, low), _mm256_slli_epi16(odd, 8));
  return _mm256_or_si256(_mm256_srli_epi16(even, 8), _mm256_andnot_si256(low, odd));
}
inline Bytes take_trit(Bytes& x) {
  __m256i a = take_trit_half(x.a), b = take_trit_half(x.b);
  NIBBLE_PAIR(Bytes, a, b);
}
template <int distance>
inline Floats swap_lanes(Floats x) {
  __m256 a = x.a, b = x.b;
  if constexpr (distance == 1) NIBBLE_PAIR(Floats, _mm256_permute_ps(a, 0b10110001), _mm256_permute_ps(b, 0b10110001));
  if constexpr (distance == 2) NIBBLE_PAIR(Floats, _mm256_permute_ps(a, 0b01001110), _mm256_permute_ps(b, 0b01001110));
  if constexpr (distance == 4) NIBBLE_PAIR(Floats, _mm256_permute2f128_ps(a, a, 1), _mm256_permute2f128_ps(b, b, 1));
  NIBBLE_PAIR(Floats, b, a);
}
inline __m256 choose_half(Floats table, __m256i index) {
  __m256 low = _mm256_permutevar8x32_ps(table.a, index), high = _mm256_permutevar8x32_ps(table.b, index);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
inline Floats choose(Floats table, Ints index) {
  NIBBLE_PAIR(Floats, choose_half(table, index.a), choose_half(table, index.b));
}
inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
inline void prefetch_l2(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }

inline float reduce_add(Floats x) {
  __m256 a = _mm256_add_ps(x.a, x.b);
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
inline float reduce_max(Floats x) {
  __m256 a = _mm256_max_ps(x.a, x.b);
  __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}
inline int32_t ireduce_add(Ints x) {
  __m256i a = _mm256_add_epi32(x.a, x.b);
  __m128i b = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  b = _mm_add_epi32(b, _mm_shuffle_epi32(b, 0b01001110));
  b = _mm_add_epi32(b, _mm_shuffle_epi32(b, 0b10110001));
  return _mm_cvtsi128_si32(b);
}
inline uint32_t ireduce_max_unsigned(Ints x) {
  __m256i a = _mm256_max_epu32(x.a, x.b);
  __m128i b = _mm_max_epu32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  b = _mm_max_epu32(b, _mm_shuffle_epi32(b, 0b01001110));
  b = _mm_max_epu32(b, _mm_shuffle_epi32(b, 0b10110001));
  return (uint32_t)_mm_cvtsi128_si32(b);
}

#undef NIBBLE_PAIR

}  // namespace nibble::avx2
