// SPDX-License-Identifier: Apache-2.0
#include <sattn/pattern/token_lists.hpp>

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <sattn/pattern/basic.hpp>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "support/errors.hpp"
#include "support/plans.hpp"
#include "support/random.hpp"

namespace {

using sattn::attention_plan;
using sattn::attention_shape;
using sattn::index_t;
using sattn::token_lists;
using sattn::token_t;
using test_support::aligned_shape;
using test_support::error_of;
using test_support::plan_of;
using test_support::random_source;
using test_support::seed_trace;
using test_support::selects;

static_assert(sattn::attention_pattern<token_lists>);

TEST(token_lists, select_the_keys_of_the_list_of_each_row) {
  const seed_trace trace;
  random_source random;
  for (int n = 0; n < 200; ++n) {
    const attention_shape shape =
        aligned_shape(random.integer(1, 150), random.integer(1, 150), 4, 2);
    token_lists pattern;
    pattern.rows_per_list = random.pick<token_t>({1, 2, 3, 24, 100, 131, 1000});
    pattern.sets = random.pick<index_t>({1, 2, 4});
    pattern.indptr = {0};
    const index_t lists = (shape.q_len + pattern.rows_per_list - 1) / pattern.rows_per_list;
    std::vector<std::set<index_t>> wanted(static_cast<std::size_t>(pattern.sets * lists));
    for (std::set<index_t>& list : wanted) {  // in any order, with repetitions
      for (index_t count = random.integer(0, 20); count > 0; --count) {
        const index_t key = random.integer(0, shape.kv_len);
        pattern.tokens.push_back(static_cast<token_t>(key));
        list.insert(key);
      }
      pattern.indptr.push_back(std::ssize(pattern.tokens));
    }
    sattn::plan_options options;
    options.legal = test_support::random_domain(random, static_cast<token_t>(shape.kv_len));
    options.tile_rows = random.pick<token_t>({0, 0, 1, 16, 100});
    const attention_plan plan = plan_of(shape, pattern, options);
    ASSERT_NO_THROW(plan.validate());
    ASSERT_TRUE(selects(
        plan,
        [&](index_t q_head, index_t row, index_t key) {
          const index_t set = pattern.sets == 1 ? 0 : pattern.sets == 2 ? q_head / 2 : q_head;
          return wanted[static_cast<std::size_t>(set * lists + row / pattern.rows_per_list)]
              .contains(key);
        }))
        << "case " << n;
  }
}

TEST(token_lists, count_duplicates_once) {
  const attention_shape shape = aligned_shape(2, 10);
  const attention_plan twice = plan_of(shape, token_lists{1, {0, 4, 6}, {7, 2, 7, 2, 5, 5}});
  const attention_plan once = plan_of(shape, token_lists{1, {0, 2, 3}, {2, 7, 5}});
  EXPECT_EQ(twice.head(0).row_keys, once.head(0).row_keys);
  EXPECT_EQ(twice.head(0).row_masks, once.head(0).row_masks);
  EXPECT_EQ(twice.head(0).row_keys, (std::vector<token_t>{2, 5, 7}));
  EXPECT_EQ(twice.head(0).row_masks, (std::vector<std::uint16_t>{1, 2, 1}));
  EXPECT_EQ(twice.stats().selected, 3);
}

TEST(token_lists, give_the_keys_to_the_tile_where_all_rows_have_them_all) {
  // Keys 0 and 1 are in all lists whose rows may see them, key 2 is not; row 16 is a tile of its
  // own.
  token_lists lists{1, {0}, {}};
  for (token_t row = 0; row < 17; ++row) {
    lists.tokens.insert(lists.tokens.end(), {0, 1});
    if (row == 9) lists.tokens.push_back(2);
    lists.indptr.push_back(std::ssize(lists.tokens));
  }
  const attention_plan plan = plan_of(aligned_shape(17, 17), lists);
  EXPECT_EQ(plan.grid().rows, 16);
  EXPECT_EQ(plan.head(0).range_ptr, (std::vector<index_t>{0, 0, 1}));
  EXPECT_EQ(plan.head(0).ranges, (std::vector<sattn::key_range>{{0, 2}}));
  EXPECT_EQ(plan.head(0).row_keys, (std::vector<token_t>{0, 1, 2}));
  EXPECT_EQ(plan.head(0).row_masks, (std::vector<std::uint16_t>{0xffff, 0xfffe, 1u << 9}));
  EXPECT_EQ(plan.head(0).row_pairs(), 16 + 15 + 1);
}

TEST(token_lists, join_neighbours_to_ranges) {
  const attention_plan plan = plan_of(aligned_shape(1, 10), token_lists{1, {0, 4}, {5, 3, 4, 8}});
  EXPECT_EQ(plan.head(0).ranges, (std::vector<sattn::key_range>{{3, 6}}));
  EXPECT_EQ(plan.head(0).tokens, (std::vector<token_t>{8}));
}

TEST(token_lists, of_all_legal_keys_are_dense) {
  const attention_shape shape = aligned_shape(20, 30, 2, 2);
  token_lists pattern{1, {0}, {}, 1};
  for (token_t row = 0; row < 20; ++row) {
    for (token_t key = 0; key <= row + 10; ++key) pattern.tokens.push_back(row + 10 - key);
    pattern.indptr.push_back(std::ssize(pattern.tokens));
  }
  const attention_plan plan = plan_of(shape, pattern);
  EXPECT_EQ(plan.grid(), sattn::dense{}.grid());
  EXPECT_EQ(plan.head(0).columns, (std::vector<sattn::key_range>{{0, 30}}));
}

TEST(token_lists, drop_keys_that_the_row_may_not_see) {
  const attention_plan plan =
      plan_of(aligned_shape(3, 3), token_lists{1, {0, 2, 4, 6}, {0, 2, 0, 2, 0, 2}});
  EXPECT_TRUE(selects(plan, [](index_t, index_t, index_t key) { return key != 1; }));
  EXPECT_EQ(plan.stats().selected, 4);
}

TEST(token_lists, refuse_lists_that_do_not_fit) {
  const auto message = [](token_t rows, std::vector<index_t> indptr, std::vector<token_t> tokens,
                          index_t sets = 1) {
    const token_lists lists{rows, std::move(indptr), std::move(tokens), sets};
    return error_of([&] { plan_of(aligned_shape(5, 10, 4, 2), lists); });
  };
  EXPECT_EQ(message(3, {0, 1, 3}, {0, 9, 0}), "");
  EXPECT_EQ(message(0, {0}, {}), "token_lists: rows_per_list 0 must be positive");
  EXPECT_EQ(message(3, {0, 1}, {0}), "token_lists: indptr has 2 entries, expected 1 x 2 + 1");
  EXPECT_EQ(message(3, {}, {}), "token_lists: indptr has 0 entries, expected 1 x 2 + 1");
  EXPECT_EQ(message(3, {0, 0, 0}, {}, 4), "token_lists: indptr has 3 entries, expected 4 x 2 + 1");
  EXPECT_EQ(message(3, {1, 1, 1}, {0}), "token_lists: indptr runs from 1 to 1, expected 0 to 1");
  EXPECT_EQ(message(3, {0, 1, 1}, {0, 1}), "token_lists: indptr runs from 0 to 1, expected 0 to 2");
  EXPECT_EQ(message(3, {0, 3, 2}, {0, 1}), "token_lists: indptr decreases from 0 to 3 at list 0");
  EXPECT_EQ(message(3, {0, 1, 2}, {0, 10}), "plan_writer: key 10 of rows [3, 5), kv_len is 10");
  EXPECT_EQ(message(3, {0, 1, 2}, {-1, 1}), "plan_writer: key -1 of rows [0, 3), kv_len is 10");
  EXPECT_NE(message(3, {0, 0, 0, 0, 0, 0, 0}, {}, 3).find("holds 3 sets"), std::string::npos);
}

}  // namespace
