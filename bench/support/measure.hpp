// SPDX-License-Identifier: Apache-2.0
//
// One case: rounds of {probe the machine, time the reference, time the plan, time the run}, so that
// everything that is divided by something else was measured in the same phase of the machine.
#pragma once

#include <benchmark/benchmark.h>

#include <algorithm>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "support/machine.hpp"

namespace bench {

inline double median(std::vector<double> values) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const std::size_t half = values.size() / 2;
  return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
}

struct timed_case {
  std::function<void()> run;
  std::function<void()> plan = {};       // timed on its own
  std::function<void()> reference = {};  // what the run is compared with
  const read_probe* memory = nullptr;    // probed in each round, if there is one
  bool smoke = false;                    // as short as can be
};

class timings {
 public:
  double median_run() const { return median(run_); }
  double best_run() const { return *std::min_element(run_.begin(), run_.end()); }
  double median_plan() const { return median(plan_); }
  /// Median over the rounds of run / reference.
  double ratio() const { return median(ratio_); }
  double fma_rate() const { return fma_rate_; }
  double read_rate() const { return read_rate_; }

  void round(const timed_case& c) {
    fma_rate_ = std::max(fma_rate_, bench::fma_rate());
    if (c.memory != nullptr) read_rate_ = std::max(read_rate_, c.memory->rate());
    const double reference = c.reference ? seconds_of(c.reference) : 0;
    if (c.plan) plan_.push_back(seconds_of(c.plan));
    run_.push_back(seconds_of(c.run));
    if (c.reference) ratio_.push_back(run_.back() / reference);
  }

 private:
  std::vector<double> run_, plan_, ratio_;
  double fma_rate_ = 0;
  double read_rate_ = 0;
};

/// One iteration of Google Benchmark is all rounds of the case, and its time their median.
inline timings measure(benchmark::State& state, const timed_case& c) {
  timings t;
  if (c.plan) c.plan();
  c.run();
  if (c.reference) c.reference();
  for (auto _ : state) {
    const int min_rounds = c.smoke ? 1 : 5;
    const double min_seconds = c.smoke ? 0 : 2;
    int rounds = 0;
    for (double spent = 0; rounds < min_rounds || spent < min_seconds; ++rounds) {
      spent += seconds_of([&] { t.round(c); });
    }
    state.SetIterationTime(t.median_run());
  }
  return t;
}

/// What one run computes and reads.
struct work {
  double useful_flops;    // of selected pairs
  double executed_flops;  // with masked pairs and empty lanes
  double rated_flops;     // those that peak_fraction counts
  double bytes = 0;       // of selected keys and values; 0 where memory is not the limit
};

/// The counters that every case has. Rates are of the median run; *_best are of the best one.
inline void report(benchmark::State& state, const timings& t, const work& w) {
  auto& counters = state.counters;
  counters["best_ms"] = t.best_run() * 1e3;
  counters["median_ms"] = t.median_run() * 1e3;
  counters["gflops"] = w.useful_flops / t.median_run() * 1e-9;
  counters["gflops_executed"] = w.executed_flops / t.median_run() * 1e-9;
  counters["fma_gflops"] = t.fma_rate() * 1e-9;
  counters["peak_fraction"] = w.rated_flops / t.median_run() / t.fma_rate();
  counters["peak_fraction_best"] = w.rated_flops / t.best_run() / t.fma_rate();
  if (t.median_plan() > 0) {
    counters["plan_share"] = t.median_plan() / (t.median_plan() + t.median_run());
  }
  if (w.bytes > 0) {
    counters["read_gbps"] = t.read_rate() * 1e-9;
    counters["bandwidth_fraction"] = w.bytes / t.median_run() / t.read_rate();
    counters["bandwidth_fraction_best"] = w.bytes / t.best_run() / t.read_rate();
  }
}

template <class F>
void add_case(const std::string& name, F f) {
  benchmark::RegisterBenchmark(name.c_str(), std::move(f))
      ->UseManualTime()
      ->Unit(benchmark::kMillisecond);
}

/// The main of a bench. `add_cases(all)` registers; `all` asks for the long cases too, which run
/// only when a filter names them.
template <class F>
int bench_main(int argc, char** argv, F add_cases) {
  bool filtered = false;
  for (int i = 1; i < argc; ++i) {
    filtered = filtered || std::string_view(argv[i]).substr(0, 18) == "--benchmark_filter";
  }
  // One iteration measures everything; the caller's own flag comes later and wins.
  char one_iteration[] = "--benchmark_min_time=1e-9";
  std::vector<char*> args(argv, argv + argc);
  args.insert(args.begin() + 1, one_iteration);
  args.push_back(nullptr);
  int count = argc + 1;
  benchmark::Initialize(&count, args.data());
  if (benchmark::ReportUnrecognizedArguments(count, args.data())) return 1;
  describe_machine();
  add_cases(filtered);
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}

}  // namespace bench
