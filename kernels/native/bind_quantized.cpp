#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <tuple>
#include <utility>
#include <vector>

#include "bind.hpp"
#include "paged_quantized.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace nibble {
namespace {

// width, group_size, row_bytes, plane_bytes, bytes of a parameter, max_code, whether a Hadamard transform comes first
using Format = std::array<int, 7>;

RowFormat format_of(const Format& f, int head_dim) {
  int num_groups = f[0] == 16 ? 0 : head_dim / (f[1] > 0 ? f[1] : head_dim);
  return {f[0], f[1], num_groups, f[2], f[3], f[4], f[5], f[6] != 0};
}

QuantizedShape shape_of(const std::array<int64_t, 4>& sizes, const std::pair<Format, Format>& formats,
                        int num_sinks) {
  QuantizedShape shape{};
  shape.heads = {(int)sizes[1], (int)sizes[2], (int)sizes[3], Cell::f16};
  shape.keys = format_of(formats.first, (int)sizes[2]), shape.values = format_of(formats.second, (int)sizes[2]);
  shape.lay_out();
  shape.num_sinks = num_sinks;
  return shape;
}

// Addresses of a layer: pages, recent pages; of its keys, of its values: clip, prescale, and 1 for the clip's mode
// "origin".
using Rows = std::tuple<uintptr_t, uintptr_t, bool>;
QuantizedLayer layer_of(const std::pair<uintptr_t, uintptr_t>& memory, const Rows& keys, const Rows& values) {
  return {(uint8_t*)memory.first,         (uint8_t*)memory.second,       (const float*)std::get<1>(keys),
          (const float*)std::get<1>(values), (const float*)std::get<0>(keys), (const float*)std::get<0>(values),
          std::get<2>(keys),              std::get<2>(values)};
}

struct Layer {
  QuantizedLayer layer;
};

}  // namespace

void bind_quantized(nb::module_& m) {
  nb::class_<Layer>(m, "QuantizedLayer")
      .def(
          "__init__",
          [](Layer* self, std::pair<uintptr_t, uintptr_t> memory, Rows keys, Rows values) {
            new (self) Layer{layer_of(memory, keys, values)};
          },
          "memory"_a, "keys"_a, "values"_a);
  nb::class_<QuantizedAttention>(m, "QuantizedAttention")
      .def(
          "__init__",
          [](QuantizedAttention* self, std::array<int64_t, 4> shape, std::pair<Format, Format> formats,
             std::pair<std::vector<int64_t>, int> high, std::pair<bool, int64_t> recent_pages,
             std::vector<int64_t> query_starts, std::vector<int64_t> context_lens,
             std::tuple<uintptr_t, int64_t, int64_t> block_tables, std::pair<uintptr_t, int64_t> slots,
             std::tuple<uintptr_t, int64_t, uintptr_t> recent) {
            QuantizedShape own = shape_of(shape, formats, high.second);
            own.heads.cell = recent_pages.first ? Cell::f16 : Cell::f32;
            auto [tables, num_tables, max_pages] = block_tables;
            PagedInputs inputs{own.heads, shape[0], std::move(query_starts), std::move(context_lens),
                               (const int64_t*)tables, num_tables, max_pages, (const int64_t*)slots.first,
                               slots.second};
            RecentInputs rows{recent_pages.second, (const int64_t*)std::get<0>(recent), std::get<1>(recent),
                              (const int64_t*)std::get<2>(recent), std::move(high.first)};
            new (self) QuantizedAttention(inputs, own, rows);
          },
          "shape"_a, "formats"_a, "high"_a, "recent_pages"_a, "query_starts"_a, "context_lens"_a, "block_tables"_a,
          "slots"_a, "recent"_a)
      .def("become", [](QuantizedAttention& self, QuantizedAttention& other) { self = std::move(other); }, "other"_a)
      .def(
          "store",
          [](const QuantizedAttention& self, uintptr_t k, uintptr_t v, const Layer& layer) {
            make([=, &self, &layer] { self.store((const float*)k, (const float*)v, layer.layer); });
          },
          "k"_a, "v"_a, "layer"_a, nb::call_guard<nb::gil_scoped_release>())
      .def(
          "attend",
          [](QuantizedAttention& self, uintptr_t q, const Layer& layer, uintptr_t out, int num_heads, float scale) {
            make([=, &self, &layer] { self.attend((const float*)q, layer.layer, (float*)out, num_heads, scale); });
          },
          "q"_a, "layer"_a, "out"_a, "num_heads"_a, "scale"_a, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace nibble
