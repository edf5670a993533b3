// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/budget/select.hpp>
#include <sattn/estimate/row_scores.hpp>
#include <sattn/pattern/compose.hpp>
#include <sattn/pattern/vertical_slash.hpp>

namespace sattn {

/// Attention mass of the last queries, by key and by distance.
struct last_query_sums {
  score_tensor columns;    // [sets, 1, kv_len]: mass on each key
  score_tensor distances;  // [sets, 1, kv_len]: mass at each distance behind the query
};

/// Sums the exact attention probabilities of the last rows of q over keys and over distances.
///
/// Shapes: q [q_len, q_heads, head_dim], k [kv_len, kv_heads, head_dim]. Fewer rows than
/// last_queries means all of them. With chunked prefill these are the last rows of the chunk.
/// Throws: shape_error if shapes do not fit or last_queries < 1.
/// Cost: last_queries rows of dense scores; parallel over sets.
/// Source: MInference (arXiv:2407.02490), section 3.
inline last_query_sums last_query_scores(context& ctx, const attention_shape& shape,
                                         const tensor_view<const float>& q,
                                         const stored_view& stored_k,
                                         token_t last_queries = 64,
                                         const logit_rules& rules = {}) {
  const tensor_view<const float> k =
      detail::check_estimate("last_query_scores", shape, q, stored_k, rules);
  require(last_queries >= 1, "last_query_scores: last_queries ", last_queries,
          " must be positive");
  const index_t sets = detail::score_sets(shape, rules.reduce);
  last_query_sums sums{{sets, 1, shape.kv_len, 0.0f}, {sets, 1, shape.kv_len, 0.0f}};
  const index_t first_row = std::max<index_t>(0, shape.q_len - last_queries);
  ctx.executor().parallel_for(sets, [&](index_t set, index_t) {
    detail::probability_tile tile(ctx.kernel_table(), shape, q.dim, rules);
    const std::span<float> columns = sums.columns.row(set, 0);
    const std::span<float> distances = sums.distances.row(set, 0);
    for (index_t row = first_row; row < shape.q_len; row += tile_lanes) {
      const index_t rows = std::min(tile_lanes, shape.q_len - row);
      tile.compute(q, k, set, row, rows);
      for (index_t r = 0; r < rows; ++r) {
        const std::span<const float> p = tile.row(r);
        const token_t position = shape.position(row + r);
        const key_range legal = rules.legal.legal(position, shape.kv_len);
        for (index_t key = legal.begin; key < legal.end; ++key) {
          const float mass = p[static_cast<std::size_t>(key)];
          columns[static_cast<std::size_t>(key)] += mass;
          const index_t distance = index_t{position} - key;
          if (distance >= 0 && distance < shape.kv_len) {
            distances[static_cast<std::size_t>(distance)] += mass;
          }
        }
      }
    }
  });
  return sums;
}

/// The best columns and distances of every set, as one vertical-slash pattern per head.
///
/// Protected `first` units are the first keys and the shortest distances (the local window).
/// Throws: shape_error as selector::choose does.
inline per_head select_vertical_slash(const last_query_sums& sums, const selection& columns,
                                      const selection& distances) {
  detail::check_scores("select_vertical_slash", sums.columns);
  detail::check_scores("select_vertical_slash", sums.distances);
  require(sums.columns.sets == sums.distances.sets && sums.columns.rows == 1 &&
              sums.distances.rows == 1,
          "select_vertical_slash: columns have ", sums.columns.sets, " sets of ",
          sums.columns.rows, " rows, distances ", sums.distances.sets, " of ",
          sums.distances.rows, ", expected one row each");
  per_head heads;
  selector choose;
  for (index_t set = 0; set < sums.columns.sets; ++set) {
    vertical_slash pattern;
    choose.choose(sums.columns.row(set, 0), columns, {}, pattern.columns);
    choose.choose(sums.distances.row(set, 0), distances, {}, pattern.distances);
    heads.patterns.emplace_back(std::move(pattern));
  }
  return heads;
}

}  // namespace sattn
