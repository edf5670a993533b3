// SPDX-License-Identifier: Apache-2.0
#include <sattn/estimate/row_scores.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include "support/errors.hpp"
#include "support/plans.hpp"
#include "support/problem.hpp"
#include "support/scores.hpp"

namespace {

using sattn::budget;
using sattn::head_reduce;
using sattn::key_range;
using sattn::logit_rules;
using sattn::protection;
using sattn::score_tensor;
using sattn::selection;
using sattn::token_lists;
using test_support::all_contexts;
using test_support::at;
using test_support::attention_problem;
using test_support::bit_equal;
using test_support::bounded_scores;
using test_support::error_of;
using test_support::expected_rows;
using test_support::holds;
using test_support::index_t;
using test_support::list_of;
using test_support::name_of;
using test_support::quiet_nan;
using test_support::random_source;
using test_support::run;
using test_support::seed_trace;
using test_support::selects;
using test_support::thread_contexts;
using test_support::token_t;
using test_support::within_bound;

score_tensor row_scores(sattn::context& ctx, const attention_problem& p,
                        const logit_rules& rules = {}) {
  return sattn::row_scores(ctx, p.shape, p.q.view(), p.k.view(),
                           {0, static_cast<token_t>(p.shape.q_len)}, rules);
}

token_lists select_tokens(sattn::context& ctx, const attention_problem& p, const selection& rule,
                          const logit_rules& rules = {}, token_t rows_per_list = 1) {
  return sattn::select_tokens(ctx, p.shape, p.q.view(), p.k.view(), rule, rules, rows_per_list);
}

/// The set of data of a query head.
index_t set_of(const sattn::attention_shape& shape, index_t sets, index_t q_head) {
  return sets == shape.q_heads ? q_head : q_head / shape.group_size();
}

// ---- row_scores

TEST(row_scores, are_the_probabilities_at_every_length) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (const index_t kv_len : {1, 2, 63, 64, 65, 1000}) {
    for (const head_reduce reduce : test_support::all_reductions) {
      const attention_problem p(random, {.q_len = std::min<index_t>(kv_len, 18),
                                         .kv_len = kv_len,
                                         .q_heads = 4,
                                         .kv_heads = 2,
                                         .head_dim = 24});
      const logit_rules rules{.reduce = reduce};
      const bounded_scores want = expected_rows(p, rules);
      for (sattn::context& ctx : contexts) {
        EXPECT_TRUE(within_bound(row_scores(ctx, p, rules), want))
            << name_of(ctx) << ", kv_len " << kv_len << ", reduce " << static_cast<int>(reduce);
      }
    }
  }
}

// Every domain, position of the queries, layout, scale and soft cap.
TEST(row_scores, are_the_probabilities_of_random_problems) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (int round = 0; round < 60; ++round) {
    const test_support::problem_extents extents = random_extents(random);
    const attention_problem p(random, extents);
    const logit_rules rules = test_support::random_rules(random);
    const bounded_scores want = expected_rows(p, rules);
    for (sattn::context& ctx : contexts) {
      ASSERT_TRUE(within_bound(row_scores(ctx, p, rules), want))
          << name_of(ctx) << ", round " << round << ", " << extents;
    }
  }
}

TEST(row_scores, of_some_rows_are_those_of_all) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  const attention_problem p(
      random, {.q_len = 50, .kv_len = 90, .q_heads = 4, .kv_heads = 2, .q_offset = 17});
  const logit_rules rules{.legal = {.window = 40}};
  const score_tensor all = row_scores(contexts.any(), p, rules);
  for (const key_range rows :
       {key_range{0, 1}, key_range{3, 20}, key_range{33, 50}, key_range{50, 50}, key_range{0, 0}}) {
    const score_tensor some =
        sattn::row_scores(contexts.any(), p.shape, p.q.view(), p.k.view(), rows, rules);
    ASSERT_EQ(some.rows, rows.size());
    for (index_t set = 0; set < some.sets; ++set) {
      for (index_t r = 0; r < some.rows; ++r) {
        EXPECT_TRUE(bit_equal(some.row(set, r), all.row(set, rows.begin + r)));
      }
    }
  }
}

