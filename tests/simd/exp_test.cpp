// SPDX-License-Identifier: Apache-2.0
#include <sattn/simd/exp.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cfenv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "simd/archs.hpp"
#include "support/numbers.hpp"
#include "support/random.hpp"

namespace {

using sattn::simd::vec;
using test_support::infinity;
using test_support::quiet_nan;
using test_support::random_source;
using test_support::seed_trace;

constexpr float smallest_normal = std::numeric_limits<float>::min();
constexpr float largest = std::numeric_limits<float>::max();

template <class Arch>
class exp_test : public test_support::arch_test<Arch> {};
TYPED_TEST_SUITE(exp_test, test_support::compiled_archs, test_support::arch_names);
template <class Arch>
class tanh_test : public test_support::arch_test<Arch> {};
TYPED_TEST_SUITE(tanh_test, test_support::compiled_archs, test_support::arch_names);

struct exp_of {
  template <class V>
  V operator()(V x) const {
    return sattn::simd::exp_nonpositive(x);
  }
};
struct tanh_of {
  template <class V>
  V operator()(V x) const {
    return sattn::simd::tanh(x);
  }
};

// f of every x, in place of the last register that would not be full: one that overlaps.
template <class Arch, class F>
std::vector<float> apply(const std::vector<float>& x, F f) {
  using V = vec<Arch>;
  std::vector<float> y(x.size());
  for (std::size_t i = 0; i < x.size(); i += V::width) {
    const auto count = static_cast<sattn::index_t>(std::min<std::size_t>(V::width, x.size() - i));
    f(V::load_partial(x.data() + i, count)).store_partial(y.data() + i, count);
  }
  return y;
}

template <class Arch, class F>
float apply_one(float x, F f) {
  return apply<Arch>(std::vector<float>(vec<Arch>::width, x), f).back();
}

// Every stride-th finite float of one sign, and both sides of the points where the code changes.
std::vector<float> sweep(bool negative, std::uint32_t stride) {
  std::vector<float> x;
  const std::uint32_t sign = negative ? 0x80000000U : 0;
  const auto end = std::bit_cast<std::uint32_t>(infinity);
  for (std::uint32_t bits = 0; bits < end; bits += stride) {
    x.push_back(std::bit_cast<float>(sign | bits));
  }
  return x;
}

std::vector<float> neighbours_of(const std::vector<float>& points) {
  std::vector<float> x;
  for (const float p : points) {
    const auto bits = std::bit_cast<std::uint32_t>(p);
    for (std::uint32_t b = bits - 200; b != bits + 200; ++b) x.push_back(std::bit_cast<float>(b));
  }
  return x;
}

// Where e^x is 2^-126 and where the exponent rounds to another whole number near it.
std::vector<float> exp_edges() {
  std::vector<float> points = {-1.0F, -largest / 2};
  for (int half = 1; half <= 300; ++half) points.push_back(-0.34657359F * static_cast<float>(half));
  std::vector<float> x = neighbours_of(points);
  for (float at = -87.0F; at > -104.5F; at -= 0.0007F) x.push_back(at);
  x.push_back(-largest);
  return x;
}

// The bound that exp_nonpositive states.
template <class Arch>
void expect_exp_within_bound(const std::vector<float>& x) {
  const std::vector<float> y = apply<Arch>(x, exp_of{});
  int wrong = 0;
  float worst = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double want = std::exp(double{x[i]});
    const double bound = want * (0x1p-22 + 1.25 * 0x1p-24 * std::abs(double{x[i]}));
    const bool close = std::abs(double{y[i]} - want) <= bound;
    // Results below the smallest normal float are 0, but for a strip of subnormals; rounding
    // decides which it is at the edges.
    const bool flushed = y[i] == 0 && want - bound < double{smallest_normal};
    const bool in_strip = x[i] >= -87.69F && x[i] <= -87.33F &&
                          std::abs(double{y[i]} - want) < double{smallest_normal} / 4;
    if (!close && !flushed && !in_strip) {
      ++wrong;
      worst = x[i];
    }
  }
  EXPECT_EQ(wrong, 0) << "of " << x.size() << ", one of them at " << worst;
}

TYPED_TEST(exp_test, keeps_its_bound_over_all_negative_floats) {
  expect_exp_within_bound<TypeParam>(sweep(true, 1021));
}

TYPED_TEST(exp_test, keeps_its_bound_where_the_exponent_changes) {
  expect_exp_within_bound<TypeParam>(exp_edges());
}

TYPED_TEST(exp_test, is_exact_at_zero_and_at_minus_infinity) {
  EXPECT_EQ(apply_one<TypeParam>(0.0F, exp_of{}), 1.0F);
  EXPECT_EQ(apply_one<TypeParam>(-0.0F, exp_of{}), 1.0F);
  const float nothing = apply_one<TypeParam>(-infinity, exp_of{});
  EXPECT_EQ(nothing, 0.0F);
  EXPECT_FALSE(std::signbit(nothing));
}

