// SPDX-License-Identifier: Apache-2.0
//
// Benchmarks of methods that choose for each token: f16, 4 query heads on a kv head, one thread.
#pragma once

#include <functional>
#include <memory>
#include <sattn/sattn.hpp>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "support/caches.hpp"
#include "support/measure.hpp"
#include "support/method_prefill.hpp"
#include "support/prompt.hpp"
#include "support/workload.hpp"

namespace bench {

/// Caches of f16 that no processor cache holds, with bounds of their pages and an int8 copy of the
/// keys. Some methods need several kv heads: a sequence then is so many caches.
class decode_data {
 public:
  static constexpr index_t group = 4;
  static constexpr index_t page_size = 16;
  static constexpr index_t dim = 128;
  static constexpr index_t most_heads = 2;

  explicit decode_data(index_t tokens)
      : tokens_(tokens), caches_(sattn::dtype::f16, tokens, dim, dim, page_size, false, most_heads),
        copies_(sattn::dtype::i8, tokens, dim, dim, 0, true, caches_.count()),
        q_(random_floats(most_heads * group * dim, 1)), out_(q_) {
    for (index_t i = 0; i < caches_.count(); ++i) {
      summaries_.emplace_back(
          sattn::page_summaries({dim, page_size, sattn::dtype::i8}));
      summaries_.back().update(caches_.view(i).k, 0);
    }
  }

  /// The data of the last length asked for, which is made once for all methods.
  static decode_data& of(index_t tokens) {
    static std::unique_ptr<decode_data> last;
    if (!last || last->tokens_ != tokens) {
      last.reset();  // two would be too much memory
      last = std::make_unique<decode_data>(tokens);
    }
    return *last;
  }

  index_t sequences(index_t kv_heads) const { return caches_.count() / kv_heads; }
  sattn::kv_view kv(index_t sequence, index_t kv_heads) const {
    return caches_.view(sequence * kv_heads, tokens_, kv_heads);
  }
  sattn::stored_view copy(index_t sequence, index_t kv_heads) const {
    return copies_.view(sequence * kv_heads, tokens_, kv_heads).k;
  }
  std::span<const sattn::page_summaries> summaries(index_t sequence, index_t kv_heads) const {
    return std::span(summaries_).subspan(static_cast<std::size_t>(sequence * kv_heads),
                                         static_cast<std::size_t>(kv_heads));
  }
  attention_shape shape(index_t kv_heads) const {
    return {1, tokens_, kv_heads * group, kv_heads, static_cast<token_t>(tokens_ - 1)};
  }
  sattn::tensor_view<const float> q_view(index_t kv_heads) const {
    return sattn::nhd<const float>(q_.data(), 1, kv_heads * group, dim);
  }
  sattn::tensor_view<float> out_view(index_t kv_heads) {
    return sattn::nhd(out_.data(), 1, kv_heads * group, dim);
  }

