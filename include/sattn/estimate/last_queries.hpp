// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/estimate/choose_lists.hpp>
#include <sattn/estimate/scores.hpp>
#include <sattn/pattern/compose.hpp>
#include <sattn/pattern/vertical_slash.hpp>

#include <algorithm>
#include <span>
#include <utility>
#include <vector>

namespace sattn {

/// Attention mass of the last queries, by key and by distance.
struct last_query_sums {
  score_tensor columns;    // [sets, 1, kv_len]: mass on each key
  score_tensor distances;  // [sets, 1, kv_len]: mass at each distance behind the query
};

namespace detail {

/// Adds the probabilities of 16 rows to what each key gets and to what each distance gets.
class probability_sums {
 public:
  static std::size_t bytes(index_t kv_len) {
    return padded(static_cast<std::size_t>(kv_len + 2 * tile_lanes) * sizeof(float));
  }
  probability_sums(scratch_arena& arena, const kernel_table& kernels, index_t kv_len,
                   std::span<float> columns)
      : kernels_(kernels), kv_len_(kv_len), columns_(columns),
        distances_(arena.take<float>(kv_len + 2 * tile_lanes)) {
    std::fill_n(distances_, kv_len + 2 * tile_lanes, 0.0f);
  }

  /// probabilities [keys.size()][16] of rows from position `top` on.
  void add(const float* probabilities, key_range keys, token_t top) {
    // Keys at distances that some of 16 rows may have: from -15 to kv_len - 1 and 15 more.
    const index_t near = std::clamp<index_t>(index_t{top} + tile_lanes, keys.begin, keys.end);
    const index_t far = std::clamp<index_t>(index_t{top} - kv_len_ + 1, keys.begin, near);
    add(probabilities, keys.begin, keys.begin, far, top, false);
    add(probabilities, keys.begin, far, near, top, true);
    add(probabilities, keys.begin, near, keys.end, top, false);
  }
  /// Of distances 0 .. kv_len - 1.
  const float* distances() const { return distances_ + tile_lanes; }

 private:
  void add(const float* probabilities, index_t first, index_t begin, index_t end, token_t top,
           bool with_distances) {
    for (index_t key = begin; key < end; key += chunk_keys) {
      kernels_.sum_probabilities(
          {.probabilities = probabilities + (key - first) * tile_lanes,
           .count = std::min(chunk_keys, end - key),
           .columns = columns_.data() + key,
           .distances = with_distances ? distances_ + tile_lanes + (top - key) : nullptr});
    }
  }

