// SPDX-License-Identifier: Apache-2.0
#include <sattn/plan/tile_grid.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "support/random.hpp"

namespace {

using sattn::index_t;
using sattn::key_range;
using sattn::lane_layout;
using sattn::tile_grid;
using sattn::token_t;
using test_support::random_source;
using test_support::seed_trace;

const std::vector<token_t> tile_heights = {1, 2, 3, 4, 8, 13, 16, 24, 64, 100, 128};
const std::vector<token_t> periods = {0, 1, 3, 16, 24, 100, 128, 131, 1000};

template <class F>
void for_each_grid(F&& f) {
  for (const token_t rows : tile_heights) {
    for (const token_t period : periods) f(tile_grid{rows, period});
  }
}

TEST(tile_grid, tiles_partition_the_rows_in_order) {
  for_each_grid([](const tile_grid& grid) {
    for (const index_t q_len : {0, 1, 15, 16, 17, 100, 127, 128, 129, 262, 1000, 2500}) {
      token_t next = 0;
      for (index_t tile = 0; tile < grid.tiles(q_len); ++tile) {
        const key_range rows = grid.row_range(tile, q_len);
        ASSERT_EQ(rows.begin, next) << grid.rows << ", " << grid.period << ", q_len " << q_len;
        ASSERT_FALSE(rows.empty());
        ASSERT_LE(rows.size(), grid.rows);
        next = rows.end;
      }
      ASSERT_EQ(next, q_len) << grid.rows << ", " << grid.period;
    }
  });
}

TEST(tile_grid, tiles_never_straddle_a_multiple_of_the_period_and_are_tall_elsewhere) {
  for_each_grid([](const tile_grid& grid) {
    const index_t q_len = 2500;
    for (index_t tile = 0; tile < grid.tiles(q_len); ++tile) {
      const key_range rows = grid.row_range(tile, q_len);
      const bool ends_at_period = grid.period > 0 && rows.end % grid.period == 0;
      if (grid.period > 0) {
        ASSERT_EQ(rows.begin / grid.period, (rows.end - 1) / grid.period);
      }
      ASSERT_TRUE(rows.size() == grid.rows || ends_at_period || rows.end == q_len);
    }
  });
}

// What patterns of blocks rely on to find the tiles of a block.
TEST(tile_grid, the_tiles_of_the_rows_before_a_period_are_the_index_of_its_first_tile) {
  for_each_grid([](const tile_grid& grid) {
    const index_t q_len = 2500;
    const index_t step = grid.period == 0 ? grid.rows : grid.period;
    for (index_t row = 0; row < q_len; row += step) {
      ASSERT_EQ(grid.row_range(grid.tiles(row), q_len).begin, row);
    }
  });
}

TEST(tile_grid, both_of_two_are_no_taller_and_break_at_the_periods_of_either) {
  const seed_trace trace;
  random_source random;
  for (int n = 0; n < 500; ++n) {
    const auto any = [&] {
      return tile_grid{tile_heights[static_cast<std::size_t>(random.integer(0, 11))],
                       periods[static_cast<std::size_t>(random.integer(0, 9))]};
    };
    const tile_grid a = any();
    const tile_grid b = any();
    const tile_grid both = a & b;
    ASSERT_EQ(both, (b & a));
    ASSERT_EQ((a & a), a.fitted());
    ASSERT_LE(both.rows, std::min(a.rows, b.rows));
    for (index_t tile = 0; tile < both.tiles(700); ++tile) {
      const key_range rows = both.row_range(tile, 700);
      for (const token_t period : {a.period, b.period}) {
        if (period == 0) continue;
        ASSERT_EQ(rows.begin / period, (rows.end - 1) / period)
            << a.rows << ", " << a.period << " & " << b.rows << ", " << b.period;
      }
    }
  }
}

TEST(tile_grid, without_a_period_leaves_the_period_of_the_other) {
  EXPECT_EQ((tile_grid{128, 0} & tile_grid{16, 24}), (tile_grid{16, 24}));
  EXPECT_EQ((tile_grid{8, 36} & tile_grid{16, 24}), (tile_grid{8, 12}));
  EXPECT_EQ((tile_grid{64, 0} & tile_grid{128, 0}), (tile_grid{64, 0}));
}

TEST(lane_layout, fills_sixteen_lanes_with_rows_and_heads) {
  for (const token_t rows : tile_heights) {
    const lane_layout layout({rows, 0}, 4);
    EXPECT_EQ(layout.rows * layout.heads, 16) << "tiles of " << rows;
    EXPECT_GE(layout.rows, std::min<token_t>(rows, 16));
    EXPECT_LT(layout.rows / 2, rows);  // the smallest power of two that holds a tile
  }
}

TEST(lane_layout, leaves_tiles_that_fill_half_of_the_lanes_or_less_to_the_row_kernel) {
  struct expected {
    token_t rows;
    index_t sharing_heads;
    bool single_rows;
  };
  const std::vector<expected> cases = {
      {1, 1, true},   {1, 8, true},   {1, 9, false},  {1, 16, false}, {1, 40, false}, {2, 4, true},
      {2, 5, false},  {3, 2, true},   {3, 3, false},  {3, 4, false},  {8, 1, true},   {8, 2, false},
      {13, 1, false}, {16, 1, false}, {64, 1, false}, {128, 8, false}};
  for (const expected& c : cases) {
    EXPECT_EQ(lane_layout({c.rows, 0}, c.sharing_heads).single_rows, c.single_rows)
        << c.rows << " rows x " << c.sharing_heads << " heads";
  }
}

}  // namespace
