#include "check.hpp"
#include "int8_group.hpp"
#include "packed.hpp"

namespace nibble::tests {
namespace {

struct Shape {
  int64_t rows, channels, group;
  int bits;
};

// A matrix, the memory it was read from, and the sums of its codes, all of exactly their size.
struct Matrix {
  std::vector<uint8_t> codes, zeros;
  std::vector<float> scales;
  std::vector<int32_t> code_sums;
  Packed packed;

  Matrix(const Shape& shape, std::vector<uint8_t> all, std::vector<uint8_t> own_zeros)
      : codes(std::move(all)), zeros(std::move(own_zeros)) {
    int64_t groups = (shape.channels + shape.group - 1) / shape.group;
    scales.assign((size_t)(shape.rows * groups), 0.5f);
    Canonical header{.num_rows = shape.rows, .num_channels = shape.channels, .group_size = shape.group,
                     .bits = shape.bits, .codes = codes.data(), .codes_stride = (shape.channels * shape.bits + 7) / 8,
                     .scale_type = ScaleType::f32, .scales = scales.data(),
                     .zero_type = zeros.empty() ? ZeroType::constant : ZeroType::u8,
                     .zeros = zeros.empty() ? nullptr : zeros.data(), .zero = zeros.empty() ? 1 << (shape.bits - 1) : 0};
    packed = pack(header);
    code_sums.assign((size_t)(shape.rows * packed.num_blocks), 0);
    for (int64_t n = 0; n < shape.rows; n++)
      for (int64_t k = 0; k < shape.channels; k++) {
        uint8_t byte = codes[(size_t)(n * header.codes_stride + k * shape.bits / 8)];
        int code = shape.bits == 8 ? byte : byte >> 4 * (k % 2) & 15;
        code_sums[(size_t)(n * packed.num_blocks + k / packed.block_channels)] += code;
      }
  }

  Int8Group group(const TokenRounding& rounding) const {
    bool has_zero = rounding.fixed ? rounding.zero != 0 : !rounding.symmetric;
    std::vector<const int32_t*> sums;
    if (has_zero) sums.push_back(code_sums.data());
    return Int8Group({&packed}, rounding, sums);
  }
};

void test_products(Random& random, const Shape& shape, bool with_zeros, const TokenRounding& rounding) {
  std::string what = std::to_string(shape.bits) + " bits, " + std::to_string(shape.channels) + " channels";
  int64_t groups = (shape.channels + shape.group - 1) / shape.group;
  std::vector<uint8_t> zeros = bytes(random, with_zeros ? shape.rows * groups : 0);
  Matrix matrix(shape, bytes(random, shape.rows * ((shape.channels * shape.bits + 7) / 8)), zeros);
  Int8Group group = matrix.group(rounding);
  for (int64_t num_tokens : {1, 7, 19}) {  // tiles of every width
    std::vector<float> x = floats(random, num_tokens * shape.channels);
    std::vector<float> together = same_bits(what, [&] {
      std::vector<float> out((size_t)(num_tokens * shape.rows));
      group.run(x.data(), num_tokens, {out.data()});
      return out;
    });
    std::vector<float> alone((size_t)shape.rows);
    for (int64_t t = 0; t < num_tokens; t++) {
      group.run(x.data() + t * shape.channels, 1, {alone.data()});
      for (int64_t n = 0; n < shape.rows; n++)
        CHECK(alone[(size_t)n] == together[(size_t)(t * shape.rows + n)], "%s: token %d differs beside others",
              what.c_str(), (int)t);
    }
  }
}

// Bug: an integer that overflows on the way, which vectors wrap and plain C++ must not.
void test_extremes() {
  for (uint8_t code : {0, 255})
    for (int32_t zero : {-128, 127})
      for (float value : {-1e9f, 1e9f}) {
        int64_t channels = kSpanChannels + 700;
        Matrix matrix({2, channels, channels, 8}, std::vector<uint8_t>((size_t)(2 * channels), code),
                      std::vector<uint8_t>(2, (uint8_t)(255 - code)));
        Int8Group group = matrix.group({8, false, true, 1.0f, zero});
        std::vector<float> x((size_t)channels, value);
        float product = (float)((2 * code - 255) * ((value < 0 ? -128 : 127) - zero));
        float expected = ((float)kSpanChannels * product + 700 * product) * 0.5f;
        std::vector<float> found = same_bits("extremes", [&] {
          std::vector<float> out(2);
          group.run(x.data(), 1, {out.data()});
          return out;
        });
        CHECK(found[0] == expected, "code %d, zero %d: %.9g, expected %.9g", code, (int)zero, (double)found[0],
              (double)expected);
      }
}

}  // namespace

void test_int8() {
  Random random(5);
  const TokenRounding roundings[] = {{8, true, false, 0, 0}, {4, false, false, 0, 0}, {8, false, true, 0.02f, -77}};
  for (int bits : {4, 8})
    for (const Shape& shape : {Shape{1, 1, 1, bits}, {33, 45, 16, bits}, {7, 300, 300, bits}, {40, 272, 128, bits},
                               {17, 2100, 2100, bits}, {20, 2100, 48, bits}})
      for (const TokenRounding& rounding : roundings)
        for (bool with_zeros : {false, true}) test_products(random, shape, with_zeros, rounding);
  test_extremes();
}

}  // namespace nibble::tests
