// Attention of one step over a paged cache: its rows cut into work, shared among threads. The same for every layer.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "attention.hpp"

namespace nibble {

struct PagedInputs {
  CacheShape shape;
  int64_t num_pages;
  std::vector<int64_t> query_starts;  // [num_seqs + 1]
  std::vector<int64_t> context_lens;  // [num_seqs]
  const int64_t* block_tables;        // [num_tables, max_pages], a table for each sequence
  int64_t num_tables, max_pages;
  const int64_t* slots;               // [num_slots], one for each row
  int64_t num_slots;
};

// One layer's call, as the splits of all units see it.
class SplitKernel {
 public:
  virtual ~SplitKernel() = default;
  virtual const Attend& call() const = 0;
  virtual int64_t scratch_floats(const Unit& unit) const = 0;
  // next: what the thread is likely to read after it, to fetch ahead; `at` itself where nothing follows.
  virtual void split(const Place& at, const Place& next, float* scratch, float* part) const = 0;
  virtual void finish(const Unit& unit, const float* merged) const = 0;
};

// The work of a step: rows in units, their contexts in splits, both in items that threads take.
class PagedWork {
 public:
  // Copies what it needs. Throws std::invalid_argument for shapes the kernels do not serve, and for pages and slots
  // that do not exist.
  explicit PagedWork(const PagedInputs& inputs);
  ~PagedWork();
  PagedWork(PagedWork&&);
  PagedWork& operator=(PagedWork&&);

  const std::vector<int64_t>& slots() const { return slots_; }
  int64_t num_rows() const { return query_starts_.back(); }

  // Query heads of a kv head. Throws std::invalid_argument when there is no whole number of them.
  int group_of(int num_heads) const;
  void run(const SplitKernel& kernel);

 private:
  struct Item;
  struct Progress;
  void share_out(int group, int num_threads);
  void cut(int64_t num_splits, int num_threads);
  void run_item(const SplitKernel& kernel, size_t index, float* parts);
  void run_whole(const SplitKernel& kernel, const Unit& unit, const Place& next) const;

  CacheShape shape_;
  std::vector<int64_t> query_starts_, context_lens_, block_tables_, slots_;
  int64_t max_pages_;
  int group_ = 0, num_threads_ = 0;  // that the work below was cut for
  std::vector<Unit> units_;
  std::vector<Item> items_;
  std::unique_ptr<Progress[]> progress_;  // of units that several items share
  int64_t parts_floats_ = 0;
};

inline constexpr int64_t kFewStored = 16;  // tokens that the caller writes alone

class PagedAttention {
 public:
  // As PagedWork.
  explicit PagedAttention(const PagedInputs& inputs) : shape_(inputs.shape), work_(inputs) {}

  // k, v: [num_tokens, num_kv_heads, head_dim] to the slots of `pages`.
  void store(const float* k, const float* v, uint8_t* pages) const;

  // q, out: [num_tokens, num_heads, head_dim]. `out` may not overlap q. One call at a time. Throws
  // std::invalid_argument when num_heads is no multiple of num_kv_heads.
  void attend(const float* q, const uint8_t* pages, float* out, int num_heads, float scale);

 private:
  CacheShape shape_;
  PagedWork work_;
};

}  // namespace nibble