TEST(row_scores, do_not_know_of_later_keys_and_queries) {
  const seed_trace trace;
  random_source random;
  thread_contexts contexts;
  attention_problem p(random, {.q_len = 40, .kv_len = 70, .q_heads = 2, .kv_heads = 1});
  const score_tensor before = row_scores(contexts.serial(), p);
  const index_t row = 21;
  for (index_t t = row + 1; t < 40; ++t) {
    for (index_t head = 0; head < 2; ++head) p.q.fill_row(t, head, quiet_nan);
    p.k.fill_row(30 + t, 0, quiet_nan);
  }
  const score_tensor after = row_scores(contexts.serial(), p);
  for (index_t r = 0; r <= row; ++r) {
    EXPECT_TRUE(bit_equal(before.row(0, r), after.row(0, r))) << "row " << r;
  }
}

TEST(row_scores, of_rows_that_see_nothing_are_not_legal) {
  random_source random;
  thread_contexts contexts;
  const attention_problem p(random, {.q_len = 20, .kv_len = 20, .q_offset = -7});
  const score_tensor scores = row_scores(contexts.serial(), p);
  for (index_t r = 0; r < 20; ++r) {
    const std::span<const float> row = scores.row(0, r);
    const auto legal = std::count_if(row.begin(), row.end(), [](float s) { return s >= 0; });
    EXPECT_EQ(legal, std::max<index_t>(0, r - 6));
  }
  const attention_problem none(random, {.q_len = 3, .kv_len = 0});
  EXPECT_EQ(row_scores(contexts.serial(), none).values.size(), 0U);
}

TEST(row_scores, have_the_same_bits_on_any_threads) {
  const seed_trace trace;
  random_source random;
  thread_contexts contexts;
  for (const head_reduce reduce : test_support::all_reductions) {
    const attention_problem p(random, {.q_len = 65, .kv_len = 130, .q_heads = 6, .kv_heads = 2});
    const logit_rules rules{.reduce = reduce};
    const score_tensor want = row_scores(contexts.serial(), p, rules);
    for (sattn::context& ctx : contexts) {
      EXPECT_TRUE(bit_equal(row_scores(ctx, p, rules).values, want.values));
    }
  }
}

TEST(row_scores, refuse_what_does_not_fit) {
  random_source random;
  thread_contexts contexts;
  sattn::context& ctx = contexts.serial();
  const attention_problem p(random, {.q_len = 4, .kv_len = 6, .q_heads = 2, .kv_heads = 1});
  const attention_problem longer(random, {.q_len = 5, .kv_len = 7, .q_heads = 2, .kv_heads = 1});
  const attention_problem wider(
      random, {.q_len = 4, .kv_len = 6, .q_heads = 2, .kv_heads = 1, .head_dim = 17});
  const auto refuses = [&](const auto& shape, const auto& q, const auto& k, key_range rows,
                           const logit_rules& rules) {
    return error_of([&] { sattn::row_scores(ctx, shape, q.view(), k.view(), rows, rules); });
  };
  EXPECT_EQ(refuses(p.shape, p.q, p.k, {0, 4}, {}), "");
  EXPECT_EQ(refuses(p.shape, longer.q, p.k, {0, 4}, {}),
            "row_scores: q is [5, 2] and k is [6, 1], the shape says [4, 2] and [6, 1]");
  EXPECT_NE(refuses(p.shape, p.q, longer.k, {0, 4}, {}), "");
  EXPECT_EQ(refuses(p.shape, wider.q, p.k, {0, 4}, {}), "row_scores: q dim is 17, k dim is 16");
  EXPECT_EQ(refuses(p.shape, p.q, p.k, {0, 5}, {}), "row_scores: rows [0, 5) of q_len 4");
  EXPECT_NE(refuses(p.shape, p.q, p.k, {-1, 2}, {}), "");
  EXPECT_NE(refuses(p.shape, p.q, p.k, {3, 2}, {}), "");
  EXPECT_NE(refuses(p.shape, p.q, p.k, {0, 4}, {.scale = quiet_nan}), "");
  EXPECT_NE(refuses(p.shape, p.q, p.k, {0, 4}, {.soft_cap = -1}), "");
  EXPECT_NE(refuses(p.shape, p.q, p.k, {0, 4}, {.legal = {.window = -1}}), "");
}

// ---- select_tokens

/// For calls that must throw before they start a task.
struct no_tasks_executor {
  index_t concurrency() const { return 1; }
  void parallel_for(index_t, auto&&) { ADD_FAILURE() << "a task was started"; }
};

TEST(select_tokens, refuses_a_rule_before_any_task_starts) {
  no_tasks_executor executor;
  sattn::context ctx(executor);
  test_support::random_source random(1);
  const attention_problem p(random, {.q_len = 4, .kv_len = 6, .q_heads = 2, .kv_heads = 1});
  EXPECT_NE(error_of([&] {
              sattn::select_tokens(ctx, p.shape, p.q.view(), p.k.view(),
                                   {budget::fixed(1), {.first = -1}});
            }),
            "");
}

