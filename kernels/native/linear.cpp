#include "linear.hpp"

#include "codes.hpp"
#include "simd/simd.hpp"

namespace nibble::NIBBLE_ISA {
namespace {

constexpr int kPrefetchBytes = 1024;  // ahead of the codes

// ---- scales and zero points -----------------------------------------------------------------------------------------

inline Floats load_scales(ScaleType type, const uint8_t* p, int block) {
  int first = block * kRows;
  if (type == ScaleType::f16) return load_f16((const uint16_t*)p + first);
  if (type == ScaleType::bf16) return load_bf16((const uint16_t*)p + first);
  if (type == ScaleType::f32) return load((const float*)p + first);
  Ints byte = load_u8(p + first);
  if (type == ScaleType::e8m0)  // the exponent's place; 2^-127 is subnormal
    return as_float(imax_unsigned(ishl<23>(byte), iset1(0x00400000)));
  Ints magnitude = ishl<20>(iand(byte, iset1(0x7f))), sign = ishl<24>(iand(byte, iset1(0x80)));
  return mul(as_float(iadd(magnitude, sign)), set1(0x1p120f));  // exponents are counted from 7, not 127
}

inline Floats load_zeros(ZeroType type, const uint8_t* p, int block) {
  int first = block * kRows;
  return type == ZeroType::u8 ? to_float(load_u8(p + first)) : load((const float*)p + first);
}

// ---- integers of one block ------------------------------------------------------------------------------------------

// Where a pass reads: a row block's codes and, `next` bytes on, those of the row block beside it.
struct Source {
  const uint8_t* codes;
  int64_t next;
  int units;
};

template <class C, int R, int T, class Unpack>
inline void add_units(Ints (&dots)[R][T], Source from, const int8_t* a, Unpack unpack) {
  const uint8_t* codes = from.codes;
  const uint8_t* extra = codes + (int64_t)from.units * C::main;
  for (int unit = 0; unit < from.units; unit++) {
    Bytes u[R][C::steps];
    for (int r = 0; r < R; r++) {
      for (int line = 0; line < C::main; line += 64) prefetch(codes + r * from.next + line + kPrefetchBytes);
      unpack(codes + r * from.next, extra + r * from.next, u[r]);
    }
    NIBBLE_UNROLL
    for (int s = 0; s < C::steps; s++)
      NIBBLE_UNROLL
      for (int t = 0; t < T; t++) {
        Four x = four(a + 4 * (s * T + t));
        NIBBLE_UNROLL
        for (int r = 0; r < R; r++) dots[r][t] = C::small ? dot_small(dots[r][t], u[r][s], x) : dot(dots[r][t], u[r][s], x);
      }
    codes += C::main;
    extra += C::extra;
    a += 4 * C::steps * T;
  }
}

// Sums start at -zero times the sum of the activations, so that a constant zero point costs nothing.
template <int R, int T>
inline void start(Ints (&dots)[R][T], const int32_t* offsets) {
  NIBBLE_UNROLL
  for (int t = 0; t < T; t++)
    for (int r = 0; r < R; r++) dots[r][t] = iset1(offsets[t]);
}

// How codes become integers: as they are, through a table of bytes, or through two (the high plane counts 128).
template <class C>
struct Plain {
  template <int R, int T>
  static void dots(const Packed&, Ints (&dots)[R][T], Source from, const int8_t* a, const int32_t* offsets) {
    start(dots, offsets);
    add_units<C>(dots, from, a, [](const uint8_t* p, const uint8_t* e, Bytes* out) { C::unpack(p, e, out); });
  }
};
template <class C>
struct OnePlane {
  template <int R, int T>
  static void dots(const Packed& w, Ints (&dots)[R][T], Source from, const int8_t* a, const int32_t* offsets) {
    start(dots, offsets);
    Bytes table = load_table(w.planes[0]);
    add_units<Lookup<C>>(dots, from, a, [=](const uint8_t* p, const uint8_t* e, Bytes* out) {
      Lookup<C>::unpack(p, e, table, out);
    });
  }
};
template <class C>
struct TwoPlanes {
  template <int R, int T>
  static void dots(const Packed& w, Ints (&dots)[R][T], Source from, const int8_t* a, const int32_t* offsets) {
    constexpr int32_t none[T] = {};
    start(dots, none);
    for (int plane = 0; plane < 2; plane++) {
      if (plane == 1)
        for (int t = 0; t < T; t++)
          for (int r = 0; r < R; r++) dots[r][t] = iadd(ishl<7>(dots[r][t]), iset1(offsets[t]));
      Bytes table = load_table(w.planes[plane]);
      add_units<Lookup<C>>(dots, from, a, [=](const uint8_t* p, const uint8_t* e, Bytes* out) {
        Lookup<C>::unpack(p, e, table, out);
      });
    }
  }
};

// ---- tiles ----------------------------------------------------------------------------------------------------------

// One block of T tokens' activations.
struct Block {
  const int8_t* values;
  const float* scales;
  const int32_t* sums;
  const int32_t* offsets;
};

// Adds one block to the sums. Integers below 2^24 are exact floats, so a zero point that is an integer gives the same
// bits whichever way it is subtracted.
template <class Dots, int R, int T>
inline void add_block(const Packed& w, Floats (&sums)[R][T], Source from, const uint8_t* parameters, int slot, Block x) {
  Ints dots[R][T];
  Dots::template dots<R, T>(w, dots, from, x.values, x.offsets);
  NIBBLE_UNROLL
  for (int r = 0; r < R; r++) {
    const uint8_t* p = parameters + r * from.next;
    Floats scale = w.scale_type == ScaleType::none ? set1(1.0f) : load_scales(w.scale_type, p, slot);
    if (w.zero_type == ZeroType::constant) {
      NIBBLE_UNROLL
      for (int t = 0; t < T; t++)
        sums[r][t] = fma(to_float(dots[r][t]), mul(scale, set1(x.scales[t])), sums[r][t]);
      continue;
    }
    Floats zeros = load_zeros(w.zero_type, p + w.zeros_offset, slot);
    NIBBLE_UNROLL
    for (int t = 0; t < T; t++) {
      Floats part = fnma(zeros, to_float(iset1(x.sums[t])), to_float(dots[r][t]));
      sums[r][t] = fma(part, mul(scale, set1(x.scales[t])), sums[r][t]);
    }
  }
}

inline void store_rows(float* out, Floats x, int64_t rows) {
  if (rows >= kRows) return store(out, x);
  float all[kRows];
  store(all, x);
  for (int64_t i = 0; i < rows; i++) out[i] = all[i];
}

// Row blocks first .. first + R - 1 (the last one twice where there is no other) for T tokens from `token` on.
template <class Dots, int R, int T>
void tile(const Packed& w, int64_t first, const Activations& x, int64_t token, float* out) {
  int64_t num_row_blocks = (w.num_rows + kRows - 1) / kRows;
  const uint8_t* start = w.start + first * w.row_block_bytes;
  const int64_t next = first + R <= num_row_blocks ? w.row_block_bytes : 0;
  Floats sums[R][T];
  NIBBLE_UNROLL
  for (int i = 0; i < R * T; i++) sums[i / T][i % T] = zero();
  const int64_t before = token * x.num_blocks;
  Block at{x.values + token * x.stride, x.scales + before, x.sums + before, x.offsets + before};
  const uint8_t* p = start + kFactorBytes;
  const uint8_t* parameters = p;
  const int full_units = units_of(w, 0);
  for (int block = 0; block < w.num_blocks; block++) {
    int slot = block % kParameterBlocks;
    if (slot == 0) {
      parameters = p;
      p += w.codes_offset;
    }
    Source from{p, next, block + 1 < w.num_blocks ? full_units : units_of(w, block)};
    add_block<Dots, R, T>(w, sums, from, parameters, slot, at);
    p += w.codes_block_bytes;
    at = {at.values + (int64_t)T * w.block_channels, at.scales + T, at.sums + T, at.offsets + T};
  }
  for (int r = 0; r < R; r++) {
    int64_t row = (first + (next ? r : 0)) * kRows;
    Floats factors = load((const float*)(start + r * next));
    for (int t = 0; t < T; t++)
      store_rows(out + (token + t) * w.num_rows + row, mul(sums[r][t], factors), w.num_rows - row);
  }
}

template <class Dots>
void all_tokens(const Packed& w, int64_t first, int64_t last, const Activations& x, float* out) {
  if (x.num_tokens == 1) {
    for (int64_t i = first; i < last; i++) tile<Dots, 1, 1>(w, i, x, 0, out);
    return;
  }
  for (int64_t i = first; i < last; i += 2) {
    for (int64_t token = 0; token < x.num_tokens;) {
      int width = tile_of(token, x.num_tokens).width;
      switch (width) {
        case 8: tile<Dots, 2, 8>(w, i, x, token, out); break;
        case 4: tile<Dots, 2, 4>(w, i, x, token, out); break;
        case 2: tile<Dots, 2, 2>(w, i, x, token, out); break;
        default: tile<Dots, 2, 1>(w, i, x, token, out); break;
      }
      token += width;
    }
  }
}

template <class C>
void with_table(const Packed& w, int64_t first, int64_t last, const Activations& x, float* out) {
  if (w.num_planes == 0) return all_tokens<Plain<C>>(w, first, last, x, out);
  if (w.num_planes == 1) return all_tokens<OnePlane<C>>(w, first, last, x, out);
  return all_tokens<TwoPlanes<C>>(w, first, last, x, out);
}

void row_blocks(const Packed& w, int64_t first, int64_t last, const Activations& x, float* out) {
  switch (w.codes) {
    case Codes::u2: return with_table<U2>(w, first, last, x, out);
    case Codes::u3: return with_table<U3>(w, first, last, x, out);
    case Codes::u4: return with_table<U4>(w, first, last, x, out);
    case Codes::u5: return all_tokens<Plain<U5>>(w, first, last, x, out);
    case Codes::u6: return all_tokens<Plain<U6>>(w, first, last, x, out);
    case Codes::u8: return all_tokens<Plain<U8>>(w, first, last, x, out);
    case Codes::ternary: return all_tokens<Plain<Ternary>>(w, first, last, x, out);
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

// 16 channels into their place among `width` tokens.
inline void spread(int8_t* to, int width, Ints q) {
  if (width == 1) return store_i8(to, q);
  int8_t bytes[16];
  store_i8(bytes, q);
  for (int i = 0; i < 4; i++) __builtin_memcpy(to + 4 * i * width, bytes + 4 * i, 4);
}

void quantize(const float* x, int64_t num_channels, Activations& to, int64_t token) {
  Tile tile = tile_of(token, to.num_tokens);
  int width = tile.width, lane = (int)(token - tile.first);
  int8_t* values = to.values + tile.first * to.stride + 4 * lane;
  float* scales = to.scales + tile.first * to.num_blocks + lane;
  int32_t* sums = to.sums + tile.first * to.num_blocks + lane;
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
      Ints q = finite ? to_int(mul(load_some(in + i, channels - i), set1(inverse))) : izero();
      spread(values + (first_channel + i) * width, width, q);
      sum = iadd(sum, q);
    }
    scales[(int64_t)block * width] = scale;
    sums[(int64_t)block * width] = ireduce_add(sum);
  }
  for (int64_t i = (num_channels + 15) / 16 * 16; i < to.stride; i += 16) spread(values + i * width, width, izero());
}

}  // namespace

const LinearOps linear_ops = {quantize, row_blocks};

}  // namespace nibble::NIBBLE_ISA
