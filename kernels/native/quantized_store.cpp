#include "hadamard.hpp"
#include "quantized.hpp"

namespace nibble::NIBBLE_ISA {
namespace {

constexpr float kLimit = 65504.0f;
constexpr float kE4m3Max = 448.0f;

struct Row {
  alignas(64) float x[kMaxHeadDim];
  alignas(64) uint8_t codes[kMaxHeadDim];
  alignas(64) uint8_t bytes[2 * kMaxHeadDim + 64];
};

inline float lowest_of(Floats x) { return -reduce_max(sub(zero(), x)); }

// ---- scales and zeros -----------------------------------------------------------------------------------------------

struct Parameter {
  uint16_t code;
  float value;  // as it is read
};

inline uint32_t bits_of(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return u;
}
inline float float_of(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, 4);
  return x;
}

// To nearest, ties to even, saturating; no negative zero. x is no NaN.
inline Parameter to_e4m3(float x) {
  float size = __builtin_fabsf(x);
  if (size > kE4m3Max) size = kE4m3Max;
  uint32_t code;
  if (size < 0x1p-6f) {
    code = (uint32_t)__builtin_nearbyintf(size * 512);  // subnormal: steps of 2^-9
  } else {
    uint32_t u = bits_of(size);
    code = ((u + 0x7ffff + (u >> 20 & 1)) >> 20) - (120 << 3);
  }
  float value = code < 8 ? (float)code * 0x1p-9f : float_of((code + (120 << 3)) << 20);
  bool negative = x < 0 && code;
  return {(uint16_t)(code | (negative ? 0x80 : 0)), negative ? -value : value};
}

inline Parameter to_half(float x) {
  uint16_t codes[16];
  float values[16];
  store_f16(codes, max(set1(-kLimit), min(set1(kLimit), set1(x))));
  store(values, load_f16(codes));
  return values[0] == 0 ? Parameter{0, 0} : Parameter{codes[0], values[0]};
}

inline Parameter encode(const RowFormat& format, float x) {
  if (x != x) return {(uint16_t)(format.parameter_bytes == 2 ? 0x7e00 : 0x7f), x};
  return format.parameter_bytes == 2 ? to_half(x) : to_e4m3(x);
}

// ---- codes ----------------------------------------------------------------------------------------------------------

struct Clip {
  float alpha, prescale;
  bool origin;
};

// One group: its codes, its scale and its zero.
inline void quantize(const RowFormat& format, const float* x, const Clip& clip, uint8_t* codes, Parameter* scale,
                     Parameter* offset) {
  Floats lowest = load(x), highest = lowest, poison = zero();
  for (int i = 0; i < format.group_size; i += 16) {
    Floats at = load(x + i);
    lowest = min(at, lowest), highest = max(at, highest);
    poison = fma(at, zero(), poison);  // NaN where there is one
  }
  float low = lowest_of(lowest), high = reduce_max(highest), nan = reduce_add(poison);
  if (clip.origin) {
    low = clip.alpha * low, high = clip.alpha * high;
  } else {
    float middle = (low + high) * 0.5f, half = (high - low) * 0.5f * clip.alpha;
    low = middle - half, high = middle + half;
  }
  float smallest = format.parameter_bytes == 2 ? 0x1p-24f : 0x1p-9f;
  float step = (high - low) / (float)format.max_code / clip.prescale + nan;
  *scale = encode(format, step);
  if (scale->value < smallest) *scale = encode(format, smallest);
  *offset = encode(format, low / clip.prescale + nan);
  Floats prescale = set1(clip.prescale), zeros = set1(offset->value), scales = set1(scale->value);
  Floats most = set1((float)format.max_code);
  for (int i = 0; i < format.group_size; i += 16) {
    Floats steps = div(sub(div(load(x + i), prescale), zeros), scales);
    int32_t lanes[16];
    istore(lanes, to_int(round(max(zero(), min(steps, most)))));
    for (int j = 0; j < 16; j++) codes[i + j] = nan == 0 ? (uint8_t)lanes[j] : 0;
  }
}

inline void pack_trits(const uint8_t* codes, int dim, int n, uint8_t* bytes) {
  for (int j = 0; j < n; j++) {
    int value = 0;
    for (int i = 0; i < 5; i++) value = 3 * value + (j + i * n < dim ? codes[j + i * n] : 0);
    bytes[j] = (uint8_t)((256 * value + 242) / 243);
  }
}

inline void pack(const RowFormat& format, const uint8_t* codes, int dim, uint8_t* bytes) {
  int n = format.plane_bytes;
  switch (format.width) {
    case 8: __builtin_memcpy(bytes, codes, (size_t)dim); return;
    case 4:
      for (int j = 0; j < n; j++) bytes[j] = (uint8_t)(codes[j] | codes[j + n] << 4);
      return;
    case 2:
    case 3:
      for (int j = 0; j < n; j++)
        bytes[j] = (uint8_t)((codes[j] & 3) | (codes[j + n] & 3) << 2 | (codes[j + 2 * n] & 3) << 4 |
                             (codes[j + 3 * n] & 3) << 6);
      if (format.width == 2) return;
      for (int j = 0; j < dim / 8; j++) {
        int high = 0;
        for (int i = 0; i < 8; i++) high |= codes[j + i * (dim / 8)] >> 2 << i;
        bytes[n + j] = (uint8_t)high;
      }
      return;
    default: pack_trits(codes, dim, n, bytes);
  }
}

// ---- places ---------------------------------------------------------------------------------------------------------

// The bytes of a row and its parameters, from row.x.
void encode_row(const RowFormat& format, int dim, const float* alphas, float prescale, bool origin, Row& row,
                uint8_t* parameters, int page_size) {
  if (format.width == 16) {
    for (int i = 0; i < dim; i += 16) store_f16((uint16_t*)row.bytes + i, load(row.x + i));
    return;
  }
  int step = page_size * format.parameter_bytes;
  for (int g = 0; g < format.num_groups; g++) {
    Parameter scale, offset;
    int at = g * format.group_size;
    quantize(format, row.x + at, {alphas[g], prescale, origin}, row.codes + at, &scale, &offset);
    __builtin_memcpy(parameters + g * step, &scale.code, (size_t)format.parameter_bytes);
    __builtin_memcpy(parameters + (format.num_groups + g) * step, &offset.code, (size_t)format.parameter_bytes);
  }
  pack(format, row.codes, dim, row.bytes);
}

inline void scatter(const RowFormat& format, const uint8_t* bytes, uint8_t* to, int token, int page_size) {
  int unit = format.width == 16 ? 2 : format.width == 1 ? 1 : 4;
  for (int j = 0; j < format.row_bytes; j += unit)
    __builtin_memcpy(to + (int64_t)j * page_size + token * unit, bytes + j, (size_t)unit);
}

// Saturated, turned, and saturated again.
void load_row(const RowFormat& format, const float* from, int dim, Row& row) {
  Floats highest = set1(kLimit), lowest = set1(-kLimit);
  for (int i = 0; i < dim; i += 16) store(row.x + i, max(lowest, min(highest, load(from + i))));
  if (!format.hadamard) return;
  hadamard(row.x, dim);
  for (int i = 0; i < dim; i += 16) store(row.x + i, max(lowest, min(highest, load(row.x + i))));
}

// stride: between channels, in cells.
void write_recent(const Row& row, int dim, Cell cell, uint8_t* to, int64_t stride) {
  for (int i = 0; i < dim; i += 16) {
    uint16_t halves[16];
    store_f16(halves, load(row.x + i));
    for (int j = 0; j < 16; j++) {
      int64_t at = (i + j) * stride;
      if (cell == Cell::f16)
        ((uint16_t*)to)[at] = halves[j];
      else
        ((float*)to)[at] = row.x[i + j];
    }
  }
}

}  // namespace

