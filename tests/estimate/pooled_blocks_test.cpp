// SPDX-License-Identifier: Apache-2.0
#include <sattn/estimate/pooled_blocks.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include "support/errors.hpp"
#include "support/plans.hpp"
#include "support/problem.hpp"
#include "support/scores.hpp"

namespace {

using sattn::block_lists;
using sattn::budget;
using sattn::domain;
using sattn::head_reduce;
using sattn::logit_rules;
using sattn::pooled_block_options;
using sattn::protection;
using sattn::score_tensor;
using sattn::selection;
using test_support::aligned_shape;
using test_support::all_contexts;
using test_support::at;
using test_support::attention_problem;
using test_support::bit_equal;
using test_support::bounded_scores;
using test_support::error_of;
using test_support::holds;
using test_support::index_t;
using test_support::infinity;
using test_support::list_of;
using test_support::name_of;
using test_support::plan_of;
using test_support::quiet_nan;
using test_support::random_source;
using test_support::run;
using test_support::seed_trace;
using test_support::selects;
using test_support::thread_contexts;
using test_support::token_t;
using test_support::within_bound;

score_tensor pooled_block_scores(sattn::context& ctx, const attention_problem& p,
                                 const pooled_block_options& options = {}) {
  return sattn::pooled_block_scores(ctx, p.shape, p.q.view(), p.k.view(), options);
}

block_lists select_blocks(const sattn::attention_shape& shape, const score_tensor& scores,
                          const selection& rule, token_t q_block = 64, token_t k_block = 64,
                          const domain& legal = {}) {
  sattn::context ctx(1);
  return sattn::select_blocks(ctx, shape, scores, rule, q_block, k_block, legal);
}

bounded_scores expected_blocks(const attention_problem& p, const pooled_block_options& options) {
  return expected_scores(p, options.rules, options.q_block, options.k_block, options.probabilities);
}

index_t blocks_of(index_t tokens, index_t block) { return (tokens + block - 1) / block; }

/// Scores with many ties, -inf exactly where no pair of the blocks is legal.
score_tensor random_scores(random_source& random, const sattn::attention_shape& shape,
                           const domain& legal, index_t sets, index_t q_block, index_t k_block) {
  score_tensor scores(sets, blocks_of(shape.q_len, q_block), blocks_of(shape.kv_len, k_block), 0);
  const std::vector<std::uint8_t> pairs =
      test_support::detail::legal_block_pairs(shape, legal, q_block, k_block);
  for (std::size_t i = 0; i < scores.values.size(); ++i) {
    scores.values[i] =
        pairs[i % pairs.size()] != 0 ? static_cast<float>(random.integer(-3, 4)) : -infinity;
  }
  return scores;
}

// ---- pooled_block_scores

TEST(pooled_block_scores, are_products_of_means_at_every_length) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (const index_t kv_len : {1, 2, 63, 64, 65, 1000}) {
    for (const head_reduce reduce : test_support::all_reductions) {
      for (const bool probabilities : {false, true}) {
        const attention_problem p(random, {.q_len = std::min<index_t>(kv_len, 700),
                                           .kv_len = kv_len,
                                           .q_heads = 4,
                                           .kv_heads = 2,
                                           .head_dim = 24});
        const pooled_block_options options{.probabilities = probabilities,
                                           .rules = {.reduce = reduce}};
        const bounded_scores want = expected_blocks(p, options);
        for (sattn::context& ctx : contexts) {
          EXPECT_TRUE(within_bound(pooled_block_scores(ctx, p, options), want))
              << name_of(ctx) << ", kv_len " << kv_len << ", reduce " << static_cast<int>(reduce);
        }
      }
    }
  }
}