TYPED_TEST(exp_test, is_zero_below_minus_87_69) {
  std::vector<float> x = sweep(true, 997);
  std::erase_if(x, [](float value) { return value > -87.69F; });
  const std::vector<float> y = apply<TypeParam>(x, exp_of{});
  EXPECT_TRUE(std::all_of(y.begin(), y.end(), [](float value) { return value == 0.0F; }));
}

TYPED_TEST(exp_test, passes_nan_on) {
  EXPECT_TRUE(std::isnan(apply_one<TypeParam>(quiet_nan, exp_of{})));
  EXPECT_TRUE(std::isnan(apply_one<TypeParam>(-quiet_nan, exp_of{})));
}

TYPED_TEST(exp_test, is_hardly_ever_subnormal_and_never_negative_or_above_one) {
  for (const std::vector<float>& x : {sweep(true, 1021), exp_edges()}) {
    const std::vector<float> y = apply<TypeParam>(x, exp_of{});
    for (std::size_t i = 0; i < x.size(); ++i) {
      const bool in_strip = x[i] >= -87.69F && x[i] <= -87.33F;
      ASSERT_TRUE(y[i] == 0 || y[i] >= (in_strip ? 0 : smallest_normal))
          << "e^" << x[i] << " = " << y[i];
      ASSERT_LE(y[i], 1.0F + 0x1p-22F) << "e^" << x[i];
    }
  }
}

TYPED_TEST(exp_test, raises_no_invalid_operation) {
  std::vector<float> x = exp_edges();
  x.insert(x.end(), {0.0F, -0.0F, -infinity, -largest, -smallest_normal});
  std::feclearexcept(FE_ALL_EXCEPT);
  const std::vector<float> y = apply<TypeParam>(x, exp_of{});
  EXPECT_EQ(std::fetestexcept(FE_INVALID | FE_DIVBYZERO), 0);
  EXPECT_EQ(y.size(), x.size());
}

TYPED_TEST(exp_test, does_not_mix_lanes) {
  const seed_trace trace;
  random_source random;
  std::vector<float> x(vec<TypeParam>::width);
  for (std::size_t i = 0; i < x.size(); ++i) {
    x[i] = i % 3 == 0 ? -infinity : static_cast<float>(random.normal() - 9);
  }
  const std::vector<float> y = apply<TypeParam>(x, exp_of{});
  for (std::size_t i = 0; i < x.size(); ++i) {
    EXPECT_EQ(y[i], apply_one<TypeParam>(x[i], exp_of{}));
  }
}

// The bound that tanh states.
template <class Arch>
void expect_tanh_within_bound(const std::vector<float>& x) {
  const std::vector<float> y = apply<Arch>(x, tanh_of{});
  int wrong = 0;
  float worst = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double want = std::tanh(double{x[i]});
    const double size = std::abs(double{x[i]}) < 0.55 ? std::abs(want) : 1.0;
    // Below the normal floats the spacing is absolute.
    const double bound = std::max(3e-7 * size, double{std::numeric_limits<float>::denorm_min()});
    if (!(std::abs(double{y[i]} - want) <= bound)) {
      ++wrong;
      worst = x[i];
    }
  }
  EXPECT_EQ(wrong, 0) << "of " << x.size() << ", one of them at " << worst;
}

TYPED_TEST(tanh_test, keeps_its_bound_over_all_floats) {
  expect_tanh_within_bound<TypeParam>(sweep(true, 1021));
  expect_tanh_within_bound<TypeParam>(sweep(false, 1021));
}

TYPED_TEST(tanh_test, keeps_its_bound_where_the_two_formulas_meet) {
  expect_tanh_within_bound<TypeParam>(neighbours_of({0.55F, -0.55F, 1.0F, -9.0F, 44.0F}));
}

TYPED_TEST(tanh_test, is_odd_bounded_and_right_at_the_ends) {
  for (const float x : {0.0F, 0.1F, 0.54F, 0.56F, 3.0F, 30.0F, largest, infinity}) {
    const float y = apply_one<TypeParam>(x, tanh_of{});
    EXPECT_EQ(apply_one<TypeParam>(-x, tanh_of{}), -y) << "at " << x;
    EXPECT_LE(y, 1.0F);
  }
  EXPECT_EQ(apply_one<TypeParam>(infinity, tanh_of{}), 1.0F);
  EXPECT_EQ(apply_one<TypeParam>(-infinity, tanh_of{}), -1.0F);
  EXPECT_TRUE(std::isnan(apply_one<TypeParam>(quiet_nan, tanh_of{})));
}

}  // namespace