 private:
  index_t tokens_;
  stored_caches caches_;
  stored_caches copies_;
  std::vector<sattn::page_summaries> summaries_;
  std::vector<float> q_, out_;
};

struct decode_method {
  const char* name;
  const char* budget;
  std::function<sattn::any_method(const sattn::stored_view& copy, index_t kv_len)> made_for;
  index_t kv_heads = 1;
};

/// With as many keys for all, or the share of the attention that the source sets.
inline std::vector<decode_method> decode_methods() {
  using namespace sattn;  // NOLINT(google-build-using-namespace)
  constexpr index_t keys = 1024;
  constexpr const char* budget = "budget1024";
  using copy = stored_view;
  return {
      {"streaming", budget,
       [](const copy&, index_t) { return streaming(4, keys - 4); }},
      {"duo", "gates0.50",
       [](const copy&, index_t) { return duo{{true, false}, 64, 256}; }, 2},
      {"quest", budget, [](const copy&, index_t) { return quest(keys); }},
      {"sf_quest", budget, [](const copy&, index_t) { return sf_quest(keys); }},
      {"sf_quest_unshared", budget,
       [](const copy&, index_t) { return sf_quest(keys, 16, false); }},
      {"top_k", budget, [](const copy&, index_t) { return top_k(keys); }},
      {"shadow_top_k", budget,
       [](const copy& shadow, index_t) {
         return shadow_top_k(keys, shadow, head_reduce::mean);
       }},
      {"twilight", "coverage0.85",
       [](const copy& shadow, index_t) { return twilight(0.85, shadow); }},
      {"twilight_quest", "coverage0.85",
       [](const copy& shadow, index_t kv_len) {
         return twilight(sf_quest(kv_len / 4), 0.85, shadow);
       }},
  };
}

/// With the defaults of their sources, those that have some.
inline std::vector<decode_method> published_decode_methods() {
  using namespace sattn;  // NOLINT(google-build-using-namespace)
  constexpr const char* budget = "published";
  using copy = stored_view;
  return {
      {"duo", budget, [](const copy&, index_t) { return duo{{true, false}}; }, 2},
      {"quest", budget, [](const copy&, index_t) { return quest(); }},
      {"sf_quest", budget, [](const copy&, index_t) { return sf_quest(); }},
      {"sf_quest_unshared", budget,
       [](const copy&, index_t) { return sf_quest(1024, 16, false); }},
      {"twilight", budget,
       [](const copy& shadow, index_t) { return twilight(0.85, shadow); }},
      {"twilight_quest", budget,
       [](const copy& shadow, index_t kv_len) {
         return twilight(sf_quest(kv_len / 4), 0.85, shadow);
       }},
  };
}

inline void run_decode(benchmark::State& state, const decode_method& m, index_t tokens,
                       bool smoke) {
  decode_data& data = decode_data::of(tokens);
  const index_t heads = m.kv_heads;
  sattn::serial_executor serial;
  sattn::context ctx(serial);
  const sattn::attention_plan dense = plan_decode(ctx, data.shape(heads), sattn::dense{});
  index_t sequence = 0;
  sattn::method_plan planned;
  std::vector<double> estimating;
  const auto attend = [&](const sattn::attention_plan& plan, index_t to) {
    sattn::attend(ctx, plan, data.q_view(heads), data.kv(to, heads), data.out_view(heads));
  };
  index_t other = 0;
  timed_case c{.from_memory = true, .smoke = smoke};
  c.reference = [&] {
    other = (other + 1) % data.sequences(heads);
    attend(dense, other);
  };
  c.run = [&] {
    sequence = (sequence + 1) % data.sequences(heads);
    plan_decode_into(ctx, planned, data.q_view(heads), data.kv(sequence, heads),
                     m.made_for(data.copy(sequence, heads), tokens),
                     {.summaries = data.summaries(sequence, heads)});
    estimating.push_back(planned.estimate_ms);
    attend(planned.plan, sequence);
  };
  const timings t = measure(state, c);

  const double run = median(t.run);
  auto& counters = state.counters;
  counters["dense_ms"] = run / median(t.ratio) * 1e3;
  counters["total_ms"] = run * 1e3;
  counters["estimate_ms"] = median(estimating);
  counters["estimate_share"] = median(estimating) * 1e-3 / run;
  counters["speedup"] = 1 / median(t.ratio);
  report_pairs(state, planned.plan.stats());
  counters["recall"] = sattn::measure_recall(ctx, planned.plan, data.q_view(heads),
                                             data.kv(sequence, heads)).mean;
}

inline void add_decode_cases() {
  const auto add = [](const std::vector<decode_method>& methods, index_t tokens, bool smoke) {
    for (const decode_method& m : methods) {
      add_case(text("method/decode/", m.name, "/f16/g", decode_data::group, "/d", decode_data::dim,
                    "/n", tokens, "/", m.budget),
               smoke, [=](benchmark::State& state) { run_decode(state, m, tokens, smoke); });
    }
  };
  add(decode_methods(), 4096, true);
  add(published_decode_methods(), 4096, true);
  for (const index_t tokens : {1024, 2048, 4096, 8192, 16384, 32768, 131072}) {
    if (tokens <= 32768) add(published_decode_methods(), tokens, false);
    if (tokens >= 32768) add(decode_methods(), tokens, false);
  }
}

}  // namespace bench
