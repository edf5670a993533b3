// SPDX-License-Identifier: Apache-2.0
#include <sattn/plan/plan_writer.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <sattn/plan/expand.hpp>
#include <sattn/plan/plan_check.hpp>
#include <string>
#include <utility>
#include <vector>

#include "support/errors.hpp"
#include "support/plans.hpp"
#include "support/random.hpp"

namespace {

using sattn::attention_plan;
using sattn::domain;
using sattn::index_t;
using sattn::key_range;
using sattn::plan_data;
using sattn::plan_head;
using sattn::plan_scope;
using sattn::plan_writer;
using sattn::token_t;
using test_support::error_of;
using test_support::random_source;
using test_support::seed_trace;
using test_support::selects;

using ranges = std::vector<key_range>;

// 10 rows at positions 10 to 19 of 20 keys; tiles of 4, 4 and 2 rows.
plan_scope small_scope() { return {.shape = {10, 20, 1, 1, 10}, .legal = {}, .grid = {4, 0}}; }

template <class F>
plan_head written(const plan_scope& scope, F&& emit) {
  sattn::plan_scratch scratch;
  plan_writer writer(scope, scratch);
  emit(writer);
  plan_head head;
  writer.finish(head);
  return head;
}

bool is_dense(const plan_head& head, index_t kv_len) {
  return head.columns == ranges{{0, static_cast<token_t>(kv_len)}} && head.distances.empty() &&
         head.range_ptr.empty() && head.token_ptr.empty() && head.distance_bits.empty();
}

// ---- keys of single rows

TEST(plan_writer, keeps_the_keys_of_rows_apart_whatever_the_order) {
  const seed_trace trace;
  random_source random;
  for (int n = 0; n < 300; ++n) {
    const index_t kv_len = random.integer(1, 200);
    const index_t q_len = random.integer(1, 70);
    plan_data data;
    data.shape = {q_len, kv_len, 1, 1, static_cast<token_t>(random.integer(-5, kv_len))};
    data.legal = test_support::random_domain(random, static_cast<token_t>(kv_len));
    data.grid = random.pick<sattn::tile_grid>({{16, 0}, {16, 16}, {13, 24}, {5, 0}, {1, 0}});
    std::vector<bool> wanted(static_cast<std::size_t>(q_len * kv_len));
    const bool ascending = random.integer(0, 2) == 0;
    data.heads.push_back(written({data.shape, data.legal, data.grid}, [&](plan_writer& writer) {
      for (index_t i = 0; i < 2 * q_len; ++i) {
        const index_t begin = ascending ? i / 2 : random.integer(0, q_len);
        const index_t end = std::min(q_len, begin + random.pick<index_t>({0, 1, 1, 3, 40}));
        std::vector<token_t> keys;
        for (index_t count = random.integer(0, 30); count > 0; --count) {
          keys.push_back(static_cast<token_t>(random.integer(0, kv_len)));
        }
        writer.row_keys(static_cast<token_t>(begin), static_cast<token_t>(end), keys);
        for (index_t row = begin; row < end; ++row) {
          for (const token_t key : keys) {
            wanted[static_cast<std::size_t>(row * kv_len + key)] = true;
          }
        }
      }
    }));
    const attention_plan plan(data);  // checks the rules
    ASSERT_TRUE(selects(plan, [&](index_t, index_t row, index_t key) {
      return bool{wanted[static_cast<std::size_t>(row * kv_len + key)]};
    })) << "case " << n << ", " << test_support::describe(data);
  }
}

TEST(plan_writer, refuses_keys_of_rows_that_do_not_exist_or_share_a_tall_tile) {
  const auto message = [](token_t begin, token_t end, token_t key, token_t tile_rows = 4) {
    plan_scope scope = small_scope();
    scope.grid.rows = tile_rows;
    return error_of([&] {
      written(scope, [&](plan_writer& writer) { writer.row_keys(begin, end, {&key, 1}); });
    });
  };
  EXPECT_EQ(message(0, 10, 19), "");
  EXPECT_EQ(message(3, 3, 0), "");
  EXPECT_EQ(message(-1, 3, 0), "plan_writer: rows [-1, 3) of q_len 10");
  EXPECT_EQ(message(3, 2, 0), "plan_writer: rows [3, 2) of q_len 10");
  EXPECT_EQ(message(3, 11, 0), "plan_writer: rows [3, 11) of q_len 10");
  EXPECT_EQ(message(3, 4, 20), "plan_writer: key 20 of rows [3, 4), kv_len is 20");
  EXPECT_EQ(message(3, 4, -1), "plan_writer: key -1 of rows [3, 4), kv_len is 20");
  EXPECT_EQ(message(0, 10, 3, 64), "");  // all rows of the tile
  EXPECT_NE(message(3, 4, 3, 64).find("a tile of 64 rows, at most 16"), std::string::npos);
}

// What a pattern left behind when it threw does not reach the next plan.
TEST(plan_writer, forgets_the_rows_of_a_pattern_that_threw) {
  const plan_scope scope = small_scope();
  sattn::plan_scratch scratch;
  const std::vector<token_t> keys = {1, 7};
  plan_writer first(scope, scratch);
  first.row_keys(1, 2, keys);
  EXPECT_NE(error_of([&] { first.columns(-1, 3); }), "");
  plan_writer second(scope, scratch);
  second.row_keys(0, 1, std::vector<token_t>{3});
  plan_head head;
  second.finish(head);
  EXPECT_EQ(head.row_keys, (std::vector<token_t>{3}));
  EXPECT_EQ(head.row_masks, (std::vector<std::uint16_t>{1}));
}

// ---- normal form

TEST(plan_writer, sorts_and_joins_columns_and_distances_that_overlap_or_touch) {
  const plan_head head = written(small_scope(), [](plan_writer& writer) {
    writer.columns(9, 12);
    writer.columns(2, 4);
    writer.columns(10, 11);
    writer.columns(4, 5);
    writer.columns(2, 4);
    writer.columns(7, 7);
    writer.distances(5, 6);
    writer.distances(1, 3);
    writer.distances(2, 5);
    writer.distances(8, 9);
    writer.distances(8, 9);
    writer.distances(4, 2);
  });
  EXPECT_EQ(head.columns, (ranges{{2, 5}, {9, 12}}));
  EXPECT_EQ(head.distances, (ranges{{1, 6}, {8, 9}}));
  EXPECT_TRUE(head.range_ptr.empty() && head.token_ptr.empty());
}

TEST(plan_writer, sorts_and_joins_the_ranges_of_each_tile_and_makes_tokens_of_single_keys) {
  const plan_head head = written(small_scope(), [](plan_writer& writer) {
    writer.range(2, 6, 9);
    writer.range(0, 5, 7);
    writer.range(0, 12, 13);  // the tile's rows stand at 10 to 13
    writer.range(0, 7, 8);
    writer.range(0, 3, 6);
    writer.range(2, 2, 3);
    writer.range(0, 1, 2);
    writer.range(2, 2, 3);
    writer.range(1, 4, 4);
  });
  EXPECT_EQ(head.range_ptr, (std::vector<index_t>{0, 1, 1, 2}));
  EXPECT_EQ(head.ranges, (ranges{{3, 8}, {6, 9}}));
  EXPECT_EQ(head.token_ptr, (std::vector<index_t>{0, 2, 2, 3}));
  EXPECT_EQ(head.tokens, (std::vector<token_t>{1, 12, 2}));
}

TEST(plan_writer, clips_ranges_to_the_keys_that_a_row_of_the_tile_sees) {
  plan_scope scope = small_scope();
  scope.legal.window = 4;
  // Tile 1: rows at 14 to 17 see keys 11 to 17.
  const plan_head head = written(scope, [](plan_writer& writer) {
    writer.range(1, 0, 5);
    writer.range(1, 8, 12);
    writer.range(1, 14, 16);
    writer.range(1, 17, 20);
  });
  EXPECT_EQ(head.ranges, (ranges{{14, 16}}));
  EXPECT_EQ(head.tokens, (std::vector<token_t>{11, 17}));
}

TEST(plan_writer, clips_distances_to_the_window_and_to_the_first_key) {
  plan_scope scope = small_scope();
  const auto emit = [](plan_writer& writer) {
    writer.distances(3, 6);
    writer.distances(12, std::numeric_limits<token_t>::max());
  };
  EXPECT_EQ(written(scope, emit).distances, (ranges{{3, 6}, {12, 20}}));
  scope.legal.window = 5;
  EXPECT_EQ(written(scope, emit).distances, (ranges{{3, 5}}));
  scope.legal.window = 3;
  EXPECT_TRUE(written(scope, emit).distances.empty());
  scope.legal.window = 0;
  scope.shape.q_offset = -100;
  EXPECT_TRUE(written(scope, emit).distances.empty());
}

TEST(plan_writer, writes_nothing_when_nothing_is_asked_for) {
  const plan_head head = written(small_scope(), [](plan_writer&) {});
  EXPECT_TRUE(head.columns.empty() && head.distances.empty() && head.range_ptr.empty() &&
              head.token_ptr.empty());
}

TEST(plan_writer, accepts_problems_without_rows_or_keys) {
  plan_scope scope = small_scope();
  scope.shape = {0, 20, 1, 1, 20};
  const plan_head no_rows = written(scope, [](plan_writer& writer) {
    writer.columns(3, 5);
    writer.distances(0, 4);
  });
  EXPECT_TRUE(no_rows.distances.empty());
  scope.shape = {10, 0, 1, 1, -10};
  const plan_head no_keys = written(scope, [](plan_writer& writer) {
    writer.columns(0, 0);
    writer.range(0, 0, 0);
    writer.distances(0, 4);
  });
  EXPECT_TRUE(no_keys.columns.empty() && no_keys.distances.empty() && no_keys.ranges.empty());
}

// Random writes, in random order and with repetitions: the plan is valid and holds their union.
TEST(plan_writer, keeps_the_union_of_random_writes_within_the_domain) {
  for (int n = 0; n < 1500; ++n) {
    const std::uint64_t seed = test_support::test_seed() + static_cast<std::uint64_t>(n);
    const seed_trace trace(seed);
    random_source random(seed);
    plan_data data = test_support::random_plan_data(random, 80);
    data.rounding = sattn::rounding::exact;
    data.map = sattn::head_map::shared;
    data.shape.q_heads = data.shape.kv_heads = 1;
    const plan_scope scope{data.shape, data.legal, data.grid};
    const index_t kv_len = scope.shape.kv_len;

    const auto random_range = [&](index_t limit) {
      const index_t begin = random.integer(0, limit + 1);
      return key_range{static_cast<token_t>(begin),
                       static_cast<token_t>(random.integer(begin, limit + 1))};
    };
    struct write {
      int kind;
      index_t tile;
      key_range keys;
    };
    std::vector<write> writes;
    for (index_t count = random.integer(0, 12); count > 0; --count) {
      const auto kind = static_cast<int>(random.integer(0, 3));
      writes.push_back({kind, random.integer(0, scope.tiles()),
                        random_range(kind == 0 ? 2 * kv_len + 40 : kv_len)});
      if (random.integer(0, 4) == 0) writes.push_back(writes.back());
    }
    data.heads = {written(scope, [&](plan_writer& writer) {
      for (const write& w : writes) {
        if (w.kind == 0) writer.distances(w.keys.begin, w.keys.end);
        if (w.kind == 1) writer.columns(w.keys.begin, w.keys.end);
        if (w.kind == 2) writer.range(w.tile, w.keys.begin, w.keys.end);
      }
    })};
    const attention_plan plan(data);
    ASSERT_TRUE(selects(plan, [&](index_t, index_t row, index_t key) {
      const index_t distance = scope.shape.q_offset + row - key;
      return std::any_of(writes.begin(), writes.end(), [&](const write& w) {
        const key_range tile_rows = scope.rows(w.tile);
        const index_t at = w.kind == 0 ? distance : key;
        const bool in_tile = w.kind != 2 || (row >= tile_rows.begin && row < tile_rows.end);
        return in_tile && at >= w.keys.begin && at < w.keys.end;
      });
    })) << test_support::describe(data);
    // Lists hold what some row of their tile sees, single keys as tokens, and nothing twice.
    const plan_head& head = plan.head(0);
    for (index_t tile = 0; !head.range_ptr.empty() && tile < scope.tiles(); ++tile) {
      const key_range visible = scope.visible(tile);
      const auto t = static_cast<std::size_t>(tile);
      for (index_t i = head.range_ptr[t]; i < head.range_ptr[t + 1]; ++i) {
        const key_range r = head.ranges[static_cast<std::size_t>(i)];
        ASSERT_TRUE(r.size() > 1 && r.begin >= visible.begin && r.end <= visible.end);
        for (index_t k = head.token_ptr[t]; k < head.token_ptr[t + 1]; ++k) {
          const token_t token = head.tokens[static_cast<std::size_t>(k)];
          ASSERT_TRUE(token < r.begin || token >= r.end);
        }
      }
    }
  }
}

// ---- errors

TEST(plan_writer, refuses_keys_tiles_and_distances_that_do_not_exist) {
  struct fault {
    std::function<void(plan_writer&)> emit;
    const char* message;
  };
  const std::vector<fault> faults = {
      {[](plan_writer& w) { w.columns(-1, 3); }, "columns [-1, 3) of kv_len 20"},
      {[](plan_writer& w) { w.columns(3, 21); }, "columns [3, 21) of kv_len 20"},
      {[](plan_writer& w) { w.range(0, -1, 3); }, "range [-1, 3) of kv_len 20"},
      {[](plan_writer& w) { w.range(0, 19, 21); }, "range [19, 21) of kv_len 20"},
      {[](plan_writer& w) { w.range(3, 0, 1); }, "tile 3 of 3"},
      {[](plan_writer& w) { w.range(-1, 0, 1); }, "tile -1 of 3"},
      {[](plan_writer& w) { w.distances(-1, 4); }, "distances [-1, 4) begin before 0"},
  };
  for (const fault& f : faults) {
    const std::string message = error_of([&] { written(small_scope(), f.emit); });
    EXPECT_EQ(message, std::string("plan_writer: ") + f.message);
  }
}

// ---- dense heads

TEST(plan_writer, recognises_heads_that_leave_out_no_legal_key) {
  struct full_head {
    const char* name;
    domain legal;
    std::function<void(const plan_scope&, plan_writer&)> emit;
  };
  const auto by_tile = [](const plan_scope& scope, plan_writer& writer) {
    for (index_t tile = 0; tile < scope.tiles(); ++tile) {
      const key_range keys = scope.visible(tile);
      writer.range(tile, keys.begin, keys.end);
    }
  };
  const std::vector<full_head> heads = {
      {"columns", {}, [](const plan_scope&, plan_writer& w) { w.columns(0, 20); }},
      {"columns in pieces", domain::full(),
       [](const plan_scope&, plan_writer& w) {
         w.columns(7, 20);
         w.columns(0, 7);
       }},
      {"all distances", {}, [](const plan_scope&, plan_writer& w) { w.distances(0, 20); }},
      {"distances past the first key",
       {},
       [](const plan_scope&, plan_writer& w) { w.distances(0, 1000); }},
      {"distances of the window",
       {.window = 6},
       [](const plan_scope&, plan_writer& w) { w.distances(0, 6); }},
      {"more columns beside",
       {},
       [](const plan_scope&, plan_writer& w) {
         w.columns(3, 4);
         w.distances(0, 20);
       }},
      {"ranges", {}, by_tile},
      {"ranges in a window", {.window = 3}, by_tile},
      {"ranges without a mask", domain::full(), by_tile},
      {"tiles of one visible key", {.window = 1}, by_tile},
  };
  for (const full_head& h : heads) {
    plan_scope scope = small_scope();
    scope.legal = h.legal;
    for (const token_t rows : {1, 4}) {
      scope.grid.rows = rows;
      const plan_head head = written(scope, [&](plan_writer& w) { h.emit(scope, w); });
      EXPECT_TRUE(is_dense(head, 20)) << h.name << ", tiles of " << rows << " rows";
    }
  }
}

TEST(plan_writer, does_not_take_a_head_for_dense_that_leaves_out_one_key) {
  plan_scope scope = small_scope();
  const auto dense = [&](auto&& emit) { return is_dense(written(scope, emit), 20); };
  EXPECT_FALSE(dense([](plan_writer& w) { w.columns(0, 19); }));
  EXPECT_FALSE(dense([](plan_writer& w) { w.columns(1, 20); }));
  EXPECT_FALSE(dense([](plan_writer& w) { w.distances(0, 19); }));
  EXPECT_FALSE(dense([](plan_writer& w) { w.distances(1, 20); }));
  for (index_t missing = 0; missing < scope.tiles(); ++missing) {
    EXPECT_FALSE(dense([&](plan_writer& w) {
      for (index_t tile = 0; tile < scope.tiles(); ++tile) {
        if (tile != missing) w.range(tile, 0, 20);
      }
    }));
    EXPECT_FALSE(dense([&](plan_writer& w) {
      for (index_t tile = 0; tile < scope.tiles(); ++tile) {
        w.range(tile, tile == missing ? 1 : 0, 20);
      }
    }));
  }
  scope.legal.prefix = 12;  // keys ahead of the first row
  EXPECT_FALSE(dense([](plan_writer& w) { w.distances(0, 20); }));
  scope.legal = domain::full();
  EXPECT_FALSE(dense([](plan_writer& w) { w.distances(0, 20); }));
  scope.legal = {.window = 6};
  EXPECT_FALSE(dense([](plan_writer& w) { w.distances(0, 5); }));
}

// ---- memory

TEST(plan_writer, writes_the_same_again_into_the_same_memory) {
  const plan_scope scope = small_scope();
  sattn::plan_scratch scratch;
  plan_head head;
  const auto write = [&] {
    plan_writer writer(scope, scratch);
    for (token_t i = 0; i < 9; i += 2) {
      writer.columns(i, i + 1);
      writer.distances(i, i + 1);
      writer.range(i % 3, i, i + 2);
      writer.range(i % 3, 9, 10);
    }
    writer.finish(head);
  };
  const auto memory = [&] {
    return std::vector<const void*>{head.columns.data(),       head.distances.data(),
                                    head.range_ptr.data(),     head.ranges.data(),
                                    head.token_ptr.data(),     head.tokens.data(),
                                    head.distance_bits.data(), scratch.entries.data(),
                                    scratch.columns.data(),    scratch.distances.data()};
  };
  write();
  const std::vector<const void*> before = memory();
  const ranges columns = head.columns;
  const ranges list = head.ranges;
  write();
  EXPECT_EQ(memory(), before);
  EXPECT_EQ(head.columns, columns);
  EXPECT_EQ(head.ranges, list);
}

TEST(plan_writer, leaves_nothing_of_what_the_head_held_before) {
  const plan_scope scope = small_scope();
  sattn::plan_scratch scratch;
  plan_head head = test_support::head_fields{.distances = {{1, 2}},
                                             .columns = {{1, 2}},
                                             .range_ptr = {0, 1},
                                             .ranges = {{1, 3}},
                                             .token_ptr = {0, 1},
                                             .tokens = {1},
                                             .row_key_ptr = {0, 1},
                                             .row_keys = {3},
                                             .row_masks = {1},
                                             .split_ptr = {0, 1},
                                             .splits = {0}};
  head.derive();
  plan_writer first(scope, scratch);
  first.range(0, 2, 5);
  first.columns(1, 2);
  plan_writer second(scope, scratch);
  second.columns(4, 5);
  second.finish(head);
  EXPECT_EQ(head.columns, (ranges{{4, 5}}));
  EXPECT_TRUE(head.distances.empty() && head.range_ptr.empty() && head.ranges.empty() &&
              head.token_ptr.empty() && head.tokens.empty() && head.row_key_ptr.empty() &&
              head.row_keys.empty() && head.row_masks.empty() && head.split_ptr.empty() &&
              head.splits.empty() && head.distance_bits.empty());
}

// ---- plan_scope

TEST(plan_scope, picks_the_set_of_data_of_a_head) {
  plan_scope scope{{1, 1, 6, 3, 0}, {}, {}, sattn::head_map::per_q_head, 5};
  EXPECT_EQ(scope.kv_head(), 2);
  EXPECT_EQ(scope.pick(1), 0);
  EXPECT_EQ(scope.pick(3), 2);
  EXPECT_EQ(scope.pick(6), 5);
  EXPECT_NE(error_of([&] { scope.pick(4); }), "");
  scope.map = sattn::head_map::per_kv_head;
  scope.head = 1;
  EXPECT_EQ(scope.kv_head(), 1);
  EXPECT_EQ(scope.pick(3), 1);
  scope.map = sattn::head_map::shared;
  scope.head = 0;
  EXPECT_EQ(scope.pick(1), 0);
}

TEST(plan_scope, sees_what_the_first_and_the_last_row_of_a_tile_see) {
  plan_scope scope = small_scope();
  EXPECT_EQ(scope.tiles(), 3);
  EXPECT_EQ(scope.rows(2), (key_range{8, 10}));
  EXPECT_EQ(scope.visible(2), (key_range{0, 20}));
  scope.legal.window = 3;
  EXPECT_EQ(scope.visible(1), (key_range{12, 18}));
}

}  // namespace
