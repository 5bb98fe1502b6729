// What the machine can do, as the kernels would use it: loops that do nothing but read, or nothing but multiply.
#pragma once

#include <cstdint>

namespace nibble {

struct ProbeOps {
  // Reads every byte; num_bytes is a multiple of 256. The result only keeps the loop alive.
  uint8_t (*read)(const uint8_t* p, int64_t num_bytes);
  // Independent chains of multiply-adds, `count` times each; return the number of operations: 2 for a product and sum.
  int64_t (*dots)(int64_t count);  // 4 products of bytes a lane
  int64_t (*fmas)(int64_t count);  // float32
};

namespace avx512 {
extern const ProbeOps probe_ops;
}
namespace avx2 {
extern const ProbeOps probe_ops;
}
namespace scalar {
extern const ProbeOps probe_ops;
}

}  // namespace nibble
