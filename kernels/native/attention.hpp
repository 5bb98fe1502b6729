// Causal attention over paged keys and values of plain floating point.
//
//   out[h, i] = sum_{j <= i} w[j] v[h / G, j] / sum_{j <= i} w[j]
//   w[j] = 2^(s[j] - m),   s[j] = log2(e) scale q[h, i] . k[h / G, j],   m the largest s[j]
//
// A context is cut into *splits* of kSplit tokens, at positions 0, kSplit, 2 kSplit, ... Of each split a row gets a
// *part*: its own maximum m, its sum of weights and its weighted sum of values; parts are merged in the order of the
// splits. Every sum has one order: a score runs over the channels, a weighted sum over the tokens, a sum of weights
// over the tokens t, t + 16, ... of each lane. So a row's result depends on its position and on the tokens it sees, not
// on the rows computed beside it, the size of a page, the number of threads or the instruction set.
//
// Of a page lie in one run for every kv head: keys channel by channel, [head_dim, page_size], so that the 16 lanes of a
// vector are tokens and no sum runs across lanes; values token by token, [page_size, head_dim], so that the lanes are
// channels.
#pragma once

#include <cstdint>

// Kernel files of every instruction set include this; a call that is not inlined could reach another set's copy.
#define NIBBLE_INLINE [[gnu::always_inline]]

namespace nibble {

inline constexpr int kSplit = 512;  // tokens of a split; every page size divides it

enum class Cell : int { f16, f32 };  // of the pages

struct CacheShape {
  int num_kv_heads, head_dim, page_size;
  Cell cell;

  NIBBLE_INLINE int64_t cell_bytes() const { return cell == Cell::f16 ? 2 : 4; }
  // Keys, or values, of a head.
  NIBBLE_INLINE int64_t head_bytes() const { return (int64_t)head_dim * page_size * cell_bytes(); }
  NIBBLE_INLINE int64_t page_bytes() const { return 2 * num_kv_heads * head_bytes(); }
  NIBBLE_INLINE int64_t keys_offset(int64_t page, int head) const { return page * page_bytes() + head * head_bytes(); }
  NIBBLE_INLINE int64_t values_offset(int64_t page, int head) const { return keys_offset(page, num_kv_heads + head); }
};

// Rows of one sequence that share a kv head: consecutive tokens, and of each the query heads of the group.
struct Unit {
  const int64_t* block_table;
  int64_t first_token;     // row of q and out
  int64_t first_position;  // of that token in its sequence
  int num_tokens;
  int kv_head;
  int sequence;

  NIBBLE_INLINE int64_t context_len() const { return first_position + num_tokens; }  // of the last token
  NIBBLE_INLINE int num_splits() const { return (int)((context_len() + kSplit - 1) / kSplit); }
};

// One split of a unit.
struct Place {
  const Unit* unit;
  int split;
};

// One call for one layer.
struct Attend {
  CacheShape shape;
  int group;  // query heads of a kv head
  float scale;
  const uint8_t* pages;
  const float* q;  // [num_tokens, num_kv_heads * group, head_dim]
  float* out;      // the same shape

  NIBBLE_INLINE int rows_of(const Unit& u) const { return u.num_tokens * group; }
  // Floats: the sums, then m and the total.
  NIBBLE_INLINE int64_t part_stride() const { return (shape.head_dim + 15) / 16 * 16 + 16; }
  NIBBLE_INLINE int64_t scratch_floats(const Unit& u) const {  // queries and weights
    return (int64_t)rows_of(u) * (shape.head_dim + kSplit) + 64;
  }
};

struct AttentionOps {
  // One split of a unit: to part [rows, part_stride]. Rows before the split are left as they are.
  void (*split)(const Attend& call, const Unit& unit, int split, float* scratch, float* part);
  // Adds the part of `split` to the merged parts of those before it.
  void (*merge)(const Attend& call, const Unit& unit, int split, float* merged, const float* part);
  // Writes merged / total to the unit's rows of call.out.
  void (*finish)(const Attend& call, const Unit& unit, const float* merged);
  // Writes one head of tokens to their slots: k, v are [num_tokens, num_kv_heads, head_dim]. Rounds once; what is
  // beyond the cells' range becomes their largest finite value.
  void (*store)(const CacheShape& shape, const float* k, const float* v, const int64_t* slots, int64_t num_tokens,
                uint8_t* pages, int head);
  // y[i] = 2^x[i] for x <= 0, as the weights are computed; 0 < count <= 16.
  void (*exp2)(const float* x, float* y, int count);
};

namespace avx512 {
extern const AttentionOps attention_ops;
}
namespace avx2 {
extern const AttentionOps attention_ops;
}
namespace scalar {
extern const AttentionOps attention_ops;
}

}  // namespace nibble
