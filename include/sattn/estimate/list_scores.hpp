// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/budget/select.hpp>
#include <sattn/estimate/scores.hpp>
#include <sattn/pattern/token_lists.hpp>
#include <sattn/plan/tile_cursor.hpp>

#include <algorithm>
#include <span>
#include <vector>

namespace sattn {

namespace detail {

/// Scores of up to 16 query heads of a row for a list of keys, which are read once, as they are
/// stored.
class list_scorer {
 public:
  static std::size_t bytes(const stored_view& k) {
    return 2 * padded(sizeof(located_rows)) +
           padded(static_cast<std::size_t>(tile_lanes * row_out_floats(k.dim)) * sizeof(float)) +
           padded(static_cast<std::size_t>(2 * widened_floats(k)) * sizeof(float));
  }
  list_scorer(scratch_arena& arena, const kernel_table& kernels, const logit_factors& factors,
              const stored_view& k)
      : kernels_(kernels), factors_(factors), dim_(k.dim), room_(widened_floats(k)),
        located_{arena.take<located_rows>(1), arena.take<located_rows>(1)},
        q_(arena.take<float>(tile_lanes * row_out_floats(k.dim))),
        widened_(arena.take<float>(2 * room_)) {}

  /// scores[head][stride] of the heads [first, first + heads) of a row.
  void score(const tensor_view<const float>& q, index_t row, index_t first, index_t heads,
             const row_source& source, std::span<const token_t> keys, float* scores,
             index_t stride) {
    const index_t q_stride = row_out_floats(dim_);
    std::fill_n(q_, heads * q_stride, 0.0f);
    for (index_t h = 0; h < heads; ++h) {
      const float* const from = q.row(row, first + h);
      for (index_t d = 0; d < dim_; ++d) q_[h * q_stride + d] = from[d] * factors_.pack_scale;
    }
    const index_t count = std::ssize(keys);
    for (index_t at = 0, now = 0; at < count; at += chunk_keys, now ^= 1) {
      if (at == 0) locate(0, source, keys, 0);
      const bool more = at + chunk_keys < count;
      if (more) locate(now ^ 1, source, keys, at + chunk_keys);
      const located_rows& rows = *located_[now];
      const located_rows& next = *located_[more ? now ^ 1 : now];
      kernels_.score_rows({.rows = {.q = q_,
                                    .queries = heads,
                                    .k_type = rows.type,
                                    .v_type = rows.type,
                                    .k_rows = rows.rows.data(),
                                    .v_rows = rows.rows.data(),
                                    .k_scales = rows.scales_from(0),
                                    .v_scales = nullptr,
                                    .next_k = next.rows.data(),
                                    .next_v = next.rows.data(),
                                    .count = rows.count,
                                    .masks = nullptr,
                                    .mask_bit = nullptr,
                                    .cached = false,
                                    .head_dim = dim_,
                                    .v_dim = 0,
                                    .soft_cap = factors_.soft_cap,
                                    .states = nullptr},
                           .scores = scores + at,
                           .stride = stride});
    }
  }

 private:
  static index_t widened_floats(const stored_view& k) {
    return located_rows::widened_floats(k, row_reader::rows);
  }
  void locate(index_t i, const row_source& source, std::span<const token_t> keys, index_t first) {
    located_[i]->locate(keys.data() + first, std::min(chunk_keys, std::ssize(keys) - first), source,
                        row_reader::rows, dim_, kernels_, widened_ + i * room_);
  }