/// Sums of the probabilities of the rows that share a list; legal where any of them is.
bounded_scores sums_of_rows(const bounded_scores& rows, index_t rows_per_list) {
  bounded_scores sums(rows.sets, (rows.rows + rows_per_list - 1) / rows_per_list, rows.cols);
  const double rounding = test_support::detail::rounding_of(static_cast<double>(rows_per_list));
  for (index_t set = 0; set < rows.sets; ++set) {
    for (index_t r = 0; r < rows.rows; ++r) {
      for (index_t key = 0; key < rows.cols; ++key) {
        if (!rows.legal(set, r, key)) continue;
        const std::size_t from = rows.at(set, r, key);
        const std::size_t to = sums.at(set, r / rows_per_list, key);
        if (!sums.legal(set, r / rows_per_list, key)) sums.value[to] = 0;
        sums.value[to] += rows.value[from];
        sums.bound[to] += rows.bound[from] + rounding * (rows.value[from] + rows.bound[from]);
      }
    }
  }
  return sums;
}

TEST(select_tokens, lists_hold_the_keys_of_most_probability) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (const token_t rows_per_list : {1, 2, 4, 5, 16, 24, 128}) {
    for (int round = 0; round < 4; ++round) {
      const attention_problem p(random, random_extents(random));
      const logit_rules rules = test_support::random_rules(random);
      const bounded_scores want = sums_of_rows(expected_rows(p, rules), rows_per_list);
      const index_t k = random.pick<index_t>({0, 1, 3, 17, 64});
      for (sattn::context& ctx : contexts) {
        const token_lists lists = select_tokens(ctx, p, {budget::fixed(k)}, rules, rows_per_list);
        ASSERT_EQ(lists.sets, want.sets);
        ASSERT_EQ(lists.rows_per_list, rows_per_list);
        ASSERT_EQ(std::ssize(lists.indptr), want.sets * want.rows + 1);
        for (index_t i = 0; i < want.sets * want.rows; ++i) {
          ASSERT_TRUE(are_the_best(list_of(lists, i), k, want, i / want.rows, i % want.rows))
              << name_of(ctx) << ", list " << i << ", rows_per_list " << rows_per_list << ", k "
              << k;
        }
      }
    }
  }
}

TEST(select_tokens, chooses_from_the_bits_of_row_scores) {
  const seed_trace trace;
  random_source random;
  thread_contexts contexts;
  const attention_problem p(random, {.q_len = 70, .kv_len = 90, .q_heads = 4, .kv_heads = 2});
  for (const head_reduce reduce : test_support::all_reductions) {
    const logit_rules rules{.reduce = reduce};
    const score_tensor scores = row_scores(contexts.serial(), p, rules);
    const selection rule{budget::ratio(0.25), {.first = 2, .recent = 3}};
    const token_lists lists = select_tokens(contexts.serial(), p, rule, rules);
    sattn::selector choose;
    std::vector<token_t> chosen;
    for (index_t i = 0; i < scores.sets * scores.rows; ++i) {
      choose.choose(scores.row(i / scores.rows, i % scores.rows), rule, {}, chosen);
      EXPECT_TRUE(std::ranges::equal(list_of(lists, i), chosen)) << "list " << i;
    }
  }
}

TEST(select_tokens, plans_attend_to_exactly_the_lists) {
  const seed_trace trace;
  random_source random;
  thread_contexts contexts;
  for (const token_t rows_per_list : {1, 4, 16, 24, 128}) {
    for (const head_reduce reduce : {head_reduce::none, head_reduce::sum}) {
      const attention_problem p(random, {.q_len = 150, .kv_len = 171, .q_heads = 4, .kv_heads = 2});
      const token_lists lists = select_tokens(contexts.serial(), p, {budget::fixed(9)},
                                              {.reduce = reduce}, rows_per_list);
      const index_t per_set = (150 + rows_per_list - 1) / rows_per_list;
      EXPECT_TRUE(selects(plan_prefill(contexts.serial(), p.shape, lists),
                          [&](index_t head, index_t row, index_t key) {
                            const index_t list =
                                set_of(p.shape, lists.sets, head) * per_set + row / rows_per_list;
                            return holds(list_of(lists, list), key);
                          }))
          << "rows_per_list " << rows_per_list;
    }
  }
}

