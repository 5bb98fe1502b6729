#include "bind.hpp"
#include "isa.hpp"
#include "rows.hpp"
#include "pool.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace nibble {

void bind_rows(nb::module_&) {}

}  // namespace nibble
