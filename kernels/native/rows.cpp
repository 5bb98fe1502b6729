#include "rows.hpp"

#include "simd/simd.hpp"

namespace nibble::NIBBLE_ISA {

const RowOps rows_ops = {};

}  // namespace nibble::NIBBLE_ISA
