// What the files of the extension module share.
#pragma once

#include <nanobind/nanobind.h>

namespace nibble {

void bind_linear(nanobind::module_& m);
void bind_dense(nanobind::module_& m);
void bind_attention(nanobind::module_& m);
void bind_quantized(nanobind::module_& m);
void bind_rows(nanobind::module_& m);

}  // namespace nibble
