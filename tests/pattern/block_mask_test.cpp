// SPDX-License-Identifier: Apache-2.0
#include <sattn/pattern/block_mask.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <sattn/pattern/basic.hpp>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "support/errors.hpp"
#include "support/plans.hpp"
#include "support/random.hpp"

namespace {

using sattn::attention_plan;
using sattn::attention_shape;
using sattn::block_lists;
using sattn::block_mask;
using sattn::domain;
using sattn::index_t;
using sattn::token_t;
using test_support::aligned_shape;
using test_support::error_of;
using test_support::plan_of;
using test_support::random_source;
using test_support::seed_trace;
using test_support::selects;

static_assert(sattn::attention_pattern<block_mask>);
static_assert(sattn::attention_pattern<block_lists>);

// A mask of blocks that owns its bytes: [sets, rows, cols].
struct blocks {
  token_t q_block;
  token_t k_block;
  index_t sets;
  index_t rows;
  index_t cols;
  std::vector<std::uint8_t> mask;

  blocks(const attention_shape& shape, token_t q, token_t k, index_t set_count)
      : q_block(q),
        k_block(k),
        sets(set_count),
        rows((shape.q_len + q - 1) / q),
        cols((shape.kv_len + k - 1) / k),
        mask(static_cast<std::size_t>(sets * rows * cols)) {}

