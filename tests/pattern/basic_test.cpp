// SPDX-License-Identifier: Apache-2.0
#include <sattn/pattern/basic.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <sattn/pattern/compose.hpp>
#include <string>
#include <vector>

#include "support/errors.hpp"
#include "support/plans.hpp"

namespace {

using sattn::attention_plan;
using sattn::attention_shape;
using sattn::dense;
using sattn::domain;
using sattn::head_map;
using sattn::index_t;
using sattn::key_range;
using sattn::plan_options;
using sattn::sink;
using sattn::sliding_window;
using sattn::tile_grid;
using sattn::token_t;
using test_support::aligned_shape;
using test_support::error_of;
using test_support::plan_of;
using test_support::selects;

static_assert(sattn::attention_pattern<dense>);
static_assert(sattn::attention_pattern<sink>);
static_assert(sattn::attention_pattern<sliding_window>);

constexpr token_t last_token = std::numeric_limits<token_t>::max();

const std::vector<attention_shape>& shapes() {
  static const std::vector<attention_shape> all = {
      aligned_shape(1, 1),     aligned_shape(50, 50, 4, 2), aligned_shape(30, 200, 2, 2),
      aligned_shape(130, 300), {40, 40, 1, 1, -10},         {20, 30, 1, 1, 200},
      aligned_shape(60, 20),   {0, 20, 2, 1, 20},           {10, 0, 2, 1, -10}};
  return all;
}

// Whether a plan is the one that `dense` makes.
bool is_dense(const attention_plan& plan) {
  const attention_plan want = plan_of(plan.shape(), dense{}, {.legal = plan.data().legal});
  return plan.data().map == head_map::shared && plan.grid() == want.grid() &&
         plan.head(0).columns == want.head(0).columns && plan.head(0).distances.empty() &&
         plan.head(0).ranges.empty() && plan.head(0).tokens.empty();
}

TEST(dense, selects_every_legal_key) {
  for (const attention_shape& shape : shapes()) {
    for (const domain legal : {domain{}, domain::full(), domain{.causal = true, .window = 7},
                               domain{.causal = true, .window = 9, .prefix = 12}}) {
      const attention_plan plan = plan_of(shape, dense{}, {.legal = legal});
      EXPECT_TRUE(selects(plan, [](index_t, index_t, index_t) { return true; }));
    }
  }
}

TEST(sink, selects_the_first_keys) {
  for (const attention_shape& shape : shapes()) {
    for (const token_t count : {0, 1, 4, 30, last_token}) {
      EXPECT_TRUE(selects(plan_of(shape, sink{count}),
                          [&](index_t, index_t, index_t key) { return key < count; }));
    }
  }
}

TEST(sliding_window, selects_the_last_keys_of_each_row) {
  for (const attention_shape& shape : shapes()) {
    for (const token_t size : {0, 1, 4, 30, 64, 128, last_token}) {
      EXPECT_TRUE(
          selects(plan_of(shape, sliding_window{size}), [&](index_t, index_t row, index_t key) {
            const index_t distance = shape.q_offset + row - key;
            return distance >= 0 && distance < size;
          }));
    }
  }
}

TEST(sliding_window, row_number_q_sees_q_plus_one_keys_or_a_whole_window) {
  const index_t tokens = 200;
  const attention_plan plan = plan_of(aligned_shape(tokens, tokens), sliding_window{48});
  const std::vector<std::uint8_t> mask = expand(plan, 0);
  for (index_t q = 0; q < tokens; ++q) {
    EXPECT_EQ(std::count(mask.begin() + q * tokens, mask.begin() + (q + 1) * tokens, 1),
              std::min<index_t>(q + 1, 48));
  }
}

TEST(sliding_window, looks_back_only_even_where_keys_ahead_are_legal) {
  for (const domain legal : {domain::full(), domain{.causal = true, .window = 0, .prefix = 30}}) {
    const attention_plan plan = plan_of(aligned_shape(40, 40), sliding_window{5}, {.legal = legal});
    EXPECT_TRUE(selects(
        plan, [](index_t, index_t row, index_t key) { return key <= row && key > row - 5; }));
  }
}

TEST(sliding_window, becomes_dense_when_it_holds_every_row) {
  for (const attention_shape& shape : {aligned_shape(50, 50, 4, 2), aligned_shape(30, 200)}) {
    const auto keys = static_cast<token_t>(shape.kv_len);
    EXPECT_TRUE(is_dense(plan_of(shape, sliding_window{keys})));
    EXPECT_FALSE(is_dense(plan_of(shape, sliding_window{keys - 1})));
    EXPECT_TRUE(is_dense(plan_of(shape, sliding_window{9}, {.legal = {.window = 9}})));
    EXPECT_TRUE(is_dense(plan_of(shape, sliding_window{10}, {.legal = {.window = 9}})));
    EXPECT_FALSE(is_dense(plan_of(shape, sliding_window{8}, {.legal = {.window = 9}})));
    EXPECT_TRUE(is_dense(plan_of(shape, sink{keys})));
    EXPECT_FALSE(is_dense(plan_of(shape, sink{keys - 1})));
  }
}

TEST(sliding_window, with_sinks_up_to_its_first_row_selects_all_of_dense) {
  const attention_shape shape = aligned_shape(100, 100);
  for (const token_t window : {1, 40, 99}) {
    EXPECT_TRUE(selects(plan_of(shape, sink{100 - window} | sliding_window{window}),
                        [](index_t, index_t, index_t) { return true; }));
    EXPECT_FALSE(selects(plan_of(shape, sink{99 - window} | sliding_window{window}),
                         [](index_t, index_t, index_t) { return true; }));
  }
}

TEST(basic_patterns, refuse_negative_sizes) {
  EXPECT_EQ(error_of([] { plan_of(aligned_shape(4, 4), sink{-1}); }), "sink: count -1 is negative");
  EXPECT_EQ(error_of([] { plan_of(aligned_shape(4, 4), sliding_window{-2}); }),
            "sliding_window: size -2 is negative");
}

// ---- planning

struct emits_nothing_special {
  void emit(const sattn::plan_scope&, sattn::plan_writer& writer) const { writer.columns(1, 2); }
};
struct no_emit {
  index_t heads() const { return 1; }
};
struct mutable_emit {
  void emit(const sattn::plan_scope&, sattn::plan_writer&) {}
};
struct asks_for {
  tile_grid wanted;
  index_t sets = 1;
  tile_grid grid() const { return wanted; }
  index_t heads() const { return sets; }
  void emit(const sattn::plan_scope&, sattn::plan_writer&) const {}
};
static_assert(sattn::attention_pattern<emits_nothing_special>);
static_assert(!sattn::attention_pattern<no_emit>);
static_assert(!sattn::attention_pattern<mutable_emit>);
static_assert(!sattn::attention_pattern<int>);

TEST(attention_pattern, needs_no_more_than_emit) {
  const attention_plan plan = plan_of(aligned_shape(100, 100, 4, 2), emits_nothing_special{});
  EXPECT_EQ(plan.heads(), 1);
  EXPECT_EQ(plan.grid(), tile_grid{});
  EXPECT_TRUE(selects(plan, [](index_t, index_t, index_t key) { return key == 1; }));
}

TEST(plan_prefill, takes_tiles_of_the_caller_over_those_of_the_pattern) {
  const attention_shape shape = aligned_shape(100, 100);
  EXPECT_EQ(plan_of(shape, asks_for{{24, 48}}).grid(), (tile_grid{24, 48}));
  EXPECT_EQ(plan_of(shape, asks_for{{24, 48}}, {.tile_rows = 16}).grid(), (tile_grid{16, 48}));
}

TEST(plan_prefill, refuses_tiles_and_sets_that_do_not_fit) {
  const attention_shape shape = aligned_shape(10, 10, 4, 2);
  const auto message = [&](const asks_for& pattern, const plan_options& options) {
    return error_of([&] { plan_of(shape, pattern, options); });
  };
  EXPECT_NE(message({{64, 0}}, {.tile_rows = 129}).find("tile_rows 129"), std::string::npos);
  EXPECT_NE(message({{64, 0}}, {.tile_rows = -1}).find("tile_rows -1"), std::string::npos);
  EXPECT_NE(message({{0, 0}}, {}).find("tiles of 0 rows"), std::string::npos);
  EXPECT_NE(message({{129, 0}}, {}).find("tiles of 129 rows"), std::string::npos);
  EXPECT_NE(message({{64, -1}}, {}).find("period -1"), std::string::npos);
  EXPECT_EQ(message({{64, 0}, 3}, {}),
            "plan: the pattern holds 3 sets of data for 4 q heads and 2 kv heads");
  EXPECT_NE(message({{64, 0}, 0}, {}).find("holds 0 sets"), std::string::npos);
}

TEST(plan_prefill, makes_one_list_or_one_for_each_head) {
  const attention_shape shape = aligned_shape(10, 10, 4, 2);
  EXPECT_EQ(plan_of(shape, asks_for{{64, 0}, 1}).data().map, head_map::shared);
  EXPECT_EQ(plan_of(shape, asks_for{{64, 0}, 2}).data().map, head_map::per_kv_head);
  EXPECT_EQ(plan_of(shape, asks_for{{64, 0}, 4}).data().map, head_map::per_q_head);
}

TEST(plan_prefill, fills_a_plan_anew_after_any_other) {
  test_support::planning_context ctx;
  attention_plan plan;
  const attention_shape shape = aligned_shape(30, 60, 4, 2);
  const auto window = [&](index_t, index_t row, index_t key) { return row + 30 - key < 7; };
  plan_decode_into(ctx.get(), plan, shape, asks_for{{1, 0}, 4});
  plan_prefill_into(ctx.get(), plan, shape, sliding_window{7});
  EXPECT_FALSE(plan.has_splits());
  EXPECT_TRUE(selects(plan, window));

  const key_range* const memory = plan.head(0).distances.data();
  plan_prefill_into(ctx.get(), plan, shape, sliding_window{7});
  EXPECT_EQ(plan.head(0).distances.data(), memory);
  EXPECT_TRUE(selects(plan, window));

  EXPECT_THROW(plan_prefill_into(ctx.get(), plan, shape, sink{-1}), sattn::shape_error);
  EXPECT_EQ(plan.tiles(), 0);  // no half of a plan
  plan_prefill_into(ctx.get(), plan, shape, sliding_window{7});
  EXPECT_TRUE(selects(plan, window));
}

}  // namespace
