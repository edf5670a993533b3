// SPDX-License-Identifier: Apache-2.0
//
// Methods end to end: estimate, plan, attention, against our own dense attention on the same data.
//
//   method/prefill/<method>/d128/n<tokens>/density<wanted>     one head, causal, one thread
//   method/decode/<method>/f16/g4/d128/n<tokens>/budget1024    one token, 4 query heads, 1 kv head
//
// Counters: speedup = dense / (estimate + plan + attention); estimate_share of the latter; density
// = executed / legal pairs; recall = attention mass of the selected keys, mean over rows. Prefill
// budgets are searched for until the executed density is the one wanted, before anything is timed.
// The data has what methods look for: neighbours alike, a sink, and noise.

#include <algorithm>
#include <cmath>
#include <functional>
#include <optional>
#include <random>
#include <sattn/sattn.hpp>
#include <string>
#include <utility>
#include <vector>

#include "support/caches.hpp"
#include "support/measure.hpp"
#include "support/workload.hpp"

namespace {

using bench::attention_shape;
using bench::index_t;
using bench::text;
using bench::token_t;
using sattn::any_pattern;
using sattn::context;
using sattn::method_inputs;

/// A method of any type, with a budget.
using chooser = std::function<any_pattern(context&, const method_inputs&, double budget)>;

struct any_method {
  const chooser* choose_with;
  double budget;
  any_pattern choose(context& ctx, const method_inputs& in) const {
    return (*choose_with)(ctx, in, budget);
  }
};

struct prefill_method {
  const char* name;
  double least, most;  // budgets between which the search looks
  chooser choose;
  sattn::plan_options options = {};
};

token_t tokens_of(double x) { return static_cast<token_t>(std::lround(x)); }

std::vector<prefill_method> prefill_methods() {
  using namespace sattn;  // NOLINT(google-build-using-namespace)
  const auto call = [](const auto& method, context& ctx, const method_inputs& in) {
    return any_pattern(method.choose(ctx, in));
  };
  return {
      {"a_shape", 16, 30000,
       [=](context& ctx, const method_inputs& in, double b) {
         return call(a_shape{128, tokens_of(b)}, ctx, in);
       }},
      {"minference", 4, 8000,
       [=](context& ctx, const method_inputs& in, double b) {
         return call(minference(tokens_of(b), 100 + tokens_of(b)), ctx, in);
       }},
      {"sf_vertical_slash", 4, 8000,
       [=](context& ctx, const method_inputs& in, double b) {
         return call(sf_vertical_slash(tokens_of(b), 64 + tokens_of(b)), ctx, in);
       }},
      {"sf_flexprefill", 0.01, 0.99,
       [=](context& ctx, const method_inputs& in, double b) {
         return call(sf_flexprefill(b, 512, 64), ctx, in);
       }},
      {"flexprefill", 0.01, 0.99,
       [=](context& ctx, const method_inputs& in, double b) {
         return call(flexprefill{.coverage = b, .min_budget = 128}, ctx, in);
       }},
      {"sf_block_sparse", 3, 1500,
       [=](context& ctx, const method_inputs& in, double b) {
         return call(sf_block_sparse(16, tokens_of(b)), ctx, in);
       }},
      {"block64", 1, 400,
       [=](context& ctx, const method_inputs& in, double b) {
         return call(sf_block_sparse(64, tokens_of(b)), ctx, in);
       }},
      {"xattention", 0.01, 0.99,
       [=](context& ctx, const method_inputs& in, double b) {
         return call(xattention{.threshold = b}, ctx, in);
       }},
  };
}

/// Queries and keys of one head: a slow walk that both follow, a sink, and noise.
struct head_data {
  attention_shape shape;
  index_t dim;
  std::vector<float> q, k, v, out;

