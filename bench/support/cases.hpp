// SPDX-License-Identifier: Apache-2.0
//
// A case is a problem, a workload and a rival. gflops counts the selected pairs, gflops_executed
// those computed; so does peak_fraction, but for plans of all legal pairs. density is executed /
// legal pairs, vs_dense = time / (time of dense x density): 1 if skipping costs nothing. speedup is
// over dense, planning left out; speedup_planned has it in. Plans are made again into the same
// memory; plan_first_ms is the first one, into none.
#pragma once

#include <benchmark/benchmark.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <optional>
#include <sattn/sattn.hpp>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "support/eigen_attention.hpp"
#include "support/measure.hpp"
#include "support/workload.hpp"

namespace bench {

struct problem {
  std::string name;
  attention_shape shape;
  index_t dim;
  bool smoke = false;
  index_t v_dim;
  sattn::dtype kv_type = sattn::dtype::f32;
};

struct workload {
  std::string name;
  std::function<sattn::any_pattern(const attention_shape&)> pattern;
  sattn::plan_options options = {};
};

enum class rival {
  dense,   // times the workload; the reference is dense attention
  none,    // times the workload, that is all
  rows,    // times the workload; the reference is the same in tiles of single rows
  f32,     // times the workload; the reference is the same over f32 K and V
  serial,  // times the workload on two threads; the reference is one thread
  ours,    // times Eigen; the reference is our dense attention
};

struct session {
  tensors t;
  sattn::serial_executor executor;
  sattn::context ctx{executor};

  explicit session(const problem& p) : t(p.shape, p.dim, p.v_dim, p.kv_type) {}

