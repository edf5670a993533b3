// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sattn/estimate/antidiagonal.hpp>
#include <sattn/estimate/pooled_blocks.hpp>
#include <sattn/method/method.hpp>

namespace sattn {

/// Block-sparse attention: for every block of rows the blocks of keys whose mean key fits the mean
/// query best. Budgets count blocks.
/// Source: Block-Sparse of The Sparse Frontier (arXiv:2504.17768) and of MInference
/// (arXiv:2407.02490).
struct block_sparse_method {
  selection blocks;
  token_t q_block = 64;
  token_t k_block = 64;
  head_reduce reduce = head_reduce::none;
  bool probabilities = false;  // what budgets by coverage need

  /// A list for each block of rows of each set of heads that `reduce` leaves.
  /// Shapes: q [q_len, q_heads, head_dim], k [kv_len, kv_heads, head_dim].
  /// Throws: shape_error if shapes do not fit, a block is not positive, protected counts are
  /// negative or a budget is one by coverage and probabilities false; std::bad_alloc.
  block_lists choose(context& ctx, const method_inputs& in) const {
    return select_pooled_blocks(ctx, in.shape, in.q, in.k, blocks,
                                {q_block, k_block, probabilities, in.rules(reduce)});
  }
};

/// The preset of The Sparse Frontier: the first block, the row's own and the one before are a part
/// of top_blocks.
inline block_sparse_method sf_block_sparse(token_t block_size = 16, index_t top_blocks = 64) {
  return {{budget::fixed(top_blocks), {.first = 1, .diagonal = true, .before = 1}},
          block_size,
          block_size};
}

/// The preset of MInference's code: blocks of 64, none of them protected.
inline block_sparse_method minference_block(index_t top_blocks = 100) {
  return {{budget::fixed(top_blocks)}, 64, 64};
}

/// Blocks by their mass along antidiagonals, as many as reach a threshold of each row of blocks;
/// the first block and the row's own count first.
/// Source: XAttention (arXiv:2503.16428).
struct xattention {
  token_t stride;
  double threshold;
  token_t block_size;
  head_reduce reduce;

  explicit constexpr xattention(token_t every = 16, double share = 0.9, token_t block = 128,
                                head_reduce group = head_reduce::none)
      : stride(every), threshold(share), block_size(block), reduce(group) {}

  /// A list for each block of rows of each set of heads that `reduce` leaves.
  /// Shapes: q [q_len, q_heads, head_dim], k [kv_len, kv_heads, head_dim].
  /// Throws: shape_error if shapes do not fit, the stride does not divide the block, the threshold
  /// is outside (0, 1] or a soft cap is set; std::bad_alloc.
  block_lists choose(context& ctx, const method_inputs& in) const {
    return select_antidiagonal_blocks(
        ctx, in.shape, in.q, in.k, {budget::coverage(threshold), {.first = 1, .diagonal = true}},
        {stride, block_size, in.rules(reduce)});
  }
};

/// Blocks by scores that come from elsewhere: a learned gate or an indexer of blocks.
/// Shapes: scores [sets, ceil(q_len / q_block), ceil(kv_len / k_block)], sets = 1, kv_heads or
/// q_heads. Blocks without a legal pair are not chosen. Refers to the scores.
/// Source: SeerAttention (arXiv:2410.13276), MoBA (arXiv:2502.13189) choose so.
struct scored_blocks {
  const score_tensor& scores;
  selection blocks;
  token_t q_block = 64;
  token_t k_block = 64;

  /// Throws: shape_error as select_blocks(); std::bad_alloc.
  block_lists choose(context& ctx, const method_inputs& in) const {
    return select_blocks(ctx, in.shape, scores, blocks, q_block, k_block, in.legal);
  }
};

}  // namespace sattn
