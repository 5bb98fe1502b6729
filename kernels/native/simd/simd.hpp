// The 16 lanes of the instruction set this file is compiled for. A kernel is written once against these names and
// compiled once for each set, in the namespace nibble::NIBBLE_ISA. Every operation gives the same bits in every set:
// products and sums are fused only where fma() says so, and reductions have one order.
//
// Kernel files must not use the standard library's inline functions: the linker keeps one copy of each, and could keep
// the one compiled for a machine this is not.
#pragma once

#if defined(NIBBLE_ISA_avx512)
#include "avx512.hpp"
#elif defined(NIBBLE_ISA_avx2)
#include "avx2.hpp"
#else
#include "scalar.hpp"
#endif
