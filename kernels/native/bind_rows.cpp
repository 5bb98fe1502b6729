#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bind.hpp"
#include "measure.hpp"
#include "rowwise.hpp"
#include "sampling.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace nibble {
namespace {

using Address = uintptr_t;

float* floats(Address address) { return (float*)address; }

int64_t draw_id(Address logits, int64_t size, double temperature, int64_t top_k, double top_p, double min_p,
                double uniform) {
  return draw(floats(logits), size, Filters{temperature, top_k, top_p, min_p}, uniform);
}

std::pair<double, std::vector<std::pair<int64_t, double>>> all_log_probs(Address logits, int64_t size, int64_t token,
                                                                         int64_t num_top) {
  if (token < 0 || token >= size) throw std::invalid_argument("there is no token " + std::to_string(token));
  LogProbs found = log_probs(floats(logits), size, token, num_top);
  return {found.token, std::move(found.top)};
}

}  // namespace

void bind_rows(nb::module_& m) {
  auto release = nb::call_guard<nb::gil_scoped_release>();
  m.def(
      "rms_norm",
      [](Address x, Address weight, int64_t num_rows, int64_t width, float eps, Address normed) {
        NormRows rows{floats(x), nullptr, floats(weight), nullptr, floats(normed), num_rows, width};
        make([=] { rms_norm(rows, eps); });
      },
      release);
  m.def(
      "add_rms_norm",
      [](Address x, Address delta, Address weight, int64_t num_rows, int64_t width, float eps, Address sum,
         Address normed) {
        NormRows rows{floats(x), floats(delta), floats(weight), floats(sum), floats(normed), num_rows, width};
        make([=] { rms_norm(rows, eps); });
      },
      release);
  m.def(
      "rotate",
      [](std::pair<Address, Address> q, int64_t q_heads, std::pair<Address, Address> k, int64_t k_heads, Address cos,
         Address sin, int64_t num_tokens, int64_t head_dim) {
        HeadRows queries{floats(q.first), floats(q.second), q_heads}, keys{floats(k.first), floats(k.second), k_heads};
        make([=] { rotate(queries, keys, floats(cos), floats(sin), num_tokens, head_dim); });
      },
      release);
  m.def(
      "swiglu",
      [](Address gate, Address up, int64_t count, Address out) {
        make([=] { swiglu(floats(gate), floats(up), count, floats(out)); });
      },
      release);
  nb::enum_<Combine>(m, "Combine")
      .value("add", Combine::add)
      .value("subtract", Combine::subtract)
      .value("multiply", Combine::multiply);
  m.def(
      "combine_rows",
      [](Combine op, Address x, Address y, int64_t num_rows, int64_t width, bool repeated, Address out) {
        make([=] { combine_rows(op, floats(x), floats(y), num_rows, width, repeated, floats(out)); });
      },
      release);
  m.def(
      "clamp",
      [](Address x, float low, float high, int64_t count, Address out) {
        make([=] { clamp(floats(x), low, high, count, floats(out)); });
      },
      release);
  m.def(
      "gather_heads",
      [](Address x, Address order, int64_t num_tokens, int64_t num_heads, int64_t head_dim, Address out) {
        make([=] { gather_heads(floats(x), (const int64_t*)order, num_tokens, num_heads, head_dim, floats(out)); });
      },
      release);
  m.def("argmax", [](Address logits, int64_t size) { return argmax(floats(logits), size); }, release);
  m.def("draw", &draw_id, release);
  m.def("log_probs", &all_log_probs, release);
  m.def("read_bandwidth", &read_bandwidth, "num_threads"_a, "num_bytes"_a = 512 << 20, "seconds"_a = 0.3, release);
  m.def("dot_peak", &dot_peak, "num_threads"_a, "seconds"_a = 0.2, release);
  m.def("fma_peak", &fma_peak, "num_threads"_a, "seconds"_a = 0.2, release);
}

}  // namespace nibble