// Every domain, position of the queries, layout, scale and soft cap.
TEST(pooled_block_scores, are_products_of_means_in_random_problems) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (int round = 0; round < 150; ++round) {
    const test_support::problem_extents extents = random_extents(random);
    const attention_problem p(random, extents);
    const pooled_block_options options{.q_block = random.pick<token_t>({1, 3, 16, 64, 100, 500}),
                                       .k_block = random.pick<token_t>({1, 5, 16, 64, 100, 500}),
                                       .probabilities = random.integer(0, 2) == 0,
                                       .rules = test_support::random_rules(random)};
    const bounded_scores want = expected_blocks(p, options);
    for (sattn::context& ctx : contexts) {
      ASSERT_TRUE(within_bound(pooled_block_scores(ctx, p, options), want))
          << name_of(ctx) << ", round " << round << ", blocks of " << options.q_block << " x "
          << options.k_block << ", " << extents;
    }
  }
}

// Dividing by the size of a whole block would shrink the last scores.
TEST(pooled_block_scores, a_short_last_block_is_divided_by_its_own_length) {
  random_source random;
  thread_contexts contexts;
  attention_problem p(random, {.q_len = 130, .kv_len = 130, .head_dim = 8});
  p.q.fill(1);
  p.k.fill(0.5f);
  const score_tensor scores = pooled_block_scores(
      contexts.serial(), p, {.rules = {.legal = domain::full(), .scale = 1.0f}});
  for (const float s : scores.values) EXPECT_EQ(s, 8 * 0.5f);
}

TEST(pooled_block_scores, of_a_row_of_blocks_do_not_know_of_later_blocks) {
  const seed_trace trace;
  random_source random;
  thread_contexts contexts;
  attention_problem p(random, {.q_len = 200, .kv_len = 200});
  const pooled_block_options options{.q_block = 32, .k_block = 16, .probabilities = true};
  const score_tensor before = pooled_block_scores(contexts.serial(), p, options);
  for (index_t t = 96; t < 200; ++t) {
    p.q.fill_row(t, 0, quiet_nan);
    p.k.fill_row(t, 0, quiet_nan);
  }
  const score_tensor after = pooled_block_scores(contexts.serial(), p, options);
  for (index_t i = 0; i < 3; ++i) EXPECT_TRUE(bit_equal(before.row(0, i), after.row(0, i)));
}

TEST(pooled_block_scores, have_the_same_bits_on_any_threads) {
  const seed_trace trace;
  random_source random;
  thread_contexts contexts;
  for (const head_reduce reduce : test_support::all_reductions) {
    for (const bool probabilities : {false, true}) {
      const attention_problem p(random, {.q_len = 333, .kv_len = 350, .q_heads = 6, .kv_heads = 2});
      const pooled_block_options options{
          .q_block = 8, .k_block = 8, .probabilities = probabilities, .rules = {.reduce = reduce}};
      const score_tensor want = pooled_block_scores(contexts.serial(), p, options);
      for (sattn::context& ctx : contexts) {
        EXPECT_TRUE(bit_equal(pooled_block_scores(ctx, p, options).values, want.values));
      }
    }
  }
}

TEST(pooled_block_scores, refuse_what_does_not_fit) {
  random_source random;
  thread_contexts contexts;
  sattn::context& ctx = contexts.serial();
  const attention_problem p(random, {.q_len = 4, .kv_len = 6, .q_heads = 2, .kv_heads = 1});
  const attention_problem longer(random, {.q_len = 4, .kv_len = 7, .q_heads = 2, .kv_heads = 1});
  EXPECT_EQ(error_of([&] { pooled_block_scores(ctx, p, {.q_block = 0}); }),
            "pooled_block_scores: q_block 0 and k_block 64 must be positive");
  EXPECT_NE(error_of([&] { pooled_block_scores(ctx, p, {.k_block = -1}); }), "");
  EXPECT_NE(error_of([&] { pooled_block_scores(ctx, p, {.rules = {.soft_cap = quiet_nan}}); }), "");
  EXPECT_EQ(
      error_of([&] { sattn::pooled_block_scores(ctx, p.shape, p.q.view(), longer.k.view()); }),
      "pooled_block_scores: q is [4, 2] and k is [7, 1], the shape says [4, 2] and [6, 1]");
}

