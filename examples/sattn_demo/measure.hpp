// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "methods.hpp"
#include "reference.hpp"

#include <sattn/plan/attention_plan.hpp>

#include <string>
#include <vector>

namespace demo {

struct measurement {
  std::string pattern;
  std::string budget;
  sattn::plan_stats stats = {};
  // Milliseconds, each the best of all repeats.
  double estimate_ms = 0.0;
  double plan_ms = 0.0;
  double ms = 0.0;        // the attention alone
  double dense_ms = 0.0;  // dense attention alone, run in turn with this one
  double rel_error = 0.0;
  double recall = 0.0;  // attention mass of the selected keys, mean over rows and heads

  double speedup() const { return dense_ms / ms; }
  double speedup_end_to_end() const { return dense_ms / (estimate_ms + plan_ms + ms); }
};

/// Measures one layer. Keeps references to the context and the layer.
class layer_bench {
 public:
  layer_bench(sattn::context& ctx, const layer& l, int repeats);

  measurement dense();
  /// Needs dense() before it.
  measurement run(const method& m);

 private:
  struct result {
    std::vector<float> out;  // [q_len, q_heads, v_dim]
    std::vector<float> lse;  // [q_len, q_heads]
  };
  result make_result() const;
  double timed_attend(const sattn::attention_plan& plan, result& to);
  double recall(const result& sparse) const;
  double error(const result& r) const;

  sattn::context& ctx_;
  const layer& layer_;
  int repeats_;
  reference reference_;
  sattn::attention_plan dense_plan_;
  result dense_;
  result sparse_;
};

}  // namespace demo
