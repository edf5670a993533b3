// SPDX-License-Identifier: Apache-2.0
//
// What estimators should return, in double, and how far a float implementation may be from it.
#pragma once

#include <gtest/gtest.h>
#include <sattn/budget/select.hpp>
#include <sattn/estimate/scores.hpp>
#include <sattn/parallel/executor.hpp>
#include <sattn/parallel/thread_pool.hpp>
#include <sattn/pattern/block_mask.hpp>
#include <sattn/pattern/token_lists.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "reference/reference.hpp"
#include "support/plans.hpp"
#include "support/problem.hpp"
#include "support/random.hpp"

namespace test_support {

/// -inf with bound 0 where not legal.
struct bounded_scores {
  index_t sets;
  index_t rows;
  index_t cols;
  std::vector<double> value;  // [sets, rows, cols]
  std::vector<double> bound;  // like value

  bounded_scores(index_t set_count, index_t row_count, index_t col_count)
      : sets(set_count),
        rows(row_count),
        cols(col_count),
        value(test_support::at(set_count * row_count * col_count),
              -std::numeric_limits<double>::infinity()),
        bound(value.size(), 0) {}

  std::size_t at(index_t set, index_t row, index_t col) const {
    return test_support::at((set * rows + row) * cols + col);
  }
  bool legal(index_t set, index_t row, index_t col) const {
    return value[at(set, row, col)] != -std::numeric_limits<double>::infinity();
  }
};

namespace detail {

/// gamma(m) of reference.cpp: the relative error of m float operations in a row.
inline double rounding_of(double operations) {
  return operations * 0x1p-24 / (1 - operations * 0x1p-24);
}

/// Means of blocks of rows, rounded to float, which is what the reference reads.
struct pooled_rows {
  index_t blocks;
  index_t dim;
  std::vector<float> mean;        // [heads, blocks, dim]
  std::vector<double> magnitude;  // like mean: means of absolute values
  double error;                   // of a mean in float against `mean`, relative to the magnitude

  pooled_rows(const sattn::tensor_view<const float>& x, index_t block)
      : blocks((x.tokens + block - 1) / block),
        dim(x.dim),
        mean(at(x.heads * blocks * dim)),
        magnitude(mean.size()),
        // Additions, the division, the rounding to float here, and one more for the products of
        // errors; one row is its own mean.
        error(block == 1 ? 0 : rounding_of(static_cast<double>(block) + 2)) {
    for (index_t head = 0; head < x.heads; ++head) {
      for (index_t b = 0; b < blocks; ++b) {
        const index_t begin = b * block;
        const index_t end = std::min(begin + block, x.tokens);
        for (index_t i = 0; i < dim; ++i) {
          double sum = 0;
          double sum_of_magnitudes = 0;
          for (index_t t = begin; t < end; ++t) {
            sum += double{x.row(t, head)[i]};
            sum_of_magnitudes += std::abs(double{x.row(t, head)[i]});
          }
          const double count = static_cast<double>(end - begin);
          mean[first(head, b) + at(i)] = static_cast<float>(sum / count);
          magnitude[first(head, b) + at(i)] = sum_of_magnitudes / count;
        }
      }
    }
  }
  std::size_t first(index_t head, index_t block) const { return at((head * blocks + block) * dim); }
};

/// Whether any row of query block i may see any key of key block j, [q_blocks, k_blocks].
inline std::vector<std::uint8_t> legal_block_pairs(const sattn::attention_shape& shape,
                                                   const sattn::domain& legal, index_t q_block,
                                                   index_t k_block) {
  const index_t cols = (shape.kv_len + k_block - 1) / k_block;
  std::vector<std::uint8_t> pairs(at((shape.q_len + q_block - 1) / q_block * cols));
  for (index_t row = 0; row < shape.q_len; ++row) {
    for (index_t key = 0; key < shape.kv_len; ++key) {
      if (sees(legal, shape.q_offset + row, key)) {
        pairs[at(row / q_block * cols + key / k_block)] = 1;
      }
    }
  }
  return pairs;
}

/// One row of one query head: logits, or the softmax of them, with bounds.
struct row_oracle {
  reference::problem row;           // one query, one head
  std::span<const double> pooling;  // [kv_len], what means in float add to the error of a logit

  void logits(std::span<double> value, std::span<double> bound) const {
    for (index_t j = 0; j < row.kv_len; ++j) {
      if (!row.selected(0, 0, j)) continue;
      // The log-sum-exp of one key is its logit.
      reference::problem one = row;
      one.kv_len = 1;
      one.k.data += j * row.k.token_stride;
      one.selected = {};
      const reference::result logit = reference::attention(one);
      value[at(j)] = logit.lse[0];
      bound[at(j)] = logit.lse_bound[0] + pooling[at(j)];
    }
  }

