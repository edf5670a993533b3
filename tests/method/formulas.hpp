// SPDX-License-Identifier: Apache-2.0
//
// The published methods as their papers and code write them, in double, sharing no code with the
// library: what is chosen, and how close the choice was.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <set>
#include <utility>
#include <vector>

#include "support/problem.hpp"

namespace formulas {

using test_support::at;
using test_support::attention_problem;
using test_support::index_t;

using numbers = std::vector<double>;
using units = std::set<index_t>;

inline constexpr double infinite = std::numeric_limits<double>::infinity();

/// What was chosen, and the smallest difference that decided it, less what rounding does to scores
/// in f32: below 0 the choice by them may be another.
struct choice {
  units chosen;
  double gap = infinite;
};

/// m roundings of f32 in a row, relative to the magnitude of what is computed.
inline double rounding_of(double m) { return m * 0x1p-24 / (1 - m * 0x1p-24); }

inline double dot(const float* a, const float* b, index_t dim) {
  double sum = 0;
  for (index_t i = 0; i < dim; ++i) sum += double{a[i]} * double{b[i]};
  return sum;
}

/// Attention probabilities of one row of one query head, causal; [kv_len].
inline numbers probabilities(const attention_problem& p, index_t head, index_t row) {
  const index_t dim = p.q.view().dim;
  const index_t position = p.shape.q_offset + row;
  numbers result(at(p.shape.kv_len), 0.0);
  double top = -infinite;
  for (index_t key = 0; key <= std::min(position, p.shape.kv_len - 1); ++key) {
    result[at(key)] = dot(p.q.row(row, head), p.k.row(key, head / p.shape.group_size()), dim) /
                      std::sqrt(static_cast<double>(dim));
    top = std::max(top, result[at(key)]);
  }
  double sum = 0;
  for (index_t key = 0; key <= std::min(position, p.shape.kv_len - 1); ++key) {
    sum += result[at(key)] = std::exp(result[at(key)] - top);
  }
  for (double& x : result) x /= sum;
  return result;
}

/// How far logits in f32 may be off, by the largest that these rows can have, |q| |k| / sqrt(dim):
/// products of rows and keys, or of what takes `more` roundings to make of several.
inline double logit_error(const attention_problem& p, index_t more = 0) {
  const auto longest = [](const test_support::owned_tensor& x) {
    double most = 0;
    for (index_t t = 0; t < x.view().tokens; ++t) {
      for (index_t h = 0; h < x.view().heads; ++h) {
        most = std::max(most, std::sqrt(dot(x.row(t, h), x.row(t, h), x.view().dim)));
      }
    }
    return most;
  };
  const auto dim = static_cast<double>(p.q.view().dim);
  // 6 for the argument of the exponential, the difference of two.
  return rounding_of(dim + 4 + 6 + static_cast<double>(more)) * longest(p.q) * longest(p.k) /
         std::sqrt(dim);
}
/// Roundings of the means of two blocks.
inline index_t means_of(index_t q_block, index_t k_block) { return q_block + k_block + 4; }

/// How far probabilities in f32, or sums of so many of them, may be off, relative to themselves, by
/// the derivation in reference.cpp.
inline double probability_error(const attention_problem& p, index_t terms = 1, index_t more = 0) {
  const auto keys = static_cast<double>(p.shape.kv_len);
  const double rescales = std::ceil(keys / 16);
  return std::expm1(2 * (logit_error(p, more) + rounding_of(4 + 5 * rescales))) +
         rounding_of(keys + rescales + 6 + static_cast<double>(terms));
}

/// Column sums and sums by distance of the last rows.
inline std::pair<numbers, numbers> last_rows(const attention_problem& p, index_t head,
                                             index_t rows) {
  numbers columns(at(p.shape.kv_len), 0.0), distances(columns);
  for (index_t row = std::max<index_t>(0, p.shape.q_len - rows); row < p.shape.q_len; ++row) {
    const numbers a = probabilities(p, head, row);
    for (index_t key = 0; key < p.shape.kv_len; ++key) {
      columns[at(key)] += a[at(key)];
      const index_t distance = p.shape.q_offset + row - key;
      if (distance >= 0) distances[at(distance)] += a[at(key)];
    }
  }
  return {columns, distances};
}

/// The k largest; of equal ones the first. -inf is never chosen. The gap is what is left of it
/// when scores are off by `error` of themselves.
inline choice largest(const numbers& scores, index_t k, double error = 0) {
  std::vector<std::pair<double, index_t>> order;
  for (index_t i = 0; i < std::ssize(scores); ++i) {
    if (scores[at(i)] != -infinite) order.emplace_back(-scores[at(i)], i);
  }
  std::sort(order.begin(), order.end());
  choice result;
  k = std::clamp<index_t>(k, 0, std::ssize(order));
  for (index_t i = 0; i < k; ++i) result.chosen.insert(order[at(i)].second);
  if (k > 0 && k < std::ssize(order) && order[at(k)].first != -infinite) {
    const double chosen = order[at(k - 1)].first, left = order[at(k)].first;
    result.gap = left - chosen;
    if (error > 0 && chosen != -infinite) result.gap += error * (left + chosen);
  }
  return result;
}

/// The fewest of the largest that reach a share of the sum; 0 is never chosen. `error` as above.
inline choice covering(const numbers& scores, double share, double error = 0) {
  std::vector<std::pair<double, index_t>> order;
  double all = 0;
  for (index_t i = 0; i < std::ssize(scores); ++i) {
    all += scores[at(i)];
    if (scores[at(i)] != 0) order.emplace_back(-scores[at(i)], i);
  }
  std::sort(order.begin(), order.end());
  choice result;
  double mass = 0;
  double last = -infinite;
  for (const auto& [negative, i] : order) {
    if (share < 1 && mass >= share * all) {
      result.gap = std::min(result.gap, negative - last + error * (negative + last));
      break;
    }
    mass -= negative;
    last = negative;
    if (share < 1) {
      result.gap =
          std::min(result.gap, std::abs(mass - share * all) - error * (mass + share * all));
    }
    result.chosen.insert(i);
  }
  return result;
}

/// FlexPrefill's cover: the smallest k whose k largest exceed a share of the sum; and how far it is
/// from another k.
inline std::pair<index_t, double> cover(numbers scores, double share, double error) {
  std::sort(scores.rbegin(), scores.rend());
  double all = 0;
  for (const double x : scores) all += x;
  const double target = share * all;
  double sum = 0;
  double gap = infinite;
  index_t k = 0;
  while (k < std::ssize(scores) && sum <= target) {
    gap = std::min(gap, target - sum - error * (target + sum));
    sum += scores[at(k++)];
  }
  return {k, std::min(gap, sum - target - error * (target + sum))};
}

/// pool1d(kernel `width`, stride 1, padding width / 2): an average divides by the kernel, zeros
/// behind the ends; a maximum ignores them.
inline numbers pool1d(const numbers& x, index_t width, bool maximum) {
  numbers result;
  for (index_t i = 0; i < std::ssize(x); ++i) {
    double sum = 0, top = -infinite;
    for (index_t j = std::max<index_t>(i - width / 2, 0);
         j <= std::min(i + width / 2, std::ssize(x) - 1); ++j) {
      sum += x[at(j)];
      top = std::max(top, x[at(j)]);
    }
    result.push_back(maximum ? top : sum / static_cast<double>(width));
  }
  return result;
}

/// A score and how far one in f32 may be from it.
struct bounded {
  double value = 0;
  double error = 0;
};

/// sum_c max(q[c] min_j[c], q[c] max_j[c]) over the keys of a page that exist.
inline bounded page_bound(const attention_problem& p, index_t head, index_t row, index_t page,
                          index_t page_size) {
  bounded sum;
  const index_t dim = p.q.view().dim;
  for (index_t c = 0; c < dim; ++c) {
    double low = infinite, high = -infinite;
    for (index_t t = page * page_size; t < std::min(p.shape.kv_len, (page + 1) * page_size); ++t) {
      const double x = p.k.row(t, head / p.shape.group_size())[c];
      low = std::min(low, x);
      high = std::max(high, x);
    }
    const double q = p.q.row(row, head)[c];
    sum.value += std::max(q * low, q * high);
    // Queries of one sign and of the other are summed apart, over a group first.
    sum.error += rounding_of(static_cast<double>(2 * dim + p.shape.group_size())) * std::abs(q) *
                 std::max(std::abs(low), std::abs(high));
  }
  return sum;
}

/// Mean query and key of a block, and their product.
inline double pooled(const attention_problem& p, index_t head, index_t i, index_t j,
                     index_t q_block, index_t k_block) {
  const index_t dim = p.q.view().dim;
  const auto mean = [&](const test_support::owned_tensor& x, index_t of_head, index_t begin,
                        index_t end) {
    numbers sum(at(dim), 0.0);
    for (index_t t = begin; t < end; ++t) {
      for (index_t d = 0; d < dim; ++d) sum[at(d)] += double{x.row(t, of_head)[d]};
    }
    for (double& s : sum) s /= static_cast<double>(end - begin);
    return sum;
  };
  const numbers q = mean(p.q, head, i * q_block, std::min(p.shape.q_len, (i + 1) * q_block));
  const numbers k = mean(p.k, head / p.shape.group_size(), j * k_block,
                         std::min(p.shape.kv_len, (j + 1) * k_block));
  double sum = 0;
  for (index_t d = 0; d < dim; ++d) sum += q[at(d)] * k[at(d)];
  return sum / std::sqrt(static_cast<double>(dim));
}

inline numbers softmax(numbers x) {
  const double top = *std::max_element(x.begin(), x.end());
  double sum = 0;
  for (double& e : x) sum += e = std::exp(e - top);
  for (double& e : x) e /= sum;
  return x;
}

inline numbers blocks_of(const numbers& x, index_t block) {
  numbers sums(at((std::ssize(x) + block - 1) / block), 0.0);
  for (index_t i = 0; i < std::ssize(x); ++i) sums[at(i / block)] += x[at(i)];
  return sums;
}

}  // namespace formulas
