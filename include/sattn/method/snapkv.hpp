// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/budget/adaptive.hpp>
#include <sattn/estimate/choose_lists.hpp>
#include <sattn/estimate/last_queries.hpp>
#include <sattn/estimate/smooth.hpp>
#include <sattn/method/cache_method.hpp>
#include <sattn/method/method.hpp>

#include <algorithm>
#include <cmath>
#include <optional>
#include <span>
#include <vector>

namespace sattn {

/// Keeps the keys that the last queries of a prompt attended to most, smoothed along the keys.
///
/// capacity counts all that stays, protected keys too, which it must hold unless it holds all keys,
/// as in the sources. The last queries are the last rows of the inputs: with chunked prefill those
/// of the last chunk.
/// Source: SnapKV (arXiv:2404.14469); with `adaptive`, Ada-KV (arXiv:2407.11550).
struct snapkv_method {
  index_t capacity = 1024;  // keys of a head
  token_t last_queries = 32;
  index_t pool_width = 5;
  pooling pool = pooling::average;
  bool pool_protected = false;  // smooth over the recent keys too, instead of up to them
  bool row_maxima = false;      // the largest probability of the last rows instead of their sum
  head_reduce reduce = head_reduce::mean;  // over the query heads of a group
  bool pool_joined = false;  // smooth what they were reduced to instead of each query head
  protection keep = {.recent = 32};
  // The heads of the call share their budget; of_head and keep are taken from above.
  std::optional<adaptive_budget> adaptive = std::nullopt;

