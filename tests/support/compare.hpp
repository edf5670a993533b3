// SPDX-License-Identifier: Apache-2.0
//
// Comparison with the oracle's error bound. Nothing is averaged over rows but the bias: one wrong
// element is a failure.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>

#include "reference/reference.hpp"

namespace test_support {

/// |got - want| / bound. 0 for NaN and infinities that agree, infinite if they do not.
inline double error_ratio(float got, double want, double bound) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  if (std::isnan(want)) return std::isnan(got) ? 0 : infinity;
  if (double{got} == want) return 0;
  const double ratio = std::abs(double{got} - want) / bound;
  return std::isnan(ratio) ? infinity : ratio;
}

struct bound_check {
  double worst_ratio = 0;
  std::size_t worst = 0;
  std::size_t outside = 0;
  double bias = 0;  // mean signed error over mean bound

  bound_check(std::span<const float> got, std::span<const double> want,
              std::span<const double> bound) {
    double sum_error = 0;
    double sum_bound = 0;
    for (std::size_t i = 0; i < got.size(); ++i) {
      const double ratio = error_ratio(got[i], want[i], bound[i]);
      if (ratio > worst_ratio) {
        worst_ratio = ratio;
        worst = i;
      }
      if (ratio > 1) ++outside;
      if (std::isfinite(want[i])) {
        sum_error += double{got[i]} - want[i];
        sum_bound += bound[i];
      }
    }
    if (sum_bound > 0) bias = sum_error / sum_bound;
  }
};

/// Keeps the largest ratio of the running test in its XML report, where a creeping error shows
/// before it fails. Only from the main thread.
inline void record_worst_ratio(double ratio) {
  static const ::testing::TestInfo* test = nullptr;
  static double worst = 0;
  const ::testing::TestInfo* current = ::testing::UnitTest::GetInstance()->current_test_info();
  if (current != test) worst = 0;
  test = current;
  worst = std::max(worst, ratio);
  ::testing::Test::RecordProperty("worst_ratio", std::to_string(worst));
}

/// Whether every element of `got` lies within `bound` of `want`, and random errors cancel: a mean
/// error above 5 % of the mean bound is a rounding or a key that is always wrong the same way. That
/// is judged on `bias_elements` and more, and needs data that is random, too.
inline ::testing::AssertionResult elements_within_bound(const char* name,
                                                        std::span<const float> got,
                                                        std::span<const double> want,
                                                        std::span<const double> bound) {
  constexpr std::size_t bias_elements = 1000;
  constexpr double bias_limit = 0.05;
  if (got.size() != want.size()) {
    return ::testing::AssertionFailure()
           << name << " has " << got.size() << " elements, the reference has " << want.size();
  }
  const bound_check check(got, want, bound);
  if (check.outside > 0) {
    const std::size_t i = check.worst;
    return ::testing::AssertionFailure()
           << name << ": " << check.outside << " of " << got.size()
           << " elements are out of bound; worst at " << i << ": got " << got[i] << ", want "
           << want[i] << ", error " << double{got[i]} - want[i] << ", bound " << bound[i]
           << ", ratio " << check.worst_ratio;
  }
  if (got.size() >= bias_elements && std::abs(check.bias) > bias_limit) {
    return ::testing::AssertionFailure() << name << " is biased: mean error is " << check.bias
                                         << " of the mean bound, worst ratio " << check.worst_ratio;
  }
  record_worst_ratio(check.worst_ratio);
  return ::testing::AssertionSuccess()
         << name << " is within bound, worst ratio " << check.worst_ratio;
}

/// Outputs and lse against the oracle. An empty `got_lse` leaves the lse unchecked.
inline ::testing::AssertionResult within_bound(std::span<const float> got_out,
                                               std::span<const float> got_lse,
                                               const reference::result& want) {
  const auto out = elements_within_bound("out", got_out, want.out, want.out_bound);
  if (!out || got_lse.empty()) return out;
  return elements_within_bound("lse", got_lse, want.lse, want.lse_bound);
}

/// Equal in every bit: tells 0 from -0 and one NaN from another.
inline ::testing::AssertionResult bit_equal(std::span<const float> a, std::span<const float> b) {
  if (a.size() != b.size()) {
    return ::testing::AssertionFailure() << "sizes differ: " << a.size() << " and " << b.size();
  }
  std::size_t different = 0;
  std::size_t first = 0;
  for (std::size_t i = a.size(); i-- > 0;) {
    if (std::bit_cast<std::uint32_t>(a[i]) == std::bit_cast<std::uint32_t>(b[i])) continue;
    ++different;
    first = i;
  }
  if (different == 0)
    return ::testing::AssertionSuccess() << "all " << a.size() << " elements are equal";
  return ::testing::AssertionFailure()
         << different << " of " << a.size() << " elements differ, first at " << first << ": "
         << a[first] << " and " << b[first];
}

}  // namespace test_support
