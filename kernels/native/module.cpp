#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bind.hpp"
#include "isa.hpp"
#include "pool.hpp"

namespace nb = nanobind;

NB_MODULE(_native, m) {
  using namespace nibble;
  m.def("isa", [] { return std::string(active_isa().name); });
  m.def("supported_isas", &supported_isas);
  m.def("use_isa", &use_isa, nb::arg("name"));
  m.def("num_threads", [] { return Pool::instance().num_threads(); });
  m.def("set_num_threads", [](int n) { Pool::instance().set_num_threads(n); }, nb::arg("num_threads"));
  bind_linear(m);
  bind_dense(m);
  bind_attention(m);
  bind_rows(m);
}
