// What the files of the extension module share.
#pragma once

#include <nanobind/nanobind.h>

namespace nibble {

void bind_linear(nanobind::module_& m);

}  // namespace nibble
