// SPDX-License-Identifier: Apache-2.0
#include <sattn/plan/tile_cursor.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <sattn/plan/expand.hpp>
#include <sattn/plan/plan_check.hpp>
#include <string>
#include <vector>

#include "support/plans.hpp"
#include "support/random.hpp"

namespace {

using sattn::attention_plan;
using sattn::attention_shape;
using sattn::domain;
using sattn::index_t;
using sattn::key_chunk;
using sattn::key_range;
using sattn::plan_data;
using sattn::plan_head;
using sattn::tile_cursor;
using sattn::token_t;
using test_support::head_fields;
using test_support::one_head;
using test_support::random_source;
using test_support::seed_trace;

key_range all_keys(const attention_plan& plan) {
  return {0, static_cast<token_t>(plan.shape().kv_len)};
}

// ---- what a plan says, without the cursor

bool contains(const std::vector<key_range>& ranges, index_t begin, index_t end, index_t key) {
  return std::any_of(ranges.begin() + begin, ranges.begin() + end,
                     [&](const key_range& r) { return key >= r.begin && key < r.end; });
}

// Whether a tile has any reason to look at a key: a list names it, or a diagonal of its rows
// crosses it.
bool concerns(const attention_plan& plan, index_t head, index_t tile, index_t key) {
  const plan_head& h = plan.head(head);
  const key_range rows = plan.grid().row_range(tile, plan.shape().q_len);
  const index_t top = plan.shape().position(rows.begin);
  const index_t bottom = plan.shape().position(rows.end - 1);
  const auto t = static_cast<std::size_t>(tile);
  const bool listed =
      contains(h.columns, 0, std::ssize(h.columns), key) ||
      (!h.range_ptr.empty() && contains(h.ranges, h.range_ptr[t], h.range_ptr[t + 1], key)) ||
      (!h.token_ptr.empty() && std::binary_search(h.tokens.begin() + h.token_ptr[t],
                                                  h.tokens.begin() + h.token_ptr[t + 1], key)) ||
      (!h.row_key_ptr.empty() &&
       std::binary_search(h.row_keys.begin() + h.row_key_ptr[t],
                          h.row_keys.begin() + h.row_key_ptr[t + 1], key));
  return listed || std::any_of(h.distances.begin(), h.distances.end(), [&](const key_range& run) {
           return key > top - run.end && key <= bottom - run.begin;
         });
}

// The lanes of a sub-tile that attend to a key, by the expanded mask: lane = row, once per head.
std::uint16_t lanes_of(const std::vector<std::uint8_t>& mask, index_t kv_len, key_range rows,
                       index_t lane_rows, index_t key) {
  unsigned lanes = 0;
  for (index_t lane = 0; lane < 16; ++lane) {
    const index_t row = rows.begin + lane % lane_rows;
    if (row < rows.end && mask[static_cast<std::size_t>(row * kv_len + key)] != 0) {
      lanes |= 1U << lane;
    }
  }
  return static_cast<std::uint16_t>(lanes);
}

std::uint16_t full_lanes(index_t rows, index_t lane_rows) {
  unsigned lanes = 0;
  for (index_t lane = 0; lane < 16; ++lane) {
    if (lane % lane_rows < rows) lanes |= 1U << lane;
  }
  return static_cast<std::uint16_t>(lanes);
}

// ---- the check

struct tile_check {
  const attention_plan& plan;
  index_t head;
  index_t tile;
  index_t lane_rows;
  const std::vector<std::uint8_t>& mask;  // of a query head that reads this plan head
  key_range rows = plan.grid().row_range(tile, plan.shape().q_len);
  index_t kv_len = plan.shape().kv_len;
  std::vector<token_t> keys = {};  // of all chunks so far

  key_range sub_rows(index_t s) const {
    const auto begin = static_cast<token_t>(rows.begin + s * 16);
    return {begin, std::min(begin + 16, rows.end)};
  }

