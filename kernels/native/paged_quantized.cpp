#include "paged_quantized.hpp"

#include <algorithm>
#include <string>

#include "isa.hpp"
#include "memory.hpp"
#include "pool.hpp"
#include "refuse.hpp"

namespace nibble {
namespace {

constexpr int64_t kFewTurned = 2;  // tokens whose queries the caller turns alone: 3 us each with 32 heads of 64

void check_format(const RowFormat& format, int head_dim) {
  if (format.width == 16) return;
  require(format.group_size >= 16 && format.group_size % 16 == 0 && format.num_groups * format.group_size == head_dim,
          "groups must be a multiple of 16 channels and divide a head");
}

void check_recent(const PagedInputs& in, const QuantizedShape& shape, const RecentInputs& recent) {
  require(recent.windows.size() == in.context_lens.size(), "there must be a window for each sequence");
  for (size_t i = 0; i < in.context_lens.size(); i++) {
    int64_t stop = in.context_lens[i], first = stop - (in.query_starts[i + 1] - in.query_starts[i]);
    int64_t window = recent.windows[i];
    require(window >= 0, "a window cannot be negative");
    if (first == stop) continue;
    std::string missing;
    for (int64_t j = 0; j < stop; j++) {
      if (j == std::min<int64_t>(shape.num_sinks, stop)) j = std::max(j, window ? first - window + 1 : stop);
      if (j >= stop) break;
      int64_t at = j / kRecentTokens, page = at < recent.max_pages ? recent.tables[i * recent.max_pages + at] : -1;
      if (page >= recent.num_pages) refuse("recent page " + std::to_string(page) + " does not exist");
      if (page < 0) missing += (missing.empty() ? "" : ", ") + std::to_string(j);
    }
    if (!missing.empty())
      refuse("positions [" + missing + "] are read in high precision and " +
             (recent.max_pages ? "have no recent page" : "the step has no recent pages"));
  }
}

class QuantizedKernel final : public SplitKernel {
 public:
  explicit QuantizedKernel(const QuantizedAttend& call) : call_(call) {}
  const Attend& call() const override { return call_.base; }
  int64_t scratch_floats(const Unit& unit) const override { return call_.scratch_floats(unit); }
  void split(const Place& at, const Place& next, float* scratch, float* part) const override {
    active_isa().quantized->split(call_, at, next, scratch, part);
  }
  void finish(const Unit& unit, const float* merged) const override {
    active_isa().attention->finish(call_.base, unit, merged);
    active_isa().quantized->turn_back(call_, unit);
  }

 private:
  QuantizedAttend call_;
};

template <class F>
void each(int64_t count, bool alone, F one) {
  if (!alone) return Pool::instance().run(count, one);
  for (int64_t i = 0; i < count; i++) one(i);
}

}  // namespace

QuantizedAttention::QuantizedAttention(const PagedInputs& inputs, const QuantizedShape& shape,
                                       const RecentInputs& recent)
    : shape_(shape), work_(inputs), windows_(recent.windows), max_recent_(recent.max_pages) {
  int dim = shape.heads.head_dim;
  require(dim % 16 == 0 && dim <= kMaxHeadDim, "head_dim must be a multiple of 16, at most 512");
  check_format(shape.keys, dim);
  check_format(shape.values, dim);
  check_recent(inputs, shape, recent);
  recent_tables_.assign(recent.tables, recent.tables + (int64_t)inputs.context_lens.size() * max_recent_);
  recent_tables_.push_back(-1);  // of no sequence: data() is never null
  if (!recent.slots) return;
  recent_slots_.assign(recent.slots, recent.slots + inputs.num_slots);
  for (int64_t slot : recent_slots_)
    if (slot >= recent.num_pages * kRecentTokens) refuse("recent slot " + std::to_string(slot) + " does not exist");
}

void QuantizedAttention::store(const float* k, const float* v, const QuantizedLayer& layer) const {
  const std::vector<int64_t>& slots = work_.slots();
  QuantizedStore call{shape_, layer,        k, v, (int64_t)slots.size(), slots.data(),
                      recent_slots_.empty() ? nullptr : recent_slots_.data()};
  each(shape_.heads.num_kv_heads, call.num_tokens <= kFewStored,
       [&](int64_t head) { active_isa().quantized->store(call, (int)head); });
}

void QuantizedAttention::attend(const float* q, const QuantizedLayer& layer, float* out, int num_heads, float scale) {
  thread_local Buffer queries, digits;
  QuantizedAttend call{};
  call.base = {shape_.heads, work_.group_of(num_heads), scale, layer.pages, q, out};
  call.shape = shape_, call.layer = layer, call.num_tokens = work_.num_rows();
  call.recent_tables = recent_tables_.data(), call.max_recent = max_recent_, call.windows = windows_.data();
  int64_t rows = call.num_tokens * num_heads;
  queries.reserve((size_t)(rows * shape_.heads.head_dim) * sizeof(float));
  digits.reserve((size_t)(rows * call.digits_stride()));
  call.queries = (float*)queries.data(), call.digits = digits.data();
  each(call.num_tokens, call.num_tokens <= kFewTurned,
       [&](int64_t token) { active_isa().quantized->prepare(call, token); });
  work_.run(QuantizedKernel(call));
}

}  // namespace nibble
