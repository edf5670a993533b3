// SPDX-License-Identifier: Apache-2.0
#include <sattn/estimate/last_queries.hpp>
#include <sattn/estimate/antidiagonal.hpp>
#include <sattn/estimate/pooled_blocks.hpp>
#include <sattn/estimate/row_scores.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numeric>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "support/errors.hpp"
#include "support/plans.hpp"
#include "support/problem.hpp"
#include "support/scores.hpp"
#include "support/stored.hpp"

namespace {

using sattn::budget;
using sattn::domain;
using sattn::head_reduce;
using sattn::last_query_sums;
using sattn::logit_rules;
using sattn::per_head;
using sattn::protection;
using sattn::selection;
using test_support::all_contexts;
using test_support::at;
using test_support::attention_problem;
using test_support::bit_equal;
using test_support::bounded_scores;
using test_support::error_of;
using test_support::expected_rows;
using test_support::index_t;
using test_support::name_of;
using test_support::quiet_nan;
using test_support::random_source;
using test_support::run;
using test_support::seed_trace;
using test_support::selects;
using test_support::thread_contexts;
using test_support::token_t;
using test_support::within_bound;

last_query_sums last_query_scores(sattn::context& ctx, const attention_problem& p,
                                  token_t last_queries = 64, const logit_rules& rules = {}) {
  return sattn::last_query_scores(ctx, p.shape, p.q.view(), p.k.view(), last_queries, rules);
}

struct expected_sums {
  bounded_scores columns;
  bounded_scores distances;

  expected_sums(const attention_problem& p, index_t last_queries, const bounded_scores& rows)
      : columns(rows.sets, 1, rows.cols), distances(columns) {
    const index_t kv_len = p.shape.kv_len;
    for (bounded_scores* sums : {&columns, &distances}) {
      std::fill(sums->value.begin(), sums->value.end(), 0);  // all legal
    }
    const index_t first = std::max<index_t>(0, p.shape.q_len - last_queries);
    const double rounding =
        test_support::detail::rounding_of(static_cast<double>(p.shape.q_len - first));
    for (index_t set = 0; set < rows.sets; ++set) {
      for (index_t r = first; r < p.shape.q_len; ++r) {
        for (index_t key = 0; key < kv_len; ++key) {
          if (!rows.legal(set, r, key)) continue;
          const double mass = rows.value[rows.at(set, r, key)];
          const double bound = rows.bound[rows.at(set, r, key)];
          const auto add = [&](bounded_scores& sums, index_t unit) {
            if (unit < 0 || unit >= kv_len) return;
            sums.value[sums.at(set, 0, unit)] += mass;
            sums.bound[sums.at(set, 0, unit)] += bound + rounding * (mass + bound);
          };
          add(columns, key);
          add(distances, p.shape.q_offset + r - key);
        }
      }
    }
  }
};

double sum_of(std::span<const double> values) {
  return std::accumulate(values.begin(), values.end(), 0.0);
}
double sum_of(std::span<const float> values) {
  return std::accumulate(values.begin(), values.end(), 0.0);
}

// ---- last_query_scores

TEST(last_query_scores, are_sums_of_probabilities_at_every_length) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (const index_t kv_len : {1, 2, 63, 64, 65, 1000}) {
    for (const head_reduce reduce : test_support::all_reductions) {
      const attention_problem p(random, {.q_len = std::min<index_t>(kv_len, 30),
                                         .kv_len = kv_len,
                                         .q_heads = 4,
                                         .kv_heads = 2,
                                         .head_dim = 24});
      const logit_rules rules{.reduce = reduce};
      const bounded_scores rows = expected_rows(p, rules);
      for (const token_t last_queries : {1, 17, 64}) {
        const expected_sums want(p, last_queries, rows);
        for (sattn::context& ctx : contexts) {
          const last_query_sums got = last_query_scores(ctx, p, last_queries, rules);
          EXPECT_TRUE(within_bound(got.columns, want.columns)) << name_of(ctx) << ", " << kv_len;
          EXPECT_TRUE(within_bound(got.distances, want.distances))
              << name_of(ctx) << ", " << kv_len;
        }
      }
    }
  }
}

