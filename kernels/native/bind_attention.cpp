#include "bind.hpp"
#include "isa.hpp"
#include "attention.hpp"
#include "pool.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace nibble {

void bind_attention(nb::module_&) {}

}  // namespace nibble
