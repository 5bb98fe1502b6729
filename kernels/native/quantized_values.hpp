// Packed values of a split, weighted, block by block: its scores to digits, then products with its codes.
#pragma once

#include "quantized_split.hpp"

namespace nibble::NIBBLE_ISA {
namespace {

constexpr int kBlockVectors = kBlock / 16;

struct PackedValues {
  const QuantizedSplit& s;
  const RowFormat& format;
  int num_groups, first_block, stop_block;
  float levels, middle, factor;  // factor: of parameters

  explicit PackedValues(const QuantizedSplit& s)
      : s(s), format(s.shape.values), num_groups(format.num_groups), first_block(s.packed.first / kBlock),
        stop_block((s.packed.stop + kBlock - 1) / kBlock), levels((float)weight_levels(format.width)),
        middle((float)format.max_code * 0.5f), factor(factor_of(format, s.call.layer.value_prescale[s.unit.kv_head])) {}

  // Of a block: those with packed tokens.
  int vectors_of(int block) const { return (min_of(s.packed.stop - block * kBlock, kBlock) + 15) / 16; }
  uint8_t* digits(int row, int g) const { return s.digits + (row * num_groups + g) * 2 * kBlock; }

  void run() {
    for (int i = 0; i < s.num_rows * num_groups; i++) store(s.zeros + 16 * i, zero());
    const bool two = has_two_digits(format.width);
    for (int block = first_block; block < stop_block; block++) {
      s.fetch(block * kBlockVectors, vectors_of(block), s.shape.value_parameters_at,
              2 * num_groups * format.parameter_bytes);
      load_parameters(block);
      two ? weigh_all<true>(block) : weigh_all<false>(block);
      mix(block);
    }
    for (int row = 0; row < s.num_rows; row++)
      for (int c = 0, g = 0; c < s.dim; c += 16) {
        if (c == (g + 1) * format.group_size) g++;
        float* to = s.part + row * s.stride + c;
        store(to, add(load(to), set1(factor * reduce_add(load(s.zeros + (row * num_groups + g) * 16)))));
      }
  }

  // ---- parameters

  // Where the parameters of a block's vectors begin.
  struct Sources {
    const uint8_t* at[kBlockVectors];
  };
  Sources sources_of(int block, int vectors) const {
    Sources from{};
    for (int i = 0; i < vectors; i++) {
      int v = block * kBlockVectors + i;
      from.at[i] = s.page_of(v) + s.shape.value_parameters_at + s.token_of(v) * format.parameter_bytes;
    }
    return from;
  }

  void load_parameters(int block) {
    const int vectors = vectors_of(block), groups = num_groups;
    const Sources from = sources_of(block, vectors);
    const bool two = has_two_digits(format.width), whole = vectors == kBlockVectors;
    float *to = s.parameters, *steps = s.steps;
    auto all = [](int, Floats x) { return x; };
    for (int g = 0; g < groups; g++, to += 2 * kBlock)
      steps[g] = two     ? relate_few<true>(from, g, to, vectors, all)
                 : whole ? relate<kBlockVectors, false>(from, g, to, all)
                         : relate_few<false>(from, g, to, vectors, all);
  }

  // Of one group: levels times scales as shares of the largest, zeros as values of the middle code; returns the largest
  // over levels. `keep` makes nothing of tokens that are not read.
  template <int kVectors, bool kHalves, class Keep>
  float relate(const Sources& from, int g, float* to, Keep keep) const {
    const int64_t row = (int64_t)s.page_size * (kHalves ? 2 : 1), zeros_at = num_groups * row;
    const uint8_t* at[kVectors];
    for (int i = 0; i < kVectors; i++) at[i] = from.at[i] + g * row;
    const Floats middles = set1(middle);
    const float own_levels = levels;
    Floats scales[kVectors], peak = zero();
    NIBBLE_UNROLL for (int i = 0; i < kVectors; i++) {
      scales[i] = keep(i, load_parameter<kHalves>(at[i]));
      peak = max(scales[i], peak);
      Floats zeros = keep(i, load_parameter<kHalves>(at[i] + zeros_at));
      store(to + kBlock + 16 * i, fma(scales[i], middles, zeros));
    }
    float most = reduce_max(peak);
    Floats inverse = set1(inverse_of(own_levels, most));
    NIBBLE_UNROLL for (int i = 0; i < kVectors; i++) store(to + 16 * i, mul(scales[i], inverse));
    return most / own_levels;
  }

