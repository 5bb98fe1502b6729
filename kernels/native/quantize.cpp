#include "quantize.hpp"

#include <stdexcept>

#include "isa.hpp"
#include "linear.hpp"
#include "memory.hpp"
#include "pool.hpp"
#include "simd/scalar.hpp"

namespace nibble {
namespace {

constexpr int64_t kRowsPerChunk = 64;

void widen(const void* row, FloatType type, int64_t count, float* out) {
  const uint16_t* halves = (const uint16_t*)row;
  for (int64_t i = 0; i < count; i++) {
    if (type == FloatType::f32) {
      out[i] = ((const float*)row)[i];
    } else if (type == FloatType::f16) {
      out[i] = scalar::widen_f16(halves[i]);
    } else {
      uint32_t wide = (uint32_t)halves[i] << 16;
      __builtin_memcpy(&out[i], &wide, 4);
    }
  }
}

}  // namespace

void quantize_rows(const void* weights, FloatType type, int64_t num_rows, int64_t num_channels, int64_t group,
                   uint8_t* codes, float* scales) {
  if (group < 16 || group % 16 || num_channels < 1 || num_channels % group)
    throw std::invalid_argument("rows must be whole groups, and groups multiples of 16 channels");
  int64_t num_groups = num_channels / group, size = type == FloatType::f32 ? 4 : 2;
  const LinearOps& ops = *active_isa().linear;
  Pool::instance().run((num_rows + kRowsPerChunk - 1) / kRowsPerChunk, [&](int64_t chunk) {
    Buffer wide((size_t)num_channels * 4), rounded((size_t)num_channels), sums((size_t)num_groups * 4);
    for (int64_t n = chunk * kRowsPerChunk; n < num_rows && n < (chunk + 1) * kRowsPerChunk; n++) {
      widen((const uint8_t*)weights + n * num_channels * size, type, num_channels, (float*)wide.data());
      Activations row{};
      row.num_tokens = 1;
      row.num_blocks = (int)num_groups;
      row.block_channels = (int)group;
      row.stride = num_channels;
      row.values = (int8_t*)rounded.data();
      row.scales = scales + n * num_groups;
      row.sums = (int32_t*)sums.data();
      ops.quantize((const float*)wide.data(), num_channels, row, Tile{0, 1}, 0, row.num_blocks);
      for (int64_t k = 0; k < num_channels; k++) codes[n * num_channels + k] = (uint8_t)(row.values[k] + 128);
    }
  });
}

}  // namespace nibble
