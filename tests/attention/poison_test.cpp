// SPDX-License-Identifier: Apache-2.0
#include <sattn/attention/attend.hpp>

#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "support/patterns.hpp"
#include "support/problem.hpp"

namespace {

using namespace sattn;         // NOLINT(google-build-using-namespace)
using namespace test_support;  // NOLINT(google-build-using-namespace)

struct planned {
  attention_problem problem;
  attention_plan plan;
};

planned random_case(random_source& random, context& ctx, int round) {
  problem_extents e = random_extents(random);
  const bool decode = round % 3 == 0;
  if (decode) e.q_len = 1 + e.q_len / 10;
  attention_problem p(random, e);
  if (round % 4 == 1) p.soft_cap = 3;
  const pattern_case pattern =
      random_pattern(random, p.shape, static_cast<pattern_kind>(round % pattern_kinds));
  const domain legal = random_domain(random, p.shape);
  attention_plan plan =
      decode ? plan_decode(ctx, p.shape, pattern.pattern,
                           {.legal = legal, .split_keys = random.pick<token_t>({1, 30, 4096})})
             : plan_prefill(ctx, p.shape, pattern.pattern,
                            {.legal = legal,
                             .tile_rows = random.pick<token_t>({0, 1, 4, 16, 64, 128}),
                             .rounding = random.pick({rounding::exact, rounding::cover})});
  return {std::move(p), std::move(plan)};
}

// Fills K and V of every key that no query head of its kv head attends to in rows [begin, end).
void poison_unselected(attention_problem& p, const mask_function& selected, index_t begin,
                       index_t end, float poison) {
  const index_t group = p.shape.group_size();
  for (index_t kv_head = 0; kv_head < p.shape.kv_heads; ++kv_head) {
    for (index_t key = 0; key < p.shape.kv_len; ++key) {
      bool used = false;
      for (index_t h = kv_head * group; h < (kv_head + 1) * group && !used; ++h) {
        for (index_t row = begin; row < end && !used; ++row) used = selected(h, row, key);
      }
      if (used) continue;
      p.k.fill_row(key, kv_head, poison);
      p.v.fill_row(key, kv_head, poison);
    }
  }
}

TEST(poison, in_keys_outside_the_plan_never_reaches_the_output) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (int round = 0; round < 120; ++round) {
    SCOPED_TRACE(round);
    const planned c = random_case(random, contexts.any(), round);
    attention_problem dirty = c.problem;
    poison_unselected(dirty, mask_of(c.plan), 0, c.problem.shape.q_len,
                      random.pick({quiet_nan, infinity, -infinity, 3e38f}));
    for (context& ctx : contexts) {
      ASSERT_TRUE(bit_equal(run(ctx, c.plan, dirty), run(ctx, c.plan, c.problem))) << name_of(ctx);
    }
  }
}

TEST(poison, in_keys_that_a_tile_does_not_execute_never_reaches_its_rows) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (int round = 0; round < 40; ++round) {
    SCOPED_TRACE(round);
    const planned c = random_case(random, contexts.any(), round);
    const mask_function selected = mask_of(c.plan);
    const attention_result clean = run(contexts.any(), c.plan, c.problem);
    for (index_t tile = 0; tile < std::min<index_t>(c.plan.tiles(), 12); ++tile) {
      const key_range rows = c.plan.grid().row_range(tile, c.problem.shape.q_len);
      attention_problem dirty = c.problem;
      poison_unselected(dirty, selected, rows.begin, rows.end,
                        random.pick({quiet_nan, infinity, -infinity, 3e38f}));
      const attention_result got = run(contexts.any(), c.plan, dirty);
      ASSERT_TRUE(test_support::bit_equal(got.rows(dirty, rows.begin, rows.end),
                                          clean.rows(dirty, rows.begin, rows.end)))
          << "tile " << tile;
    }
  }
}

TEST(poison, in_tokens_behind_the_last_key_is_not_read) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (const index_t kv_len : {1, 5, 16, 100, 127, 128, 129}) {
    const attention_problem p(random, {.q_len = 20, .kv_len = kv_len, .q_offset = 300});
    owned_tensor k(kv_len + 20, 1, 16);
    owned_tensor v(kv_len + 20, 1, 16);
    k.fill(quiet_nan);
    v.fill(infinity);
    for (index_t key = 0; key < kv_len; ++key) {
      std::copy_n(p.k.row(key, 0), 16, k.row(key, 0));
      std::copy_n(p.v.row(key, 0), 16, v.row(key, 0));
    }
    for (context& ctx : contexts) {
      for (const attention_plan& plan :
           {plan_prefill(ctx, p.shape, dense{}), plan_decode(ctx, p.shape, dense{})}) {
        owned_tensor out(20, 1, 16);
        attend(ctx, plan, p.q.view(), {k.view().slice(0, kv_len), v.view().slice(0, kv_len)},
               out.view());
        EXPECT_TRUE(test_support::bit_equal(out.packed(), run(ctx, plan, p).out));
      }
    }
  }
}

