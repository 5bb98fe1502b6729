#include <atomic>
#include <stdexcept>
#include <thread>

#include "check.hpp"
#include "dense_group.hpp"
#include "group.hpp"
#include "packed.hpp"

namespace nibble::tests {
namespace {

int64_t scale_bytes(ScaleType type) { return type == ScaleType::f32 ? 4 : type == ScaleType::f16 || type == ScaleType::bf16 ? 2 : 1; }

// A matrix and the memory it was read from.
struct Matrix {
  Canonical header{};
  std::vector<uint8_t> codes, scales, zeros;
  std::vector<float> factors;

  // Fills memory of exactly the size that the header speaks of. Scales are positive and of modest size.
  void fill(Random& random) {
    Canonical& h = header;
    int64_t rows = std::max<int64_t>(h.num_rows, 0), channels = std::max<int64_t>(h.num_channels, 0);
    int64_t groups = h.group_size > 0 ? (channels + h.group_size - 1) / h.group_size : 0;
    h.codes_stride = (channels * std::max(h.bits, 0) + 7) / 8;
    codes = bytes(random, rows * h.codes_stride);
    if (h.ternary)
      for (uint8_t& byte : codes) byte &= 0x55;
    scales = bytes(random, rows * groups * scale_bytes(h.scale_type));
    for (size_t i = 0; i < scales.size(); i++) {
      bool is_top = (int64_t)(i + 1) % scale_bytes(h.scale_type) == 0;
      if (is_top) scales[i] = h.scale_type == ScaleType::e8m0 ? 120 + scales[i] % 8 : 0x30 + scales[i] % 8;
    }
    if (h.zero_type != ZeroType::constant) zeros = bytes(random, rows * groups);
    if (h.zero_type == ZeroType::f32) {
      std::vector<float> numbers = floats(random, rows * groups, 5.0f);
      zeros.resize(numbers.size() * sizeof(float));
      if (!numbers.empty()) std::memcpy(zeros.data(), numbers.data(), zeros.size());
    }
    h.codes = codes.data();
    h.scales = scales.data();
    h.zeros = zeros.empty() ? nullptr : zeros.data();
    h.factors = factors.empty() ? nullptr : factors.data();
  }
};

void test_products(Random& random, Matrix& matrix, const std::string& what) {
  matrix.fill(random);
  Packed packed = pack(matrix.header);
  Group group({&packed});
  FloatGroup<Packed> exact({&packed});  // activations that are not rounded
  int64_t rows = packed.num_rows, channels = packed.num_channels;
  for (int64_t num_tokens : {1, 3, 8, 19}) {
    std::vector<float> x = floats(random, num_tokens * channels);
    std::vector<float> together = same_bits(what, [&] {
      std::vector<float> out((size_t)(num_tokens * rows));
      group.run(x.data(), num_tokens, {out.data()});
      return out;
    });
    same_bits(what + ", exact", [&] {
      std::vector<float> out((size_t)(num_tokens * rows));
      exact.run(x.data(), num_tokens, {out.data()});
      return out;
    });
    std::vector<float> alone((size_t)rows);  // bug: a token's sums in another order in a larger batch
    for (int64_t t = 0; t < num_tokens; t++) {
      group.run(x.data() + t * channels, 1, {alone.data()});
      for (int64_t n = 0; n < rows; n++)
        CHECK(alone[(size_t)n] == together[(size_t)(t * rows + n)], "%s: token %d differs beside others", what.c_str(), (int)t);
    }
  }
}

// Bug: the rounded activations of one thread's call overwritten by another's, when both use the same group.
void test_threads_share_a_group(Random& random) {
  Matrix matrix;
  matrix.header = {.num_rows = 64, .num_channels = 256, .group_size = 32, .bits = 4,
                   .scale_type = ScaleType::f16, .zero_type = ZeroType::constant, .zero = 8};
  matrix.fill(random);
  Packed packed = pack(matrix.header);
  Group group({&packed});
  std::atomic<int> num_waiting{2};
  auto caller = [&](std::vector<float> x) {
    std::vector<float> expected(3 * 64), out(3 * 64);
    Group({&packed}).run(x.data(), 3, {expected.data()});
    num_waiting--;
    while (num_waiting > 0) std::this_thread::yield();
    for (int i = 0; i < 1000; i++) {
      group.run(x.data(), 3, {out.data()});
      CHECK(out == expected, "call %d of a thread has the results of another", i);
    }
  };
  std::thread first(caller, floats(random, 3 * 256)), second(caller, floats(random, 3 * 256));
  first.join();
  second.join();
}

void test_dense(Random& random, FloatType type, int64_t rows, int64_t channels) {
  int64_t element_bytes = type == FloatType::f32 ? 4 : 2;
  std::vector<uint8_t> weights = bytes(random, rows * channels * element_bytes);
  for (int64_t i = element_bytes - 1; i < (int64_t)weights.size(); i += element_bytes) weights[(size_t)i] &= 0xbf;  // finite
  DenseMatrix matrix = pack_dense(weights.data(), type, rows, channels);
  DenseGroup group({&matrix});
  for (int64_t num_tokens : {1, 5}) {
    std::vector<float> x = floats(random, num_tokens * channels);
    same_bits("dense", [&] {
      std::vector<float> out((size_t)(num_tokens * rows));
      group.run(x.data(), num_tokens, {out.data()});
      return out;
    });
  }
}

}  // namespace

void test_linear() {
  Random random(3);
  struct {
    int64_t rows, channels, group;
  } const shapes[] = {{1, 1, 1}, {33, 45, 16}, {16, 64, 32}, {7, 300, 300}, {40, 272, 128}, {17, 1000, 1 << 20},
                {70, 2100, 32}};  // two slabs
  test_threads_share_a_group(random);
  for (auto [rows, channels, group] : shapes) {
    for (int bits : {1, 2, 3, 4, 5, 6, 8})
      for (ZeroType zero_type : {ZeroType::constant, ZeroType::u8, ZeroType::f32}) {
        Matrix matrix;
        matrix.header = {.num_rows = rows, .num_channels = channels, .group_size = group, .bits = bits,
                         .scale_type = ScaleType::f16, .zero_type = zero_type, .zero = 1 << bits >> 1};
        test_products(random, matrix, std::to_string(bits) + " bits, " + std::to_string(channels) + " channels");
      }
    for (ScaleType scale_type : {ScaleType::bf16, ScaleType::f32, ScaleType::e8m0, ScaleType::e4m3}) {
      Matrix matrix;
      matrix.header = {.num_rows = rows, .num_channels = channels, .group_size = group, .bits = 4,
                       .scale_type = scale_type, .table = floats(random, 16)};
      matrix.factors = floats(random, rows);
      test_products(random, matrix, "table, " + std::to_string(channels) + " channels");
    }
    Matrix ternary;
    ternary.header = {.num_rows = rows, .num_channels = channels, .group_size = channels, .bits = 2, .ternary = true,
                      .scale_type = ScaleType::f32, .zero = 1};
    test_products(random, ternary, "ternary, " + std::to_string(channels) + " channels");
    for (FloatType type : {FloatType::f16, FloatType::bf16, FloatType::f32}) test_dense(random, type, rows, channels);
  }
}

// Bug: sizes that a damaged checkpoint can hold end in a crash, or in memory written past its end.
void fuzz_pack() {
  Random random(4);
  const ScaleType scale_types[] = {ScaleType::f16, ScaleType::bf16, ScaleType::f32, ScaleType::e8m0, ScaleType::e4m3};
  const ZeroType zero_types[] = {ZeroType::constant, ZeroType::u8, ZeroType::f32};
  const int64_t groups[] = {-16, 0, 1, 8, 16, 24, 32, 48, 64, 128, 144, 160, 1024, INT64_MAX / 2};
  int num_packed = 0, num_refused = 0;
  for (int i = 0; i < 3000; i++) {
    Matrix matrix;
    matrix.header = {.num_rows = pick(random, -1, 40), .num_channels = pick(random, -1, 400),
                     .group_size = groups[pick(random, 0, std::size(groups) - 1)], .bits = (int)pick(random, -1, 9),
                     .ternary = pick(random, 0, 5) == 0, .scale_type = scale_types[pick(random, 0, 4)],
                     .zero_type = zero_types[pick(random, 0, 2)], .zero = (int32_t)pick(random, -70000, 70000)};
    if (pick(random, 0, 3) == 0) matrix.header.table = floats(random, pick(random, 0, 20));
    if (pick(random, 0, 9) == 0) matrix.header.zero = pick(random, 0, 1) ? INT32_MIN : INT32_MAX;
    matrix.fill(random);
    if (pick(random, 0, 9) == 0) matrix.codes = bytes(random, (int64_t)matrix.codes.size());  // ternary codes of 3
    if (pick(random, 0, 9) == 0) matrix.scales = bytes(random, (int64_t)matrix.scales.size());  // NaN and infinity
    matrix.header.codes = matrix.codes.data();
    matrix.header.scales = matrix.scales.data();
    try {
      Packed packed = pack(matrix.header);
      std::vector<float> x = floats(random, packed.num_channels), out((size_t)packed.num_rows);
      Group({&packed}).run(x.data(), 1, {out.data()});
      num_packed++;
    } catch (const std::invalid_argument&) {
      num_refused++;
    }
  }
  CHECK(num_packed > 300 && num_refused > 300, "%d packed and %d refused: too few of one", num_packed, num_refused);
}

}  // namespace nibble::tests
