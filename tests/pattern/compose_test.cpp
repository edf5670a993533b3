// SPDX-License-Identifier: Apache-2.0
#include <sattn/pattern/compose.hpp>

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <sattn/pattern/basic.hpp>
#include <sattn/pattern/block_mask.hpp>
#include <sattn/pattern/token_lists.hpp>
#include <sattn/pattern/vertical_slash.hpp>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "support/errors.hpp"
#include "support/plans.hpp"
#include "support/random.hpp"

namespace {

using sattn::any_pattern;
using sattn::attention_plan;
using sattn::attention_shape;
using sattn::block_mask;
using sattn::dense;
using sattn::index_t;
using sattn::per_head;
using sattn::sink;
using sattn::sliding_window;
using sattn::tile_grid;
using sattn::token_lists;
using sattn::token_t;
using sattn::vertical_slash;
using test_support::aligned_shape;
using test_support::error_of;
using test_support::plan_of;
using test_support::random_source;
using test_support::seed_trace;
using test_support::selects;

static_assert(sattn::attention_pattern<sattn::any_of<dense, vertical_slash>>);
static_assert(sattn::attention_pattern<any_pattern>);
static_assert(sattn::attention_pattern<per_head>);

const attention_shape shape = aligned_shape(150, 170, 4, 2);

// Something of every kind, with its data.
struct zoo {
  std::vector<std::uint8_t> mask;
  block_mask blocks;         // one set for each q head
  block_mask shared_blocks;  // one set
  token_lists lists;         // one set for each kv head
  vertical_slash slashes;