// ---- select_blocks

TEST(select_blocks, lists_hold_the_blocks_of_highest_score) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (int round = 0; round < 60; ++round) {
    const attention_problem p(random, random_extents(random));
    const pooled_block_options options{.q_block = random.pick<token_t>({1, 16, 30}),
                                       .k_block = random.pick<token_t>({1, 4, 10}),
                                       .rules = test_support::random_rules(random)};
    const bounded_scores want = expected_blocks(p, options);
    const index_t k = random.pick<index_t>({0, 1, 4, 9});
    for (sattn::context& ctx : contexts) {
      const block_lists lists = select_blocks(p.shape, pooled_block_scores(ctx, p, options),
                                              {budget::fixed(k)}, options.q_block, options.k_block,
                                              options.rules.legal);
      ASSERT_EQ(lists.sets, want.sets);
      for (index_t i = 0; i < want.sets * want.rows; ++i) {
        ASSERT_TRUE(are_the_best(list_of(lists, i), k, want, i / want.rows, i % want.rows))
            << name_of(ctx) << ", round " << round << ", row of blocks " << i;
      }
    }
  }
}

TEST(select_blocks, plans_attend_to_exactly_the_blocks) {
  const seed_trace trace;
  random_source random;
  for (int round = 0; round < 60; ++round) {
    const index_t kv_heads = random.integer(1, 3);
    const index_t q_heads = kv_heads * random.integer(1, 3);
    const index_t kv_len = random.integer(1, 200);
    sattn::attention_shape shape = aligned_shape(random.integer(1, 200), kv_len, q_heads, kv_heads);
    if (random.integer(0, 3) == 0) shape.q_offset = static_cast<token_t>(random.integer(-50, 250));
    const domain legal = test_support::random_rules(random).legal;
    const auto q_block = random.pick<token_t>({1, 7, 16, 64, 150});
    const auto k_block = random.pick<token_t>({1, 9, 16, 64, 150});
    const index_t sets = random.pick({index_t{1}, kv_heads, q_heads});
    const score_tensor scores = random_scores(random, shape, legal, sets, q_block, k_block);
    const block_lists lists = select_blocks(shape, scores, {budget::fixed(random.integer(0, 9))},
                                            q_block, k_block, legal);
    const auto set_of = [&](index_t head) {
      if (sets == 1) return index_t{0};
      return sets == q_heads ? head : head / shape.group_size();
    };
    EXPECT_TRUE(selects(plan_of(shape, lists, {.legal = legal}),
                        [&](index_t head, index_t row, index_t key) {
                          const index_t i = set_of(head) * scores.rows + row / q_block;
                          return holds(list_of(lists, i), key / k_block);
                        }))
        << "round " << round << ", blocks of " << q_block << " x " << k_block;
  }
}

// Scores that know nothing of causality, as those of pages for the rows of a draft.
TEST(select_blocks, takes_no_block_without_a_legal_pair) {
  const seed_trace trace;
  random_source random;
  for (int round = 0; round < 200; ++round) {
    const index_t kv_len = random.integer(1, 300);
    const sattn::attention_shape shape{random.integer(1, 200), kv_len, 1, 1,
                                       static_cast<token_t>(random.integer(-100, 250))};
    const domain legal = test_support::random_rules(random).legal;
    const auto q_block = random.pick<token_t>({1, 7, 16, 64});
    const auto k_block = random.pick<token_t>({1, 9, 16, 64});
    const score_tensor all = random_scores(random, shape, domain::full(), 1, q_block, k_block);
    score_tensor some = all;
    const auto pairs = test_support::detail::legal_block_pairs(shape, legal, q_block, k_block);
    for (std::size_t i = 0; i < pairs.size(); ++i) {
      if (pairs[i] == 0) some.values[i] = -infinity;
    }
    const selection rule{budget::fixed(random.integer(0, 9)),
                         {.first = 1, .recent = 1, .diagonal = random.integer(0, 2) == 0}};
    const block_lists got = select_blocks(shape, all, rule, q_block, k_block, legal);
    const block_lists want = select_blocks(shape, some, rule, q_block, k_block, domain::full());
    EXPECT_EQ(got.indptr, want.indptr) << round;
    EXPECT_EQ(got.indices, want.indices) << round;
  }
}

