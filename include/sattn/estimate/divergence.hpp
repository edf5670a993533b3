// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstddef>
#include <span>

namespace sattn {

/// The square root of the Jensen-Shannon divergence of two distributions over the same units, from
/// 0 (equal) to sqrt(ln 2) (disjoint); natural logarithm.
/// Both are divided by their sums; an empty one counts as equal to anything.
/// Source: FlexPrefill (arXiv:2502.20766), section 3.
inline double jensen_shannon_distance(std::span<const float> p, std::span<const float> q) {
  double p_sum = 0.0;
  double q_sum = 0.0;
  for (const float x : p) p_sum += double{x};
  for (const float x : q) q_sum += double{x};
  if (!(p_sum > 0.0) || !(q_sum > 0.0)) return 0.0;
  double divergence = 0.0;
  const auto half = [](double x, double mean) {
    return x > 0.0 ? 0.5 * x * std::log(x / mean) : 0.0;
  };
  for (std::size_t i = 0; i < p.size(); ++i) {
    const double a = double{p[i]} / p_sum;
    const double b = double{q[i]} / q_sum;
    divergence += half(a, 0.5 * (a + b)) + half(b, 0.5 * (a + b));
  }
  return std::sqrt(divergence > 0.0 ? divergence : 0.0);
}

}  // namespace sattn
