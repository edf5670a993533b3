// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/budget/select.hpp>
#include <sattn/estimate/scores.hpp>
#include <sattn/pattern/block_mask.hpp>

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

/// Key blocks that some row of the query block may see.
inline key_range legal_blocks(const attention_shape& shape, const domain& legal, index_t q_begin,
                              index_t q_end, token_t k_block) {
  const token_t begin = legal.legal(shape.position(q_begin), shape.kv_len).begin;
  const token_t end = legal.legal(shape.position(q_end - 1), shape.kv_len).end;
  if (begin >= end) return {};
  return {begin / k_block, static_cast<token_t>(ceil_div(end, k_block))};
}

}  // namespace detail

/// Scores of blocks of keys for blocks of queries: products of their mean query and mean key,
/// scaled, or the softmax of them over each row of blocks.
///
/// Shapes: q [q_len, q_heads, head_dim], k [kv_len, kv_heads, head_dim]; result
/// [sets, ceil(q_len / q_block), ceil(kv_len / k_block)], -inf where no pair is legal.
/// Throws: shape_error if shapes or block sizes do not fit, or a borrowed workspace is too small.
/// Cost: one pass over q and k, then 1 / (q_block * k_block) of dense scores.
/// Source: Block-Sparse of The Sparse Frontier (arXiv:2504.17768) and MInference
/// (arXiv:2407.02490); unlike the former, a short last block is divided by its own length.
inline score_tensor pooled_block_scores(context& ctx, const attention_shape& shape,
                                        const tensor_view<const float>& q, const stored_view& k,
                                        const pooled_block_options& options = {}) {
  const logit_rules& rules = options.rules;
  detail::check_estimate("pooled_block_scores", shape, q, k, rules);
  detail::check_block_sizes("pooled_block_scores", options.q_block, options.k_block);
  const index_t q_blocks = ceil_div(shape.q_len, options.q_block);
  const index_t k_blocks = ceil_div(shape.kv_len, options.k_block);
  const std::vector<float> q_means = detail::pool_rows(ctx, q, options.q_block);
  const std::vector<float> k_means = detail::pool_rows(ctx, k, options.k_block);
  const auto pooled_q = hnd(q_means.data(), q_blocks, shape.q_heads, q.dim);
  const stored_view pooled_k = hnd(k_means.data(), k_blocks, shape.kv_heads, k.dim);

  score_tensor scores(detail::score_sets(shape, rules.reduce), q_blocks, k_blocks,
                      detail::not_legal);
  const kernel_table& kernels = ctx.kernel_table();
  const detail::logit_factors factors(q.dim, rules);
  const auto floats = [](index_t count) {
    return detail::padded(static_cast<std::size_t>(count) * sizeof(float));
  };
  const detail::worker_scratch scratch(
      ctx, detail::query_block::bytes(q.dim) + detail::key_rows::bytes(pooled_k) +
               floats(chunk_keys * tile_lanes) + floats(tile_lanes * k_blocks));
  const index_t tiles = ceil_div(q_blocks, tile_lanes);
  ctx.executor().parallel_for(scores.sets * tiles, [&](index_t task, index_t worker) {
    detail::scratch_arena arena = scratch.of(worker);
    detail::query_block block(arena, q.dim);
    detail::key_rows keys(arena, pooled_k);
    float* const lanes = arena.take<float>(chunk_keys * tile_lanes);
    float* const head_scores = arena.take<float>(tile_lanes * k_blocks);
    const index_t set = task / tiles;
    const index_t first = task % tiles * tile_lanes;
    const index_t rows = std::min(tile_lanes, q_blocks - first);
    const key_range heads = detail::heads_of_set(shape, rules.reduce, set);
    for (index_t head = heads.begin; head < heads.end; ++head) {
      block.pack(kernels, factors, [&](index_t lane) {
        return lane < rows ? pooled_q.row(first + lane, head) : nullptr;
      });
      const row_source source = pooled_k.rows(head / shape.group_size());
      for (index_t key = 0; key < k_blocks; key += chunk_keys) {
        const index_t count = std::min(chunk_keys, k_blocks - key);
        keys.load(kernels, source, key, count);
        keys.score(kernels, block, factors, nullptr, lanes);
        for (index_t r = 0; r < rows; ++r) {
          detail::copy_lane(lanes, count, r, head_scores + r * k_blocks + key);
        }
      }
      for (index_t r = 0; r < rows; ++r) {
        const std::span<float> row(head_scores + r * k_blocks, static_cast<std::size_t>(k_blocks));
        const index_t q_begin = (first + r) * options.q_block;
        const index_t q_end = std::min<index_t>(q_begin + options.q_block, shape.q_len);
        const key_range legal =
            detail::legal_blocks(shape, rules.legal, q_begin, q_end, options.k_block);
        std::fill(row.begin(), row.begin() + legal.begin, detail::not_legal);
        std::fill(row.begin() + legal.end, row.end(), detail::not_legal);
        if (options.probabilities) kernels.softmax(row.data() + legal.begin, legal.size());
        detail::join_head(scores.row(set, first + r), row, head - heads.begin, heads.size(),
                          rules.reduce);
      }
    }
  });
  return scores;
}

/// The best blocks of every row of blocks, from any scores [sets, q_blocks, k_blocks].
///
/// Protected units count in key blocks; `diagonal` blocks are those that hold the rows' own
/// positions. Blocks without a pair that `legal`, the domain of the plan, allows are not chosen,
/// whatever their score.
/// Throws: shape_error if the scores do not fit the shape and block sizes.
inline block_lists select_blocks(const attention_shape& shape, const score_tensor& scores,
                                 const selection& rule, token_t q_block = 64,
                                 token_t k_block = 64, const domain& legal = {}) {
  detail::check_block_sizes("select_blocks", q_block, k_block);
  require(scores.rows == ceil_div(shape.q_len, q_block) &&
              scores.cols == ceil_div(shape.kv_len, k_block),
          "select_blocks: scores are [", scores.rows, ", ", scores.cols, "], blocks are [",
          ceil_div(shape.q_len, q_block), ", ", ceil_div(shape.kv_len, k_block), "]");
  detail::check_scores("select_blocks", scores);
  block_lists lists;
  lists.q_block = q_block;
  lists.k_block = k_block;
  lists.sets = scores.sets;
  lists.indptr.push_back(0);
  selector choose;
  std::vector<token_t> chosen;
  for (index_t set = 0; set < scores.sets; ++set) {
    for (index_t i = 0; i < scores.rows; ++i) {
      const index_t first = index_t{shape.q_offset} + i * q_block;
      const index_t last =
          index_t{shape.q_offset} + std::min((i + 1) * q_block, shape.q_len) - 1;
      key_range own{};
      if (last >= 0) {
        own = {static_cast<token_t>(std::max<index_t>(first, 0) / k_block),
               static_cast<token_t>(last / k_block + 1)};
      }
      const key_range seen = detail::legal_blocks(
          shape, legal, i * q_block, std::min((i + 1) * q_block, shape.q_len), k_block);
      const std::span<const float> row = scores.row(set, i);
      choose.choose(row.subspan(static_cast<std::size_t>(seen.begin),
                                static_cast<std::size_t>(seen.size())),
                    rule, {own.begin - seen.begin, own.end - seen.begin}, chosen);
      for (const token_t block : chosen) lists.indices.push_back(seen.begin + block);
      lists.indptr.push_back(std::ssize(lists.indices));
    }
  }
  return lists;
}

}  // namespace sattn
