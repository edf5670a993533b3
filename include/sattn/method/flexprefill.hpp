// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/estimate/divergence.hpp>
#include <sattn/estimate/last_queries.hpp>
#include <sattn/estimate/pooled_blocks.hpp>
#include <sattn/method/method.hpp>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <vector>

namespace sattn {

/// Vertical-slash or query-aware blocks, head by head, as many as a share of the mass needs.
///
/// A head is query-aware where the attention of the last block of rows is spread over blocks of
/// keys as mean queries and keys say: then the best pairs of blocks of the whole head are taken
/// until they hold the share, beside min_budget of block columns and diagonals. Any other head
/// takes the block columns and diagonals of as many columns and distances as exceed the share in
/// the last block of rows.
///
/// Attention over at most two blocks or min_budget keys runs dense.
/// Source: FlexPrefill (arXiv:2502.20766) and its code. As there, a block diagonal is one block
/// wide. Unlike there, distances are counted from the last row where the length is no multiple of
/// the block, the pair of blocks with which the share is reached is taken, too, counts of units are
/// divided by the block, not by 128, and blocks without mass add nothing to the divergence, which
/// is NaN there in the source, and such a head not query-aware.
/// Cost: of an estimate by the last block of rows and one by means; parallel over heads; for each
/// worker up to 17 bytes for each pair of blocks where its head is query-aware, 1 where not.
struct flexprefill {
  double coverage;          // gamma
  double divergence_limit;  // tau
  token_t min_budget;       // keys
  token_t max_budget;       // keys
  token_t block_size;

  explicit constexpr flexprefill(double gamma = 0.9, double tau = 0.1, token_t least = 1024,
                                 token_t most = std::numeric_limits<token_t>::max(),
                                 token_t block = 128)
      : coverage(gamma),
        divergence_limit(tau),
        min_budget(least),
        max_budget(most),
        block_size(block) {}

  /// Throws: shape_error unless coverage is in [0, 1], block_size positive and budgets in order.
  any_pattern choose(context& ctx, const method_inputs& in) const;

 private:
  struct choice_of_head;

  static std::vector<float> by_block(std::span<const float> values, token_t block);
  index_t blocks_for(std::span<const float> values, selector& choose) const;
};

inline std::vector<float> flexprefill::by_block(std::span<const float> values, token_t block) {
  std::vector<float> sums(static_cast<std::size_t>(ceil_div(std::ssize(values), block)), 0.0f);
  for (std::size_t i = 0; i < values.size(); ++i) {
    sums[i / static_cast<std::size_t>(block)] += values[i];
  }
  return sums;
}

/// Blocks that as many of the best units fill as exceed the share.
inline index_t flexprefill::blocks_for(std::span<const float> values, selector& choose) const {
  std::vector<token_t> covering;
  choose.choose(values, {budget::coverage_above(coverage)}, {}, covering);
  const index_t least = ceil_div(min_budget, block_size);
  const index_t most = std::max(least, ceil_div(index_t{max_budget}, block_size));
  return std::clamp(std::ssize(covering) / block_size + 1, least, most);
}

/// Chooses for one head. Of each worker its own, for what it keeps from head to head.
struct flexprefill::choice_of_head {
  const flexprefill& method;
  const detail::pooled_blocks& pooled;
  const detail::pooled_blocks& of_last;  // its last row of blocks is what the switch looks at
  const last_query_sums& sums;
  selector choose = {};
  std::vector<float> scores = {};         // [rows, cols], of a query-aware head
  std::vector<std::uint8_t> chosen = {};  // [rows, cols]
  std::vector<token_t> units = {};