// Every domain, position of the queries, layout, scale and soft cap.
TEST(last_query_scores, are_sums_of_probabilities_in_random_problems) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (int round = 0; round < 40; ++round) {
    const test_support::problem_extents extents = random_extents(random);
    const attention_problem p(random, extents);
    const logit_rules rules = test_support::random_rules(random);
    const auto last_queries = static_cast<token_t>(random.integer(1, 100));
    const expected_sums want(p, last_queries, expected_rows(p, rules));
    for (sattn::context& ctx : contexts) {
      const last_query_sums got = last_query_scores(ctx, p, last_queries, rules);
      ASSERT_TRUE(within_bound(got.columns, want.columns))
          << name_of(ctx) << ", round " << round << ", " << extents;
      ASSERT_TRUE(within_bound(got.distances, want.distances))
          << name_of(ctx) << ", round " << round << ", " << extents;
    }
  }
}

// Each row of a softmax adds up to one, by keys as by distances.
TEST(last_query_scores, both_sums_add_up_to_the_number_of_rows) {
  const seed_trace trace;
  random_source random;
  thread_contexts contexts;
  for (const token_t last_queries : {1, 16, 40, 64}) {
    for (const head_reduce reduce : {head_reduce::none, head_reduce::mean, head_reduce::sum}) {
      const attention_problem p(random, {.q_len = 40, .kv_len = 77, .q_heads = 6, .kv_heads = 2});
      const logit_rules rules{.reduce = reduce};
      const double heads = reduce == head_reduce::sum ? 3 : 1;
      const double rows = std::min(last_queries, 40);
      const expected_sums bounds(p, last_queries, expected_rows(p, rules));
      const last_query_sums got = last_query_scores(contexts.serial(), p, last_queries, rules);
      for (index_t set = 0; set < got.columns.sets; ++set) {
        const auto bound_of = [&](const bounded_scores& sums) {
          return sum_of(std::span(sums.bound).subspan(sums.at(set, 0, 0), 77));
        };
        EXPECT_NEAR(sum_of(got.columns.row(set, 0)), heads * rows, bound_of(bounds.columns));
        EXPECT_NEAR(sum_of(got.distances.row(set, 0)), heads * rows, bound_of(bounds.distances));
      }
    }
  }
}

TEST(last_query_scores, of_one_query_are_its_probabilities_both_ways) {
  const seed_trace trace;
  random_source random;
  thread_contexts contexts;
  const attention_problem p(random, {.q_len = 5, .kv_len = 33});
  const last_query_sums got = last_query_scores(contexts.serial(), p, 1);
  std::vector<float> mirrored(got.distances.values.rbegin(), got.distances.values.rend());
  EXPECT_TRUE(bit_equal(got.columns.values, mirrored));
}

TEST(last_query_scores, more_queries_than_there_are_means_all) {
  const seed_trace trace;
  random_source random;
  thread_contexts contexts;
  const attention_problem p(random, {.q_len = 20, .kv_len = 50, .q_heads = 2, .kv_heads = 1});
  const last_query_sums all = last_query_scores(contexts.serial(), p, 20);
  const last_query_sums more = last_query_scores(contexts.serial(), p, 1000);
  EXPECT_TRUE(bit_equal(all.columns.values, more.columns.values));
  EXPECT_TRUE(bit_equal(all.distances.values, more.distances.values));
}

// A chunk in the middle of a longer cache: what lies ahead of it counts for nothing and is not
// read.
TEST(last_query_scores, of_a_chunk_know_nothing_of_what_is_ahead_or_was_before_the_last_rows) {
  const seed_trace trace;
  random_source random;
  thread_contexts contexts;
  attention_problem p(random, {.q_len = 30, .kv_len = 100, .q_offset = 40});
  const last_query_sums before = last_query_scores(contexts.serial(), p, 8);
  for (index_t t = 0; t < 22; ++t) p.q.fill_row(t, 0, quiet_nan);
  for (index_t t = 70; t < 100; ++t) p.k.fill_row(t, 0, quiet_nan);
  const last_query_sums after = last_query_scores(contexts.serial(), p, 8);
  EXPECT_TRUE(bit_equal(before.columns.values, after.columns.values));
  EXPECT_TRUE(bit_equal(before.distances.values, after.distances.values));
  for (std::size_t key = 70; key < 100; ++key) EXPECT_EQ(after.columns.values[key], 0);
}