  void plan(sattn::attention_plan& plan, const sattn::any_pattern& pattern,
            const sattn::plan_options& options) {
    plan_prefill_into(ctx, plan, t.shape, pattern, options);
  }
  void attend(sattn::context& with, const sattn::attention_plan& plan) {
    attend(with, plan, t.kv_type);
  }
  void attend(sattn::context& with, const sattn::attention_plan& plan, sattn::dtype type) {
    sattn::attend(with, plan, t.q_view(), t.kv(type), t.out_view());
  }
  double workspace_mib(const sattn::attention_plan& plan, std::size_t pack_bytes) {
    sattn::attention_options options;
    options.pack_bytes = pack_bytes;
    return static_cast<double>(workspace_bytes(ctx, plan, t.q_view(), t.kv(t.kv_type),
                                               t.out_view(), options)) /
           (1 << 20);
  }
};

/// The counters that every case has: rates of the median run, and of the best where they say so.
inline void report(benchmark::State& state, const problem& p, const timings& t,
                   const sattn::plan_stats& stats, index_t threads) {
  const double seconds = median(t.run);
  const double flops = 2.0 * static_cast<double>(p.dim + p.v_dim);  // of one pair: q k and p v
  const double useful = flops * static_cast<double>(stats.selected);
  const double executed = flops * static_cast<double>(stats.executed);
  const double rated = (stats.selected == stats.legal ? useful : executed) /
                       static_cast<double>(threads);
  auto& counters = state.counters;
  counters["best_ms"] = best(t.run) * 1e3;
  counters["median_ms"] = seconds * 1e3;
  counters["gflops"] = useful / seconds * 1e-9;
  counters["gflops_executed"] = executed / seconds * 1e-9;
  counters["peak_gflops"] = median(t.fma_rate) * static_cast<double>(threads) * 1e-9;
  counters["peak_fraction"] = t.fraction(rated, t.fma_rate);
  counters["peak_fraction_best"] = rated / best(t.run) / fastest(t.fma_rate);
  counters["density"] = stats.density_executed();
  counters["density_selected"] = stats.density_selected();
}

inline void run_case(benchmark::State& state, const problem& p, const workload& w, rival against) {
  session s(p);
  const index_t threads = against == rival::serial ? 2 : 1;
  std::optional<sattn::context> pool;
  if (threads > 1) pool.emplace(threads);
  sattn::context& ctx = pool ? *pool : s.ctx;
  sattn::attention_plan dense;
  sattn::attention_plan plan;
  const sattn::any_pattern pattern = w.pattern(p.shape);
  const double first_plan = seconds_of([&] { s.plan(plan, pattern, w.options); });
  if (against == rival::dense || against == rival::ours) {
    s.plan(dense, sattn::dense{}, {});
  } else if (against == rival::rows) {
    s.plan(dense, pattern, {.tile_rows = 1});
  } else if (against != rival::none) {
    s.plan(dense, pattern, w.options);
  }
  row_matrix scores;
  index_t block_rows = 64;
  const auto eigen = [&] { eigen_attention(s.t, block_rows, scores); };

  const auto reference = [&] {
    if (against != rival::none) {
      s.attend(s.ctx, dense, against == rival::f32 ? sattn::dtype::f32 : p.kv_type);
    }
  };
  timed_case c{.reference = reference, .smoke = p.smoke};
  if (against == rival::dense) c.plan = [&] { s.plan(plan, pattern, w.options); };
  c.run = [&] {
    if (against == rival::ours) return eigen();
    s.attend(ctx, plan);
  };
  const std::vector<float> nothing_written(s.t.out.size(), std::nanf(""));
  if (against == rival::serial) {
    c.reference();
    const std::vector<float> want = std::exchange(s.t.out, nothing_written);
    c.run();
    if (std::memcmp(s.t.out.data(), want.data(), want.size() * sizeof(float)) != 0) {
      throw std::runtime_error("two threads give other bits than one");
    }
  }
  if (against == rival::ours) {
    c.reference();
    const std::vector<float> want = std::exchange(s.t.out, nothing_written);
    eigen();
    for (std::size_t i = 0; i < want.size(); ++i) {
      if (std::abs(s.t.out[i] - want[i]) <= 1e-4f) continue;
      throw std::runtime_error("the Eigen baseline is wrong");
    }
    const double small = seconds_of(eigen);
    block_rows = 256;
    eigen();
    if (small < seconds_of(eigen)) block_rows = 64;
    state.counters["block_rows"] = static_cast<double>(block_rows);
  }

  const timings t = measure(state, c);
  const double ratio = median(t.ratio);
  report(state, p, t, plan.stats(), threads);
  state.counters["plan_first_ms"] = first_plan * 1e3;
  state.counters["plan_mib"] = static_cast<double>(plan.bytes()) / (1 << 20);
  state.counters["workspace_mib"] = s.workspace_mib(plan, sattn::attention_options{}.pack_bytes);
  state.counters["workspace_unpacked_mib"] = s.workspace_mib(plan, 0);
  if (against == rival::ours) state.counters["vs_eigen"] = ratio;
  if (against == rival::rows) state.counters["vs_rows"] = 1 / ratio;
  if (against == rival::f32) state.counters["vs_f32"] = 1 / ratio;
  if (against == rival::serial) state.counters["thread_speedup"] = 1 / ratio;
  if (against == rival::dense) {
    state.counters["speedup"] = 1 / ratio;
    state.counters["vs_dense"] = ratio / plan.stats().density_executed();
    const double planned = median(t.plan) + median(t.run);
    state.counters["plan_share"] = median(t.plan) / planned;
    state.counters["speedup_planned"] = median(t.run) / planned / ratio;
  }
}

inline void add_case(const problem& p, const workload& w, rival against = rival::dense) {
  const std::string name = p.name + (against == rival::ours ? "eigen" : w.name) +
                           (against == rival::serial ? "/threads2" : "") +
                           (against == rival::rows ? "/vs_rows" : "") + (p.smoke ? "/smoke" : "");
  benchmark::RegisterBenchmark(name.c_str(), [=](auto& state) { run_case(state, p, w, against); })
      ->Unit(benchmark::kMillisecond);
}

inline workload dense_workload() {
  return {"dense", [](const attention_shape&) { return sattn::dense{}; }};
}
inline workload window_workload(token_t window = 1024) {
  const auto pattern = [=](const attention_shape&) {
    return sattn::sink{4} | sattn::sliding_window{window};
  };
  return {"window" + std::to_string(window), pattern};
}

}  // namespace bench