  // Fewer vectors than a block has; the others are nothing.
  template <bool kHalves, class Keep>
  float relate_few(const Sources& from, int g, float* to, int vectors, Keep keep) const {
    for (int i = 0; i < 2 * kBlock; i += 16) store(to + i, zero());
    switch (vectors) {
      case 1: return relate<1, kHalves>(from, g, to, keep);
      case 2: return relate<2, kHalves>(from, g, to, keep);
      case 3: return relate<3, kHalves>(from, g, to, keep);
      default: return relate<4, kHalves>(from, g, to, keep);
    }
  }

  // ---- weights

  template <bool kTwo>
  void weigh_all(int block) {
    const int first = block * kBlock, stop = first + kBlock;
    for (int row = 0; row < s.num_rows;) {
      if (s.packed.first > first || s.edge(row) < stop) {
        weigh<kTwo, false, 1>(row++, block);
      } else if (kPackedVectors == 1 || row + 1 == s.num_rows) {  // edges grow
        weigh<kTwo, true, 1>(row++, block);
      } else {
        weigh<kTwo, true, 2>(row, block);
        row += 2;
      }
    }
  }

  // Of rows' scores: weights against the block's highest; for every group the digits of weights times scales, and what
  // they leave to the middle code. A row that reads a part of a block has its own largest scale.
  template <bool kTwo, bool kWhole, int kRows>
  void weigh(int row, int block) {
    constexpr int kVectors = kRows * kBlockVectors;
    const float* scores = s.packed_scores + (int64_t)row * kSplit + block * kBlock;
    const float *peaks = s.peaks + 16 * row + block, *shares = s.shares + 16 * row + block;
    const float own_middle = middle, own_factor = factor;
    const int groups = num_groups;
    const float *shared = s.parameters, *steps = s.steps;
    float *units = s.units + row * groups, *zeros = s.zeros + row * groups * 16, *totals = s.totals + 16 * row;
    uint8_t* to = digits(row, 0);
    auto keep = [&](int i, Floats x) {  // of one row
      return kWhole ? x : s.where_packed(row, kBlockVectors * block + i, x, zero());
    };
    Floats weights[kVectors], factors[kRows];
    NIBBLE_UNROLL for (int r = 0; r < kRows; r++)
      NIBBLE_UNROLL for (int i = 0; i < kBlockVectors; i++)
        weights[r * kBlockVectors + i] = sub(load(scores + r * kSplit + 16 * i), set1(peaks[16 * r]));
    exp2_negative<kVectors>(weights);
    NIBBLE_UNROLL for (int r = 0; r < kRows; r++) {
      factors[r] = set1(shares[16 * r]);
      Floats* own = weights + r * kBlockVectors;
      NIBBLE_UNROLL for (int i = 0; i < kBlockVectors; i++) own[i] = keep(i, own[i]);
      Floats sum = own[0];
      NIBBLE_UNROLL for (int i = 1; i < kBlockVectors; i++) sum = add(sum, own[i]);
      store(totals + 16 * r, fma(sum, factors[r], load(totals + 16 * r)));
    }
    for (int g = 0; g < groups; g++) {
      const float* own = shared + g * 2 * kBlock;
      float buffer[2 * kBlock], step = steps[g];
      if (!kWhole) {
        const int vectors = vectors_of(block);
        step = relate_few<kTwo>(sources_of(block, vectors), g, buffer, vectors, keep);
        own = buffer;
      }
      Floats left[kRows], rest[kRows];
      NIBBLE_UNROLL for (int r = 0; r < kRows; r++)
        left[r] = cut<kTwo>(weights + r * kBlockVectors, own, to + (r * groups + g) * 2 * kBlock);
      NIBBLE_UNROLL for (int r = 0; r < kRows; r++) {
        rest[r] = mul(weights[r * kBlockVectors], load(own + kBlock));
        NIBBLE_UNROLL for (int i = 1; i < kBlockVectors; i++)
          rest[r] = fma(weights[r * kBlockVectors + i], load(own + kBlock + 16 * i), rest[r]);
      }
      NIBBLE_UNROLL for (int r = 0; r < kRows; r++) {
        float* at = zeros + (r * groups + g) * 16;
        rest[r] = fnma(left[r], set1(step * own_middle), rest[r]);
        store(at, fma(rest[r], factors[r], load(at)));
        units[r * groups + g] = shares[16 * r] * (step * own_factor);
      }
    }
  }

