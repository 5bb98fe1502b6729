// What the tests share: a check that ends the program, random data, and runs under every instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "isa.hpp"
#include "pool.hpp"

namespace nibble::tests {

#define CHECK(condition, ...)                                                  \
  do {                                                                         \
    if (!(condition)) {                                                        \
      std::fprintf(stderr, "%s:%d: %s\n  ", __FILE__, __LINE__, #condition);   \
      std::fprintf(stderr, __VA_ARGS__);                                       \
      std::fprintf(stderr, "\n");                                              \
      std::exit(1);                                                            \
    }                                                                          \
  } while (false)

using Random = std::mt19937;

inline int64_t pick(Random& random, int64_t lowest, int64_t highest) {
  return std::uniform_int_distribution<int64_t>(lowest, highest)(random);
}

// Of exactly `size` elements on the heap, so that one read or written past the end is seen.
inline std::vector<float> floats(Random& random, int64_t size, float scale = 1.0f) {
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> values((size_t)size);
  for (float& value : values) value = normal(random);
  return values;
}
inline std::vector<uint8_t> bytes(Random& random, int64_t size) {
  std::vector<uint8_t> values((size_t)size);
  for (uint8_t& value : values) value = (uint8_t)random();
  return values;
}

// Runs `compute`, which returns a vector of numbers, under every instruction set, each with 1 and with 3 threads: all must
// give the same bits. Returns them.
template <class Compute>
auto same_bits(const std::string& what, const Compute& compute) {
  decltype(compute()) expected;
  for (const std::string& isa : supported_isas())
    for (int num_threads : {1, 3}) {
      use_isa(isa);
      Pool::instance().set_num_threads(num_threads);
      auto found = compute();
      if (expected.empty()) expected = found;
      CHECK(found.size() == expected.size(), "%s: %zu and %zu results", what.c_str(), found.size(), expected.size());
      for (size_t i = 0; i < found.size(); i++)
        CHECK(std::memcmp(&found[i], &expected[i], sizeof found[i]) == 0, "%s: result %zu is %.9g on %s with %d threads, not %.9g",
              what.c_str(), i, (double)found[i], isa.c_str(), num_threads, (double)expected[i]);
    }
  use_isa(supported_isas().front());
  return expected;
}

void test_linear();
void test_int8();
void fuzz_pack();
void test_attention();
void test_quantized();
void test_rows();
void test_sampling();
void test_pool();

}  // namespace nibble::tests
