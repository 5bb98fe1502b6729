#include "exact.hpp"

#include "codes.hpp"
#include "float_tile.hpp"
#include "parameters.hpp"
#include "simd/simd.hpp"

namespace nibble::NIBBLE_ISA {
namespace {

constexpr int kBlocks = kPanelRows / kRows;             // row blocks of a panel
constexpr int kFewTokens = kRegisters ? 4 : 0;  // take their weights from registers; for more a float panel is faster
constexpr int kTogether = kRegisters >= 32 ? kBlocks : 1;  // row blocks that they pass over at once
constexpr int kCodesAhead = 1024;                         // bytes

// ---- units to floats: how codes of channel k of a unit come to the low bits of their lane --------------------------

// Codes of up to 4 bits choose one of 16 floats, by bits that need not be cut out of their word.
struct Fours {
  static constexpr bool chosen = true;
  static constexpr int channels = 16, main = 128, extra = 0, vectors = 2;
  static void unpack(const uint8_t* p, const uint8_t*, Bytes* out) {
    out[0] = bload(p);
    out[1] = bload(p + 64);
  }
  static Ints code(const Bytes* v, int k) { return word_shr(v[k / 8], 8 * (k % 4) + k / 4 % 2 * 4); }
};
struct Twos {  // the table repeats itself: the upper 2 of the 4 bits belong to another channel
  static constexpr bool chosen = true;
  static constexpr int channels = 16, main = 64, extra = 0, vectors = 1;
  static void unpack(const uint8_t* p, const uint8_t*, Bytes* out) { out[0] = bload(p); }
  static Ints code(const Bytes* v, int k) { return word_shr(v[0], 8 * (k % 4) + 2 * (k / 4)); }
};
template <class C, bool kChosen>
struct Unpacked {
  static constexpr bool chosen = kChosen;
  static constexpr int channels = 4 * C::steps, main = C::main, extra = C::extra, vectors = C::steps;
  static void unpack(const uint8_t* p, const uint8_t* e, Bytes* out) { C::unpack(p, e, out); }
  static Ints code(const Bytes* v, int k) { return word_shr(v[k / 4], 8 * (k % 4)); }
};

// What is the same for all blocks of a matrix.
struct Values {
  Floats entries;  // of each code, where 16 are enough
  bool subtract;   // the zero point; it is in the entries otherwise
  bool add;        // the offset, to the scaled code
};

// What is the same for a row block's channels of one block. Weights with offsets are scaled as they are unpacked.
struct Shift {
  Floats zeros, scales;
};

template <class C>
inline Floats value(const Bytes* v, int k, const Values& values, const Shift& shift) {
  if constexpr (C::chosen) {
    Floats w = choose(values.entries, C::code(v, k));
    if (values.add) return fma(shift.scales, w, shift.zeros);
    return values.subtract ? sub(w, shift.zeros) : w;
  } else {
    Floats w = to_float(iand(C::code(v, k), iset1(255)));
    return values.add ? fma(shift.scales, w, shift.zeros) : sub(w, shift.zeros);
  }
}

inline Values values_of(const Packed& w, int num_codes) {
  float entries[16];
  bool add = adds_offsets(w), subtract = !add && w.num_planes == 0 && w.zero_type != ZeroType::constant;
  for (int i = 0; i < 16; i++) {
    int code = i % num_codes;
    entries[i] = w.num_planes ? w.entries[code] : (float)(subtract ? code : code - w.zero);
  }
  return {load(entries), subtract, add};
}

// ---- a panel's place in the stream ----------------------------------------------------------------------------------

struct Place {
  int64_t rows[kBlocks];           // row blocks; one that does not exist is the last again
  const uint8_t* blocks[kBlocks];  // where the stream of each stands
  const uint8_t* parameters[kBlocks];

