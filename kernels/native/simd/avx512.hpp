// 16 lanes in AVX-512 (F, BW, DQ, VL, VNNI): one register each.
#pragma once

#include <immintrin.h>

#include <cstdint>

#define NIBBLE_UNROLL _Pragma("GCC unroll 16")  // before a loop whose arrays are to stay in registers

namespace nibble::avx512 {

using Floats = __m512;  // 16 float32
using Ints = __m512i;   // 16 int32
using Bytes = __m512i;  // 64 bytes; lane i of a dot product takes bytes 4i .. 4i + 3

inline constexpr bool kFastDot = true;  // dot() is one instruction
inline constexpr int kRegisters = 32;    // of 16 lanes

inline Floats zero() { return _mm512_setzero_ps(); }
inline Floats set1(float x) { return _mm512_set1_ps(x); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }    // a b + c, rounded once
inline Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b, rounded once
// As the instruction: b when either is NaN.
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats sqrt(Floats a) { return _mm512_sqrt_ps(a); }
inline Floats round(Floats a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
// 16 numbers of float8 e4m3, divided by 256: as halves they have the same bits, in other places.
inline Floats load_e4m3(const uint8_t* p) {
  __m256i x = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)), 7);
  x = _mm256_and_si256(x, _mm256_set1_epi16((int16_t)0xbfff));
  __m256i carry = _mm256_add_epi16(x, _mm256_set1_epi16(0x80));  // reaches the exponent's highest bit where x is NaN
  return _mm512_cvtph_ps(_mm256_or_si256(x, _mm256_and_si256(carry, _mm256_set1_epi16(0x4000))));
}
inline void store_f16(uint16_t* p, Floats x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline Floats load_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}

