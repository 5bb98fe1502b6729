// Operations on rows: norms, rotary embedding, gates, sampling.
#pragma once

#include <cstdint>

namespace nibble {

struct RowOps {};

namespace avx512 {
extern const RowOps rows_ops;
}
namespace avx2 {
extern const RowOps rows_ops;
}
namespace scalar {
extern const RowOps rows_ops;
}

}  // namespace nibble
