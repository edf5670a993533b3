// SPDX-License-Identifier: Apache-2.0
#include <sattn/plan/attention_plan.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <sattn/pattern/basic.hpp>
#include <sattn/pattern/compose.hpp>
#include <sattn/pattern/vertical_slash.hpp>
#include <sattn/plan/expand.hpp>
#include <sattn/plan/plan_check.hpp>
#include <set>
#include <string>
#include <vector>

#include "support/errors.hpp"
#include "support/plans.hpp"
#include "support/random.hpp"

namespace {

using sattn::attention_plan;
using sattn::attention_shape;
using sattn::domain;
using sattn::head_map;
using sattn::index_t;
using sattn::key_range;
using sattn::plan_data;
using sattn::plan_head;
using sattn::plan_stats;
using sattn::rounding;
using sattn::token_t;
using test_support::aligned_shape;
using test_support::error_of;
using test_support::head_fields;
using test_support::one_head;
using test_support::plan_of;
using test_support::random_source;
using test_support::seed_trace;

// ---- the rules of the data

// Two heads with every encoding; 10 rows at positions 10 to 19 of 20 keys, in three tiles.
plan_data good_data() {
  const plan_head head = head_fields{.distances = {{0, 3}, {5, 9}},
                                     .columns = {{0, 2}, {10, 12}},
                                     .range_ptr = {0, 1, 1, 3},
                                     .ranges = {{3, 6}, {4, 9}, {12, 15}},
                                     .token_ptr = {0, 1, 1, 3},
                                     .tokens = {8, 1, 10},
                                     .row_key_ptr = {0, 2, 2, 3},
                                     .row_keys = {7, 9, 4},
                                     .row_masks = {0b1010, 0b1111, 0b01},
                                     .split_ptr = {0, 1, 3, 4},
                                     .splits = {0, 0, 7, 0}};
  plan_data data = one_head({10, 20, 4, 2, 10}, {}, {4, 0}, head);
  data.map = head_map::per_kv_head;
  data.heads.push_back(head);
  return data;
}

struct fault {
  std::function<void(plan_data&)> plant;
  std::vector<const char*> message;  // what it must contain
};

void expect_refused(const std::vector<fault>& faults) {
  for (std::size_t i = 0; i < faults.size(); ++i) {
    plan_data data = good_data();
    faults[i].plant(data);
    const std::string message = error_of([&] { attention_plan plan(data); });
    EXPECT_NE(message, "") << "fault " << i << " is not noticed";
    for (const char* part : faults[i].message) {
      EXPECT_NE(message.find(part), std::string::npos)
          << "fault " << i << ": got '" << message << "', expected '" << part << "'";
    }
  }
}

TEST(attention_plan, accepts_what_keeps_the_rules) {
  EXPECT_NO_THROW(attention_plan(good_data()).validate());
  EXPECT_NO_THROW(attention_plan(plan_data{}));
  EXPECT_NO_THROW(attention_plan().validate());
}

TEST(attention_plan, refuses_broken_shapes_grids_and_head_counts) {
  expect_refused({
      {[](plan_data& d) { d.shape.q_len = -1; }, {"q_len -1"}},
      {[](plan_data& d) { d.shape.q_heads = 3; }, {"q_heads 3", "kv_heads 2"}},
      {[](plan_data& d) { d.legal.window = -5; }, {"window -5"}},
      {[](plan_data& d) { d.legal.prefix = -6; }, {"prefix -6"}},
      {[](plan_data& d) { d.grid.rows = 0; }, {"tiles of 0 rows", "128"}},
      {[](plan_data& d) { d.grid.rows = 129; }, {"tiles of 129 rows", "128"}},
      {[](plan_data& d) { d.grid.period = -1; }, {"period -1"}},
      {[](plan_data& d) { d.heads.pop_back(); }, {"1 heads, expected 2"}},
      {[](plan_data& d) { d.map = head_map::per_q_head; }, {"2 heads, expected 4"}},
  });
}

TEST(attention_plan, refuses_broken_distances_and_columns) {
  expect_refused({
      {[](plan_data& d) {
         d.heads[1].distances = {{3, 3}};
       },
       {"distances [3, 3) of head 1"}},
      {[](plan_data& d) {
         d.heads[1].distances = {{-1, 2}};
       },
       {"distances [-1, 2) of head 1"}},
      {[](plan_data& d) {
         d.heads[1].distances = {{-9000, -8000}};
       },
       {"distances [-9000, -8000) of head 1"}},
      {[](plan_data& d) {
         d.heads[1].distances = {{4, 21}};
       },
       {"distances [4, 21) of head 1", "[0, 20)"}},
      // No row sees what the window leaves out.
      {[](plan_data& d) { d.legal.window = 8; }, {"distances [5, 9) of head 0", "[0, 8)"}},
      {[](plan_data& d) {
         d.heads[1].distances = {{0, 3}, {3, 9}};
       },
       {"distances [3, 9) of head 1", "ends at 3"}},
      {[](plan_data& d) {
         d.heads[1].distances = {{0, 5}, {3, 9}};
       },
       {"distances [3, 9) of head 1", "ends at 5"}},
      {[](plan_data& d) {
         d.heads[1].distances = {{7, 9}, {0, 3}};
       },
       {"distances [0, 3) of head 1", "ends at 9"}},
      {[](plan_data& d) {
         d.heads[1].distances = {{9000, 9100}, {0, 3}};
       },
       {"distances [9000, 9100) of head 1", "[0, 20)"}},
      {[](plan_data& d) {
         d.heads[0].columns = {{12, 11}};
       },
       {"columns [12, 11) of head 0"}},
      {[](plan_data& d) {
         d.heads[0].columns = {{-2, 1}};
       },
       {"columns [-2, 1) of head 0"}},
      {[](plan_data& d) {
         d.heads[0].columns = {{19, 21}};
       },
       {"columns [19, 21) of head 0", "[0, 20)"}},
      {[](plan_data& d) {
         d.heads[0].columns = {{4, 6}, {6, 7}};
       },
       {"columns [6, 7) of head 0", "ends at 6"}},
      {[](plan_data& d) {
         d.heads[0].columns = {{4, 6}, {1, 2}};
       },
       {"columns [1, 2) of head 0", "ends at 6"}},
      // With every row before the first key, no distance exists.
      {[](plan_data& d) {
         d.shape.q_offset = -40;
         d.heads[0].distances = {{0, 1}};
       },
       {"distances [0, 1) of head 0", "[0, 0)"}},
  });
}

TEST(attention_plan, refuses_broken_lists) {
  expect_refused({
      {[](plan_data& d) { d.heads[1].range_ptr.clear(); }, {"3 range of head 1"}},
      {[](plan_data& d) { d.heads[1].range_ptr.pop_back(); },
       {"range pointers of head 1", "3 entries, expected 3 + 1"}},
      {[](plan_data& d) {
         d.heads[1].range_ptr = {1, 1, 1, 3};
       },
       {"range pointers of head 1", "from 1 to 3 of 3"}},
      {[](plan_data& d) {
         d.heads[1].range_ptr = {0, 1, 1, 2};
       },
       {"range pointers of head 1", "from 0 to 2 of 3"}},
      {[](plan_data& d) {
         d.heads[1].range_ptr = {0, 2, 1, 3};
       },
       {"range pointers of head 1", "tile 1"}},
      {[](plan_data& d) {
         d.heads[1].ranges[1] = {12, 15};
       },
       {"ranges [12, 15) of head 1", "ends at 15"}},
      {[](plan_data& d) {
         d.heads[1].ranges[0] = {5, 5};
       },
       {"ranges [5, 5) of head 1"}},
      {[](plan_data& d) {
         d.heads[1].ranges[0] = {-5, 5};
       },
       {"ranges [-5, 5) of head 1"}},
      {[](plan_data& d) {
         d.heads[1].ranges[2] = {12, 21};
       },
       {"ranges [12, 21) of head 1", "[0, 20)"}},
      {[](plan_data& d) { d.heads[1].token_ptr.clear(); }, {"3 token of head 1"}},
      {[](plan_data& d) { d.heads[1].token_ptr.push_back(3); },
       {"token pointers of head 1", "5 entries, expected 3 + 1"}},
      {[](plan_data& d) {
         d.heads[1].token_ptr = {0, 1, 1, 4};
       },
       {"token pointers of head 1", "from 0 to 4 of 3"}},
      {[](plan_data& d) {
         d.heads[1].token_ptr = {0, 3, 1, 3};
       },
       {"token pointers of head 1", "tile 1"}},
      {[](plan_data& d) { d.heads[1].tokens[0] = 20; },
       {"token 20", "tile 0 of head 1", "kv_len is 20"}},
      {[](plan_data& d) { d.heads[1].tokens[0] = -1; }, {"token -1", "tile 0 of head 1"}},
      {[](plan_data& d) { d.heads[1].tokens[2] = 1; }, {"token 1 after 1", "tile 2 of head 1"}},
      {[](plan_data& d) { d.heads[1].tokens[2] = 0; }, {"token 0 after 1", "tile 2 of head 1"}},
  });
}

TEST(attention_plan, refuses_broken_row_keys) {
  expect_refused({
      {[](plan_data& d) { d.heads[1].row_key_ptr.clear(); }, {"3 row key of head 1"}},
      {[](plan_data& d) { d.heads[1].row_masks.pop_back(); }, {"head 1", "3 row keys and 2 masks"}},
      {[](plan_data& d) {
         d.heads[1].row_key_ptr = {0, 2, 1, 3};
       },
       {"row key pointers of head 1", "tile 1"}},
      {[](plan_data& d) { d.heads[1].row_keys[1] = 7; },
       {"row key 7 after 7", "tile 0 of head 1"}},
      {[](plan_data& d) { d.heads[1].row_keys[0] = -1; }, {"row key -1", "tile 0 of head 1"}},
      {[](plan_data& d) { d.heads[1].row_keys[2] = 20; }, {"row key 20", "kv_len is 20"}},
      {[](plan_data& d) { d.heads[1].row_masks[0] = 0; }, {"row key 7", "mask 0"}},
      // The last tile has two rows.
      {[](plan_data& d) { d.heads[1].row_masks[2] = 0b100; }, {"row key 4", "mask 4 for 2 rows"}},
      // Its first row stands before the key, its second at it.
      {[](plan_data& d) { d.heads[1].row_keys[2] = 19; },
       {"row key 19", "mask 1", "rows 2 may see"}},
  });
}

TEST(attention_plan, refuses_broken_splits) {
  expect_refused({
      {[](plan_data& d) { d.heads[1].split_ptr.clear(); }, {"4 split of head 1"}},
      {[](plan_data& d) {
         d.heads[1].split_ptr.clear();
         d.heads[1].splits.clear();
       },
       {"head 1 and head 0 differ"}},
      {[](plan_data& d) {
         d.heads[1].split_ptr = {0, 1, 1, 4};
       },
       {"tile 1 of head 1 has no split"}},
      {[](plan_data& d) {
         d.heads[1].split_ptr = {0, 2, 1, 4};
       },
       {"split pointers of head 1", "tile 1"}},
      {[](plan_data& d) { d.heads[1].splits[1] = 2; }, {"split at 2", "tile 1 of head 1"}},
      {[](plan_data& d) { d.heads[1].splits[2] = 0; }, {"split at 0 after 0", "tile 1 of head 1"}},
      {[](plan_data& d) { d.heads[1].splits[2] = -3; }, {"split at -3", "tile 1 of head 1"}},
  });
}

// ---- what it is made of

bool same_head(const plan_head& a, const plan_head& b) {
  return a.distances == b.distances && a.columns == b.columns && a.range_ptr == b.range_ptr &&
         a.ranges == b.ranges && a.token_ptr == b.token_ptr && a.tokens == b.tokens &&
         a.row_key_ptr == b.row_key_ptr && a.row_keys == b.row_keys && a.row_masks == b.row_masks &&
         a.split_ptr == b.split_ptr && a.splits == b.splits && a.distance_bits == b.distance_bits;
}

TEST(attention_plan, made_again_from_its_data_is_the_same) {
  const seed_trace trace;
  random_source random;
  for (int n = 0; n < 200; ++n) {
    const attention_plan plan(test_support::random_plan_data(random, 60));
    plan_data data = plan.data();
    for (plan_head& head : data.heads) head.distance_bits.clear();  // derived
    const attention_plan again(data);
    ASSERT_EQ(again.shape(), plan.shape());
    ASSERT_EQ(again.grid(), plan.grid());
    for (index_t i = 0; i < plan.heads(); ++i) {
      ASSERT_TRUE(same_head(again.head(i), plan.head(i)));
    }
  }
}

TEST(attention_plan, maps_query_heads_to_lists) {
  plan_data data = good_data();
  data.heads.resize(4, data.heads[0]);
  const auto lists = [&](head_map map) {
    data.map = map;
    const attention_plan plan(data);
    std::vector<index_t> of_heads = {plan.heads(), plan.sharing_heads()};
    for (index_t head = 0; head < 4; ++head) of_heads.push_back(plan.head_of(head));
    return of_heads;
  };
  EXPECT_EQ(lists(head_map::shared), (std::vector<index_t>{1, 2, 0, 0, 0, 0}));
  EXPECT_EQ(lists(head_map::per_kv_head), (std::vector<index_t>{2, 2, 0, 0, 1, 1}));
  EXPECT_EQ(lists(head_map::per_q_head), (std::vector<index_t>{4, 1, 0, 1, 2, 3}));
}

TEST(attention_plan, refuses_splits_of_tiles_taller_than_a_mask) {
  plan_data d;
  d.shape = {.q_len = 17, .kv_len = 17, .q_heads = 1, .kv_heads = 1, .q_offset = 0};
  d.grid = {.rows = 17, .period = 0};
  d.heads.resize(1);
  d.heads[0].columns = {{0, 17}};
  d.heads[0].split_ptr = {0, 1};
  d.heads[0].splits = {0};
  EXPECT_THROW(attention_plan{d}, sattn::shape_error);
  d.grid.rows = 16;
  d.heads[0].split_ptr = {0, 1, 2};
  d.heads[0].splits = {0, 0};
  EXPECT_NO_THROW(attention_plan{d});
}

TEST(attention_plan, leaves_out_heads_that_no_query_head_uses) {
  plan_data d;
  d.shape = {.q_len = 4, .kv_len = 4, .q_heads = 1, .kv_heads = 1, .q_offset = 0};
  d.heads.resize(2);
  d.heads[1].distances = {{-100000, 1}};
  EXPECT_EQ(attention_plan(d).data().heads.size(), 1u);
}

TEST(attention_plan, splits_cover_the_keys_of_every_tile) {
  const attention_plan plan(good_data());
  EXPECT_TRUE(plan.has_splits());
  EXPECT_TRUE(plan.layout().single_rows);
  EXPECT_EQ(plan.splits(0, 0), 1);
  EXPECT_EQ(plan.split_range(0, 0, 0), (key_range{0, 20}));
  EXPECT_EQ(plan.splits(1, 1), 2);
  EXPECT_EQ(plan.split_range(1, 1, 0), (key_range{0, 7}));
  EXPECT_EQ(plan.split_range(1, 1, 1), (key_range{7, 20}));

  const attention_plan whole = plan_of(aligned_shape(10, 20), sattn::sliding_window{3});
  EXPECT_FALSE(whole.has_splits());
  EXPECT_EQ(whole.splits(0, 0), 1);
  EXPECT_EQ(whole.split_range(0, 0, 0), (key_range{0, 20}));
}

TEST(attention_plan, an_empty_plan_has_nothing) {
  const attention_plan plan;
  EXPECT_EQ(plan.heads(), 0);
  EXPECT_EQ(plan.tiles(), 0);
  EXPECT_EQ(plan.bytes(), 0U);
  EXPECT_FALSE(plan.has_splits());
  EXPECT_EQ(plan.stats().legal, 0);
  EXPECT_EQ(plan.stats().density_selected(), 0);
}

// ---- bytes

TEST(attention_plan, bytes_counts_every_array) {
  const attention_plan plan(good_data());
  const plan_head& h = plan.head(0);
  EXPECT_EQ(plan.bytes(), 2 * (7 * sizeof(key_range) + 16 * sizeof(index_t) + 10 * sizeof(token_t) +
                               3 * sizeof(std::uint16_t) + h.distance_bits.size() * 8));
}

TEST(attention_plan, a_long_vertical_slash_plan_takes_less_than_a_mebibyte_a_head) {
  const seed_trace trace;
  random_source random;
  constexpr token_t tokens = 131'072;
  const auto distinct = [&](std::size_t count) {
    std::set<token_t> values;
    while (values.size() < count) values.insert(static_cast<token_t>(random.integer(0, tokens)));
    return std::vector<token_t>(values.begin(), values.end());
  };
  const sattn::vertical_slash pattern{.columns = distinct(1000), .distances = distinct(6096)};
  const attention_plan plan = plan_of(aligned_shape(tokens, tokens, 8, 2), pattern);
  ASSERT_EQ(plan.heads(), 1);
  EXPECT_GT(plan.head(0).distances.size(), 5000U);
  EXPECT_LT(plan.bytes(), std::size_t{1} << 20);
}

TEST(attention_plan, dense_and_windows_take_the_same_memory_at_any_length) {
  for (const token_t tokens : {1000, 1'000'000}) {
    const attention_shape shape = aligned_shape(tokens, tokens);
    EXPECT_LT(plan_of(shape, sattn::dense{}).bytes(), 64U);
    EXPECT_LT(plan_of(shape, sattn::sink{4} | sattn::sliding_window{512}).bytes(), 256U);
  }
}

// ---- stats

std::int64_t count_pairs(const attention_plan& plan) {
  std::int64_t pairs = 0;
  for (index_t head = 0; head < plan.shape().q_heads; ++head) {
    const std::vector<std::uint8_t> mask = expand(plan, head);
    pairs += std::count(mask.begin(), mask.end(), std::uint8_t{1});
  }
  return pairs;
}

std::int64_t count_legal(const attention_plan& plan) {
  const attention_shape& shape = plan.shape();
  std::int64_t pairs = 0;
  for (index_t row = 0; row < shape.q_len; ++row) {
    for (index_t key = 0; key < shape.kv_len; ++key) {
      pairs += test_support::sees(plan.data().legal, shape.q_offset + row, key) ? 1 : 0;
    }
  }
  return pairs * shape.q_heads;
}

TEST(plan_stats, selected_and_legal_equal_a_count_of_the_pairs) {
  for (int n = 0; n < 500; ++n) {
    const std::uint64_t seed = test_support::test_seed() + static_cast<std::uint64_t>(n);
    const seed_trace trace(seed);
    random_source random(seed);
    const attention_plan plan(test_support::random_plan_data(random, 150));
    const plan_stats stats = plan.stats();
    ASSERT_EQ(stats.legal, count_legal(plan)) << test_support::describe(plan.data());
    ASSERT_EQ(stats.selected, count_pairs(plan)) << test_support::describe(plan.data());
    ASSERT_GE(stats.executed, stats.selected) << test_support::describe(plan.data());
  }
}

// Where rows have keys of their own: what many of the rows share is computed for all 16 lanes of
// each head, if it is worth a tile, and everything else pair by pair.
std::int64_t count_executed_of_row_keys(const attention_plan& plan) {
  const attention_shape& shape = plan.shape();
  const index_t heads = plan.sharing_heads();
  const index_t many = heads == 1 ? 4 : heads < 4 ? 5 : 7;
  std::int64_t executed = 0;
  for (index_t first_head = 0; first_head < shape.q_heads; first_head += heads) {
    const std::vector<std::uint8_t> mask = expand(plan, first_head);
    for (index_t tile = 0; tile < plan.tiles(); ++tile) {
      const key_range rows = plan.grid().row_range(tile, shape.q_len);
      index_t shared_keys = 0;
      index_t shared_pairs = 0;
      index_t pairs = 0;
      for (index_t key = 0; key < shape.kv_len; ++key) {
        index_t count = 0;
        for (index_t r = rows.begin; r < rows.end; ++r) {
          count += mask[static_cast<std::size_t>(r * shape.kv_len + key)];
        }
        pairs += count;
        if (count >= many) {
          ++shared_keys;
          shared_pairs += count;
        }
      }
      executed +=
          heads * (shared_pairs >= 256 ? pairs - shared_pairs + shared_keys * 16 : pairs);
    }
  }
  return executed;
}

// Keys for all rows of a tile alike: every 16 rows take the keys that one of them sees, in all
// lanes of as many blocks as hold the heads; the row kernel has no lanes.
std::int64_t count_executed(const attention_plan& plan) {
  const attention_shape& shape = plan.shape();
  const index_t rows_at_once = plan.layout().rows;
  std::int64_t executed = 0;
  for (index_t list = 0; list < shape.q_heads / plan.sharing_heads(); ++list) {
    const index_t first_head = list * plan.sharing_heads();
    const std::vector<std::uint8_t> mask = expand(plan, first_head);
    for (index_t tile = 0; tile < plan.tiles(); ++tile) {
      const key_range tile_rows = plan.grid().row_range(tile, shape.q_len);
      for (index_t row = tile_rows.begin; row < tile_rows.end; row += rows_at_once) {
        const index_t end = std::min<index_t>(row + rows_at_once, tile_rows.end);
        const index_t blocks =
            (plan.sharing_heads() + plan.layout().heads - 1) / plan.layout().heads;
        const index_t pairs_a_key =
            plan.layout().single_rows ? (end - row) * plan.sharing_heads() : blocks * 16;
        for (index_t key = 0; key < shape.kv_len; ++key) {
          bool seen = false;
          for (index_t r = row; r < end; ++r) {
            seen |= mask[static_cast<std::size_t>(r * shape.kv_len + key)] != 0;
          }
          executed += seen ? pairs_a_key : 0;
        }
      }
    }
  }
  return executed;
}

TEST(plan_stats, executed_counts_tiles_and_lanes_of_lists) {
  for (int n = 0; n < 500; ++n) {
    const std::uint64_t seed = test_support::test_seed() + static_cast<std::uint64_t>(n);
    const seed_trace trace(seed);
    random_source random(seed);
    plan_data data = test_support::random_plan_data(random, 150);
    for (plan_head& head : data.heads) head.distances.clear();
    const attention_plan plan(data);
    ASSERT_EQ(plan.stats().executed, plan.has_row_keys() && plan.layout().single_rows
                                         ? count_executed_of_row_keys(plan)
                                         : count_executed(plan))
        << test_support::describe(data);
  }
}

TEST(plan_stats, lists_that_overlap_enough_run_as_whole_tiles) {
  // One tile of so many rows, and keys that some number of its rows have. A key of r rows costs r
  // fourths (fifths, sevenths) of a tile's key row by row if each head (2 or 3, 4 or more heads)
  // has a list of its own, and dividing costs 19 % (4 %, nothing) on top.
  struct test_case {
    index_t heads;
    token_t tile_rows;
    std::vector<std::pair<index_t, index_t>> keys;  // (count, rows of each)
    bool whole;
  };
  const test_case cases[] = {
      {1, 16, {{100, 16}, {64, 1}}, false},  // 100 + 16 keys' worth x 1.19 against 164
      {1, 16, {{100, 16}, {25, 1}}, true},   // 106.25 x 1.19 = 126.4 against 125
      {1, 16, {{100, 16}, {28, 1}}, false},  // 107 x 1.19 = 127.3 against 128
      {1, 16, {{100, 3}}, false},            // 75 x 1.19
      {1, 16, {{100, 4}}, true},
      {1, 16, {{57, 16}, {110, 1}}, false},  // a core that all rows have, and keys of their own
      {2, 16, {{100, 5}, {4, 1}}, true},     // 100.8 x 1.04 = 104.8 against 104
      {2, 16, {{100, 5}, {6, 1}}, false},
      {3, 16, {{100, 5}, {4, 1}}, true},
      {4, 16, {{100, 7}}, true},
      {4, 16, {{100, 7}, {1, 6}}, false},
      {4, 4, {{100, 2}}, true},   // 4 heads share the lanes: 4 x 200 / 7 against 100
      {4, 4, {{100, 1}}, false},  // 57 against 100
      {2, 8, {{100, 5}}, true},
  };
  for (const test_case& c : cases) {
    plan_head head;
    for (const auto& [count, rows] : c.keys) {
      for (index_t i = 0; i < count; ++i) {
        head.row_keys.push_back(static_cast<token_t>(head.row_keys.size()));
        head.row_masks.push_back(static_cast<std::uint16_t>((1u << rows) - 1));
      }
    }
    const index_t keys = std::ssize(head.row_keys);
    head.row_key_ptr = {0, keys};
    const attention_plan plan(plan_data{.shape = {c.tile_rows, keys, c.heads, 1, 0},
                                        .legal = domain::full(),
                                        .grid = {c.tile_rows, 0},
                                        .heads = {head}});
    const std::string what = "case " + std::to_string(&c - cases);
    EXPECT_EQ(plan.has_dense_row_keys(), c.whole) << what;
    EXPECT_EQ(plan.layout().single_rows,
              !c.whole || sattn::lane_layout(plan.grid(), c.heads).single_rows)
        << what;
    EXPECT_EQ(plan.stats().executed,
              plan.layout().single_rows ? count_executed_of_row_keys(plan) : count_executed(plan))
        << what;
  }
}

TEST(plan_stats, executed_of_dense_attention_in_closed_form) {
  // 70 rows without a mask: tiles of 64 and 6 rows are 4 + 1 blocks of 16 lanes, for each head.
  const attention_plan tall =
      plan_of({70, 40, 4, 2, 0}, sattn::dense{}, {.legal = domain::full(), .tile_rows = 64});
  EXPECT_EQ(tall.stats().selected, 70 * 40 * 4);
  EXPECT_EQ(tall.stats().executed, 5 * 16 * 40 * 4);
  // Tiles of 4 rows hold 4 heads: the 3 heads of a group leave 4 lanes empty.
  const attention_plan short_tiles =
      plan_of({8, 40, 6, 2, 0}, sattn::dense{}, {.legal = domain::full(), .tile_rows = 4});
  EXPECT_EQ(short_tiles.stats().executed, 2 * 16 * 40 * 2);
  // The row kernel computes what it is asked for.
  const attention_plan rows =
      plan_of({7, 40, 2, 2, 0}, sattn::dense{}, {.legal = domain::full(), .tile_rows = 1});
  EXPECT_EQ(rows.stats().executed, 7 * 40 * 2);
  EXPECT_EQ(rows.stats().density_executed(), 1.0);
}

TEST(plan_stats, sinks_and_a_window_select_what_the_closed_form_says) {
  constexpr index_t tokens = 500;
  for (const token_t window : {1, 7, 64, 499, 500, 700}) {
    for (const token_t sinks : {0, 1, 4, 100, 500}) {
      const attention_plan plan = plan_of(aligned_shape(tokens, tokens),
                                          sattn::sink{sinks} | sattn::sliding_window{window});
      std::int64_t expected = 0;
      for (index_t i = 0; i < tokens; ++i) {
        expected += std::min<index_t>(i + 1, window) +
                    std::min<index_t>(std::max<index_t>(i + 1 - window, 0), sinks);
      }
      EXPECT_EQ(plan.stats().selected, expected) << "window " << window << ", sinks " << sinks;
    }
  }
}

TEST(plan_stats, taller_tiles_never_execute_less_of_a_vertical_slash_pattern) {
  const seed_trace trace;
  random_source random;
  for (int n = 0; n < 20; ++n) {
    sattn::vertical_slash pattern;
    for (int i = 0; i < 10; ++i) {
      pattern.columns.push_back(static_cast<token_t>(random.integer(0, 600)));
      pattern.distances.push_back(static_cast<token_t>(random.integer(0, 600)));
    }
    // Exact plans drop keys at the ends of each chunk, so only the step from 16 rows, where no
    // key is idle, is a certain one; hulls grow with every step.
    const attention_shape shape = aligned_shape(300, 600, 2, 2);
    const auto executed = [&](token_t rows, rounding how) {
      return plan_of(shape, pattern, {.tile_rows = rows, .rounding = how}).stats().executed;
    };
    for (const token_t rows : {16, 32, 64}) {
      EXPECT_LE(executed(rows, rounding::cover), executed(2 * rows, rounding::cover));
      EXPECT_LE(executed(16, rounding::exact), executed(2 * rows, rounding::exact));
    }
    EXPECT_EQ(executed(16, rounding::exact), executed(16, rounding::cover));
  }
}

TEST(plan_stats, density_is_relative_to_the_legal_pairs) {
  const attention_plan dense = plan_of(aligned_shape(100, 100, 4, 2), sattn::dense{});
  EXPECT_EQ(dense.stats().legal, 4 * 5050);
  EXPECT_EQ(dense.stats().density_selected(), 1.0);
  EXPECT_GT(dense.stats().density_executed(), 1.0);
  const attention_plan one = plan_of(aligned_shape(100, 100), sattn::sliding_window{1});
  EXPECT_DOUBLE_EQ(one.stats().density_selected(), 100.0 / 5050);
}

TEST(plan_stats, holds_without_query_heads) {
  plan_data data = good_data();
  data.shape.q_heads = 0;
  EXPECT_EQ(attention_plan(data).stats().executed, 0);
}

}  // namespace
