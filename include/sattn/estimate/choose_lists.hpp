// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/budget/select.hpp>
#include <sattn/exec/context.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <vector>

namespace sattn::detail {

/// What one list is chosen from.
struct scored_units {
  std::span<const float> scores;
  token_t first = 0;        // unit of scores[0]
  key_range diagonal = {};  // units that hold the rows' own positions
};

/// Of one list, on the calling thread. Throws: shape_error as selector::choose does.
inline void choose_from(const scored_units& units, const selection& rule, selector& choose,
                        std::vector<token_t>& chosen) {
  const token_t first = units.first;
  choose.choose(units.scores, rule, {units.diagonal.begin - first, units.diagonal.end - first},
                chosen);
  for (token_t& unit : chosen) unit += first;
}

/// Whether the rule refuses the scores, which tasks must not: they throw nothing.
inline bool refuses(const selection& rule, std::span<const float> scores) {
  return rule.amount.by() == budget::kind::coverage &&
         std::any_of(scores.begin(), scores.end(),
                     [](float score) { return score < 0.0f && !std::isinf(score); });
}

/// The units that rules choose of each list, in parallel: rule_of(list) -> const selection&,
/// units_of(list) -> scored_units.
/// Throws: shape_error as selector::choose does, for the first list it refuses; std::bad_alloc.
template <class RuleOf, class UnitsOf>
std::vector<std::vector<token_t>> choose_lists(context& ctx, index_t lists, const RuleOf& rule_of,
                                               const UnitsOf& units_of) {
  struct choices_of_worker {
    selector choose;
    index_t refused = std::numeric_limits<index_t>::max();
  };
  for (index_t i = 0; i < lists; ++i) {
    check_selection(rule_of(i));
    check_positions(std::ssize(units_of(i).scores));
  }
  std::vector<std::vector<token_t>> chosen(static_cast<std::size_t>(lists));
  std::vector<choices_of_worker> workers(static_cast<std::size_t>(ctx.executor().concurrency()));
  ctx.executor().parallel_for(lists, [&](index_t task, index_t worker) {
    choices_of_worker& own = workers[static_cast<std::size_t>(worker)];
    const scored_units units = units_of(task);
    if (refuses(rule_of(task), units.scores)) {
      own.refused = std::min(own.refused, task);
      return;
    }
    choose_from(units, rule_of(task), own.choose, chosen[static_cast<std::size_t>(task)]);
  });
  index_t refused = std::numeric_limits<index_t>::max();
  for (const choices_of_worker& own : workers) refused = std::min(refused, own.refused);
  if (refused < lists) {
    choose_from(units_of(refused), rule_of(refused), workers.front().choose, chosen.front());
  }
  return chosen;
}
/// The same by one rule.
template <class UnitsOf>
std::vector<std::vector<token_t>> choose_lists(context& ctx, index_t lists, const selection& rule,
                                               const UnitsOf& units_of) {
  return choose_lists(
      ctx, lists, [&](index_t) -> const selection& { return rule; }, units_of);
}

}  // namespace sattn::detail
