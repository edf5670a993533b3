// SPDX-License-Identifier: Apache-2.0
#include <sattn/pattern/vertical_slash.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
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
using sattn::key_range;
using sattn::rounding;
using sattn::token_t;
using sattn::vertical_slash;
using test_support::aligned_shape;
using test_support::error_of;
using test_support::plan_of;
using test_support::random_source;
using test_support::seed_trace;
using test_support::selects;

static_assert(sattn::attention_pattern<vertical_slash>);

bool holds(const std::vector<token_t>& values, index_t value) {
  return std::find(values.begin(), values.end(), value) != values.end();
}

struct random_case {
  attention_shape shape;
  vertical_slash pattern;
  sattn::plan_options options;
};

// Unsorted, with repetitions, and with distances past the first key.
random_case make_case(random_source& random) {
  random_case c;
  c.shape = aligned_shape(random.integer(1, 120), random.integer(1, 150), 2, 1);
  for (index_t n = random.integer(0, 12); n > 0; --n) {
    c.pattern.columns.push_back(static_cast<token_t>(random.integer(0, c.shape.kv_len)));
  }
  for (index_t n = random.integer(0, 12); n > 0; --n) {
    c.pattern.distances.push_back(static_cast<token_t>(random.integer(0, c.shape.kv_len + 50)));
  }
  c.options.legal = test_support::random_domain(random, static_cast<token_t>(c.shape.kv_len));
  c.options.tile_rows = random.pick<token_t>({0, 1, 8, 13, 16, 64, 128});
  return c;
}

TEST(vertical_slash, exact_selects_its_columns_and_distances_alone) {
  const seed_trace trace;
  random_source random;
  for (int n = 0; n < 300; ++n) {
    const random_case c = make_case(random);
    ASSERT_TRUE(selects(plan_of(c.shape, c.pattern, c.options),
                        [&](index_t, index_t row, index_t key) {
                          return holds(c.pattern.columns, key) ||
                                 holds(c.pattern.distances, c.shape.q_offset + row - key);
                        }))
        << "case " << n;
  }
}

TEST(vertical_slash, cover_selects_for_every_row_what_any_row_of_its_tile_selects) {
  const seed_trace trace;
  random_source random;
  for (int n = 0; n < 300; ++n) {
    random_case c = make_case(random);
    c.options.rounding = rounding::cover;
    const attention_plan plan = plan_of(c.shape, c.pattern, c.options);
    const index_t rows = plan.grid().rows;
    // A distance behind the window is no row's.
    const token_t window = c.options.legal.window;
    std::erase_if(c.pattern.distances, [&](token_t d) { return window > 0 && d >= window; });
    ASSERT_TRUE(selects(plan,
                        [&](index_t, index_t row, index_t key) {
                          if (holds(c.pattern.columns, key)) return true;
                          const index_t top = row / rows * rows;
                          for (index_t r = top; r < std::min(top + rows, c.shape.q_len); ++r) {
                            if (holds(c.pattern.distances, c.shape.q_offset + r - key)) return true;
                          }
                          return false;
                        }))
        << "case " << n;
  }
}

TEST(vertical_slash, cover_is_exact_in_tiles_of_one_row_and_a_superset_elsewhere) {
  const seed_trace trace;
  random_source random;
  for (int n = 0; n < 100; ++n) {
    random_case c = make_case(random);
    const auto mask = [&](rounding how) {
      c.options.rounding = how;
      return expand(plan_of(c.shape, c.pattern, c.options), 0);
    };
    const std::vector<std::uint8_t> exact = mask(rounding::exact);
    const std::vector<std::uint8_t> cover = mask(rounding::cover);
    for (std::size_t i = 0; i < exact.size(); ++i) ASSERT_LE(exact[i], cover[i]);
    c.options.tile_rows = 1;
    ASSERT_EQ(mask(rounding::exact), mask(rounding::cover));
  }
}

TEST(vertical_slash, neighbours_become_runs) {
  const attention_plan plan = plan_of(
      aligned_shape(50, 50), vertical_slash{.columns = {3, 1, 2, 2, 9}, .distances = {0, 1, 7, 0}});
  EXPECT_EQ(plan.head(0).columns, (std::vector<key_range>{{1, 4}, {9, 10}}));
  EXPECT_EQ(plan.head(0).distances, (std::vector<key_range>{{0, 2}, {7, 8}}));
}

// Short tiles for isolated diagonals, shorter ones where heads that share the list fill the lanes,
// tall ones where there are no diagonals or where they cover most of a tall tile anyway.
TEST(vertical_slash, tiles_are_as_short_as_it_pays) {
  const auto rows = [](const vertical_slash& pattern, index_t q_heads) {
    return plan_of(aligned_shape(5000, 5000, q_heads), pattern).grid().rows;
  };
  vertical_slash isolated, runs, all;
  for (token_t d = 0; d < 5000; ++d) {
    if (d < 64 || d % 100 == 99) isolated.distances.push_back(d);
    if (d % 600 < 64) runs.distances.push_back(d);
    if (d % 50 != 7) all.distances.push_back(d);
  }
  EXPECT_EQ(rows(isolated, 1), 16);
  EXPECT_EQ(rows(isolated, 2), 8);
  EXPECT_EQ(rows(isolated, 4), 4);
  EXPECT_EQ(rows(runs, 1), 16);
  EXPECT_EQ(rows(runs, 4), 8);
  EXPECT_EQ(rows(all, 4), 64);
  std::reverse(isolated.distances.begin(), isolated.distances.end());
  EXPECT_EQ(rows(isolated, 4), 4);
  EXPECT_EQ(rows({{1}, {}}, 4), 128);
}

TEST(vertical_slash, of_everything_is_dense) {
  vertical_slash pattern;
  for (token_t i = 49; i >= 0; --i) pattern.distances.push_back(i);
  const attention_plan plan = plan_of(aligned_shape(50, 50), pattern);
  EXPECT_EQ(plan.head(0).columns, (std::vector<key_range>{{0, 50}}));
  EXPECT_TRUE(plan.head(0).distances.empty());
}

TEST(vertical_slash, refuses_columns_outside_the_keys_and_negative_distances) {
  const auto message = [](std::vector<token_t> columns, std::vector<token_t> distances) {
    const vertical_slash pattern{std::move(columns), std::move(distances)};
    return error_of([&] { plan_of(aligned_shape(5, 10), pattern); });
  };
  EXPECT_EQ(message({9}, {10, std::numeric_limits<token_t>::max()}), "");
  EXPECT_EQ(message({10}, {}), "vertical_slash: column 10, kv_len is 10");
  EXPECT_EQ(message({3, -1}, {}), "vertical_slash: column -1, kv_len is 10");
  EXPECT_EQ(message({}, {2, -1}), "vertical_slash: distance -1 is negative");
}

}  // namespace
