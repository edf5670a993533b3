// SPDX-License-Identifier: Apache-2.0
#include "report.hpp"

#include <cstdio>
#include <nlohmann/json.hpp>

namespace demo {

namespace {

constexpr double good_recall = 0.9;

void append(std::string& list, const std::string& item) {
  list += (list.empty() ? "" : ", ") + item;
}

// Where dense wins over one pattern.
void print_pattern(const std::string& pattern, const std::vector<const measurement*>& budgets) {
  std::string slow_runs;
  std::string slow_in_all;
  double pair_cost = 0.0;  // time per executed pair, dense = 1, at the largest budget
  double overhead = 0.0;   // estimate and plan, in runs of dense
  for (const measurement* m : budgets) {
    if (m->speedup() < 1.0) {
      append(slow_runs, m->budget);
    } else if (m->speedup_end_to_end() < 1.0) {
      append(slow_in_all, m->budget);
    }
    pair_cost = m->ms / m->dense_ms / m->stats.density_executed();
    overhead = (m->estimate_ms + m->plan_ms) / m->dense_ms;
  }
  std::printf("- %s", pattern.c_str());
  if (slow_runs.empty() && slow_in_all.empty()) {
    std::printf(": never, with estimate and plan counted.\n");
    return;
  }
  if (!slow_runs.empty()) {
    std::printf(": at %s. An executed pair takes %.1f times as long as in dense attention, so the "
                "run gains below %.0f %% executed density only",
                slow_runs.c_str(), pair_cost, 100.0 / pair_cost);
  }
  if (!slow_in_all.empty()) {
    std::printf("%s: at %s because of estimate and plan, which take %.1f times as long as dense "
                "attention",
                slow_runs.empty() ? "" : "; also", slow_in_all.c_str(), overhead);
  }
  std::printf(".\n");
}

}  // namespace

void print_heading(const layer& l, const sattn::context& ctx, int repeats) {
  const sattn::attention_shape s = l.shape();
  std::printf("layer %s: %td queries, %td keys, %td query heads, %td kv heads, head_dim %td; "
              "causal; %s, %td threads, best of %d\n",
              l.name.c_str(), s.q_len, s.kv_len, s.q_heads, s.kv_heads, l.q.dim,
              ctx.kernel_table().name, ctx.executor().concurrency(), repeats);
  std::printf("%s\n\n", budget_legend);
  std::printf("%-20s %-11s %8s %8s %7s %9s %9s %8s %9s %8s %10s\n", "pattern", "budget", "selected",
              "executed", "recall", "rel error", "time ms", "speed-up", "estim. ms", "plan ms",
              "end to end");
}

void print_line(const measurement& m) {
  std::printf("%-20s %-11s %7.2f%% %7.2f%% %7.4f %9.1e %9.2f %7.2fx %9.2f %8.2f %9.2fx\n",
              m.pattern.c_str(), m.budget.c_str(), 100.0 * m.stats.density_selected(),
              100.0 * m.stats.density_executed(), m.recall, m.rel_error, m.ms, m.speedup(),
              m.estimate_ms, m.plan_ms, m.speedup_end_to_end());
  std::fflush(stdout);
}

void print_json(const std::string& layer_name, const measurement& m) {
  const nlohmann::ordered_json line = {
      {"layer", layer_name},
      {"pattern", m.pattern},
      {"budget", m.budget},
      {"density_selected", m.stats.density_selected()},
      {"density_executed", m.stats.density_executed()},
      {"ms", m.ms},
      {"speedup", m.speedup()},
      {"rel_error", m.rel_error},
      {"recall", m.recall},
      {"estimate_ms", m.estimate_ms},
      {"plan_ms", m.plan_ms},
      {"dense_ms", m.dense_ms},
      {"speedup_end_to_end", m.speedup_end_to_end()},
  };
  std::puts(line.dump().c_str());
  std::fflush(stdout);
}

void print_conclusions(const std::vector<measurement>& all) {
  std::printf("\nSpeed-ups are over runs of dense attention taken in turn with the pattern's own; "
              "\"end to end\" adds estimate and plan.\n");
  std::printf("Where dense attention is the faster one:\n");
  for (std::size_t i = 1; i < all.size();) {
    std::vector<const measurement*> budgets;
    const std::string& pattern = all[i].pattern;
    for (; i < all.size() && all[i].pattern == pattern; ++i) budgets.push_back(&all[i]);
    print_pattern(pattern, budgets);
  }
  const measurement* best = &all.front();
  for (const measurement& m : all) {
    if (m.recall >= good_recall && m.speedup_end_to_end() > best->speedup_end_to_end()) best = &m;
  }
  std::printf("Fastest end to end with a recall of at least %.0f %%: %s %s, %.2f times dense.\n\n",
              100.0 * good_recall, best->pattern.c_str(), best->budget.c_str(),
              best->speedup_end_to_end());
}

}  // namespace demo
