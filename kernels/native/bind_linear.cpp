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
#include "int8_group.hpp"
#include "packed.hpp"
#include "refuse.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace nibble {
namespace {

using Array = nb::ndarray<nb::ro, nb::device::cpu>;

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

ScaleType scale_type(const Array& scales, const std::optional<std::string>& name) {
  if (name) {
    require(is<uint8_t>(scales), "scales with a scale_type must be given as uint8");
    if (*name == "e8m0") return ScaleType::e8m0;
    if (*name == "e4m3") return ScaleType::e4m3;
    throw std::invalid_argument("scale_type must be 'e8m0' or 'e4m3', not '" + *name + "'");
  }
  if (is_float(scales, 32)) return ScaleType::f32;
  if (is_float(scales, 16)) return ScaleType::f16;
  if (is_float(scales, 16, nb::dlpack::dtype_code::Bfloat)) return ScaleType::bf16;
  throw std::invalid_argument("scales must be float32, float16 or bfloat16, or uint8 with a scale_type");
}

void set_codes(Canonical& from, const Array& codes) {
  require(from.group_size >= 1 && from.num_channels >= 1, "group_size and num_channels must be positive");
  require(from.num_channels <= INT32_MAX / 8, "num_channels is too large");
  require(from.bits >= 1 && from.bits <= 8, "bits must be 1..8");
  require(codes.ndim() == 2 && is<uint8_t>(codes) && is_contiguous(codes), "codes must be a contiguous uint8 matrix");
  int64_t expected = (from.num_channels * from.bits + 7) / 8;
  if ((int64_t)codes.shape(1) != expected)
    refuse("codes have " + std::to_string(codes.shape(1)) + " bytes a row, expected " + std::to_string(expected));
  from.num_rows = (int64_t)codes.shape(0);
  from.codes = (const uint8_t*)codes.data();
  from.codes_stride = expected;
}

int64_t num_groups_of(const Canonical& from) { return (from.num_channels - 1) / from.group_size + 1; }

bool is_matrix(const Array& a, int64_t num_rows) {
  return a.ndim() == 2 && (int64_t)a.shape(0) == num_rows && is_contiguous(a);
}

void check_groups(const Canonical& from, const Array& a, const char* name) {
  int64_t num_groups = num_groups_of(from);
  if (!is_matrix(a, from.num_rows) || (int64_t)a.shape(1) != num_groups)
    refuse(std::string(name) + " must be a contiguous matrix of " + std::to_string(from.num_rows) + " x " +
           std::to_string(num_groups));
}

void set_zeros(Canonical& from, const std::optional<Array>& zeros) {
  from.zero_type = ZeroType::constant;
  if (!zeros) return;
  check_groups(from, *zeros, "zeros");
  require(is<uint8_t>(*zeros) || is_float(*zeros, 32), "zeros must be uint8 or float32");
  require(from.table.empty(), "a table has no zero points");
  from.zero_type = is<uint8_t>(*zeros) ? ZeroType::u8 : ZeroType::f32;
  from.zeros = zeros->data();
}

void set_offsets(Canonical& from, const std::optional<Array>& offsets, bool nested) {
  if (!offsets) return;
  check_groups(from, *offsets, "offsets");
  require(nested ? is<int8_t>(*offsets) : is_float(*offsets, 32), "offsets must be float32, or int8 with steps");
  require(from.table.empty() && !from.zeros && from.zero == 0, "weights with offsets have no table and no zero points");
  from.zero_type = ZeroType::offset;
  from.zeros = offsets->data();
}

// Of nested scales: bytes, and for so many groups each a float16 step.
const uint16_t* steps_of(Canonical& from, const Array& steps, const char* name) {
  int64_t num_groups = num_groups_of(from), per_row = is_matrix(steps, from.num_rows) ? (int64_t)steps.shape(1) : 0;
  if (per_row < 1 || num_groups % per_row != 0 || !is_float(steps, 16))
    refuse(std::string(name) + " must be a contiguous matrix of float16, one for some groups of each row");
  int64_t each = num_groups / per_row;
  require(from.groups_per_step == 0 || from.groups_per_step == each, "steps must be for as many groups");
  from.groups_per_step = each;
  return (const uint16_t*)steps.data();
}

void set_nested(Canonical& from, const Array& scales, const std::optional<Array>& offsets,
                const std::optional<Array>& scale_steps, const std::optional<Array>& offset_steps) {
  require(!offset_steps || (offsets && scale_steps), "steps of offsets need offsets and nested scales");
  if (!scale_steps) return;
  require(is<int8_t>(scales) && from.table.empty(), "nested scales are int8, and go without a table");
  from.scale_type = ScaleType::nested;
  from.scale_steps = steps_of(from, *scale_steps, "scale_steps");
  if (!offset_steps) return;
  from.zero_type = ZeroType::nested_offset;
  from.offset_steps = steps_of(from, *offset_steps, "offset_steps");
}

Packed pack_arrays(int bits, int64_t num_channels, int64_t group_size, const Array& codes, const Array& scales,
                   const std::optional<Array>& zeros, int32_t zero, const std::optional<std::vector<float>>& table,
                   const std::optional<std::string>& scale_type_name, const std::optional<Array>& factors, bool ternary,
                   const std::optional<Array>& offsets, const std::optional<Array>& scale_steps,
                   const std::optional<Array>& offset_steps) {
  Canonical from{};
  from.num_channels = num_channels;
  from.group_size = group_size;
  from.bits = bits;
  from.ternary = ternary;
  set_codes(from, codes);
  check_groups(from, scales, "scales");
  if (!scale_steps) from.scale_type = scale_type(scales, scale_type_name);
  from.scales = scales.data();
  if (table) {
    require(!table->empty() && zero == 0 && !ternary, "a table has 1 to 16 entries, and no zero point");
    from.table = *table;
  }
  from.zero = zero;
  set_zeros(from, zeros);
  set_offsets(from, offsets, offset_steps.has_value());
  set_nested(from, scales, offsets, scale_steps, offset_steps);
  if (factors) {
    if (factors->ndim() != 1 || (int64_t)factors->shape(0) != from.num_rows || !is_float(*factors, 32) ||
        !is_contiguous(*factors))
      refuse("factors must be " + std::to_string(from.num_rows) + " contiguous float32");
    from.factors = (const float*)factors->data();
  }
  return pack(from);
}

// In place: members, the rounding of their activations (scale: None where it follows the token), and sums of codes.
void make_int8_group(Int8Group* group, const std::vector<const Packed*>& members, int bits, bool symmetric,
                     std::optional<float> scale, int32_t zero, const std::vector<Array>& code_sums) {
  std::vector<const int32_t*> sums;
  for (size_t i = 0; i < code_sums.size(); i++) {
    const Array& a = code_sums[i];
    require(i < members.size() && is<int32_t>(a) && is_matrix(a, members[i]->num_rows) &&
                (int)a.shape(1) == members[i]->num_blocks,
            "sums of codes must be a contiguous int32 matrix, one for each row and block");
    sums.push_back((const int32_t*)a.data());
  }
  new (group) Int8Group(members, {bits, symmetric, scale.has_value(), scale.value_or(0.0f), zero}, sums);
}

}  // namespace

