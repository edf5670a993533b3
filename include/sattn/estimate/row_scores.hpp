// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/budget/select.hpp>
#include <sattn/estimate/scores.hpp>
#include <sattn/pattern/token_lists.hpp>

#include <algorithm>
#include <span>
#include <vector>

namespace sattn {

namespace detail {

/// Attention probabilities of up to 16 rows, joined over the heads of one set; -inf where a row
/// may not look.
class probability_tile {
 public:
  static std::size_t bytes(const attention_shape& shape, const stored_view& k) {
    return score_lanes::bytes(shape, k) +
           2 * padded(static_cast<std::size_t>(tile_lanes * shape.kv_len) * sizeof(float));
  }
  probability_tile(scratch_arena arena, const kernel_table& kernels, const attention_shape& shape,
                   const tensor_view<const float>& q, const stored_view& k,
                   const logit_rules& rules)
      : shape_(shape), rules_(rules), lanes_(arena, kernels, shape, q, k, rules),
        head_(arena.take<float>(tile_lanes * shape.kv_len)),
        joined_(arena.take<float>(tile_lanes * shape.kv_len)) {}

  void compute(index_t set, index_t first_row, index_t rows) {
    const key_range heads = heads_of_set(shape_, rules_.reduce, set);
    for (index_t head = heads.begin; head < heads.end; ++head) {
      lanes_.score(head, first_row, rows);
      lanes_.normalise();
      const key_range keys = lanes_.keys();
      for (index_t r = 0; r < rows; ++r) {
        const std::span<float> of_row = span_of(head_, r);
        const key_range legal = rules_.legal.legal(shape_.position(first_row + r), shape_.kv_len);
        std::fill(of_row.begin(), of_row.begin() + legal.begin, not_legal);
        std::fill(of_row.begin() + legal.end, of_row.end(), not_legal);
        copy_lane(lanes_.data() + (legal.begin - keys.begin) * tile_lanes, legal.size(), r,
                  of_row.data() + legal.begin);
        join_head(span_of(joined_, r), of_row, head - heads.begin, heads.size(), rules_.reduce);
      }
    }
  }

  std::span<float> row(index_t r) { return span_of(joined_, r); }

 private:
  std::span<float> span_of(float* rows, index_t r) const {
    return {rows + r * shape_.kv_len, static_cast<std::size_t>(shape_.kv_len)};
  }

