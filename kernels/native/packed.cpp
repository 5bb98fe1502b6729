#include "packed.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <string>

#include "pool.hpp"
#include "refuse.hpp"

namespace nibble {
namespace {

constexpr int kMaxSteps = (kTernaryBlockChannels + 4) / 4;  // of a block, its last unit whole
constexpr int kStepBytes = 4 * kRows;

int64_t scale_size(ScaleType type) {
  switch (type) {
    case ScaleType::none: return 0;
    case ScaleType::f32: return 4;
    case ScaleType::e8m0:
    case ScaleType::e4m3:
    case ScaleType::nested: return 1;
    default: return 2;
  }
}
int64_t zero_size(ZeroType type) {
  switch (type) {
    case ZeroType::constant: return 0;
    case ZeroType::u8:
    case ZeroType::nested_offset: return 1;
    default: return 4;
  }
}
constexpr int64_t kStepsBytes = 2 * kRows;  // of nested scales

Codes codes_for(int bits, bool ternary) {
  if (ternary && bits != 2) refuse("ternary codes are given in 2 bits, not " + std::to_string(bits));
  if (ternary) return Codes::ternary;
  switch (bits) {
    case 1:  // a bit of its own would be read no faster
    case 2: return Codes::u2;
    case 3: return Codes::u3;
    case 4: return Codes::u4;
    case 5: return Codes::u5;
    case 6: return Codes::u6;
    case 8: return Codes::u8;
    default: refuse("codes of " + std::to_string(bits) + " bits have no packed form; 1 to 6 and 8 bits have");
  }
}

int unit_bytes(Codes codes) {
  switch (codes) {
    case Codes::u2: return 64;
    case Codes::u3: return 64 + 32;
    case Codes::u4: return 128;
    case Codes::u5: return 128 + 32;
    case Codes::u6: return 128 + 64;
    case Codes::u8: return 256;
    case Codes::ternary: return 64;
  }
  return 0;
}

// ---- canonical codes to one byte each -------------------------------------------------------------------------------

template <int kBits>
void unpack_stream(const uint8_t* stream, int num_codes, uint8_t* codes) {
  constexpr uint64_t mask = (1u << kBits) - 1;
  int i = 0;
  for (; i + 8 <= num_codes; i += 8, stream += kBits) {
    uint64_t word = 0;
    std::memcpy(&word, stream, kBits);
    for (int j = 0; j < 8; j++) codes[i + j] = (uint8_t)(word >> (kBits * j) & mask);
  }
  if (i == num_codes) return;
  uint64_t word = 0;
  std::memcpy(&word, stream, (size_t)((num_codes - i) * kBits + 7) / 8);
  for (int j = 0; i + j < num_codes; j++) codes[i + j] = (uint8_t)(word >> (kBits * j) & mask);
}

void unpack_bytes(const uint8_t* stream, int num_codes, uint8_t* codes) {
  std::memcpy(codes, stream, (size_t)num_codes);
}

using Unpack = void (*)(const uint8_t*, int, uint8_t*);
Unpack unpack_for(int bits) {
  static constexpr Unpack all[] = {unpack_stream<1>, unpack_stream<2>, unpack_stream<3>, unpack_stream<4>,
                                   unpack_stream<5>, unpack_stream<6>, unpack_stream<7>, unpack_bytes};
  return all[bits - 1];
}

// ---- units: `steps` holds 64 bytes a step ---------------------------------------------------------------------------

void join_pairs(const uint8_t* steps, uint8_t* out) {  // the low 4 bits of 4 steps
  for (int v = 0; v < 2; v++)
    for (int i = 0; i < kStepBytes; i++)
      out[64 * v + i] = (uint8_t)((steps[128 * v + i] & 15) | (steps[128 * v + 64 + i] & 15) << 4);
}

void join_fours(const uint8_t* steps, int shift, uint8_t* out) {  // bits shift and shift + 1 of 4 steps
  for (int i = 0; i < kStepBytes; i++)
    out[i] = (uint8_t)((steps[i] >> shift & 3) | (steps[64 + i] >> shift & 3) << 2 |
                       (steps[128 + i] >> shift & 3) << 4 | (steps[192 + i] >> shift & 3) << 6);
}

void join_bits(const uint8_t* steps, int shift, uint8_t* out) {  // bit `shift` of 4 steps
  for (int i = 0; i < 4 * kStepBytes / 8; i++) {
    uint64_t word;
    std::memcpy(&word, steps + 8 * i, 8);
    word = word >> shift & 0x0101010101010101;
    out[i] = (uint8_t)(word * 0x0102040810204080 >> 56);  // bit 0 of byte j moves to bit j
  }
}

void join_digits(const uint8_t* steps, uint8_t* out) {
  for (int i = 0; i < kStepBytes; i++) {
    int v = 0;
    for (int s = 0; s < 5; s++) v = 3 * v + steps[64 * s + i];
    out[i] = (uint8_t)((256 * v + 242) / 243);
  }
}

void pack_block(Codes codes, const uint8_t* steps, int units, uint8_t* out) {
  uint8_t* extra;
  for (int unit = 0; unit < units; unit++) {
    const uint8_t* in = steps + 4 * kStepBytes * unit;
    switch (codes) {
      case Codes::u2: join_fours(in, 0, out + 64 * unit); break;
      case Codes::u3:
        extra = out + 64 * units;
        join_fours(in, 0, out + 64 * unit);
        join_bits(in, 2, extra + 32 * unit);
        break;
      case Codes::u4: join_pairs(in, out + 128 * unit); break;
      case Codes::u5:
        extra = out + 128 * units;
        join_pairs(in, out + 128 * unit);
        join_bits(in, 4, extra + 32 * unit);
        break;
      case Codes::u6:
        extra = out + 128 * units;
        join_pairs(in, out + 128 * unit);
        join_fours(in, 4, extra + 64 * unit);
        break;
      case Codes::u8: std::memcpy(out + 256 * unit, in, 256); break;
      case Codes::ternary: join_digits(steps + 5 * kStepBytes * unit, out + 64 * unit); break;
    }
  }
}

// ---- scales ---------------------------------------------------------------------------------------------------------

float widen_f16(uint16_t h) {
  int exponent = h >> 10 & 31, fraction = h & 0x3ff;
  float magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                    : exponent == 0 ? std::ldexp((float)fraction, -24)
                                    : std::ldexp((float)(fraction + 1024), exponent - 25);
  return h & 0x8000 ? -magnitude : magnitude;
}

float scale_at(ScaleType type, const void* scales, int64_t i) {
  uint8_t byte = ((const uint8_t*)scales)[type == ScaleType::e8m0 || type == ScaleType::e4m3 ? i : 0];
  switch (type) {
    case ScaleType::f16: return widen_f16(((const uint16_t*)scales)[i]);
    case ScaleType::bf16: {
      uint32_t wide = (uint32_t)((const uint16_t*)scales)[i] << 16;
      float value;
      std::memcpy(&value, &wide, 4);
      return value;
    }
    case ScaleType::f32: return ((const float*)scales)[i];
    case ScaleType::e8m0: return std::ldexp(1.0f, byte - 127);
    case ScaleType::e4m3: {
      int exponent = byte >> 3 & 15, fraction = byte & 7;
      float value = exponent ? std::ldexp((float)(fraction + 8), exponent - 10) : std::ldexp((float)fraction, -9);
      return byte & 0x80 ? -value : value;
    }
    case ScaleType::nested:
    case ScaleType::none: break;
  }
  return 1.0f;
}

bool is_nan(ScaleType type, uint8_t byte) {
  return type == ScaleType::e8m0 ? byte == 255 : type == ScaleType::e4m3 && (byte & 0x7f) == 0x7f;
}

// ---- tables ---------------------------------------------------------------------------------------------------------

constexpr int kMaxEntry = 16383;  // of a table in two planes

// Integers t and a step so that entry = step t: exactly where entries are multiples of a common step of which the
// largest is at most 16383 times, else the nearest, within 2^-15 of the largest entry.
double integers_of(const std::vector<float>& table, int (&integers)[16]) {
  double highest = 0;
  for (float entry : table) {
    if (!std::isfinite(entry)) refuse("table entries must be finite");
    highest = std::max(highest, std::fabs((double)entry));
  }
  if (highest == 0) return 1;
  for (int k = 1; k <= kMaxEntry; k++) {
    bool exact = true;
    for (size_t i = 0; i < table.size(); i++) {
      double multiple = table[i] / highest * k;
      integers[i] = (int)std::lround(multiple);
      exact = exact && std::fabs(multiple - integers[i]) <= std::ldexp(std::fabs(multiple), -23);
    }
    if (exact) return highest / k;
  }
  return highest / kMaxEntry;
}

// Fills the planes and the zero point; returns what one unit of the table is worth.
double set_table(const std::vector<float>& table, Packed& to) {
  int integers[16] = {};
  double step = integers_of(table, integers);
  auto [low, high] = std::minmax_element(integers, integers + 16);
  to.num_planes = *high - *low <= 255 ? 1 : 2;
  to.zero = to.num_planes == 1 ? -*low : kMaxEntry + 1;
  for (int i = 0; i < 16; i++) {
    int u = integers[i] + to.zero;
    to.entries[i] = i < (int)table.size() ? (float)(table[i] / step) : 0.0f;
    to.planes[0][i] = (uint8_t)(to.num_planes == 1 ? u : u >> 7);
    to.planes[1][i] = (uint8_t)(to.num_planes == 1 ? 0 : u & 127);
  }
  return step;
}

// ---- row blocks -----------------------------------------------------------------------------------------------------

struct Repacker {
  const Canonical& from;
  Packed& to;
  double step;  // of the table
  int64_t num_groups;
  std::atomic<const char*> wrong{nullptr};

