#include "attention.hpp"

#include "simd/simd.hpp"

namespace nibble::NIBBLE_ISA {

const AttentionOps attention_ops = {};

}  // namespace nibble::NIBBLE_ISA
