#include "packed.hpp"

#include <cstring>
#include <stdexcept>
#include <string>

#include "pool.hpp"

namespace nibble {
namespace {

int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

size_t scale_size(ScaleType type) { return type == ScaleType::f32 ? 4 : 2; }
size_t zero_size(ZeroType type) { return type == ZeroType::constant ? 0 : type == ZeroType::u8 ? 1 : 4; }

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

// How the codes of one block are laid out: plane p of every unit, then plane p + 1.
struct Plane {
  int shift;  // of its lowest bit in the code
  int bits;
  int bytes;  // of one unit
};
struct Shape {
  int steps;  // in a unit
  int num_planes;
  Plane planes[2];
};

Shape shape_of(int bits) {
  switch (bits) {
    case 2: return {4, 1, {{0, 2, 64}, {}}};
    case 3: return {4, 2, {{0, 2, 64}, {2, 1, 32}}};
    case 4: return {2, 1, {{0, 4, 64}, {}}};
    case 5: return {4, 2, {{0, 4, 128}, {4, 1, 32}}};
    case 6: return {4, 2, {{0, 4, 128}, {4, 2, 64}}};
    case 8: return {1, 1, {{0, 8, 64}, {}}};
    default: refuse("codes of " + std::to_string(bits) + " bits have no packed form; 2, 3, 4, 5, 6 and 8 bits have");
  }
}

int num_units(const Shape& shape, int channels) { return (int)round_up(channels, 4 * shape.steps) / (4 * shape.steps); }

int64_t block_bytes(const Shape& shape, int channels) {
  int64_t bytes = 0;
  for (int p = 0; p < shape.num_planes; p++) bytes += (int64_t)num_units(shape, channels) * shape.planes[p].bytes;
  return bytes;
}

// Puts the plane's bits of one code in place. `step` counts from the start of the block; `byte` is 4 row + channel % 4.
void put(const Plane& plane, const Shape& shape, uint8_t* planes, int step, int byte, int code) {
  int unit = step / shape.steps, step_in_unit = step % shape.steps;
  uint8_t* base = planes + (int64_t)unit * plane.bytes;
  int field = code >> plane.shift & ((1 << plane.bits) - 1);
  if (plane.bits == 1) {  // 8 bytes a step, a bit for each byte of the step
    base[8 * step_in_unit + byte / 8] |= (uint8_t)(field << byte % 8);
    return;
  }
  int steps_in_vector = 8 / plane.bits;
  int vector = step_in_unit / steps_in_vector, slot = step_in_unit % steps_in_vector;
  base[64 * vector + byte] |= (uint8_t)(field << slot * plane.bits);
}

void unpack_stream(const uint8_t* stream, int bits, int64_t num_codes, uint8_t* codes) {
  uint64_t word = 0;
  int available = 0;
  const uint64_t mask = (1u << bits) - 1;
  for (int64_t i = 0; i < num_codes; i++) {
    if (available < bits) {
      word |= (uint64_t)*stream++ << available;
      available += 8;
    }
    codes[i] = (uint8_t)(word & mask);
    word >>= bits;
    available -= bits;
  }
}

struct Repacker {
  const Canonical& from;
  Packed& to;
  Shape shape;

  // Row n's codes, one byte each, into the row block at `out`.
  void codes(int lane, const uint8_t* row, uint8_t* out) const {
    for (int block = 0; block < to.num_blocks; block++, out += to.codes_block_bytes) {
      const uint8_t* in = row + (int64_t)block * to.block_channels;
      int channels = to.channels_of(block);
      uint8_t* planes = out;
      for (int p = 0; p < shape.num_planes; p++) {
        for (int k = 0; k < channels; k++) put(shape.planes[p], shape, planes, k / 4, 4 * lane + k % 4, in[k]);
        planes += (int64_t)num_units(shape, channels) * shape.planes[p].bytes;
      }
    }
  }

  void parameters(int lane, int64_t n, uint8_t* out) const {
    int64_t num_groups = (from.num_channels + from.group_size - 1) / from.group_size;
    size_t ss = scale_size(to.scale_type), zs = zero_size(to.zero_type);
    for (int block = 0; block < to.num_blocks; block++) {
      int64_t source = n * num_groups + (int64_t)block * to.block_channels / from.group_size;
      int64_t target = (int64_t)block * kRows + lane;
      std::memcpy(out + to.scales_offset + target * ss, (const uint8_t*)from.scales + source * ss, ss);
      if (zs) std::memcpy(out + to.zeros_offset + target * zs, (const uint8_t*)from.zeros + source * zs, zs);
    }
  }

  void row_block(int64_t index) const {
    uint8_t* out = to.memory.data() + index * to.row_block_bytes;
    Buffer row((size_t)to.num_channels);
    for (int lane = 0; lane < kRows; lane++) {
      int64_t n = index * kRows + lane;
      if (n >= to.num_rows) break;
      unpack_stream(from.codes + n * from.codes_stride, from.bits, to.num_channels, row.data());
      codes(lane, row.data(), out);
      parameters(lane, n, out);
    }
  }
};

}  // namespace

int block_channels_for(int64_t group_size, int64_t num_channels) {
  if (group_size >= num_channels) return (int)(num_channels < kMaxBlockChannels ? num_channels : kMaxBlockChannels);
  if (group_size < 16 || group_size % 16)
    refuse("groups of " + std::to_string(group_size) + " channels are neither a multiple of 16 nor the whole row");
  for (int length = kMaxBlockChannels; length > 16; length -= 16)
    if (group_size % length == 0) return length;
  return 16;
}

Packed pack(const Canonical& from) {
  if (from.num_rows < 1 || from.num_channels < 1) refuse("a matrix needs at least one row and one channel");
  if (from.num_rows > INT32_MAX || from.num_channels > INT32_MAX / 8) refuse("the matrix is too large");
  if (from.table && from.bits > 4) refuse("a table has at most 16 entries, codes of 4 bits");
  Shape shape = shape_of(from.bits);
  Packed to{};
  to.num_rows = from.num_rows;
  to.num_channels = from.num_channels;
  to.bits = from.bits;
  to.block_channels = block_channels_for(from.group_size, from.num_channels);
  to.num_blocks = (int)((from.num_channels + to.block_channels - 1) / to.block_channels);
  to.scale_type = from.scale_type;
  to.zero_type = from.zero_type;
  to.zero = from.zero;
  to.has_table = from.table != nullptr;
  if (to.has_table) {
    for (int i = 0; i < 16; i++) to.table[i] = (uint8_t)(from.table[i] + 128);
    to.zero += 128;
  }
  to.codes_block_bytes = block_bytes(shape, to.block_channels);
  int64_t parameters = (int64_t)to.num_blocks * kRows;
  to.scales_offset = round_up((int64_t)to.num_blocks * to.codes_block_bytes, 64);
  to.zeros_offset = to.scales_offset + round_up(parameters * (int64_t)scale_size(to.scale_type), 64);
  to.row_block_bytes = to.zeros_offset + round_up(parameters * (int64_t)zero_size(to.zero_type), 64);
  to.memory = Buffer((size_t)(to.num_row_blocks() * to.row_block_bytes));
  Repacker repacker{from, to, shape};
  Pool::instance().run(to.num_row_blocks(), [&](int64_t i) { repacker.row_block(i); });
  return to;
}

}  // namespace nibble
