// Units of packed codes to steps of unsigned bytes. A policy has
//
//   steps          in a unit
//   main, extra    bytes of a unit in the block's first plane and in its second
//   small          bytes below 128
//   unpack         one unit to `steps` vectors
#pragma once

#include "packed.hpp"
#include "simd/simd.hpp"

namespace nibble::NIBBLE_ISA {

struct U8 {
  static constexpr int steps = 4, main = 256, extra = 0;
  static constexpr bool small = false;
  static void unpack(const uint8_t* p, const uint8_t*, Bytes* out) {
    for (int s = 0; s < 4; s++) out[s] = bload(p + 64 * s);
  }
};
struct U4 {
  static constexpr int steps = 4, main = 128, extra = 0;
  static constexpr bool small = true;
  static void unpack(const uint8_t* p, const uint8_t*, Bytes* out) {
    Bytes low = bset1(0x0f);
    for (int i = 0; i < 2; i++) {
      Bytes v = bload(p + 64 * i);
      out[2 * i] = band(v, low);
      out[2 * i + 1] = band(bshr<4>(v), low);
    }
  }
};
struct U2 {
  static constexpr int steps = 4, main = 64, extra = 0;
  static constexpr bool small = true;
  static void unpack(const uint8_t* p, const uint8_t*, Bytes* out) {
    Bytes low = bset1(3), v = bload(p);
    out[0] = band(v, low);
    out[1] = band(bshr<2>(v), low);
    out[2] = band(bshr<4>(v), low);
    out[3] = band(bshr<6>(v), low);
  }
};
struct U3 {
  static constexpr int steps = 4, main = 64, extra = 32;
  static constexpr bool small = true;
  static void unpack(const uint8_t* p, const uint8_t* e, Bytes* out) {
    U2::unpack(p, nullptr, out);
    for (int s = 0; s < 4; s++) out[s] = badd_where(out[s], e + 8 * s, 4);
  }
};
struct U5 {
  static constexpr int steps = 4, main = 128, extra = 32;
  static constexpr bool small = true;
  static void unpack(const uint8_t* p, const uint8_t* e, Bytes* out) {
    U4::unpack(p, nullptr, out);
    for (int s = 0; s < 4; s++) out[s] = badd_where(out[s], e + 8 * s, 16);
  }
};
struct U6 {
  static constexpr int steps = 4, main = 128, extra = 64;
  static constexpr bool small = true;
  static void unpack(const uint8_t* p, const uint8_t* e, Bytes* out) {
    U4::unpack(p, nullptr, out);
    Bytes high = bset1(0x30), v = bload(e);
    out[0] = bor(out[0], band(bshl<4>(v), high));
    out[1] = bor(out[1], band(bshl<2>(v), high));
    out[2] = bor(out[2], band(v, high));
    out[3] = bor(out[3], band(bshr<2>(v), high));
  }
};

// Five digits of base 3: the next digit of b is what of 3 b passes 8 bits. With b = 4 g + 2 m + l,
// 3 b >> 8 = (3 g + m + (m and l)) >> 6, where nothing passes 8 bits.
struct Ternary {
  static constexpr int steps = 5, main = 64, extra = 0;
  static constexpr bool small = true;
  static void unpack(const uint8_t* p, const uint8_t*, Bytes* out) {
    Bytes one = bset1(1), two = bset1(3), six = bset1(63), b = bload(p);
    for (int s = 0; s < 5; s++) {
      Bytes g = band(bshr<2>(b), six), m = bshr<1>(b);
      Bytes sum = badd(badd(g, badd(g, g)), badd(band(m, one), band(band(m, b), one)));
      out[s] = band(bshr<6>(sum), two);
      b = badd(b, badd(b, b));
    }
  }
};

// The codes through one plane of the table.
template <class Base>
struct Lookup {
  static constexpr int steps = Base::steps, main = Base::main, extra = Base::extra;
  static constexpr bool small = false;
  static void unpack(const uint8_t* p, const uint8_t* e, Bytes table, Bytes* out) {
    Base::unpack(p, e, out);
    for (int s = 0; s < steps; s++) out[s] = lookup(table, out[s]);
  }
};

}  // namespace nibble::NIBBLE_ISA