// ---- selected poison ----------------------------------------------------------------------------

// Plans in which every row attends to its own position, and few rows to another's.
std::vector<attention_plan> diagonal_plans(context& ctx, const attention_shape& shape) {
  return {plan_prefill(ctx, shape, vertical_slash{{}, {0, 20}}),
          plan_prefill(ctx, shape, sliding_window{4}, {.tile_rows = 1}),
          plan_decode(ctx, shape, sliding_window{4}, {.split_keys = 3})};
}

TEST(poison, in_a_query_stays_in_its_row_and_head) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (const float soft_cap : {0.0f, 2.0f}) {
    attention_problem p(random, {.q_len = 30, .kv_len = 30, .q_heads = 4, .kv_heads = 2});
    p.soft_cap = soft_cap;
    for (context& ctx : contexts) {
      for (const attention_plan& plan : diagonal_plans(ctx, p.shape)) {
        const attention_result clean = run(ctx, plan, p);
        attention_problem dirty = p;
        dirty.q.row(11, 2)[5] = quiet_nan;
        const attention_result got = run(ctx, plan, dirty);
        const mask_function selected = mask_of(plan);
        for (index_t key = 0; key < 30; ++key) {
          for (index_t h = 0; h < 4; ++h) {
            const float mass = got.mass[at(key * 4 + h)];
            if (h == 2 && selected(h, 11, key)) {
              EXPECT_TRUE(std::isnan(mass));
            } else {
              EXPECT_EQ(mass, clean.mass[at(key * 4 + h)]);
            }
          }
        }
        for (std::size_t pair = 0; pair < got.lse.size(); ++pair) {
          if (pair == at(11 * 4 + 2)) {
            EXPECT_TRUE(std::isnan(got.lse[pair]));
            for (std::size_t i = 0; i < 16; ++i) EXPECT_TRUE(std::isnan(got.out[pair * 16 + i]));
          } else {
            EXPECT_EQ(got.lse[pair], clean.lse[pair]);
            for (std::size_t i = pair * 16; i < pair * 16 + 16; ++i) {
              EXPECT_EQ(got.out[i], clean.out[i]);
            }
          }
        }
      }
    }
  }
}

TEST(poison, in_a_selected_key_or_value_shows) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (const float soft_cap : {0.0f, 2.0f}) {
    attention_problem p(random, {.q_len = 30, .kv_len = 30, .q_heads = 2, .kv_heads = 1});
    p.soft_cap = soft_cap;
    for (context& ctx : contexts) {
      for (const attention_plan& plan : diagonal_plans(ctx, p.shape)) {
        const mask_function selected = mask_of(plan);
        attention_problem dirty_key = p;
        dirty_key.k.row(9, 0)[3] = quiet_nan;
        attention_problem dirty_value = p;
        dirty_value.v.row(9, 0)[3] = quiet_nan;
        const attention_result clean = run(ctx, plan, p);
        const attention_result by_key = run(ctx, plan, dirty_key);
        const attention_result by_value = run(ctx, plan, dirty_value);
        for (index_t row = 0; row < 30; ++row) {
          for (index_t h = 0; h < 2; ++h) {
            const std::size_t pair = at(row * 2 + h);
            EXPECT_EQ(by_value.lse[pair], clean.lse[pair]);
            for (std::size_t i = 0; i < 16; ++i) {
              if (selected(h, row, 9)) {
                EXPECT_TRUE(std::isnan(by_key.out[pair * 16 + i]));
                EXPECT_TRUE(std::isnan(by_key.lse[pair]));
              }
              if (selected(h, row, 9) && i == 3) {
                EXPECT_TRUE(std::isnan(by_value.out[pair * 16 + i]));
              }
              if (i != 3) {
                EXPECT_EQ(by_value.out[pair * 16 + i], clean.out[pair * 16 + i]);
              }
            }
          }
        }
      }
    }
  }
}

}  // namespace
