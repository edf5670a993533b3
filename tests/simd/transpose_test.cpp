// SPDX-License-Identifier: Apache-2.0
#include <sattn/simd/transpose.hpp>

#include <gtest/gtest.h>

#include <cstddef>
#include <limits>
#include <vector>

#include "simd/archs.hpp"
#include "support/compare.hpp"
#include "support/random.hpp"

namespace {

using sattn::simd::vec;
using test_support::bit_equal;
using test_support::random_source;

template <class Arch>
class transpose_test : public test_support::arch_test<Arch> {};
TYPED_TEST_SUITE(transpose_test, test_support::compiled_archs, test_support::arch_names);

template <class Arch>
std::vector<float> transposed(const std::vector<float>& square) {
  constexpr int width = vec<Arch>::width;
  vec<Arch> row[width];
  for (int i = 0; i < width; ++i) row[i] = vec<Arch>::load(square.data() + i * width);
  sattn::simd::transpose<Arch>(row);
  std::vector<float> result(square.size());
  for (int i = 0; i < width; ++i) row[i].store(result.data() + i * width);
  return result;
}

TYPED_TEST(transpose_test, moves_lane_j_of_row_i_to_lane_i_of_row_j) {
  constexpr std::size_t width = vec<TypeParam>::width;
  std::vector<float> square(width * width);
  for (std::size_t i = 0; i < square.size(); ++i) square[i] = static_cast<float>(i);
  const std::vector<float> result = transposed<TypeParam>(square);
  for (std::size_t i = 0; i < width; ++i) {
    for (std::size_t j = 0; j < width; ++j) {
      EXPECT_EQ(result[j * width + i], square[i * width + j]) << "row " << i << ", lane " << j;
    }
  }
}

TYPED_TEST(transpose_test, twice_is_the_identity_for_any_bits) {
  constexpr std::size_t width = vec<TypeParam>::width;
  std::vector<float> square = random_source().normal_tensor(width * width);
  square[1] = std::numeric_limits<float>::quiet_NaN();
  square[width] = -0.0F;
  square[2] = std::numeric_limits<float>::denorm_min();
  EXPECT_TRUE(bit_equal(transposed<TypeParam>(transposed<TypeParam>(square)), square));
}

}  // namespace
