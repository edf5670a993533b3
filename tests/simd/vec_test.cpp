// SPDX-License-Identifier: Apache-2.0
#include <sattn/simd/vec.hpp>

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "simd/archs.hpp"
#include "support/compare.hpp"
#include "support/guard_buffer.hpp"
#include "support/numbers.hpp"
#include "support/random.hpp"

namespace {

using sattn::index_t;
using sattn::simd::vec;
using test_support::bit_equal;
using test_support::guard;
using test_support::guard_buffer;
using test_support::infinity;
using test_support::quiet_nan;
using test_support::random_source;
using test_support::seed_trace;

template <class Arch>
class vec_test : public test_support::arch_test<Arch> {};
TYPED_TEST_SUITE(vec_test, test_support::compiled_archs, test_support::arch_names);

template <class Arch>
std::vector<float> stored(vec<Arch> v) {
  std::vector<float> x(vec<Arch>::width);
  v.store(x.data());
  return x;
}

// f(0), f(1), ... in the lanes of one register.
template <class Arch, class F>
std::vector<float> each_lane(F&& f) {
  std::vector<float> x(vec<Arch>::width);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = f(static_cast<int>(i));
  return x;
}

TYPED_TEST(vec_test, holds_only_a_register) {
  using V = vec<TypeParam>;
  static_assert(std::is_trivially_copyable_v<V>);
  EXPECT_EQ(sizeof(V), sizeof(float) * V::width);
}

TYPED_TEST(vec_test, loads_and_stores_at_any_alignment) {
  using V = vec<TypeParam>;
  for (const guard side : {guard::before, guard::after}) {
    for (int shift = 0; shift < 4; ++shift) {
      guard_buffer<float> memory(V::width + shift, side);
      float* const p = memory.data() + (side == guard::before ? shift : 0);
      for (int i = 0; i < V::width; ++i) p[i] = static_cast<float>(i) - 2.5F;
      guard_buffer<float> copy(V::width, side);
      V::load(p).store(copy.data());
      EXPECT_TRUE(bit_equal({copy.data(), V::width}, {p, V::width}));
    }
  }
}

TYPED_TEST(vec_test, load_partial_reads_nothing_else_and_fills_with_zeros) {
  using V = vec<TypeParam>;
  for (index_t count = 0; count <= V::width; ++count) {
    for (const guard side : {guard::before, guard::after}) {
      guard_buffer<float> memory(count, side);
      for (index_t i = 0; i < count; ++i) memory.data()[i] = static_cast<float>(i + 1);
      EXPECT_TRUE(
          bit_equal(stored(V::load_partial(memory.data(), count)), each_lane<TypeParam>([&](int i) {
                      return i < count ? static_cast<float>(i + 1) : 0.0F;
                    })));
    }
  }
}

TYPED_TEST(vec_test, store_partial_writes_nothing_else) {
  using V = vec<TypeParam>;
  const V x = V::load(each_lane<TypeParam>([](int i) { return static_cast<float>(i + 1); }).data());
  for (index_t count = 0; count <= V::width; ++count) {
    guard_buffer<float> memory(count);
    x.store_partial(memory.data(), count);
    for (index_t i = 0; i < count; ++i) EXPECT_EQ(memory.data()[i], static_cast<float>(i + 1));
    std::array<float, V::width> inside{};
    x.store_partial(inside.data(), count);
    for (index_t i = count; i < V::width; ++i) EXPECT_EQ(inside[static_cast<std::size_t>(i)], 0);
  }
}

TYPED_TEST(vec_test, arithmetic_works_lane_by_lane) {
  using V = vec<TypeParam>;
  const seed_trace trace;
  random_source random;
  const std::vector<float> a = random.normal_tensor(V::width);
  const std::vector<float> b = random.normal_tensor(V::width);
  const V x = V::load(a.data());
  const V y = V::load(b.data());
  const auto expect = [&](V got, auto&& f) {
    EXPECT_TRUE(bit_equal(stored(got), each_lane<TypeParam>([&](int i) {
                            const auto at = static_cast<std::size_t>(i);
                            return static_cast<float>(f(a[at], b[at]));
                          })));
  };
  expect(x + y, [](float p, float q) { return p + q; });
  expect(x - y, [](float p, float q) { return p - q; });
  expect(x * y, [](float p, float q) { return p * q; });
  expect(x / y, [](float p, float q) { return p / q; });
  expect(max(x, y), [](float p, float q) { return p > q ? p : q; });
  expect(floor_at(x, 0.25F), [](float p, float) { return p > 0.25F ? p : 0.25F; });
  expect(abs(x), [](float p, float) { return std::abs(p); });
  expect(select_less(x, y, x, y), [](float p, float q) { return p < q ? p : q; });
  expect(select_equal(x, x, y, x), [](float, float q) { return q; });
  expect(V::zero(), [](float, float) { return 0.0F; });
}

TYPED_TEST(vec_test, fma_rounds_once_where_the_instruction_set_has_it) {
  using V = vec<TypeParam>;
  const V x = V::broadcast(1.0F + 0x1p-12F);
  const float fused = 0x1p-24F;  // of (1 + 2^-12)^2 - (1 + 2^-11)
  const bool has_fma = !std::is_same_v<TypeParam, sattn::arch::sse2>;
  for (const float lane : stored(fma(x, x, V::broadcast(-1.0F - 0x1p-11F)))) {
    EXPECT_EQ(lane, has_fma ? fused : 0.0F);
  }
}

TYPED_TEST(vec_test, a_nan_compares_false) {
  using V = vec<TypeParam>;
  const V not_a_number = V::broadcast(quiet_nan);
  const V one = V::broadcast(1.0F);
  const V two = V::broadcast(2.0F);
  for (const V other : {one, not_a_number}) {
    for (const std::vector<float>& lanes : {stored(select_less(not_a_number, other, one, two)),
                                            stored(select_less(other, not_a_number, one, two)),
                                            stored(select_equal(not_a_number, other, one, two))}) {
      for (const float lane : lanes) EXPECT_EQ(lane, 2.0F);
    }
  }
}

TYPED_TEST(vec_test, infinities_of_one_sign_are_equal_and_not_less) {
  using V = vec<TypeParam>;
  const V low = V::broadcast(-infinity);
  const V one = V::broadcast(1.0F);
  const V two = V::broadcast(2.0F);
  EXPECT_EQ(stored(select_equal(low, low, one, two))[0], 1.0F);
  EXPECT_EQ(stored(select_less(low, low, one, two))[0], 2.0F);
  EXPECT_EQ(stored(max(low, low))[0], -infinity);
}

// The lanes of all masks: First is where the register's bits begin.
template <class Arch, int First>
void expect_selected_bits() {
  using V = vec<Arch>;
  std::array<float, V::width> a{};
  for (int i = 0; i < V::width; ++i) a[static_cast<std::size_t>(i)] = static_cast<float>(i);
  const V x = V::load(a.data());
  const V otherwise = V::broadcast(-infinity);
  int wrong = 0;
  for (unsigned mask = 0; mask < 1U << 16; ++mask) {
    std::array<float, V::width> got{};
    sattn::simd::select_bits<First>(static_cast<std::uint16_t>(mask), x, otherwise)
        .store(got.data());
    for (int i = 0; i < V::width; ++i) {
      const bool set = (mask >> (First + i) & 1U) != 0;
      const auto at = static_cast<std::size_t>(i);
      wrong += got[at] != (set ? a[at] : -infinity) ? 1 : 0;
    }
  }
  EXPECT_EQ(wrong, 0) << "bits from " << First;
}

TYPED_TEST(vec_test, select_bits_obeys_all_masks) {
  constexpr int width = vec<TypeParam>::width;
  []<int... I>(std::integer_sequence<int, I...>) {
    (expect_selected_bits<TypeParam, I * width>(), ...);
  }
  (std::make_integer_sequence<int, 16 / width>{});
}

TYPED_TEST(vec_test, select_bits_passes_nan_and_infinity_through_untouched) {
  using V = vec<TypeParam>;
  const V special = V::broadcast(quiet_nan);
  const V zero = V::zero();
  EXPECT_TRUE(bit_equal(stored(sattn::simd::select_bits<0>(0, special, zero)), stored(zero)));
  EXPECT_TRUE(
      bit_equal(stored(sattn::simd::select_bits<0>(0xffff, special, zero)), stored(special)));
}

TYPED_TEST(vec_test, reductions_take_every_lane_once) {
  using V = vec<TypeParam>;
  for (int i = 0; i < V::width; ++i) {
    const auto one_hot = each_lane<TypeParam>([&](int lane) { return lane == i ? 1.0F : 0.0F; });
    EXPECT_EQ(reduce_add(V::load(one_hot.data())), 1.0F);
    EXPECT_EQ(reduce_max(V::load(one_hot.data())), 1.0F);
  }
  // Small whole numbers: every order of additions is exact.
  const auto count = each_lane<TypeParam>([](int lane) { return static_cast<float>(lane); });
  EXPECT_EQ(reduce_add(V::load(count.data())), static_cast<float>(V::width * (V::width - 1) / 2));
  EXPECT_EQ(reduce_max(V::broadcast(-infinity)), -infinity);
}

TEST(unroll, calls_in_order_with_constants) {
  std::vector<int> seen;
  sattn::simd::unroll<5>([&](auto i) {
    static_assert(decltype(i)::value >= 0);
    seen.push_back(i);
  });
  EXPECT_EQ(seen, (std::vector<int>{0, 1, 2, 3, 4}));
}

TEST(prefetch, never_faults) {
  guard_buffer<float> memory(0);
  sattn::simd::prefetch(memory.data());
  sattn::simd::prefetch(nullptr);
}

}  // namespace
