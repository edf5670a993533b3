// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/attention/attend.hpp>
#include <sattn/attention/plan.hpp>
#include <sattn/kv/store_row.hpp>

#include <cmath>
#include <limits>
#include <vector>

namespace sattn {

namespace detail {

/// As std::min and std::max, but NaN where either is.
inline double min_or_nan(double a, double b) { return b < a || std::isnan(b) ? b : a; }
inline double max_or_nan(double a, double b) { return b > a || std::isnan(b) ? b : a; }

}  // namespace detail

/// How much of full attention a plan keeps. NaN where the attention or the values are NaN.
struct recall_report {
  double mean = 1.0;   // share of the attention mass on the selected keys, over rows and heads
  double least = 1.0;  // of any row and head
  // No element of the output is further from that of full attention, but for roundings.
  double error_bound = 0.0;
};

/// The share of the attention mass that a plan's keys hold, from the lse of each row over them and
/// over all keys, and what the rest can change: |o_S - o| <= 2 (1 - recall) max|v|.
///
/// Runs attention twice, over the plan and over all keys of its domain. Rows that may see no key
/// count as whole. Sinks are not known here: recall is among the keys.
/// Shapes: q [q_len, q_heads, head_dim], kv [kv_len, kv_heads, dim].
/// Throws: shape_error as attend() does; std::bad_alloc.
/// Cost: dense attention, the plan's, and 2 * q_len * q_heads * v_dim floats.
/// Source: the identity o_S - o = (1 - r)(o_S - o_rest) of split softmax.
inline recall_report measure_recall(context& ctx, const attention_plan& plan,
                                    const tensor_view<const float>& q, const kv_view& kv,
                                    attention_options options = {}) {
  const attention_shape& shape = plan.shape();
  options.sink_logits = {};
  const auto rows = static_cast<std::size_t>(shape.q_len * shape.q_heads);
  std::vector<float> out(rows * static_cast<std::size_t>(kv.v.dim));
  const auto lse_of = [&](const attention_plan& of) {
    std::vector<float> lse(rows);
    attend(ctx, of, q, kv,
           {nhd(out.data(), shape.q_len, shape.q_heads, kv.v.dim),
            nhd(lse.data(), shape.q_len, shape.q_heads, 1)},
           options);
    return lse;
  };
  const std::vector<float> some = lse_of(plan);
  const std::vector<float> all =
      lse_of(plan_prefill(ctx, shape, dense{}, {.legal = plan.data().legal}));

  std::vector<double> largest(static_cast<std::size_t>(kv.v.heads), 0.0);  // |v| of each kv head
  std::vector<float> row(static_cast<std::size_t>(kv.v.dim));
  for (index_t h = 0; h < kv.v.heads; ++h) {
    const row_source values = kv.v.rows(h);
    for (index_t t = 0; t < kv.v.tokens; ++t) {
      load_row(values, static_cast<token_t>(t), kv.v.dim, row.data());
      for (const float x : row) {
        largest[static_cast<std::size_t>(h)] =
            detail::max_or_nan(largest[static_cast<std::size_t>(h)], std::abs(double{x}));
      }
    }
  }
  recall_report report;
  double sum = 0.0;
  for (std::size_t i = 0; i < rows; ++i) {
    constexpr float none = -std::numeric_limits<float>::infinity();
    const double recall =
        all[i] == none
            ? 1.0
            : detail::min_or_nan(1.0, std::exp(double{some[i]} - double{all[i]}));
    const index_t head = static_cast<index_t>(i) % shape.q_heads;
    sum += recall;
    report.least = detail::min_or_nan(report.least, recall);
    report.error_bound = detail::max_or_nan(
        report.error_bound,
        2.0 * (1.0 - recall) * largest[static_cast<std::size_t>(head / shape.group_size())]);
  }
  if (rows > 0) report.mean = sum / static_cast<double>(rows);
  return report;
}

}  // namespace sattn
