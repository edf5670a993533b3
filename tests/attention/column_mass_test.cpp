// SPDX-License-Identifier: Apache-2.0
//
// What is particular to column mass. That it matches the reference, in every pattern, layout and
// option, is checked wherever out and lse are: run() asks for it.

#include <sattn/attention/attend.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "support/patterns.hpp"
#include "support/problem.hpp"

namespace {

using namespace sattn;         // NOLINT(google-build-using-namespace)
using namespace test_support;  // NOLINT(google-build-using-namespace)

// [kv_len, kv_heads]
std::vector<float> mass_of_kv_heads(context& ctx, const attention_plan& plan,
                                    const attention_problem& p, const kv_view& kv) {
  owned_tensor out(p.shape.q_len, p.shape.q_heads, p.v_dim);
  owned_tensor lse(p.shape.q_len, p.shape.q_heads, 1);
  owned_tensor mass(p.shape.kv_len, p.shape.kv_heads, 1);
  attend(ctx, plan, p.q.view(), kv, {out.view(), lse.view(), mass.view()}, p.options());
  return mass.packed();
}

std::vector<double> summed_over_groups(const std::vector<double>& of_q_heads,
                                       const attention_shape& shape) {
  std::vector<double> sums(at(shape.kv_len * shape.kv_heads));
  for (index_t i = 0; i < std::ssize(of_q_heads); ++i) {
    sums[at(i / shape.group_size())] += of_q_heads[at(i)];
  }
  return sums;
}

TEST(column_mass, of_a_kv_head_is_the_sum_over_its_query_heads) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (const index_t group : {1, 2, 3, 4, 7, 16, 24}) {
    attention_problem p(random,
                        {.q_len = 37, .kv_len = 120, .q_heads = 2 * group, .kv_heads = 2});
    if (group == 3) p.soft_cap = 2;
    if (group == 4) p.sink_logits.assign(at(2 * group), 0.4f);
    for (const auto& [name, plan] : every_kind_of_plan(contexts.any(), p.shape)) {
      const reference::result want = expected(p, mask_of(plan));
      const std::vector<double> mass = summed_over_groups(want.mass, p.shape);
      std::vector<double> bound = summed_over_groups(want.mass_bound, p.shape);
      // A sum over rows and heads, in any order.
      const auto roundings = static_cast<double>(p.shape.q_len * group);
      for (std::size_t i = 0; i < bound.size(); ++i) bound[i] += roundings * 0x1p-24 * mass[i];
      for (context& ctx : contexts) {
        EXPECT_TRUE(elements_within_bound("mass", mass_of_kv_heads(ctx, plan, p, p.kv()), mass,
                                          bound))
            << name << ", group " << group << ", " << name_of(ctx);
      }
    }
  }
}

TEST(column_mass, the_keys_share_one_for_each_row_that_has_keys) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  // The first ten rows stand before every key.
  const attention_problem p(
      random, {.q_len = 60, .kv_len = 100, .q_heads = 4, .kv_heads = 2, .q_offset = -10});
  for (const any_pattern& pattern :
       {any_pattern(dense{}), any_pattern(sliding_window{9}), any_pattern(sink{5})}) {
    const attention_plan plan = plan_prefill(contexts.any(), p.shape, pattern);
    const reference::result want = expected(p, mask_of(plan));
    for (context& ctx : contexts) {
      const attention_result got = run(ctx, plan, p);
      for (std::size_t h = 0; h < 4; ++h) {
        double sum = 0;
        double bound = 0;
        for (std::size_t key = 0; key < 100; ++key) {
          sum += double{got.mass[key * 4 + h]};
          bound += want.mass_bound[key * 4 + h];
        }
        EXPECT_NEAR(sum, 50, bound);
      }
    }
  }
}

// A task takes 512 to 4,096 keys.
TEST(column_mass, of_more_keys_than_a_task_takes) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  const attention_problem p(
      random, {.q_len = 3, .kv_len = 1300, .q_heads = 4, .kv_heads = 2, .head_dim = 8});
  EXPECT_TRUE(within_bound(contexts, plan_decode(contexts.any(), p.shape, dense{}), p));
  const attention_plan window = plan_prefill(contexts.any(), p.shape, sliding_window{900});
  EXPECT_TRUE(within_bound(contexts, window, p));
}

