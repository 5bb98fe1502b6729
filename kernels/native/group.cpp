#include "group.hpp"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "isa.hpp"
#include "memory.hpp"
#include "pool.hpp"
#include "row_blocks.hpp"

namespace nibble {
namespace {

constexpr int64_t kFewTokens = 8;  // rounded by the caller alone
// One thread rounds so much of a tile. Tokens of a tile lie in the same lines of the cache, and two threads at two
// tokens of one took those lines from each other: products of 512 tokens were up to 40 % slower.
constexpr int64_t kRoundedChannels = 1024;

// Activations of a call. They belong to the calling thread, for all its groups: groups may be shared by threads, and
// scratch of each group of a model would add up to several hundred megabytes after a long prompt.
struct Scratch {
  Buffer values, scales, sums, offsets;
};

Scratch& scratch_of_caller() {
  thread_local Scratch scratch;
  return scratch;
}

// `count` tokens of x from `first` on, a multiple of kTileTokens.
Activations tokens_of(Activations x, int64_t first, int64_t count) {
  x.num_tokens = count;
  x.values += first * x.stride;
  x.scales += first * x.num_blocks;
  x.sums += first * x.num_blocks;
  x.offsets += first * x.num_blocks;
  return x;
}

}  // namespace

Group::Group(std::vector<const Packed*> members) : members_(std::move(members)), first_row_block_{0} {
  if (members_.empty()) throw std::invalid_argument("a group needs at least one matrix");
  for (const Packed* p : members_) {
    if (p->num_channels != members_[0]->num_channels || p->block_channels != members_[0]->block_channels)
      throw std::invalid_argument("matrices that share activations must have the same channels in the same blocks");
    if (zero_index(*p) == zeros_.size()) zeros_.push_back(p->zero_type == ZeroType::constant ? p->zero : 0);
    first_row_block_.push_back(first_row_block_.back() + p->num_row_blocks());
  }
}

Activations Group::quantize(const float* x, int64_t num_tokens) const {
  const Packed& first = *members_[0];
  Activations to{};
  to.num_tokens = num_tokens;
  to.num_blocks = first.num_blocks;
  to.block_channels = first.block_channels;
  to.stride = round_up(first.num_channels + 32, 64);  // a last unit reaches up to 19 channels past the end
  Scratch& scratch = scratch_of_caller();
  scratch.values.reserve((size_t)(num_tokens * to.stride));
  scratch.scales.reserve((size_t)(num_tokens * to.num_blocks) * sizeof(float));
  scratch.sums.reserve((size_t)(num_tokens * to.num_blocks) * sizeof(int32_t));
  to.values = (int8_t*)scratch.values.data();
  to.scales = (float*)scratch.scales.data();
  to.sums = (int32_t*)scratch.sums.data();
  const std::vector<Tile> tiles = tiles_of(num_tokens);
  int blocks = std::max(1, (int)(kRoundedChannels / to.block_channels));  // of a part of a tile
  int parts = (to.num_blocks + blocks - 1) / blocks;
  auto part_of_tile = [&](int64_t i) {
    int part = (int)(i % parts);
    active_isa().linear->quantize(x, first.num_channels, to, tiles[(size_t)(i / parts)], part * blocks,
                                  std::min((part + 1) * blocks, to.num_blocks));
  };
  int64_t num_parts = (int64_t)tiles.size() * parts;
  if (num_tokens < kFewTokens) {
    for (int64_t i = 0; i < num_parts; i++) part_of_tile(i);
  } else {
    Pool::instance().run(num_parts, part_of_tile);
  }
  int64_t count = num_tokens * to.num_blocks;
  scratch.offsets.reserve(zeros_.size() * (size_t)count * sizeof(int32_t));
  int32_t* offsets = (int32_t*)scratch.offsets.data();
  to.offsets = offsets;
  for (int32_t zero : zeros_)
    for (int64_t i = 0; i < count; i++) *offsets++ = -zero * to.sums[i];
  return to;
}

size_t Group::zero_index(const Packed& member) const {
  int32_t zero = member.zero_type == ZeroType::constant ? member.zero : 0;
  return (size_t)(std::find(zeros_.begin(), zeros_.end(), zero) - zeros_.begin());
}

void Group::run(const float* x, int64_t num_tokens, const std::vector<float*>& outs) const {
  if (outs.size() != members_.size()) throw std::invalid_argument("a group needs one output for each matrix");
  if (num_tokens <= 0) return;
  Activations a = quantize(x, num_tokens);  // offsets: of all zeros_, one after the other
  const LinearOps& ops = *active_isa().linear;
  share_row_blocks(first_row_block_, num_tokens, a.stride, [&](const RowBlocks& part) {
    const Packed& w = *members_[part.member];
    Activations own = tokens_of(a, part.first_token, part.num_tokens);
    own.offsets += (int64_t)zero_index(w) * a.num_tokens * a.num_blocks;
    ops.row_blocks(w, part.first, part.last, own, outs[part.member] + part.first_token * w.num_rows);
  });
}

}  // namespace nibble
