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

/// What was chosen, and the smallest difference that decided it: choices by float scores must agree
/// where it exceeds what rounding does to a score.
struct choice {
  units chosen;
  double gap = infinite;
};

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

/// The k largest; of equal ones the first. -inf is never chosen.
inline choice largest(const numbers& scores, index_t k) {
  std::vector<std::pair<double, index_t>> order;
  for (index_t i = 0; i < std::ssize(scores); ++i) {
    if (scores[at(i)] != -infinite) order.emplace_back(-scores[at(i)], i);
  }
  std::sort(order.begin(), order.end());
  choice result;
  k = std::clamp<index_t>(k, 0, std::ssize(order));
  for (index_t i = 0; i < k; ++i) result.chosen.insert(order[at(i)].second);
  if (k > 0 && k < std::ssize(order) && order[at(k)].first != -infinite) {
    result.gap = order[at(k)].first - order[at(k - 1)].first;
  }
  return result;
}

/// FlexPrefill's cover: the smallest k whose k largest exceed a share of the sum; and how far it is
/// from another k.
inline std::pair<index_t, double> cover(numbers scores, double share) {
  std::sort(scores.rbegin(), scores.rend());
  double all = 0;
  for (const double x : scores) all += x;
  double sum = 0;
  double gap = infinite;
  index_t k = 0;
  while (k < std::ssize(scores) && sum <= share * all) {
    gap = std::min(gap, share * all - sum);
    sum += scores[at(k++)];
  }
  return {k, std::min(gap, sum - share * all)};
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