  void parameters(int64_t first_row, int first_block, uint8_t* out) {
    int blocks = std::min(kParameterBlocks, to.num_blocks - first_block);
    int64_t ss = scale_size(to.scale_type), zs = zero_size(to.zero_type);
    for (int64_t n = first_row; n < std::min(first_row + kRows, to.num_rows); n++) {
      for (int b = 0; b < blocks; b++) {
        int64_t source = n * num_groups + (int64_t)(first_block + b) * to.block_channels / from.group_size;
        int64_t target = (int64_t)b * kRows + n - first_row;
        if (ss == 1 && is_nan(to.scale_type, ((const uint8_t*)from.scales)[source])) wrong = "scales hold a NaN";
        if (ss == 2)
          std::memcpy(out + 2 * target, (const uint8_t*)from.scales + 2 * source, 2);
        else
          std::memcpy(out + ss * target, (const uint8_t*)from.scales + ss * source, (size_t)ss);
        if (zs) std::memcpy(out + to.zeros_offset + zs * target, (const uint8_t*)from.zeros + zs * source, (size_t)zs);
      }
      int64_t lane = n - first_row;
      if (to.scale_type == ScaleType::nested) copy_step(from.scale_steps, n, first_block, out + 4 * kRows + 2 * lane);
      if (to.zero_type == ZeroType::nested_offset)
        copy_step(from.offset_steps, n, first_block, out + to.zeros_offset + 4 * kRows + 2 * lane);
    }
  }

