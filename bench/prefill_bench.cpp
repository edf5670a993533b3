// SPDX-License-Identifier: Apache-2.0
//
// Prefill of one sequence with 4 query heads on one kv head: dense, sparse, and Eigen.
// Counters: docs/performance.md.

#include <algorithm>
#include <functional>
#include <optional>
#include <sattn/sattn.hpp>
#include <string>
#include <utility>
#include <vector>

#include "support/eigen_attention.hpp"
#include "support/measure.hpp"
#include "support/workload.hpp"

namespace {

using bench::index_t;
using bench::token_t;
using sattn::attention_plan;
using sattn::attention_shape;

constexpr index_t group_size = 4;

struct workload {
  std::string name;
  std::function<sattn::any_pattern(const attention_shape&)> pattern;
  token_t tile_rows = 0;
  sattn::rounding rounding = sattn::rounding::exact;
};

std::vector<workload> sparse_workloads() {
  std::vector<workload> all;
  for (const char* density : {"0.5", "0.25", "0.125"}) {
    all.push_back({std::string("block64/density") + density, [density](const attention_shape& s) {
                     return bench::random_blocks(s, 64, 64, std::stod(density), s.q_heads, 11);
                   }});
  }
  all.push_back({"window1024", [](const attention_shape&) { return sattn::sliding_window{1024}; }});
  const struct {
    const char* name;
    index_t runs, run_size, columns;
  } slashes[] = {{"isolated", 64, 1, 64}, {"runs16", 16, 16, 256}, {"runs64", 8, 64, 512}};
  for (const auto& slash : slashes) {
    const auto pattern = [slash](const attention_shape& s) {
      return bench::random_slashes(s.kv_len, slash.runs, slash.run_size,
                                   std::min(slash.columns, s.kv_len / 2));
    };
    const std::string name = std::string("vertical_slash_") + slash.name;
    all.push_back({name, pattern});
    all.push_back({name + "/shared8", pattern, 8});
    all.push_back({name + "/shared4", pattern, 4});
    all.push_back({name + "/cover", pattern, 0, sattn::rounding::cover});
  }
  for (const index_t count : {64, 128, 256, 512}) {
    const std::string name = "token_lists/k" + std::to_string(count);
    all.push_back({name, [count](const attention_shape& s) {
                     return bench::random_tokens(s, count, s.q_heads);
                   }});
    all.push_back({name + "/shared", [count](const attention_shape& s) {
                     return bench::random_tokens(s, count, 1);
                   }});
  }
  return all;
}

struct problem {
  index_t dim;
  index_t len;
  bool smoke = false;

  attention_shape shape() const { return {len, len, group_size, 1, 0}; }
  std::string name(const std::string& what) const {
    return "prefill/f32/d" + std::to_string(dim) + "/n" + std::to_string(len) + "/" + what +
           (smoke ? "/smoke" : "");
  }
};

/// Tensors and a thread; everything that a case times.
struct session {
  bench::tensors tensors;
  sattn::serial_executor serial;
  sattn::context ctx{serial};
  attention_plan dense;

  explicit session(const problem& p)
      : tensors(p.shape(), p.dim, p.len), dense(plan_prefill(ctx, p.shape(), sattn::dense{})) {}

