// SPDX-License-Identifier: Apache-2.0
#include "measure.hpp"

#include <sattn/attention/attend.hpp>
#include <sattn/pattern/basic.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <optional>

namespace demo {

namespace {

constexpr index_t reference_rows = 64;
constexpr double not_measured = std::numeric_limits<double>::infinity();

template <class F>
double milliseconds(F&& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
      .count();
}

}  // namespace

layer_bench::layer_bench(sattn::context& ctx, const layer& l, int repeats)
    : ctx_(ctx),
      layer_(l),
      repeats_(repeats),
      reference_(make_reference(ctx, l, reference_rows)),
      dense_(make_result()),
      sparse_(make_result()) {}

layer_bench::result layer_bench::make_result() const {
  const index_t rows = layer_.q.tokens * layer_.q.heads;
  return {std::vector<float>(static_cast<std::size_t>(rows * layer_.v.dim)),
          std::vector<float>(static_cast<std::size_t>(rows))};
}

double layer_bench::timed_attend(const sattn::attention_plan& plan, result& to) {
  const sattn::attention_output output(
      sattn::nhd(to.out.data(), layer_.q.tokens, layer_.q.heads, layer_.v.dim),
      sattn::nhd(to.lse.data(), layer_.q.tokens, layer_.q.heads, 1));
  return milliseconds(
      [&] { sattn::attend(ctx_, plan, layer_.q.view(), layer_.kv(), output); });
}

double layer_bench::error(const result& r) const {
  return relative_error(
      reference_, sattn::nhd(r.out.data(), layer_.q.tokens, layer_.q.heads, layer_.v.dim));
}

double layer_bench::recall(const result& sparse) const {
  double sum = 0.0;
  for (std::size_t i = 0; i < sparse.lse.size(); ++i) {
    const double log_share =
        static_cast<double>(sparse.lse[i]) - static_cast<double>(dense_.lse[i]);
    // Rounding can lift the share above 1. A NaN of the input stays one.
    sum += log_share > 0.0 ? 1.0 : std::exp(log_share);
  }
  return sum / static_cast<double>(sparse.lse.size());
}

measurement layer_bench::dense() {
  measurement m{.pattern = "dense", .budget = "all"};
  m.plan_ms = milliseconds(
      [&] { dense_plan_ = sattn::plan_prefill(ctx_, layer_.shape(), sattn::dense{}); });
  m.stats = dense_plan_.stats();
  timed_attend(dense_plan_, dense_);  // grows the context's memory and warms the caches
  m.ms = not_measured;
  for (int i = 0; i < repeats_; ++i) m.ms = std::min(m.ms, timed_attend(dense_plan_, dense_));
  m.dense_ms = m.ms;
  m.rel_error = error(dense_);
  m.recall = recall(dense_);
  return m;
}

measurement layer_bench::run(const method& method) {
  measurement m{.pattern = method.pattern,
                .budget = method.budget,
                .estimate_ms = not_measured,
                .plan_ms = not_measured,
                .ms = not_measured,
                .dense_ms = not_measured};
  sattn::attention_plan plan;
  for (int i = 0; i < repeats_; ++i) {
    std::optional<sattn::any_pattern> pattern;
    m.estimate_ms = std::min(
        m.estimate_ms, milliseconds([&] { pattern = method.estimate(ctx_, layer_); }));
    m.plan_ms = std::min(m.plan_ms, milliseconds([&] {
                           sattn::plan_prefill_into(ctx_, plan, layer_.shape(), *pattern,
                                                    method.options);
                         }));
    m.dense_ms = std::min(m.dense_ms, timed_attend(dense_plan_, dense_));
    m.ms = std::min(m.ms, timed_attend(plan, sparse_));
  }
  m.stats = plan.stats();
  m.rel_error = error(sparse_);
  m.recall = recall(sparse_);
  return m;
}

}  // namespace demo