  /// lists [rows]
  void operator()(detail::scratch_arena arena, index_t head,
                  std::span<std::vector<token_t>> lists) {
    const detail::block_extents& blocks = pooled.blocks();
    const index_t rows = blocks.rows();
    const index_t cols = blocks.cols();
    const token_t block = method.block_size;
    const std::vector<float> vertical = by_block(sums.columns.row(head, 0), block);
    const std::vector<float> slash = by_block(sums.distances.row(head, 0), block);
    std::vector<float> estimate(static_cast<std::size_t>(cols), 0.0f);
    of_last.score(arena, head, of_last.blocks().rows() - 1, 1, estimate.data());
    const bool query_aware =
        jensen_shannon_distance(estimate, vertical) < method.divergence_limit;

    const index_t least = ceil_div(method.min_budget, block);
    chosen.assign(static_cast<std::size_t>(rows * cols), 0);
    const index_t wide =
        query_aware ? least : method.blocks_for(sums.columns.row(head, 0), choose);
    choose.choose(vertical, {budget::fixed(wide), {.first = 1}}, {}, units);
    for (index_t i = 0; i < rows; ++i) {
      for (const token_t column : units) chosen[static_cast<std::size_t>(i * cols + column)] = 1;
    }
    const index_t deep =
        query_aware ? least : method.blocks_for(sums.distances.row(head, 0), choose);
    choose.choose(slash, {budget::fixed(deep), {.first = 1}}, {}, units);
    for (index_t i = 0; i < rows; ++i) {
      // Blocks of rows that are not aligned with those of keys stand in two of them.
      const key_range own = blocks.own(i);
      for (index_t j = own.begin; j < own.end; ++j) {
        for (const token_t d : units) {
          if (j - d >= 0 && j - d < cols) chosen[static_cast<std::size_t>(i * cols + j - d)] = 1;
        }
      }
    }
    if (query_aware && method.coverage > 0.0) {  // the least pairs that hold a share of 0 are none
      // One pool for the head: every row of blocks has a mass of 1.
      scores.assign(static_cast<std::size_t>(rows * cols), detail::not_legal);
      for (index_t i = 0; i < rows; i += pooled.rows_of_task()) {
        pooled.score(arena, head, i, std::min(pooled.rows_of_task(), rows - i),
                     scores.data() + i * cols);
      }
      choose.choose(scores, {budget::coverage(method.coverage)}, {}, units);
      for (const token_t pair : units) chosen[static_cast<std::size_t>(pair)] = 1;
    }
    for (index_t i = 0; i < rows; ++i) {
      const key_range seen = blocks.seen(i);
      for (token_t j = seen.begin; j < seen.end; ++j) {
        if (chosen[static_cast<std::size_t>(i * cols + j)] != 0) {
          lists[static_cast<std::size_t>(i)].push_back(j);
        }
      }
    }
  }
};

inline any_pattern flexprefill::choose(context& ctx, const method_inputs& in) const {
  require(coverage >= 0.0 && coverage <= 1.0, "flexprefill: coverage ", coverage,
          " is outside [0, 1]");
  require(block_size > 0 && min_budget >= 0 && max_budget >= min_budget, "flexprefill: block_size ",
          block_size, ", budgets from ", min_budget, " to ", max_budget);
  const attention_shape& shape = in.shape;
  const index_t short_length =
      std::max<index_t>(2 * index_t{block_size}, round_up(min_budget, block_size));
  if (shape.kv_len <= short_length || shape.q_len == 0) return dense{};

  const logit_rules rules = in.rules(head_reduce::none);
  const pooled_block_options in_blocks{block_size, block_size, true, rules};
  const last_query_sums sums = last_query_scores(ctx, shape, in.q, in.k, block_size, rules);
  const detail::pooled_blocks pooled(ctx, shape, in.q, in.k, in_blocks);
  // The switch compares means with sums of the same rows: where the last block holds fewer, these
  // have means of their own.
  std::optional<detail::pooled_blocks> of_short;
  if (shape.q_len > block_size && shape.q_len % block_size != 0) {
    attention_shape last = shape;
    last.q_len = block_size;
    last.q_offset += static_cast<token_t>(shape.q_len - block_size);
    of_short.emplace(ctx, last, in.q.slice(shape.q_len - block_size, shape.q_len), in.k, in_blocks);
  }
  const detail::pooled_blocks& of_last = of_short ? *of_short : pooled;

  const index_t rows = pooled.blocks().rows();
  detail::check_positions(rows * pooled.blocks().cols());  // one pool for a head
  const detail::worker_scratch scratch(ctx, std::max(pooled.bytes(), of_last.bytes()));
  std::vector<choice_of_head> workers(static_cast<std::size_t>(ctx.executor().concurrency()),
                                      choice_of_head{*this, pooled, of_last, sums});
  std::vector<std::vector<token_t>> chosen(static_cast<std::size_t>(shape.q_heads * rows));
  ctx.executor().parallel_for(shape.q_heads, [&](index_t head, index_t worker) {
    workers[static_cast<std::size_t>(worker)](
        scratch.of(worker), head,
        std::span(chosen).subspan(static_cast<std::size_t>(head * rows),
                                  static_cast<std::size_t>(rows)));
  });
  block_lists lists{block_size, block_size, {}, {}, shape.q_heads};
  lists.append(chosen);
  return lists;
}

}  // namespace sattn
