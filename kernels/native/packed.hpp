// Weights of one matrix as the integer dot-product kernels stream them.
//
//   w[n, k] = factor[n] scale[n, j] (u[n, k] - zero[n, j]),   j the block of channels that k lies in
//   w[n, k] = factor[n] (scale[n, j] u[n, k] + zero[n, j])    when zeros are offsets
//
// u is an unsigned integer: the code itself, or what a table makes of it (128 planes[0][code] + planes[1][code] when
// the table needs two planes). Rows go in blocks of 16, one lane of a vector each, row blocks in panels of 4. A panel
// is one stream in the order the kernels read it: the factors of its rows, 4 x 16 float32, and then its channels in
// slabs, each slab row block by row block, so that the activations of a slab are in the first cache when the next row
// block reads them. (With 8192 channels in one slab they were not: 27 GB/s a core where slabs of 2048 give 32.) Within
// a slab, for every 4 blocks of a row block:
//
//   [scales: 4 x 16][zeros: 4 x 16][codes of block 0] .. [codes of block 3]
//
// Nested scales and offsets are 4 x 16 bytes followed by 16 steps.
//
// A *step* is 4 channels of 16 rows: the 64 bytes that one dot-product instruction takes, byte 4 i + j being row i and
// channel j. A *unit* is 4 steps: codes of step s lie at bits [s b, (s + 1) b) of each byte, as far as a vector goes. A
// block's planes follow each other, the low bits first:
//
//   bits   planes: bits x bytes of a unit
//   8      8 x 256
//   4      4 x 128
//   2      2 x 64
//   3      2 x 64, 1 x 32 (bit i of 8 bytes for byte i of the step)
//   5      4 x 128, 1 x 32
//   6      4 x 128, 2 x 64
//
// Ternary codes can lie five to a byte; a unit is then 5 steps, 20 channels, of 64 bytes: byte = ceil(256 v / 243)
// where v is the number whose digits in base 3 are the codes, that of step 0 the highest. The digits come out by
// multiplying by 3: what passes 8 bits is the next digit.
//
// Rows past N have factor 0; channels past the end of the last block multiply activations of 0.
#pragma once

#include <cstdint>
#include <vector>

#include "memory.hpp"

namespace nibble {

inline constexpr int kRows = 16;               // of a row block
inline constexpr int kParameterBlocks = 4;     // blocks whose scales and zeros lie together
inline constexpr int kFactorBytes = 64;        // of a row block, at the start of its panel
inline constexpr int kPanelBlocks = 4;         // row blocks of a panel
inline constexpr int kSlabChannels = 2048;     // at most
inline constexpr int kMaxBlockChannels = 128;  // activations are rounded to 8 bits in blocks no longer than this
inline constexpr int kTernaryBlockChannels = 160;
inline constexpr int32_t kMaxZero = 1 << 16;   // so that zero times the sum of a block's activations fits 32 bits

// none: one scale a row, kept in its factor. e8m0: 2^(byte - 127). e4m3: a float of 8 bits, no infinities.
// nested: a signed byte times a float16 step that the 4 blocks of a parameter run share.
enum class ScaleType : int { none, f16, bf16, f32, e8m0, e4m3, nested };
// offset: a float32 that is added to the scaled code; nested_offset: likewise, a signed byte times a float16 step.
enum class ZeroType : int { constant, u8, f32, offset, nested_offset };
enum class Codes : int { u2, u3, u4, u5, u6, u8, ternary };

struct Canonical {  // what the repacker reads; sizes in elements are checked against the bytes given
  int64_t num_rows, num_channels, group_size;
  int bits;
  bool ternary;          // codes of 2 bits, 0 to 2, to be packed five to a byte
  const uint8_t* codes;  // [num_rows, codes_stride] little-endian bit stream along the channels
  int64_t codes_stride;  // bytes
  ScaleType scale_type;
  const void* scales;    // [num_rows, num_groups]
  const float* factors;  // [num_rows], or nullptr: 1
  ZeroType zero_type;
  const void* zeros;     // [num_rows, num_groups], or nullptr
  int32_t zero;          // of every code, when zero_type is constant
  int64_t groups_per_step;       // where scales are nested: bytes [num_rows, num_groups], steps for so many groups each
  const uint16_t* scale_steps;   // [num_rows, ceil(num_groups / groups_per_step)] float16
  const uint16_t* offset_steps;  // likewise, of nested offsets
  std::vector<float> table;  // empty, or w = factor scale table[code]
};

struct Packed {
  int64_t num_rows, num_channels;
  Codes codes;
  int block_channels;  // of every block but the last
  int num_blocks;
  ScaleType scale_type;
  ZeroType zero_type;
  int32_t zero;        // when constant
  int num_planes;      // of the table; 0 without one
  alignas(16) uint8_t planes[2][16];
  float entries[16];   // of the table, in the unit of the planes but not rounded to it

  int unit_channels;   // 16, or 20 for ternary codes
  int64_t codes_block_bytes;           // of every block but the last
  int64_t zeros_offset, codes_offset;  // from the start of 4 blocks' parameters
  int slab_blocks;                     // blocks of channels in every slab but the last, a multiple of 4
  int num_slabs;
  int64_t slab_bytes, last_slab_bytes;  // of one row block
  int64_t panel_bytes;
  Buffer memory;
  const uint8_t* start;  // of the memory

  int64_t num_row_blocks() const { return (num_rows + kRows - 1) / kRows; }
};

// Internal linkage: kernel files compile these for their own instruction set.
static inline bool adds_offsets(const Packed& w) {
  return w.zero_type == ZeroType::offset || w.zero_type == ZeroType::nested_offset;
}

// Where the factors of a row block lie, and its part of a slab.
static inline int64_t factors_at(const Packed& w, int64_t row_block) {
  return row_block / kPanelBlocks * w.panel_bytes + row_block % kPanelBlocks * kFactorBytes;
}
static inline int64_t slab_at(const Packed& w, int64_t row_block, int slab) {
  int64_t bytes = slab + 1 < w.num_slabs ? w.slab_bytes : w.last_slab_bytes;
  return row_block / kPanelBlocks * w.panel_bytes + kPanelBlocks * (kFactorBytes + slab * w.slab_bytes) +
         row_block % kPanelBlocks * bytes;
}

static inline int units_of(const Packed& w, int block) {
  int64_t left = w.num_channels - (int64_t)block * w.block_channels;
  return (int)((left < w.block_channels ? left : w.block_channels) + w.unit_channels - 1) / w.unit_channels;
}

// The block length for groups of `group_size` channels (the whole row when it is num_channels or more). Throws
// std::invalid_argument when the kernels cannot serve such groups.
int block_channels_for(int64_t group_size, int64_t num_channels, bool ternary = false);

// Repacks on the pool's threads. Throws std::invalid_argument naming what is wrong; std::bad_alloc.
Packed pack(const Canonical& weights);

}  // namespace nibble
