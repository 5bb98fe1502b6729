// Memory for weights and scratch: aligned to 64 bytes, zeroed, in huge pages where it is large.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <type_traits>

namespace nibble {

template <class Int>
static constexpr Int round_up(Int x, std::type_identity_t<Int> multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

// Owns `size` bytes. Throws std::bad_alloc.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t size);

  // A part of a slab of 64 MiB in huge pages, which all weights share: a matrix by itself would end in pages of 4 KiB,
  // and from those two threads read 35 GB/s where huge pages give 63. A slab is given back with the last of its parts.
  static Buffer of_slab(size_t size);

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

  // At least `size` bytes; what was in them may be lost.
  void reserve(size_t size);

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
  std::shared_ptr<void> memory_;
};

}  // namespace nibble
