// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/budget/select.hpp>
#include <sattn/core/error.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <span>
#include <utility>
#include <vector>

namespace sattn {

/// A budget that several heads share.
struct adaptive_budget {
  index_t of_head = 0;         // units that a head has on average
  index_t floor = 0;           // of its best units that every head keeps, protected ones among them
  double uniform_share = 0.0;  // of the budget that is split evenly instead, from 0 to 1
  protection keep = {};
};

/// Splits one budget over heads by their scores: every head keeps its protected units and the best
/// up to the floor, and the rest of heads * of_head units are the best of all heads together. A
/// uniform share moves each head's count that far towards of_head.
///
/// scores [heads][units], -inf = not legal; chosen[head] gets positions, ascending. Exactly
/// min(heads * of_head, legal units) are chosen, or all protected ones where those are more. Of
/// equal scores the lower head wins, then the lower position; a floor above of_head counts as
/// of_head.
/// Throws: shape_error if the scores are no multiple of heads, a number is out of range or
/// protected units are counted on top.
/// Source: Ada-KV (arXiv:2407.11550), whose code rounds each head's count and so misses the total;
/// the floor is that of The Sparse Frontier.
inline void choose_over_heads(std::span<const float> scores, index_t heads,
                              const adaptive_budget& rule,
                              std::vector<std::vector<token_t>>& chosen);

namespace detail {

/// Numbers whose sum is that of `counts`, each moved a share of the way to an even split that gives
/// none more than its limit, in whole steps: the fractions that are largest are rounded up, of
/// equal ones the first. No count exceeds its limit.
inline std::vector<index_t> even_out(const std::vector<index_t>& counts,
                                     const std::vector<index_t>& limits, double share) {
  index_t total = 0;
  for (const index_t c : counts) total += c;
  std::vector<std::size_t> order(counts.size());
  for (std::size_t h = 0; h < order.size(); ++h) order[h] = h;
  std::sort(order.begin(), order.end(),
            [&](std::size_t a, std::size_t b) { return limits[a] < limits[b]; });
  std::vector<double> level(counts.size());
  auto left = static_cast<double>(total);
  for (std::size_t i = 0; i < order.size(); ++i) {
    const double even = left / static_cast<double>(order.size() - i);
    level[order[i]] = std::min(even, static_cast<double>(limits[order[i]]));
    left -= level[order[i]];
  }
  std::vector<index_t> result;
  std::vector<std::pair<double, std::size_t>> fractions;  // negative, so that the largest is first
  for (std::size_t h = 0; h < counts.size(); ++h) {
    const double wanted = (1.0 - share) * static_cast<double>(counts[h]) + share * level[h];
    result.push_back(std::min(static_cast<index_t>(std::floor(wanted)), limits[h]));
    fractions.emplace_back(static_cast<double>(result.back()) - wanted, h);
    total -= result.back();
  }
  std::sort(fractions.begin(), fractions.end());
  for (std::size_t i = 0; total > 0 && i < fractions.size(); ++i) {
    const std::size_t h = fractions[i].second;
    if (result[h] == limits[h]) continue;
    ++result[h];
    --total;
  }
  return result;
}

}  // namespace detail

inline void choose_over_heads(std::span<const float> scores, index_t heads,
                              const adaptive_budget& rule,
                              std::vector<std::vector<token_t>>& chosen) {
  require(heads > 0 && std::ssize(scores) % heads == 0, "choose_over_heads: ", scores.size(),
          " scores for ", heads, " heads");
  require(rule.of_head >= 0 && rule.floor >= 0 && rule.uniform_share >= 0.0 &&
              rule.uniform_share <= 1.0,
          "choose_over_heads: ", rule.of_head, " units of a head, a floor of ", rule.floor,
          ", a uniform share of ", rule.uniform_share);
  require(rule.keep.counted != protection::counting::on_top,
          "choose_over_heads: protected units are a part of the budget");
  require(std::ssize(scores) <= std::numeric_limits<token_t>::max(), "choose_over_heads: ",
          scores.size(), " scores, positions are 32 bit");
  const selection at_least{budget::fixed(std::min(rule.floor, rule.of_head)), rule.keep};
  check_selection(at_least);
  const auto units = static_cast<std::size_t>(std::ssize(scores) / heads);
  constexpr float illegal = -std::numeric_limits<float>::infinity();
  chosen.resize(static_cast<std::size_t>(heads));
  selector choose;
  // What no head has chosen yet competes in one row, in which heads follow each other.
  std::vector<float> rest(scores.begin(), scores.end());
  index_t left = heads * rule.of_head;
  for (std::size_t h = 0; h < chosen.size(); ++h) {
    choose.choose(scores.subspan(h * units, units), at_least, {}, chosen[h]);
    left -= std::ssize(chosen[h]);
    for (const token_t i : chosen[h]) rest[h * units + static_cast<std::size_t>(i)] = illegal;
  }
  std::vector<token_t> more;
  choose.choose(rest, {budget::fixed(std::max<index_t>(left, 0))}, {}, more);
  for (const token_t i : more) {
    chosen[static_cast<std::size_t>(i) / units].push_back(
        static_cast<token_t>(static_cast<std::size_t>(i) % units));
  }
  for (std::vector<token_t>& list : chosen) std::sort(list.begin(), list.end());
  if (rule.uniform_share == 0.0) return;
  std::vector<index_t> counts;
  std::vector<index_t> legal;
  for (std::size_t h = 0; h < chosen.size(); ++h) {
    const std::span<const float> of_head = scores.subspan(h * units, units);
    counts.push_back(std::ssize(chosen[h]));
    legal.push_back(std::ssize(of_head) - std::count(of_head.begin(), of_head.end(), illegal));
  }
  counts = detail::even_out(counts, legal, rule.uniform_share);
  for (std::size_t h = 0; h < chosen.size(); ++h) {
    choose.choose(scores.subspan(h * units, units), {budget::fixed(counts[h]), rule.keep}, {},
                  chosen[h]);
  }
}

}  // namespace sattn
