#include "group.hpp"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "isa.hpp"
#include "pool.hpp"

namespace nibble {
namespace {

constexpr int64_t kChunksPerThread = 8;      // of row blocks: enough that a thread held up by others costs little
constexpr int64_t kFewTokens = 8;            // rounded by the caller alone

int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

void multiply_row_block(const Packed& w, int64_t index, const Activations& x, float* out) {
  const LinearOps& ops = *active_isa().linear;
  int64_t first = index * kRows;
  if (first + kRows <= w.num_rows) {
    ops.row_block(w, index, x, out + first, w.num_rows, nullptr);
    return;
  }
  thread_local Buffer whole;  // the last rows: 16 are computed, those that exist are copied
  whole.reserve((size_t)(x.num_tokens * kRows) * sizeof(float));
  float* all = (float*)whole.data();
  ops.row_block(w, index, x, all, kRows, nullptr);
  for (int64_t t = 0; t < x.num_tokens; t++)
    for (int64_t n = first; n < w.num_rows; n++) out[t * w.num_rows + n] = all[t * kRows + n - first];
}

}  // namespace

Group::Group(std::vector<const Packed*> members) : members_(std::move(members)), first_row_block_{0} {
  if (members_.empty()) throw std::invalid_argument("a group needs at least one matrix");
  for (const Packed* p : members_) {
    if (p->num_channels != members_[0]->num_channels || p->block_channels != members_[0]->block_channels)
      throw std::invalid_argument("matrices that share activations must have the same channels in the same blocks");
    first_row_block_.push_back(first_row_block_.back() + p->num_row_blocks());
  }
}

Activations Group::quantize(const float* x, int64_t num_tokens) {
  const Packed& first = *members_[0];
  Activations to{num_tokens, first.num_blocks, first.block_channels, 0, nullptr, nullptr, nullptr};
  to.stride = round_up((int64_t)first.num_blocks * first.block_channels + 64, 64);
  values_.reserve((size_t)(num_tokens * to.stride));
  scales_.reserve((size_t)(num_tokens * to.num_blocks) * sizeof(float));
  sums_.reserve((size_t)(num_tokens * to.num_blocks) * sizeof(int32_t));
  to.values = (int8_t*)values_.data();
  to.scales = (float*)scales_.data();
  to.sums = (int32_t*)sums_.data();
  auto one = [&](int64_t token) {
    active_isa().linear->quantize(x + token * first.num_channels, first.num_channels, to, token);
  };
  if (num_tokens < kFewTokens) {
    for (int64_t token = 0; token < num_tokens; token++) one(token);
  } else {
    Pool::instance().run(num_tokens, one);
  }
  return to;
}

void Group::run(const float* x, int64_t num_tokens, const std::vector<float*>& outs) {
  if (outs.size() != members_.size()) throw std::invalid_argument("a group needs one output for each matrix");
  if (num_tokens <= 0) return;
  Activations a = quantize(x, num_tokens);
  int64_t total = first_row_block_.back();
  int64_t per_chunk = std::max<int64_t>(1, total / (Pool::instance().num_threads() * kChunksPerThread));
  Pool::instance().run((total + per_chunk - 1) / per_chunk, [&](int64_t chunk) {
    int64_t stop = std::min(total, (chunk + 1) * per_chunk);
    size_t member = 0;
    for (int64_t block = chunk * per_chunk; block < stop; block++) {
      while (block >= first_row_block_[member + 1]) member++;
      multiply_row_block(*members_[member], block - first_row_block_[member], a, outs[member]);
    }
  });
}

}  // namespace nibble
