// Rounding a matrix of floats to 8 bits at load: an output head that a checkpoint left in 16 bits.
#pragma once

#include <cstdint>

namespace nibble {

enum class FloatType : int { f16, bf16, f32 };

// codes[n, k] = round(w / s) + 128, scales[n, k / group] = s = max |w| / 127 over the group; NaN where a group is not
// finite. `group` is a multiple of 16 that divides num_channels. Throws std::invalid_argument otherwise.
void quantize_rows(const void* weights, FloatType type, int64_t num_rows, int64_t num_channels, int64_t group,
                   uint8_t* codes, float* scales);

}  // namespace nibble
