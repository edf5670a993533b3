// SPDX-License-Identifier: Apache-2.0
#include <sattn/simd/transpose.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <limits>
#include <vector>

#include "simd/archs.hpp"
#include "support/compare.hpp"
#include "support/guard_buffer.hpp"
#include "support/random.hpp"

namespace {

using sattn::simd::vec;
using test_support::bit_equal;
using test_support::guard_buffer;
using test_support::random_source;
using test_support::seed_trace;

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

/// Halves added until one lane is left.
float folded(std::vector<float> lanes) {
  for (std::size_t half = lanes.size() / 2; half > 0; half /= 2) {
    for (std::size_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// The order of the additions is the same for every number of rows, and so are the bits.
template <class Arch, int N>
void check_reduce_each(random_source& random) {
  constexpr int width = vec<Arch>::width;
  const std::vector<float> x = random.normal_tensor(N * width);
  vec<Arch> rows[N];
  for (int i = 0; i < N; ++i) rows[i] = vec<Arch>::load(x.data() + i * width);
  guard_buffer<float> sums(N);
  sattn::simd::reduce_each(rows, sums.data());
  for (int i = 0; i < N; ++i) {
    EXPECT_EQ(sums.data()[i], folded({x.begin() + i * width, x.begin() + (i + 1) * width}))
        << "row " << i << " of " << N;
  }
}

TYPED_TEST(transpose_test, reduce_each_adds_halves_for_any_number_of_rows) {
  const seed_trace trace;
  random_source random;
  sattn::simd::unroll<17>([&](auto n) { check_reduce_each<TypeParam, n + 1>(random); });
}

template <class Arch, int Stride>
void check_max_of_residues(random_source& random) {
  constexpr int width = vec<Arch>::width;
  const std::vector<float> x = random.normal_tensor(width);
  std::vector<float> got(width);
  sattn::simd::max_of_residues<Stride>(vec<Arch>::load(x.data())).store(got.data());
  for (int i = 0; i < width; ++i) {
    float want = -std::numeric_limits<float>::infinity();
    for (int j = i % Stride; j < width; j += Stride) {
      want = std::max(want, x[static_cast<std::size_t>(j)]);
    }
    EXPECT_EQ(got[static_cast<std::size_t>(i)], want) << "lane " << i << ", stride " << Stride;
  }
}

TYPED_TEST(transpose_test, max_of_residues_is_over_every_stride_th_lane) {
  const seed_trace trace;
  random_source random;
  check_max_of_residues<TypeParam, 1>(random);
  check_max_of_residues<TypeParam, 2>(random);
  check_max_of_residues<TypeParam, 4>(random);
}

}  // namespace
