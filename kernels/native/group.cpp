#include "group.hpp"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "isa.hpp"
#include "memory.hpp"
#include "pool.hpp"

namespace nibble {
namespace {

// Activations that stay in a core's second cache while the row blocks of a chunk pass by. With all 512 tokens of a
// prompt at once, 8,192 channels each, they came from the third for every row block, and products were a third slower.
constexpr int64_t kCachedBytes = 384 << 10;
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

// Where each chunk of `total` row blocks begins, and the end. Chunks are whole panels, 0.7 of a thread's share of what
// is left: each begins with a wait for memory, and products of two threads come at 51 GB/s where chunks of half a share
// that end with single row blocks come at 46, yet the last are small enough to wait for.
std::vector<int64_t> chunks_of(int64_t total, int64_t num_threads) {
  std::vector<int64_t> starts{0};
  while (starts.back() < total) {
    int64_t panels = (total - starts.back() + kPanelBlocks - 1) / kPanelBlocks;
    int64_t share = std::max<int64_t>(1, 7 * panels / (10 * num_threads));
    starts.push_back(std::min(total, starts.back() + share * kPanelBlocks));
  }
  return starts;
}

std::vector<Tile> tiles_of(int64_t num_tokens) {
  std::vector<Tile> tiles;
  for (int64_t token = 0; token < num_tokens; token += tiles.back().width) tiles.push_back(tile_of(token, num_tokens));
  return tiles;
}

// `count` tokens of x from `first` on, a multiple of kTileTokens; those there are.
Activations tokens_of(Activations x, int64_t first, int64_t count) {
  x.num_tokens = std::min(count, x.num_tokens - first);
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
  std::vector<int64_t> starts = chunks_of(first_row_block_.back(), Pool::instance().num_threads());
  int64_t at_once = std::max<int64_t>(1, kCachedBytes / a.stride / kTileTokens) * kTileTokens;
  const LinearOps& ops = *active_isa().linear;
  Pool::instance().run((int64_t)starts.size() - 1, [&](int64_t chunk) {
    int64_t block = starts[(size_t)chunk], stop = starts[(size_t)chunk + 1];
    for (size_t member = 0; block < stop; member++) {
      if (block >= first_row_block_[member + 1]) continue;
      const Packed& w = *members_[member];
      int64_t last = std::min(stop, first_row_block_[member + 1]);
      Activations x = a;
      x.offsets += (int64_t)zero_index(w) * a.num_tokens * a.num_blocks;
      for (int64_t token = 0; token < a.num_tokens; token += at_once)
        ops.row_blocks(w, block - first_row_block_[member], last - first_row_block_[member],
                       tokens_of(x, token, at_once), outs[member] + token * w.num_rows);
      block = last;
    }
  });
}

}  // namespace nibble