TEST(select_tokens, a_budget_of_all_keys_gives_the_bits_of_dense_attention) {
  const seed_trace trace;
  random_source random;
  thread_contexts contexts;
  sattn::context& ctx = contexts.serial();
  const attention_problem p(random, {.q_len = 131, .kv_len = 200, .q_heads = 4, .kv_heads = 2});
  const auto dense = run(ctx, plan_prefill(ctx, p.shape, sattn::dense{}), p);
  const auto equals_dense = [&](const budget& all, const logit_rules& rules, token_t rows) {
    const token_lists lists = select_tokens(ctx, p, {all}, rules, rows);
    return bit_equal(run(ctx, plan_prefill(ctx, p.shape, lists), p), dense);
  };
  for (const token_t rows_per_list : {1, 4, 16, 24, 128}) {
    for (const head_reduce reduce : {head_reduce::none, head_reduce::mean}) {
      EXPECT_TRUE(equals_dense(budget::fixed(200), {.reduce = reduce}, rows_per_list));
    }
    EXPECT_TRUE(equals_dense(budget::ratio(1), {}, rows_per_list));
    EXPECT_TRUE(equals_dense(budget::coverage(1), {}, rows_per_list));
    EXPECT_FALSE(equals_dense(budget::fixed(199), {}, rows_per_list));
  }
}

TEST(select_tokens, equal_scores_choose_the_lowest_keys_on_any_threads_and_kernels) {
  random_source random;
  all_contexts contexts;
  thread_contexts threads;
  for (const token_t rows_per_list : {1, 4, 16, 24, 128}) {
    attention_problem p(random, {.q_len = 150, .kv_len = 180, .q_heads = 2, .kv_heads = 2});
    p.q.fill(0);
    const auto expect_lowest = [&](sattn::context& ctx) {
      const token_lists lists = select_tokens(ctx, p, {budget::fixed(7)}, {}, rows_per_list);
      for (index_t i = 0; i + 1 < std::ssize(lists.indptr); ++i) {
        EXPECT_TRUE(std::ranges::equal(list_of(lists, i), std::vector{0, 1, 2, 3, 4, 5, 6}))
            << name_of(ctx) << ", list " << i << ", rows_per_list " << rows_per_list;
      }
    };
    for (sattn::context& ctx : contexts) expect_lowest(ctx);
    for (sattn::context& ctx : threads) expect_lowest(ctx);
  }
}

TEST(select_tokens, has_the_same_lists_on_any_threads) {
  const seed_trace trace;
  random_source random;
  thread_contexts contexts;
  for (const token_t rows_per_list : {1, 4, 16, 24, 128}) {
    const attention_problem p(random, {.q_len = 150, .kv_len = 170, .q_heads = 6, .kv_heads = 2});
    const selection rule{budget::coverage(0.6), {.first = 1, .diagonal = true}};
    const token_lists want = select_tokens(contexts.serial(), p, rule, {}, rows_per_list);
    for (sattn::context& ctx : contexts) {
      const token_lists got = select_tokens(ctx, p, rule, {}, rows_per_list);
      EXPECT_EQ(got.tokens, want.tokens);
      EXPECT_EQ(got.indptr, want.indptr);
    }
  }
}

// With a list for each row nothing about a row can depend on what comes later: neither its list nor
// its output, up to the tile of 16 rows that run together.
TEST(select_tokens, rows_do_not_know_of_later_keys_and_queries) {
  const seed_trace trace;
  random_source random;
  thread_contexts contexts;
  sattn::context& ctx = contexts.serial();
  attention_problem p(random, {.q_len = 60, .kv_len = 90, .q_heads = 2, .kv_heads = 1});
  const selection rule{budget::fixed(8)};
  const token_lists before = select_tokens(ctx, p, rule);
  const auto before_out = run(ctx, plan_prefill(ctx, p.shape, before), p);
  const index_t row = 31;
  for (index_t t = row + 1; t < 60; ++t) {
    p.k.fill_row(30 + t, 0, quiet_nan);
    p.v.fill_row(30 + t, 0, quiet_nan);
    for (index_t head = 0; head < 2; ++head) p.q.fill_row(t, head, quiet_nan);
  }
  const token_lists after = select_tokens(ctx, p, rule);
  const auto after_out = run(ctx, plan_prefill(ctx, p.shape, after), p);
  for (index_t r = 0; r <= row; ++r) {
    EXPECT_TRUE(std::ranges::equal(list_of(before, r), list_of(after, r))) << "row " << r;
  }
  EXPECT_TRUE(bit_equal(before_out.rows(p, 0, row + 1), after_out.rows(p, 0, row + 1)));
}

