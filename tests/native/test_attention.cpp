#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "check.hpp"
#include "paged.hpp"

namespace nibble::tests {
namespace {

// Sequences in pages of a shuffled order, in memory of exactly their size.
struct World {
  CacheShape shape;
  std::vector<int64_t> query_starts{0}, context_lens, block_tables, slots;
  int64_t num_pages = 0, max_pages = 0;

  World(Random& random, CacheShape cache, const std::vector<std::pair<int64_t, int64_t>>& rows_and_lens) : shape(cache) {
    for (auto [rows, length] : rows_and_lens) {
      query_starts.push_back(query_starts.back() + rows);
      context_lens.push_back(length);
      int64_t pages = (length + shape.page_size - 1) / shape.page_size;
      num_pages += pages;
      max_pages = std::max(max_pages, pages);
    }
    std::vector<int64_t> order((size_t)num_pages);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    block_tables.assign(context_lens.size() * (size_t)max_pages, 0);
    size_t next = 0;
    for (size_t i = 0; i < context_lens.size(); i++) {
      int64_t length = context_lens[i], rows = query_starts[i + 1] - query_starts[i];
      int64_t* table = block_tables.data() + (int64_t)i * max_pages;
      for (int64_t p = 0; p < (length + shape.page_size - 1) / shape.page_size; p++) table[p] = order[next++];
      for (int64_t position = length - rows; position < length; position++)
        slots.push_back(table[position / shape.page_size] * shape.page_size + position % shape.page_size);
    }
  }
  PagedInputs inputs() const {
    return {shape,     num_pages,    query_starts, context_lens, block_tables.data(), (int64_t)block_tables.size() / max_pages,
            max_pages, slots.data(), (int64_t)slots.size()};
  }
  int64_t num_rows() const { return query_starts.back(); }
};

void test_world(Random& random, const World& world, int group) {
  const CacheShape& s = world.shape;
  int num_heads = s.num_kv_heads * group;
  int64_t elements = world.num_pages * s.page_bytes() / s.cell_bytes();
  std::vector<float> cells = floats(random, elements);
  std::vector<uint16_t> halves((size_t)elements);
  for (uint16_t& half : halves) half = (uint16_t)(random() & 0xbfff);  // finite
  std::vector<float> q = floats(random, world.num_rows() * num_heads * s.head_dim);
  std::vector<float> k = floats(random, world.num_rows() * s.num_kv_heads * s.head_dim), v = k;
  same_bits("attention over " + std::to_string(s.head_dim) + " channels", [&] {
    std::vector<float> own = cells;
    std::vector<uint16_t> own_halves = halves;
    uint8_t* pages = s.cell == Cell::f16 ? (uint8_t*)own_halves.data() : (uint8_t*)own.data();
    PagedAttention attention(world.inputs());
    attention.store(k.data(), v.data(), pages);
    std::vector<float> out(q.size());
    attention.attend(q.data(), pages, out.data(), num_heads, 0.125f);
    return out;
  });
}

template <class Change>
void expect_refusal(World world, const Change& change) {
  change(world);
  bool is_refused = false;
  try {
    PagedAttention attention(world.inputs());
  } catch (const std::invalid_argument&) {
    is_refused = true;
  }
  CHECK(is_refused, "inputs that do not fit together were taken");
}

}  // namespace

void test_attention() {
  Random random(5);
  for (Cell cell : {Cell::f16, Cell::f32})
    for (int page_size : {16, 64}) {
      test_world(random, World(random, {2, 64, page_size, cell}, {{1, 1}, {1, 700}, {5, 5}, {3, 1030}}), 4);
      test_world(random, World(random, {1, 8, page_size, cell}, {{40, 40}, {1, 513}}), 7);
      test_world(random, World(random, {3, 40, page_size, cell}, {{0, 20}, {20, 530}}), 1);
    }
  World world(random, {2, 64, 16, Cell::f16}, {{1, 33}, {2, 40}});
  expect_refusal(world, [](World& w) { w.block_tables[0] = w.num_pages; });
  expect_refusal(world, [](World& w) { w.slots[1] = w.num_pages * 16; });
  expect_refusal(world, [](World& w) { w.slots[1] = -1; });
  expect_refusal(world, [](World& w) { w.context_lens[1] = 49; });
  expect_refusal(world, [](World& w) { w.query_starts[1] = 4; });
  expect_refusal(world, [](World& w) { w.slots.pop_back(); });
  expect_refusal(world, [](World& w) { w.block_tables.clear(); });
  expect_refusal(world, [](World& w) { w.shape.page_size = 24; });
  expect_refusal(world, [](World& w) { w.shape.head_dim = 12; });
}

}  // namespace nibble::tests
