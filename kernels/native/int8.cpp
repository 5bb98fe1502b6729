#include "int8.hpp"

#include "codes.hpp"
#include "integer_tile.hpp"
#include "parameters.hpp"
#include "simd/simd.hpp"

namespace nibble::NIBBLE_ISA {
namespace {

constexpr int kSpanSlabs = (int)(kSpanChannels / kSlabChannels);

// ---- one run --------------------------------------------------------------------------------------------------------

// One run of T tokens' activations, and the sums of 16 rows' codes in it.
template <int T>
struct Run {
  const int32_t* sums;   // [T]
  const int32_t* zeros;  // [T]
  const int32_t* codes;  // [16], or nullptr

  Run(const TokenCodes& x, int64_t token, int run, const int32_t* code_sums, int64_t row_block)
      : sums(x.sums + token * x.num_runs + (int64_t)run * T),
        zeros(x.zeros + token),
        codes(code_sums ? code_sums + (row_block * x.num_runs + run) * kRows : nullptr) {}
};

// From sums of codes times activations to sums without their zero points. kStarted: sums began at those of a zero
// point that all weights have. parameters: of 4 blocks, the run's in `slot`.
template <int T, bool kStarted>
inline void take_zeros(const Packed& w, Ints (&dots)[T], const Run<T>& run, const uint8_t* parameters, int slot) {
  if (w.zero_type == ZeroType::constant) {
    if constexpr (!kStarted)
      for (int t = 0; t < T; t++) dots[t] = iadd(dots[t], iset1(run.sums[t]));
  } else {
    Ints zeros = load_u8(parameters + w.zeros_offset + slot * kRows);
    for (int t = 0; t < T; t++) dots[t] = isub(dots[t], imul(zeros, iset1(run.sums[t])));
  }
  if (!run.codes) return;
  Ints codes = iload(run.codes);
  for (int t = 0; t < T; t++) dots[t] = isub(dots[t], imul(codes, iset1(run.zeros[t])));
}

template <class C, int T>
inline void add_block(Ints (&dots)[T], Source from, const int8_t* values) {
  add_units<C>(dots, from, values, [](const uint8_t* p, const uint8_t* e, Bytes* out) { C::unpack(p, e, out); });
}

// ---- one slab of a row block, T tokens from `token` on --------------------------------------------------------------

struct Slab {
  int first, stop;  // blocks
  int full_units, last_units;
  const uint8_t* start;
  const int8_t* values;

