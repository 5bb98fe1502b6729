// Rates of this machine, measured on threads of their own.
#pragma once

#include <cstdint>

namespace nibble {

// Bytes per second that `num_threads` threads read from memory, each from huge pages of its own, num_bytes in all:
// several times the last cache, or the cache is what is measured. Throws std::invalid_argument, std::bad_alloc.
double read_bandwidth(int num_threads, int64_t num_bytes, double seconds);

// Operations per second of the active instruction set's integer dot products and float32 multiply-adds.
double dot_peak(int num_threads, double seconds);
double fma_peak(int num_threads, double seconds);

}  // namespace nibble
