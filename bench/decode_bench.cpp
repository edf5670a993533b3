// SPDX-License-Identifier: Apache-2.0
//
// One new token against a cache of f32 keys and values that no processor cache holds: calls go round
// many caches, and a linear read of other memory lies between them.
// Counters: docs/performance.md.

#include <algorithm>
#include <functional>
#include <sattn/sattn.hpp>
#include <string>
#include <vector>

#include "support/eigen_attention.hpp"
#include "support/measure.hpp"
#include "support/workload.hpp"

namespace {

using bench::index_t;
using bench::token_t;
using sattn::attention_plan;
using sattn::attention_shape;

struct problem {
  index_t group;
  index_t dim;
  index_t len;
  bool smoke = false;

  attention_shape shape() const { return {1, len, group, 1, static_cast<token_t>(len - 1)}; }
  index_t cache_bytes() const { return 2 * len * dim * index_t{sizeof(float)}; }
  index_t caches() const {
    const auto bytes = static_cast<index_t>(bench::uncached_bytes());
    return smoke ? 2 : sattn::ceil_div(bytes, cache_bytes()) + 1;
  }
  std::string name(const std::string& what) const {
    return "decode/f32/g" + std::to_string(group) + "/d" + std::to_string(dim) + "/n" +
           std::to_string(len) + "/" + what + (smoke ? "/smoke" : "");
  }
};

struct session {
  bench::tensors tensors;
  bench::read_probe memory;
  sattn::serial_executor serial;
  sattn::context ctx{serial};
  attention_plan dense;
  index_t cache_begin = 0;

  explicit session(const problem& p)
      : tensors(p.shape(), p.dim, p.caches() * p.len),
        dense(plan_decode(ctx, p.shape(), sattn::dense{})) {}

  /// Moves on by `tokens` and returns where the next cache begins.
  index_t next_cache(index_t tokens) {
    cache_begin += tokens;
    if (cache_begin + tensors.shape.kv_len > tensors.kv_tokens) cache_begin = 0;
    return cache_begin;
  }
  void attend(sattn::context& with, const attention_plan& plan, index_t begin) {
    sattn::attend(with, plan, tensors.q_view(), tensors.kv(begin), tensors.out_view());
  }
  void attend_dense() { attend(ctx, dense, next_cache(tensors.shape.kv_len)); }

  void report(benchmark::State& state, const bench::timings& t, const attention_plan& plan) const {
    const sattn::plan_stats stats = plan.stats();
    const double row_floats = 2.0 * static_cast<double>(tensors.dim);  // a key and its value
    const double flops = 2 * row_floats;
    const double executed = flops * static_cast<double>(stats.executed);
    const double keys =
        static_cast<double>(stats.selected) / static_cast<double>(tensors.shape.group_size());
    bench::report(state, t, {flops * static_cast<double>(stats.selected), executed, executed,
                             keys * row_floats * sizeof(float)});
    state.counters["density"] = stats.density_executed();
    state.counters["density_selected"] = stats.density_selected();
  }
};

void run_dense(benchmark::State& state, const problem& p) {
  session s(p);
  const auto t = bench::measure(
      state, {.run = [&] { s.attend_dense(); }, .memory = &s.memory, .smoke = p.smoke});
  s.report(state, t, s.dense);
}

struct workload {
  std::string name;
  index_t step;  // tokens between two calls' caches, so that no call reads what another has read
  std::function<sattn::any_pattern(const attention_shape&, unsigned seed)> pattern;
};

void run_sparse(benchmark::State& state, const problem& p, const workload& w) {
  session s(p);
  attention_plan plan;
  sattn::any_pattern pattern = w.pattern(p.shape(), 0);
  unsigned call = 0;
  const auto t = bench::measure(
      state, {.run = [&] { s.attend(s.ctx, plan, s.next_cache(w.step)); },
              .plan = [&] { plan_decode_into(s.ctx, plan, p.shape(), pattern); },
              .reference =
                  [&] {
                    pattern = w.pattern(p.shape(), ++call);
                    s.attend_dense();
                  },
              .memory = &s.memory,
              .smoke = p.smoke});
  s.report(state, t, plan);
  state.counters["speedup"] = 1 / t.ratio();
  state.counters["vs_dense"] = t.ratio() / plan.stats().density_executed();
}

void run_threads(benchmark::State& state, const problem& p) {
  session s(p);
  sattn::context two(sattn::context::thread_count{2});
  const auto t = bench::measure(state, {.run = [&] { s.attend(two, s.dense, s.next_cache(p.len)); },
                                        .reference = [&] { s.attend_dense(); },
                                        .memory = &s.memory,
                                        .smoke = p.smoke});
  s.report(state, t, s.dense);
  state.counters["thread_speedup"] = 1 / t.ratio();
}

void run_eigen(benchmark::State& state, const problem& p) {
  session s(p);
  bench::row_matrix scores;
  bench::require_same_output(
      s.tensors, [&] { s.attend(s.ctx, s.dense, 0); },
      [&] { bench::eigen_decode(s.tensors, 0, scores); });
  const auto t = bench::measure(
      state, {.run = [&] { bench::eigen_decode(s.tensors, s.next_cache(p.len), scores); },
              .reference = [&] { s.attend_dense(); },
              .memory = &s.memory,
              .smoke = p.smoke});
  s.report(state, t, s.dense);
  state.counters["vs_eigen"] = t.ratio();  // how many times faster ours is
}

void add_cases(bool long_ones) {
  std::vector<problem> problems{{4, 64, 2048, true}};
  for (const index_t group : {1, 4, 8}) {
    for (const index_t dim : {64, 128}) {
      problems.push_back({group, dim, 32768});
      if (long_ones) problems.push_back({group, dim, 131072});
    }
  }
  std::vector<workload> workloads{{"window1024", 1024, [](const attention_shape&, unsigned) {
                                     return sattn::sliding_window{1024};
                                   }}};
  for (const char* density : {"0.5", "0.25", "0.125"}) {
    workloads.push_back({std::string("pages16/density") + density, 32768,
                         [density](const attention_shape& s, unsigned seed) {
                           return bench::random_blocks(s, 1, 16, std::stod(density), 1, seed + 1);
                         }});
  }
  for (const problem& p : problems) {
    const auto add = [&](const std::string& name, auto f) { bench::add_case(p.name(name), f); };
    add("dense", [p](auto& state) { run_dense(state, p); });
    add("eigen", [p](auto& state) { run_eigen(state, p); });
    add("dense/threads2", [p](auto& state) { run_threads(state, p); });
    for (const workload& w : workloads) {
      add(w.name, [p, w](auto& state) { run_sparse(state, p, w); });
    }
  }
}

}  // namespace

int main(int argc, char** argv) { return bench::bench_main(argc, argv, add_cases); }
