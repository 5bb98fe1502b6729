#include "linear.hpp"

#include "codes.hpp"
#include "integer_tile.hpp"
#include "parameters.hpp"
#include "simd/simd.hpp"

namespace nibble::NIBBLE_ISA {
namespace {

// ---- integers of one block ------------------------------------------------------------------------------------------

// How codes become integers: as they are, through a table of bytes, or through two (the high plane counts 128). Sums
// start at -zero times the sum of the activations, so that a constant zero point costs nothing.
template <class C>
struct Plain {
  template <int T>
  static void dots(const Packed&, Ints (&dots)[T], Source from, const int8_t* a, const int32_t* offsets) {
    NIBBLE_UNROLL
    for (int t = 0; t < T; t++) dots[t] = iset1(offsets[t]);
    add_units<C>(dots, from, a, [](const uint8_t* p, const uint8_t* e, Bytes* out) { C::unpack(p, e, out); });
  }
};
template <class C>
struct OnePlane {
  template <int T>
  static void dots(const Packed& w, Ints (&dots)[T], Source from, const int8_t* a, const int32_t* offsets) {
    NIBBLE_UNROLL
    for (int t = 0; t < T; t++) dots[t] = iset1(offsets[t]);
    Bytes table = load_table(w.planes[0]);
    add_units<Lookup<C>>(dots, from, a, [=](const uint8_t* p, const uint8_t* e, Bytes* out) {
      Lookup<C>::unpack(p, e, table, out);
    });
  }
};
template <class C>
struct TwoPlanes {
  template <int T>
  static void dots(const Packed& w, Ints (&dots)[T], Source from, const int8_t* a, const int32_t* offsets) {
    NIBBLE_UNROLL
    for (int t = 0; t < T; t++) dots[t] = izero();
    Bytes high = load_table(w.planes[0]), low = load_table(w.planes[1]);
    add_units<Lookup<C>>(dots, from, a, [=](const uint8_t* p, const uint8_t* e, Bytes* out) {
      Lookup<C>::unpack(p, e, high, out);
    });
    NIBBLE_UNROLL
    for (int t = 0; t < T; t++) dots[t] = iadd(ishl<7>(dots[t]), iset1(offsets[t]));
    add_units<Lookup<C>>(dots, from, a, [=](const uint8_t* p, const uint8_t* e, Bytes* out) {
      Lookup<C>::unpack(p, e, low, out);
    });
  }
};

// Ternary codes without their digits. A digit of the byte b is (3 b - b') / 256, b' = 3 b mod 256 being the next byte,
// so sums of digits times activations follow from sums of bytes times activations: two dot products and two additions a
// step where a digit alone takes eleven operations. One token reads the codes at 3 times the speed.
struct TernaryStates {
  template <int T>
  static void dots(const Packed& w, Ints (&dots)[T], Source from, const int8_t* a, const int32_t* offsets) {
    if constexpr (T > 4) {  // twice the sums would not fit the registers, nor pay
      Plain<Ternary>::dots<T>(w, dots, from, a, offsets);
    } else {
      constexpr int kChains = T == 1 ? 2 : 1;  // one token alone would wait for its own sums
      Ints before[kChains * T], after[kChains * T];
      NIBBLE_UNROLL
      for (int i = 0; i < kChains * T; i++) before[i] = after[i] = izero();
      for (int unit = 0; unit < from.units; unit++) {
        const uint8_t* codes = from.codes + 64 * unit;
        prefetch(codes + kPrefetchBytes);
        Bytes b = bload(codes);
        NIBBLE_UNROLL
        for (int s = 0; s < 5; s++) {
          Bytes next = badd(b, badd(b, b));
          NIBBLE_UNROLL
          for (int t = 0; t < T; t++) {
            Four x = four(a + 4 * ((5 * unit + s) * T + t));
            int i = s % kChains * T + t;
            before[i] = dot(before[i], b, x);
            after[i] = dot(after[i], next, x);
          }
          b = next;
        }
      }
      NIBBLE_UNROLL
      for (int t = 0; t < T; t++) {
        constexpr int last = (kChains - 1) * T;
        Ints sum = kChains == 1 ? before[t] : iadd(before[t], before[last + t]);
        Ints rest = kChains == 1 ? after[t] : iadd(after[t], after[last + t]);
        dots[t] = iadd(iset1(offsets[t]), isra<8>(isub(iadd(sum, ishl<1>(sum)), rest)));
      }
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
// bits whichever way it is subtracted. kHalf: scales are float16 and the zero point is constant. One token goes through
// code that knows it: choosing between types for each block takes 4 to 5 % of its time at 2 and 4 bits.
template <class Dots, int T, bool kHalf>
inline void add_block(const Packed& w, Floats (&sums)[T], Source from, const uint8_t* parameters, int slot, Block x) {
  Ints dots[T];
  Dots::template dots<T>(w, dots, from, x.values, x.offsets);
  const ScaleType type = kHalf ? ScaleType::f16 : w.scale_type;
  Floats scale = type == ScaleType::none ? set1(1.0f) : load_scales(type, parameters, slot);
  if (kHalf || w.zero_type == ZeroType::constant) {
    NIBBLE_UNROLL
    for (int t = 0; t < T; t++) sums[t] = fma(to_float(dots[t]), mul(scale, set1(x.scales[t])), sums[t]);
    return;
  }
  Floats zeros = load_zeros(w.zero_type, parameters + w.zeros_offset, slot);
  if (adds_offsets(w)) {
    NIBBLE_UNROLL
    for (int t = 0; t < T; t++) {
      Floats part = fma(zeros, to_float(iset1(x.sums[t])), mul(scale, to_float(dots[t])));
      sums[t] = fma(part, set1(x.scales[t]), sums[t]);
    }
    return;
  }
  NIBBLE_UNROLL
  for (int t = 0; t < T; t++) {
    Floats part = fnma(zeros, to_float(iset1(x.sums[t])), to_float(dots[t]));
    sums[t] = fma(part, mul(scale, set1(x.scales[t])), sums[t]);
  }
}

// One slab of a row block for T tokens from `token` on. Two row blocks at once would halve the loads of activations,
// but two streams of codes come from memory at 19 GB/s where one comes at 27.
template <class Dots, int T, bool kHalf>
inline void add_slab(const Packed& w, Floats (&sums)[T], int64_t row_block, int slab, const Activations& x,
                     int64_t token) {
  const int first = slab * w.slab_blocks, stop = slab + 1 < w.num_slabs ? first + w.slab_blocks : w.num_blocks;
  const int64_t before = token * x.num_blocks + (int64_t)first * T;
  const int8_t* values = x.values + token * x.stride + (int64_t)first * w.block_channels * T;
  Block at{values, x.scales + before, x.sums + before, x.offsets + before};
  const uint8_t* p = w.start + slab_at(w, row_block, slab);
  const uint8_t* parameters = p;
  const int full_units = units_of(w, 0), last_units = units_of(w, w.num_blocks - 1);
  for (int block = first; block < stop; block++) {
    int slot = block % kParameterBlocks;
    if (slot == 0) {
      parameters = p;
      p += w.codes_offset;
      for (int64_t line = 0; line < w.codes_offset; line += 64)
        prefetch(parameters + line + (T == kTileTokens ? 8 : 1) * kPrefetchBytes);
    }
    add_block<Dots, T, kHalf>(w, sums, {p, block + 1 < w.num_blocks ? full_units : last_units}, parameters, slot, at);
    p += w.codes_block_bytes;
    at = {at.values + (int64_t)T * w.block_channels, at.scales + T, at.sums + T, at.offsets + T};
  }
}

// Row blocks first to last - 1, of one panel, for T tokens from `token` on.
template <class Dots, int T, bool kHalf = false>
void tile(const Packed& w, int64_t first, int64_t last, const Activations& x, int64_t token, float* out) {
  float partial[kPanelBlocks][T][kRows];  // sums over the slabs before
  for (int slab = 0; slab < w.num_slabs; slab++) {
    for (int64_t block = first; block < last; block++) {
      float(&own)[T][kRows] = partial[block - first];
      Floats sums[T];
      NIBBLE_UNROLL
      for (int t = 0; t < T; t++) sums[t] = slab ? load(own[t]) : zero();
      add_slab<Dots, T, kHalf>(w, sums, block, slab, x, token);
      if (slab + 1 < w.num_slabs) {
        for (int t = 0; t < T; t++) store(own[t], sums[t]);
        continue;
      }
      Floats factors = load((const float*)(w.start + factors_at(w, block)));
      float* to = out + token * w.num_rows + block * kRows;
      for (int t = 0; t < T; t++) store_rows(to + t * w.num_rows, mul(sums[t], factors), w.num_rows - block * kRows);
    }
  }
}

template <class Dots>
void all_tokens(const Packed& w, int64_t first, int64_t last, const Activations& x, float* out) {
  const bool half = w.scale_type == ScaleType::f16 && w.zero_type == ZeroType::constant;
  for (int64_t i = first, stop; i < last; i = stop) {
    int64_t end = (i / kPanelBlocks + 1) * kPanelBlocks;
    stop = end < last ? end : last;
    for (int64_t token = 0; token < x.num_tokens;) {
      int width = tile_of(token, x.num_tokens).width;
      switch (width) {
        case 8: tile<Dots, 8>(w, i, stop, x, token, out); break;
        case 4: tile<Dots, 4>(w, i, stop, x, token, out); break;
        case 2: tile<Dots, 2>(w, i, stop, x, token, out); break;
        default: (half ? tile<Dots, 1, true> : tile<Dots, 1>)(w, i, stop, x, token, out); break;
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
    case Codes::ternary: return all_tokens<TernaryStates>(w, first, last, x, out);
  }
}

// ---- activations ----------------------------------------------------------------------------------------------------

// One block of one token: `values` and `sum` are its place among the `width` tokens of a tile.
inline void quantize_block(const float* in, int channels, int width, int8_t* values, float* to_scale, int32_t* to_sum) {
  Ints highest = izero();  // magnitudes compare as integers, and NaN as the largest of them
  for (int i = 0; i < channels; i += 16)
    highest = imax_unsigned(highest, iand(bits(load_some(in + i, channels - i)), iset1(0x7fffffff)));
  uint32_t magnitude = ireduce_max_unsigned(highest);
  float peak;
  __builtin_memcpy(&peak, &magnitude, 4);
  bool finite = magnitude < 0x7f800000;
  *to_scale = finite ? peak / 127.0f : __builtin_nanf("");
  // Below 2^-120 the quotient would overflow; such a block is zero beside anything it is added to.
  float inverse = finite && peak > 0x1p-120f ? 127.0f / peak : 0.0f;
  Ints sum = izero();
  for (int i = 0; i < channels; i += 16) {
    Ints q = finite ? to_int(mul(load_some(in + i, channels - i), set1(inverse))) : izero();
    spread(values + i * width, width, q);
    sum = iadd(sum, q);
  }
  *to_sum = ireduce_add(sum);
}

void quantize(const float* x, int64_t num_channels, const Activations& to, Tile tile, int first, int last) {
  int width = tile.width;
  int8_t* values = to.values + tile.first * to.stride;
  float* scales = to.scales + tile.first * to.num_blocks;
  int32_t* sums = to.sums + tile.first * to.num_blocks;
  for (int block = first; block < last; block++) {
    int64_t channel = (int64_t)block * to.block_channels, left = num_channels - channel;
    int channels = (int)(left < to.block_channels ? left : to.block_channels);
    for (int lane = 0; lane < width; lane++)
      quantize_block(x + (tile.first + lane) * num_channels + channel, channels, width,
                     values + channel * width + 4 * lane, scales + (int64_t)block * width + lane,
                     sums + (int64_t)block * width + lane);
  }
  if (last < to.num_blocks) return;
  for (int64_t i = (num_channels + 15) / 16 * 16; i < to.stride; i += 16)
    for (int lane = 0; lane < width; lane++) spread(values + i * width + 4 * lane, width, izero());
}

}  // namespace

const LinearOps linear_ops = {quantize, row_blocks};

}  // namespace nibble::NIBBLE_ISA
