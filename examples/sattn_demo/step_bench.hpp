// SPDX-License-Identifier: Apache-2.0
//
// Runs methods token by token: the last tokens of a layer, behind all others as the prompt.
#pragma once

#include "measurement.hpp"

#include <sattn/attention/attend.hpp>
#include <sattn/kv/page_summaries.hpp>
#include <sattn/kv/paged_cache.hpp>
#include <sattn/kv/store_row.hpp>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace demo {

/// Measures the steps of one layer. Refers to the context, the layer and the settings.
class step_bench {
 public:
  static constexpr token_t page_size = 16;

  /// Tokens that are taken as steps, at most 16. Of several queries one stays for the prompt, which
  /// has all earlier keys; 0 where it would have none.
  static index_t steps_of(const layer& l) {
    if (l.q.tokens == 1) return l.k.tokens > 1 ? 1 : 0;
    return std::clamp<index_t>(l.q.tokens - 1, 0, 16);
  }

  step_bench(context& ctx, const layer& l, const settings& model, int repeats)
      : ctx_(ctx), layer_(l), model_(model), repeats_(repeats), steps_(steps_of(l)),
        history_(l.k.heads),
        dense_(steps_ * l.q.heads, l.v.dim),
        sparse_(steps_ * l.q.heads, l.v.dim) {
    make_copy();
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

  /// Why a method cannot run here; empty where it can.
  std::string obstacle(const method& m) const {
    if (m.needs_copy && !copy_) return "int8 cannot hold some of the keys";
    if (m.needs_prompt && prompt_.q.tokens == 0) return "the only query is a step, none a prompt's";
    return {};
  }

  /// Needs: no obstacle.
  measurement run(const method& method) {
    measurement m = best_of(repeats_, method, [&](measurement& once) {
      method.when == phase::cache ? run_cache(method, once) : run_steps(method, once);
    });
    relative_error error;
    for (std::size_t i = 0; i < dense_.out.size(); ++i) {
      error.add(double{sparse_.out[i]}, double{dense_.out[i]});
    }
    m.rel_error = error.value();
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
  /// Milliseconds of a step's work, as its part of the mean over all steps.
  template <class F>
  double step_ms(F&& work) const {
    return milliseconds(work) / static_cast<double>(steps_);
  }

  /// Of the keys alone: nobody reads its values.
  void make_copy() {
    const tensor& k = layer_.k;
    if (!sattn::can_store_row<std::int8_t>(k.values.data(), std::ssize(k.values))) return;
    copy_.emplace(sattn::kv_cache_options{.kv_heads = k.heads, .head_dim = k.dim, .page_size = 64,
                                          .capacity = k.tokens});
    copy_->append(k.view(), k.view());
  }
  /// What all queries of the prompt gave its keys.
  void remember_prompt() {
    const index_t q_len = layer_.q.tokens - steps_;
    const sattn::tensor_view<const float> queries = layer_.q.view().slice(0, q_len);
    std::vector<float> out(static_cast<std::size_t>(q_len * layer_.q.heads * layer_.v.dim));
    std::vector<float> lse(static_cast<std::size_t>(q_len * layer_.q.heads));
    std::vector<float> mass(static_cast<std::size_t>(prompt() * layer_.k.heads));
    prompt_ = {.shape = sattn::shape_of(queries, kv(prompt())), .q = queries,
               .k = kv(prompt()).k, .layer = model_.layer};
    if (q_len == 0) return;
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
    m.dense_ms += step_ms([&] {
      sattn::attend(ctx_, dense_plan_, q(step), kv(keys(step)), output(dense_, step));
    });
  }
  void run_steps(const method& method, measurement& m) {
    if (method.begin) method.begin(ctx_, {prompt_, model_});
    for (index_t step = 0; step < steps_; ++step) {
      const sattn::kv_view all = kv(keys(step));
      sight seen{{.shape = sattn::shape_of(q(step), all), .q = q(step), .k = all.k,
                  .summaries = bounds_[static_cast<std::size_t>(step)], .layer = model_.layer},
                 model_};
      seen.step = step;
      if (copy_) {
        seen.copy = copy_->view().k;
        seen.copy.tokens = keys(step);
      }
      std::optional<any_pattern> pattern;
      m.estimate_ms += step_ms([&] { pattern = method.choose(ctx_, seen); });
      m.plan_ms += step_ms([&] {
        sattn::plan_decode_into(ctx_, plan_, seen.inputs.shape, *pattern);
      });
      run_dense(step, m);
      m.ms += step_ms([&] { sattn::attend(ctx_, plan_, q(step), all, output(sparse_, step)); });
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
    const sight seen{.inputs = prompt_, .model = model_, .history = &history_};
    m.estimate_ms = milliseconds([&] { kept = method.choose_kept(ctx_, seen); });
    m.plan_ms = milliseconds([&] { cache.evict(kept); });
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
      m.ms += step_ms([&] { sattn::attend(ctx_, sequences); });
    }
  }

  context& ctx_;
  const layer& layer_;
  const settings& model_;
  int repeats_;
  index_t steps_;
  std::optional<sattn::paged_kv_cache<std::int8_t>> copy_;  // of the keys, where int8 holds them
  std::vector<std::vector<sattn::page_summaries>> bounds_;  // [steps][kv_heads]
  sattn::method_inputs prompt_;
  sattn::attention_history history_;
  sattn::attention_plan plan_, dense_plan_;
  rows dense_, sparse_;
};

}  // namespace demo
