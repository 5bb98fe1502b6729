// Scales and zero points of 16 rows, as packed.hpp lays them.
#pragma once

#include "packed.hpp"
#include "simd/simd.hpp"

namespace nibble::NIBBLE_ISA {

// 4 x 16 signed bytes, then the 16 steps that they count.
static inline Floats load_nested(const uint8_t* p, int block) {
  Ints byte = isra<24>(ishl<24>(load_u8(p + block * kRows)));
  return mul(to_float(byte), load_f16((const uint16_t*)(p + kParameterBlocks * kRows)));
}

static inline Floats load_scales(ScaleType type, const uint8_t* p, int block) {
  int first = block * kRows;
  if (type == ScaleType::f16) return load_f16((const uint16_t*)p + first);
  if (type == ScaleType::bf16) return load_bf16((const uint16_t*)p + first);
  if (type == ScaleType::f32) return load((const float*)p + first);
  if (type == ScaleType::nested) return load_nested(p, block);
  Ints byte = load_u8(p + first);
  if (type == ScaleType::e8m0)  // the exponent's place; 2^-127 is subnormal
    return as_float(imax_unsigned(ishl<23>(byte), iset1(0x00400000)));
  Ints magnitude = ishl<20>(iand(byte, iset1(0x7f))), sign = ishl<24>(iand(byte, iset1(0x80)));
  return mul(as_float(iadd(magnitude, sign)), set1(0x1p120f));  // exponents are counted from 7, not 127
}

static inline Floats load_zeros(ZeroType type, const uint8_t* p, int block) {
  int first = block * kRows;
  if (type == ZeroType::nested_offset) return load_nested(p, block);
  return type == ZeroType::u8 ? to_float(load_u8(p + first)) : load((const float*)p + first);
}

}  // namespace nibble::NIBBLE_ISA
