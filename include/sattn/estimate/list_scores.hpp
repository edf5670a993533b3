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

/// The best of the keys that a plan with tiles of one row names, for every row: probabilities among
/// these keys decide. Lists for each query head, or for each kv head where heads are joined.
///
/// Shapes: q [q_len, q_heads, head_dim], k [kv_len, kv_heads, head_dim] of any type and layout.
/// Protected units are counted within the list; `diagonal` keys are those at the row's position.
/// Throws: shape_error if shapes do not fit, the plan's tiles are of several rows, heads are joined
/// that have lists of their own, or a borrowed workspace is too small.
/// Cost: the listed keys' scores, those of up to 16 query heads that share a list at once; for each
/// worker 17 * kv_len floats.
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
    std::vector<float> head;
    std::vector<float> joined;
    std::vector<token_t> places;
  };
  std::vector<lists_of_worker> workers(static_cast<std::size_t>(ctx.executor().concurrency()));
  const std::size_t lanes_bytes = detail::padded(
      static_cast<std::size_t>(round_up(shape.kv_len, chunk_keys) * tile_lanes) * sizeof(float));
  const detail::worker_scratch scratch(
      ctx, lanes_bytes + detail::query_block::bytes(q.dim) + detail::key_rows::bytes(k));
  const detail::logit_factors factors(q.dim, rules);
  const kernel_table& kernels = ctx.kernel_table();
  const index_t group = shape.group_size();
  ctx.executor().parallel_for(shape.kv_heads * shape.q_len, [&](index_t task, index_t worker) {
    lists_of_worker& own = workers[static_cast<std::size_t>(worker)];
    detail::scratch_arena arena = scratch.of(worker);
    detail::query_block block(arena, q.dim);
    detail::key_rows rows(arena, k);
    float* const lanes =
        arena.take<float>(round_up(shape.kv_len, chunk_keys) * tile_lanes);
    const index_t kv_head = task / shape.q_len;
    const index_t row = task % shape.q_len;
    const row_source source = k.rows(kv_head);
    const index_t sharing = plan.sharing_heads();
    const auto finish = [&](std::span<const float> scores, index_t set) {
      const auto place = std::lower_bound(own.keys.begin(), own.keys.end(), shape.position(row));
      const auto at = static_cast<token_t>(place - own.keys.begin());
      const bool there = place != own.keys.end() && *place == shape.position(row);
      own.choose.choose(scores, rule, there ? key_range{at, at + 1} : key_range{}, own.places);
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
      own.head.resize(own.keys.size());
      own.joined.resize(own.keys.size());
      for (index_t begin = 0; begin < sharing; begin += tile_lanes) {
        const index_t heads = std::min(tile_lanes, sharing - begin);
        block.pack(kernels, factors, [&](index_t lane) {
          return lane < heads ? q.row(row, head + begin + lane) : nullptr;
        });
        for (index_t at = 0; at < count; at += chunk_keys) {
          const index_t some = std::min(chunk_keys, count - at);
          rows.load(kernels, source, std::span(own.keys).subspan(static_cast<std::size_t>(at),
                                                                 static_cast<std::size_t>(some)));
          rows.score(kernels, block, factors, nullptr, lanes + at * tile_lanes);
        }
        kernels.softmax_lanes(lanes, count);
        for (index_t lane = 0; lane < heads; ++lane) {
          detail::copy_lane(lanes, count, lane, own.head.data());
          if (rules.reduce == head_reduce::none) {
            finish(own.head, head + begin + lane);
          } else {
            detail::join_head(own.joined, own.head, begin + lane, group, rules.reduce);
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
