// Integer products of a tile of query rows with packed keys and values, in registers (quantized.hpp has the formulas).
#pragma once

#include "attention_tile.hpp"
#include "quantized.hpp"

namespace nibble::NIBBLE_ISA {
namespace {

// Sums of a tile: rows x vectors x digits. At most 24 of 32 registers in AVX-512, 4 of 16 halves in AVX2. With room for
// the channels of several shifts, values are turned for every tile, beside its products; else once for all.
#if defined(NIBBLE_ISA_avx512)
constexpr int kPackedRows = 6, kPackedVectors = 4;
#else
constexpr int kPackedRows = 2, kPackedVectors = 1;
#endif
constexpr bool kTurnsInTiles = kPackedVectors > 1;

// Of `left` vectors, how many a tile takes: 4, 2 or 1; two digits leave room for 2.
inline int tile_vectors(int left, bool two_digits) {
  if (kPackedVectors == 1 || left < 2) return 1;
  return left >= 4 && !two_digits ? 4 : 2;
}

// ---- parameters -----------------------------------------------------------------------------------------------------

// 16 parameters at p, float16 or e4m3, not yet times factor_of() the prescale.
template <bool kHalves>
inline Floats load_parameter(const uint8_t* p) {
  return kHalves ? load_f16((const uint16_t*)p) : load_e4m3(p);
}
inline float factor_of(const RowFormat& format, float prescale) {
  return format.parameter_bytes == 2 ? prescale : 256 * prescale;
}

// ---- weights --------------------------------------------------------------------------------------------------------

// exp2_negative() of many vectors, step by step: what one waits for, the others compute.
template <int kVectors>
inline void exp2_negative(Floats* x) {
  Floats n[kVectors], p[kVectors];
  const float factors[7] = {0x1.41fbbcp-13f, 0x1.5f3e54p-10f, 0x1.3b2d4cp-7f, 0x1.c6aee8p-5f,
                            0x1.ebfbdcp-3f,  0x1.62e430p-1f,  1.0f};
  NIBBLE_UNROLL for (int i = 0; i < kVectors; i++) x[i] = max(set1(-125.0f), x[i]);
  NIBBLE_UNROLL for (int i = 0; i < kVectors; i++) n[i] = round(x[i]);
  NIBBLE_UNROLL for (int i = 0; i < kVectors; i++) x[i] = sub(x[i], n[i]);
  NIBBLE_UNROLL for (int i = 0; i < kVectors; i++) p[i] = fma(set1(factors[0]), x[i], set1(factors[1]));
  NIBBLE_UNROLL for (int k = 2; k < 7; k++)
    NIBBLE_UNROLL for (int i = 0; i < kVectors; i++) p[i] = fma(p[i], x[i], set1(factors[k]));
  NIBBLE_UNROLL for (int i = 0; i < kVectors; i++) x[i] = as_float(iadd(bits(p[i]), ishl<23>(to_int(n[i]))));
}

// ---- digits ---------------------------------------------------------------------------------------------------------

template <bool kTwo>
inline Ints whole_of(Ints high, Ints low) {
  return kTwo ? iadd(ishl<7>(high), low) : high;
}

// The digits of 16 integers: one, or two of which the second lies `second` bytes further on.
inline void write_digits(Ints x, bool two, int8_t* to, int64_t second) {
  if (!two) return store_i8(to, x);
  Ints high = isra<7>(iadd(x, iset1(64)));
  store_i8(to, high);
  store_i8(to + second, isub(x, ishl<7>(high)));
}

// levels / peak. What is below 2^-100 counts as nothing: its reciprocal may be no number.
inline float inverse_of(float levels, float peak) { return peak > 0x1p-100f ? levels / peak : 0.0f; }

// ---- codes ----------------------------------------------------------------------------------------------------------

template <int kWidth>
inline constexpr int kMask = kWidth == 4 ? 15 : 3;

template <int kWidth>
inline Ints dot_keys(Ints sum, Bytes codes, Four digits) {
  if constexpr (kWidth == 8) return dot(sum, codes, digits);
  return dot_codes(sum, codes, digits);
}

// Codes of one byte each from `count` bytes of which byte j holds codes j, j + count, ...: to `to`, in order. Reads and
// writes up to 64 bytes too many.
inline void unpack_run(int bits, int count, const uint8_t* from, uint8_t* to) {
  Bytes mask = bset1((uint8_t)((1 << bits) - 1));
  for (int i = 0; i < 8 / bits; i++)
    for (int j = 0; j < count; j += 64) bstore(to + i * count + j, band(bword_shr(bload(from + j), i * bits), mask));
}

inline void unpack_trits(int count, const uint8_t* from, uint8_t* to) {
  for (int j = 0; j < count; j += 64) {
    Bytes rest = bload(from + j);
    for (int i = 0; i < 5; i++) {
      uint8_t trits[64];
      bstore(trits, take_trit(rest));
      __builtin_memcpy(to + i * count + j, trits, (size_t)min_of(64, count - j));
    }
  }
}

// A row of values of 4, 3 or 2 bits to one byte a channel, as unpack_run.
inline void unpack_row(const RowFormat& format, int head_dim, const uint8_t* row, uint8_t* to) {
  unpack_run(format.width == 4 ? 4 : 2, format.plane_bytes, row, to);
  if (format.width != 3) return;
  uint8_t high[kMaxHeadDim + 64];
  unpack_run(1, head_dim / 8, row + format.plane_bytes, high);
  for (int j = 0; j < head_dim; j += 64) bstore(to + j, bor(bload(to + j), bshl<2>(bload(high + j))));
}

// ---- fetching -------------------------------------------------------------------------------------------------------

// Lines that a tile fetches while it computes, evenly: in one go they would fill the first cache's list of misses, and
// what the tile reads would wait for them.
struct Ahead {
  const uint8_t* at;
  int64_t step;  // 64, or 0 where another tile has fetched them
  template <int kLines>
  NIBBLE_INLINE void fetch() {
    NIBBLE_UNROLL for (int i = 0; i < kLines; i++) prefetch_l2(at), at += step;
  }
};

// ---- keys -----------------------------------------------------------------------------------------------------------

// 16 tokens for each vector: units of 4 bytes, `stride` bytes from one to the next; at 3 bits the units of the high
// plane begin `high` bytes further on.
struct KeyTile {
  const uint8_t* keys[kPackedVectors];
  int64_t stride, high;
  int head_dim, group_size, num_groups;
  int64_t digits_stride;
  const float* parameters;  // [2 num_groups, parameters_stride]
  int64_t parameters_stride;
  Ahead ahead;
};

// Lines of keys that a tile fetches with every unit, when it fetches as much as it reads; else 0.
template <int kWidth, int kVectors>
inline constexpr int kKeyLines = kWidth == 3 || kWidth == 1 ? 0 : kVectors * kWidth / 8;

// Channels of one shift: byte j of a plane holds channels j, j + this, ...
template <int kWidth>
inline int channels_of_a_shift(int head_dim) {
  return kWidth == 4 ? head_dim / 2 : kWidth == 2 ? head_dim / 4 : kWidth == 3 ? head_dim / 8 : head_dim;
}

template <int kWidth>
inline Bytes codes_of(const uint8_t* low, int low_shift, const uint8_t* high, int high_shift) {
  if constexpr (kWidth == 8 || kWidth == 1) return bload(low);
  Bytes codes = band(bword_shr(bload(low), low_shift), bset1(kMask<kWidth>));
  if constexpr (kWidth == 3) return bor(codes, bshl<2>(band(bword_shr(bload(high), high_shift), bset1(1))));
  return codes;
}

// scores[r, 16 n + lane] = the product of row r's query with the key of a token.
template <int kWidth, int kRows, int kVectors>
void score_packed(const KeyTile& t, const uint8_t* digits, float* scores) {
  constexpr bool kTwo = has_two_digits(kWidth);
  const int dim = t.head_dim, run = channels_of_a_shift<kWidth>(dim);
  const int64_t row_bytes = t.digits_stride;
  Ahead ahead = t.ahead;
  int c = 0, level = 0, in_run = 0;  // channel c is channel in_run of the shift `level`: a division takes ten products
  for (int g = 0; g < t.num_groups; g++) {
    Ints high[kRows][kVectors], low[kRows][kVectors];
    NIBBLE_UNROLL for (int r = 0; r < kRows; r++)
      NIBBLE_UNROLL for (int n = 0; n < kVectors; n++) high[r][n] = low[r][n] = izero();
    for (int end = c + t.group_size; c < end;) {
      int stop = min_of(end, c + run - in_run), shift = kWidth == 3 ? level / 2 * 2 : level * kWidth;
      int64_t above = in_run / 4 * t.stride, at = above;
      if (kWidth == 3 && level % 2) at += run / 4 * t.stride;
      above += t.high;
      in_run += stop - c;
      const int bit = level;
      if (in_run == run) in_run = 0, level++;
      for (; c < stop; c += 4, at += t.stride, above += t.stride) {
        Bytes codes[kVectors];
        ahead.template fetch<kKeyLines<kWidth, kVectors>>();
        NIBBLE_UNROLL for (int n = 0; n < kVectors; n++)
          codes[n] = codes_of<kWidth>(t.keys[n] + at, shift, t.keys[n] + above, bit);
        NIBBLE_UNROLL for (int r = 0; r < kRows; r++) {
          const int8_t* d = (const int8_t*)digits + r * row_bytes + c;
          Four first_digit = four(d);
          NIBBLE_UNROLL for (int n = 0; n < kVectors; n++)
            high[r][n] = dot_keys<kWidth>(high[r][n], codes[n], first_digit);
          if constexpr (kTwo) {
            Four second_digit = four(d + dim);
            NIBBLE_UNROLL for (int n = 0; n < kVectors; n++)
              low[r][n] = dot_keys<kWidth>(low[r][n], codes[n], second_digit);
          }
        }
      }
    }
    NIBBLE_UNROLL for (int n = 0; n < kVectors; n++) {
      Floats scales = load(t.parameters + (int64_t)g * t.parameters_stride + 16 * n);
      Floats zeros = load(t.parameters + (int64_t)(t.num_groups + g) * t.parameters_stride + 16 * n);
      NIBBLE_UNROLL for (int r = 0; r < kRows; r++) {
        const float* d = (const float*)(digits + r * row_bytes + 2 * dim) + g;
        float* to = scores + r * kSplit + 16 * n;
        Floats product = mul(to_float(whole_of<kTwo>(high[r][n], low[r][n])), scales), unit = set1(d[0]);
        product = g ? fma(product, unit, load(to)) : mul(product, unit);
        store(to, fma(zeros, set1(d[t.num_groups]), product));
      }
    }
  }
}

// ---- values ---------------------------------------------------------------------------------------------------------

// Shifts of codes that are read where they lie: byte j of a row holds channels j, j + this many bytes, ...
template <int kWidth>
inline constexpr int kShifts = kWidth == 4 ? 2 : kWidth == 2 ? 4 : 1;
template <int kWidth>
inline constexpr int kTileShifts = kTurnsInTiles ? kShifts<kWidth> : 1;
constexpr int kMaxShifts = 4;
// Vectors of 16 bytes of a row that a tile takes.
template <int kWidth>
inline constexpr int kTileColumns = kTurnsInTiles && kWidth != 2 ? 2 : 1;

struct ValueTile {
  const uint8_t* rows[kBlock / 16];  // of 16 tokens: as they lie, or turned, 64 bytes for every 4
  int64_t row_bytes;
  int num_vectors;                   // of 16 tokens
  int first_shift;                   // bits
  int64_t digits[kMaxShifts], units[kMaxShifts], channels[kMaxShifts];  // where those of a shift begin
  int64_t digits_stride;             // between rows; of a row kBlock digits, at 8 bits kBlock low ones more
  int64_t units_stride;
  Ahead ahead;
};

// 4 tokens side by side.
template <int kColumns>
inline void read_quad(const ValueTile& t, const uint8_t* rows, int quad, Bytes* to) {
  if constexpr (!kTurnsInTiles)
    to[0] = bload(rows + 64 * quad);
  else if constexpr (kColumns == 2)
    interleave_pair(rows + 4 * quad * t.row_bytes, t.row_bytes, to[0], to[1]);
  else
    to[0] = interleave(rows + 4 * quad * t.row_bytes, t.row_bytes);
}

// out[r, channel + 16 n + lane] += d_r sum over tokens of A[r, t] c[t]: d at `units`, A at `digits`.
template <int kWidth, int kRows, int kColumns>
void mix_packed(const ValueTile& t, const uint8_t* digits, const float* units, float* out, int64_t out_stride) {
  constexpr bool kTwo = has_two_digits(kWidth);
  constexpr int kOwnShifts = kTileShifts<kWidth>;
  Ints high[kOwnShifts][kRows][kColumns], low[kOwnShifts][kRows][kColumns];
  NIBBLE_UNROLL for (int i = 0; i < kOwnShifts; i++)
    NIBBLE_UNROLL for (int r = 0; r < kRows; r++)
      NIBBLE_UNROLL for (int n = 0; n < kColumns; n++) high[i][r][n] = low[i][r][n] = izero();
  const uint8_t* own[kOwnShifts];
  for (int i = 0; i < kOwnShifts; i++) own[i] = digits + t.digits[i];
  const int64_t row_bytes = t.digits_stride;
  const int first_shift = kOwnShifts > 1 ? 0 : t.first_shift;
  Ahead ahead = t.ahead;
  for (int v = 0; v < t.num_vectors; v++)
#pragma GCC unroll 1  // unrolled, gcc 12 copies sums about
    for (int quad = 0; quad < 4; quad++) {
      Bytes read[kColumns];
      if constexpr (kTurnsInTiles) ahead.template fetch<kColumns>();  // as much as is read
      read_quad<kColumns>(t, t.rows[v], quad, read);
      NIBBLE_UNROLL for (int i = 0; i < kOwnShifts; i++) {
        Bytes codes[kColumns];
        NIBBLE_UNROLL for (int n = 0; n < kColumns; n++)
          codes[n] = kShifts<kWidth> == 1 ? read[n]
                                          : band(bword_shr(read[n], first_shift + i * kWidth), bset1(kMask<kWidth>));
        NIBBLE_UNROLL for (int r = 0; r < kRows; r++) {
          const int8_t* d = (const int8_t*)own[i] + r * row_bytes + 16 * v + 4 * quad;
          Four first_digit = four(d);
          NIBBLE_UNROLL for (int n = 0; n < kColumns; n++)
            high[i][r][n] = kTwo ? dot(high[i][r][n], codes[n], first_digit)
                                 : dot_unsigned(high[i][r][n], first_digit, codes[n]);
          if constexpr (kTwo) {
            Four second_digit = four(d + kBlock);
            NIBBLE_UNROLL for (int n = 0; n < kColumns; n++) low[i][r][n] = dot(low[i][r][n], codes[n], second_digit);
          }
        }
      }
    }
  NIBBLE_UNROLL for (int i = 0; i < kOwnShifts; i++)
    NIBBLE_UNROLL for (int r = 0; r < kRows; r++) {
      Floats unit = set1(units[t.units[i] + r * t.units_stride]);
      NIBBLE_UNROLL for (int n = 0; n < kColumns; n++) {
        float* to = out + r * out_stride + t.channels[i] + 16 * n;
        store(to, fma(to_float(whole_of<kTwo>(high[i][r][n], low[i][r][n])), unit, load(to)));
      }
    }
}

// ---- shapes ---------------------------------------------------------------------------------------------------------

template <int n>
struct Count {
  static constexpr int value = n;
};

template <class F>
inline void by_rows(int rows, F f) {
  if constexpr (kPackedRows == 6) {
    switch (rows) {
      case 3: return f(Count<3>());
      case 4: return f(Count<4>());
      case 5: return f(Count<5>());
      case 6: return f(Count<6>());
    }
  }
  return rows == 1 ? f(Count<1>()) : f(Count<2>());
}

template <bool kTwo, class F>
inline void by_vectors(int vectors, F f) {
  if constexpr (kPackedVectors == 4) {
    if constexpr (!kTwo)
      if (vectors == 4) return f(Count<4>());
    if (vectors == 2) return f(Count<2>());
  }
  return f(Count<1>());
}

template <class F>
inline void by_width(int width, F f) {
  switch (width) {
    case 8: return f(Count<8>());
    case 4: return f(Count<4>());
    case 3: return f(Count<3>());
    case 2: return f(Count<2>());
    default: return f(Count<1>());
  }
}

}  // namespace
}  // namespace nibble::NIBBLE_ISA