  Slab(const Packed& w, int64_t row_block, int slab, const TokenCodes& x, int64_t token, int width)
      : first(slab * w.slab_blocks),
        stop(slab + 1 < w.num_slabs ? first + w.slab_blocks : w.num_blocks),
        full_units(units_of(w, 0)),
        last_units(units_of(w, w.num_blocks - 1)),
        start(w.start + slab_at(w, row_block, slab)),
        values(x.values + token * x.stride + (int64_t)first * w.block_channels * width) {}
};

// Weights with one scale a row.
template <class C, int T>
inline void add_slab(const Packed& w, Ints (&dots)[T], const Slab& slab) {
  const uint8_t* p = slab.start;
  const int8_t* values = slab.values;
  for (int block = slab.first; block < slab.stop; block++) {
    if (block % kParameterBlocks == 0) p += w.codes_offset;
    Source from{p, block + 1 < w.num_blocks ? slab.full_units : slab.last_units};
    if constexpr (T > 1) {
      add_block<C>(dots, from, values);
    } else {  // a chain of sums through all blocks would be waited for
      Ints own[1] = {izero()};
      add_block<C>(own, from, values);
      dots[0] = iadd(dots[0], own[0]);
    }
    p += w.codes_block_bytes;
    values += T * w.block_channels;
  }
}

// Weights with groups.
template <class C, int T>
inline void add_slab(const Packed& w, Floats (&sums)[T], const Slab& slab, const TokenCodes& x, int64_t token,
                     const int32_t* code_sums, int64_t row_block) {
  const uint8_t *p = slab.start, *parameters = p;
  const int8_t* values = slab.values;
  for (int block = slab.first; block < slab.stop; block++) {
    int slot = block % kParameterBlocks;
    if (slot == 0) {
      parameters = p;
      p += w.codes_offset;
      for (int64_t line = 0; line < w.codes_offset; line += 64)
        prefetch(parameters + line + (T == kTileTokens ? 8 : 1) * kPrefetchBytes);
    }
    Run<T> run(x, token, block, code_sums, row_block);
    bool constant = w.zero_type == ZeroType::constant;
    Ints dots[T];
    NIBBLE_UNROLL
    for (int t = 0; t < T; t++) dots[t] = iset1(constant ? run.sums[t] : 0);
    add_block<C>(dots, {p, block + 1 < w.num_blocks ? slab.full_units : slab.last_units}, values);
    take_zeros<T, true>(w, dots, run, parameters, slot);
    Floats scale = load_scales(w.scale_type, parameters, slot);
    NIBBLE_UNROLL
    for (int t = 0; t < T; t++) sums[t] = fma(to_float(dots[t]), scale, sums[t]);
    p += w.codes_block_bytes;
    values += T * w.block_channels;
  }
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

template <int T>
inline void finish(const Packed& w, const Floats (&sums)[T], int64_t row_block, const TokenCodes& x, int64_t token,
                   float* out) {
  Floats factors = load((const float*)(w.start + factors_at(w, row_block)));
  float* to = out + token * w.num_rows + row_block * kRows;
  for (int t = 0; t < T; t++)
    store_rows(to + t * w.num_rows, mul(mul(sums[t], factors), set1(x.scales[token + t])),
               w.num_rows - row_block * kRows);
}

// Row blocks first to last - 1, of one panel, for T tokens from `token` on.
template <class C, int T>
void row_tile(const Packed& w, int64_t first, int64_t last, const TokenCodes& x, int64_t token,
              const int32_t* code_sums, float* out) {
  int32_t integers[kPanelBlocks][T][kRows];  // sums over the slabs before, of this run
  float totals[kPanelBlocks][T][kRows];      // and over the runs before
  for (int slab = 0; slab < w.num_slabs; slab++) {
    const int run = slab / kSpanSlabs;
    const bool starts = slab % kSpanSlabs == 0, all = slab + 1 == w.num_slabs;
    const bool ends = all || (slab + 1) % kSpanSlabs == 0;
    for (int64_t block = first; block < last; block++) {
      int64_t i = block - first;
      Slab part(w, block, slab, x, token, T);
      Ints dots[T];
      NIBBLE_UNROLL
      for (int t = 0; t < T; t++) dots[t] = starts ? izero() : iload(integers[i][t]);
      add_slab<C, T>(w, dots, part);
      if (!ends) {
        for (int t = 0; t < T; t++) istore(integers[i][t], dots[t]);
        continue;
      }
      take_zeros<T, false>(w, dots, Run<T>(x, token, run, code_sums, block), part.start, 0);
      Floats sums[T];
      for (int t = 0; t < T; t++) sums[t] = run ? add(load(totals[i][t]), to_float(dots[t])) : to_float(dots[t]);
      if (all) {
        finish<T>(w, sums, block, x, token, out);
        continue;
      }
      for (int t = 0; t < T; t++) store(totals[i][t], sums[t]);
    }
  }
}

template <class C, int T>
void group_tile(const Packed& w, int64_t first, int64_t last, const TokenCodes& x, int64_t token,
                const int32_t* code_sums, float* out) {
  float totals[kPanelBlocks][T][kRows];  // sums over the slabs before
  for (int slab = 0; slab < w.num_slabs; slab++) {
    for (int64_t block = first; block < last; block++) {
      float(&own)[T][kRows] = totals[block - first];
      Floats sums[T];
      NIBBLE_UNROLL
      for (int t = 0; t < T; t++) sums[t] = slab ? load(own[t]) : zero();
      add_slab<C, T>(w, sums, Slab(w, block, slab, x, token, T), x, token, code_sums, block);
      if (slab + 1 < w.num_slabs) {
        for (int t = 0; t < T; t++) store(own[t], sums[t]);
        continue;
      }
      finish<T>(w, sums, block, x, token, out);
    }
  }
}

template <class C>
void all_tokens(const Packed& w, int64_t first, int64_t last, const TokenCodes& x, const int32_t* code_sums,
                float* out) {
  const bool rows = w.scale_type == ScaleType::none;
  auto tile = [&]<int T>(int64_t from, int64_t to, int64_t token) {
    (rows ? row_tile<C, T> : group_tile<C, T>)(w, from, to, x, token, code_sums, out);
  };
  for (int64_t i = first, stop; i < last; i = stop) {
    int64_t end = (i / kPanelBlocks + 1) * kPanelBlocks;
    stop = end < last ? end : last;
    for (int64_t token = 0; token < x.num_tokens;) {
      int width = tile_of(token, x.num_tokens).width;
      switch (width) {
        case 8: tile.template operator()<8>(i, stop, token); break;
        case 4: tile.template operator()<4>(i, stop, token); break;
        case 2: tile.template operator()<2>(i, stop, token); break;
        default: tile.template operator()<1>(i, stop, token); break;
      }
      token += width;
    }
  }
}

void row_blocks(const Packed& w, int64_t first, int64_t last, const TokenCodes& x, const int32_t* code_sums,
                float* out) {
  if (w.codes == Codes::u4) return all_tokens<U4>(w, first, last, x, code_sums, out);
  all_tokens<U8>(w, first, last, x, code_sums, out);
}

// ---- activations ----------------------------------------------------------------------------------------------------

struct Scale {
  float scale;
  int32_t zero;
};

inline float not_zero(float scale) { return scale == 0 ? 0x1p-23f : scale; }  // a token of zeros: any will do

inline int32_t lane0(Ints x) {
  int32_t lanes[16];
  istore(lanes, x);
  return lanes[0];
}

// The rule's scale and zero of one token.
inline Scale scale_of(const float* x, int64_t num_channels, const TokenRounding& rule) {
  Ints magnitudes = izero();  // they compare as integers, and NaN as the largest of them
  Floats highest = zero(), lowest = zero();  // the latter negated; 0 is always within the range
  for (int64_t i = 0; i < num_channels; i += 16) {
    Floats v = load_some(x + i, num_channels - i);
    magnitudes = imax_unsigned(magnitudes, iand(bits(v), iset1(0x7fffffff)));
    if (rule.symmetric) continue;
    highest = max(v, highest);
    lowest = max(sub(zero(), v), lowest);
  }
  uint32_t magnitude = ireduce_max_unsigned(magnitudes);
  const uint32_t infinity = 0x7f800000;
  if (rule.fixed) return {magnitude > infinity ? __builtin_nanf("") : rule.scale, rule.zero};
  if (magnitude >= infinity) return {__builtin_nanf(""), 0};
  float low = -(float)(1 << (rule.bits - 1)), high = -low - 1;
  if (rule.symmetric) {
    float peak;
    __builtin_memcpy(&peak, &magnitude, 4);
    return {not_zero(peak / ((high - low) / 2)), 0};
  }
  float bottom = -reduce_max(lowest), scale = not_zero((reduce_max(highest) - bottom) / (high - low));
  Floats at = set1(low - bottom / scale);
  return {scale, lane0(to_int(min(max(at, set1(low)), set1(high))))};
}

// A few channels of one token. Returns the sum of codes less their zero.
inline int32_t round_channels(const float* x, int64_t num_channels, Scale by, int bits, int width, int8_t* values) {
  Floats scale = set1(by.scale), offset = set1((float)by.zero);
  Floats low = set1(-(float)(1 << (bits - 1))), high = set1((float)(1 << (bits - 1)) - 1);
  Ints zeros = iset1(by.zero), sum = izero();
  for (int64_t i = 0; i < num_channels; i += 16) {
    Floats scaled = add(div(load_some(x + i, num_channels - i), scale), offset);
    Ints code = to_int(min(max(scaled, low), high));
    spread(values + i * width, width, code);
    sum = iadd(sum, isub(code, zeros));  // channels past the end have the code of 0
  }
  return ireduce_add(sum);
}

void round_tile(const float* x, int64_t num_channels, const TokenRounding& rule, const TokenCodes& to, Tile tile) {
  constexpr int64_t kPiece = 1024;  // channels: those of 8 tokens stay in the first cache
  int8_t* values = to.values + tile.first * to.stride;
  int32_t* sums = to.sums + tile.first * to.num_runs;
  Scale scales[kTileTokens];
  for (int lane = 0; lane < tile.width; lane++) {
    scales[lane] = scale_of(x + (tile.first + lane) * num_channels, num_channels, rule);
    to.scales[tile.first + lane] = scales[lane].scale;
    to.zeros[tile.first + lane] = scales[lane].zero;
    if (scales[lane].scale != scales[lane].scale) scales[lane] = {__builtin_inff(), 0};  // every code is 0
  }
  for (int run = 0; run < to.num_runs; run++) {
    int64_t start = run * to.run_channels, end = start + to.run_channels;
    if (end > num_channels) end = num_channels;
    int32_t own[kTileTokens] = {};
    for (int64_t channel = start; channel < end; channel += kPiece) {
      int64_t count = end - channel < kPiece ? end - channel : kPiece;
      for (int lane = 0; lane < tile.width; lane++)
        own[lane] += round_channels(x + (tile.first + lane) * num_channels + channel, count, scales[lane], rule.bits,
                                    tile.width, values + channel * tile.width + 4 * lane);
    }
    for (int lane = 0; lane < tile.width; lane++) sums[run * tile.width + lane] = to.sum_factor * own[lane];
  }
}

}  // namespace

const Int8Ops int8_ops = {round_tile, row_blocks};

}  // namespace nibble::NIBBLE_ISA