void bind_linear(nb::module_& m) {
  nb::class_<Packed>(m, "Packed")
      .def_ro("num_rows", &Packed::num_rows)
      .def_ro("num_channels", &Packed::num_channels)
      .def_ro("block_channels", &Packed::block_channels)
      .def_prop_ro("num_bytes", [](const Packed& p) { return p.memory.size(); });
  m.def("pack", &pack_arrays, "bits"_a, "num_channels"_a, "group_size"_a, "codes"_a, "scales"_a,
        "zeros"_a.none() = nb::none(), "zero"_a = 0, "table"_a.none() = nb::none(), "scale_type"_a.none() = nb::none(),
        "factors"_a.none() = nb::none(), "ternary"_a = false, "offsets"_a.none() = nb::none(),
        "scale_steps"_a.none() = nb::none(), "offset_steps"_a.none() = nb::none(),
        nb::call_guard<nb::gil_scoped_release>());
  bind_group<Group, Packed>(m, "Group");
  nb::class_<Int8Group>(m, "Int8Group")
      .def("__init__", &make_int8_group, "members"_a, "bits"_a, "symmetric"_a, "scale"_a.none(), "zero"_a,
           "code_sums"_a, nb::keep_alive<1, 2>())
      .def("run", &run_group<Int8Group>, "x"_a, "num_tokens"_a, "outs"_a, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace nibble
