// SPDX-License-Identifier: Apache-2.0
//
// What the demo prints: tables for people, JSON for programs.
#pragma once

#include "methods.hpp"
#include "step_bench.hpp"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace demo {

inline constexpr double good_recall = 0.9;

/// Says on stderr what comes next; on a terminal the next call overwrites that.
inline void print_step(const std::string& what) {
  if (isatty(STDERR_FILENO) == 0) {
    if (!what.empty()) std::fprintf(stderr, "sattn-demo: %s\n", what.c_str());
  } else {
    std::fprintf(stderr, "\r\033[K%s", what.c_str());
  }
}

/// What is left out and why, on stderr.
inline void print_left_out(const std::string& what, const std::string& why) {
  print_step("");
  std::fprintf(stderr, "sattn-demo: left out: %s: %s\n", what.c_str(), why.c_str());
}

/// The head of a layer's tables.
inline void print_heading(const layer& l, const settings& model, const context& ctx, int repeats) {
  const sattn::attention_shape s = l.shape();
  std::printf(
      "layer %s (%td of %td, from 0): %td queries, %td keys, %td query heads, %td kv heads, "
      "head_dim %td; causal; %s, %td threads, best of %d\n",
      l.name.c_str(), model.layer, model.layers, s.q_len, s.kv_len, s.q_heads, s.kv_heads,
      l.q.dim, ctx.kernel_table().name, ctx.executor().concurrency(), repeats);
  std::printf("%s\n", budget_legend);
}

/// The head of a table.
inline void print_phase(phase when, const layer& l) {
  const index_t steps = step_bench::steps_of(l);
  switch (when) {
    case phase::prefill: std::printf("\nPrefill: all queries at once.\n"); break;
    case phase::decode:
      std::printf("\nDecode: the last %td tokens one by one; times of one.\n", steps);
      break;
    case phase::cache:
      std::printf("\nCache: cut once behind the prompt (estimate, plan: evict), then the last %td "
                  "tokens one by one.\n", steps);
  }
  std::printf("%-17s %-21s %8s %8s %7s %9s %9s %8s %11s %8s %10s\n", "method", "budget",
              "selected", "executed", "recall", "rel error", "time ms", "speed-up", "estimate ms",
              "plan ms", "end to end");
}

/// A number in as many places as `format` gives it, n/a where it is none.
inline std::string text_of(const char* format, double value) {
  char text[64];
  std::snprintf(text, sizeof(text), format, value);
  return std::isnan(value) ? "n/a" : text;
}

inline void print_line(const measurement& m) {
  std::printf("%-17s %-21s %7.2f%% %7.2f%% %7s %9s %9.3f %7.2fx %11.3f %8.3f %9.2fx\n",
              m.name.c_str(), m.budget.c_str(), 100.0 * m.stats.density_selected(),
              100.0 * m.stats.density_executed(), text_of("%.4f", m.recall).c_str(),
              text_of("%.1e", m.rel_error).c_str(), m.ms, m.speedup(), m.estimate_ms, m.plan_ms,
              m.speedup_end_to_end());
  std::fflush(stdout);
}

/// The same as one JSON object on a line of its own; null for what is no finite number.
inline void print_json(const std::string& layer_name, const measurement& m) {
  const nlohmann::ordered_json line = {
      {"layer", layer_name},
      {"phase", phase_names[static_cast<std::size_t>(m.when)]},
      {"method", m.name},
      {"budget", m.budget},
      {"density_selected", m.stats.density_selected()},
      {"density_executed", m.stats.density_executed()},
      {"ms", m.ms},
      {"dense_ms", m.dense_ms},
      {"speedup", m.speedup()},
      {"rel_error", m.rel_error},
      {"recall", m.recall},
      {"estimate_ms", m.estimate_ms},
      {"plan_ms", m.plan_ms},
      {"speedup_end_to_end", m.speedup_end_to_end()},
  };
  // Paths may hold any bytes; what is no UTF-8 is replaced.
  std::puts(line.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace).c_str());
  std::fflush(stdout);
}

/// Where dense attention wins over one method, in words.
inline void print_method(const measurement& dense,
                          const std::vector<const measurement*>& budgets) {
  const auto append = [](std::string& list, const std::string& item) {
    list += (list.empty() ? "" : ", ") + item;
  };
  std::string slow_runs;
  std::string slow_in_all;
  double pair_cost = 0.0;          // time per executed pair, dense = 1
  double overhead = std::numeric_limits<double>::infinity();  // estimate and plan, in runs of dense
  for (const measurement* m : budgets) {
    if (m->stats.selected == m->stats.legal) continue;  // runs as dense attention
    if (m->speedup() < 1.0) {
      append(slow_runs, m->budget);
      pair_cost = std::max(
          pair_cost, dense.stats.density_executed() / m->stats.density_executed() / m->speedup());
    } else if (m->speedup_end_to_end() < 1.0) {
      append(slow_in_all, m->budget);
      overhead = std::min(overhead, (m->estimate_ms + m->plan_ms) / m->dense_ms);
    }
  }
  std::printf("- %s:", budgets.front()->name.c_str());
  if (slow_runs.empty() && slow_in_all.empty()) std::printf(" nowhere");
  if (!slow_runs.empty()) {
    std::printf(
        " at %s even without estimate and plan, as an executed pair takes up to %.1f times "
        "as long as in dense attention",
        slow_runs.c_str(), pair_cost);
  }
  if (!slow_in_all.empty()) {
    std::printf(
        "%s at %s with estimate and plan, which take at least %.1f times as long as dense "
        "attention",
        slow_runs.empty() ? "" : ";", slow_in_all.c_str(), overhead);
  }
  std::printf("\n");
}

/// Says in words, from the measurements, where dense attention is the faster one and what is the
/// best choice otherwise. The first measurement is dense.
inline void print_conclusions(const std::vector<measurement>& all) {
  std::printf(
      "\nA speed-up is over runs of dense attention taken in turn with the method's own; "
      "\"end to end\" adds estimate and plan.\nWhere dense attention is faster:\n");
  const measurement* best = &all.front();
  for (std::size_t i = 1; i < all.size();) {
    std::vector<const measurement*> budgets;
    const std::string& name = all[i].name;
    for (; i < all.size() && all[i].name == name; ++i) {
      budgets.push_back(&all[i]);
      const bool faster = all[i].speedup_end_to_end() > best->speedup_end_to_end();
      if (all[i].recall >= good_recall && faster) best = &all[i];
    }
    print_method(all.front(), budgets);
  }
  if (!(best->recall >= good_recall)) return;  // not even dense: values are not finite
  std::printf("Fastest end to end with a recall of %.2f or more: %s %s, %.2f times dense.\n",
              good_recall, best->name.c_str(), best->budget.c_str(), best->speedup_end_to_end());
}

}  // namespace demo
