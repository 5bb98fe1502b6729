#include "bind.hpp"
#include "dense_group.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace nibble {

void bind_dense(nb::module_& m) {
  nb::class_<DenseMatrix>(m, "DenseMatrix")
      .def_ro("num_rows", &DenseMatrix::num_rows)
      .def_ro("num_channels", &DenseMatrix::num_channels)
      .def_prop_ro("num_bytes", [](const DenseMatrix& w) { return w.memory.size(); });
  m.def(
      "pack_dense",
      [](uintptr_t weights, FloatType type, int64_t num_rows, int64_t num_channels) {
        return pack_dense((const void*)weights, type, num_rows, num_channels);
      },
      "weights"_a, "type"_a, "num_rows"_a, "num_channels"_a, nb::call_guard<nb::gil_scoped_release>());
  bind_group<FloatGroup<DenseMatrix>, DenseMatrix>(m, "DenseGroup");
  bind_group<FloatGroup<Packed>, Packed>(m, "ExactGroup");
}

}  // namespace nibble