TEST(select_tokens, a_larger_budget_lists_a_superset) {
  const seed_trace trace;
  random_source random;
  thread_contexts contexts;
  const attention_problem p(random, {.q_len = 50, .kv_len = 80, .q_heads = 2, .kv_heads = 1});
  for (const token_t rows_per_list : {1, 16}) {
    token_lists smaller =
        select_tokens(contexts.serial(), p, {budget::fixed(0)}, {}, rows_per_list);
    for (const index_t k : {1, 2, 5, 16, 40, 80}) {
      const token_lists larger =
          select_tokens(contexts.serial(), p, {budget::fixed(k)}, {}, rows_per_list);
      for (index_t i = 0; i + 1 < std::ssize(larger.indptr); ++i) {
        EXPECT_TRUE(std::ranges::includes(list_of(larger, i), list_of(smaller, i)));
      }
      smaller = larger;
    }
  }
}

TEST(select_tokens, protected_keys_are_the_first_the_last_and_the_rows_own) {
  const seed_trace trace;
  random_source random;
  thread_contexts contexts;
  for (const token_t rows_per_list : {1, 4, 16, 24, 128}) {
    const attention_problem p(
        random, {.q_len = 140, .kv_len = 180, .q_heads = 2, .kv_heads = 1, .q_offset = 25});
    const protection keep{
        .first = 2, .recent = 1, .diagonal = true, .counted = protection::counting::on_top};
    // Keys ahead of the rows are legal too, so that the last one is not the row's own.
    const logit_rules rules{.legal = {.causal = true, .prefix = 178}};
    const token_lists lists =
        select_tokens(contexts.serial(), p, {budget::fixed(3), keep}, rules, rows_per_list);
    for (index_t i = 0; i + 1 < std::ssize(lists.indptr); ++i) {
      const index_t first_row = i * rows_per_list;
      const index_t end_row = std::min<index_t>(first_row + rows_per_list, 140);
      const std::span<const token_t> list = list_of(lists, i);
      EXPECT_TRUE(holds(list, 0) && holds(list, 1) && holds(list, 177)) << "list " << i;
      for (index_t row = first_row; row < end_row; ++row) EXPECT_TRUE(holds(list, 25 + row));
      EXPECT_EQ(std::ssize(list), 3 + 3 + end_row - first_row);
    }
  }
}

TEST(select_tokens, coverage_reaches_the_share_of_probability_and_no_key_is_idle) {
  const seed_trace trace;
  random_source random;
  thread_contexts contexts;
  const attention_problem p(random, {.q_len = 40, .kv_len = 300, .q_heads = 2, .kv_heads = 2});
  const token_lists lists = select_tokens(contexts.serial(), p, {budget::coverage(0.8)});
  const score_tensor scores = row_scores(contexts.serial(), p);
  for (index_t i = 0; i < 2 * 40; ++i) {
    const std::span<const float> row = scores.row(i / 40, i % 40);
    double all = 0;
    for (const float s : row) all += s > 0 ? double{s} : 0;
    double mass = 0;
    double least = 1;
    for (const token_t key : list_of(lists, i)) {
      mass += double{row[at(key)]};
      least = std::min(least, double{row[at(key)]});
    }
    const double rounding = 300 * std::numeric_limits<double>::epsilon();  // sums of 300 doubles
    EXPECT_GE(mass, 0.8 * all * (1 - rounding));
    EXPECT_LT(mass - least, 0.8 * all * (1 + rounding));
  }
}

TEST(select_tokens, refuses_what_does_not_fit) {
  random_source random;
  thread_contexts contexts;
  const attention_problem p(random, {.q_len = 40, .kv_len = 40, .q_heads = 2, .kv_heads = 1});
  for (const token_t rows_per_list : {-1, 0, 129}) {
    EXPECT_EQ(
        error_of(
            [&] { select_tokens(contexts.serial(), p, {budget::fixed(1)}, {}, rows_per_list); }),
        "select_tokens: rows_per_list " + std::to_string(rows_per_list) + ", expected 1 to 128");
  }
  for (sattn::context& ctx : contexts) {
    EXPECT_NE(error_of([&] { select_tokens(ctx, p, {budget::fixed(1), {.first = -1}}); }), "");
  }
}

}  // namespace
