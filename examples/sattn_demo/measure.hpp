// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "methods.hpp"
#include "reference.hpp"

#include <sattn/attention/attend.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <vector>

namespace demo {

inline constexpr index_t reference_rows = 64;
inline constexpr double not_measured = std::numeric_limits<double>::infinity();

struct measurement {
  phase when;
  std::string name;
  std::string budget;
  sattn::plan_stats stats = {};
  // Milliseconds, each the best of all repeats: of the prompt, or of a token.
  double estimate_ms = not_measured;
  double plan_ms = not_measured;
  double ms = not_measured;        // the attention alone
  double dense_ms = not_measured;  // dense attention alone, run in turn with this one
  double rel_error = 0.0;
  double recall = 0.0;  // attention mass of the selected keys, mean over rows and heads

  double speedup() const { return dense_ms / ms; }
  /// A cache is cut once, behind the prompt, and not for each token.
  double speedup_end_to_end() const {
    return when == phase::cache ? speedup() : dense_ms / (estimate_ms + plan_ms + ms);
  }
};

/// Lowers `best` to the milliseconds that `work` takes.
template <class F>
void take_time(double& best, F&& work) {
  using clock = std::chrono::steady_clock;
  const clock::time_point start = clock::now();
  work();
  best = std::min(best, std::chrono::duration<double, std::milli>(clock::now() - start).count());
}

/// The share of the attention mass that rows keep, by their lse.
inline double mean_recall(const std::vector<float>& sparse, const std::vector<float>& dense) {
  double sum = 0.0;
  for (std::size_t i = 0; i < sparse.size(); ++i) {
    const double log_share = double{sparse[i]} - double{dense[i]};
    // Rounding can lift the share above 1. A NaN of the input stays one.
    sum += log_share > 0.0 ? 1.0 : std::exp(log_share);
  }
  return sum / static_cast<double>(sparse.size());
}

/// Measures one layer as a prompt. Refers to the context and the layer.
class layer_bench {
 public:
  layer_bench(context& ctx, const layer& l, int repeats)
      : ctx_(ctx),
        layer_(l),
        repeats_(repeats),
        reference_(make_reference(ctx, l, reference_rows)),
        dense_plan_(sattn::plan_prefill(ctx, l.shape(), sattn::dense{})),
        dense_(l),
        sparse_(l) {
    attend(dense_plan_, dense_);  // grows the context's memory and warms the caches
  }

  measurement run(const method& method) {
    measurement m{.when = method.when, .name = method.name, .budget = method.budget};
    sattn::attention_plan plan;
    for (int i = 0; i < repeats_; ++i) {
      std::optional<any_pattern> pattern;
      take_time(m.estimate_ms, [&] { pattern = method.choose(ctx_, {layer_.inputs()}); });
      take_time(m.plan_ms, [&] {
        sattn::plan_prefill_into(ctx_, plan, layer_.shape(), *pattern, method.options);
      });
      take_time(m.dense_ms, [&] { attend(dense_plan_, dense_); });
      take_time(m.ms, [&] { attend(plan, sparse_); });
    }
    if (method.name == "dense") m.ms = m.dense_ms = std::min(m.ms, m.dense_ms);
    m.stats = plan.stats();
    m.rel_error = relative_error(reference_, sparse_.out_view(layer_));
    m.recall = mean_recall(sparse_.lse, dense_.lse);
    return m;
  }

 private:
  struct result {
    std::vector<float> out;  // [q_len, q_heads, v_dim]
    std::vector<float> lse;  // [q_len, q_heads]

    explicit result(const layer& l)
        : out(static_cast<std::size_t>(l.q.tokens * l.q.heads * l.v.dim)),
          lse(static_cast<std::size_t>(l.q.tokens * l.q.heads)) {}
    sattn::tensor_view<float> out_view(const layer& l) {
      return sattn::nhd(out.data(), l.q.tokens, l.q.heads, l.v.dim);
    }
  };

  void attend(const sattn::attention_plan& plan, result& to) {
    const sattn::tensor_view<float> lse =
        sattn::nhd(to.lse.data(), layer_.q.tokens, layer_.q.heads, 1);
    sattn::attend(ctx_, plan, layer_.q.view(), layer_.kv(), {to.out_view(layer_), lse});
  }

  context& ctx_;
  const layer& layer_;
  int repeats_;
  reference reference_;
  sattn::attention_plan dense_plan_;
  result dense_;
  result sparse_;
};

}  // namespace demo
