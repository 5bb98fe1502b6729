// How bad input ends: in an exception that is a ValueError in Python. Not for kernel files (simd/simd.hpp says why).
#pragma once

#include <stdexcept>
#include <string>

namespace nibble {

[[noreturn]] inline void refuse(const std::string& message) { throw std::invalid_argument(message); }

// The message is a literal: one that is put together, for every page of every step, took longer than the checks.
inline void require(bool condition, const char* message) {
  if (!condition) refuse(message);
}

}  // namespace nibble