  head_data(index_t len, index_t head_dim)
      : shape{len, len, 1, 1, 0}, dim(head_dim), q(static_cast<std::size_t>(len * dim)), k(q),
        v(bench::random_floats(len * dim, 3)), out(q) {
    std::minstd_rand random(1);
    std::normal_distribution<float> normal;
    std::vector<float> walk(static_cast<std::size_t>(dim));
    for (float& x : walk) x = normal(random);
    for (index_t t = 0; t < len; ++t) {
      for (index_t d = 0; d < dim; ++d) {
        float& w = walk[static_cast<std::size_t>(d)];
        w = 0.995f * w + 0.1f * normal(random);
        const auto at = static_cast<std::size_t>(t * dim + d);
        q[at] = w + normal(random) + (d % 16 == 0 ? 2.0f : 0.0f);
        k[at] = 0.7f * w + 0.7f * normal(random) + (t < 4 && d % 16 == 0 ? 6.0f : 0.0f);
      }
    }
  }
  sattn::tensor_view<const float> q_view() const {
    return sattn::nhd<const float>(q.data(), shape.q_len, 1, dim);
  }
  sattn::kv_view kv() const {
    return sattn::kv(sattn::nhd(k.data(), shape.kv_len, 1, dim),
                     sattn::nhd(v.data(), shape.kv_len, 1, dim));
  }
  sattn::tensor_view<float> out_view() { return sattn::nhd(out.data(), shape.q_len, 1, dim); }
};

/// The mean over rows of the attention mass that a plan keeps of another.
double recall_of(const std::vector<float>& lse, const std::vector<float>& all) {
  double sum = 0;
  for (std::size_t i = 0; i < lse.size(); ++i) {
    sum += std::min(1.0, std::exp(double{lse[i]} - double{all[i]}));
  }
  return sum / static_cast<double>(lse.size());
}

/// The budget whose plan executes about this share of the legal pairs.
double budget_for(context& ctx, const head_data& data, const prefill_method& m, double density) {
  const method_inputs in{data.shape, data.q_view(), data.kv().k};
  double low = std::log(m.least), high = std::log(m.most);
  for (int i = 0; i < 9; ++i) {
    const double middle = (low + high) / 2;
    const sattn::attention_plan plan =
        plan_prefill(ctx, data.shape, m.choose(ctx, in, std::exp(middle)), m.options);
    (plan.stats().density_executed() < density ? low : high) = middle;
  }
  return std::exp((low + high) / 2);
}

void run_prefill(benchmark::State& state, const prefill_method& m, index_t len, double density,
                 bool smoke) {
  head_data data(len, 128);
  sattn::serial_executor serial;
  context ctx(serial);
  const sattn::attention_plan dense = plan_prefill(ctx, data.shape, sattn::dense{});
  const any_method method{&m.choose, budget_for(ctx, data, m, density)};
  sattn::method_plan planned;
  std::vector<double> estimating;
  bench::timed_case c{.smoke = smoke};
  c.reference = [&] { sattn::attend(ctx, dense, data.q_view(), data.kv(), data.out_view()); };
  c.plan = [&] {
    planned = plan_prefill(ctx, data.q_view(), data.kv(), method, {.plan = m.options});
    estimating.push_back(planned.estimate_ms);
  };
  c.run = [&] { sattn::attend(ctx, planned.plan, data.q_view(), data.kv(), data.out_view()); };
  const bench::timings t = measure(state, c);

  std::vector<float> lse(static_cast<std::size_t>(len)), all(lse);
  const auto lse_of = [&](const sattn::attention_plan& plan, std::vector<float>& to) {
    sattn::attend(ctx, plan, data.q_view(), data.kv(),
                  {data.out_view(), sattn::nhd(to.data(), len, 1, 1)});
  };
  lse_of(planned.plan, lse);
  lse_of(dense, all);
  const sattn::plan_stats stats = planned.plan.stats();
  const double run = bench::median(t.run);
  const double total = run + bench::median(t.plan);
  auto& counters = state.counters;
  counters["dense_ms"] = run / bench::median(t.ratio) * 1e3;
  counters["total_ms"] = total * 1e3;
  counters["attention_ms"] = run * 1e3;
  counters["estimate_ms"] = bench::median(estimating);
  counters["estimate_share"] = bench::median(estimating) * 1e-3 / total;
  counters["speedup"] = run / total / bench::median(t.ratio);
  counters["density"] = stats.density_executed();
  counters["density_selected"] = stats.density_selected();
  counters["recall"] = recall_of(lse, all);
  counters["budget"] = method.budget;
}

// ---- decoding -----------------------------------------------------------------------------------

/// Caches of f16 that no processor cache holds, with bounds of their pages and an int8 copy of the
/// keys.
struct decode_data {
  static constexpr index_t group = 4;
  static constexpr index_t page_size = 16;
  bench::stored_caches caches;
  bench::stored_caches shadows;
  std::vector<std::vector<sattn::page_summaries>> summaries;
  std::vector<float> q, out;
  attention_shape shape;
  index_t next = 0;