TEST(last_query_scores, keys_ahead_of_a_query_have_no_distance) {
  const seed_trace trace;
  random_source random;
  thread_contexts contexts;
  const attention_problem p(random, {.q_len = 6, .kv_len = 40, .q_offset = 0});
  const logit_rules rules{.legal = domain::full()};
  const last_query_sums got = last_query_scores(contexts.serial(), p, 6, rules);
  for (std::size_t d = 6; d < 40; ++d) EXPECT_EQ(got.distances.values[d], 0);
  EXPECT_GT(*std::min_element(got.columns.values.begin(), got.columns.values.end()), 0);
  EXPECT_LT(sum_of(got.distances.row(0, 0)), sum_of(got.columns.row(0, 0)));
}

TEST(last_query_scores, have_the_same_bits_on_any_threads) {
  const seed_trace trace;
  random_source random;
  thread_contexts contexts;
  for (const head_reduce reduce : test_support::all_reductions) {
    const attention_problem p(random, {.q_len = 65, .kv_len = 130, .q_heads = 6, .kv_heads = 2});
    const logit_rules rules{.reduce = reduce};
    const last_query_sums want = last_query_scores(contexts.serial(), p, 50, rules);
    for (sattn::context& ctx : contexts) {
      const last_query_sums got = last_query_scores(ctx, p, 50, rules);
      EXPECT_TRUE(bit_equal(got.columns.values, want.columns.values));
      EXPECT_TRUE(bit_equal(got.distances.values, want.distances.values));
    }
  }
}

TEST(last_query_scores, refuse_what_does_not_fit) {
  random_source random;
  thread_contexts contexts;
  sattn::context& ctx = contexts.serial();
  const attention_problem p(random, {.q_len = 4, .kv_len = 6, .q_heads = 2, .kv_heads = 1});
  const attention_problem longer(random, {.q_len = 5, .kv_len = 6, .q_heads = 2, .kv_heads = 1});
  EXPECT_EQ(error_of([&] { last_query_scores(ctx, p, 0); }),
            "last_query_scores: last_queries 0 must be positive");
  EXPECT_NE(error_of([&] { last_query_scores(ctx, p, 64, {.scale = quiet_nan}); }), "");
  EXPECT_EQ(error_of([&] { sattn::last_query_scores(ctx, p.shape, longer.q.view(), p.k.view()); }),
            "last_query_scores: q is [5, 2] and k is [6, 1], the shape says [4, 2] and [6, 1]");
}

// Every type and layout gives the bits of the same numbers in f32, and what lies beside the keys is
// not read.
TEST(estimators, read_keys_however_they_are_stored) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  attention_problem p(random, {.q_len = 70, .kv_len = 300, .q_heads = 4, .kv_heads = 2,
                               .head_dim = 32});
  for (const sattn::dtype type : {sattn::dtype::f32, sattn::dtype::f16, sattn::dtype::bf16,
                                  sattn::dtype::i8, sattn::dtype::q8_0}) {
    attention_problem plain = p;
    const test_support::encoded_rows rows(plain.k, type);
    for (const auto layout : {test_support::storage_layout::strided,
                              test_support::storage_layout::paged,
                              test_support::storage_layout::ring}) {
      const test_support::stored_tensor k(rows, layout, random);
      for (sattn::context& ctx : contexts) {
        SCOPED_TRACE(std::string(sattn::name_of(type)) + ", " + name_of(ctx));
        const auto same = [&](const auto& estimate) {
          return bit_equal(estimate(k.view), estimate(plain.k.view()));
        };
        EXPECT_TRUE(same([&](const sattn::stored_view& keys) {
          return sattn::last_query_scores(ctx, p.shape, p.q.view(), keys).distances.values;
        }));
        EXPECT_TRUE(same([&](const sattn::stored_view& keys) {
          return sattn::last_query_maxima(ctx, p.shape, p.q.view(), keys).values;
        }));
        EXPECT_TRUE(same([&](const sattn::stored_view& keys) {
          return sattn::pooled_block_scores(ctx, p.shape, p.q.view(), keys).values;
        }));
        EXPECT_TRUE(same([&](const sattn::stored_view& keys) {
          return sattn::antidiagonal_block_scores(ctx, p.shape, p.q.view(), keys).values;
        }));
        EXPECT_TRUE(same([&](const sattn::stored_view& keys) {
          return sattn::row_scores(ctx, p.shape, p.q.view(), keys, {3, 40}).values;
        }));
      }
    }
  }
}

