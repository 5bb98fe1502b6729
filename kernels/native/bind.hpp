// What the files of the extension module share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <vector>

#include "tape.hpp"

namespace nibble {

// run(x, num_tokens, outs) of matrices that share activations: the addresses of x and of one output for each matrix.
template <class Group>
void run_group(const Group& group, uintptr_t x, int64_t num_tokens, const std::vector<uintptr_t>& outs) {
  std::vector<float*> pointers;
  for (uintptr_t out : outs) pointers.push_back((float*)out);
  make([&group, x, num_tokens, pointers] { group.run((const float*)x, num_tokens, pointers); });
}

template <class Group, class Matrix>
void bind_group(nanobind::module_& m, const char* name) {
  using namespace nanobind::literals;
  nanobind::class_<Group>(m, name)
      .def(nanobind::init<std::vector<const Matrix*>>(), "members"_a, nanobind::keep_alive<1, 2>())
      .def("run", &run_group<Group>, "x"_a, "num_tokens"_a, "outs"_a,
           nanobind::call_guard<nanobind::gil_scoped_release>());
}

void bind_linear(nanobind::module_& m);
void bind_dense(nanobind::module_& m);
void bind_attention(nanobind::module_& m);
void bind_quantized(nanobind::module_& m);
void bind_rows(nanobind::module_& m);

}  // namespace nibble