TEST(column_mass, changes_neither_out_nor_lse) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  const attention_problem p(random, {.q_len = 30, .kv_len = 120, .q_heads = 4, .kv_heads = 2});
  for (context& ctx : contexts) {
    for (const auto& [name, plan] : every_kind_of_plan(ctx, p.shape)) {
      const attention_result with = run(ctx, plan, p);
      owned_tensor out(30, 4, 16);
      owned_tensor lse(30, 4, 1);
      attend(ctx, plan, p.q.view(), p.kv(), {out.view(), lse.view()});
      EXPECT_TRUE(test_support::bit_equal(out.packed(), with.out)) << name;
      EXPECT_TRUE(test_support::bit_equal(lse.packed(), with.lse)) << name;
    }
  }
}

TEST(column_mass, of_keys_in_half_precision_is_that_of_the_same_keys_in_f32) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  attention_problem p(random, {.q_len = 30, .kv_len = 120, .q_heads = 4, .kv_heads = 2});
  std::vector<bf16> narrow;
  for (index_t key = 0; key < 120; ++key) {
    for (index_t h = 0; h < 2; ++h) {
      for (index_t i = 0; i < 16; ++i) {
        narrow.push_back(to_bf16(p.k.row(key, h)[i]));
        p.k.row(key, h)[i] = to_float(narrow.back());
      }
    }
  }
  const kv_view stored = kv(nhd(narrow.data(), 120, 2, 16), p.v.view());
  for (context& ctx : contexts) {
    for (const auto& [name, plan] : every_kind_of_plan(ctx, p.shape)) {
      EXPECT_TRUE(test_support::bit_equal(mass_of_kv_heads(ctx, plan, p, stored),
                                          mass_of_kv_heads(ctx, plan, p, p.kv())))
          << name;
    }
  }
}

// In the scores of lanes that hold no row, 0 * inf is a NaN; in those of rows without keys, nothing
// may be divided by a sum of 0.
TEST(column_mass, infinite_keys_and_rows_without_keys_give_no_nan) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  attention_problem p(random, {.q_len = 5,
                               .kv_len = 4,
                               .q_heads = 3,
                               .kv_heads = 1,
                               .head_dim = 1,
                               .q_offset = -1});
  p.q.fill(1);
  p.k.fill_row(1, 0, -infinity);
  for (const auto& plan : {plan_prefill(contexts.any(), p.shape, dense{}),
                           plan_prefill(contexts.any(), p.shape, dense{}, {.tile_rows = 1}),
                           plan_decode(contexts.any(), p.shape, dense{}, {.split_keys = 2})}) {
    EXPECT_TRUE(within_bound(contexts, plan, p));
    for (const float m : run(contexts.any(), plan, p).mass) EXPECT_GE(m, 0.0f);
  }
}

// Logits so large that their roundings, one way in the lse and another in the mass, reach 1.
TEST(column_mass, of_one_row_is_at_most_one) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  attention_problem p(random, {.q_len = 1, .kv_len = 60, .q_heads = 16, .kv_heads = 8,
                               .head_dim = 128});
  p.scale = 1e6f;
  const attention_plan plan = plan_decode(contexts.any(), p.shape, dense{});
  EXPECT_TRUE(within_bound(contexts, plan, p));
  for (context& ctx : contexts) {
    for (const float mass : run(ctx, plan, p).mass) EXPECT_LE(mass, 1.0f);
  }
}

TEST(column_mass, a_batch_may_ask_for_it_here_and_not_there) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  const attention_problem p(random, {.q_len = 1, .kv_len = 50, .q_heads = 4, .kv_heads = 2});
  for (context& ctx : contexts) {
    const attention_plan plan = plan_decode(ctx, p.shape, dense{});
    const attention_result want = run(ctx, plan, p);
    std::vector<owned_tensor> outs(3, owned_tensor(1, 4, 16));
    owned_tensor lse(1, 4, 1);
    owned_tensor mass(50, 4, 1);
    const std::vector<attention_sequence> batch = {
        {&plan, p.q.view(), p.kv(), outs[0].view()},
        {&plan, p.q.view(), p.kv(), {outs[1].view(), lse.view(), mass.view()}},
        {&plan, p.q.view(), p.kv(), outs[2].view()}};
    attend(ctx, batch);
    EXPECT_TRUE(test_support::bit_equal(mass.packed(), want.mass));
    for (const owned_tensor& out : outs) {
      EXPECT_TRUE(test_support::bit_equal(out.packed(), want.out));
    }
  }
}

}  // namespace
