// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/budget/select.hpp>
#include <sattn/exec/context.hpp>

#include <cmath>
#include <span>
#include <vector>

namespace sattn::detail {

/// What one list is chosen from.
struct scored_units {
  std::span<const float> scores;
  token_t first = 0;        // unit of scores[0]
  key_range diagonal = {};  // units that hold the rows' own positions
};

inline void choose_from(const scored_units& units, const selection& rule, selector& choose,
                        std::vector<token_t>& chosen) {
  const token_t first = units.first;
  choose.choose(units.scores, rule, {units.diagonal.begin - first, units.diagonal.end - first},
                chosen);
  for (token_t& unit : chosen) unit += first;
}

/// Throws: shape_error where a coverage budget meets a negative score, which tasks must not do.
inline void check_masses(const selection& rule, std::span<const float> scores) {
  if (rule.amount.by() != budget::kind::coverage) return;
  for (std::size_t i = 0; i < scores.size(); ++i) {
    require(!(scores[i] < 0.0f) || std::isinf(scores[i]),
            "selection: coverage needs scores >= 0, unit ", i, " has ", scores[i]);
  }
}

/// The units that rules choose of each list, in parallel: rule_of(list) -> selection,
/// units_of(list) -> scored_units.
template <class RuleOf, class UnitsOf>
std::vector<std::vector<token_t>> choose_lists(context& ctx, index_t lists, const RuleOf& rule_of,
                                               const UnitsOf& units_of) {
  for (index_t i = 0; i < lists; ++i) {
    const selection& rule = rule_of(i);
    check_selection(rule);
    check_masses(rule, units_of(i).scores);
  }
  std::vector<std::vector<token_t>> chosen(static_cast<std::size_t>(lists));
  std::vector<selector> choose(static_cast<std::size_t>(ctx.executor().concurrency()));
  ctx.executor().parallel_for(lists, [&](index_t task, index_t worker) {
    choose_from(units_of(task), rule_of(task), choose[static_cast<std::size_t>(worker)],
                chosen[static_cast<std::size_t>(task)]);
  });
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