// The Sparse Frontier's Block-Sparse: the first, the previous and the own block inside k, so that
// row i has min(i + 1, k) of them.
TEST(select_blocks, sink_and_local_blocks_inside_the_budget_give_the_known_density) {
  const seed_trace trace;
  random_source random;
  const index_t n = 20;
  const sattn::attention_shape shape = aligned_shape(n * 16, n * 16);
  const score_tensor scores = random_scores(random, shape, {}, 1, 16, 16);
  for (index_t k = 3; k <= n; ++k) {
    const block_lists lists =
        select_blocks(shape, scores, {budget::fixed(k), {.first = 1, .recent = 2}}, 16, 16);
    for (index_t i = 0; i < n; ++i) {
      const std::span<const token_t> list = list_of(lists, i);
      EXPECT_EQ(std::ssize(list), std::min(i + 1, k));
      EXPECT_TRUE(holds(list, 0) && holds(list, std::max<index_t>(i - 1, 0)) && holds(list, i));
    }
    EXPECT_EQ(std::ssize(lists.indices), (n * (n + 1) - (n - k) * (n - k + 1)) / 2);
  }
}

TEST(select_blocks, diagonal_blocks_are_those_of_the_rows_own_positions) {
  const seed_trace trace;
  random_source random;
  for (int round = 0; round < 60; ++round) {
    const index_t kv_len = random.integer(1, 200);
    const sattn::attention_shape shape{random.integer(1, 200), kv_len, 1, 1,
                                       static_cast<token_t>(random.integer(-100, 250))};
    const auto q_block = random.pick<token_t>({1, 7, 16, 64, 150});
    const auto k_block = random.pick<token_t>({1, 9, 16, 64, 150});
    const score_tensor scores = random_scores(random, shape, domain::full(), 1, q_block, k_block);
    const block_lists lists =
        select_blocks(shape, scores, {budget::fixed(0), {.diagonal = true}}, q_block, k_block,
                      domain::full());
    for (index_t i = 0; i < scores.rows; ++i) {
      std::vector<token_t> own;
      for (index_t row = i * q_block; row < std::min((i + 1) * q_block, shape.q_len); ++row) {
        const index_t position = shape.q_offset + row;
        if (position < 0 || position / k_block >= scores.cols) continue;
        if (own.empty() || own.back() != position / k_block) {
          own.push_back(static_cast<token_t>(position / k_block));
        }
      }
      EXPECT_TRUE(std::ranges::equal(list_of(lists, i), own)) << "round " << round << ", row " << i;
    }
  }
}

TEST(select_blocks, a_budget_of_all_blocks_gives_the_bits_of_dense_attention) {
  const seed_trace trace;
  random_source random;
  thread_contexts contexts;
  sattn::context& ctx = contexts.serial();
  const attention_problem p(random, {.q_len = 131, .kv_len = 200, .q_heads = 4, .kv_heads = 2});
  const auto dense = run(ctx, plan_prefill(ctx, p.shape, sattn::dense{}), p);
  const auto equals_dense = [&](const budget& all, const pooled_block_options& options) {
    const block_lists lists = select_blocks(p.shape, pooled_block_scores(ctx, p, options), {all},
                                            options.q_block, options.k_block);
    return bit_equal(run(ctx, plan_prefill(ctx, p.shape, lists), p), dense);
  };
  for (const token_t block : {1, 16, 64, 100, 300}) {
    const index_t blocks = blocks_of(200, block);
    const pooled_block_options options{
        .q_block = block, .k_block = block, .probabilities = true, .rules = {}};
    EXPECT_TRUE(equals_dense(budget::fixed(blocks), options)) << block;
    EXPECT_TRUE(equals_dense(budget::ratio(1), options)) << block;
    EXPECT_TRUE(equals_dense(budget::coverage(1), options)) << block;
    if (blocks > 1) {
      EXPECT_FALSE(equals_dense(budget::fixed(blocks - 1), options)) << block;
    }
  }
}