  void copy_step(const uint16_t* steps, int64_t row, int first_block, uint8_t* out) {
    int64_t per_row = (num_groups + from.groups_per_step - 1) / from.groups_per_step;
    int64_t group = (int64_t)first_block * to.block_channels / from.group_size;
    std::memcpy(out, steps + row * per_row + group / from.groups_per_step, 2);
  }

  void factors(int64_t first_row, uint8_t* out) {
    for (int64_t n = first_row; n < std::min(first_row + kRows, to.num_rows); n++) {
      double factor = (from.factors ? (double)from.factors[n] : 1.0) * step;
      if (to.scale_type == ScaleType::none) {
        if (scale_size(from.scale_type) == 1 && is_nan(from.scale_type, ((const uint8_t*)from.scales)[n]))
          wrong = "scales hold a NaN";
        factor *= scale_at(from.scale_type, from.scales, n);
      }
      float rounded = (float)factor;
      std::memcpy(out + 4 * (n - first_row), &rounded, 4);
    }
  }

  void row_block(int64_t index) {
    int64_t first_row = index * kRows;
    int rows = (int)std::min<int64_t>(kRows, to.num_rows - first_row);
    factors(first_row, to.memory.data() + factors_at(to, index));
    uint8_t* out = nullptr;
    Unpack unpack = unpack_for(from.bits);
    alignas(64) uint8_t row[4 * kMaxSteps];
    alignas(64) uint32_t steps[kMaxSteps][kRows] = {};
    for (int block = 0; block < to.num_blocks; block++) {
      if (block % to.slab_blocks == 0) out = to.memory.data() + slab_at(to, index, block / to.slab_blocks);
      if (block % kParameterBlocks == 0) {
        parameters(first_row, block, out);
        out += to.codes_offset;
      }
      int64_t first_channel = (int64_t)block * to.block_channels;
      int channels = (int)std::min<int64_t>(to.block_channels, to.num_channels - first_channel);
      int units = units_of(to, block), num_steps = units * to.unit_channels / 4;
      std::memset(row, 0, sizeof row);
      for (int lane = 0; lane < rows; lane++) {
        unpack(from.codes + (first_row + lane) * from.codes_stride + first_channel * from.bits / 8, channels, row);
        for (int s = 0; s < num_steps; s++) std::memcpy(&steps[s][lane], row + 4 * s, 4);
      }
      if (to.codes == Codes::ternary && has_code_3(&steps[0][0], num_steps)) wrong = "ternary codes must be 0, 1 or 2";
      pack_block(to.codes, (const uint8_t*)steps, units, out);
      out += (int64_t)units * unit_bytes(to.codes);
    }
  }

