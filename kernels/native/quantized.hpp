// Causal attention over the quantized cache (kernels/attention/quantized/layout.py has the bytes, codec.py the codec).
//
// Key and value j are read by position i in high precision, from the pages of 16 tokens called recent, iff j < S
// or i - j < W; else from packed pages. Splits, parts and their order are those of attention.hpp. Within a split a row
// adds up its packed values in blocks of kBlock tokens by position, then its sinks, then its window.
//
// Packed products are sums of integers: codes are bytes, and what multiplies them is rounded to integers x ~ d X,
//
//   keys      the channels of a group of a query:          score += s_t (d Q . c_t) + z_t (d sum Q)
//   values    weights against the block's highest score,   out += 2^(m_b - m) (d sum_t A_t (c_t - h)
//             times the block's scales, a_t = w_t s_t,                         + sum_t w_t (z_t + h s_t))
//             of one group; h is the middle code
//
// of |Q| <= 127 and 0 <= A <= 255, one byte, where codes have up to 4 bits: far below the error of the codes. Beside 8
// bits it would show, so there X has two digits of a byte, x ~ d (128 high + low) with d = max |x| / 16256. Sums of
// products are exact; their order and who computes beside them cannot matter. An integer dot product makes four times
// the products of a float one in the time of one.
#pragma once

#include "attention.hpp"

namespace nibble {

inline constexpr int kRecentTokens = 16;
inline constexpr int kMaxHeadDim = 512;  // sums of products of a group then fit 32 bits
inline constexpr int kBlock = 64;        // tokens whose weights share a scale

// Two digits where codes are finer than one digit's rounding.
constexpr bool has_two_digits(int width) { return width == 8; }
constexpr int query_levels(int width) { return has_two_digits(width) ? 127 * 128 : 127; }
constexpr int weight_levels(int width) { return has_two_digits(width) ? 127 * 128 : 255; }

// Keys or values of a token of one head.
struct RowFormat {
  int width;       // bits of a code: 16 (float16), 8, 4, 3, 2, or 1 for trits
  int group_size;  // channels; a multiple of 16
  int num_groups;  // 0 at 16 bits
  int row_bytes, plane_bytes;  // of the codes; of their first plane
  int parameter_bytes;         // of one: 2 float16, 1 e4m3
  int max_code;
  bool hadamard;   // turned before it is stored
};

struct QuantizedShape {
  CacheShape heads;  // page_size of the packed pages; cell of the recent ones
  RowFormat keys, values;
  int64_t chunk_bytes, value_codes_at, key_parameters_at, value_parameters_at;
  int num_sinks;

  // Places keys, values and parameters in the chunk of a page and a head.
  NIBBLE_INLINE void lay_out() {
    int64_t size = heads.page_size;
    value_codes_at = size * keys.row_bytes;
    key_parameters_at = value_codes_at + size * values.row_bytes;
    value_parameters_at = key_parameters_at + size * 2 * keys.num_groups * keys.parameter_bytes;
    chunk_bytes = (value_parameters_at + size * 2 * values.num_groups * values.parameter_bytes + 127) / 128 * 128;
  }
  NIBBLE_INLINE int64_t chunk(int64_t page, int head) const { return (page * heads.num_kv_heads + head) * chunk_bytes; }
  NIBBLE_INLINE CacheShape recent() const { return {heads.num_kv_heads, heads.head_dim, kRecentTokens, heads.cell}; }
  NIBBLE_INLINE int num_groups() const {
    return keys.num_groups > values.num_groups ? keys.num_groups : values.num_groups;
  }
};

// The memory and the constants of one layer.
struct QuantizedLayer {
  uint8_t *pages, *recent;
  const float *key_prescale, *value_prescale;  // [num_kv_heads]
  const float *key_clip, *value_clip;          // [num_kv_heads, num_groups]
  bool key_origin, value_origin;               // the clip's mode
};

// One call for one layer. Rows of queries lie in the order [num_kv_heads, num_tokens, group].
struct QuantizedAttend {
  Attend base;
  QuantizedShape shape;
  QuantizedLayer layer;
  int64_t num_tokens;
  const int64_t* recent_tables;  // [num_seqs, max_recent]
  int64_t max_recent;
  const int64_t* windows;  // [num_seqs]
  float* queries;    // [rows, head_dim], turned and scaled
  uint8_t* digits;   // [rows, digits_stride]

  // High digits and low digits [head_dim] each, then for every group d and the sum of the query as counted.
  NIBBLE_INLINE int64_t digits_stride() const {
    return (2 * shape.heads.head_dim + 8 * (int64_t)shape.keys.num_groups + 63) / 64 * 64;
  }
  NIBBLE_INLINE int64_t first_row(const Unit& u) const {
    return (u.kv_head * num_tokens + u.first_token) * base.group;
  }
  NIBBLE_INLINE int64_t scratch_floats(const Unit& u) const {
    int64_t rows = base.rows_of(u), groups = shape.num_groups(), dim = shape.heads.head_dim;
    int64_t weights = rows * (2 * kSplit + 3 * 16 + 1);  // of both precisions; peaks, shares and totals; edges
    int64_t digits = rows * groups * (kBlock / 2 + 16 + 1), parameters = groups * (2 * kBlock + 1);
    int64_t codes = 2 * kBlock * (dim + 64) / 4;  // interleaved; unpacked
    return weights + digits + parameters + codes + 512;
  }
};

struct QuantizedStore {
  QuantizedShape shape;
  QuantizedLayer layer;
  const float *k, *v;  // [num_tokens, num_kv_heads, head_dim]
  int64_t num_tokens;
  const int64_t *slots, *recent_slots;  // [num_tokens]; -1 where a row is not kept, null where none is
};

struct QuantizedOps {
  // Turns, scales and cuts into digits the queries of one token.
  void (*prepare)(const QuantizedAttend& call, int64_t token);
  // As AttentionOps; fetches the beginning of `next`.
  void (*split)(const QuantizedAttend& call, const Place& at, const Place& next, float* scratch, float* part);
  // Turns the finished rows of a unit back.
  void (*turn_back)(const QuantizedAttend& call, const Unit& unit);
  // Writes one head of tokens.
  void (*store)(const QuantizedStore& call, int head);
};

namespace avx512 {
extern const QuantizedOps quantized_ops;
}
namespace avx2 {
extern const QuantizedOps quantized_ops;
}
namespace scalar {
extern const QuantizedOps quantized_ops;
}

}  // namespace nibble