TEST(select_blocks, equal_scores_choose_the_lowest_blocks_on_any_threads_and_kernels) {
  random_source random;
  all_contexts contexts;
  thread_contexts threads;
  attention_problem p(random, {.q_len = 150, .kv_len = 180, .q_heads = 2, .kv_heads = 2});
  p.q.fill(0);
  for (const bool probabilities : {false, true}) {
    const pooled_block_options options{
        .q_block = 16, .k_block = 8, .probabilities = probabilities, .rules = {}};
    const auto expect_lowest = [&](sattn::context& ctx) {
      const block_lists lists =
          select_blocks(p.shape, pooled_block_scores(ctx, p, options), {budget::fixed(4)}, 16, 8);
      for (index_t i = 0; i + 1 < std::ssize(lists.indptr); ++i) {
        EXPECT_TRUE(std::ranges::equal(list_of(lists, i), std::vector{0, 1, 2, 3}))
            << name_of(ctx) << ", row of blocks " << i;
      }
    };
    for (sattn::context& ctx : contexts) expect_lowest(ctx);
    for (sattn::context& ctx : threads) expect_lowest(ctx);
  }
}

TEST(select_blocks, a_larger_budget_lists_a_superset) {
  const seed_trace trace;
  random_source random;
  const sattn::attention_shape shape = aligned_shape(200, 200);
  const score_tensor scores = random_scores(random, shape, {}, 1, 16, 8);
  block_lists smaller = select_blocks(shape, scores, {budget::fixed(0)}, 16, 8);
  for (index_t k = 1; k <= 25; ++k) {
    const block_lists larger = select_blocks(shape, scores, {budget::fixed(k)}, 16, 8);
    for (index_t i = 0; i < scores.rows; ++i) {
      EXPECT_TRUE(std::ranges::includes(list_of(larger, i), list_of(smaller, i)));
    }
    smaller = larger;
  }
}

// What is not stored chooses as what is, whatever a task takes of it.
TEST(select_pooled_blocks, chooses_what_select_blocks_chooses_of_all_scores) {
  const seed_trace trace;
  random_source random;
  thread_contexts contexts;
  for (int round = 0; round < 60; ++round) {
    test_support::problem_extents e = test_support::random_extents(random);
    if (round % 4 == 0) e.q_offset = static_cast<token_t>(random.integer(-100, 250));
    const attention_problem p(random, e);
    const pooled_block_options options{.q_block = random.pick<token_t>({1, 7, 16, 64}),
                                       .k_block = random.pick<token_t>({1, 9, 16, 64}),
                                       .probabilities = true,
                                       .rules = test_support::random_rules(random)};
    const protection keep{.first = 1, .recent = 1, .diagonal = random.integer(0, 2) == 0};
    const selection rule = random.integer(0, 2) == 0
                               ? selection{budget::fixed(random.integer(0, 9)), keep}
                               : selection{budget::coverage(0.8), keep};
    const block_lists want =
        select_blocks(p.shape, pooled_block_scores(contexts.serial(), p, options), rule,
                      options.q_block, options.k_block, options.rules.legal);
    for (sattn::context& ctx : contexts) {
      const block_lists got =
          select_pooled_blocks(ctx, p.shape, p.q.view(), p.k.view(), rule, options);
      ASSERT_EQ(got.sets, want.sets);
      ASSERT_EQ(got.indptr, want.indptr) << round;
      ASSERT_EQ(got.indices, want.indices) << round;
    }
  }
}

