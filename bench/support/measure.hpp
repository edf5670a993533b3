// SPDX-License-Identifier: Apache-2.0
//
// Rounds of {probe the machine, time the reference, time the plan, time the run}: whatever is
// divided by something else was measured in the same phase of a machine that others use too.
#pragma once

#include <benchmark/benchmark.h>

#include <algorithm>
#include <functional>
#include <string_view>
#include <vector>

#include "support/machine.hpp"

namespace bench {

inline double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values.empty() ? 0 : (values[values.size() / 2] + values[(values.size() - 1) / 2]) / 2;
}

struct timed_case {
  std::function<void()> prepare = [] {};  // not timed
  std::function<void()> reference = [] {};
  std::function<void()> plan = [] {};
  std::function<void()> run = [] {};
  bool from_memory = false;  // probe the memory too, which empties the caches
  bool smoke = false;        // one round
};

struct timings {
  std::vector<double> plan, run, ratio;  // seconds, seconds, run / reference of the same round
  double fma_rate = 0;
  double read_rate = 0;

  void add_round(const timed_case& c) {
    c.prepare();
    fma_rate = std::max(fma_rate, bench::fma_rate());
    if (c.from_memory) read_rate = std::max(read_rate, bench::read_rate());
    const double reference = seconds_of(c.reference);
    plan.push_back(seconds_of(c.plan));
    run.push_back(seconds_of(c.run));
    ratio.push_back(run.back() / reference);
  }
};

/// All rounds of the case, whose medians become counters. Google Benchmark's own time is that of one
/// more run: its manual time would add a suffix to every name.
inline timings measure(benchmark::State& state, const timed_case& c) {
  timings{}.add_round(c);
  timings t;
  double spent = 0;
  const auto enough = [&](int rounds) {
    if (c.smoke) return rounds == 1;
    return rounds >= (spent > 10 ? 3 : 5) && spent > 1;
  };
  for (int i = 0; !enough(i); ++i) {
    spent += seconds_of([&] { t.add_round(c); });
  }
  for (auto _ : state) c.run();
  return t;
}

/// The main of a bench. `add_cases(long_ones)` registers the cases; the long ones only when the
/// command line has a filter, which then names them or not.
template <class F>
int bench_main(int argc, char** argv, F add_cases) {
  std::vector<char*> args(argv, argv + argc);
  const bool filtered = std::any_of(args.begin(), args.end(), [](std::string_view arg) {
    return arg.substr(0, 18) == "--benchmark_filter";
  });
  char one_iteration[] = "--benchmark_min_time=1e-9";
  args.insert(args.begin() + 1, {one_iteration});
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
