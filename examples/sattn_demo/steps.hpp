// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "measure.hpp"

#include <sattn/attention/attend.hpp>
#include <sattn/kv/page_summaries.hpp>
#include <sattn/kv/paged_cache.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

namespace demo {

/// Measures one layer token by token: the last ones, one after the other, behind all others as the
/// prompt. Refers to the context and the layer.
class step_bench {
 public:
  static constexpr token_t page_size = 16;

  /// Tokens that are taken as steps; 0 where there is no prompt behind them.
  static index_t steps_of(const layer& l) { return std::clamp<index_t>(l.q.tokens - 1, 0, 16); }

  step_bench(context& ctx, const layer& l, int repeats)
      : ctx_(ctx), layer_(l), repeats_(repeats), steps_(steps_of(l)),
        copy_({.kv_heads = l.k.heads, .head_dim = l.k.dim, .v_dim = l.v.dim, .page_size = 64,
               .capacity = l.k.tokens}),
        history_(l.k.heads),
        dense_(steps_ * l.q.heads, l.v.dim),
        sparse_(steps_ * l.q.heads, l.v.dim) {
    copy_.append(l.k.view(), l.v.view());
    std::vector<sattn::page_summaries> bounds(
        static_cast<std::size_t>(l.k.heads),
        sattn::page_summaries({l.k.dim, page_size, sattn::dtype::f16}));
    for (index_t step = 0; step < steps_; ++step) {
      for (index_t h = 0; h < l.k.heads; ++h) {
        bounds[static_cast<std::size_t>(h)].update(kv(keys(step)).k, h);
      }
      bounds_.push_back(bounds);
    }
    remember_prompt();
  }

  measurement run(const method& method) {
    measurement m{.when = method.when, .name = method.name, .budget = method.budget};
    for (int i = 0; i < repeats_; ++i) {
      measurement once = m;
      once.stats = {};
      once.estimate_ms = once.plan_ms = once.ms = once.dense_ms = 0.0;
      method.when == phase::cache ? run_cache(method, once) : run_steps(method, once);
      m.stats = once.stats;
      m.estimate_ms = std::min(m.estimate_ms, once.estimate_ms);
      m.plan_ms = std::min(m.plan_ms, once.plan_ms);
      m.ms = std::min(m.ms, once.ms);
      m.dense_ms = std::min(m.dense_ms, once.dense_ms);
    }
    if (method.name == "dense") m.ms = m.dense_ms = std::min(m.ms, m.dense_ms);
    double difference = 0.0, size = 0.0;
    for (std::size_t i = 0; i < dense_.out.size(); ++i) {
      const double d = double{sparse_.out[i]} - double{dense_.out[i]};
      difference += d * d;
      size += double{dense_.out[i]} * double{dense_.out[i]};
    }
    m.rel_error = std::sqrt(difference / size);
    m.recall = mean_recall(sparse_.lse, dense_.lse);
    return m;
  }

 private:
  struct rows {
    std::vector<float> out;  // [steps, q_heads, v_dim]
    std::vector<float> lse;  // [steps, q_heads]

    rows(index_t count, index_t dim)
        : out(static_cast<std::size_t>(count * dim)), lse(static_cast<std::size_t>(count)) {}
  };

  index_t prompt() const { return layer_.k.tokens - steps_; }
  index_t keys(index_t step) const { return prompt() + step + 1; }
  sattn::kv_view kv(index_t end) const {
    return sattn::kv(layer_.k.view().slice(0, end), layer_.v.view().slice(0, end));
  }
  sattn::tensor_view<const float> q(index_t step) const {
    const index_t row = layer_.q.tokens - steps_ + step;
    return layer_.q.view().slice(row, row + 1);
  }
  sattn::attention_output output(rows& to, index_t step) const {
    const index_t heads = layer_.q.heads, dim = layer_.v.dim;
    return {sattn::nhd(to.out.data() + step * heads * dim, 1, heads, dim),
            sattn::nhd(to.lse.data() + step * heads, 1, heads, 1)};
  }
  double share() const { return 1.0 / static_cast<double>(steps_); }

  /// What all queries of the prompt gave its keys.
  void remember_prompt() {
    const index_t q_len = layer_.q.tokens - steps_;
    const sattn::tensor_view<const float> queries = layer_.q.view().slice(0, q_len);
    std::vector<float> out(static_cast<std::size_t>(q_len * layer_.q.heads * layer_.v.dim));
    std::vector<float> lse(static_cast<std::size_t>(q_len * layer_.q.heads));
    std::vector<float> mass(static_cast<std::size_t>(prompt() * layer_.k.heads));
    prompt_ = {sattn::shape_of(queries, kv(prompt())), queries, kv(prompt()).k};
    sattn::attend(ctx_, sattn::plan_prefill(ctx_, prompt_.shape, sattn::dense{}), queries,
                  kv(prompt()),
                  {sattn::nhd(out.data(), q_len, layer_.q.heads, layer_.v.dim),
                   sattn::nhd(lse.data(), q_len, layer_.q.heads, 1),
                   sattn::hnd(mass.data(), prompt(), layer_.k.heads, 1)});
    for (index_t h = 0; h < layer_.k.heads; ++h) {
      history_.add(h, sattn::nhd<const float>(mass.data() + h * prompt(), prompt(), 1, 1));
    }
  }