void store_quantized(const QuantizedStore& call, int head) {
  const QuantizedShape& shape = call.shape;
  const QuantizedLayer& layer = call.layer;
  const CacheShape recent = shape.recent();
  int dim = shape.heads.head_dim, size = shape.heads.page_size;
  const float* key_clip = layer.key_clip + head * shape.keys.num_groups;
  const float* value_clip = layer.value_clip + head * shape.values.num_groups;
  Row row;
  for (int64_t t = 0; t < call.num_tokens; t++) {
    int64_t page = call.slots[t] / size, at = (t * shape.heads.num_kv_heads + head) * dim;
    int token = (int)(call.slots[t] % size);
    uint8_t* chunk = layer.pages + shape.chunk(page, head);
    int64_t kept = call.recent_slots ? call.recent_slots[t] : -1;
    int64_t recent_page = kept / kRecentTokens, recent_row = kept % kRecentTokens;

    load_row(shape.keys, call.k + at, dim, row);
    encode_row(shape.keys, dim, key_clip, layer.key_prescale[head], layer.key_origin, row,
               chunk + shape.key_parameters_at + token * shape.keys.parameter_bytes, size);
    scatter(shape.keys, row.bytes, chunk, token, size);
    if (kept >= 0)
      write_recent(row, dim, recent.cell,
                   layer.recent + recent.keys_offset(recent_page, head) + recent_row * recent.cell_bytes(),
                   kRecentTokens);

    load_row(shape.values, call.v + at, dim, row);
    encode_row(shape.values, dim, value_clip, layer.value_prescale[head], layer.value_origin, row,
               chunk + shape.value_parameters_at + token * shape.values.parameter_bytes, size);
    __builtin_memcpy(chunk + shape.value_codes_at + (int64_t)token * shape.values.row_bytes, row.bytes,
                     (size_t)shape.values.row_bytes);
    if (kept >= 0)
      write_recent(row, dim, recent.cell,
                   layer.recent + recent.values_offset(recent_page, head) + recent_row * dim * recent.cell_bytes(), 1);
  }
}

}  // namespace nibble::NIBBLE_ISA
