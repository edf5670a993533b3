// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/estimate/blocks.hpp>

#include <algorithm>
#include <span>
#include <utility>
#include <vector>

namespace sattn {

struct pooled_block_options {
  token_t q_block = 64;
  token_t k_block = 64;
  bool probabilities = false;  // softmax over each row of blocks: what coverage budgets need
  logit_rules rules = {};
};

namespace detail {

/// Means of blocks of rows as [head, block, dim]; the last block is divided by what it holds.
inline std::vector<float> pool_rows(context& ctx, const stored_view& rows, token_t block) {
  const index_t blocks = ceil_div(rows.tokens, block);
  std::vector<float> means(static_cast<std::size_t>(rows.heads * blocks * rows.dim), 0.0f);
  const worker_scratch scratch(ctx, key_rows::bytes(rows));
  ctx.executor().parallel_for(rows.heads * blocks, [&](index_t task, index_t worker) {
    scratch_arena arena = scratch.of(worker);
    key_rows loaded(arena, rows);
    const row_source source = rows.rows(task / blocks);
    const index_t begin = task % blocks * block;
    const index_t end = std::min<index_t>(begin + block, rows.tokens);
    float* const mean = means.data() + task * rows.dim;
    for (index_t first = begin; first < end; first += chunk_keys) {
      const index_t count = std::min(chunk_keys, end - first);
      loaded.load(ctx.kernel_table(), source, first, count);
      for (index_t t = 0; t < count; ++t) {
        const float* const row = loaded.row(t);
        for (index_t i = 0; i < rows.dim; ++i) mean[i] += row[i];
      }
    }
    for (index_t i = 0; i < rows.dim; ++i) mean[i] /= static_cast<float>(end - begin);
  });
  return means;
}

/// The estimator of blocks by their means.
class pooled_blocks {
 public:
  pooled_blocks(context& ctx, const attention_shape& shape, const tensor_view<const float>& q,
                const stored_view& k, const pooled_block_options& options)
      : kernels_(ctx.kernel_table()), options_(options), factors_(q.dim, options.rules),
        blocks_{shape, options.rules.legal, options.q_block, options.k_block},
        q_means_(pool_rows(ctx, q, options.q_block)), k_means_(pool_rows(ctx, k, options.k_block)),
        q_(hnd(std::as_const(q_means_).data(), blocks_.rows(), shape.q_heads, q.dim)),
        k_(hnd(std::as_const(k_means_).data(), blocks_.cols(), shape.kv_heads, k.dim)) {}

  pooled_blocks(const pooled_blocks&) = delete;
  pooled_blocks& operator=(const pooled_blocks&) = delete;

  const block_extents& blocks() const { return blocks_; }
  index_t sets() const { return score_sets(blocks_.shape, options_.rules.reduce); }
  static constexpr index_t rows_of_task() { return tile_lanes; }
  std::size_t bytes() const {
    return query_block::bytes(q_.dim) + key_rows::bytes(k_) +
           padded(static_cast<std::size_t>(chunk_keys * tile_lanes) * sizeof(float)) +
           padded(static_cast<std::size_t>(tile_lanes * blocks_.cols()) * sizeof(float));
  }

  void score(scratch_arena arena, index_t set, index_t first, index_t rows, float* scores) const {
    const head_reduce reduce = options_.rules.reduce;
    const index_t cols = blocks_.cols();
    query_block block(arena, q_.dim);
    key_rows keys(arena, k_);
    float* const lanes = arena.take<float>(chunk_keys * tile_lanes);
    float* const head_scores = arena.take<float>(tile_lanes * cols);
    const key_range all = blocks_.seen(first, first + rows);
    const key_range heads = heads_of_set(blocks_.shape, reduce, set);
    for (index_t head = heads.begin; head < heads.end; ++head) {
      block.pack(kernels_, factors_, [&](index_t lane) {
        return lane < rows ? q_.row(first + lane, head) : nullptr;
      });
      const row_source source = k_.rows(head / blocks_.shape.group_size());
      for (index_t key = all.begin; key < all.end; key += chunk_keys) {
        const index_t count = std::min<index_t>(chunk_keys, all.end - key);
        keys.load(kernels_, source, key, count);
        keys.score(kernels_, block, factors_, nullptr, lanes);
        for (index_t r = 0; r < rows; ++r) {
          copy_lane(lanes, count, r, head_scores + r * cols + key);
        }
      }
      for (index_t r = 0; r < rows; ++r) {
        const key_range seen = blocks_.seen(first + r);
        const std::span<float> row(head_scores + r * cols + seen.begin,
                                   static_cast<std::size_t>(seen.size()));
        if (options_.probabilities) kernels_.softmax(row.data(), seen.size());
        join_head({scores + r * cols + seen.begin, row.size()}, row, head - heads.begin,
                  heads.size(), reduce);
      }
    }
  }

 private:
  const sattn::kernel_table& kernels_;
  pooled_block_options options_;
  logit_factors factors_;
  block_extents blocks_;
  std::vector<float> q_means_;
  std::vector<float> k_means_;
  tensor_view<const float> q_;
  stored_view k_;
};

inline void check_pooled(const char* name, const attention_shape& shape,
                         const tensor_view<const float>& q, const stored_view& k,
                         const pooled_block_options& options) {
  check_estimate(name, shape, q, k, options.rules);
  check_block_sizes(name, options.q_block, options.k_block);
}

}  // namespace detail

/// Scores of blocks of keys for blocks of queries: products of their mean query and mean key,
/// scaled, or the softmax of them over each row of blocks.
///
/// Shapes: q [q_len, q_heads, head_dim], k [kv_len, kv_heads, head_dim]; result
/// [sets, ceil(q_len / q_block), ceil(kv_len / k_block)], -inf where no pair is legal.
/// Throws: shape_error if shapes or block sizes do not fit, or a borrowed workspace is too small.
/// Cost: one pass over q and k, then 1 / (q_block * k_block) of dense scores; parallel over blocks,
/// then over sets and 16 rows of blocks.
/// Source: Block-Sparse of The Sparse Frontier (arXiv:2504.17768) and MInference
/// (arXiv:2407.02490); unlike the former, a short last block is divided by its own length.
inline score_tensor pooled_block_scores(context& ctx, const attention_shape& shape,
                                        const tensor_view<const float>& q, const stored_view& k,
                                        const pooled_block_options& options = {}) {
  detail::check_pooled("pooled_block_scores", shape, q, k, options);
  const detail::pooled_blocks rows(ctx, shape, q, k, options);
  return detail::score_blocks(ctx, rows);
}

/// The blocks with the best of these scores for every row of blocks, without storing them all.
///
/// Shapes as above; protected units as of select_blocks().
/// Throws: shape_error as above, if protected counts are negative or a budget is by coverage and
/// options.probabilities false; std::bad_alloc.
/// Cost: as above; for each worker 32 * kv_len / k_block floats and the ranks of one row of blocks.
inline block_lists select_pooled_blocks(context& ctx, const attention_shape& shape,
                                        const tensor_view<const float>& q, const stored_view& k,
                                        const selection& rule,
                                        const pooled_block_options& options = {}) {
  detail::check_pooled("select_pooled_blocks", shape, q, k, options);
  check_selection(rule);
  require(rule.amount.by() != budget::kind::coverage || options.probabilities,
          "select_pooled_blocks: a budget by coverage needs probabilities");
  const detail::pooled_blocks rows(ctx, shape, q, k, options);
  return detail::choose_blocks(ctx, rows, rule);
}

}  // namespace sattn