  /// Throws: shape_error if numbers are out of range, reduce is none, keep.diagonal is set or fewer
  /// keys than are protected may stay; std::bad_alloc.
  keep_lists choose_kept(context& ctx, const method_inputs& in) const;
};

namespace detail {

/// Scores of keys for each kv head as SnapKV makes them, [kv_heads, 1, kv_len].
inline score_tensor snapkv_scores(context& ctx, const method_inputs& in, const snapkv_method& m) {
  require(m.reduce != head_reduce::none, "snapkv: a kv head needs one decision of its group");
  const logit_rules rules = in.rules(head_reduce::none);
  score_tensor of_head =
      m.row_maxima ? last_query_maxima(ctx, in.shape, in.q, in.k, m.last_queries, rules)
                   : last_query_scores(ctx, in.shape, in.q, in.k, m.last_queries, rules).columns;
  const index_t recent = std::min(m.keep.recent, in.shape.kv_len);
  const index_t pooled = in.shape.kv_len - (m.pool_protected ? 0 : recent);
  score_tensor scores(in.shape.kv_heads, 1, in.shape.kv_len, 0.0f);
  const index_t group = in.shape.group_size();
  ctx.executor().parallel_for(in.shape.kv_heads, [&](index_t set, index_t) {
    const auto smoothed = [&](std::span<float> row) {
      smooth(row.first(static_cast<std::size_t>(pooled)), m.pool_width, m.pool);
    };
    for (index_t h = 0; h < group; ++h) {
      const std::span<float> row = of_head.row(set * group + h, 0);
      if (!m.pool_joined) smoothed(row);
      join_head(scores.row(set, 0), row, h, group, m.reduce);
    }
    if (m.pool_joined) smoothed(scores.row(set, 0));
  });
  return scores;
}

}  // namespace detail

inline keep_lists snapkv_method::choose_kept(context& ctx, const method_inputs& in) const {
  require(capacity >= 0, "snapkv: capacity ", capacity, " is negative");
  const selection rule{budget::fixed(capacity), keep};
  check_selection(rule);
  require(!keep.diagonal, "snapkv: keep.diagonal has no meaning for a cache; use keep.recent");
  require(capacity >= in.shape.kv_len ||
              (keep.first <= capacity && keep.recent <= capacity - keep.first),
          "snapkv: a capacity of ", capacity, " is less than the first ", keep.first,
          " and last ", keep.recent, " keys, which stay; there are ", in.shape.kv_len);
  require(pool_width > 0 && pool_width % 2 == 1, "snapkv: pool_width ", pool_width,
          ", expected an odd number");
  const score_tensor scores = detail::snapkv_scores(ctx, in, *this);
  if (adaptive) {
    keep_lists kept(static_cast<std::size_t>(in.shape.kv_heads));
    adaptive_budget shared = *adaptive;
    shared.of_head = std::min(capacity, in.shape.kv_len);
    shared.keep = keep;
    if (in.shape.kv_heads > 0) choose_over_heads(scores.values, in.shape.kv_heads, shared, kept);
    return kept;
  }
  return detail::choose_lists(ctx, in.shape.kv_heads, rule, [&](index_t h) {
    return detail::scored_units{scores.row(h, 0)};
  });
}

/// The defaults of SnapKV's code: 32 last queries, which stay, averages of 5. It has no groups;
/// here a kv head takes the mean of its query heads, as kvpress does.
/// Throws: nothing, as the presets below unless they say so; choose_kept refuses what is out of
/// range.
inline snapkv_method snapkv(index_t capacity = 1024, token_t window = 32, index_t pool_width = 5) {
  return {.capacity = capacity, .last_queries = window, .pool_width = pool_width,
          .keep = {.recent = window}};
}

/// The preset of The Sparse Frontier (arXiv:2504.17768): the window is smoothed with the rest, 4
/// first and 128 last keys stay.
inline snapkv_method sf_snapkv(index_t capacity = 1024, token_t approximation = 256,
                               index_t pool_width = 21) {
  return {.capacity = capacity,
          .last_queries = approximation,
          .pool_width = pool_width,
          .pool_protected = true,
          .keep = {.first = 4, .recent = 128}};
}

/// The defaults of Ada-KV's code: maxima of 7 of the mean of a group, and half of the budget split
/// evenly. Its rounding can miss the total; here heads * capacity keys stay exactly. Left out are
/// its `normalize`, which weighs the scores of a head by the share of its mass on its best keys
/// before heads compete, and `skip`, first layers whose heads all keep as much: snapkv() there.
inline snapkv_method ada_snapkv(index_t capacity = 1024, token_t window = 32,
                                double uniform_share = 0.5) {
  return {.capacity = capacity,
          .last_queries = window,
          .pool_width = 7,
          .pool = pooling::maximum,
          .pool_joined = true,
          .keep = {.recent = window},
          .adaptive = adaptive_budget{.uniform_share = uniform_share}};
}

/// The preset of The Sparse Frontier: the largest probability of the window and of the group, and a
/// fifth of the budget, at least what is protected, for every head.
/// Throws: shape_error unless floor_share is in [0, 1].
inline snapkv_method sf_ada_snapkv(index_t capacity = 1024, token_t approximation = 256,
                                   double floor_share = 0.2) {
  require(floor_share >= 0.0 && floor_share <= 1.0, "sf_ada_snapkv: floor_share ", floor_share,
          " is outside [0, 1]");
  snapkv_method m = sf_snapkv(capacity, approximation);
  m.row_maxima = true;
  m.reduce = head_reduce::max;
  m.pool_joined = true;
  const index_t share =
      floor_share < 1.0 ? static_cast<index_t>(static_cast<double>(capacity) * floor_share)
                        : capacity;
  m.adaptive = adaptive_budget{.floor = std::max(share, m.keep.first + m.keep.recent)};
  return m;
}

/// How PyramidKV's budget falls from layer to layer: by the source's integer steps, which overshoot
/// the total a little, or so that all layers add up to layers * capacity.
enum class pyramid_steps { published, exact };

struct pyramid_schedule {
  index_t beta = 20;  // the last layer keeps its window and 1 / beta of what layers have besides
  pyramid_steps steps = pyramid_steps::published;
};

/// What a layer of PyramidKV may keep, of `capacity` on average: more in the first layers, in equal
/// steps. Prompts of up to `capacity` keys keep everything, those of less than
/// 2 * (capacity - window) the same in every layer.
/// Throws: shape_error unless the layer exists, no number is negative, beta >= 1 and, where not all
/// is kept, window <= capacity.
/// Source: PyramidKV (arXiv:2406.02069).
inline index_t pyramid_capacity(index_t layer, index_t layers, index_t kv_len,
                                index_t capacity = 1024, index_t window = 32,
                                const pyramid_schedule& schedule = {}) {
  require(layer >= 0 && layer < layers, "pyramid_capacity: layer ", layer, " of ", layers);
  require(kv_len >= 0 && capacity >= 0 && window >= 0 && schedule.beta >= 1,
          "pyramid_capacity: ", kv_len, " keys, capacity ", capacity,
          ", a window of ", window, ", beta ", schedule.beta);
  if (kv_len <= capacity) return kv_len;
  require(window <= capacity, "pyramid_capacity: capacity ", capacity, ", a window of ", window);
  const index_t middle = capacity - window;
  if (layers == 1 || kv_len < 2 * middle) return capacity;
  index_t least = middle / schedule.beta;
  index_t most = 2 * middle - least;
  if (most >= kv_len - window) {
    most = kv_len - window;
    least = 2 * middle - most;
  }
  if (schedule.steps == pyramid_steps::exact) {
    // What the first `count` layers may keep, rounded down.
    const auto first = [&](index_t count) {
      return count * (2 * most * (layers - 1) - (most - least) * (count - 1)) / (2 * (layers - 1));
    };
    return first(layer + 1) - first(layer) + window;
  }
  const index_t step = (most - least) / (layers - 1);
  return most - layer * step + window;
}

/// SnapKV with PyramidKV's capacity for a layer; pool_width and pool of the result can be turned.
/// Throws: shape_error as pyramid_capacity does.
inline snapkv_method pyramid(index_t layer, index_t layers, index_t kv_len,
                             index_t capacity = 1024, token_t window = 32,
                             const pyramid_schedule& schedule = {}) {
  return snapkv(pyramid_capacity(layer, layers, kv_len, capacity, window, schedule), window);
}

}  // namespace sattn
