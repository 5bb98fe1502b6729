// Packed values of a split, weighted: parameters and digits of the weights of all its blocks, then the products.
#pragma once

#include "quantized_split.hpp"

namespace nibble::NIBBLE_ISA {
namespace {

struct PackedValues {
  const QuantizedSplit& s;
  const RowFormat& format;
  int num_groups, first_block, stop_block;
  float levels, middle;
  Floats factor;  // of parameters

  explicit PackedValues(const QuantizedSplit& s)
      : s(s), format(s.shape.values), num_groups(format.num_groups), first_block(s.packed.first / kBlock),
        stop_block((s.packed.stop + kBlock - 1) / kBlock), levels((float)weight_levels(format.width)),
        middle((float)format.max_code * 0.5f), factor(factor_of(format, s.call.layer.value_prescale[s.unit.kv_head])) {}

  // Of a block: those with packed tokens.
  int vectors_of(int block) const { return (min_of(s.packed.stop - block * kBlock, kBlock) + 15) / 16; }
  uint8_t* digits(int row, int g) const { return s.digits + (row * num_groups + g) * 2 * kBlock; }
  float* units(int row, int g) const { return s.units + row * num_groups + g; }

  void run() {
    for (int i = 0; i < s.num_rows * num_groups; i++) store(s.zeros + 16 * i, zero());
    for (int block = first_block; block < stop_block; block++) {
      load_parameters_of(block);
      for (int row = 0; row < s.num_rows; row++) cut_weights(row, block);
      load_codes(block);
      if (is_direct())
        by_width(format.width, [&](auto width) { mix_block<decltype(width)::value>(block); });
      else
        mix_block<1>(block);
    }
    for (int row = 0; row < s.num_rows; row++)
      for (int c = 0, g = 0; c < s.dim; c += 16) {
        if (c == (g + 1) * format.group_size) g++;
        float* to = s.part + row * s.stride + c;
        store(to, add(load(to), set1(reduce_add(load(s.zeros + (row * num_groups + g) * 16)))));
      }
  }

  // ---- parameters

  // Where the parameters of a block's vectors begin.
  struct Sources {
    const uint8_t* at[kBlock / 16];
  };
  Sources sources_of(int block, int vectors) const {
    Sources from{};
    for (int i = 0; i < vectors; i++) {
      int v = block * (kBlock / 16) + i;
      from.at[i] = s.page_of(v) + s.shape.value_parameters_at + s.token_of(v) * format.parameter_bytes;
    }
    return from;
  }

  void load_parameters_of(int block) {
    const int vectors = vectors_of(block), groups = num_groups;
    const Sources from = sources_of(block, vectors);
    const bool two = has_two_digits(format.width), whole = vectors == kBlock / 16;
    float *to = s.parameters, *largest = s.largest;
    auto all = [](int, Floats x) { return x; };
    for (int g = 0; g < groups; g++, to += 2 * kBlock)
      largest[g] = two     ? relate_few<true>(from, g, to, vectors, all)
                   : whole ? relate<kBlock / 16, false>(from, g, to, all)
                           : relate_few<false>(from, g, to, vectors, all);
  }

