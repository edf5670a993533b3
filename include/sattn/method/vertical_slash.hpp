// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/estimate/last_queries.hpp>
#include <sattn/method/method.hpp>
#include <sattn/pattern/basic.hpp>

#include <utility>
#include <vector>

namespace sattn {

/// Vertical-slash attention: the columns and the distances that the last queries attend to most.
///
/// Every query head chooses for itself unless `reduce` says otherwise. Of a chunk of a prompt the
/// last queries are those of the chunk. Budgets count columns and distances; the protected ones are
/// a part of them.
/// Source: MInference (arXiv:2407.02490). Its kernel computes whole tiles of 64 rows and 64 keys:
/// all that rounding::cover at 64 rows selects and what else is in these tiles.
struct vertical_slash_method {
  selection columns;
  selection distances;
  token_t last_queries = 64;
  head_reduce reduce = head_reduce::none;

  /// A pattern for each set of heads that `reduce` leaves: q_heads, or kv_heads.
  /// Shapes: q [q_len, q_heads, head_dim], k [kv_len, kv_heads, head_dim].
  /// Throws: shape_error if shapes do not fit, last_queries is not positive or protected counts are
  /// negative; std::bad_alloc.
  per_head choose(context& ctx, const method_inputs& in) const {
    check_selection(columns);
    check_selection(distances);
    return select_vertical_slash(
        ctx, last_query_scores(ctx, in.shape, in.q, in.k, last_queries, in.rules(reduce)), columns,
        distances);
  }
};

/// The preset of MInference's code: 30 first keys, 100 nearest distances, 64 last queries. Its own
/// choice of distances is arbitrary where slash < 100; here all 100 nearest are kept then.
/// Throws: shape_error if a budget is negative.
inline vertical_slash_method minference(token_t vertical = 1000, token_t slash = 6096) {
  return {{budget::fixed(vertical), {.first = 30}}, {budget::fixed(slash), {.first = 100}}, 64};
}

/// What MInference's search found for one head.
struct minference_head {
  enum class kind { vertical_slash, streaming };
  kind type = kind::vertical_slash;
  token_t first = 1000;   // columns, or first keys
  token_t second = 6096;  // distances, or last keys
};

/// A setting for each query head of a layer; interop/minference_json.hpp reads MInference's files.
/// Heads that stream are not looked at.
struct minference_heads {
  std::vector<minference_head> heads;

  /// Throws: shape_error unless there is a setting for each query head, of numbers that are not
  /// negative; std::bad_alloc.
  per_head choose(context& ctx, const method_inputs& in) const {
    require(std::ssize(heads) == in.shape.q_heads, "minference_heads: ", heads.size(),
            " settings for ", in.shape.q_heads, " query heads");
    std::vector<vertical_slash_method> rules;
    for (const minference_head& head : heads) {
      rules.push_back(minference(head.first, head.second));
    }
    const auto streams = [&](index_t h) {
      return heads[static_cast<std::size_t>(h)].type == minference_head::kind::streaming;
    };
    const last_query_sums sums =
        detail::sum_last_queries(ctx, in.shape, in.q, in.k, 64, in.rules(head_reduce::none),
                                 [&](index_t h) { return !streams(h); });
    // Lists 2 * head are of columns, the others of distances.
    std::vector<std::vector<token_t>> chosen = detail::choose_lists(
        ctx, 2 * in.shape.q_heads,
        [&](index_t list) -> const selection& {
          const vertical_slash_method& of_head = rules[static_cast<std::size_t>(list / 2)];
          return list % 2 == 0 ? of_head.columns : of_head.distances;
        },
        [&](index_t list) {
          if (streams(list / 2)) return detail::scored_units{};
          return detail::scored_units{
              (list % 2 == 0 ? sums.columns : sums.distances).row(list / 2, 0)};
        });
    per_head result;
    for (index_t h = 0; h < in.shape.q_heads; ++h) {
      const minference_head& setting = heads[static_cast<std::size_t>(h)];
      if (streams(h)) {
        result.patterns.emplace_back(sink{setting.first} | sliding_window{setting.second});
        continue;
      }
      auto* const lists = chosen.data() + 2 * h;
      result.patterns.emplace_back(vertical_slash{std::move(lists[0]), std::move(lists[1])});
    }
    return result;
  }
};

/// The preset of The Sparse Frontier (arXiv:2504.17768): 4 first keys, 64 nearest distances.
/// Throws: shape_error if a budget is negative.
inline vertical_slash_method sf_vertical_slash(token_t vertical = 512, token_t slash = 512,
                                               token_t approximation = 256) {
  return {{budget::fixed(vertical), {.first = 4}},
          {budget::fixed(slash), {.first = 64}},
          approximation};
}

/// The same with as many columns and distances as cover a share of the mass, at least min_budget:
/// the FlexPrefill of The Sparse Frontier. The shares are of the mass of all columns and of all
/// distances; what is protected takes places of the budget. A share of 0, which the paper uses,
/// leaves min_budget.
/// Throws: shape_error unless coverage is in [0, 1] and min_budget is not negative.
inline vertical_slash_method sf_flexprefill(double coverage = 0.65, token_t approximation = 512,
                                            token_t min_budget = 512) {
  using enum protection::counting;
  const budget amount = budget::coverage_above(coverage).at_least(min_budget);
  return {{amount, {.first = 4, .counted = slots}},
          {amount, {.first = 64, .counted = slots}},
          approximation};
}

}  // namespace sattn