  std::uint8_t& at(index_t set, index_t row, index_t col) {
    return mask[static_cast<std::size_t>((set * rows + row) * cols + col)];
  }
  block_mask dense() const { return {q_block, k_block, mask, sets}; }
  block_lists lists() const {
    block_lists lists{q_block, k_block, {0}, {}, sets};
    for (index_t row = 0; row < sets * rows; ++row) {
      for (index_t col = 0; col < cols; ++col) {
        if (mask[static_cast<std::size_t>(row * cols + col)] != 0) {
          lists.indices.push_back(static_cast<token_t>(col));
        }
      }
      lists.indptr.push_back(std::ssize(lists.indices));
    }
    return lists;
  }
};

blocks random_blocks(random_source& random, const attention_shape& shape, token_t q_block,
                     token_t k_block, index_t sets) {
  blocks b(shape, q_block, k_block, sets);
  const index_t one_in = random.pick<index_t>({2, 2, 5});
  for (std::uint8_t& x : b.mask) {
    x = random.integer(0, one_in) == 0 ? random.pick<std::uint8_t>({1, 1, 255}) : 0;
  }
  return b;
}

// The set of a query head, from the number of sets alone.
index_t set_of(const attention_shape& shape, index_t sets, index_t q_head) {
  if (sets == 1) return 0;
  return sets == shape.kv_heads ? q_head / (shape.q_heads / shape.kv_heads) : q_head;
}

bool same_lists(const attention_plan& a, const attention_plan& b) {
  if (a.heads() != b.heads() || a.grid() != b.grid()) return false;
  for (index_t i = 0; i < a.heads(); ++i) {
    if (a.head(i).ranges != b.head(i).ranges || a.head(i).tokens != b.head(i).tokens ||
        a.head(i).range_ptr != b.head(i).range_ptr || a.head(i).columns != b.head(i).columns) {
      return false;
    }
  }
  return true;
}

TEST(block_mask, and_its_lists_select_the_blocks_of_the_mask_at_any_block_size) {
  const seed_trace trace;
  random_source random;
  const attention_shape shape = aligned_shape(150, 170, 4, 2);
  for (const token_t q_block : {1, 3, 24, 100, 131, 1000}) {
    for (const token_t k_block : {1, 3, 24, 100, 131, 1000}) {
      for (const index_t sets : {1, 2, 4}) {
        SCOPED_TRACE("blocks of " + std::to_string(q_block) + " x " + std::to_string(k_block) +
                     ", sets " + std::to_string(sets));
        blocks b = random_blocks(random, shape, q_block, k_block, sets);
        const domain legal = test_support::random_domain(random, 170);
        const token_t tile_rows = random.pick<token_t>({0, 0, 1, 13, 16, 100, 128});
        const auto wanted = [&](index_t q_head, index_t row, index_t key) {
          return b.at(set_of(shape, sets, q_head), row / q_block, key / k_block) != 0;
        };
        const sattn::plan_options options{.legal = legal, .tile_rows = tile_rows};
        const attention_plan plan = plan_of(shape, b.dense(), options);
        ASSERT_TRUE(selects(plan, wanted));
        ASSERT_NO_THROW(plan.validate());
        ASSERT_TRUE(same_lists(plan, plan_of(shape, b.lists(), options)));
      }
    }
  }
}

TEST(block_mask, of_ones_is_dense) {
  const attention_shape shape = aligned_shape(150, 170, 4, 2);
  for (const index_t sets : {1, 2, 4}) {
    blocks b(shape, 24, 100, sets);
    std::fill(b.mask.begin(), b.mask.end(), std::uint8_t{1});
    const attention_plan plan = plan_of(shape, b.dense());
    EXPECT_EQ(plan.heads(), 1);
    EXPECT_EQ(plan.grid(), sattn::dense{}.grid());
    EXPECT_EQ(plan.head(0).columns, (std::vector<sattn::key_range>{{0, 170}}));
    b.at(sets - 1, 6, 0) = 0;
    EXPECT_EQ(plan_of(shape, b.dense()).heads(), sets);
  }
}

TEST(block_mask, of_zeros_selects_nothing) {
  const attention_shape shape = aligned_shape(150, 170, 4, 2);
  EXPECT_TRUE(selects(plan_of(shape, blocks(shape, 64, 64, 1).dense()),
                      [](index_t, index_t, index_t) { return false; }));
}

TEST(block_mask, tiles_of_the_caller_do_not_straddle_blocks) {
  const attention_shape shape = aligned_shape(150, 170);
  const blocks b(shape, 100, 24, 1);
  const attention_plan plan = plan_of(shape, b.dense(), {.tile_rows = 64});
  EXPECT_EQ(plan.grid(), (sattn::tile_grid{64, 100}));
  EXPECT_EQ(plan.tiles(), 3);
  EXPECT_EQ(plan.grid().row_range(1, 150), (sattn::key_range{64, 100}));
}

TEST(block_mask, accepts_problems_without_rows_or_keys) {
  for (const attention_shape& shape : {aligned_shape(0, 10), aligned_shape(10, 0)}) {
    const blocks b(shape, 4, 4, 1);
    EXPECT_TRUE(selects(plan_of(shape, b.dense()), [](index_t, index_t, index_t) { return true; }));
    EXPECT_TRUE(selects(plan_of(shape, b.lists()), [](index_t, index_t, index_t) { return true; }));
  }
}

// k blocks in each row of a causal mask, or all there are, leave this share of the causal blocks.
TEST(block_lists, of_k_blocks_a_row_leave_the_closed_form_of_sparsity) {
  constexpr index_t n = 9;
  constexpr token_t block = 16;
  const attention_shape shape = aligned_shape(n * block, n * block);
  const seed_trace trace;
  random_source random;
  for (index_t k = 1; k <= n; ++k) {
    block_lists lists{block, block, {0}, {}, 1};
    for (index_t row = 0; row < n; ++row) {
      std::set<token_t> chosen;
      while (std::ssize(chosen) < std::min(row + 1, k)) {
        chosen.insert(static_cast<token_t>(random.integer(0, row + 1)));
      }
      lists.indices.insert(lists.indices.end(), chosen.begin(), chosen.end());
      lists.indptr.push_back(std::ssize(lists.indices));
    }
    const std::vector<std::uint8_t> mask = expand(plan_of(shape, lists), 0);
    std::set<std::pair<index_t, index_t>> used;
    for (index_t i = 0; i < std::ssize(mask); ++i) {
      if (mask[static_cast<std::size_t>(i)] != 0) {
        used.insert({i / shape.kv_len / block, i % shape.kv_len / block});
      }
    }
    // S = (n - k)(n - k + 1) / (n (n + 1)) of n (n + 1) / 2 blocks.
    EXPECT_EQ(n * (n + 1) / 2 - std::ssize(used), (n - k) * (n - k + 1) / 2) << k << " blocks";
  }
}

// ---- errors

TEST(block_mask, refuses_sizes_that_do_not_fit) {
  const attention_shape shape = aligned_shape(100, 130, 4, 2);
  const std::vector<std::uint8_t> mask(100);
  const std::span<const std::uint8_t> bytes = mask;
  const auto message = [&](const block_mask& pattern) {
    return error_of([&] { plan_of(shape, pattern); });
  };
  EXPECT_EQ(message({64, 64, bytes.first(6), 1}), "");
  EXPECT_EQ(message({64, 64, bytes.first(5), 1}),
            "block_mask: mask has 5 entries, expected 1 x 2 x 3");
  EXPECT_EQ(message({64, 64, bytes.first(7), 1}),
            "block_mask: mask has 7 entries, expected 1 x 2 x 3");
  EXPECT_EQ(message({64, 64, bytes.first(6), 2}),
            "block_mask: mask has 6 entries, expected 2 x 2 x 3");
  EXPECT_EQ(message({0, 64, bytes.first(6), 1}),
            "block_mask: q_block 0 and k_block 64 must be positive");
  EXPECT_EQ(message({64, -1, bytes.first(6), 1}),
            "block_mask: q_block 64 and k_block -1 must be positive");
  EXPECT_NE(message({64, 64, bytes.first(18), 3}).find("holds 3 sets"), std::string::npos);
}

TEST(block_lists, refuses_lists_that_do_not_fit) {
  const attention_shape shape = aligned_shape(100, 130, 4, 2);
  const auto message = [&](std::vector<index_t> indptr, std::vector<token_t> indices,
                           index_t sets = 1) {
    const block_lists lists{64, 64, std::move(indptr), std::move(indices), sets};
    return error_of([&] { plan_of(shape, lists); });
  };
  EXPECT_EQ(message({0, 1, 3}, {0, 0, 2}), "");
  EXPECT_EQ(message({0, 1}, {0}), "block_lists: indptr has 2 entries, expected 1 x 2 + 1");
  EXPECT_EQ(message({}, {}), "block_lists: indptr has 0 entries, expected 1 x 2 + 1");
  EXPECT_EQ(message({0, 1, 1}, {0}, 2), "block_lists: indptr has 3 entries, expected 2 x 2 + 1");
  EXPECT_EQ(message({1, 1, 2}, {0, 1}), "block_lists: indptr runs from 1 to 2, expected 0 to 2");
  EXPECT_EQ(message({0, 1, 2}, {0, 1, 2}), "block_lists: indptr runs from 0 to 2, expected 0 to 3");
  EXPECT_EQ(message({0, 3, 2}, {0, 1}), "block_lists: indptr decreases from 0 to 3 at row 0");
  EXPECT_EQ(message({0, -1, 2}, {0, 1}), "block_lists: indptr decreases from 0 to -1 at row 0");
  EXPECT_EQ(message({0, 1, 2}, {0, 3}), "block_lists: key block 3 of row 1, there are 3");
  EXPECT_EQ(message({0, 1, 2}, {-1, 1}), "block_lists: key block -1 of row 0, there are 3");
  EXPECT_EQ(
      message({0, 0, 2}, {1, 1}),
      "block_lists: key block 1 follows 1 in row 1; rows are sorted and hold each block once");
  EXPECT_EQ(
      message({0, 0, 2}, {2, 1}),
      "block_lists: key block 1 follows 2 in row 1; rows are sorted and hold each block once");
  const block_lists flat{0, 64, {0}, {}, 1};
  EXPECT_EQ(error_of([&] { plan_of(shape, flat); }),
            "block_lists: q_block 0 and k_block 64 must be positive");
}

}  // namespace
