#include "dense.hpp"

#include "simd/simd.hpp"

namespace nibble::NIBBLE_ISA {

const DenseOps dense_ops = {};

}  // namespace nibble::NIBBLE_ISA