  void attend(sattn::context& with, const attention_plan& plan) {
    sattn::attend(with, plan, tensors.q_view(), tensors.kv(), tensors.out_view());
  }
  void attend_dense() { attend(ctx, dense); }
  bench::work work_of(const attention_plan& plan) const {
    const sattn::plan_stats stats = plan.stats();
    const double flops = 4.0 * static_cast<double>(tensors.dim);  // of one pair: q k and p v
    const double useful = flops * static_cast<double>(stats.selected);
    const double executed = flops * static_cast<double>(stats.executed);
    return {useful, executed, stats.selected == stats.legal ? useful : executed};
  }
};

void report_density(benchmark::State& state, const attention_plan& plan) {
  state.counters["density"] = plan.stats().density_executed();
  state.counters["density_selected"] = plan.stats().density_selected();
}

void run_dense(benchmark::State& state, const problem& p) {
  session s(p);
  const auto timings =
      bench::measure(state, {.run = [&] { s.attend_dense(); }, .smoke = p.smoke});
  bench::report(state, timings, s.work_of(s.dense));
  report_density(state, s.dense);
}

void run_sparse(benchmark::State& state, const problem& p, const workload& w) {
  session s(p);
  const sattn::any_pattern pattern = w.pattern(p.shape());
  attention_plan plan;
  const auto timings = bench::measure(
      state, {.run = [&] { s.attend(s.ctx, plan); },
              .plan =
                  [&] {
                    plan_prefill_into(s.ctx, plan, p.shape(), pattern,
                                      {.tile_rows = w.tile_rows, .rounding = w.rounding});
                  },
              .reference = [&] { s.attend_dense(); },
              .smoke = p.smoke});
  bench::report(state, timings, s.work_of(plan));
  report_density(state, plan);
  state.counters["speedup"] = 1 / timings.ratio();
  state.counters["vs_dense"] = timings.ratio() / plan.stats().density_executed();
}

/// The same plan on two threads and on one.
void run_threads(benchmark::State& state, const problem& p, const workload* w) {
  session s(p);
  sattn::context two(sattn::context::thread_count{2});
  const attention_plan plan =
      w == nullptr ? s.dense : plan_prefill(s.ctx, p.shape(), w->pattern(p.shape()));
  const auto timings = bench::measure(state, {.run = [&] { s.attend(two, plan); },
                                              .reference = [&] { s.attend(s.ctx, plan); },
                                              .smoke = p.smoke});
  bench::report(state, timings, s.work_of(plan));
  report_density(state, plan);
  state.counters["thread_speedup"] = 1 / timings.ratio();
}

void run_eigen(benchmark::State& state, const problem& p) {
  session s(p);
  bench::row_matrix scores;
  const auto eigen = [&](index_t block_rows) {
    return [&s, &scores, block_rows] { bench::eigen_prefill(s.tensors, block_rows, scores); };
  };
  bench::require_same_output(s.tensors, [&] { s.attend_dense(); }, eigen(64));
  eigen(256)();
  const bool small_is_faster = bench::seconds_of(eigen(64)) < bench::seconds_of(eigen(256));
  const auto timings = bench::measure(state, {.run = eigen(small_is_faster ? 64 : 256),
                                              .reference = [&] { s.attend_dense(); },
                                              .smoke = p.smoke});
  bench::report(state, timings, s.work_of(s.dense));
  state.counters["vs_eigen"] = timings.ratio();  // how many times faster ours is
  state.counters["block_rows"] = small_is_faster ? 64 : 256;
}

void add_cases(bool long_ones) {
  std::vector<problem> problems{{64, 256, true}};
  for (const index_t dim : {64, 128}) {
    for (const index_t len : {1024, 4096, 8192}) problems.push_back({dim, len});
    if (long_ones) problems.insert(problems.end(), {{dim, 16384}, {dim, 32768}});
  }
  const std::vector<workload> workloads = sparse_workloads();
  for (const problem& p : problems) {
    const auto add = [&](const std::string& name, auto f) { bench::add_case(p.name(name), f); };
    add("dense", [p](auto& state) { run_dense(state, p); });
    add("eigen", [p](auto& state) { run_eigen(state, p); });
    add("dense/threads2", [p](auto& state) { run_threads(state, p, nullptr); });
    for (const workload& w : workloads) {
      add(w.name, [p, w](auto& state) { run_sparse(state, p, w); });
      if (w.name == "block64/density0.25") {
        add(w.name + "/threads2", [p, w](auto& state) { run_threads(state, p, &w); });
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) { return bench::bench_main(argc, argv, add_cases); }
