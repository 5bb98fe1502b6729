#include "bind.hpp"
#include "isa.hpp"
#include "dense.hpp"
#include "pool.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace nibble {

void bind_dense(nb::module_&) {}

}  // namespace nibble