  static bool has_code_3(const uint32_t* steps, int num_steps) {
    uint32_t found = 0;
    for (int i = 0; i < num_steps * kRows; i++) found |= steps[i] & steps[i] >> 1 & 0x01010101;
    return found != 0;
  }
};

void check(const Canonical& from) {
  if (from.num_rows < 1 || from.num_channels < 1) refuse("a matrix needs at least one row and one channel");
  if (from.num_rows > INT32_MAX || from.num_channels > INT32_MAX / 8) refuse("the matrix is too large");
  if (from.group_size < 1) refuse("group_size must be positive");
  if (!from.table.empty() && (from.bits < 1 || from.bits > 4 || from.table.size() > 1u << from.bits))
    refuse("a table has at most 16 entries, one for each code");
  if (from.zero > kMaxZero || from.zero < -kMaxZero) refuse("zero must lie within " + std::to_string(kMaxZero));
}

void set_layout(const Canonical& from, Packed& to) {
  to.unit_channels = to.codes == Codes::ternary ? 20 : 16;
  to.block_channels = block_channels_for(from.group_size, from.num_channels, from.ternary);
  to.num_blocks = (int)((from.num_channels + to.block_channels - 1) / to.block_channels);
  bool nested = to.scale_type == ScaleType::nested, nested_offsets = to.zero_type == ZeroType::nested_offset;
  if (nested && from.groups_per_step * from.group_size % (kParameterBlocks * to.block_channels))
    refuse("4 blocks of " + std::to_string(to.block_channels) + " channels must share a step of nested scales");
  to.zeros_offset = kParameterBlocks * kRows * scale_size(to.scale_type) + (nested ? kStepsBytes : 0);
  to.codes_offset =
      to.zeros_offset + kParameterBlocks * kRows * zero_size(to.zero_type) + (nested_offsets ? kStepsBytes : 0);
  to.codes_block_bytes = (int64_t)units_of(to, 0) * unit_bytes(to.codes);
  to.slab_blocks = kSlabChannels / to.block_channels / kParameterBlocks * kParameterBlocks;
  to.num_slabs = (to.num_blocks + to.slab_blocks - 1) / to.slab_blocks;
  auto bytes_of = [&](int blocks, int64_t last_units) {
    int64_t parameters = (blocks + kParameterBlocks - 1) / kParameterBlocks * to.codes_offset;
    int64_t codes = (blocks - 1) * to.codes_block_bytes + last_units * unit_bytes(to.codes);
    return round_up(parameters + codes, 64);
  };
  to.slab_bytes = bytes_of(to.slab_blocks, units_of(to, 0));
  to.last_slab_bytes =
      bytes_of(to.num_blocks - (to.num_slabs - 1) * to.slab_blocks, units_of(to, to.num_blocks - 1));
  to.panel_bytes = kPanelBlocks * (kFactorBytes + (to.num_slabs - 1) * to.slab_bytes + to.last_slab_bytes);
}

}  // namespace

int block_channels_for(int64_t group_size, int64_t num_channels, bool ternary) {
  int longest = ternary ? kTernaryBlockChannels : kMaxBlockChannels;
  if (group_size >= num_channels) return (int)(num_channels < longest ? num_channels : longest);
  if (ternary) refuse("ternary codes packed five to a byte need one scale for the whole row; use 2 bits for groups");
  if (group_size < 16 || group_size % 16)
    refuse("groups of " + std::to_string(group_size) + " channels are neither a multiple of 16 nor the whole row");
  for (int length = longest; length > 16; length -= 16)
    if (group_size % length == 0) return length;
  return 16;
}

Packed pack(const Canonical& from) {
  check(from);
  Packed to{};
  to.num_rows = from.num_rows;
  to.num_channels = from.num_channels;
  to.codes = codes_for(from.bits, from.ternary);
  bool one_scale = from.group_size >= from.num_channels && from.zero_type != ZeroType::offset &&
                   from.scale_type != ScaleType::nested;
  to.scale_type = one_scale ? ScaleType::none : from.scale_type;
  to.zero_type = from.zero_type;
  to.zero = from.zero;
  double step = from.table.empty() ? 1 : set_table(from.table, to);
  set_layout(from, to);
  int64_t num_panels = (to.num_row_blocks() + kPanelBlocks - 1) / kPanelBlocks;
  to.memory = Buffer::of_slab((size_t)(num_panels * to.panel_bytes));
  to.start = to.memory.data();
  Repacker repacker{from, to, step, (from.num_channels + from.group_size - 1) / from.group_size};
  Pool::instance().run(to.num_row_blocks(), [&](int64_t i) { repacker.row_block(i); });
  if (repacker.wrong) refuse(repacker.wrong.load());
  return to;
}

}  // namespace nibble