  /// A probability is exp(logit - lse), both of which have bounds.
  void probabilities(std::span<double> value, std::span<double> bound) const {
    constexpr double float_min = std::numeric_limits<float>::min();
    logits(value, bound);
    const std::vector<double> exact = reference::probabilities(row, 0, 0);
    const double lse_bound =
        reference::attention(row).lse_bound[0] + *std::max_element(pooling.begin(), pooling.end());
    for (index_t j = 0; j < row.kv_len; ++j) {
      if (!row.selected(0, 0, j)) continue;
      value[at(j)] = exact[at(j)];
      // Small ones may be flushed to 0; none is off by more than 1.
      const double moved = exact[at(j)] * std::expm1(bound[at(j)] + lse_bound);
      bound[at(j)] = std::min(moved + 4 * float_min, 1.0);
    }
  }
};

inline bounded_scores join_heads(const bounded_scores& heads, index_t kv_heads,
                                 sattn::head_reduce reduce) {
  if (reduce == sattn::head_reduce::none) return heads;
  bounded_scores joined(kv_heads, heads.rows, heads.cols);
  const index_t each = heads.sets / kv_heads;
  const double divisor = reduce == sattn::head_reduce::mean ? static_cast<double>(each) : 1;
  const std::size_t size = at(heads.rows * heads.cols);
  for (std::size_t i = 0; i < joined.value.size(); ++i) {
    double top = -std::numeric_limits<double>::infinity();
    double top_bound = 0;
    double sum = 0;
    double sum_bound = 0;
    for (std::size_t h = 0; h < at(each); ++h) {
      const std::size_t from = (i / size * at(each) + h) * size + i % size;
      top = std::max(top, heads.value[from]);
      top_bound = std::max(top_bound, heads.bound[from]);
      sum += heads.value[from];
      sum_bound += heads.bound[from] + rounding_of(static_cast<double>(each) + 1) *
                                           (std::abs(heads.value[from]) + heads.bound[from]);
    }
    if (top == -std::numeric_limits<double>::infinity()) continue;  // legal for all heads or none
    joined.value[i] = reduce == sattn::head_reduce::max ? top : sum / divisor;
    joined.bound[i] = reduce == sattn::head_reduce::max ? top_bound : sum_bound / divisor;
  }
  return joined;
}

}  // namespace detail

/// Scores of blocks of keys for blocks of queries from their means; blocks of one are single keys
/// and rows. With `probabilities`, the softmax of each row of them.
inline bounded_scores expected_scores(const attention_problem& p, const sattn::logit_rules& rules,
                                      token_t q_block, token_t k_block, bool probabilities) {
  const detail::pooled_rows q(p.q.view(), q_block);
  const detail::pooled_rows k(p.k.view(), k_block);
  const std::vector<std::uint8_t> legal =
      detail::legal_block_pairs(p.shape, rules.legal, q_block, k_block);
  const double scale =
      rules.scale ? double{*rules.scale} : 1 / std::sqrt(static_cast<double>(q.dim));
  const double pooling_error = (1 + q.error) * (1 + k.error) - 1;

  bounded_scores heads(p.shape.q_heads, q.blocks, k.blocks);
  std::vector<double> pooling(at(k.blocks));
  for (index_t head = 0; head < p.shape.q_heads; ++head) {
    const index_t kv_head = head / p.shape.group_size();
    for (index_t i = 0; i < q.blocks; ++i) {
      for (index_t j = 0; j < k.blocks; ++j) {
        double sum = 0;
        for (std::size_t d = 0; d < at(q.dim); ++d) {
          sum += q.magnitude[q.first(head, i) + d] * k.magnitude[k.first(kv_head, j) + d];
        }
        pooling[at(j)] = std::abs(scale) * pooling_error * sum;
      }
      const detail::row_oracle row{
          {.q_len = 1,
           .kv_len = k.blocks,
           .head_dim = q.dim,
           .q = {q.mean.data() + q.first(head, i), 0, 0},
           .k = {k.mean.data() + k.first(kv_head, 0), k.dim, 0},
           .scale = scale,
           .soft_cap = double{rules.soft_cap},
           .selected = [&](index_t, index_t,
                           index_t j) { return legal[at(i * k.blocks + j)] != 0; }},
          pooling};
      const std::size_t first = heads.at(head, i, 0);
      const std::span<double> value = std::span(heads.value).subspan(first, pooling.size());
      const std::span<double> bound = std::span(heads.bound).subspan(first, pooling.size());
      if (probabilities) {
        row.probabilities(value, bound);
      } else {
        row.logits(value, bound);
      }
    }
  }
  return detail::join_heads(heads, p.shape.kv_heads, rules.reduce);
}

/// The attention of every row.
inline bounded_scores expected_rows(const attention_problem& p, const sattn::logit_rules& rules) {
  return expected_scores(p, rules, 1, 1, true);
}

/// q . k in the order of d, with the roundings that fused products have.
inline float chain(const float* q, const float* k, index_t dim) {
  float sum = 0;
  for (index_t d = 0; d < dim; ++d) sum = std::fma(q[d], k[d], sum);
  return sum;
}

inline ::testing::AssertionResult within_bound(const sattn::score_tensor& got,
                                               const bounded_scores& want) {
  if (got.sets != want.sets || got.rows != want.rows || got.cols != want.cols) {
    return ::testing::AssertionFailure()
           << "scores are [" << got.sets << ", " << got.rows << ", " << got.cols << "], not ["
           << want.sets << ", " << want.rows << ", " << want.cols << "]";
  }
  return elements_within_bound("scores", got.values, want.value, want.bound);
}

inline std::span<const token_t> list_of(const sattn::token_lists& lists, index_t i) {
  return std::span(lists.tokens)
      .subspan(at(lists.indptr[at(i)]), at(lists.indptr[at(i + 1)] - lists.indptr[at(i)]));
}
inline std::span<const token_t> list_of(const sattn::block_lists& lists, index_t i) {
  return std::span(lists.indices)
      .subspan(at(lists.indptr[at(i)]), at(lists.indptr[at(i + 1)] - lists.indptr[at(i)]));
}
inline bool holds(std::span<const token_t> list, index_t unit) {
  return std::binary_search(list.begin(), list.end(), unit);
}

/// Whether `chosen` (ascending) are `count` legal units, or all there are, and none of them is
/// worse than one left out by more than the bounds allow.
inline ::testing::AssertionResult are_the_best(std::span<const token_t> chosen, index_t count,
                                               const bounded_scores& scores, index_t set,
                                               index_t row) {
  constexpr double far = std::numeric_limits<double>::infinity();
  double worst_chosen = far;
  double best_left_out = -far;
  index_t legal = 0;
  std::size_t next = 0;
  for (index_t j = 0; j < scores.cols; ++j) {
    const std::size_t i = scores.at(set, row, j);
    const bool is_chosen = next < chosen.size() && chosen[next] == j;
    if (is_chosen) ++next;
    if (!scores.legal(set, row, j)) {
      if (is_chosen) return ::testing::AssertionFailure() << "unit " << j << " is not legal";
      continue;
    }
    ++legal;
    if (is_chosen) worst_chosen = std::min(worst_chosen, scores.value[i] + scores.bound[i]);
    if (!is_chosen) best_left_out = std::max(best_left_out, scores.value[i] - scores.bound[i]);
  }
  if (next != chosen.size()) return ::testing::AssertionFailure() << "positions do not ascend";
  if (std::ssize(chosen) != std::min(count, legal)) {
    return ::testing::AssertionFailure()
           << chosen.size() << " units chosen of " << legal << " legal ones for " << count;
  }
  if (worst_chosen < best_left_out) {
    return ::testing::AssertionFailure() << "a unit of at most " << worst_chosen
                                         << " was preferred to one of at least " << best_left_out;
  }
  return ::testing::AssertionSuccess();
}

// ---- contexts that must not matter

/// Two workers in turn, the last task first.
class backwards_executor {
 public:
  index_t concurrency() const { return 2; }
  template <class F>
  void parallel_for(index_t n, F&& f) {
    for (index_t task = n; task-- > 0;) f(task, task % 2);
  }
};

/// Contexts of one set of kernels with one, two and three threads, and with tasks in reverse.
class thread_contexts {
 public:
  sattn::context& serial() { return contexts_.front(); }
  auto begin() { return contexts_.begin(); }
  auto end() { return contexts_.end(); }