// The largest probability of a key among rows and heads, from the rows themselves.
TEST(last_query_maxima, are_the_largest_of_the_rows_probabilities) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (int round = 0; round < 20; ++round) {
    const attention_problem p(random, random_extents(random));
    logit_rules rules = test_support::random_rules(random);
    const auto last_queries = static_cast<token_t>(random.integer(1, 100));
    const logit_rules each{rules.legal, rules.scale, rules.soft_cap, head_reduce::none};
    const bounded_scores rows = expected_rows(p, each);
    bounded_scores heads(rows.sets, 1, rows.cols);
    for (index_t set = 0; set < rows.sets; ++set) {
      for (index_t key = 0; key < rows.cols; ++key) {
        const std::size_t to = heads.at(set, 0, key);
        heads.value[to] = 0;
        for (index_t r = std::max<index_t>(0, p.shape.q_len - last_queries); r < p.shape.q_len;
             ++r) {
          if (!rows.legal(set, r, key)) continue;
          heads.value[to] = std::max(heads.value[to], rows.value[rows.at(set, r, key)]);
          heads.bound[to] = std::max(heads.bound[to], rows.bound[rows.at(set, r, key)]);
        }
      }
    }
    const bounded_scores want =
        test_support::detail::join_heads(heads, p.shape.kv_heads, rules.reduce);
    for (sattn::context& ctx : contexts) {
      ASSERT_TRUE(within_bound(
          sattn::last_query_maxima(ctx, p.shape, p.q.view(), p.k.view(), last_queries, rules),
          want))
          << name_of(ctx);
    }
  }
}

// ---- select_vertical_slash

struct vertical_slash_sets {
  std::vector<std::vector<token_t>> columns;
  std::vector<std::vector<token_t>> distances;

  vertical_slash_sets(const last_query_sums& sums, const selection& column_rule,
                      const selection& distance_rule)
      : columns(at(sums.columns.sets)), distances(columns.size()) {
    sattn::selector choose;
    for (index_t set = 0; set < sums.columns.sets; ++set) {
      choose.choose(sums.columns.row(set, 0), column_rule, {}, columns[at(set)]);
      choose.choose(sums.distances.row(set, 0), distance_rule, {}, distances[at(set)]);
    }
  }
  bool holds(index_t set, index_t key, index_t distance) const {
    return std::ranges::binary_search(columns[at(set)], key) ||
           std::ranges::binary_search(distances[at(set)], distance);
  }
};

TEST(select_vertical_slash, plans_attend_to_exactly_the_columns_and_distances) {
  const seed_trace trace;
  random_source random;
  thread_contexts contexts;
  for (const auto& [q_len, kv_len] : {std::pair<index_t, index_t>{1, 1}, {65, 65}, {100, 150}}) {
    for (const head_reduce reduce : {head_reduce::none, head_reduce::mean}) {
      const attention_problem p(random,
                                {.q_len = q_len, .kv_len = kv_len, .q_heads = 4, .kv_heads = 2});
      const last_query_sums sums = last_query_scores(contexts.serial(), p, 64, {.reduce = reduce});
      const selection columns{budget::fixed(6), {.first = 2}};
      const selection distances{budget::ratio(0.1), {.first = 4}};
      const vertical_slash_sets sets(sums, columns, distances);
      const per_head pattern =
          select_vertical_slash(contexts.serial(), sums, columns, distances);
      const index_t group = reduce == head_reduce::none ? 1 : 2;
      ASSERT_EQ(pattern.heads(), 4 / group);
      EXPECT_TRUE(selects(plan_prefill(contexts.serial(), p.shape, pattern),
                          [&](index_t head, index_t row, index_t key) {
                            return sets.holds(head / group, key, kv_len - q_len + row - key);
                          }));
    }
  }
}

