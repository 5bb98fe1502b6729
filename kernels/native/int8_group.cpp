#include "int8_group.hpp"

#include <utility>

#include "isa.hpp"
#include "memory.hpp"
#include "pool.hpp"
#include "refuse.hpp"
#include "row_blocks.hpp"

namespace nibble {
namespace {

// Of the calling thread, for all its groups, as in group.cpp.
struct Scratch {
  Buffer values, scales, zeros, sums;
};

Scratch& scratch_of_caller() {
  thread_local Scratch scratch;
  return scratch;
}

bool by_row(const Packed& w) { return w.scale_type == ScaleType::none; }

void check(const Packed& w, const Packed& first) {
  require(w.num_channels == first.num_channels && w.block_channels == first.block_channels &&
              by_row(w) == by_row(first),
          "matrices that share activations must have the same channels in the same groups");
  require(w.zero_type == first.zero_type && w.zero == first.zero,
          "matrices that share rounded activations must have the same constant zero point, or none");
  require(w.num_planes == 0, "weights from a table are no integers");
  require(w.codes == Codes::u4 || w.codes == Codes::u8, "integers must be packed in 4 or 8 bits");
  require(w.zero_type == ZeroType::u8 || (w.zero_type == ZeroType::constant && w.zero >= 0 && w.zero <= 255),
          "zero points must be codes, 0 to 255");
}

TokenCodes tokens_of(TokenCodes x, int64_t first, int64_t count) {
  x.num_tokens = count;
  x.values += first * x.stride;
  x.scales += first;
  x.zeros += first;
  x.sums += first * x.num_runs;
  return x;
}

}  // namespace

Int8Group::Int8Group(std::vector<const Packed*> members, const TokenRounding& rounding,
                     const std::vector<const int32_t*>& code_sums)
    : members_(std::move(members)), rounding_(rounding), first_row_block_{0} {
  require(!members_.empty(), "a group needs at least one matrix");
  require(rounding.bits >= 2 && rounding.bits <= 8, "activations must be rounded to 2 to 8 bits");
  require(rounding.zero >= -128 && rounding.zero <= 127, "the zero point of activations must lie within -128..127");
  bool has_zero = rounding.fixed ? rounding.zero != 0 : !rounding.symmetric;
  require(code_sums.size() == (has_zero ? members_.size() : 0), "sums of codes go with a zero point of activations");
  for (const Packed* p : members_) {
    check(*p, *members_[0]);
    first_row_block_.push_back(first_row_block_.back() + p->num_row_blocks());
  }
  for (size_t i = 0; i < code_sums.size(); i++) code_sums_.push_back(runs_of(*members_[i], code_sums[i]));
}

int Int8Group::num_runs() const {
  const Packed& w = *members_[0];
  return by_row(w) ? (int)((w.num_channels + kSpanChannels - 1) / kSpanChannels) : w.num_blocks;
}

std::vector<int32_t> Int8Group::runs_of(const Packed& w, const int32_t* code_sums) const {
  int runs = num_runs();
  int64_t blocks = by_row(w) ? kSpanChannels / w.block_channels : 1;  // of a run; one block alone may be shorter
  std::vector<int32_t> sums((size_t)(w.num_row_blocks() * runs * kRows));
  for (int64_t n = 0; n < w.num_rows; n++)
    for (int64_t block = 0; block < w.num_blocks; block++)
      sums[(size_t)((n / kRows * runs + block / blocks) * kRows + n % kRows)] += code_sums[n * w.num_blocks + block];
  return sums;
}

TokenCodes Int8Group::round(const float* x, int64_t num_tokens) const {
  const Packed& w = *members_[0];
  Scratch& scratch = scratch_of_caller();
  TokenCodes to{};
  to.num_tokens = num_tokens;
  to.stride = round_up(w.num_channels, 64);
  to.run_channels = by_row(w) ? kSpanChannels : w.block_channels;
  to.num_runs = num_runs();
  to.sum_factor = w.zero_type == ZeroType::constant ? -w.zero : 1;
  scratch.values.reserve((size_t)(num_tokens * to.stride));
  scratch.scales.reserve((size_t)num_tokens * sizeof(float));
  scratch.zeros.reserve((size_t)num_tokens * sizeof(int32_t));
  scratch.sums.reserve((size_t)(num_tokens * to.num_runs) * sizeof(int32_t));
  to.values = (int8_t*)scratch.values.data();
  to.scales = (float*)scratch.scales.data();
  to.zeros = (int32_t*)scratch.zeros.data();
  to.sums = (int32_t*)scratch.sums.data();
  const std::vector<Tile> tiles = tiles_of(num_tokens);
  auto round_tile = active_isa().int8->round_tile;
  auto tile = [&](int64_t i) { round_tile(x, w.num_channels, rounding_, to, tiles[(size_t)i]); };
  if (num_tokens <= kTileTokens) {
    for (size_t i = 0; i < tiles.size(); i++) tile((int64_t)i);
  } else {
    Pool::instance().run((int64_t)tiles.size(), tile);
  }
  return to;
}

void Int8Group::run(const float* x, int64_t num_tokens, const std::vector<float*>& outs) const {
  require(outs.size() == members_.size(), "a group needs one output for each matrix");
  if (num_tokens <= 0) return;
  TokenCodes a = round(x, num_tokens);
  auto row_blocks = active_isa().int8->row_blocks;
  share_row_blocks(first_row_block_, num_tokens, a.stride, [&](const RowBlocks& part) {
    const Packed& w = *members_[part.member];
    row_blocks(w, part.first, part.last, tokens_of(a, part.first_token, part.num_tokens),
               code_sums_.empty() ? nullptr : code_sums_[part.member].data(),
               outs[part.member] + part.first_token * w.num_rows);
  });
}

}  // namespace nibble
