#include "check.hpp"

int main() {
  using namespace nibble::tests;
  struct {
    const char* name;
    void (*run)();
  } const all[] = {{"pool", test_pool},           {"linear", test_linear},       {"int8", test_int8},
                   {"pack", fuzz_pack},           {"attention", test_attention}, {"quantized", test_quantized},
                   {"rows", test_rows},           {"sampling", test_sampling}};
  for (const auto& test : all) {
    std::printf("%s\n", test.name);
    std::fflush(stdout);
    test.run();
  }
  return 0;
}