  // The keys of one split, appended to `keys`.
  void walk(key_range within) {
    tile_cursor cursor(plan, head, tile, lane_rows, within);
    ASSERT_EQ(cursor.sub_tiles(), (rows.size() + 15) / 16);
    const auto chunk = std::make_unique<key_chunk>();
    bool ended = false;
    const std::size_t first = keys.size();
    while (cursor.next(*chunk)) {
      ASSERT_FALSE(ended) << "a chunk follows one that is not full";
      ASSERT_TRUE(chunk->count >= 1 && chunk->count <= sattn::max_chunk_keys);
      ended = chunk->count < sattn::max_chunk_keys;
      for (index_t i = 0; i < chunk->count; ++i) {
        const token_t key = chunk->keys[static_cast<std::size_t>(i)];
        ASSERT_TRUE(key >= within.begin && key < within.end) << "key " << key;
        ASSERT_TRUE(keys.size() == first || key > keys.back()) << "key " << key;
        ASSERT_TRUE(concerns(plan, head, tile, key)) << "key " << key << " is in no list";
        keys.push_back(key);
      }
      for (index_t s = 0; s < cursor.sub_tiles(); ++s) {
        ASSERT_EQ(cursor.sub_rows(s), sub_rows(s).size());
        ASSERT_NO_FATAL_FAILURE(check_sub_tile(*chunk, s));
      }
    }
    ASSERT_FALSE(cursor.next(*chunk));
  }

  // Every key of the chunk has the lanes that the mask says; outside of the part none.
  void check_sub_tile(const key_chunk& chunk, index_t s) const {
    const key_chunk::sub_tile& sub = chunk.sub[static_cast<std::size_t>(s)];
    const auto& masks = chunk.masks[static_cast<std::size_t>(s)];
    const std::uint16_t full = full_lanes(sub_rows(s).size(), lane_rows);
    ASSERT_TRUE(sub.begin >= 0 && sub.begin <= sub.end && sub.end <= chunk.count);
    for (index_t i = 0; i < chunk.count; ++i) {
      const auto at = static_cast<std::size_t>(i);
      const bool inside = i >= sub.begin && i < sub.end;
      const std::uint16_t got = !inside ? std::uint16_t{0} : sub.masked ? masks[at] : full;
      ASSERT_EQ(got, lanes_of(mask, kv_len, sub_rows(s), lane_rows, chunk.keys[at]))
          << "sub-tile " << s << ", key " << chunk.keys[at] << ", part [" << sub.begin << ", "
          << sub.end << ") of " << chunk.count << (sub.masked ? ", masked" : ", not masked");
    }
    if (sub.masked && sub.begin < sub.end) {
      ASSERT_NE(masks[static_cast<std::size_t>(sub.begin)], 0) << "a key for no row at the front";
      ASSERT_NE(masks[static_cast<std::size_t>(sub.end - 1)], 0) << "a key for no row at the back";
    }
  }

