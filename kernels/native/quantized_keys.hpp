// Scores of a split's packed keys.
#pragma once

#include "quantized_split.hpp"

namespace nibble::NIBBLE_ISA {
namespace {

// Trits of 16 tokens to units of 4 bytes.
inline const uint8_t* unpack_keys(const QuantizedSplit& s, int n, const uint8_t* from) {
  int rows = s.shape.keys.row_bytes;
  uint8_t* packed_rows = s.unpacked;
  uint8_t* channels = s.unpacked + 16 * (s.dim + 64) / 2;
  for (int j = 0; j < rows; j++) __builtin_memcpy(packed_rows + 16 * j, from + (int64_t)j * s.page_size, 16);
  unpack_trits(16 * rows, packed_rows, channels);
  uint8_t* to = s.codes + (int64_t)n * 16 * s.dim;
  for (int c = 0; c < s.dim; c += 4) {
    bstore(to + 16 * c, interleave(channels + 16 * c, 16));
  }
  return to;
}

// Parameters of 16 tokens, from[i * step], to to[i * stride]. All by value: a vector's store may change what a
// reference names, as far as the compiler knows.
template <bool kHalves>
inline void load_key_parameters(int count, const uint8_t* from, int64_t step, float* to, int64_t stride) {
  for (int i = 0; i < count; i++, from += step, to += stride) store(to, load_parameter<kHalves>(from));
}

// Whether tiles of so many vectors fetch keys themselves.
template <int kWidth>
inline bool is_spread(int vectors) {
  bool spread = false;
  by_vectors<has_two_digits(kWidth)>(vectors, [&](auto n) { spread = kKeyLines<kWidth, decltype(n)::value> > 0; });
  return spread;
}

template <int kWidth>
void score_codes(const QuantizedSplit& s) {
  const RowFormat& format = s.shape.keys;
  constexpr bool kTwo = has_two_digits(kWidth);
  int num_tiles = (s.num_rows + kPackedRows - 1) / kPackedRows;
  const int num_parameters = 2 * format.num_groups, parameter_bytes = format.parameter_bytes;
  const int64_t parameters_at = s.shape.key_parameters_at, step = (int64_t)s.page_size * parameter_bytes;
  float* const to_parameters = s.parameters;
  KeyTile tile{};
  tile.stride = kWidth == 1 ? 64 : 4 * s.page_size;
  tile.high = (int64_t)format.plane_bytes * s.page_size;
  tile.head_dim = s.dim, tile.group_size = format.group_size, tile.num_groups = format.num_groups;
  tile.digits_stride = s.call.digits_stride();
  tile.parameters = s.parameters, tile.parameters_stride = 16 * kPackedVectors;
  for (int v = s.packed.first_vector(); v < s.packed.stop_vector();) {
    int vectors = tile_vectors(s.packed.stop_vector() - v, kTwo);
    for (int n = 0; n < vectors; n++) {
      const uint8_t* page = s.page_of(v + n);
      int token = s.token_of(v + n);
      load_key_parameters<kTwo>(num_parameters, page + parameters_at + token * parameter_bytes, step,
                                to_parameters + 16 * n, 16 * kPackedVectors);
      tile.keys[n] = kWidth == 1 ? unpack_keys(s, n, page + token) : page + 4 * token;
    }
    bool spread = is_spread<kWidth>(vectors) && s.in_one_page(v, vectors);
    tile.ahead = {spread ? s.later(v, 0, format.row_bytes) : tile.keys[0], spread ? 64 : 0};
    if (!spread) s.fetch(v, vectors, 0, format.row_bytes);
    s.fetch(v, vectors, parameters_at, num_parameters * parameter_bytes);
    s.fetch_recent(v, vectors);
    for (int i = 0; i < num_tiles; i++) {
      if (i) tile.ahead.step = 0;
      int row = s.num_rows * i / num_tiles, rows = s.num_rows * (i + 1) / num_tiles - row;
      by_rows(rows, [&](auto r) {
        by_vectors<kTwo>(vectors, [&](auto n) {
          score_packed<kWidth, decltype(r)::value, decltype(n)::value>(
              tile, s.query_digits + row * tile.digits_stride, s.packed_scores + (int64_t)row * kSplit + 16 * v);
        });
      });
    }
    v += vectors;
  }
}

}  // namespace
}  // namespace nibble::NIBBLE_ISA