  // Writes the digits of weights times scales; returns their sums, lane by lane.
  template <bool kTwo>
  static Floats cut(const Floats* weights, const float* scales, uint8_t* to) {
    Ints digit[kBlockVectors];
    NIBBLE_UNROLL for (int i = 0; i < kBlockVectors; i++) digit[i] = to_int(mul(weights[i], load(scales + 16 * i)));
    if constexpr (!kTwo) {
      Bytes bytes = pack_u8(digit[0], digit[1], digit[2], digit[3]);
      bstore(to, bytes);
      const int8_t ones[4] = {1, 1, 1, 1};
      return to_float(dot(izero(), bytes, four(ones)));
    }
    Ints sum = izero();
    NIBBLE_UNROLL for (int i = 0; i < kBlockVectors; i++) {
      sum = iadd(sum, digit[i]);
      write_digits(digit[i], true, (int8_t*)to + 16 * i, kBlock);
    }
    return to_float(sum);
  }

  // ---- codes

  // Values whose codes lie 16 channels of one shift to 16 bytes are read as they are, others unpacked to bytes first.
  void mix(int block) {
    switch (format.width) {
      case 8: return mix_block<8>(block);
      case 4: return s.dim % 32 == 0 ? mix_block<4>(block) : mix_block<1>(block);
      case 2: return s.dim % 64 == 0 ? mix_block<2>(block) : mix_block<1>(block);
      default: return mix_block<1>(block);
    }
  }

  // Rows of a block, from the first byte: as they lie, unpacked, or turned.
  template <int kWidth>
  void place_rows(int block, ValueTile& tile) const {
    constexpr bool kUnpacked = kWidth == 1;
    const int columns = s.dim / kShifts<kWidth> / 16;
    const int64_t row_bytes = kUnpacked ? s.dim + 64 : format.row_bytes;
    tile.row_bytes = row_bytes, tile.num_vectors = vectors_of(block);
    for (int i = 0; i < tile.num_vectors; i++) {
      int v = kBlockVectors * block + i;
      const uint8_t* from = s.page_of(v) + s.shape.value_codes_at + (int64_t)s.token_of(v) * format.row_bytes;
      if (kUnpacked) from = unpack_rows(from, s.unpacked + 16 * i * row_bytes);
      tile.rows[i] = kTurnsInTiles ? from : turn(from, row_bytes, columns, s.codes + 4 * 64 * i);
    }
  }

  // 16 rows, four of them side by side: [16 bytes of a row][quad][64], a block's columns kBlock * 16 bytes apart.
  static const uint8_t* turn(const uint8_t* from, int64_t row_bytes, int columns, uint8_t* to) {
    for (int i = 0; i < 4; i++)
      for (int n = 0; n < columns; n++)
        bstore(to + n * (kBlock * 16) + 64 * i, interleave(from + 4 * i * row_bytes + 16 * n, row_bytes));
    return to;
  }

  // 16 tokens to one byte a channel, dim + 64 bytes apart.
  const uint8_t* unpack_rows(const uint8_t* from, uint8_t* to) const {
    const int row_bytes = format.row_bytes, stride = s.dim + 64;
    if (format.width == 1) {
      unpack_trit_rows(from, to);
      return to;
    }
    for (int t = 0; t < 16; t++) {
      uint8_t row[kMaxHeadDim + 128];
      __builtin_memcpy(row, from + t * row_bytes, (size_t)row_bytes);
      unpack_row(format, s.dim, row, to + t * stride);
    }
    return to;
  }

