#include "linear.hpp"

#include "simd/simd.hpp"

namespace nibble::NIBBLE_ISA {
namespace {

constexpr int kTile = 8;            // tokens whose sums stay in registers
constexpr int kPrefetchBytes = 1024;  // ahead of the codes

// ---- codes to bytes: each policy turns a unit of packed codes into `steps` vectors of unsigned bytes ----------------

struct U8 {
  static constexpr int steps = 1, main = 64, extra = 0;
  static void unpack(const uint8_t* p, const uint8_t*, const Packed&, Bytes* out) { out[0] = bload(p); }
};
struct U4 {
  static constexpr int steps = 2, main = 64, extra = 0;
  static void unpack(const uint8_t* p, const uint8_t*, const Packed&, Bytes* out) {
    Bytes low = bset1(0x0f), v = bload(p);
    out[0] = band(v, low);
    out[1] = band(bshr<4>(v), low);
  }
};
struct U2 {
  static constexpr int steps = 4, main = 64, extra = 0;
  static void unpack(const uint8_t* p, const uint8_t*, const Packed&, Bytes* out) {
    Bytes low = bset1(3), v = bload(p);
    out[0] = band(v, low);
    out[1] = band(bshr<2>(v), low);
    out[2] = band(bshr<4>(v), low);
    out[3] = band(bshr<6>(v), low);
  }
};
struct U3 {
  static constexpr int steps = 4, main = 64, extra = 32;
  static void unpack(const uint8_t* p, const uint8_t* e, const Packed& w, Bytes* out) {
    U2::unpack(p, nullptr, w, out);
    for (int i = 0; i < 4; i++) out[i] = bor(out[i], bspread(e + 8 * i, 4));
  }
};
struct U5 {
  static constexpr int steps = 4, main = 128, extra = 32;
  static void unpack(const uint8_t* p, const uint8_t* e, const Packed& w, Bytes* out) {
    U4::unpack(p, nullptr, w, out);
    U4::unpack(p + 64, nullptr, w, out + 2);
    for (int i = 0; i < 4; i++) out[i] = bor(out[i], bspread(e + 8 * i, 16));
  }
};
struct U6 {
  static constexpr int steps = 4, main = 128, extra = 64;
  static void unpack(const uint8_t* p, const uint8_t* e, const Packed& w, Bytes* out) {
    U4::unpack(p, nullptr, w, out);
    U4::unpack(p + 64, nullptr, w, out + 2);
    Bytes high = bset1(0x30), v = bload(e);
    out[0] = bor(out[0], band(bshl<4>(v), high));
    out[1] = bor(out[1], band(bshl<2>(v), high));
    out[2] = bor(out[2], band(v, high));
    out[3] = bor(out[3], band(bshr<2>(v), high));
  }
};
template <class Base>
struct Lookup {
  static constexpr int steps = Base::steps, main = Base::main, extra = Base::extra;
  static void unpack(const uint8_t* p, const uint8_t* e, const Packed& w, Bytes* out) {
    Base::unpack(p, e, w, out);
    Bytes table = load_table(w.table);
    for (int i = 0; i < steps; i++) out[i] = lookup(table, out[i]);
  }
};

// ---- scales and zero points -----------------------------------------------------------------------------------------

inline Floats load_scales(const Packed& w, const uint8_t* row_block, int block) {
  const uint8_t* p = row_block + w.scales_offset;
  int64_t first = (int64_t)block * kRows;
  switch (w.scale_type) {
    case ScaleType::f16: return load_f16((const uint16_t*)p + first);
    case ScaleType::bf16: return load_bf16((const uint16_t*)p + first);
    default: return load((const float*)p + first);
  }
}

inline Floats load_zeros(const Packed& w, const uint8_t* row_block, int block) {
  const uint8_t* p = row_block + w.zeros_offset;
  int64_t first = (int64_t)block * kRows;
  return w.zero_type == ZeroType::u8 ? to_float(load_u8(p + first)) : load((const float*)p + first);
}

// One block's integers to its part of the sum. Integers below 2^24 are exact floats, so a zero point stored as an integer
// gives the same bits whichever way it is subtracted.
template <bool kConstantZero>
inline Floats add_block(Floats sum, Ints dots, Floats scale, Floats zeros, int32_t zero, float x_scale, int32_t x_sum) {
  Floats part;
  if constexpr (kConstantZero)
    part = to_float(isub(dots, iset1(zero * x_sum)));
  else
    part = fnma(zeros, set1((float)x_sum), to_float(dots));
  return fma(part, mul(scale, set1(x_scale)), sum);
}

// ---- kernels --------------------------------------------------------------------------------------------------------

// kTokens tokens from `token` on. Reads the row block's codes once.
template <class Codes, bool kConstantZero, int kTokens>
void tile(const Packed& w, const uint8_t* row_block, const Activations& x, int64_t token, float* out, int64_t stride) {
  Floats sums[kTokens];
  for (int t = 0; t < kTokens; t++) sums[t] = zero();
  const int8_t* values = x.values + token * x.stride;
  const uint8_t* codes = row_block;
  for (int block = 0; block < w.num_blocks; block++) {
    int channels = w.channels_of(block);
    int units = (channels + 4 * Codes::steps - 1) / (4 * Codes::steps);
    const uint8_t* extra = codes + (int64_t)units * Codes::main;
    Ints dots[kTokens];
    for (int t = 0; t < kTokens; t++) dots[t] = izero();
    const int8_t* a = values + (int64_t)block * w.block_channels;
    for (int unit = 0; unit < units; unit++) {
      prefetch(codes + unit * Codes::main + kPrefetchBytes);
      Bytes u[Codes::steps];
      Codes::unpack(codes + unit * Codes::main, extra + unit * Codes::extra, w, u);
      for (int step = 0; step < Codes::steps; step++)
        for (int t = 0; t < kTokens; t++)
          dots[t] = dot(dots[t], u[step], a + t * x.stride + 4 * (unit * Codes::steps + step));
    }
    Floats scale = load_scales(w, row_block, block);
    Floats zeros = kConstantZero ? zero() : load_zeros(w, row_block, block);
    for (int t = 0; t < kTokens; t++) {
      int64_t at = (token + t) * x.num_blocks + block;
      sums[t] = add_block<kConstantZero>(sums[t], dots[t], scale, zeros, w.zero, x.scales[at], x.sums[at]);
    }
    codes += w.codes_block_bytes;
  }
  for (int t = 0; t < kTokens; t++) store(out + t * stride, sums[t]);
}

template <class Codes, bool kConstantZero>
void all_tokens(const Packed& w, const uint8_t* row_block, const Activations& x, float* out, int64_t stride) {
  int64_t token = 0;
  for (; token + kTile <= x.num_tokens; token += kTile)
    tile<Codes, kConstantZero, kTile>(w, row_block, x, token, out + token * stride, stride);
  for (; token + 4 <= x.num_tokens; token += 4)
    tile<Codes, kConstantZero, 4>(w, row_block, x, token, out + token * stride, stride);
  for (; token < x.num_tokens; token++)
    tile<Codes, kConstantZero, 1>(w, row_block, x, token, out + token * stride, stride);
}

template <class Codes>
void with_codes(const Packed& w, int64_t index, const Activations& x, float* out, int64_t stride) {
  if (w.zero_type == ZeroType::constant)
    all_tokens<Codes, true>(w, w.row_block(index), x, out, stride);
  else
    all_tokens<Codes, false>(w, w.row_block(index), x, out, stride);
}

void row_block(const Packed& w, int64_t index, const Activations& x, float* out, int64_t stride, uint8_t*) {
  switch (w.bits) {
    case 2: return w.has_table ? with_codes<Lookup<U2>>(w, index, x, out, stride) : with_codes<U2>(w, index, x, out, stride);
    case 3: return w.has_table ? with_codes<Lookup<U3>>(w, index, x, out, stride) : with_codes<U3>(w, index, x, out, stride);
    case 4: return w.has_table ? with_codes<Lookup<U4>>(w, index, x, out, stride) : with_codes<U4>(w, index, x, out, stride);
    case 5: return with_codes<U5>(w, index, x, out, stride);
    case 6: return with_codes<U6>(w, index, x, out, stride);
    default: return with_codes<U8>(w, index, x, out, stride);
  }
}

// ---- activations ----------------------------------------------------------------------------------------------------

// A last vector that is not full is read through a copy padded with zeros.
inline Floats load_some(const float* x, int64_t left) {
  if (left >= 16) return load(x);
  float padded[16] = {};
  for (int i = 0; i < left; i++) padded[i] = x[i];
  return load(padded);
}

void quantize(const float* x, int64_t num_channels, Activations& to, int64_t token) {
  int8_t* values = to.values + token * to.stride;
  for (int block = 0; block < to.num_blocks; block++) {
    int64_t first_channel = (int64_t)block * to.block_channels;
    int64_t left = num_channels - first_channel;
    int channels = (int)(left < to.block_channels ? left : to.block_channels);
    const float* in = x + first_channel;
    Ints highest = izero();  // magnitudes compare as integers, and NaN as the largest of them
    for (int i = 0; i < channels; i += 16)
      highest = imax_unsigned(highest, iand(bits(load_some(in + i, channels - i)), iset1(0x7fffffff)));
    uint32_t magnitude = ireduce_max_unsigned(highest);
    float peak;
    __builtin_memcpy(&peak, &magnitude, 4);
    bool finite = magnitude < 0x7f800000;
    float scale = finite ? peak / 127.0f : __builtin_nanf("");
    // Below 2^-120 the quotient would overflow; such a block is zero beside anything it is added to.
    float inverse = finite && peak > 0x1p-120f ? 127.0f / peak : 0.0f;
    Ints sum = izero();
    for (int i = 0; i < channels; i += 16) {
      Floats v = load_some(in + i, channels - i);
      Ints q = to_int(mul(v, set1(inverse)));
      if (!finite) q = izero();
      store_i8(values + first_channel + i, q);
      sum = iadd(sum, q);
    }
    to.scales[token * to.num_blocks + block] = scale;
    to.sums[token * to.num_blocks + block] = ireduce_add(sum);
  }
}

}  // namespace

const LinearOps linear_ops = {quantize, row_block};

}  // namespace nibble::NIBBLE_ISA
