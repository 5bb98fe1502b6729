// Attention over paged keys and values.
#pragma once

#include <cstdint>

namespace nibble {

struct AttentionOps {};

namespace avx512 {
extern const AttentionOps attention_ops;
}
namespace avx2 {
extern const AttentionOps attention_ops;
}
namespace scalar {
extern const AttentionOps attention_ops;
}

}  // namespace nibble