// The Sparse Frontier's Vertical-Slash: 4 sinks and 64 local distances inside the budgets.
TEST(select_vertical_slash, sinks_and_the_local_window_are_inside_the_budgets) {
  const seed_trace trace;
  random_source random;
  thread_contexts contexts;
  const attention_problem p(random, {.q_len = 90, .kv_len = 300});
  const last_query_sums sums = last_query_scores(contexts.serial(), p);
  const selection columns{budget::fixed(20), {.first = 4}};
  const selection distances{budget::fixed(80), {.first = 64}};
  const vertical_slash_sets sets(sums, columns, distances);
  EXPECT_EQ(sets.columns[0].size(), 20U);
  EXPECT_EQ(sets.distances[0].size(), 80U);
  EXPECT_TRUE(selects(
      plan_prefill(contexts.serial(), p.shape,
                   select_vertical_slash(contexts.serial(), sums, columns, distances)),
      [&](index_t, index_t row, index_t key) {
        const index_t distance = 210 + row - key;
        return key < 4 || (distance >= 0 && distance < 64) || sets.holds(0, key, distance);
      }));
}

TEST(select_vertical_slash, chooses_the_units_of_most_mass) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (int round = 0; round < 10; ++round) {
    const attention_problem p(random, random_extents(random));
    const logit_rules rules = test_support::random_rules(random);
    const expected_sums want(p, 64, expected_rows(p, rules));
    const index_t k = random.integer(0, 20);
    for (sattn::context& ctx : contexts) {
      const selection rule{budget::fixed(k)};
      const vertical_slash_sets sets(last_query_scores(ctx, p, 64, rules), rule, rule);
      for (index_t set = 0; set < want.columns.sets; ++set) {
        ASSERT_TRUE(are_the_best(sets.columns[at(set)], k, want.columns, set, 0));
        ASSERT_TRUE(are_the_best(sets.distances[at(set)], k, want.distances, set, 0));
      }
    }
  }
}

TEST(select_vertical_slash, a_budget_of_all_units_gives_the_bits_of_dense_attention) {
  const seed_trace trace;
  random_source random;
  thread_contexts contexts;
  sattn::context& ctx = contexts.serial();
  const attention_problem p(random, {.q_len = 131, .kv_len = 200, .q_heads = 4, .kv_heads = 2});
  const last_query_sums sums = last_query_scores(ctx, p);
  const auto dense = run(ctx, plan_prefill(ctx, p.shape, sattn::dense{}), p);
  const auto equals_dense = [&](const budget& columns, const budget& distances) {
    const per_head pattern = select_vertical_slash(ctx, sums, {columns}, {distances});
    return bit_equal(run(ctx, plan_prefill(ctx, p.shape, pattern), p), dense);
  };
  for (const budget& all : {budget::fixed(200), budget::ratio(1), budget::coverage(1)}) {
    EXPECT_TRUE(equals_dense(all, budget::fixed(0)));
    EXPECT_TRUE(equals_dense(budget::fixed(0), all));
    EXPECT_TRUE(equals_dense(all, all));
  }
  EXPECT_FALSE(equals_dense(budget::fixed(100), budget::fixed(10)));
}

TEST(select_vertical_slash, equal_scores_choose_the_lowest_columns_and_distances) {
  random_source random;
  all_contexts contexts;
  attention_problem p(random, {.q_len = 150, .kv_len = 180});
  p.q.fill(0);
  const selection rule{budget::fixed(5)};
  for (sattn::context& ctx : contexts) {
    const vertical_slash_sets sets(last_query_scores(ctx, p), rule, rule);
    EXPECT_EQ(sets.columns[0], (std::vector<token_t>{0, 1, 2, 3, 4})) << name_of(ctx);
    EXPECT_EQ(sets.distances[0], (std::vector<token_t>{0, 1, 2, 3, 4})) << name_of(ctx);
  }
}

}  // namespace
