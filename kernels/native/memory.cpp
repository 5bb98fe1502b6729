#include "memory.hpp"

#include <sys/mman.h>

#include <mutex>
#include <new>
#include <utility>

namespace nibble {
namespace {

constexpr size_t kHugePage = 2u << 20;
constexpr size_t kSlab = 64u << 20;
constexpr size_t kLine = 64;
constexpr size_t kSlack = 4096;  // readable bytes past the end: kernels load and prefetch whole vectors

// Zeroed memory, taken from the system as it is touched.
class Mapping {
 public:
  explicit Mapping(size_t size) {
    size_t alignment = size >= kHugePage ? kHugePage : kLine;
    if (size > SIZE_MAX - alignment - kSlack) throw std::bad_alloc();
    size_ = size + alignment + kSlack;
    start_ = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start_ == MAP_FAILED) throw std::bad_alloc();
    data = reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<uintptr_t>(start_), alignment));
#if defined(MADV_HUGEPAGE)
    if (size >= kHugePage) madvise(data, size, MADV_HUGEPAGE);
#endif
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() { munmap(start_, size_); }

  uint8_t* data;

 private:
  void* start_;
  size_t size_;
};

struct Slab {
  std::mutex lock;
  std::weak_ptr<Mapping> mapping;
  size_t size = 0, used = 0;
};

}  // namespace

Buffer::Buffer(size_t size) : size_(size) {
  auto mapping = std::make_shared<Mapping>(size);
  data_ = mapping->data;
  memory_ = std::move(mapping);
}

Buffer Buffer::of_slab(size_t size) {
  static Slab slab;  // the one that still has room; its parts keep it alive
  std::lock_guard guard(slab.lock);
  size_t needed = round_up(size, kLine);
  if (needed < size) throw std::bad_alloc();
  std::shared_ptr<Mapping> mapping = slab.mapping.lock();
  if (!mapping || needed > slab.size - slab.used) {
    size_t fresh = needed > kSlab ? round_up(needed, kHugePage) : kSlab;
    slab.mapping = mapping = std::make_shared<Mapping>(fresh);
    slab.size = fresh;
    slab.used = 0;
  }
  Buffer part;
  part.data_ = mapping->data + slab.used;
  part.size_ = size;
  part.memory_ = std::move(mapping);
  slab.used += needed;
  return part;
}

void Buffer::reserve(size_t size) {
  if (size > size_) *this = Buffer(size + size / 4);
}

}  // namespace nibble
