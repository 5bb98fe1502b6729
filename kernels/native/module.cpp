#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bind.hpp"
#include "isa.hpp"
#include "pool.hpp"
#include "quantize.hpp"
#include "tape.hpp"

namespace nb = nanobind;

NB_MODULE(_native, m) {
  using namespace nibble;
  m.attr("INTERFACE") = 8;  // one more here and in __init__.py whenever a binding changes
  m.def("isa", [] { return std::string(active_isa().name); });
  m.def("supported_isas", &supported_isas);
  m.def("use_isa", &use_isa, nb::arg("name"));
  m.def("num_threads", [] { return Pool::instance().num_threads(); });
  m.def("set_num_threads", [](int n) { Pool::instance().set_num_threads(n); }, nb::arg("num_threads"));
  nb::enum_<FloatType>(m, "FloatType")
      .value("f16", FloatType::f16)
      .value("bf16", FloatType::bf16)
      .value("f32", FloatType::f32);
  m.def(
      "quantize_rows",
      [](uintptr_t weights, FloatType type, int64_t rows, int64_t channels, int64_t group, uintptr_t codes,
         uintptr_t scales) {
        quantize_rows((const void*)weights, type, rows, channels, group, (uint8_t*)codes, (float*)scales);
      },
      nb::arg("weights"), nb::arg("type"), nb::arg("num_rows"), nb::arg("num_channels"), nb::arg("group"),
      nb::arg("codes"), nb::arg("scales"), nb::call_guard<nb::gil_scoped_release>());
  nb::class_<Tape>(m, "Tape")
      .def(nb::init<>())
      .def("start", &Tape::start)
      .def("stop", &Tape::stop)
      .def("run", &Tape::run, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("num_calls", &Tape::num_calls);
  bind_linear(m);
  bind_dense(m);
  bind_attention(m);
  bind_quantized(m);
  bind_rows(m);
}
