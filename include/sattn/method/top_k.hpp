// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/estimate/choose_lists.hpp>
#include <sattn/estimate/list_scores.hpp>
#include <sattn/estimate/row_scores.hpp>
#include <sattn/method/method.hpp>
#include <sattn/pattern/basic.hpp>

#include <algorithm>
#include <optional>
#include <utility>

namespace sattn {

/// The best keys of every row by exact attention probabilities: the yardstick of all others, and
/// what a quantised copy of the keys finds at less cost.
///
/// A coverage budget takes as many as hold a share of the attention.
struct top_k_method {
  selection tokens;
  head_reduce reduce = head_reduce::none;
  std::optional<stored_view> shadow = std::nullopt;  // looked at instead of the keys

  /// Throws: shape_error if a shadow has other extents than the keys.
  token_lists choose(context& ctx, const method_inputs& in) const {
    const stored_view& keys = shadow ? *shadow : in.k;
    // Few rows: four heads of a row at a time instead of 16 rows of a head.
    if (in.shape.q_len > 4 * std::min<index_t>(in.shape.group_size(), 4)) {
      return select_tokens(ctx, in.shape, in.q, keys, tokens, in.rules(reduce));
    }
    const attention_plan all =
        plan_prefill(ctx, in.shape, dense{}, {.legal = in.legal, .tile_rows = 1});
    return select_listed(ctx, all, in.q, keys, tokens, in.rules(reduce));
  }
};

inline top_k_method top_k(index_t keys, head_reduce reduce = head_reduce::none) {
  return {{budget::fixed(keys)}, reduce};
}
/// The same over a copy of the keys in fewer bits, such as the int8 view of a second cache.
inline top_k_method shadow_top_k(index_t keys, const stored_view& copy,
                                 head_reduce reduce = head_reduce::none) {
  return {{budget::fixed(keys)}, reduce, copy};
}

/// What one method chooses, thinned out by the probabilities of its keys alone: select, then prune.
///
/// The heads of a group keep one list where `reduce` joins their probabilities, or one each.
/// Source: Twilight (arXiv:2502.02770).
template <attention_method M>
struct pruned {
  M first;
  selection tokens;
  head_reduce reduce = head_reduce::none;
  std::optional<stored_view> shadow = std::nullopt;  // looked at instead of the keys
  index_t dense_layers = 0;                          // the first ones run dense

  any_pattern choose(context& ctx, const method_inputs& in) const {
    if (in.layer < dense_layers) return dense{};
    const auto pattern = first.choose(ctx, in);
    const attention_plan candidates =
        plan_prefill(ctx, in.shape, pattern, {.legal = in.legal, .tile_rows = 1});
    return select_listed(ctx, candidates, in.q, shadow.value_or(in.k), tokens, in.rules(reduce));
  }
};

/// The preset of Twilight's code: as few of the keys that `first` chose as hold a share of their
/// attention, by a copy of the keys in fewer bits where there is one; two dense layers. Its first
/// method takes a quarter of the keys or 8,192, and its copy has 4 bits: here they are what is
/// given, and without a copy the probabilities are exact.
template <attention_method M>
pruned<M> twilight(M first, double coverage = 0.85,
                   std::optional<stored_view> shadow = std::nullopt) {
  return {std::move(first), {budget::coverage(coverage)}, head_reduce::none, shadow, 2};
}
/// The same over all keys.
inline top_k_method twilight(double coverage = 0.85,
                             std::optional<stored_view> shadow = std::nullopt) {
  return {{budget::coverage(coverage)}, head_reduce::none, shadow};
}

/// The best keys of every row by scores that come from elsewhere: a learned indexer of tokens.
/// Shapes: scores [sets, q_len, kv_len], sets = 1, kv_heads or q_heads. Keys that a row may not see
/// are not chosen, whatever their score. Refers to the scores.
/// Source: DeepSeek Sparse Attention chooses so, 2,048 keys for all heads.
struct scored_tokens {
  const score_tensor& scores;
  selection tokens;

  /// Throws: shape_error if the shape or the scores do not fit, protected counts are negative or a
  /// coverage budget meets a negative score; std::bad_alloc.
  /// Cost: two passes over the scores; parallel over sets and rows.
  token_lists choose(context& ctx, const method_inputs& in) const {
    check_shape(in.shape, in.legal);
    require(scores.rows == in.shape.q_len && scores.cols == in.shape.kv_len, "scored_tokens: ",
            "scores are [", scores.sets, ", ", scores.rows, ", ", scores.cols, "], q_len is ",
            in.shape.q_len, ", kv_len ", in.shape.kv_len);
    detail::check_scores("scored_tokens", scores);
    token_lists lists;
    lists.sets = scores.sets;
    lists.append(detail::choose_lists(ctx, scores.sets * scores.rows, tokens, [&](index_t list) {
      const token_t own = in.shape.position(list % scores.rows);
      const key_range legal = in.legal.legal(own, in.shape.kv_len);
      return detail::scored_units{scores.row(list / scores.rows, list % scores.rows)
                                      .subspan(static_cast<std::size_t>(legal.begin),
                                               static_cast<std::size_t>(legal.size())),
                                  legal.begin, {own, own + 1}};
    }));
    return lists;
  }
};

}  // namespace sattn
