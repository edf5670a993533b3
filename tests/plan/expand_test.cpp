// SPDX-License-Identifier: Apache-2.0
#include <sattn/plan/expand.hpp>

#include <gtest/gtest.h>

#include <sattn/plan/plan_check.hpp>
#include <string>
#include <vector>

#include "support/errors.hpp"
#include "support/plans.hpp"

namespace {

using sattn::attention_plan;
using sattn::domain;
using sattn::index_t;
using sattn::plan_data;
using sattn::plan_head;
using test_support::error_of;
using test_support::head_fields;

using picture = std::vector<std::string>;  // one text a row: x = attends to the key

picture picture_of(const attention_plan& plan, index_t q_head = 0) {
  const std::vector<std::uint8_t> mask = expand(plan, q_head);
  const auto kv_len = static_cast<std::size_t>(plan.shape().kv_len);
  picture rows(static_cast<std::size_t>(plan.shape().q_len));
  for (std::size_t row = 0; row < rows.size(); ++row) {
    for (std::size_t key = 0; key < kv_len; ++key) {
      rows[row] += mask[row * kv_len + key] != 0 ? 'x' : '.';
    }
  }
  return rows;
}

// Four rows at positions 2 to 5 of six keys, in two tiles.
plan_data small_plan(const head_fields& head) {
  return test_support::one_head({4, 6, 1, 1, 2}, {}, {2, 0}, head);
}

TEST(expand, nothing_is_nothing) {
  EXPECT_EQ(picture_of(attention_plan(small_plan({}))),
            (picture{"......", "......", "......", "......"}));
}

TEST(expand, columns_are_keys_for_every_row_up_to_its_position) {
  EXPECT_EQ(picture_of(attention_plan(small_plan({.columns = {{0, 1}, {3, 5}}}))),
            (picture{"x.....", "x..x..", "x..xx.", "x..xx."}));
}

TEST(expand, distances_are_diagonals) {
  EXPECT_EQ(picture_of(attention_plan(small_plan({.distances = {{0, 1}, {2, 4}}}))),
            (picture{"x.x...", "xx.x..", ".xx.x.", "..xx.x"}));
}

TEST(expand, cover_widens_diagonals_to_the_hull_of_the_tile) {
  plan_data data = small_plan({.distances = {{3, 4}}});
  EXPECT_EQ(picture_of(attention_plan(data)), (picture{"......", "x.....", ".x....", "..x..."}));
  data.rounding = sattn::rounding::cover;
  EXPECT_EQ(picture_of(attention_plan(data)), (picture{"x.....", "x.....", ".xx...", ".xx..."}));
  data.grid.rows = 4;
  EXPECT_EQ(picture_of(attention_plan(data)), (picture{"xxx...", "xxx...", "xxx...", "xxx..."}));
}

TEST(expand, cover_keeps_to_the_legal_keys) {
  plan_data data = small_plan({.distances = {{0, 1}}});
  data.rounding = sattn::rounding::cover;
  EXPECT_EQ(picture_of(attention_plan(data)), (picture{"..x...", "..xx..", "....x.", "....xx"}));
}

TEST(expand, lists_belong_to_a_tile) {
  EXPECT_EQ(picture_of(attention_plan(small_plan({.range_ptr = {0, 1, 2},
                                                  .ranges = {{0, 3}, {2, 6}},
                                                  .token_ptr = {0, 0, 1},
                                                  .tokens = {0}}))),
            (picture{"xxx...", "xxx...", "x.xxx.", "x.xxxx"}));
}

TEST(expand, unites_the_encodings) {
  EXPECT_EQ(picture_of(attention_plan(small_plan({.distances = {{0, 1}},
                                                  .columns = {{1, 2}},
                                                  .range_ptr = {0, 1, 1},
                                                  .ranges = {{1, 3}},
                                                  .token_ptr = {0, 0, 1},
                                                  .tokens = {1}}))),
            (picture{".xx...", ".xxx..", ".x..x.", ".x...x"}));
}

TEST(expand, obeys_window_and_prefix) {
  plan_data data = small_plan({.columns = {{0, 6}}});
  data.legal = {.causal = true, .window = 2, .prefix = 4};
  EXPECT_EQ(picture_of(attention_plan(data)), (picture{".xxx..", "..xx..", "...xx.", "....xx"}));
  data.legal = domain::full();
  EXPECT_EQ(picture_of(attention_plan(data)), (picture(4, "xxxxxx")));
}

TEST(expand, rows_before_the_first_key_have_none) {
  plan_data data = small_plan({.columns = {{0, 6}}});
  data.shape.q_offset = -2;
  EXPECT_EQ(picture_of(attention_plan(data)), (picture{"......", "......", "x.....", "xx...."}));
}

TEST(expand, tiles_break_at_the_period) {
  plan_data data = small_plan({.range_ptr = {0, 1, 2, 3, 4},
                               .ranges = {{0, 2}, {1, 3}, {0, 2}, {1, 3}},
                               .token_ptr = {0, 0, 0, 0, 0}});
  data.grid = {2, 1};
  data.legal = domain::full();
  EXPECT_EQ(picture_of(attention_plan(data)), (picture{"xx....", ".xx...", "xx....", ".xx..."}));
}

TEST(expand, finds_the_list_of_a_query_head) {
  const plan_head first = head_fields{.columns = {{0, 1}}};
  const plan_head second = head_fields{.columns = {{1, 2}}};
  plan_data data = small_plan({.columns = first.columns});
  data.shape = {1, 6, 4, 2, 5};
  const auto all = [&] {
    const attention_plan plan(data);
    picture rows;
    for (index_t head = 0; head < 4; ++head) rows.push_back(picture_of(plan, head)[0]);
    return rows;
  };
  EXPECT_EQ(all(), (picture(4, "x.....")));
  data.map = sattn::head_map::per_kv_head;
  data.heads = {first, second};
  EXPECT_EQ(all(), (picture{"x.....", "x.....", ".x....", ".x...."}));
  data.map = sattn::head_map::per_q_head;
  data.heads = {first, second, second, first};
  EXPECT_EQ(all(), (picture{"x.....", ".x....", ".x....", "x....."}));
}

TEST(expand, refuses_heads_that_do_not_exist) {
  const attention_plan plan(small_plan({}));
  EXPECT_EQ(error_of([&] { expand(plan, 1); }), "expand: query head 1 of 1");
  EXPECT_EQ(error_of([&] { expand(plan, -1); }), "expand: query head -1 of 1");
}

}  // namespace
