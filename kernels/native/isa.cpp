#include "isa.hpp"

#include <atomic>
#include <stdexcept>

#include "attention.hpp"
#include "dense.hpp"
#include "int8.hpp"
#include "linear.hpp"
#include "probe.hpp"
#include "quantized.hpp"
#include "rows.hpp"

namespace nibble {
namespace {

#define NIBBLE_TABLE(isa)                                                                                             \
  { #isa, &isa::linear_ops, &isa::int8_ops, &isa::dense_ops, &isa::attention_ops, &isa::quantized_ops, &isa::rows_ops, \
    &isa::probe_ops }

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif

std::vector<const Isa*> supported() {  // best first
  static const Isa scalar_isa = NIBBLE_TABLE(scalar);
  std::vector<const Isa*> found;
#if defined(__x86_64__)
  static const Isa avx512_isa = NIBBLE_TABLE(avx512);
  static const Isa avx2_isa = NIBBLE_TABLE(avx2);
  if (has_avx512()) found.push_back(&avx512_isa);
  if (has_avx2()) found.push_back(&avx2_isa);
#endif
  found.push_back(&scalar_isa);
  return found;
}

std::atomic<const Isa*>& active() {
  static std::atomic<const Isa*> isa{supported().front()};
  return isa;
}

}  // namespace

const Isa& active_isa() { return *active().load(std::memory_order_relaxed); }

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa* isa : supported()) names.emplace_back(isa->name);
  return names;
}

void use_isa(const std::string& name) {
  std::string known;
  for (const Isa* isa : supported()) {
    if (name == isa->name) {
      active().store(isa);
      return;
    }
    known += (known.empty() ? "" : ", ") + std::string(isa->name);
  }
  throw std::invalid_argument("instruction set '" + name + "' is not one of " + known);
}

}  // namespace nibble
