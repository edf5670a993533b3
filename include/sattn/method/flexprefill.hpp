// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/estimate/divergence.hpp>
#include <sattn/estimate/last_queries.hpp>
#include <sattn/estimate/pooled_blocks.hpp>
#include <sattn/method/method.hpp>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>
#include <utility>
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
  static std::vector<float> by_block(std::span<const float> values, token_t block);
  index_t blocks_for(std::span<const float> values) const;
};

inline std::vector<float> flexprefill::by_block(std::span<const float> values, token_t block) {
  std::vector<float> sums(static_cast<std::size_t>(ceil_div(std::ssize(values), block)), 0.0f);
  for (std::size_t i = 0; i < values.size(); ++i) {
    sums[i / static_cast<std::size_t>(block)] += values[i];
  }
  return sums;
}

/// Blocks that as many of the best units fill as exceed the share.
inline index_t flexprefill::blocks_for(std::span<const float> values) const {
  std::vector<token_t> covering;
  selector().choose(values, {budget::coverage_above(coverage)}, {}, covering);
  const index_t least = ceil_div(min_budget, block_size);
  const index_t most = std::max(least, ceil_div(index_t{max_budget}, block_size));
  return std::clamp(std::ssize(covering) / block_size + 1, least, most);
}

inline any_pattern flexprefill::choose(context& ctx, const method_inputs& in) const {
  require(coverage >= 0.0 && coverage <= 1.0, "flexprefill: coverage ", coverage,
          " is outside [0, 1]");
  require(block_size > 0 && min_budget >= 0 && max_budget >= min_budget, "flexprefill: block_size ",
          block_size, ", budgets from ", min_budget, " to ", max_budget);
  const attention_shape& shape = in.shape;
  const index_t short_length =
      std::max<index_t>(2 * index_t{block_size}, round_up(min_budget, block_size));
  if (shape.kv_len <= short_length || shape.q_len == 0) return dense{};

  const last_query_sums sums = last_query_scores(ctx, shape, in.q, in.k, block_size,
                                                 in.rules(head_reduce::none));
  const score_tensor pooled = pooled_block_scores(
      ctx, shape, in.q, in.k, {block_size, block_size, true, in.rules(head_reduce::none)});
  // The switch compares means with sums of the same rows: where the last block holds fewer, these
  // have means of their own.
  score_tensor means;
  if (shape.q_len > block_size && shape.q_len % block_size != 0) {
    attention_shape of_last = shape;
    of_last.q_len = block_size;
    of_last.q_offset += static_cast<token_t>(shape.q_len - block_size);
    means = pooled_block_scores(ctx, of_last, in.q.slice(shape.q_len - block_size, shape.q_len),
                                in.k, {block_size, block_size, true, in.rules(head_reduce::none)});
  }
  const index_t rows = pooled.rows;
  const index_t cols = pooled.cols;
  block_lists lists{block_size, block_size, {0}, {}, shape.q_heads};
  std::vector<std::uint8_t> chosen;
  std::vector<token_t> columns;
  std::vector<token_t> distances;
  selector choose_units;
  for (index_t head = 0; head < shape.q_heads; ++head) {
    const std::vector<float> vertical = by_block(sums.columns.row(head, 0), block_size);
    const std::vector<float> slash = by_block(sums.distances.row(head, 0), block_size);
    const std::span<const float> last =
        means.rows > 0 ? std::as_const(means).row(head, 0) : pooled.row(head, rows - 1);
    std::vector<float> estimate(last.begin(), last.end());
    for (float& x : estimate) x = std::max(x, 0.0f);  // not legal
    const bool query_aware = jensen_shannon_distance(estimate, vertical) < divergence_limit;
    const index_t least = ceil_div(min_budget, block_size);
    const index_t wide =
        query_aware ? least : blocks_for(sums.columns.row(head, 0));
    const index_t deep =
        query_aware ? least : blocks_for(sums.distances.row(head, 0));
    choose_units.choose(vertical, {budget::fixed(wide), {.first = 1}}, {}, columns);
    choose_units.choose(slash, {budget::fixed(deep), {.first = 1}}, {}, distances);

    chosen.assign(static_cast<std::size_t>(rows * cols), 0);
    for (index_t i = 0; i < rows; ++i) {
      std::uint8_t* const row = chosen.data() + i * cols;
      for (const token_t c : columns) row[c] = 1;
      // Blocks of rows that are not aligned with those of keys stand in two of them.
      const index_t bottom = shape.position(std::min((i + 1) * block_size, shape.q_len) - 1);
      const index_t top = std::max<index_t>(shape.position(i * block_size), 0);
      for (index_t own = top / block_size; own * block_size <= bottom; ++own) {
        for (const token_t d : distances) {
          if (own - d >= 0 && own - d < cols) row[own - d] = 1;
        }
      }
    }
    if (query_aware && coverage > 0.0) {  // the least pairs that hold a share of 0 are none
      // One pool for the head: every row of blocks has a mass of 1.
      const std::span<const float> all(pooled.values.data() + head * rows * cols,
                                       static_cast<std::size_t>(rows * cols));
      std::vector<token_t> pairs;
      choose_units.choose(all, {budget::coverage(coverage)}, {}, pairs);
      for (const token_t pair : pairs) chosen[static_cast<std::size_t>(pair)] = 1;
    }
    for (index_t i = 0; i < rows; ++i) {
      for (index_t j = 0; j < cols; ++j) {
        if (chosen[static_cast<std::size_t>(i * cols + j)] != 0 &&
            pooled.row(head, i)[static_cast<std::size_t>(j)] != detail::not_legal) {
          lists.indices.push_back(static_cast<token_t>(j));
        }
      }
      lists.indptr.push_back(std::ssize(lists.indices));
    }
  }
  return lists;
}

}  // namespace sattn
