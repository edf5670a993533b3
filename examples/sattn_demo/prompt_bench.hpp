// SPDX-License-Identifier: Apache-2.0
//
// Runs methods over all queries of a layer at once.
#pragma once

#include "measurement.hpp"
#include "reference.hpp"

#include <sattn/attention/attend.hpp>

#include <optional>
#include <vector>

namespace demo {

inline constexpr index_t reference_rows = 64;

/// Measures one layer as a prompt. Refers to the context, the layer and the settings.
class prompt_bench {
 public:
  prompt_bench(context& ctx, const layer& l, const settings& model, int repeats)
      : ctx_(ctx),
        layer_(l),
        model_(model),
        repeats_(repeats),
        reference_(make_reference(ctx, l, reference_rows)),
        dense_plan_(sattn::plan_prefill(ctx, l.shape(), sattn::dense{})),
        dense_(l),
        sparse_(l) {
    attend(dense_plan_, dense_);  // grows the context's memory and warms the caches
  }

  measurement run(const method& method) {
    sattn::attention_plan plan;
    const sight seen{layer_.inputs(model_.layer), model_};
    measurement m = best_of(repeats_, method, [&](measurement& once) {
      std::optional<any_pattern> pattern;
      once.estimate_ms = milliseconds([&] { pattern = method.choose(ctx_, seen); });
      once.plan_ms = milliseconds([&] {
        sattn::plan_prefill_into(ctx_, plan, layer_.shape(), *pattern, method.options);
      });
      once.dense_ms = milliseconds([&] { attend(dense_plan_, dense_); });
      once.ms = milliseconds([&] { attend(plan, sparse_); });
    });
    m.stats = plan.stats();
    m.rel_error = error_of(reference_, sparse_.out_view(layer_));
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
  const settings& model_;
  int repeats_;
  reference reference_;
  sattn::attention_plan dense_plan_;
  result dense_;
  result sparse_;
};

}  // namespace demo