  const kernel_table& kernels_;
  logit_factors factors_;
  index_t dim_;
  index_t room_;  // floats of widened_ for one chunk
  located_rows* located_[2];
  float* q_;
  float* widened_;
};

}  // namespace detail

/// The best of the keys that a plan with tiles of one row names, for every row: probabilities among
/// these keys decide. Lists for each query head, or for each kv head where heads are joined.
///
/// Shapes: q [q_len, q_heads, head_dim], k [kv_len, kv_heads, head_dim] of any type and layout.
/// Protected units are counted within the list; `diagonal` keys are those at the row's position.
/// Throws: shape_error if shapes do not fit, the plan's tiles are of several rows, heads are joined
/// that have lists of their own, or a borrowed workspace is too small.
/// Cost: the listed keys' scores, those of up to 16 query heads that share a list at once; for each
/// worker as many * kv_len floats.
inline token_lists select_listed(context& ctx, const attention_plan& plan,
                                 const tensor_view<const float>& q, const stored_view& k,
                                 const selection& rule, const logit_rules& rules) {
  const attention_shape& shape = plan.shape();
  detail::check_estimate("select_listed", shape, q, k, rules);
  check_selection(rule);
  require(plan.grid().rows == 1, "select_listed: tiles of ", plan.grid().rows,
          " rows, expected one");
  require(rules.reduce == head_reduce::none || plan.sharing_heads() == shape.group_size(),
          "select_listed: heads are joined that have lists of their own");
  token_lists lists;
  lists.sets = detail::score_sets(shape, rules.reduce);
  std::vector<std::vector<token_t>> chosen(static_cast<std::size_t>(lists.sets * shape.q_len));
  struct lists_of_worker {
    selector choose;
    std::vector<token_t> keys;
    std::vector<float> joined;
    std::vector<token_t> places;
  };
  std::vector<lists_of_worker> workers(static_cast<std::size_t>(ctx.executor().concurrency()));
  const index_t heads_at_once = std::min(tile_lanes, plan.sharing_heads());
  const std::size_t score_bytes = detail::padded(
      static_cast<std::size_t>(heads_at_once * shape.kv_len) * sizeof(float));
  const detail::worker_scratch scratch(ctx, score_bytes + detail::list_scorer::bytes(k));
  const detail::logit_factors factors(q.dim, rules);
  const kernel_table& kernels = ctx.kernel_table();
  const index_t group = shape.group_size();
  ctx.executor().parallel_for(shape.kv_heads * shape.q_len, [&](index_t task, index_t worker) {
    lists_of_worker& own = workers[static_cast<std::size_t>(worker)];
    detail::scratch_arena arena = scratch.of(worker);
    detail::list_scorer scorer(arena, kernels, factors, k);
    float* const scores = arena.take<float>(heads_at_once * shape.kv_len);
    const index_t kv_head = task / shape.q_len;
    const index_t row = task % shape.q_len;
    const row_source source = k.rows(kv_head);
    const index_t sharing = plan.sharing_heads();
    const auto finish = [&](std::span<const float> of_list, index_t set) {
      const auto place = std::lower_bound(own.keys.begin(), own.keys.end(), shape.position(row));
      const auto at = static_cast<token_t>(place - own.keys.begin());
      const bool there = place != own.keys.end() && *place == shape.position(row);
      own.choose.choose(of_list, rule, there ? key_range{at, at + 1} : key_range{}, own.places);
      std::vector<token_t>& list = chosen[static_cast<std::size_t>(set * shape.q_len + row)];
      for (const token_t i : own.places) list.push_back(own.keys[static_cast<std::size_t>(i)]);
    };
    for (index_t first = 0; first < group; first += sharing) {
      const index_t head = kv_head * group + first;
      own.keys.clear();
      tile_cursor cursor(plan, plan.head_of(head), row, 1, {0, static_cast<token_t>(shape.kv_len)});
      key_range keys;
      while (cursor.next_range(keys)) {
        for (token_t key = keys.begin; key < keys.end; ++key) own.keys.push_back(key);
      }
      const index_t count = std::ssize(own.keys);
      own.joined.resize(own.keys.size());
      for (index_t begin = 0; begin < sharing; begin += heads_at_once) {
        const index_t heads = std::min(heads_at_once, sharing - begin);
        scorer.score(q, row, head + begin, heads, source, own.keys, scores, count);
        for (index_t h = 0; h < heads; ++h) {
          const std::span<float> of_head(scores + h * count, own.keys.size());
          kernels.softmax(of_head.data(), count);
          if (rules.reduce == head_reduce::none) {
            finish(of_head, head + begin + h);
          } else {
            detail::join_head(own.joined, of_head, begin + h, group, rules.reduce);
          }
        }
      }
      if (rules.reduce != head_reduce::none) finish(own.joined, kv_head);
    }
  });
  lists.append(chosen);
  return lists;
}

}  // namespace sattn
