// Products with weights of plain floating point.
#pragma once

#include <cstdint>

namespace nibble {

struct DenseOps {};

namespace avx512 {
extern const DenseOps dense_ops;
}
namespace avx2 {
extern const DenseOps dense_ops;
}
namespace scalar {
extern const DenseOps dense_ops;
}

}  // namespace nibble
