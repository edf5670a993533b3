// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/estimate/choose_lists.hpp>
#include <sattn/estimate/scores.hpp>
#include <sattn/pattern/block_mask.hpp>

#include <algorithm>
#include <concepts>
#include <span>
#include <vector>

namespace sattn {

namespace detail {

/// The rows and columns of an attention in blocks of rows and keys.
struct block_extents {
  attention_shape shape;
  domain legal;
  token_t q_block;
  token_t k_block;

  index_t rows() const { return ceil_div(shape.q_len, q_block); }
  index_t cols() const { return ceil_div(shape.kv_len, k_block); }
  index_t first_row(index_t i) const { return i * q_block; }
  index_t end_row(index_t i) const { return std::min((i + 1) * q_block, shape.q_len); }

  /// Key blocks that some row of query block i may see.
  key_range seen(index_t i) const {
    const key_range keys = visible_keys(shape, legal, first_row(i), end_row(i) - first_row(i));
    if (keys.size() == 0) return {};
    return {keys.begin / k_block, static_cast<token_t>(ceil_div(keys.end, k_block))};
  }
  /// Those that some row of the query blocks [first, end) may see, and what lies between them.
  key_range seen(index_t first, index_t end) const {
    key_range all{};
    for (index_t i = first; i < end; ++i) {
      const key_range of_row = seen(i);
      if (of_row.size() == 0) continue;
      if (all.size() == 0) all = of_row;
      all = {std::min(all.begin, of_row.begin), std::max(all.end, of_row.end)};
    }
    return all;
  }
  /// Key blocks that hold the positions of its rows.
  key_range own(index_t i) const {
    const index_t last = index_t{shape.q_offset} + end_row(i) - 1;
    if (last < 0) return {};
    const index_t first = std::max<index_t>(index_t{shape.q_offset} + first_row(i), 0);
    return {static_cast<token_t>(first / k_block), static_cast<token_t>(last / k_block + 1)};
  }
};

/// Scores rows of blocks, rows_of_task() of them at a time, into the memory of one worker:
/// scores [rows][cols] of the rows from `first` on, joined over the heads of the set. Only blocks
/// that a row of blocks sees are written. bytes() is the scratch that it needs.
template <class E>
concept block_estimator = requires(const E& e, scratch_arena arena, index_t set, index_t first,
                                   index_t rows, float* scores) {
  { e.blocks() } -> std::convertible_to<const block_extents&>;
  { e.sets() } -> std::convertible_to<index_t>;
  { e.rows_of_task() } -> std::convertible_to<index_t>;
  { e.bytes() } -> std::convertible_to<std::size_t>;
  e.score(arena, set, first, rows, scores);
};

/// All scores, [sets, rows, cols].
template <block_estimator E>
score_tensor score_blocks(context& ctx, const E& estimator) {
  score_tensor scores(estimator.sets(), estimator.blocks().rows(), estimator.blocks().cols(),
                      not_legal);
  const index_t tasks = ceil_div(scores.rows, estimator.rows_of_task());
  const worker_scratch scratch(ctx, estimator.bytes());
  ctx.executor().parallel_for(scores.sets * tasks, [&](index_t task, index_t worker) {
    const index_t set = task / tasks;
    const index_t first = task % tasks * estimator.rows_of_task();
    const index_t rows = std::min(estimator.rows_of_task(), scores.rows - first);
    estimator.score(scratch.of(worker), set, first, rows, scores.row(set, first).data());
  });
  return scores;
}

/// The best blocks of every row, which is chosen from where it was scored, by a rule that was
/// checked. Scores are not negative if the budget is one by coverage.
template <block_estimator E>
block_lists choose_blocks(context& ctx, const E& estimator, const selection& rule) {
  const block_extents& blocks = estimator.blocks();
  const index_t rows = blocks.rows();
  const index_t cols = blocks.cols();
  const index_t tasks = ceil_div(rows, estimator.rows_of_task());
  const std::size_t score_bytes =
      padded(static_cast<std::size_t>(estimator.rows_of_task() * cols) * sizeof(float));
  const worker_scratch scratch(ctx, score_bytes + estimator.bytes());
  std::vector<selector> choose(static_cast<std::size_t>(ctx.executor().concurrency()));
  std::vector<std::vector<token_t>> chosen(static_cast<std::size_t>(estimator.sets() * rows));
  ctx.executor().parallel_for(estimator.sets() * tasks, [&](index_t task, index_t worker) {
    scratch_arena arena = scratch.of(worker);
    float* const scores = arena.take<float>(estimator.rows_of_task() * cols);
    const index_t set = task / tasks;
    const index_t first = task % tasks * estimator.rows_of_task();
    const index_t end = std::min(first + estimator.rows_of_task(), rows);
    estimator.score(arena, set, first, end - first, scores);
    for (index_t i = first; i < end; ++i) {
      const key_range seen = blocks.seen(i);
      choose_from({std::span<const float>(scores + (i - first) * cols + seen.begin,
                                          static_cast<std::size_t>(seen.size())),
                   seen.begin, blocks.own(i)},
                  rule, choose[static_cast<std::size_t>(worker)],
                  chosen[static_cast<std::size_t>(set * rows + i)]);
    }
  });
  block_lists lists{blocks.q_block, blocks.k_block, {}, {}, estimator.sets()};
  lists.append(chosen);
  return lists;
}

}  // namespace detail

/// The best blocks of every row of blocks, from any scores [sets, q_blocks, k_blocks].
///
/// Protected units count in key blocks; `diagonal` blocks are those that hold the rows' own
/// positions. Blocks without a pair that `legal`, the domain of the plan, allows are not chosen,
/// whatever their score.
/// Throws: shape_error if the shape, the scores or block sizes do not fit, protected counts are
/// negative or a coverage budget meets a negative score; std::bad_alloc.
/// Cost: two passes over the scores; parallel over sets and rows of blocks.
inline block_lists select_blocks(context& ctx, const attention_shape& shape,
                                 const score_tensor& scores, const selection& rule,
                                 token_t q_block = 64, token_t k_block = 64,
                                 const domain& legal = {}) {
  check_shape(shape, legal);
  detail::check_block_sizes("select_blocks", q_block, k_block);
  const detail::block_extents blocks{shape, legal, q_block, k_block};
  require(scores.rows == blocks.rows() && scores.cols == blocks.cols(),
          "select_blocks: scores are [", scores.rows, ", ", scores.cols, "], blocks are [",
          blocks.rows(), ", ", blocks.cols(), "]");
  detail::check_scores("select_blocks", scores);
  block_lists lists{q_block, k_block, {}, {}, scores.sets};
  lists.append(detail::choose_lists(ctx, scores.sets * scores.rows, rule, [&](index_t list) {
    const index_t i = list % scores.rows;
    const key_range seen = blocks.seen(i);
    return detail::scored_units{
        scores.row(list / scores.rows, i)
            .subspan(static_cast<std::size_t>(seen.begin), static_cast<std::size_t>(seen.size())),
        seen.begin, blocks.own(i)};
  }));
  return lists;
}

}  // namespace sattn
