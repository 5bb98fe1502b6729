#include <nanobind/stl/vector.h>

#include <vector>

#include "bind.hpp"
#include "dense_group.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace nibble {

namespace {

template <class Matrix>
void bind_group(nb::module_& m, const char* name) {
  using Group = FloatGroup<Matrix>;
  nb::class_<Group>(m, name)
      .def(nb::init<std::vector<const Matrix*>>(), "members"_a, nb::keep_alive<1, 2>())
      .def(
          "run",
          [](const Group& group, uintptr_t x, int64_t num_tokens, const std::vector<uintptr_t>& outs) {
            std::vector<float*> pointers;
            for (uintptr_t out : outs) pointers.push_back((float*)out);
            group.run((const float*)x, num_tokens, pointers);
          },
          "x"_a, "num_tokens"_a, "outs"_a, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace

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
  bind_group<DenseMatrix>(m, "DenseGroup");
  bind_group<Packed>(m, "ExactGroup");
}

}  // namespace nibble