  // No pair of the mask lies outside of the keys.
  void check_complete() const {
    std::vector<bool> present(static_cast<std::size_t>(kv_len));
    for (const token_t key : keys) present[static_cast<std::size_t>(key)] = true;
    for (index_t row = rows.begin; row < rows.end; ++row) {
      for (index_t key = 0; key < kv_len; ++key) {
        ASSERT_TRUE(mask[static_cast<std::size_t>(row * kv_len + key)] == 0 ||
                    present[static_cast<std::size_t>(key)])
            << "row " << row << " misses key " << key;
      }
    }
  }
};

std::vector<token_t> range_keys(const attention_plan& plan, index_t head, index_t tile,
                                key_range within) {
  tile_cursor cursor(plan, head, tile, 16, within);
  std::vector<token_t> keys;
  key_range run;
  while (cursor.next_range(run)) {
    EXPECT_FALSE(run.empty());
    for (token_t key = run.begin; key < run.end; ++key) keys.push_back(key);
  }
  return keys;
}

std::vector<token_t> chunk_keys_of(const attention_plan& plan, index_t head, index_t tile) {
  tile_cursor cursor(plan, head, tile, 16, all_keys(plan));
  const auto chunk = std::make_unique<key_chunk>();
  std::vector<token_t> keys;
  while (cursor.next(*chunk)) {
    keys.insert(keys.end(), chunk->keys.begin(), chunk->keys.begin() + chunk->count);
  }
  return keys;
}

// A query head that reads the plan head.
index_t reader_of(const attention_plan& plan, index_t head) {
  index_t q_head = 0;
  while (plan.head_of(q_head) != head) ++q_head;
  return q_head;
}

// Every tile of every head, cut at `cuts`, in both layouts of the lanes.
void check_plan(const attention_plan& plan, const std::vector<token_t>& cuts) {
  for (index_t head = 0; head < plan.heads(); ++head) {
    const std::vector<std::uint8_t> mask = expand(plan, reader_of(plan, head));
    for (index_t tile = 0; tile < plan.tiles(); ++tile) {
      SCOPED_TRACE("head " + std::to_string(head) + ", tile " + std::to_string(tile));
      for (const index_t lane_rows : {plan.layout().rows, sattn::sub_tile_rows}) {
        tile_check whole{plan, head, tile, lane_rows, mask};
        ASSERT_NO_FATAL_FAILURE(whole.walk(all_keys(plan)));
        ASSERT_NO_FATAL_FAILURE(whole.check_complete());
        ASSERT_EQ(range_keys(plan, head, tile, all_keys(plan)), whole.keys);

        tile_check parts{plan, head, tile, lane_rows, mask};
        for (std::size_t i = 0; i + 1 < cuts.size(); ++i) {
          const std::size_t before = parts.keys.size();
          ASSERT_NO_FATAL_FAILURE(parts.walk({cuts[i], cuts[i + 1]}));
          ASSERT_EQ(range_keys(plan, head, tile, {cuts[i], cuts[i + 1]}),
                    std::vector<token_t>(parts.keys.begin() + static_cast<std::ptrdiff_t>(before),
                                         parts.keys.end()));
        }
        ASSERT_EQ(parts.keys, whole.keys) << "the splits are not the whole";
      }
    }
  }
}

std::vector<token_t> random_cuts(random_source& random, index_t kv_len) {
  std::vector<token_t> cuts = {0, static_cast<token_t>(kv_len)};
  for (index_t n = random.integer(0, 5); n > 0; --n) {
    cuts.push_back(static_cast<token_t>(random.integer(0, kv_len + 1)));
  }
  std::sort(cuts.begin(), cuts.end());
  return cuts;
}

void check_random_plans(int cases, index_t longest) {
  for (int n = 0; n < cases; ++n) {
    const std::uint64_t seed = test_support::test_seed() + static_cast<std::uint64_t>(n);
    const seed_trace trace(seed);
    random_source random(seed);
    const attention_plan plan(test_support::random_plan_data(random, longest));
    SCOPED_TRACE(test_support::describe(plan.data()));
    check_plan(plan, random_cuts(random, plan.shape().kv_len));
    if (::testing::Test::HasFatalFailure()) return;
  }
}

TEST(tile_cursor, gives_exactly_the_pairs_of_thousands_of_random_plans) {
  check_random_plans(6000, 70);
}

TEST(tile_cursor, gives_exactly_the_pairs_of_plans_of_several_chunks) {
  check_random_plans(600, 700);
}

// Random cases meet these only now and then: one diagonal in each of the bits and words of the
// distance table.
TEST(tile_cursor, finds_single_diagonals_at_every_distance) {
  for (const token_t tile_rows : {1, 16, 24, 128}) {
    for (token_t distance = 0; distance < 200; ++distance) {
      const attention_plan plan(one_head({200, 200, 1, 1, 0}, {}, {tile_rows, 0},
                                         head_fields{.distances = {{distance, distance + 1}}}));
      SCOPED_TRACE(test_support::describe(plan.data()) + ", distance " + std::to_string(distance));
      ASSERT_NO_FATAL_FAILURE(check_plan(plan, {0, 100, 200}));
    }
  }
}

// ---- chunks

plan_data dense_plan(const attention_shape& shape, const domain& legal, token_t tile_rows) {
  return one_head(shape, legal, {tile_rows, 0},
                  head_fields{.columns = {{0, static_cast<token_t>(shape.kv_len)}}});
}

void add_to_list(plan_head& head, const key_range& keys) {
  if (keys.size() == 1) {
    head.tokens.push_back(keys.begin);
  } else {
    head.ranges.push_back(keys);
  }
}

TEST(tile_cursor, chunks_do_not_depend_on_how_keys_for_all_rows_are_encoded) {
  const seed_trace trace;
  random_source random;
  for (int n = 0; n < 200; ++n) {
    const domain legal = test_support::random_domain(random, 600);
    const plan_head columns = head_fields{.columns = test_support::random_ranges(random, 600, 5)};
    plan_head lists = head_fields{.range_ptr = {0}, .token_ptr = {0}};
    plan_head mixed = lists;
    for (const key_range& r : columns.columns) {
      add_to_list(lists, r);
      if (random.integer(0, 2) == 0) {
        mixed.columns.push_back(r);
      } else {
        add_to_list(mixed, r);
      }
    }
    for (plan_head* head : {&lists, &mixed}) {
      head->range_ptr.push_back(std::ssize(head->ranges));
      head->token_ptr.push_back(std::ssize(head->tokens));
    }
    const auto keys = [&](const plan_head& head) {
      return chunk_keys_of(attention_plan(one_head({40, 600, 1, 1, 560}, legal, {40, 0}, head)), 0,
                           0);
    };
    ASSERT_EQ(keys(columns), keys(lists));
    ASSERT_EQ(keys(columns), keys(mixed));
  }
}

TEST(tile_cursor, a_window_of_distances_has_the_keys_of_the_window_of_the_domain) {
  for (const token_t window : {1, 5, 16, 100, 300}) {
    const attention_shape shape{200, 400, 1, 1, 200};
    const attention_plan a(one_head(shape, {}, {64, 0}, head_fields{.distances = {{0, window}}}));
    const attention_plan b(dense_plan(shape, {.window = window}, 64));
    for (index_t tile = 0; tile < a.tiles(); ++tile) {
      EXPECT_EQ(chunk_keys_of(a, 0, tile), chunk_keys_of(b, 0, tile)) << "window " << window;
    }
  }
}

TEST(tile_cursor, masks_only_the_edges_of_causal_and_window_domains) {
  const attention_plan plan(dense_plan({128, 2048, 1, 1, 1920}, {.window = 1024}, 128));
  tile_cursor cursor(plan, 0, 0, 16, all_keys(plan));
  const auto chunk = std::make_unique<key_chunk>();
  int masked = 0;
  int parts = 0;
  while (cursor.next(*chunk)) {
    for (index_t s = 0; s < cursor.sub_tiles(); ++s) {
      const key_chunk::sub_tile& sub = chunk->sub[static_cast<std::size_t>(s)];
      if (sub.begin == sub.end) continue;
      ++parts;
      masked += sub.masked ? 1 : 0;
    }
  }
  EXPECT_GT(parts, 60);
  // Two edges of 16 keys for each of 8 sub-tiles, each in two chunks at most.
  EXPECT_LE(masked, 32);
  EXPECT_GE(masked, 16);
}

TEST(tile_cursor, needs_no_mask_where_a_band_of_distances_holds_every_row) {
  const attention_plan plan(
      one_head({128, 2048, 1, 1, 1920}, {}, {128, 0}, head_fields{.distances = {{0, 1024}}}));
  tile_cursor cursor(plan, 0, 0, 16, all_keys(plan));
  const auto chunk = std::make_unique<key_chunk>();
  int free = 0;
  while (cursor.next(*chunk)) {
    for (index_t s = 0; s < cursor.sub_tiles(); ++s) {
      const key_chunk::sub_tile& sub = chunk->sub[static_cast<std::size_t>(s)];
      free += sub.begin < sub.end && !sub.masked ? 1 : 0;
    }
  }
  EXPECT_GE(free, 8 * 6);
}

TEST(tile_cursor, an_empty_plan_head_has_no_chunk) {
  const attention_plan plan(one_head({40, 40, 1, 1, 0}, {}, {16, 0}, {}));
  for (index_t tile = 0; tile < plan.tiles(); ++tile) {
    EXPECT_TRUE(chunk_keys_of(plan, 0, tile).empty());
    EXPECT_TRUE(range_keys(plan, 0, tile, all_keys(plan)).empty());
  }
}

TEST(tile_cursor, walks_the_longest_sequence_to_its_end) {
  constexpr token_t longest = std::numeric_limits<token_t>::max();
  const attention_plan plan(dense_plan({1, longest, 1, 1, longest - 1}, {}, 1));
  tile_cursor cursor(plan, 0, 0, 16, {longest - 200, longest});
  key_range keys;
  ASSERT_TRUE(cursor.next_range(keys));
  EXPECT_EQ(keys, (key_range{longest - 200, longest}));
  EXPECT_FALSE(cursor.next_range(keys));
}

}  // namespace