TEST(select_pooled_blocks, refuses_coverage_of_what_is_no_share) {
  random_source random;
  thread_contexts contexts;
  const attention_problem p(random, {.q_len = 4, .kv_len = 6});
  const auto error = [&](const selection& rule, const pooled_block_options& options) {
    return error_of([&] {
      select_pooled_blocks(contexts.serial(), p.shape, p.q.view(), p.k.view(), rule, options);
    });
  };
  EXPECT_EQ(error({budget::coverage(0.5)}, {.probabilities = true, .rules = {}}), "");
  EXPECT_EQ(error({budget::coverage(0.5)}, {}),
            "select_pooled_blocks: a budget by coverage needs probabilities");
  EXPECT_NE(error({budget::fixed(1), {.first = -1}}, {}), "");
  EXPECT_NE(error({budget::fixed(1)}, {.k_block = 0}), "");
}

// Tasks throw nothing: what is refused is known when they are done, the first list first.
TEST(select_blocks, refuses_the_first_list_with_a_negative_share_on_any_threads) {
  thread_contexts contexts;
  const sattn::attention_shape shape = aligned_shape(320, 320);
  score_tensor scores(1, 20, 20, 0.5f);
  scores.row(0, 13)[3] = -3;
  scores.row(0, 7)[2] = -7;
  scores.row(0, 5)[6] = -5;  // not seen
  for (sattn::context& ctx : contexts) {
    EXPECT_EQ(error_of([&] {
                sattn::select_blocks(ctx, shape, scores, {budget::coverage(0.5)}, 16, 16);
              }),
              "selection: coverage needs scores >= 0, unit 2 has -7.000000");
  }
}

TEST(select_blocks, lists_are_the_same_on_any_threads) {
  const seed_trace trace;
  random_source random;
  thread_contexts contexts;
  const sattn::attention_shape shape = aligned_shape(300, 500, 4, 2);
  const score_tensor scores = random_scores(random, shape, {}, 4, 16, 8);
  const selection rule{budget::ratio(0.2), {.first = 1, .diagonal = true}};
  const block_lists want = select_blocks(shape, scores, rule, 16, 8);
  for (sattn::context& ctx : contexts) {
    const block_lists got = sattn::select_blocks(ctx, shape, scores, rule, 16, 8);
    EXPECT_EQ(got.indptr, want.indptr);
    EXPECT_EQ(got.indices, want.indices);
  }
}

TEST(select_blocks, refuses_scores_that_do_not_fit) {
  const sattn::attention_shape shape = aligned_shape(100, 130);
  const selection rule{budget::fixed(1)};
  EXPECT_EQ(error_of([&] { select_blocks(shape, score_tensor(1, 2, 3, 0), rule); }), "");
  EXPECT_EQ(error_of([&] { select_blocks(shape, score_tensor(1, 3, 3, 0), rule); }),
            "select_blocks: scores are [3, 3], blocks are [2, 3]");
  EXPECT_NE(error_of([&] { select_blocks(shape, score_tensor(1, 2, 2, 0), rule); }), "");
  score_tensor short_of_values(1, 2, 3, 0);
  short_of_values.sets = 2;
  EXPECT_EQ(error_of([&] { select_blocks(shape, short_of_values, rule); }),
            "select_blocks: scores hold 6 values for [2, 2, 3]");
  EXPECT_NE(error_of([&] { select_blocks(shape, score_tensor(1, 2, 3, 0), rule, 0, 64); }), "");
  EXPECT_NE(error_of([&] {
              select_blocks(shape, score_tensor(1, 2, 3, 0), rule, 64, 64, {.window = -5});
            }),
            "");
  EXPECT_NE(
      error_of([&] { select_blocks(shape, score_tensor(1, 2, 3, -1), {budget::coverage(0.5)}); }),
      "");
}

}  // namespace
