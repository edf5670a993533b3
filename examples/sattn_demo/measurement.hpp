// SPDX-License-Identifier: Apache-2.0
//
// What is measured of a method, and how repeats, errors and shares of the attention become numbers.
#pragma once

#include "method.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

namespace demo {

struct measurement {
  phase when;
  std::string name;
  std::string budget;
  sattn::plan_stats stats = {};
  // Milliseconds, each the best of all repeats: of the prompt, or of a token.
  double estimate_ms = 0.0;
  double plan_ms = 0.0;
  double ms = 0.0;        // the attention alone
  double dense_ms = 0.0;  // dense attention alone, run in turn with this one
  double rel_error = 0.0;
  double recall = 0.0;  // attention mass of the selected keys, mean over rows and heads

  double speedup() const { return dense_ms / ms; }
  /// A cache is cut once, behind the prompt, and not for each token.
  double speedup_end_to_end() const {
    return when == phase::cache ? speedup() : dense_ms / (estimate_ms + plan_ms + ms);
  }
};

template <class F>
double milliseconds(F&& work) {
  using clock = std::chrono::steady_clock;
  const clock::time_point start = clock::now();
  work();
  return std::chrono::duration<double, std::milli>(clock::now() - start).count();
}

/// Calls run_once(measurement&) so many times; the best of each time and the last of all else.
template <class F>
measurement best_of(int repeats, const method& m, F&& run_once) {
  measurement best;
  for (int i = 0; i < repeats; ++i) {
    measurement once{.when = m.when, .name = m.name, .budget = m.budget};
    run_once(once);
    if (i > 0) {
      for (double measurement::*const time : {&measurement::estimate_ms, &measurement::plan_ms,
                                              &measurement::ms, &measurement::dense_ms}) {
        once.*time = std::min(once.*time, best.*time);
      }
    }
    best = once;
  }
  if (m.name == "dense") best.ms = best.dense_ms = std::min(best.ms, best.dense_ms);
  return best;
}

/// ||got - expected|| / ||expected||, taken in element by element.
class relative_error {
 public:
  void add(double got, double expected) {
    difference_ += (got - expected) * (got - expected);
    size_ += expected * expected;
  }
  /// 0 where nothing differs, be it that all is 0; infinite where only the expected is.
  double value() const { return difference_ == 0.0 ? 0.0 : std::sqrt(difference_ / size_); }

 private:
  double difference_ = 0.0;
  double size_ = 0.0;
};

/// The mean share of the attention mass that rows keep, by their lse. Not measure_recall: that runs
/// a plan and dense attention over the same keys once more, while here both have just run, and a
/// cache that was cut has no plan over all keys.
inline double mean_recall(const std::vector<float>& sparse, const std::vector<float>& dense) {
  double sum = 0.0;
  for (std::size_t i = 0; i < sparse.size(); ++i) {
    const double log_share = double{sparse[i]} - double{dense[i]};
    // Rounding can lift the share above 1. A NaN of the input stays one.
    sum += log_share > 0.0 ? 1.0 : std::exp(log_share);
  }
  return sum / static_cast<double>(sparse.size());
}

}  // namespace demo