 private:
  sattn::serial_executor serial_;
  sattn::thread_pool two_{2};
  sattn::thread_pool three_{3};
  backwards_executor backwards_;
  const sattn::kernel_table& kernels_ = *kernel_tables().back();
  std::vector<sattn::context> contexts_ = make();

  std::vector<sattn::context> make() {
    std::vector<sattn::context> contexts;
    contexts.emplace_back(serial_, kernels_);
    contexts.emplace_back(two_, kernels_);
    contexts.emplace_back(three_, kernels_);
    contexts.emplace_back(backwards_, kernels_);
    return contexts;
  }
};

/// Rules of any kind for random problems.
inline sattn::logit_rules random_rules(random_source& random) {
  sattn::logit_rules rules;
  rules.legal.causal = random.integer(0, 4) != 0;
  if (random.integer(0, 3) == 0) rules.legal.window = static_cast<token_t>(random.integer(1, 200));
  if (random.integer(0, 4) == 0) rules.legal.prefix = static_cast<token_t>(random.integer(1, 200));
  if (random.integer(0, 2) == 0) rules.scale = random.pick({0.0f, 0.01f, 1.0f, -0.5f, 3.0f});
  if (random.integer(0, 2) == 0) rules.soft_cap = random.pick({0.5f, 30.0f});
  rules.reduce = random.pick({sattn::head_reduce::none, sattn::head_reduce::sum,
                              sattn::head_reduce::mean, sattn::head_reduce::max});
  return rules;
}

inline constexpr sattn::head_reduce all_reductions[] = {
    sattn::head_reduce::none, sattn::head_reduce::sum, sattn::head_reduce::mean,
    sattn::head_reduce::max};

}  // namespace test_support
