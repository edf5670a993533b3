// SPDX-License-Identifier: Apache-2.0
//
// Benchmarks of methods that choose for a whole prompt: one head, causal, one thread.
#pragma once

#include <cmath>
#include <functional>
#include <optional>
#include <sattn/sattn.hpp>
#include <string>
#include <vector>

#include "support/measure.hpp"
#include "support/prompt.hpp"
#include "support/workload.hpp"

namespace bench {

struct prefill_method {
  const char* name;
  sattn::any_method published;  // with the defaults of its source
  double least, most;    // budgets between which the search for a density looks
  std::function<sattn::any_method(double budget)> with_budget;
};

inline std::vector<prefill_method> prefill_methods() {
  using namespace sattn;  // NOLINT(google-build-using-namespace)
  const auto tokens = [](double x) { return static_cast<token_t>(std::lround(x)); };
  return {
      {"a_shape", any_method(a_shape{}), 16, 30000,
       [=](double b) { return any_method(a_shape{128, tokens(b)}); }},
      {"tri_shape", any_method(tri_shape{}), 16, 30000,
       [=](double b) { return any_method(tri_shape{128, tokens(b), 100}); }},
      {"minference", any_method(minference()), 4, 8000,
       [=](double b) { return any_method(minference(tokens(b), 100 + tokens(b))); }},
      {"sf_vertical_slash", any_method(sf_vertical_slash()), 4, 8000,
       [=](double b) { return any_method(sf_vertical_slash(tokens(b), 64 + tokens(b))); }},
      {"sf_flexprefill", any_method(sf_flexprefill()), 0.01, 0.99,
       [=](double b) { return any_method(sf_flexprefill(b, 512, 64)); }},
      {"flexprefill", any_method(flexprefill{}), 0.01, 0.99,
       [=](double b) { return any_method(flexprefill(b, 0.1, 128)); }},
      {"sf_block_sparse", any_method(sf_block_sparse()), 3, 1500,
       [=](double b) { return any_method(sf_block_sparse(16, tokens(b))); }},
      {"minference_block", any_method(minference_block()), 1, 400,
       [=](double b) { return any_method(minference_block(tokens(b))); }},
      {"xattention", any_method(xattention{}), 0.01, 0.99,
       [=](double b) { return any_method(xattention(16, b)); }},
  };
}

/// The budget whose plan executes about this share of the legal pairs.
inline double budget_for(sattn::context& ctx, const prompt& data, const prefill_method& m,
                         double density) {
  double low = std::log(m.least), high = std::log(m.most);
  for (int i = 0; i < 9; ++i) {
    const double middle = (low + high) / 2;
    const sattn::method_plan planned = sattn::plan_prefill(ctx, data.q_view(), data.kv(),
                                                           m.with_budget(std::exp(middle)));
    (planned.plan.stats().density_executed() < density ? low : high) = middle;
  }
  return std::exp((low + high) / 2);
}

/// `density`: of the executed pairs; none = the published budget.
inline void run_prefill(benchmark::State& state, const prefill_method& m, index_t len,
                        std::optional<double> density, bool smoke) {
  prompt data(len, 1, 1);
  sattn::serial_executor serial;
  sattn::context ctx(serial);
  const sattn::attention_plan dense = plan_prefill(ctx, data.shape(), sattn::dense{});
  sattn::any_method method = m.published;
  if (density) {
    const double budget = budget_for(ctx, data, m, *density);
    method = m.with_budget(budget);
    state.counters["budget"] = budget;
  }
  sattn::method_plan planned;
  std::vector<double> estimating;
  timed_case c{.smoke = smoke};
  c.reference = [&] { sattn::attend(ctx, dense, data.q_view(), data.kv(), data.out_view()); };
  c.plan = [&] {
    planned = plan_prefill(ctx, data.q_view(), data.kv(), method);
    estimating.push_back(planned.estimate_ms);
  };
  c.run = [&] { sattn::attend(ctx, planned.plan, data.q_view(), data.kv(), data.out_view()); };
  const timings t = measure(state, c);

  const double run = median(t.run);
  const double total = run + median(t.plan);
  auto& counters = state.counters;
  counters["dense_ms"] = run / median(t.ratio) * 1e3;
  counters["total_ms"] = total * 1e3;
  counters["attention_ms"] = run * 1e3;
  counters["estimate_ms"] = median(estimating);
  counters["estimate_share"] = median(estimating) * 1e-3 / total;
  counters["speedup"] = run / total / median(t.ratio);
  report_pairs(state, planned.plan.stats());
  counters["recall"] = sattn::measure_recall(ctx, planned.plan, data.q_view(), data.kv()).mean;
}

inline void add_prefill_cases() {
  const auto add = [](const prefill_method& m, index_t len, std::optional<double> density,
                      const std::string& budget, bool smoke) {
    add_case(text("method/prefill/", m.name, "/d128/n", len, "/", budget), smoke,
             [=](benchmark::State& state) { run_prefill(state, m, len, density, smoke); });
  };
  for (const prefill_method& m : prefill_methods()) {
    add(m, 512, 0.5, "density0.50", true);
    add(m, 512, std::nullopt, "published", true);
  }
  for (const index_t len : {512, 1024, 2048, 4096, 8192, 16384, 32768}) {
    for (const prefill_method& m : prefill_methods()) {
      add(m, len, 0.20, "density0.20", false);
      add(m, len, 0.10, "density0.10", false);
      add(m, len, 0.05, "density0.05", false);
      if (len > 512) add(m, len, std::nullopt, "published", false);
    }
  }
}

}  // namespace bench