  const kernel_table& kernels_;
  index_t kv_len_;
  std::span<float> columns_;
  float* distances_;  // of -16 and on
};

/// Raises `joined` to the maximum; the first one is copied.
inline void join_maximum(float* joined, const float* values, index_t count, bool first) {
  for (index_t i = 0; i < count; ++i) {
    joined[i] = first ? values[i] : std::max(joined[i], values[i]);
  }
}

/// Sums of the sets that wanted(set) names, 0 of the others.
template <class Wanted>
last_query_sums sum_last_queries(context& ctx, const attention_shape& shape,
                                 const tensor_view<const float>& q, const stored_view& k,
                                 token_t last_queries, const logit_rules& rules,
                                 const Wanted& wanted) {
  check_estimate("last_query_scores", shape, q, k, rules);
  require(last_queries >= 1, "last_query_scores: last_queries ", last_queries,
          " must be positive");
  const index_t sets = score_sets(shape, rules.reduce);
  const bool maximum = rules.reduce == head_reduce::max;
  const index_t lanes_floats = round_up(shape.kv_len, chunk_keys) * tile_lanes;
  const worker_scratch scratch(
      ctx, score_lanes::bytes(shape, k) + probability_sums::bytes(shape.kv_len) +
               (maximum ? static_cast<std::size_t>(lanes_floats) * sizeof(float) : 0));
  last_query_sums sums{{sets, 1, shape.kv_len, 0.0f}, {sets, 1, shape.kv_len, 0.0f}};
  const index_t first_row = std::max<index_t>(0, shape.q_len - last_queries);
  ctx.executor().parallel_for(sets, [&](index_t set, index_t worker) {
    if (!wanted(set)) return;
    scratch_arena arena = scratch.of(worker);
    const std::span<float> columns = sums.columns.row(set, 0);
    score_lanes lanes(arena, ctx.kernel_table(), shape, q, k, rules);
    probability_sums sum(arena, ctx.kernel_table(), shape.kv_len, columns);
    float* const joined = maximum ? arena.take<float>(lanes_floats) : nullptr;
    const key_range heads = heads_of_set(shape, rules.reduce, set);
    for (index_t row = first_row; row < shape.q_len; row += tile_lanes) {
      const index_t rows = std::min(tile_lanes, shape.q_len - row);
      for (index_t head = heads.begin; head < heads.end; ++head) {
        lanes.score(head, row, rows);
        lanes.normalise();
        if (maximum) {
          join_maximum(joined, lanes.data(), lanes.keys().size() * tile_lanes,
                               head == heads.begin);
          if (head + 1 < heads.end) continue;
        }
        sum.add(maximum ? joined : lanes.data(), lanes.keys(), shape.position(row));
      }
    }
    const std::span<float> distances = sums.distances.row(set, 0);
    std::copy_n(sum.distances(), shape.kv_len, distances.begin());
    if (rules.reduce == head_reduce::mean) {
      const auto count = static_cast<float>(heads.size());
      for (float& x : columns) x /= count;
      for (float& x : distances) x /= count;
    }
  });
  return sums;
}

}  // namespace detail

/// Sums the exact attention probabilities of the last rows of q over keys and over distances.
///
/// Shapes: q [q_len, q_heads, head_dim], k [kv_len, kv_heads, head_dim] of any type and layout.
/// Fewer rows than last_queries means all of them. With chunked prefill these are the last rows of
/// the chunk. A maximum over heads is taken of each row's probabilities, before they are summed.
/// Throws: shape_error if shapes do not fit, last_queries < 1 or a borrowed workspace is too small.
/// Cost: last_queries rows of dense scores; parallel over sets; for each worker 17 * kv_len floats,
/// 33 * kv_len for a maximum over heads.
/// Source: MInference (arXiv:2407.02490), section 3.
inline last_query_sums last_query_scores(context& ctx, const attention_shape& shape,
                                         const tensor_view<const float>& q, const stored_view& k,
                                         token_t last_queries = 64,
                                         const logit_rules& rules = {}) {
  return detail::sum_last_queries(ctx, shape, q, k, last_queries, rules,
                                  [](index_t) { return true; });
}

/// The largest probability that any of the last rows gives to each key, for each query head or
/// joined over heads.
///
/// Shapes, errors and cost as of last_query_scores; result [sets, 1, kv_len], 0 where no row looks.
inline score_tensor last_query_maxima(context& ctx, const attention_shape& shape,
                                      const tensor_view<const float>& q, const stored_view& k,
                                      token_t last_queries = 64, const logit_rules& rules = {}) {
  detail::check_estimate("last_query_maxima", shape, q, k, rules);
  require(last_queries >= 1, "last_query_maxima: last_queries ", last_queries,
          " must be positive");
  score_tensor maxima(detail::score_sets(shape, rules.reduce), 1, shape.kv_len, 0.0f);
  const detail::worker_scratch scratch(
      ctx, detail::score_lanes::bytes(shape, k) +
               detail::padded(static_cast<std::size_t>(shape.kv_len) * sizeof(float)));
  const index_t first_row = std::max<index_t>(0, shape.q_len - last_queries);
  ctx.executor().parallel_for(maxima.sets, [&](index_t set, index_t worker) {
    detail::scratch_arena arena = scratch.of(worker);
    detail::score_lanes lanes(arena, ctx.kernel_table(), shape, q, k, rules);
    const std::span<float> of_head(arena.take<float>(shape.kv_len),
                                   static_cast<std::size_t>(shape.kv_len));
    const key_range heads = detail::heads_of_set(shape, rules.reduce, set);
    for (index_t head = heads.begin; head < heads.end; ++head) {
      std::fill(of_head.begin(), of_head.end(), 0.0f);
      for (index_t row = first_row; row < shape.q_len; row += tile_lanes) {
        lanes.score(head, row, std::min(tile_lanes, shape.q_len - row));
        lanes.normalise();
        const key_range keys = lanes.keys();
        for (index_t key = keys.begin; key < keys.end; ++key) {
          const float* const p = lanes.data() + (key - keys.begin) * tile_lanes;
          float& top = of_head[static_cast<std::size_t>(key)];
          top = std::max(top, *std::max_element(p, p + tile_lanes));
        }
      }
      detail::join_head(maxima.row(set, 0), of_head, head - heads.begin, heads.size(),
                        rules.reduce);
    }
  });
  return maxima;
}

/// The best columns and distances of every set, as one vertical-slash pattern per head.
///
/// Protected `first` units are the first keys and the shortest distances (the local window).
/// Throws: shape_error if the sums do not fit each other, protected counts are negative or a
/// coverage budget meets a negative score; std::bad_alloc.
/// Cost: two passes over the sums of a set and a selection; parallel over sets.
inline per_head select_vertical_slash(context& ctx, const last_query_sums& sums,
                                      const selection& columns, const selection& distances) {
  detail::check_scores("select_vertical_slash", sums.columns);
  detail::check_scores("select_vertical_slash", sums.distances);
  require(sums.columns.sets == sums.distances.sets && sums.columns.rows == 1 &&
              sums.distances.rows == 1,
          "select_vertical_slash: columns have ", sums.columns.sets, " sets of ",
          sums.columns.rows, " rows, distances ", sums.distances.sets, " of ",
          sums.distances.rows, ", expected one row each");
  const auto chosen_of = [&](const score_tensor& scores, const selection& rule) {
    return detail::choose_lists(ctx, scores.sets, rule, [&](index_t set) {
      return detail::scored_units{scores.row(set, 0)};
    });
  };
  std::vector<std::vector<token_t>> keys = chosen_of(sums.columns, columns);
  std::vector<std::vector<token_t>> behind = chosen_of(sums.distances, distances);
  per_head heads;
  for (std::size_t set = 0; set < keys.size(); ++set) {
    heads.patterns.emplace_back(vertical_slash{std::move(keys[set]), std::move(behind[set])});
  }
  return heads;
}

}  // namespace sattn