  explicit zoo(random_source& random) {
    const index_t rows = 7, cols = 2;  // of 24 x 100
    for (index_t i = 0; i < 4 * rows * cols; ++i) {
      mask.push_back(static_cast<std::uint8_t>(random.integer(0, 3) == 0));
    }
    blocks = {24, 100, mask, 4};
    shared_blocks = {24, 100, std::span(mask).first(rows * cols), 1};
    lists.rows_per_list = 36;
    lists.sets = 2;
    lists.indptr = {0};
    for (index_t i = 0; i < 2 * 5; ++i) {
      for (int n = 0; n < 9; ++n) {
        lists.tokens.push_back(static_cast<token_t>(random.integer(0, shape.kv_len)));
      }
      lists.indptr.push_back(std::ssize(lists.tokens));
    }
    slashes = {{5, 80}, {0, 1, 40}};
  }
};

using masks = std::vector<std::vector<std::uint8_t>>;  // of each query head

masks masks_of(const attention_plan& plan) {
  masks all;
  for (index_t head = 0; head < shape.q_heads; ++head) all.push_back(expand(plan, head));
  return all;
}

masks either(const masks& a, const masks& b) {
  masks both = a;
  for (std::size_t head = 0; head < a.size(); ++head) {
    for (std::size_t i = 0; i < a[head].size(); ++i) both[head][i] |= b[head][i];
  }
  return both;
}

TEST(any_of, selects_what_one_of_its_patterns_selects) {
  const seed_trace trace;
  random_source random;
  for (int n = 0; n < 20; ++n) {
    const zoo z(random);
    const masks blocks = masks_of(plan_of(shape, z.blocks));
    const masks shared_blocks = masks_of(plan_of(shape, z.shared_blocks));
    const masks lists = masks_of(plan_of(shape, z.lists));
    const masks slashes = masks_of(plan_of(shape, z.slashes));
    EXPECT_EQ(masks_of(plan_of(shape, z.blocks | z.lists)), either(blocks, lists));
    EXPECT_EQ(masks_of(plan_of(shape, z.lists | z.shared_blocks)), either(lists, shared_blocks));
    EXPECT_EQ(masks_of(plan_of(shape, z.slashes | z.blocks | z.lists)),
              either(either(slashes, blocks), lists));
    EXPECT_EQ(masks_of(plan_of(shape, z.blocks | z.blocks)), blocks);
    const attention_plan plan = plan_of(shape, z.blocks | z.lists | z.slashes);
    EXPECT_NO_THROW(plan.validate());
  }
}

TEST(any_of, has_the_sets_and_the_tiles_of_both) {
  const zoo z = [] {
    random_source random;
    return zoo(random);
  }();
  EXPECT_EQ((z.lists | z.shared_blocks).heads(), 2);
  EXPECT_EQ((z.shared_blocks | z.lists | z.blocks).heads(), 4);
  EXPECT_EQ((sink{} | sliding_window{}).heads(), 1);
  EXPECT_EQ((z.blocks | z.lists).grid(1), (tile_grid{12, 12}));
  EXPECT_EQ((z.blocks | z.slashes).grid(1), (tile_grid{16, 24}));
}

TEST(any_of, with_dense_is_dense) {
  random_source random;
  const zoo z(random);
  const attention_plan plan = plan_of(shape, z.blocks | dense{});
  EXPECT_EQ(plan.heads(), 1);
  EXPECT_EQ(plan.grid(), dense{}.grid());
}

TEST(any_of, finds_the_sinks_and_the_window_in_one_plan) {
  EXPECT_TRUE(
      selects(plan_of(shape, sink{3} | sliding_window{10}),
              [](index_t, index_t row, index_t key) { return key < 3 || row + 20 - key < 10; }));
}

TEST(any_pattern, is_the_pattern_it_was_made_of) {
  random_source random;
  const zoo z(random);
  EXPECT_EQ(any_pattern(z.blocks).heads(), 4);
  EXPECT_EQ(any_pattern(z.blocks).grid(1), z.blocks.grid());
  EXPECT_EQ(masks_of(plan_of(shape, any_pattern(z.blocks))), masks_of(plan_of(shape, z.blocks)));
  const any_pattern copy = any_pattern(z.lists | z.slashes);
  EXPECT_EQ(masks_of(plan_of(shape, copy)), masks_of(plan_of(shape, z.lists | z.slashes)));
}

TEST(per_head, gives_each_query_head_its_own) {
  random_source random;
  const zoo z(random);
  const per_head pattern{{sliding_window{8}, dense{}, z.shared_blocks, z.slashes}};
  const masks got = masks_of(plan_of(shape, pattern));
  EXPECT_EQ(got[0], masks_of(plan_of(shape, sliding_window{8}))[0]);
  EXPECT_EQ(got[1], masks_of(plan_of(shape, dense{}))[1]);
  EXPECT_EQ(got[2], masks_of(plan_of(shape, z.shared_blocks))[2]);
  EXPECT_EQ(got[3], masks_of(plan_of(shape, z.slashes))[3]);
}

TEST(per_head, of_kv_heads_gives_a_group_one_pattern) {
  const masks got = masks_of(plan_of(shape, per_head{{sliding_window{8}, sink{5}}}));
  EXPECT_EQ(got[0], got[1]);
  EXPECT_EQ(got[2], got[3]);
  EXPECT_EQ(got[1], masks_of(plan_of(shape, sliding_window{8}))[0]);
  EXPECT_EQ(got[2], masks_of(plan_of(shape, sink{5}))[0]);
}

// Layouts that repeat over the heads: head h has layout h % 2.
TEST(per_head, repeats_layouts_over_the_heads) {
  random_source random;
  const zoo z(random);
  const std::vector<any_pattern> layouts = {z.shared_blocks, sliding_window{30}};
  per_head pattern;
  for (std::size_t head = 0; head < 4; ++head) pattern.patterns.push_back(layouts[head % 2]);
  const masks got = masks_of(plan_of(shape, pattern));
  for (std::size_t head = 0; head < 4; ++head) {
    EXPECT_EQ(got[head], masks_of(plan_of(shape, layouts[head % 2]))[head]);
  }
}

TEST(per_head, of_equal_patterns_selects_what_the_pattern_shared_by_all_selects) {
  random_source random;
  const zoo z(random);
  const per_head pattern{std::vector<any_pattern>(4, z.slashes)};
  EXPECT_EQ(masks_of(plan_of(shape, pattern)), masks_of(plan_of(shape, z.slashes)));
}

TEST(per_head, of_dense_heads_alone_is_one_dense_list) {
  EXPECT_EQ(plan_of(shape, per_head{std::vector<any_pattern>(4, dense{})}).heads(), 1);
  EXPECT_EQ(plan_of(shape, per_head{{dense{}, dense{}, dense{}, sink{169}}}).heads(), 4);
}

TEST(per_head, refuses_other_counts_and_reports_the_first_head_that_fails) {
  const auto message = [](std::vector<any_pattern> patterns) {
    const per_head pattern{std::move(patterns)};
    return error_of([&] { plan_of(shape, pattern); });
  };
  EXPECT_NE(message(std::vector<any_pattern>(3, dense{})).find("holds 3 sets"), std::string::npos);
  EXPECT_NE(message({}).find("holds 0 sets"), std::string::npos);
  EXPECT_EQ(message({dense{}, sink{-3}, sliding_window{-4}, dense{}}),
            "sink: count -3 is negative");
}

// A pattern that holds neither one set nor one for each head has no set for every head.
TEST(compose, refuses_parts_whose_sets_do_not_fit) {
  const std::vector<std::uint8_t> mask(3 * 7 * 2);
  const block_mask three{24, 100, mask, 3};
  EXPECT_NE(error_of([&] { plan_of(shape, three); }), "");
  EXPECT_NE(error_of([&] {
              plan_of(shape, three | per_head{{dense{}, dense{}, dense{}, sink{}}});
            }),
            "");
  EXPECT_NE(error_of([&] { plan_of(shape, per_head{{three, dense{}, dense{}, dense{}}}); }), "");
}

}  // namespace
