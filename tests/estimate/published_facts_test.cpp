// SPDX-License-Identifier: Apache-2.0
//
// Closed forms from the papers and their code, which the library's selections must reproduce.

#include <sattn/api.hpp>

#include <gtest/gtest.h>

#include <vector>

#include "support/random.hpp"

namespace {

using sattn::budget;
using sattn::index_t;
using sattn::score_tensor;
using sattn::token_t;

// The Sparse Frontier's Block-Sparse: sink, previous and diagonal block count inside k, so row i
// keeps min(i + 1, k) blocks and the sparsity is (n - k)(n - k + 1) / (n (n + 1)).
TEST(block_sparse, has_the_papers_sparsity) {
  test_support::random_source random;
  for (const index_t n : {3, 7, 16}) {
    const index_t tokens = n * 16;
    const sattn::attention_shape shape{
        .q_len = tokens, .kv_len = tokens, .q_heads = 1, .kv_heads = 1, .q_offset = 0};
    score_tensor scores(1, n, n, sattn::detail::not_legal);
    for (index_t i = 0; i < n; ++i) {
      for (index_t j = 0; j <= i; ++j) {
        scores.row(0, i)[static_cast<std::size_t>(j)] = static_cast<float>(random.normal());
      }
    }
    for (index_t k = 3; k <= n + 2; ++k) {
      const auto lists =
          sattn::select_blocks(shape, scores, {budget::fixed(k), {.first = 1, .recent = 2}}, 16,
                               16);
      index_t blocks = 0;
      for (index_t i = 0; i < n; ++i) {
        const auto r = static_cast<std::size_t>(i);
        EXPECT_EQ(lists.indptr[r + 1] - lists.indptr[r], std::min(i + 1, k));
        blocks += lists.indptr[r + 1] - lists.indptr[r];
      }
      const index_t dropped = k >= n ? 0 : (n - k) * (n - k + 1);
      EXPECT_EQ(n * (n + 1) - 2 * blocks, dropped) << n << " blocks, k " << k;
    }
  }
}

// Its code counts whole 64 x 64 tiles, so that a dense plan has a sparsity of -63 / (N + 1).
TEST(vertical_slash, dense_fills_as_many_64_wide_tiles_as_minference_counts) {
  sattn::serial_executor executor;
  sattn::context ctx(executor);
  for (const index_t n : {64, 640}) {
    const sattn::attention_shape shape{
        .q_len = n, .kv_len = n, .q_heads = 1, .kv_heads = 1, .q_offset = 0};
    const auto plan = sattn::plan_prefill(ctx, shape, sattn::dense{}, {.tile_rows = 64});
    index_t cells = 0;
    for (index_t tile = 0; tile < plan.tiles(); ++tile) {
      sattn::tile_cursor cursor(plan, 0, tile, 16, {0, static_cast<token_t>(n)});
      sattn::key_range keys;
      while (cursor.next_range(keys)) cells += 64 * sattn::round_up(keys.size(), 64);
    }
    // 1 - cells / (n (n + 1) / 2) = -63 / (n + 1), without a division.
    EXPECT_EQ(n * (n + 1) - 2 * cells, -63 * n);
  }
}

// XAttention at stride 1 is exact block mass: the chosen blocks reach the threshold and would not
// without the last one.
TEST(xattention, threshold_is_reached_and_not_overshot_by_a_block) {
  constexpr index_t tokens = 256;
  constexpr index_t dim = 16;
  constexpr index_t block = 32;
  constexpr double threshold = 0.9;
  test_support::random_source random;
  const std::vector<float> q = random.normal_tensor(tokens * dim);
  const std::vector<float> k = random.normal_tensor(tokens * dim);
  sattn::serial_executor executor;
  sattn::context ctx(executor);
  const sattn::attention_shape shape{
      .q_len = tokens, .kv_len = tokens, .q_heads = 1, .kv_heads = 1, .q_offset = 0};
  const score_tensor rows =
      sattn::row_scores(ctx, shape, sattn::nhd(q.data(), tokens, 1, dim),
                        sattn::nhd(k.data(), tokens, 1, dim), {0, static_cast<token_t>(tokens)});
  score_tensor mass(1, tokens / block, tokens / block, sattn::detail::not_legal);
  for (index_t r = 0; r < tokens; ++r) {
    for (index_t key = 0; key <= r; ++key) {
      float& sum = mass.row(0, r / block)[static_cast<std::size_t>(key / block)];
      sum = std::max(sum, 0.0f) + rows.row(0, r)[static_cast<std::size_t>(key)];
    }
  }
  const auto lists =
      sattn::select_blocks(shape, mass, {budget::coverage(threshold)}, block, block);
  for (index_t i = 0; i < tokens / block; ++i) {
    double total = 0;
    for (index_t j = 0; j <= i; ++j) total += mass.row(0, i)[static_cast<std::size_t>(j)];
    double chosen = 0;
    double least = total;
    const auto r = static_cast<std::size_t>(i);
    for (index_t at = lists.indptr[r]; at < lists.indptr[r + 1]; ++at) {
      const token_t j = lists.indices[static_cast<std::size_t>(at)];
      chosen += mass.row(0, i)[static_cast<std::size_t>(j)];
      least = std::min<double>(least, mass.row(0, i)[static_cast<std::size_t>(j)]);
    }
    EXPECT_GE(chosen, threshold * total);
    EXPECT_LT(chosen - least, threshold * total);
  }
}

}  // namespace
