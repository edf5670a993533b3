// SPDX-License-Identifier: Apache-2.0
//
// Benchmarks of methods that cut a cache behind a prompt: f16 in pages, 4 query heads on each of 2
// kv heads, one thread.
#pragma once

#include <functional>
#include <memory>
#include <sattn/sattn.hpp>
#include <utility>
#include <vector>

#include "support/machine.hpp"
#include "support/measure.hpp"
#include "support/prompt.hpp"
#include "support/workload.hpp"

namespace bench {

/// A prompt, and tokens behind it that look back. What takes a dense run over the prompt is
/// measured once.
class cache_data {
 public:
  static constexpr index_t kv_heads = 2;
  static constexpr index_t group = 4;
  static constexpr index_t later = 64;
  using cache = sattn::paged_kv_cache<sattn::f16>;

  explicit cache_data(index_t prompt_len)
      : len_(prompt_len), tokens_(len_ + later, kv_heads, group) {}

  /// The data of the last length asked for, which is made once for all methods.
  static cache_data& of(index_t prompt_len) {
    static std::unique_ptr<cache_data> last;
    if (!last || last->len_ != prompt_len) last = std::make_unique<cache_data>(prompt_len);
    return *last;
  }

  sattn::tensor_view<const float> q() const { return tokens_.q_view().slice(0, len_); }
  sattn::kv_view kv() const {
    return sattn::kv(tokens_.k_view().slice(0, len_), tokens_.v_view().slice(0, len_));
  }
  cache make_cache() const {
    cache made({.kv_heads = kv_heads, .head_dim = prompt::dim, .capacity = len_});
    made.append(tokens_.k_view().slice(0, len_), tokens_.v_view().slice(0, len_));
    return made;
  }

  /// Seconds of dense attention over the prompt.
  double dense_seconds(sattn::context& ctx) {
    if (dense_ == 0) dense_ = run_dense(ctx, {});
    return dense_;
  }
  /// The same where it also sums the mass of each key, and what that gave.
  double dense_seconds_with_mass(sattn::context& ctx) {
    if (dense_with_mass_ == 0) {
      std::vector<float> mass(static_cast<std::size_t>(len_ * kv_heads));
      dense_with_mass_ = run_dense(ctx, sattn::hnd(mass.data(), len_, kv_heads, 1));
      for (index_t h = 0; h < kv_heads; ++h) {
        history_.add(h, sattn::nhd<const float>(mass.data() + h * len_, len_, 1, 1));
      }
    }
    return dense_with_mass_;
  }
  const sattn::attention_history& history() const { return history_; }

  /// The share of what the later tokens give to the prompt that lies on the kept keys.
  double recall(sattn::context& ctx, const sattn::keep_lists& kept) const {
    const attention_shape shape{later, len_, kv_heads * group, kv_heads,
                                static_cast<token_t>(len_)};
    return sattn::measure_recall(ctx, plan_prefill(ctx, shape, sattn::columns_of(kept)),
                                 tokens_.q_view().slice(len_, len_ + later), kv()).mean;
  }

 private:
  double run_dense(sattn::context& ctx, const sattn::tensor_view<float>& mass) {
    const sattn::attention_plan plan =
        plan_prefill(ctx, sattn::shape_of(q(), kv()), sattn::dense{});
    std::vector<float> lse(static_cast<std::size_t>(len_ * kv_heads * group));
    const sattn::attention_output out{tokens_.out_view().slice(0, len_),
                                      sattn::nhd(lse.data(), len_, kv_heads * group, 1), mass};
    return seconds_of([&] { sattn::attend(ctx, plan, q(), kv(), out); });
  }

  index_t len_;
  prompt tokens_;
  double dense_ = 0, dense_with_mass_ = 0;
  sattn::attention_history history_{kv_heads};
};

struct cache_method {
  const char* name;
  std::function<sattn::keep_lists(sattn::context&, const sattn::method_inputs&, index_t keys)>
      choose_kept = {};
  bool by_history = false;  // h2o
};

inline std::vector<cache_method> cache_methods() {
  using namespace sattn;  // NOLINT(google-build-using-namespace)
  const auto made = [](const char* name, auto with_budget) {
    return cache_method{name, [=](context& ctx, const method_inputs& in, index_t keys) {
      return with_budget(keys, in.shape.kv_len).choose_kept(ctx, in);
    }};
  };
  return {
      made("snapkv", [](index_t keys, index_t) { return snapkv(keys); }),
      made("sf_snapkv", [](index_t keys, index_t) { return sf_snapkv(keys); }),
      made("ada_snapkv", [](index_t keys, index_t) { return ada_snapkv(keys); }),
      made("sf_ada_snapkv", [](index_t keys, index_t) { return sf_ada_snapkv(keys); }),
      // The layer in the middle, whose budget is the mean.
      made("pyramid", [](index_t keys, index_t kv_len) { return pyramid(15, 31, kv_len, keys); }),
      made("tova", [](index_t keys, index_t) { return tova{keys}; }),
      {.name = "h2o", .by_history = true},
  };
}

inline void run_cache(benchmark::State& state, const cache_method& m, index_t len, index_t keys,
                      bool smoke) {
  cache_data& data = cache_data::of(len);
  sattn::serial_executor serial;
  sattn::context ctx(serial);
  const double dense = data.dense_seconds(ctx);
  const double with_mass = m.by_history ? data.dense_seconds_with_mass(ctx) : 0;
  cache_data::cache cache = data.make_cache();
  sattn::keep_lists kept;
  timed_case c{.smoke = smoke};
  c.prepare = [&] { cache = data.make_cache(); };
  c.plan = [&] {
    const sattn::kv_view all = cache.view();
    kept = m.by_history
               ? sattn::h2o{keys / 2, keys / 2}.choose_kept(data.history())
               : m.choose_kept(ctx, {sattn::shape_of(data.q(), all), data.q(), all.k}, keys);
  };
  c.run = [&] { cache.evict(kept); };
  const timings t = measure(state, c);

  auto& counters = state.counters;
  counters["choose_ms"] = median(t.plan) * 1e3;
  counters["evict_ms"] = median(t.run) * 1e3;
  counters["dense_ms"] = dense * 1e3;
  if (m.by_history) counters["dense_with_mass_ms"] = with_mass * 1e3;
  counters["share_of_dense_prefill"] = (median(t.plan) + median(t.run)) / dense;
  counters["density"] = sattn::cache_choice{kept, len * cache_data::kv_heads}.report().density;
  counters["recall"] = data.recall(ctx, kept);
}

inline void add_cache_cases() {
  const auto add = [](index_t len, index_t keys, bool smoke) {
    for (const cache_method& m : cache_methods()) {
      add_case(text("method/cache/", m.name, "/f16/g", cache_data::group, "/d", prompt::dim, "/n",
                    len, "/budget", keys),
               smoke, [=](benchmark::State& state) { run_cache(state, m, len, keys, smoke); });
    }
  };
  add(1024, 256, true);
  for (const index_t len : {4096, 32768}) add(len, 1024, false);
}

}  // namespace bench
