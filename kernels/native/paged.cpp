#include "paged.hpp"

#include <algorithm>
#include <atomic>
#include <string>

#include "isa.hpp"
#include "memory.hpp"
#include "pool.hpp"
#include "refuse.hpp"

namespace nibble {
namespace {

constexpr int kUnitRows = 48;            // query rows that share one reading of a context
constexpr int64_t kItemsPerThread = 8;   // enough that a thread held up by others costs little

void check_shape(const PagedInputs& in) {
  const CacheShape& s = in.shape;
  require(s.num_kv_heads >= 1, "there must be a kv head");
  require(s.head_dim >= 8 && s.head_dim % 8 == 0, "head_dim must be a multiple of 8");
  require(s.page_size >= 16 && kSplit % s.page_size == 0, "page_size must be 16, 32, 64, 128, 256 or 512");
}

void check_rows(const PagedInputs& in) {
  size_t num_seqs = in.context_lens.size();
  require(in.query_starts.size() == num_seqs + 1 && in.query_starts[0] == 0,
          "query_starts must be num_seqs + 1 rows from 0");
  if (in.num_tables != (int64_t)num_seqs)
    refuse(std::to_string(in.num_tables) + " block tables for " + std::to_string(num_seqs) + " sequences");
  require(in.query_starts.back() == in.num_slots, "there must be one slot for each row");
  for (size_t i = 0; i < num_seqs; i++) {
    int64_t rows = in.query_starts[i + 1] - in.query_starts[i], length = in.context_lens[i];
    require(rows >= 0 && rows <= length, "a sequence has more rows than tokens");
    int64_t pages = (length + in.shape.page_size - 1) / in.shape.page_size;
    require(pages <= in.max_pages, "a block table is shorter than its context");
    for (int64_t p = 0; p < pages; p++) {
      int64_t page = in.block_tables[(int64_t)i * in.max_pages + p];
      if (page < 0 || page >= in.num_pages) refuse("page " + std::to_string(page) + " does not exist");
    }
  }
  for (int64_t i = 0; i < in.num_slots; i++)
    if (in.slots[i] < 0 || in.slots[i] >= in.num_pages * in.shape.page_size)
      refuse("slot " + std::to_string(in.slots[i]) + " does not exist");
}

float* scratch(size_t floats) {
  thread_local Buffer buffer;
  buffer.reserve(floats * sizeof(float));
  return (float*)buffer.data();
}

}  // namespace

// Splits first .. stop - 1 of a unit. All of them in one item are merged as they come; else each part is kept at
// `parts`, and the item that ends last merges them.
struct PagedWork::Item {
  int64_t unit;
  int first, stop, num_items;  // num_items: that share the unit
  int64_t parts;               // of split 0, floats
};

struct PagedWork::Progress {
  std::atomic<int> num_done{0};
};

PagedWork::~PagedWork() = default;
PagedWork::PagedWork(PagedWork&&) = default;
PagedWork& PagedWork::operator=(PagedWork&&) = default;

PagedWork::PagedWork(const PagedInputs& in)
    : shape_(in.shape), query_starts_(in.query_starts), context_lens_(in.context_lens), max_pages_(in.max_pages) {
  check_shape(in);
  check_rows(in);
  block_tables_.assign(in.block_tables, in.block_tables + (int64_t)context_lens_.size() * max_pages_);
  slots_.assign(in.slots, in.slots + in.num_slots);
}

void PagedWork::share_out(int group, int num_threads) {
  group_ = group, num_threads_ = num_threads;
  units_.clear();
  int64_t num_splits = 0, step = std::max(1, kUnitRows / group);
  for (size_t i = 0; i < context_lens_.size(); i++) {
    int64_t start = query_starts_[i], rows = query_starts_[i + 1] - start;
    const int64_t* table = block_tables_.data() + (int64_t)i * max_pages_;
    for (int64_t row = (rows - 1) / step * step; row >= 0 && rows > 0; row -= step)  // the longest contexts first
      for (int head = 0; head < shape_.num_kv_heads; head++) {
        units_.push_back({table, start + row, context_lens_[i] - rows + row, (int)std::min(step, rows - row), head,
                          (int)i});
        num_splits += units_.back().num_splits();
      }
  }
  cut(num_splits, num_threads);
}

void PagedWork::cut(int64_t num_splits, int num_threads) {
  items_.clear();
  parts_floats_ = 0;
  progress_ = std::make_unique<Progress[]>(units_.size());
  int64_t per_item = num_threads == 1 ? num_splits : std::max<int64_t>(1, num_splits / (num_threads * kItemsPerThread));
  Attend call{shape_, group_, 0, nullptr, nullptr, nullptr};
  for (size_t i = 0; i < units_.size(); i++) {
    int splits = units_[i].num_splits(), step = (int)std::min<int64_t>(per_item, splits);
    int num_items = (splits + step - 1) / step;
    for (int first = 0; first < splits; first += step)
      items_.push_back({(int64_t)i, first, std::min(first + step, splits), num_items, parts_floats_});
    if (num_items > 1) parts_floats_ += splits * call.rows_of(units_[i]) * call.part_stride();
  }
}

int PagedWork::group_of(int num_heads) const {
  if (num_heads < 1 || num_heads % shape_.num_kv_heads != 0)
    refuse(std::to_string(num_heads) + " heads are no multiple of " + std::to_string(shape_.num_kv_heads) +
           " kv heads");
  return num_heads / shape_.num_kv_heads;
}

void PagedWork::run(const SplitKernel& kernel) {
  int group = kernel.call().group, num_threads = Pool::instance().num_threads();
  if (group != group_ || num_threads != num_threads_) share_out(group, num_threads);
  thread_local Buffer kept;
  kept.reserve((size_t)parts_floats_ * sizeof(float));
  float* parts = (float*)kept.data();
  try {
    Pool::instance().run((int64_t)items_.size(), [&](int64_t i) { run_item(kernel, (size_t)i, parts); });
  } catch (...) {
    num_threads_ = 0;  // the next call cuts anew: items of some units are counted already
    throw;
  }
}

void PagedWork::run_whole(const SplitKernel& kernel, const Unit& unit, const Place& next) const {
  const Attend& call = kernel.call();
  int64_t part = call.rows_of(unit) * call.part_stride();
  float* merged = scratch((size_t)(2 * part + kernel.scratch_floats(unit)));
  for (int split = 0, stop = unit.num_splits(); split < stop; split++) {
    Place following = split + 1 < stop ? Place{&unit, split + 1} : next;
    kernel.split({&unit, split}, following, merged + 2 * part, split ? merged + part : merged);
    if (split) active_isa().attention->merge(call, unit, split, merged, merged + part);
  }
  kernel.finish(unit, merged);
}

void PagedWork::run_item(const SplitKernel& kernel, size_t index, float* parts) {
  const Item& item = items_[index];
  const Unit& unit = units_[(size_t)item.unit];
  // Threads take turns: this one will take the item that is as many further on as there are threads.
  size_t later = index + (size_t)num_threads_;
  Place next{&unit, item.stop - 1};
  if (later < items_.size()) next = {&units_[(size_t)items_[later].unit], items_[later].first};
  if (item.num_items == 1) return run_whole(kernel, unit, next);
  const Attend& call = kernel.call();
  int64_t part = call.rows_of(unit) * call.part_stride();
  float *first = parts + item.parts, *own = scratch((size_t)kernel.scratch_floats(unit));
  for (int split = item.first; split < item.stop; split++) {
    Place following = split + 1 < item.stop ? Place{&unit, split + 1} : next;
    kernel.split({&unit, split}, following, own, first + split * part);
  }
  std::atomic<int>& num_done = progress_[item.unit].num_done;
  if (num_done.fetch_add(1, std::memory_order_acq_rel) + 1 < item.num_items) return;
  num_done.store(0, std::memory_order_relaxed);  // for the next layer
  for (int split = 1; split < unit.num_splits(); split++)
    active_isa().attention->merge(call, unit, split, first, first + split * part);
  kernel.finish(unit, first);
}

namespace {

class FloatKernel final : public SplitKernel {
 public:
  explicit FloatKernel(const Attend& call) : call_(call) {}
  const Attend& call() const override { return call_; }
  int64_t scratch_floats(const Unit& unit) const override { return call_.scratch_floats(unit); }
  void split(const Place& at, const Place&, float* scratch, float* part) const override {
    active_isa().attention->split(call_, *at.unit, at.split, scratch, part);
  }
  void finish(const Unit& unit, const float* merged) const override {
    active_isa().attention->finish(call_, unit, merged);
  }

 private:
  Attend call_;
};

}  // namespace

void PagedAttention::store(const float* k, const float* v, uint8_t* pages) const {
  const std::vector<int64_t>& slots = work_.slots();
  auto one = [&](int64_t head) {
    active_isa().attention->store(shape_, k, v, slots.data(), (int64_t)slots.size(), pages, (int)head);
  };
  if ((int64_t)slots.size() <= kFewStored) {
    for (int head = 0; head < shape_.num_kv_heads; head++) one(head);
  } else {
    Pool::instance().run(shape_.num_kv_heads, one);
  }
}

void PagedAttention::attend(const float* q, const uint8_t* pages, float* out, int num_heads, float scale) {
  work_.run(FloatKernel({shape_, work_.group_of(num_heads), scale, pages, q, out}));
}

}  // namespace nibble