inline Ints izero() { return _mm512_setzero_si512(); }
inline Ints iset1(int32_t x) { return _mm512_set1_epi32(x); }
inline Ints iload(const int32_t* p) { return _mm512_loadu_si512(p); }
inline void istore(int32_t* p, Ints x) { _mm512_storeu_si512(p, x); }
inline Ints iadd(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints isub(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
inline Ints imul(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
inline Ints iand(Ints a, Ints b) { return _mm512_and_si512(a, b); }
inline Ints imax_unsigned(Ints a, Ints b) { return _mm512_max_epu32(a, b); }
template <int N>
inline Ints ishl(Ints a) { return _mm512_slli_epi32(a, N); }
template <int N>
inline Ints isra(Ints a) { return _mm512_srai_epi32(a, N); }
inline Ints load_u8(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
inline void store_i8(int8_t* p, Ints x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(x)); }  // saturates
// 64 integers to bytes, in order; saturates.
inline Bytes pack_u8(Ints a, Ints b, Ints c, Ints d) {
  __m512i quads = _mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), quads);
}
inline Floats to_float(Ints x) { return _mm512_cvtepi32_ps(x); }
inline Ints to_int(Floats x) { return _mm512_cvtps_epi32(x); }  // to nearest, ties to even
inline Ints bits(Floats x) { return _mm512_castps_si512(x); }
inline Floats as_float(Ints x) { return _mm512_castsi512_ps(x); }
// x 2^n, rounded once; x is a normal number of modest size or NaN, n an integer of at most 200 in magnitude.
inline Floats scale_by_power_of_2(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }
// Lane i: x where i < count, other elsewhere.
inline Floats first(int count, Floats x, Floats other) {
  return _mm512_mask_blend_ps(count >= 16 ? 0xffff : (__mmask16)((1u << (count < 0 ? 0 : count)) - 1), other, x);
}

inline Bytes bload(const void* p) { return _mm512_loadu_si512(p); }
inline void bstore(void* p, Bytes x) { _mm512_storeu_si512(p, x); }
inline Bytes bset1(uint8_t x) { return _mm512_set1_epi8((char)x); }
inline Bytes band(Bytes a, Bytes b) { return _mm512_and_si512(a, b); }
inline Bytes bor(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
inline Bytes badd(Bytes a, Bytes b) { return _mm512_add_epi8(a, b); }
// Shifts act on 16-bit words: what crosses from one byte into the next is for the caller to mask away.
template <int N>
inline Bytes bshr(Bytes a) { return _mm512_srli_epi16(a, N); }
template <int N>
inline Bytes bshl(Bytes a) { return _mm512_slli_epi16(a, N); }
// table[index], 16 entries; indices must be below 16.
inline Bytes lookup(Bytes table, Bytes index) { return _mm512_shuffle_epi8(table, index); }
inline Bytes load_table(const uint8_t* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p)); }
// Bytes that hold `value` where the bit of `mask` (8 bytes, bit i of the whole for byte i) is set, else 0.
inline Bytes bspread(const uint8_t* mask, uint8_t value) {
  uint64_t m;
  __builtin_memcpy(&m, mask, 8);
  return _mm512_maskz_mov_epi8((__mmask64)m, _mm512_set1_epi8((char)value));
}
// Lane i: acc + sum of u[4i + j] * s[j], j < 4; u unsigned, s signed. Exact.
inline Ints dot(Ints acc, Bytes u, const int8_t* s) {
  int32_t four;
  __builtin_memcpy(&four, s, 4);
  return _mm512_dpbusd_epi32(acc, u, _mm512_set1_epi32(four));
}
// The four activations a dot product takes, in every lane.
using Four = __m512i;
inline Four four(const int8_t* s) {
  int32_t word;
  __builtin_memcpy(&word, s, 4);
  return _mm512_set1_epi32(word);
}
inline Ints dot(Ints acc, Bytes u, Four s) { return _mm512_dpbusd_epi32(acc, u, s); }
inline Ints dot_small(Ints acc, Bytes u, Four s) { return _mm512_dpbusd_epi32(acc, u, s); }  // dot() where u < 128
// dot_small() with u of at most 15, for loops in which gcc 12 copies each sum before and after the intrinsic.
inline Ints dot_codes(Ints acc, Bytes u, Four s) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u), "v"(s));
  return acc;
}
// Lane i += u[0] c[4i] + ... + u[3] c[4i + 3], u unsigned, c at most 15.
inline Ints dot_unsigned(Ints acc, Four u, Bytes c) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u), "v"(c));
  return acc;
}
// a + value where the bit of `mask` is set (8 bytes, bit i of the whole for byte i).
inline Bytes badd_where(Bytes a, const uint8_t* mask, uint8_t value) {
  uint64_t m;
  __builtin_memcpy(&m, mask, 8);
  return _mm512_mask_add_epi8(a, (__mmask64)m, a, _mm512_set1_epi8((char)value));
}
// 32-bit lanes of bytes moved down by n bits; zeros follow.
inline Ints word_shr(Bytes a, int n) { return _mm512_srli_epi32(a, (unsigned)n); }
// The same, as bytes. A count for each lane: one for all would take the place of a dot product beside it (Zen 4).
inline Bytes bword_shr(Bytes a, int n) { return _mm512_srlv_epi32(a, _mm512_set1_epi32(n)); }
// Bytes 4i .. 4i + 3 of the result: byte i of each of four rows, of which 16 bytes are taken, row_bytes apart.
inline Bytes interleave(const uint8_t* rows, int64_t row_bytes) {
  const __m512i words = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i within = _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
  __m512i all;
  if (row_bytes == 16) {
    all = _mm512_loadu_si512(rows);
  } else {
    all = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)rows));
    all = _mm512_inserti32x4(all, _mm_loadu_si128((const __m128i*)(rows + row_bytes)), 1);
    all = _mm512_inserti32x4(all, _mm_loadu_si128((const __m128i*)(rows + 2 * row_bytes)), 2);
    all = _mm512_inserti32x4(all, _mm_loadu_si128((const __m128i*)(rows + 3 * row_bytes)), 3);
  }
  return _mm512_shuffle_epi8(_mm512_permutexvar_epi32(words, all), within);
}
inline __m512i join(const uint8_t* low, const uint8_t* high) {
  __m512i half = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)low));
  return _mm512_inserti64x4(half, _mm256_loadu_si256((const __m256i*)high), 1);
}
// interleave() of bytes 0 to 15 of the rows, and of bytes 16 to 31.
inline void interleave_pair(const uint8_t* rows, int64_t row_bytes, Bytes& first, Bytes& second) {
  const __m512i words = _mm512_setr_epi32(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27);
  const __m512i later = _mm512_setr_epi32(4, 12, 20, 28, 5, 13, 21, 29, 6, 14, 22, 30, 7, 15, 23, 31);
  const __m512i within = _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
  __m512i low, high;
  if (row_bytes == 32)
    low = _mm512_loadu_si512(rows), high = _mm512_loadu_si512(rows + 64);
  else
    low = join(rows, rows + row_bytes), high = join(rows + 2 * row_bytes, rows + 3 * row_bytes);
  first = _mm512_shuffle_epi8(_mm512_permutex2var_epi32(low, words, high), within);
  second = _mm512_shuffle_epi8(_mm512_permutex2var_epi32(low, later, high), within);
}
// The highest trit of every byte, floor(3 x / 256); x becomes what is left of it, 3 x mod 256.
inline Bytes take_trit(Bytes& x) {
  const __m512i low = _mm512_set1_epi16(0x00ff), three = _mm512_set1_epi16(3);
  __m512i even = _mm512_mullo_epi16(_mm512_and_si512(x, low), three);
  __m512i odd = _mm512_mullo_epi16(_mm512_srli_epi16(x, 8), three);
  x = _mm512_or_si512(_mm512_and_si512(even, low), _mm512_slli_epi16(odd, 8));
  return _mm512_or_si512(_mm512_srli_epi16(even, 8), _mm512_andnot_si512(low, odd));
}
// Lane i of the result: lane i ^ distance; 1, 2, 4 or 8.
template <int distance>
inline Floats swap_lanes(Floats x) {
  if constexpr (distance == 1) return _mm512_permute_ps(x, 0b10110001);
  if constexpr (distance == 2) return _mm512_permute_ps(x, 0b01001110);
  if constexpr (distance == 4) return _mm512_shuffle_f32x4(x, x, 0b10110001);
  return _mm512_shuffle_f32x4(x, x, 0b01001110);
}
// table[index & 15]
inline Floats choose(Floats table, Ints index) { return _mm512_permutexvar_ps(index, table); }
inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
inline void prefetch_l2(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }  // into the second cache only

// The sum of 16 lanes, in the order ((0+8)+(4+12)) + ... that every instruction set follows.
inline float reduce_add(Floats x) {
  __m256 a = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
inline float reduce_max(Floats x) {
  __m256 a = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}
inline int32_t ireduce_add(Ints x) { return _mm512_reduce_add_epi32(x); }
inline uint32_t ireduce_max_unsigned(Ints x) { return _mm512_reduce_max_epu32(x); }

}  // namespace nibble::avx512