  // Of one group: scales as shares of the largest, zeros as values of the middle code; returns the largest. `keep`
  // makes nothing of tokens that are not read.
  template <int kVectors, bool kHalves, class Keep>
  float relate(const Sources& from, int g, float* to, Keep keep) const {
    const int64_t row = (int64_t)s.page_size * (kHalves ? 2 : 1), zeros_at = num_groups * row;
    const uint8_t* at[kVectors];
    for (int i = 0; i < kVectors; i++) at[i] = from.at[i] + g * row;
    const Floats own_factor = factor, middles = set1(middle);
    Floats scales[kVectors], peak = zero();
    NIBBLE_UNROLL for (int i = 0; i < kVectors; i++) {
      scales[i] = keep(i, load_parameter<kHalves>(at[i], own_factor));
      peak = max(scales[i], peak);
      Floats zeros = keep(i, load_parameter<kHalves>(at[i] + zeros_at, own_factor));
      store(to + kBlock + 16 * i, fma(scales[i], middles, zeros));
    }
    float most = reduce_max(peak);
    Floats inverse = set1(inverse_of(1.0f, most));
    NIBBLE_UNROLL for (int i = 0; i < kVectors; i++) store(to + 16 * i, mul(scales[i], inverse));
    return most;
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

  // Whether the row reads all tokens of a block packed.
  bool is_whole(int row, int block) const {
    return s.packed.first <= block * kBlock && s.edge(row) >= (block + 1) * kBlock;
  }

  void cut_weights(int row, int block) {
    const bool two = has_two_digits(format.width);
    if (is_whole(row, block))
      two ? cut<true, true>(row, block) : cut<false, true>(row, block);
    else
      two ? cut<true, false>(row, block) : cut<false, false>(row, block);
  }

  // The digits of a row's weights times scales, for every group, and what they leave to the middle code. A row that
  // reads a part of a block has its own largest scale.
  template <bool kTwo, bool kWhole>
  void cut(int row, int block) {
    const int vectors = kWhole ? kBlock / 16 : vectors_of(block);
    const float* w = s.weights + (int64_t)row * kSplit + block * kBlock;
    const float own_levels = levels, own_middle = middle;
    auto keep = [&](int i, Floats x) { return kWhole ? x : s.where_packed(row, 4 * block + i, x, zero()); };
    Floats kept[kBlock / 16], relative[kBlock / 16], peak = zero();
    NIBBLE_UNROLL for (int i = 0; i < kBlock / 16; i++) {
      kept[i] = i < vectors ? keep(i, load(w + 16 * i)) : zero();
      peak = max(kept[i], peak);
    }
    float highest = reduce_max(peak);
    Floats inverse = set1(inverse_of(own_levels, highest));
    NIBBLE_UNROLL for (int i = 0; i < kBlock / 16; i++) relative[i] = mul(kept[i], inverse);
    const int groups = num_groups;
    const float *shared = s.parameters, *largest = s.largest;
    float *own_units = units(row, 0), *sum = s.zeros + row * groups * 16;
    uint8_t* to = digits(row, 0);
    for (int g = 0; g < groups; g++, sum += 16, to += 2 * kBlock) {
      const float* own = shared + g * 2 * kBlock;
      float buffer[2 * kBlock], most = largest[g];
      if (!kWhole) {
        most = relate_few<kTwo>(sources_of(block, vectors), g, buffer, vectors, keep);
        own = buffer;
      }
      float unit = highest * most / own_levels;
      own_units[g] = unit;
      Floats left = cut_group<kTwo>(relative, own, to);
      Floats total = mul(kept[0], load(own + kBlock));
      NIBBLE_UNROLL for (int i = 1; i < kBlock / 16; i++) total = fma(kept[i], load(own + kBlock + 16 * i), total);
      store(sum, add(load(sum), fnma(left, set1(unit * own_middle), total)));
    }
  }

  // Returns the sums of digits, lane by lane.
  template <bool kTwo>
  static Floats cut_group(const Floats* relative, const float* scales, uint8_t* to) {
    Ints digit[kBlock / 16];
    NIBBLE_UNROLL for (int i = 0; i < kBlock / 16; i++) digit[i] = to_int(mul(relative[i], load(scales + 16 * i)));
    if constexpr (!kTwo) {
      Bytes bytes = pack_u8(digit[0], digit[1], digit[2], digit[3]);
      bstore(to, bytes);
      const int8_t ones[4] = {1, 1, 1, 1};
      return to_float(dot(izero(), bytes, four(ones)));
    }
    Ints sum = izero();
    NIBBLE_UNROLL for (int i = 0; i < kBlock / 16; i++) {
      sum = iadd(sum, digit[i]);
      write_digits(digit[i], true, (int8_t*)to + 16 * i, kBlock);
    }
    return to_float(sum);
  }

  // ---- codes

  // Values whose codes lie 16 channels of one shift to 16 bytes are read as they are, others unpacked to bytes first.
  bool is_direct() const {
    int width = format.width;
    return width == 8 || (width == 4 && s.dim % 32 == 0) || (width == 2 && s.dim % 64 == 0);
  }

  // Codes of a block, four tokens side by side: [16 channels of one shift][kBlock / 4][64].
  void load_codes(int block) {
    const bool direct = is_direct();
    const int row_bytes = direct ? format.row_bytes : s.dim + 64, runs = direct ? row_bytes / 16 : s.dim / 16;
    for (int i = 0, vectors = vectors_of(block); i < vectors; i++) {
      int v = 4 * block + i;
      const uint8_t* from = s.page_of(v) + s.shape.value_codes_at + (int64_t)s.token_of(v) * format.row_bytes;
      s.fetch(v, format, s.shape.value_codes_at, s.shape.value_parameters_at);
      if (!direct) from = unpack_values(from);
      turn(from, row_bytes, runs, s.codes + i * 4 * 64);
    }
  }

  // 16 rows of 16 `runs` bytes, four of them side by side: to[run][quad][64].
  static void turn(const uint8_t* from, int row_bytes, int runs, uint8_t* to) {
    constexpr int kRun = kBlock * 16;
    if (row_bytes == 16) {
      NIBBLE_UNROLL for (int i = 0; i < 4; i++) bstore(to + 64 * i, interleave16(from + 64 * i));
    } else if (row_bytes == 32) {
      NIBBLE_UNROLL for (int i = 0; i < 4; i++) {
        bstore(to + 64 * i, interleave32<0>(from + 128 * i));
        bstore(to + kRun + 64 * i, interleave32<1>(from + 128 * i));
      }
    } else {
      for (int i = 0; i < 4; i++, from += (int64_t)4 * row_bytes, to += 64)
        for (int b = 0; b < runs; b++) {
          const uint8_t* p = from + 16 * b;
          bstore(to + b * kRun, interleave(p, p + row_bytes, p + 2 * row_bytes, p + 3 * row_bytes));
        }
    }
  }

  // 16 tokens to one byte a channel, dim + 64 bytes apart.
  const uint8_t* unpack_values(const uint8_t* from) const {
    const int row_bytes = format.row_bytes, stride = s.dim + 64;
    if (format.width == 1) {
      unpack_trit_rows(from);
      return s.unpacked;
    }
    for (int t = 0; t < 16; t++) {
      uint8_t row[kMaxHeadDim + 128];
      __builtin_memcpy(row, from + t * row_bytes, (size_t)row_bytes);
      unpack_row(format, s.dim, row, s.unpacked + t * stride);
    }
    return s.unpacked;
  }

  // All rows at once: a row by itself would leave most of a vector empty.
  void unpack_trit_rows(const uint8_t* from) const {
    constexpr int kMaxRow = kMaxHeadDim / 5 + 1;
    const int n = format.row_bytes;
    uint8_t rows[16 * kMaxRow + 64], trits[5 * 16 * kMaxRow + 64];
    __builtin_memcpy(rows, from, 16 * (size_t)n);
    unpack_trits(16 * n, rows, trits);
    for (int t = 0; t < 16; t++)
      for (int i = 0; i < 5; i++)  // in this order: a copy's surplus is overwritten by the next
        for (int j = 0; j < n; j += 16)
          __builtin_memcpy(s.unpacked + t * (s.dim + 64) + i * n + j, trits + (16 * i + t) * n + j, 16);
  }

  template <int kWidth>
  void mix_block(int block) {
    int num_tiles = (s.num_rows + kPackedRows - 1) / kPackedRows, run = channels_of_a_shift<kWidth>(s.dim);
    ValueTile tile{};
    tile.num_quads = 4 * vectors_of(block);
    tile.digits_stride = (int64_t)num_groups * 2 * kBlock;
    tile.units_stride = num_groups;
    int g = 0, level = 0, in_run = 0;  // channel c is channel in_run of the shift `level`
    for (int c = 0; c < s.dim;) {
      if (c == (g + 1) * format.group_size) g++;
      int vectors = tile_vectors(((g + 1) * format.group_size - c) / 16, has_two_digits(kWidth));
      for (int n = 0; n < vectors; n++) {
        tile.codes[n] = s.codes + in_run / 16 * (kBlock * 16);
        tile.shift[n] = level * kWidth;
        in_run += 16;
        if (in_run == run) in_run = 0, level++;
      }
      for (int i = 0; i < num_tiles; i++) {
        int row = s.num_rows * i / num_tiles, rows = s.num_rows * (i + 1) / num_tiles - row;
        tile.units = units(row, g);
        const uint8_t* from = digits(row, g);
        float* to = s.part + row * s.stride + c;
        by_rows(rows, [&](auto r) {
          by_vectors<has_two_digits(kWidth)>(vectors, [&](auto n) {
            mix_packed<kWidth, decltype(r)::value, decltype(n)::value>(tile, from, to, s.stride);
          });
        });
      }
      c += 16 * vectors;
    }
  }
};

}  // namespace
}  // namespace nibble::NIBBLE_ISA