  Place(const Packed& w, int64_t panel) {
    for (int r = 0; r < kBlocks; r++) {
      int64_t block = panel * kBlocks + r, last = w.num_row_blocks() - 1;
      rows[r] = block < last ? block : last;
    }
  }
  void enter(const Packed& w, int block) {
    if (block % kParameterBlocks) return;
    for (int r = 0; r < kBlocks; r++) {
      if (block % w.slab_blocks == 0) blocks[r] = w.start + slab_at(w, rows[r], block / w.slab_blocks);
      parameters[r] = blocks[r];
      blocks[r] += w.codes_offset;
    }
  }
  void leave(const Packed& w) {
    for (int r = 0; r < kBlocks; r++) blocks[r] += w.codes_block_bytes;
  }
  Shift shift(const Packed& w, int r, int block) const {
    if (w.zero_type == ZeroType::constant) return {set1((float)w.zero), set1(1.0f)};
    int slot = block % kParameterBlocks;
    Floats zeros = load_zeros(w.zero_type, parameters[r] + w.zeros_offset, slot);
    return {zeros, adds_offsets(w) ? load_scales(w.scale_type, parameters[r], slot) : set1(1.0f)};
  }
  // Returns the scales of the block's 64 rows, or nullptr where all are 1 or are in the weights.
  const float* scales(const Packed& w, int block, float* to) const {
    if (w.scale_type == ScaleType::none || adds_offsets(w)) return nullptr;
    int slot = block % kParameterBlocks;
    for (int r = 0; r < kBlocks; r++) store(to + 16 * r, load_scales(w.scale_type, parameters[r], slot));
    return to;
  }
};

// ---- few tokens -----------------------------------------------------------------------------------------------------

// The first `channels` of a unit, in order.
template <class C, int R, int T, bool kAll>
inline void add_unit(Floats (&sums)[T][R], const Bytes (&v)[R][C::vectors], const Values& values,
                     const Shift (&shifts)[R], const float* x, int64_t x_stride, int channels) {
#pragma GCC unroll kUnroll
  for (int k = 0; k < C::channels; k++) {
    if (!kAll && k >= channels) return;
    Floats weights[R];
#pragma GCC unroll kUnroll
    for (int r = 0; r < R; r++) weights[r] = value<C>(v[r], k, values, shifts[r]);
#pragma GCC unroll kUnroll
    for (int t = 0; t < T; t++) {
      Floats activation = set1(x[t * x_stride + k]);
#pragma GCC unroll kUnroll
      for (int r = 0; r < R; r++) sums[t][r] = fma(weights[r], activation, sums[t][r]);
    }
  }
}

// R row blocks from `first` on and T tokens, over one block of channels.
template <class C, int R, int T>
inline void few_tokens(const Packed& w, const Place& at, int first, int block, const Values& values, const float* x,
                       int channels, const Totals& to) {
  Floats sums[T][R];
  Shift shifts[R];
#pragma GCC unroll kUnroll
  for (int r = 0; r < R; r++) {
    shifts[r] = at.shift(w, first + r, block);
#pragma GCC unroll kUnroll
    for (int t = 0; t < T; t++) sums[t][r] = zero();
  }
  int units = units_of(w, block);
  for (int unit = 0; unit < units; unit++, x += C::channels) {
    Bytes v[R][C::vectors];
#pragma GCC unroll kUnroll
    for (int r = 0; r < R; r++) {
      const uint8_t* codes = at.blocks[first + r] + unit * C::main;
      for (int line = 0; line < C::main; line += 64) prefetch(codes + line + kCodesAhead);
      C::unpack(codes, at.blocks[first + r] + units * C::main + unit * C::extra, v[r]);
    }
    int left = channels - unit * C::channels;
    if (left >= C::channels)
      add_unit<C, R, T, true>(sums, v, values, shifts, x, w.num_channels, C::channels);
    else
      add_unit<C, R, T, false>(sums, v, values, shifts, x, w.num_channels, left);
  }
  add_to<R, T>(to, sums);
}

template <class C, int T>
void panel_of_few(const Packed& w, const Place& at, int block, const Values& values, const float* x, int channels,
                  int64_t num_tokens, const Totals& to) {
  if constexpr (T > 1)
    if (num_tokens < T) return panel_of_few<C, T - 1>(w, at, block, values, x, channels, num_tokens, to);
  for (int r = 0; r < kBlocks; r += kTogether)
    few_tokens<C, kTogether, T>(w, at, r, block, values, x, channels, from(to, 0, 16 * r));
}

// ---- many tokens ----------------------------------------------------------------------------------------------------

// One block of channels of 64 rows to floats, channel by channel; the last unit is written whole.
template <class C>
void widen(const Packed& w, const Place& at, int block, const Values& values, float* to) {
  int units = units_of(w, block);
  for (int r = 0; r < kBlocks; r++) {
    Shift shift = at.shift(w, r, block);
    for (int unit = 0; unit < units; unit++) {
      const uint8_t* codes = at.blocks[r] + unit * C::main;
      for (int line = 0; line < C::main; line += 64) prefetch(codes + line + kCodesAhead);
      Bytes v[C::vectors];
      C::unpack(codes, at.blocks[r] + units * C::main + unit * C::extra, v);
#pragma GCC unroll kUnroll
      for (int k = 0; k < C::channels; k++)
        store(to + (unit * C::channels + k) * kPanelRows + 16 * r, value<C>(v, k, values, shift));
    }
  }
}

template <class C>
void all_blocks(const Packed& w, int64_t panel, int num_codes, const float* x, int64_t num_tokens, float* out,
                int64_t stride, float* scratch) {
  const Values values = values_of(w, num_codes);
  float scales[kPanelRows];
  Place at(w, panel);
  for (int block = 0; block < w.num_blocks; block++) {
    at.enter(w, block);
    int64_t first = (int64_t)block * w.block_channels, left = w.num_channels - first;
    int channels = (int)(left < w.block_channels ? left : w.block_channels);
    Totals to{out, stride, at.scales(w, block, scales), block == 0};
    if (num_tokens > kFewTokens) {
      widen<C>(w, at, block, values, scratch);
      tiles<Widened>(scratch, channels, x + first, w.num_channels, num_tokens, to);
    } else if constexpr (kFewTokens > 0) {
      panel_of_few<C, kFewTokens>(w, at, block, values, x + first, channels, num_tokens, to);
    }
    at.leave(w);
  }
  for (int r = 0; r < kBlocks; r++) {
    Floats factors = load((const float*)(w.start + factors_at(w, at.rows[r])));
    for (int64_t t = 0; t < num_tokens; t++) {
      float* row = out + t * stride + 16 * r;
      store(row, mul(load(row), factors));
    }
  }
}

}  // namespace

void packed_panel(const Packed& w, int64_t panel, const float* x, int64_t num_tokens, float* out, int64_t stride,
                  float* scratch) {
  switch (w.codes) {
    case Codes::u2: return all_blocks<Twos>(w, panel, 4, x, num_tokens, out, stride, scratch);
    case Codes::u3: return all_blocks<Unpacked<U3, true>>(w, panel, 8, x, num_tokens, out, stride, scratch);
    case Codes::u4: return all_blocks<Fours>(w, panel, 16, x, num_tokens, out, stride, scratch);
    case Codes::u5: return all_blocks<Unpacked<U5, false>>(w, panel, 16, x, num_tokens, out, stride, scratch);
    case Codes::u6: return all_blocks<Unpacked<U6, false>>(w, panel, 16, x, num_tokens, out, stride, scratch);
    case Codes::u8: return all_blocks<Unpacked<U8, false>>(w, panel, 16, x, num_tokens, out, stride, scratch);
    case Codes::ternary: return all_blocks<Unpacked<Ternary, true>>(w, panel, 4, x, num_tokens, out, stride, scratch);
  }
}

}  // namespace nibble::NIBBLE_ISA
