// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/budget/select.hpp>
#include <sattn/estimate/scores.hpp>
#include <sattn/pattern/token_lists.hpp>

#include <memory>

namespace sattn {

namespace detail {

/// Attention probabilities of up to 16 rows, joined over the heads of one set; -inf where a row
/// may not look. One per task: it holds rows x kv_len floats.
class probability_tile {
 public:
  probability_tile(const kernel_table& kernels, const attention_shape& shape, index_t head_dim,
                   const logit_rules& rules)
      : kernels_(kernels), shape_(shape), rules_(rules), logits_(kernels, head_dim, rules),
        head_(static_cast<std::size_t>(tile_lanes * shape.kv_len)),
        joined_(static_cast<std::size_t>(tile_lanes * shape.kv_len)) {}

  void compute(const tensor_view<const float>& q, const tensor_view<const float>& k, index_t set,
               index_t first_row, index_t rows) {
    const key_range heads = heads_of_set(shape_, rules_.reduce, set);
    const index_t last_row = first_row + rows - 1;
    const key_range visible = {rules_.legal.legal(shape_.position(first_row), shape_.kv_len).begin,
                               rules_.legal.legal(shape_.position(last_row), shape_.kv_len).end};
    for (index_t head = heads.begin; head < heads.end; ++head) {
      logits_.compute(q, head, first_row, rows, k, head / shape_.group_size(), visible,
                      head_.data(), shape_.kv_len);
      for (index_t r = 0; r < rows; ++r) {
        const std::span<float> scores = span_of(head_, r);
        const key_range legal = rules_.legal.legal(shape_.position(first_row + r), shape_.kv_len);
        std::fill(scores.begin(), scores.begin() + legal.begin, not_legal);
        std::fill(scores.begin() + legal.end, scores.end(), not_legal);
        kernels_.softmax(scores.data() + legal.begin, legal.size());
        join_head(span_of(joined_, r), scores, head - heads.begin, heads.size(), rules_.reduce);
      }
    }
  }

  std::span<float> row(index_t r) { return span_of(joined_, r); }

 private:
  std::span<float> span_of(std::vector<float>& rows, index_t r) const {
    return {rows.data() + r * shape_.kv_len, static_cast<std::size_t>(shape_.kv_len)};
  }

  const kernel_table& kernels_;
  attention_shape shape_;
  logit_rules rules_;
  logit_tile logits_;
  std::vector<float> head_;
  std::vector<float> joined_;
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
/// Throws: shape_error if shapes or the rows do not fit.
/// Cost: as dense attention without the values, and sets * rows * kv_len floats.
inline score_tensor row_scores(context& ctx, const attention_shape& shape,
                               const tensor_view<const float>& q,
                               const stored_view& stored_k, key_range rows,
                               const logit_rules& rules = {}) {
  const tensor_view<const float> k =
      detail::check_estimate("row_scores", shape, q, stored_k, rules);
  require(rows.begin >= 0 && rows.begin <= rows.end && rows.end <= shape.q_len,
          "row_scores: rows [", rows.begin, ", ", rows.end, ") of q_len ", shape.q_len);
  score_tensor scores(detail::score_sets(shape, rules.reduce), rows.size(), shape.kv_len,
                      detail::not_legal);
  const index_t tiles = ceil_div(rows.size(), tile_lanes);
  ctx.executor().parallel_for(scores.sets * tiles, [&](index_t task, index_t) {
    const index_t set = task / tiles;
    const index_t first = task % tiles * tile_lanes;
    const index_t count = std::min(tile_lanes, rows.size() - first);
    detail::probability_tile tile(ctx.kernel_table(), shape, q.dim, rules);
    tile.compute(q, k, set, rows.begin + first, count);
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
/// Throws: shape_error if shapes do not fit or rows_per_list is outside [1, 128].
/// Cost: as dense attention without the values, plus a selection per row; memory
/// 2 * 16 * kv_len floats per worker and the lists.
inline token_lists select_tokens(context& ctx, const attention_shape& shape,
                                 const tensor_view<const float>& q,
                                 const stored_view& stored_k, const selection& rule,
                                 const logit_rules& rules = {}, token_t rows_per_list = 1) {
  const tensor_view<const float> k =
      detail::check_estimate("select_tokens", shape, q, stored_k, rules);
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
  struct scratch {
    detail::probability_tile tile;
    selector choose;
    std::vector<float> sum;
  };
  std::vector<std::unique_ptr<scratch>> workers(
      static_cast<std::size_t>(ctx.executor().concurrency()));

  ctx.executor().parallel_for(lists.sets * tasks_per_set, [&](index_t task, index_t worker) {
    std::unique_ptr<scratch>& own = workers[static_cast<std::size_t>(worker)];
    if (own == nullptr) {
      own.reset(new scratch{{ctx.kernel_table(), shape, q.dim, rules},
                            {},
                            std::vector<float>(static_cast<std::size_t>(shape.kv_len))});
    }
    const index_t set = task / tasks_per_set;
    const index_t first_list = task % tasks_per_set * lists_per_task;
    const index_t end_list = std::min(first_list + lists_per_task, per_set);
    const index_t end_row = std::min(end_list * rows_per_list, shape.q_len);
    index_t list = first_list;
    for (index_t row = first_list * rows_per_list; row < end_row; row += tile_lanes) {
      const index_t rows = std::min(tile_lanes, end_row - row);
      own->tile.compute(q, k, set, row, rows);
      for (index_t r = row; r < row + rows; ++r) {
        std::span<const float> scores = own->tile.row(r - row);
        if (rows_per_list > 1) {
          detail::join_rows(own->sum, scores, r % rows_per_list == 0);
          scores = own->sum;
        }
        const index_t next = std::min((list + 1) * rows_per_list, shape.q_len);
        if (r + 1 < next) continue;
        const key_range own_positions{shape.position(list * rows_per_list),
                                      shape.position(next)};
        own->choose.choose(scores, rule, own_positions,
                           chosen[static_cast<std::size_t>(set * per_set + list)]);
        ++list;
      }
    }
  });

  lists.indptr.reserve(chosen.size() + 1);
  lists.indptr.push_back(0);
  for (const std::vector<token_t>& list : chosen) {
    lists.indptr.push_back(lists.indptr.back() + std::ssize(list));
  }
  lists.tokens.reserve(static_cast<std::size_t>(lists.indptr.back()));
  for (const std::vector<token_t>& list : chosen) {
    lists.tokens.insert(lists.tokens.end(), list.begin(), list.end());
  }
  return lists;
}

}  // namespace sattn
