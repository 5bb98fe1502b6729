#include "memory.hpp"

#include <sys/mman.h>

#include <new>
#include <utility>

namespace nibble {
namespace {

constexpr size_t kHugePage = 2u << 20;
constexpr size_t kSlack = 4096;  // readable bytes past the end: kernels load and prefetch whole vectors

}  // namespace

Buffer::Buffer(size_t size) : size_(size) {
  size_t alignment = size >= kHugePage ? kHugePage : 64;
  mapped_size_ = size + alignment + kSlack;
  mapped_ = mmap(nullptr, mapped_size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped_ == MAP_FAILED) {
    mapped_ = nullptr;
    throw std::bad_alloc();
  }
  uintptr_t start = (reinterpret_cast<uintptr_t>(mapped_) + alignment - 1) / alignment * alignment;
  data_ = reinterpret_cast<uint8_t*>(start);
#if defined(MADV_HUGEPAGE)
  if (size >= kHugePage) madvise(data_, size, MADV_HUGEPAGE);
#endif
}

Buffer::Buffer(Buffer&& other) noexcept { *this = std::move(other); }

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(mapped_, other.mapped_);
  std::swap(mapped_size_, other.mapped_size_);
  return *this;
}

Buffer::~Buffer() {
  if (mapped_) munmap(mapped_, mapped_size_);
}

void Buffer::reserve(size_t size) {
  if (size > size_) *this = Buffer(size + size / 4);
}

}  // namespace nibble
