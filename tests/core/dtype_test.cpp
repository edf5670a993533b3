// SPDX-License-Identifier: Apache-2.0
//
// Storage types: every value of 16 bits, and rounding to them.

#include <sattn/core/dtype.hpp>

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace {

using sattn::bf16;
using sattn::f16;

// The value that IEEE 754 gives to a sign, `exponent_bits` of exponent and the rest of fraction.
double value_of(std::uint32_t bits, int exponent_bits) {
  const int fraction_bits = 15 - exponent_bits;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = static_cast<int>(bits >> fraction_bits) & ((1 << exponent_bits) - 1);
  const double fraction =
      std::ldexp(static_cast<double>(bits & ((1u << fraction_bits) - 1)), -fraction_bits);
  const double sign = (bits & 0x8000u) != 0 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) {
    return fraction == 0 ? sign * std::numeric_limits<double>::infinity()
                         : std::numeric_limits<double>::quiet_NaN();
  }
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias);
  return sign * std::ldexp(1 + fraction, exponent - bias);
}

template <class Half>
void expect_every_value(int exponent_bits, Half (*round)(float)) {
  for (std::uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const Half half{static_cast<std::uint16_t>(bits)};
    const double want = value_of(bits, exponent_bits);
    const float got = to_float(half);
    if (std::isnan(want)) {
      EXPECT_TRUE(std::isnan(got)) << bits;
      EXPECT_TRUE(std::isnan(to_float(round(got)))) << bits;
      continue;
    }
    EXPECT_EQ(double{got}, want) << bits;
    EXPECT_EQ(std::signbit(got), std::signbit(want)) << bits;
    EXPECT_EQ(round(got).bits, bits);
  }
}

// Halfway between two neighbours goes to the even one, anything else to the nearer one.
template <class Half>
void expect_rounding(std::uint32_t infinity, Half (*round)(float)) {
  for (std::uint32_t bits = 0; bits + 1 < infinity; ++bits) {
    const float low = to_float(Half{static_cast<std::uint16_t>(bits)});
    const float high = to_float(Half{static_cast<std::uint16_t>(bits + 1)});
    const float middle = static_cast<float>((double{low} + double{high}) / 2);
    ASSERT_EQ(round(middle).bits, bits % 2 == 0 ? bits : bits + 1);
    ASSERT_EQ(round(std::nextafter(middle, low)).bits, bits);
    ASSERT_EQ(round(std::nextafter(middle, high)).bits, bits + 1);
    ASSERT_EQ(round(-middle).bits, (bits % 2 == 0 ? bits : bits + 1) | 0x8000u);
  }
}

TEST(dtype, every_f16) { expect_every_value<f16>(5, sattn::to_f16); }
TEST(dtype, every_bf16) { expect_every_value<bf16>(8, sattn::to_bf16); }
TEST(dtype, rounds_to_f16) { expect_rounding<f16>(0x7c00u, sattn::to_f16); }
TEST(dtype, rounds_to_bf16) { expect_rounding<bf16>(0x7f80u, sattn::to_bf16); }

TEST(dtype, too_large_becomes_infinite) {
  EXPECT_EQ(sattn::to_f16(65519.0f).bits, 0x7bffu);
  EXPECT_EQ(sattn::to_f16(65520.0f).bits, 0x7c00u);
  EXPECT_EQ(sattn::to_f16(-1e30f).bits, 0xfc00u);
  EXPECT_EQ(sattn::to_bf16(std::numeric_limits<float>::max()).bits, 0x7f80u);
  // A NaN whose payload lies in the bits that are cut off stays one.
  EXPECT_TRUE(std::isnan(to_float(sattn::to_bf16(std::bit_cast<float>(0x7f800001u)))));
  EXPECT_TRUE(std::isnan(to_float(sattn::to_f16(std::bit_cast<float>(0x7f800001u)))));
}

}  // namespace
