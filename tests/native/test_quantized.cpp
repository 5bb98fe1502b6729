#include <numeric>

#include "check.hpp"
#include "paged_quantized.hpp"

namespace nibble::tests {
namespace {

RowFormat format_of(int width, int head_dim, int group_size) {
  if (width == 16) return {16, head_dim, 0, 2 * head_dim, 2 * head_dim, 2, 0, true};
  int low = width == 3 ? 2 : width, plane = width == 1 ? (head_dim + 4) / 5 : head_dim * low / 8;
  int row = plane + (width == 3 ? head_dim / 8 : 0), max_code = width == 1 ? 2 : (1 << width) - 1;
  return {width, group_size, head_dim / group_size, row, plane, width == 8 ? 2 : 1, max_code, true};
}

// Bytes of which any two are a finite half, and any one a finite e4m3.
std::vector<uint8_t> finite_bytes(Random& random, int64_t size) {
  std::vector<uint8_t> values = bytes(random, size);
  for (uint8_t& value : values) value &= 0x37;
  return values;
}

// Two sequences in pages and recent pages of rising ids, in memory of exactly their size: their last rows are stored,
// then attend to all before.
void test_widths(Random& random, int key_width, int value_width, int head_dim, int page_size, Cell cell) {
  constexpr int kHeads = 2, kGroup = 3;
  const std::vector<int64_t> lens{517, 70}, starts{0, 2, 2 + 40};
  QuantizedShape shape{};
  shape.heads = {kHeads, head_dim, page_size, cell};
  shape.keys = format_of(key_width, head_dim, head_dim / 2), shape.values = format_of(value_width, head_dim, 16);
  shape.num_sinks = 3;
  shape.lay_out();
  const int64_t per_sequence = (lens[0] + page_size - 1) / page_size, recent_per_sequence = (lens[0] + 15) / 16;
  std::vector<int64_t> table((size_t)(2 * per_sequence)), recent_table((size_t)(2 * recent_per_sequence));
  std::iota(table.begin(), table.end(), 0);
  std::iota(recent_table.begin(), recent_table.end(), 0);
  std::vector<int64_t> slots, recent_slots;
  for (int64_t i = 0; i < 2; i++)
    for (int64_t position = lens[i] - (starts[i + 1] - starts[i]); position < lens[i]; position++) {
      slots.push_back(i * per_sequence * page_size + position);
      recent_slots.push_back(i * recent_per_sequence * 16 + position);
    }
  const int64_t rows = starts[2];
  std::vector<uint8_t> pages = finite_bytes(random, 2 * per_sequence * kHeads * shape.chunk_bytes);
  std::vector<uint8_t> recent = finite_bytes(random, 2 * recent_per_sequence * shape.recent().page_bytes());
  std::vector<float> q = floats(random, rows * kHeads * kGroup * head_dim);
  std::vector<float> k = floats(random, rows * kHeads * head_dim), v = k, prescale(kHeads, 0.5f);
  std::vector<float> clip((size_t)(kHeads * (shape.num_groups() + 1)), 0.9f);
  same_bits("attention over " + std::to_string(key_width) + " and " + std::to_string(value_width) + " bits", [&] {
    std::vector<uint8_t> own = pages, own_recent = recent;
    QuantizedLayer layer{own.data(),  own_recent.data(), prescale.data(), prescale.data(),
                         clip.data(), clip.data(),       false,           true};
    PagedInputs inputs{shape.heads,  2 * per_sequence, starts,       lens,
                       table.data(), 2,                per_sequence, slots.data(), (int64_t)slots.size()};
    QuantizedAttention attention(inputs, shape,
                                 {2 * recent_per_sequence, recent_table.data(), recent_per_sequence,
                                  recent_slots.data(), {100, 0}});
    attention.store(k.data(), v.data(), layer);
    std::vector<float> out(q.size());
    attention.attend(q.data(), layer, out.data(), kHeads * kGroup, 0.125f);
    for (float x : out) CHECK(x == x, "a result is no number");
    return out;
  });
}

}  // namespace

void test_quantized() {
  Random random(7);
  for (int width : {16, 8, 4, 3, 2, 1}) test_widths(random, width, width, 32, 16, Cell::f16);
  test_widths(random, 4, 2, 64, 64, Cell::f16);
  test_widths(random, 2, 4, 64, 32, Cell::f32);
  test_widths(random, 8, 1, 96, 64, Cell::f16);
}

}  // namespace nibble::tests
