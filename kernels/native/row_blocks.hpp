// How the row blocks of matrices that read the same activations, and the tokens, are shared among threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "linear.hpp"
#include "packed.hpp"
#include "pool.hpp"

namespace nibble {

// Activations that stay in a core's second cache while the row blocks of a chunk pass by. With all 512 tokens of a
// prompt at once, 8,192 channels each, they came from the third for every row block, and products were a third slower.
constexpr int64_t kCachedBytes = 384 << 10;

// Where each chunk of `total` row blocks begins, and the end. Chunks are whole panels, 0.7 of a thread's share of what
// is left: each begins with a wait for memory, and products of two threads come at 51 GB/s where chunks of half a share
// that end with single row blocks come at 46, yet the last are small enough to wait for.
inline std::vector<int64_t> chunks_of(int64_t total, int64_t num_threads) {
  std::vector<int64_t> starts{0};
  while (starts.back() < total) {
    int64_t panels = (total - starts.back() + kPanelBlocks - 1) / kPanelBlocks;
    int64_t share = std::max<int64_t>(1, 7 * panels / (10 * num_threads));
    starts.push_back(std::min(total, starts.back() + share * kPanelBlocks));
  }
  return starts;
}

inline std::vector<Tile> tiles_of(int64_t num_tokens) {
  std::vector<Tile> tiles;
  for (int64_t token = 0; token < num_tokens; token += tiles.back().width) tiles.push_back(tile_of(token, num_tokens));
  return tiles;
}

// What one call of a kernel computes: row blocks first to last - 1 of one matrix, for some tokens.
struct RowBlocks {
  size_t member;
  int64_t first, last;
  int64_t first_token, num_tokens;
};

// Calls work(RowBlocks) on the pool's threads. first_row_block: of each matrix in a numbering of all, and the end;
// token_bytes: of one token's activations.
template <class Work>
void share_row_blocks(const std::vector<int64_t>& first_row_block, int64_t num_tokens, int64_t token_bytes,
                      const Work& work) {
  std::vector<int64_t> starts = chunks_of(first_row_block.back(), Pool::instance().num_threads());
  int64_t at_once = std::max<int64_t>(1, kCachedBytes / token_bytes / kTileTokens) * kTileTokens;
  Pool::instance().run((int64_t)starts.size() - 1, [&](int64_t chunk) {
    int64_t block = starts[(size_t)chunk], stop = starts[(size_t)chunk + 1];
    for (size_t member = 0; block < stop; member++) {
      if (block >= first_row_block[member + 1]) continue;
      int64_t before = first_row_block[member], last = std::min(stop, first_row_block[member + 1]);
      for (int64_t token = 0; token < num_tokens; token += at_once)
        work(RowBlocks{member, block - before, last - before, token, std::min(at_once, num_tokens - token)});
      block = last;
    }
  });
}

}  // namespace nibble