  void run_dense(index_t step, measurement& m) {
    const sattn::attention_shape shape = sattn::shape_of(q(step), kv(keys(step)));
    sattn::plan_decode_into(ctx_, dense_plan_, shape, sattn::dense{});
    add_time(m.dense_ms, [&] {
      sattn::attend(ctx_, dense_plan_, q(step), kv(keys(step)), output(dense_, step));
    });
  }
  void run_steps(const method& method, measurement& m) {
    for (index_t step = 0; step < steps_; ++step) {
      const sattn::kv_view all = kv(keys(step));
      sight seen{{sattn::shape_of(q(step), all), q(step), all.k}, copy_.view().k};
      seen.inputs.summaries = bounds_[static_cast<std::size_t>(step)];
      seen.copy.tokens = keys(step);
      std::optional<any_pattern> pattern;
      add_time(m.estimate_ms, [&] { pattern = method.choose(ctx_, seen); });
      add_time(m.plan_ms, [&] {
        sattn::plan_decode_into(ctx_, plan_, seen.inputs.shape, *pattern);
      });
      run_dense(step, m);
      add_time(m.ms, [&] { sattn::attend(ctx_, plan_, q(step), all, output(sparse_, step)); });
      const sattn::plan_stats stats = plan_.stats();
      m.stats.legal += stats.legal;
      m.stats.selected += stats.selected;
      m.stats.executed += stats.executed;
    }
  }
  /// The heads of what is left are of different lengths: a sequence for each.
  void run_cache(const method& method, measurement& m) {
    sattn::paged_kv_cache<float> cache({.kv_heads = layer_.k.heads, .head_dim = layer_.k.dim,
                                        .v_dim = layer_.v.dim, .page_size = page_size,
                                        .capacity = layer_.k.tokens});
    cache.append(layer_.k.view().slice(0, prompt()), layer_.v.view().slice(0, prompt()));
    sattn::keep_lists kept;
    take_time_once(m.estimate_ms,
                   [&] { kept = method.choose_kept(ctx_, {prompt_, {}, &history_}); });
    take_time_once(m.plan_ms, [&] { cache.evict(kept); });
    const auto heads = static_cast<std::size_t>(layer_.k.heads);
    const index_t group = layer_.q.heads / layer_.k.heads;
    std::vector<sattn::attention_plan> plans(heads);
    for (index_t step = 0; step < steps_; ++step) {
      const index_t at = prompt() + step;
      cache.append(layer_.k.view().slice(at, at + 1), layer_.v.view().slice(at, at + 1));
      run_dense(step, m);
      std::vector<sattn::attention_sequence> sequences;
      const sattn::attention_output to = output(sparse_, step);
      for (index_t h = 0; h < layer_.k.heads; ++h) {
        sattn::attention_plan& plan = plans[static_cast<std::size_t>(h)];
        const auto of_head = q(step).head_slice(h * group, (h + 1) * group);
        const sattn::kv_view left = cache.view(h);
        sattn::plan_decode_into(ctx_, plan, sattn::shape_of(of_head, left), sattn::dense{});
        sequences.push_back({&plan, of_head, left,
                             {to.out.head_slice(h * group, (h + 1) * group),
                              to.lse.head_slice(h * group, (h + 1) * group)}});
        m.stats.legal += keys(step) * group;
        m.stats.selected += left.k.tokens * group;
        m.stats.executed += left.k.tokens * group;
      }
      add_time(m.ms, [&] { sattn::attend(ctx_, sequences); });
    }
  }

  /// Adds the milliseconds of a step's `work`, to a mean over the steps.
  template <class F>
  void add_time(double& mean, F&& work) const {
    double ms = not_measured;
    take_time(ms, work);
    mean += ms * share();
  }
  template <class F>
  static void take_time_once(double& ms, F&& work) {
    ms = not_measured;
    take_time(ms, work);
  }

  context& ctx_;
  const layer& layer_;
  int repeats_;
  index_t steps_;
  sattn::paged_kv_cache<std::int8_t> copy_;
  std::vector<std::vector<sattn::page_summaries>> bounds_;  // [steps][kv_heads]
  sattn::method_inputs prompt_;
  sattn::attention_history history_;
  sattn::attention_plan plan_, dense_plan_;
  rows dense_, sparse_;
};

}  // namespace demo