  attention_shape shape_;
  logit_rules rules_;
  score_lanes lanes_;
  float* head_;
  float* joined_;
};

/// Adds the probabilities of one more row of a list; illegal only where no row may look.
inline void join_rows(std::span<float> sum, std::span<const float> row, bool first) {
  for (std::size_t i = 0; i < sum.size(); ++i) {
    if (first || sum[i] == not_legal) {
      sum[i] = row[i];
    } else if (row[i] != not_legal) {
      sum[i] += row[i];
    }
  }
}

}  // namespace detail

/// Exact attention probabilities of the rows [begin, end), joined over the heads of a set.
///
/// Shapes: q [q_len, q_heads, head_dim], k [kv_len, kv_heads, head_dim]; result
/// [sets, end - begin, kv_len], -inf where a row may not look.
/// Throws: shape_error if shapes or the rows do not fit, or a borrowed workspace is too small.
/// Cost: as dense attention without the values, and sets * rows * kv_len floats.
inline score_tensor row_scores(context& ctx, const attention_shape& shape,
                               const tensor_view<const float>& q, const stored_view& k,
                               key_range rows, const logit_rules& rules = {}) {
  detail::check_estimate("row_scores", shape, q, k, rules);
  require(rows.begin >= 0 && rows.begin <= rows.end && rows.end <= shape.q_len,
          "row_scores: rows [", rows.begin, ", ", rows.end, ") of q_len ", shape.q_len);
  score_tensor scores(detail::score_sets(shape, rules.reduce), rows.size(), shape.kv_len,
                      detail::not_legal);
  const index_t tiles = ceil_div(rows.size(), tile_lanes);
  const detail::worker_scratch scratch(ctx, detail::probability_tile::bytes(shape, k));
  ctx.executor().parallel_for(scores.sets * tiles, [&](index_t task, index_t worker) {
    const index_t set = task / tiles;
    const index_t first = task % tiles * tile_lanes;
    const index_t count = std::min(tile_lanes, rows.size() - first);
    detail::probability_tile tile(scratch.of(worker), ctx.kernel_table(), shape, q, k, rules);
    tile.compute(set, rows.begin + first, count);
    for (index_t r = 0; r < count; ++r) {
      const std::span<const float> row = tile.row(r);
      std::copy(row.begin(), row.end(), scores.row(set, first + r).begin());
    }
  });
  return scores;
}

/// The best keys of every row, or of every `rows_per_list` rows by their summed probabilities, from
/// exact attention scores: what top-k attention can reach at best.
///
/// Shapes: as row_scores; the lists have sets = q_heads or, where heads are reduced, kv_heads.
/// Protected `diagonal` keys are those at the positions of the list's rows.
/// Throws: shape_error if shapes do not fit, rows_per_list is outside [1, 128] or a borrowed
/// workspace is too small.
/// Cost: as dense attention without the values, plus a selection per row; memory
/// 3 * 16 * kv_len floats per worker and the lists.
inline token_lists select_tokens(context& ctx, const attention_shape& shape,
                                 const tensor_view<const float>& q, const stored_view& k,
                                 const selection& rule, const logit_rules& rules = {},
                                 token_t rows_per_list = 1) {
  detail::check_estimate("select_tokens", shape, q, k, rules);
  check_selection(rule);
  require(rows_per_list >= 1 && rows_per_list <= max_tile_rows, "select_tokens: rows_per_list ",
          rows_per_list, ", expected 1 to ", max_tile_rows);
  token_lists lists;
  lists.rows_per_list = rows_per_list;
  lists.sets = detail::score_sets(shape, rules.reduce);
  const index_t per_set = ceil_div(shape.q_len, rows_per_list);
  // A task takes as many lists as fill 16 rows.
  const index_t lists_per_task = std::max<index_t>(1, tile_lanes / rows_per_list);
  const index_t tasks_per_set = ceil_div(per_set, lists_per_task);
  std::vector<std::vector<token_t>> chosen(static_cast<std::size_t>(lists.sets * per_set));
  struct lists_of_worker {
    selector choose;
    std::vector<float> sum;
  };
  std::vector<lists_of_worker> workers(static_cast<std::size_t>(ctx.executor().concurrency()));
  const detail::worker_scratch scratch(ctx, detail::probability_tile::bytes(shape, k));

  ctx.executor().parallel_for(lists.sets * tasks_per_set, [&](index_t task, index_t worker) {
    auto& [choose, sum] = workers[static_cast<std::size_t>(worker)];
    sum.resize(static_cast<std::size_t>(shape.kv_len));
    detail::probability_tile tile(scratch.of(worker), ctx.kernel_table(), shape, q, k, rules);
    const index_t set = task / tasks_per_set;
    const index_t first_list = task % tasks_per_set * lists_per_task;
    const index_t end_list = std::min(first_list + lists_per_task, per_set);
    const index_t end_row = std::min(end_list * rows_per_list, shape.q_len);
    index_t list = first_list;
    for (index_t row = first_list * rows_per_list; row < end_row; row += tile_lanes) {
      const index_t rows = std::min(tile_lanes, end_row - row);
      tile.compute(set, row, rows);
      for (index_t r = row; r < row + rows; ++r) {
        std::span<const float> scores = tile.row(r - row);
        if (rows_per_list > 1) {
          detail::join_rows(sum, scores, r % rows_per_list == 0);
          scores = sum;
        }
        const index_t next = std::min((list + 1) * rows_per_list, shape.q_len);
        if (r + 1 < next) continue;
        const key_range own_positions{shape.position(list * rows_per_list),
                                      shape.position(next)};
        choose.choose(scores, rule, own_positions,
                           chosen[static_cast<std::size_t>(set * per_set + list)]);
        ++list;
      }
    }
  });

  lists.append(chosen);
  return lists;
}

}  // namespace sattn
