// Weights of one matrix as the integer dot-product kernels stream them.
//
//   w[n, k] = scale[n, j] (u[n, k] - zero[n, j]),   j the block of channels that k lies in
//
// u is an unsigned byte: the code itself, or what a table of 16 bytes makes of it. Rows go in blocks of 16, one lane of a
// vector each; of every row block lie in one run
//
//   [codes of block 0][codes of block 1] ... [scales: num_blocks x 16][zeros: num_blocks x 16]
//
// A *step* is 4 channels of 16 rows: the 64 bytes that one dot-product instruction takes, byte 4 i + j being row i and
// channel j. A *unit* is the least number of steps that fills whole vectors: codes of step s lie at bits [s b, (s + 1) b)
// of each byte of its plane. A block's planes follow each other, the low bits first:
//
//   bits   steps in a unit   planes: bits x bytes of a unit
//   8      1                 8 x 64
//   4      2                 4 x 64
//   2      4                 2 x 64
//   3      4                 2 x 64, 1 x 32 (bit i of 8 bytes for byte i of the step)
//   5      4                 4 x 128, 1 x 32
//   6      4                 4 x 128, 2 x 64
//
// Rows past N have scale 0; channels past the end of the last block multiply activations of 0.
#pragma once

#include <cstdint>
#include <vector>

#include "memory.hpp"

namespace nibble {

inline constexpr int kRows = 16;             // of a row block
inline constexpr int kMaxBlockChannels = 128;  // activations are rounded to 8 bits in blocks no longer than this

enum class ScaleType : int { f16, bf16, f32 };
enum class ZeroType : int { constant, u8, f32 };

struct Canonical {  // what the repacker reads; sizes in elements are checked against the bytes given
  int64_t num_rows, num_channels, group_size;
  int bits;
  const uint8_t* codes;  // [num_rows, codes_stride] little-endian bit stream along the channels
  int64_t codes_stride;  // bytes
  ScaleType scale_type;
  const void* scales;  // [num_rows, num_groups]
  ZeroType zero_type;
  const void* zeros;   // [num_rows, num_groups], or nullptr
  int32_t zero;        // of every code, when zero_type is constant
  const int8_t* table;  // [16] or nullptr: w = scale (table[code] - zero); table entries are signed
};

struct Packed {
  int64_t num_rows, num_channels;
  int bits;
  int block_channels;   // of every block but the last
  int num_blocks;
  ScaleType scale_type;
  ZeroType zero_type;
  int32_t zero;         // when constant; counts the 128 by which a table is shifted to unsigned bytes
  bool has_table;
  alignas(16) uint8_t table[16];

  int64_t codes_block_bytes;  // of every block but the last
  int64_t scales_offset, zeros_offset, row_block_bytes;
  Buffer memory;

  int64_t num_row_blocks() const { return (num_rows + kRows - 1) / kRows; }
  const uint8_t* row_block(int64_t i) const { return memory.data() + i * row_block_bytes; }
  int channels_of(int block) const {
    int64_t left = num_channels - (int64_t)block * block_channels;
    return (int)(left < block_channels ? left : block_channels);
  }
};

// The block length for groups of `group_size` channels (the whole row when it is num_channels or more). Throws
// std::invalid_argument when the kernels cannot serve such groups.
int block_channels_for(int64_t group_size, int64_t num_channels);

// Repacks on the pool's threads. Throws std::invalid_argument naming what is wrong; std::bad_alloc.
Packed pack(const Canonical& weights);

}  // namespace nibble
