// SPDX-License-Identifier: Apache-2.0
//
// Rounds of {probe the machine, time the reference, time the plan and the run}: whatever is divided
// by something else was measured in the same phase of a machine that others use too. The reference
// goes first in one round and last in the next.
#pragma once

#include <benchmark/benchmark.h>

#include <algorithm>
#include <functional>
#include <sattn/core/types.hpp>
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
  sattn::index_t threads = 1;  // that probe it
  bool smoke = false;        // one round
};

struct timings {
  // By round: seconds; run / reference; flops and bytes a second that the machine could do.
  std::vector<double> plan, run, ratio, fma_rate, read_rate;

  void add_round(const timed_case& c) {
    c.prepare();
    fma_rate.push_back(bench::fma_rate());
    if (c.from_memory) read_rate.push_back(bench::read_rate(c.threads));
    const bool reference_first = run.size() % 2 == 0;
    double reference = reference_first ? seconds_of(c.reference) : 0;
    plan.push_back(seconds_of(c.plan));
    run.push_back(seconds_of(c.run));
    if (!reference_first) reference = seconds_of(c.reference);
    ratio.push_back(run.back() / reference);
  }
  /// What so many flops or bytes a run are of a rate, round by round: the median.
  double fraction(double amount, const std::vector<double>& rate) const {
    std::vector<double> each;
    for (std::size_t i = 0; i < run.size(); ++i) each.push_back(amount / run[i] / rate[i]);
    return median(each);
  }
};

inline double best(const std::vector<double>& seconds) {
  return *std::min_element(seconds.begin(), seconds.end());
}
inline double fastest(const std::vector<double>& rate) {
  return *std::max_element(rate.begin(), rate.end());
}

/// All rounds of the case, whose medians become counters. Google Benchmark's own time is that of
/// one more run: its manual time would add a suffix to every name.
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
  for (auto _ : state) {
    state.PauseTiming();
    c.prepare();
    state.ResumeTiming();
    c.run();
  }
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
