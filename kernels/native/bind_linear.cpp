#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind.hpp"
#include "group.hpp"
#include "packed.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace nibble {
namespace {

using Array = nb::ndarray<nb::ro, nb::device::cpu>;

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

bool is_contiguous(const Array& a) {
  int64_t expected = 1;
  for (size_t i = a.ndim(); i-- > 0;) {
    if (a.shape(i) > 1 && a.stride(i) != expected) return false;
    expected *= (int64_t)a.shape(i);
  }
  return true;
}

template <class T>
bool is(const Array& a) {
  return a.dtype() == nb::dtype<T>();
}
bool is_float(const Array& a, uint8_t bits, nb::dlpack::dtype_code code = nb::dlpack::dtype_code::Float) {
  return a.dtype().code == (uint8_t)code && a.dtype().bits == bits && a.dtype().lanes == 1;
}

ScaleType scale_type(const Array& scales) {
  if (is_float(scales, 32)) return ScaleType::f32;
  if (is_float(scales, 16)) return ScaleType::f16;
  if (is_float(scales, 16, nb::dlpack::dtype_code::Bfloat)) return ScaleType::bf16;
  throw std::invalid_argument("scales must be float32, float16 or bfloat16");
}

Packed pack_arrays(int bits, int64_t num_channels, int64_t group_size, const Array& codes, const Array& scales,
                   const std::optional<Array>& zeros, int32_t zero, const std::optional<std::vector<int>>& table) {
  require(group_size >= 1 && num_channels >= 1, "group_size and num_channels must be positive");
  require(bits >= 1 && bits <= 8, "bits must be 1..8");
  require(codes.ndim() == 2 && is<uint8_t>(codes) && is_contiguous(codes), "codes must be a contiguous uint8 matrix");
  int64_t num_rows = (int64_t)codes.shape(0), num_groups = (num_channels + group_size - 1) / group_size;
  require((int64_t)codes.shape(1) == (num_channels * bits + 7) / 8,
          "codes have " + std::to_string(codes.shape(1)) + " bytes a row, expected " +
              std::to_string((num_channels * bits + 7) / 8));
  auto check = [&](const Array& a, const char* name) {
    require(a.ndim() == 2 && (int64_t)a.shape(0) == num_rows && (int64_t)a.shape(1) == num_groups && is_contiguous(a),
            std::string(name) + " must be a contiguous matrix of " + std::to_string(num_rows) + " x " +
                std::to_string(num_groups));
  };
  check(scales, "scales");
  Canonical from{};
  from.num_rows = num_rows;
  from.num_channels = num_channels;
  from.group_size = group_size;
  from.bits = bits;
  from.codes = (const uint8_t*)codes.data();
  from.codes_stride = (int64_t)codes.shape(1);
  from.scale_type = scale_type(scales);
  from.scales = scales.data();
  from.zero_type = ZeroType::constant;
  from.zero = zero;
  if (zeros) {
    check(*zeros, "zeros");
    require(is<uint8_t>(*zeros) || is_float(*zeros, 32), "zeros must be uint8 or float32");
    require(!table, "a table has no zero points");
    from.zero_type = is<uint8_t>(*zeros) ? ZeroType::u8 : ZeroType::f32;
    from.zeros = zeros->data();
  }
  int8_t entries[16] = {};
  if (table) {
    require(table->size() <= 16, "a table has at most 16 entries");
    for (size_t i = 0; i < table->size(); i++) {
      require((*table)[i] >= -128 && (*table)[i] <= 127, "table entries must be signed bytes");
      entries[i] = (int8_t)(*table)[i];
    }
    from.table = entries;
  }
  return pack(from);
}

}  // namespace

void bind_linear(nb::module_& m) {
  nb::class_<Packed>(m, "Packed")
      .def_ro("num_rows", &Packed::num_rows)
      .def_ro("num_channels", &Packed::num_channels)
      .def_ro("block_channels", &Packed::block_channels)
      .def_prop_ro("num_bytes", [](const Packed& p) { return p.memory.size(); });
  m.def("pack", &pack_arrays, "bits"_a, "num_channels"_a, "group_size"_a, "codes"_a, "scales"_a,
        "zeros"_a.none() = nb::none(), "zero"_a = 0, "table"_a.none() = nb::none(),
        nb::call_guard<nb::gil_scoped_release>());
  m.def("block_channels_for", &block_channels_for, "group_size"_a, "num_channels"_a);
  nb::class_<Group>(m, "Group")
      .def(nb::init<std::vector<const Packed*>>(), "members"_a, nb::keep_alive<1, 2>())
      .def(
          "run",
          [](Group& group, uintptr_t x, int64_t num_tokens, const std::vector<uintptr_t>& outs) {
            std::vector<float*> pointers;
            for (uintptr_t out : outs) pointers.push_back((float*)out);
            group.run((const float*)x, num_tokens, pointers);
          },
          "x"_a, "num_tokens"_a, "outs"_a, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace nibble
