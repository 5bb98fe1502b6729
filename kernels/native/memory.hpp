// Memory for weights and scratch: aligned, zeroed, in huge pages where it is large.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nibble {

// Owns `size` bytes, aligned to 64. From 2 MiB on it is aligned to huge pages and asks for them: with 4 KiB pages two
// threads read 35 GB/s of weights on a machine where huge pages give 63. Throws std::bad_alloc.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t size);
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  ~Buffer();

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

  // At least `size` bytes; what was in them may be lost.
  void reserve(size_t size);

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
  void* mapped_ = nullptr;
  size_t mapped_size_ = 0;
};

}  // namespace nibble
