#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <tuple>
#include <utility>
#include <vector>

#include "attention.hpp"
#include "bind.hpp"
#include "isa.hpp"
#include "paged.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace nibble {

void bind_attention(nb::module_& m) {
  nb::class_<PagedAttention>(m, "PagedAttention")
      .def(
          "__init__",
          [](PagedAttention* self, std::array<int64_t, 4> shape, bool half, std::vector<int64_t> query_starts,
             std::vector<int64_t> context_lens, std::tuple<uintptr_t, int64_t, int64_t> block_tables,
             std::pair<uintptr_t, int64_t> slots) {
            CacheShape head{(int)shape[1], (int)shape[2], (int)shape[3], half ? Cell::f16 : Cell::f32};
            new (self) PagedAttention({head, shape[0], std::move(query_starts), std::move(context_lens),
                                       (const int64_t*)std::get<0>(block_tables), std::get<1>(block_tables),
                                       std::get<2>(block_tables),
                                       (const int64_t*)slots.first, slots.second});
          },
          "shape"_a, "half"_a, "query_starts"_a, "context_lens"_a, "block_tables"_a, "slots"_a)
      .def("become", [](PagedAttention& self, PagedAttention& other) { self = std::move(other); }, "other"_a)
      .def(
          "store",
          [](const PagedAttention& self, uintptr_t k, uintptr_t v, uintptr_t pages) {
            make([=, &self] { self.store((const float*)k, (const float*)v, (uint8_t*)pages); });
          },
          "k"_a, "v"_a, "pages"_a, nb::call_guard<nb::gil_scoped_release>())
      .def(
          "attend",
          [](PagedAttention& self, uintptr_t q, uintptr_t pages, uintptr_t out, int num_heads, float scale) {
            make([=, &self] { self.attend((const float*)q, (const uint8_t*)pages, (float*)out, num_heads, scale); });
          },
          "q"_a, "pages"_a, "out"_a, "num_heads"_a, "scale"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "exp2_negative",
      [](uintptr_t x, uintptr_t y, int64_t count) {
        for (int64_t i = 0; i < count; i += 16)
          active_isa().attention->exp2((const float*)x + i, (float*)y + i, (int)(count - i < 16 ? count - i : 16));
      },
      "x"_a, "y"_a, "count"_a, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace nibble