  explicit decode_data(index_t tokens)
      : caches(sattn::dtype::f16, tokens, 128, 128, page_size, false),
        shadows(sattn::dtype::i8, tokens, 128, 128, 0, true, caches.count()),
        q(bench::random_floats(group * 128, 1)), out(q),
        shape{1, tokens, group, 1, static_cast<token_t>(tokens - 1)} {
    for (index_t i = 0; i < caches.count(); ++i) {
      summaries.emplace_back(1, sattn::page_summaries({128, page_size, sattn::dtype::i8}));
      summaries.back()[0].update(caches.view(i).k, 0);
    }
  }
  sattn::tensor_view<const float> q_view() const {
    return sattn::nhd<const float>(q.data(), 1, group, 128);
  }
  sattn::tensor_view<float> out_view() { return sattn::nhd(out.data(), 1, group, 128); }
};

struct decode_method {
  const char* name;
  std::function<any_pattern(context&, const method_inputs&, const sattn::stored_view& shadow)>
      choose;
};

std::vector<decode_method> decode_methods() {
  using namespace sattn;  // NOLINT(google-build-using-namespace)
  constexpr index_t budget_tokens = 1024;
  const auto call = [](const auto& method, context& ctx, const method_inputs& in) {
    return any_pattern(method.choose(ctx, in));
  };
  return {
      {"streaming", [=](context& ctx, const method_inputs& in, const stored_view&) {
         return call(streaming(4, budget_tokens - 4), ctx, in);
       }},
      {"quest", [=](context& ctx, const method_inputs& in, const stored_view&) {
         return call(quest(budget_tokens), ctx, in);
       }},
      {"sf_quest", [=](context& ctx, const method_inputs& in, const stored_view&) {
         return call(sf_quest(budget_tokens), ctx, in);
       }},
      {"top_k", [=](context& ctx, const method_inputs& in, const stored_view&) {
         return call(top_k(budget_tokens), ctx, in);
       }},
      {"shadow_top_k", [=](context& ctx, const method_inputs& in, const stored_view& shadow) {
         return call(shadow_top_k(budget_tokens, shadow, head_reduce::mean), ctx, in);
       }},
      {"twilight_quest", [=](context& ctx, const method_inputs& in, const stored_view& shadow) {
         return call(twilight(sf_quest(in.shape.kv_len / 4), 0.85, shadow), ctx, in);
       }},
  };
}

void run_decode(benchmark::State& state, const decode_method& m, index_t tokens, bool smoke) {
  decode_data data(tokens);
  sattn::serial_executor serial;
  context ctx(serial);
  const sattn::attention_plan dense = plan_decode(ctx, data.shape, sattn::dense{});
  const chooser choose = [&](context& with, const method_inputs& in, double) {
    return m.choose(with, in, data.shadows.view(data.next).k);
  };
  const any_method method{&choose, 0};
  sattn::method_plan planned;
  std::vector<double> estimating;
  index_t other = 0;
  bench::timed_case c{.from_memory = true, .smoke = smoke};
  c.reference = [&] {
    other = (other + 1) % data.caches.count();
    sattn::attend(ctx, dense, data.q_view(), data.caches.view(other), data.out_view());
  };
  c.run = [&] {
    data.next = (data.next + 1) % data.caches.count();
    const sattn::kv_view kv = data.caches.view(data.next);
    plan_decode_into(ctx, planned, data.q_view(), kv, method,
                     {.summaries = data.summaries[static_cast<std::size_t>(data.next)]});
    estimating.push_back(planned.estimate_ms);
    sattn::attend(ctx, planned.plan, data.q_view(), kv, data.out_view());
  };
  const bench::timings t = measure(state, c);
  std::vector<float> lse(decode_data::group), all(lse);
  const auto lse_of = [&](const sattn::attention_plan& plan, std::vector<float>& to) {
    sattn::attend(ctx, plan, data.q_view(), data.caches.view(data.next),
                  {data.out_view(), sattn::nhd(to.data(), 1, decode_data::group, 1)});
  };
  lse_of(planned.plan, lse);
  lse_of(dense, all);
  const double run = bench::median(t.run);
  auto& counters = state.counters;
  counters["dense_ms"] = run / bench::median(t.ratio) * 1e3;
  counters["total_ms"] = run * 1e3;
  counters["estimate_ms"] = bench::median(estimating);
  counters["estimate_share"] = bench::median(estimating) * 1e-3 / run;
  counters["speedup"] = 1 / bench::median(t.ratio);
  counters["density"] = planned.plan.stats().density_selected();
  counters["recall"] = recall_of(lse, all);
}

void add_cases(bool /*long_ones*/) {
  const auto add_prefill = [](const prefill_method& m, index_t len, const char* density,
                              bool smoke) {
    benchmark::RegisterBenchmark(
        text("method/prefill/", m.name, "/d128/n", len, "/density", density,
             smoke ? "/smoke" : "").c_str(),
        [=](benchmark::State& state) {
          run_prefill(state, m, len, std::stod(density), smoke);
        })->Unit(benchmark::kMillisecond);
  };
  const auto add_decode = [](const decode_method& m, index_t tokens, bool smoke) {
    benchmark::RegisterBenchmark(
        text("method/decode/", m.name, "/f16/g4/d128/n", tokens, "/budget1024",
             smoke ? "/smoke" : "").c_str(),
        [=](benchmark::State& state) { run_decode(state, m, tokens, smoke); })
        ->Unit(benchmark::kMillisecond);
  };
  for (const prefill_method& m : prefill_methods()) add_prefill(m, 512, "0.5", true);
  for (const decode_method& m : decode_methods()) add_decode(m, 4096, true);
  for (const index_t len : {512, 1024, 2048, 4096, 8192, 16384, 32768}) {
    for (const prefill_method& m : prefill_methods()) {
      for (const char* density : {"0.20", "0.10", "0.05"}) add_prefill(m, len, density, false);
    }
  }
  for (const index_t tokens : {32768, 131072}) {
    for (const decode_method& m : decode_methods()) add_decode(m, tokens, false);
  }
}

}  // namespace

int main(int argc, char** argv) { return bench::bench_main(argc, argv, add_cases); }