  // All rows at once: a row by itself would leave most of a vector empty.
  void unpack_trit_rows(const uint8_t* from, uint8_t* to) const {
    constexpr int kMaxRow = kMaxHeadDim / 5 + 1;
    const int n = format.row_bytes;
    uint8_t rows[16 * kMaxRow + 64], trits[5 * 16 * kMaxRow + 64];
    __builtin_memcpy(rows, from, 16 * (size_t)n);
    unpack_trits(16 * n, rows, trits);
    for (int t = 0; t < 16; t++)
      for (int i = 0; i < 5; i++)  // in this order: a copy's surplus is overwritten by the next
        for (int j = 0; j < n; j += 16)
          __builtin_memcpy(to + t * (s.dim + 64) + i * n + j, trits + (16 * i + t) * n + j, 16);
  }

  template <int kWidth>
  void mix_block(int block) {
    ValueTile tile{};
    place_rows<kWidth>(block, tile);
    tile.digits_stride = (int64_t)num_groups * 2 * kBlock;
    tile.units_stride = num_groups;
    const int run = s.dim / kShifts<kWidth>, group_size = format.group_size;  // channels of a shift
    const bool pairs = run % 32 == 0 && group_size % 32 == 0;
    const int64_t next = kTurnsInTiles ? 16 : kBlock * 16;  // from one column to the next
    fetch<kWidth>(block, tile);
    for (int c = 0; c < run;) {
      int columns = kTileColumns<kWidth> == 2 && pairs ? 2 : 1;
      for (int first = 0; first < kShifts<kWidth>; first += kTileShifts<kWidth>) {
        tile.first_shift = first * kWidth;
        for (int i = 0; i < kTileShifts<kWidth>; i++) {
          int channel = (first + i) * run + c, g = channel / group_size;
          tile.channels[i] = channel, tile.units[i] = g, tile.digits[i] = g * 2 * kBlock;
        }
        mix_tiles<kWidth>(tile, columns);
      }
      c += 16 * columns;
      tile.ahead.at += kBlockVectors * 4 * columns * tile.ahead.step;
      for (int i = 0; i < tile.num_vectors; i++) tile.rows[i] += columns * next;
    }
  }

  // Codes: by the tiles, when they read as much.
  template <int kWidth>
  void fetch(int block, ValueTile& tile) {
    const int v = kBlockVectors * block, row_bytes = format.row_bytes;
    bool spread = kTurnsInTiles && kWidth != 1 && tile.num_vectors == kBlockVectors && s.in_one_page(v, kBlockVectors);
    tile.ahead = {spread ? s.later(v, s.shape.value_codes_at, row_bytes) : tile.rows[0], spread ? 64 : 0};
    if (!spread) s.fetch(v, tile.num_vectors, s.shape.value_codes_at, row_bytes);
  }

  template <int kWidth>
  void mix_tiles(ValueTile tile, int columns) {
    int num_tiles = (s.num_rows + kPackedRows - 1) / kPackedRows;
    for (int i = 0; i < num_tiles; i++) {
      if (i) tile.ahead.step = 0;
      int row = s.num_rows * i / num_tiles, rows = s.num_rows * (i + 1) / num_tiles - row;
      const uint8_t* from = digits(row, 0);
      const float* units = s.units + row * num_groups;
      float* to = s.part + row * s.stride;
      by_rows(rows, [&](auto r) {
        if (kTileColumns<kWidth> == 2 && columns == 2)
          mix_packed<kWidth, decltype(r)::value, kTileColumns<kWidth>>(tile, from, units, to, s.stride);
        else
          mix_packed<kWidth, decltype(r)::value, 1>(tile, from, units, to, s.stride);
      });
    }
  }
};

}  // namespace
}  // namespace nibble::NIBBLE_ISA
