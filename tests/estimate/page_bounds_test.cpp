// SPDX-License-Identifier: Apache-2.0
//
// What Quest's bounds promise, compared without any slack, and what follows from it.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <functional>
#include <sattn/attention/attend.hpp>
#include <sattn/attention/plan.hpp>
#include <sattn/estimate/page_scores.hpp>
#include <sattn/estimate/pooled_blocks.hpp>
#include <sattn/kv/rotary.hpp>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "support/moved.hpp"
#include "support/patterns.hpp"
#include "support/problem.hpp"
#include "support/scores.hpp"
#include "support/stored.hpp"

namespace {

using namespace sattn;         // NOLINT(google-build-using-namespace)
using namespace test_support;  // NOLINT(google-build-using-namespace)

// Sets of kernels whose products and sums are fused, which is for the compiler to say of sse2.
std::vector<const kernel_table*> fusing_tables() {
  std::vector<const kernel_table*> tables = kernel_tables();
  std::erase_if(tables, [](const kernel_table* t) { return std::string(t->name) == "sse2"; });
  return tables;
}

std::vector<page_summaries> bounds_of(const stored_view& k, token_t page_size, dtype type) {
  std::vector<page_summaries> all(at(k.heads), page_summaries({k.dim, page_size, type}));
  for (index_t h = 0; h < k.heads; ++h) all[at(h)].update(k, h);
  return all;
}

// Of each head alone, for one row; with a negative q, the bounds from below turned over.
::testing::AssertionResult enclose(context& ctx, const attention_problem& p,
                                   std::span<const page_summaries> summaries) {
  const index_t dim = p.q.view().dim;
  const token_t page_size = summaries[0].options().page_size;
  owned_tensor negative(1, p.shape.q_heads, dim);
  for (index_t h = 0; h < p.shape.q_heads; ++h) {
    for (index_t d = 0; d < dim; ++d) negative.row(0, h)[d] = -p.q.row(0, h)[d];
  }
  const score_tensor above = page_scores(ctx, p.q.view(), summaries, head_reduce::none);
  const score_tensor below = page_scores(ctx, negative.view(), summaries, head_reduce::none);
  for (index_t h = 0; h < p.shape.q_heads; ++h) {
    for (index_t t = 0; t < p.shape.kv_len; ++t) {
      const float* const key = p.k.row(t, h / p.shape.group_size());
      const float score = chain(p.q.row(0, h), key, dim);
      const std::size_t page = at(t / page_size);
      if (-below.row(h, 0)[page] <= score && score <= above.row(h, 0)[page]) continue;
      return ::testing::AssertionFailure()
             << "head " << h << ", key " << t << ": " << score << " is not within "
             << -below.row(h, 0)[page] << " and " << above.row(h, 0)[page];
    }
  }
  return ::testing::AssertionSuccess();
}

void expect_exact_bounds(dtype type) {
  const seed_trace trace;
  random_source random;
  for (const token_t page_size : {1, 2, 16, 50}) {
    for (const index_t dim : {1, 7, 64, 128}) {
      for (const dtype k_type : {dtype::f32, dtype::f16, dtype::bf16, dtype::i8}) {
        SCOPED_TRACE(::testing::Message() << name_of(type) << " of " << name_of(k_type) << ", dim "
                                          << dim << ", pages of " << page_size);
        attention_problem p(random, {1, 300, 4, 2, dim, 1});
        // Rows of all sizes, below what f16 has among them; some queries look at few dimensions.
        for (index_t t = 0; t < 300; ++t) {
          const auto size = static_cast<float>(std::exp2(static_cast<double>(t / 20) * 2 - 18));
          for (index_t d = 0; d < 2 * dim; ++d) p.k.row(t, 0)[d] *= size;
        }
        for (index_t d = 0; d < dim; ++d) p.q.row(0, 3)[d] *= d % 5 == 0 ? 100.0f : 0.0f;
        const encoded_rows rows(p.k, k_type);
        const stored_tensor k(rows, storage_layout::strided, random);
        const auto summaries = bounds_of(k.view, page_size, type);
        for (const kernel_table* table : fusing_tables()) {
          context ctx(1, *table);
          ASSERT_TRUE(enclose(ctx, p, summaries)) << table->name;
        }
      }
    }
  }
}

TEST(page_bounds, hold_every_key_to_the_last_bit) {
  expect_exact_bounds(dtype::f32);
  expect_exact_bounds(dtype::f16);
}

TEST(page_bounds, of_int8_hold_every_key_to_the_last_bit) {
  expect_exact_bounds(dtype::i8);
}

// Pages of one token: their bounds are the scores, and what they choose the best keys.
TEST(page_bounds, of_single_keys_choose_what_their_scores_choose) {
  const seed_trace trace;
  random_source random;
  for (int round = 0; round < 20; ++round) {
    const index_t dim = random.pick<index_t>({1, 16, 100}), keys = random.integer(1, 400);
    attention_problem p(random, {1, keys, 4, 2, dim, 1});
    for (index_t t = 0; t < keys; ++t) {  // scores that are equal
      if (random.integer(0, 4) == 0) std::copy_n(p.k.row(t / 2, 0), 2 * dim, p.k.row(t, 0));
    }
    const auto summaries = bounds_of(p.k.view(), 1, dtype::f32);
    const selection rule{random.pick({budget::fixed(random.integer(0, 60)), budget::ratio(0.3),
                                      budget::threshold(random.normal())}),
                         {.first = random.integer(0, 3), .recent = random.integer(0, 3)}};
    const logit_rules rules{.scale = 1.0f, .reduce = head_reduce::none};
    const bounded_scores want = expected_scores(p, rules, 1, 1, false);
    for (const kernel_table* table : fusing_tables()) {
      context ctx(1, *table);
      const score_tensor of_pages = page_scores(ctx, p.q.view(), summaries, head_reduce::none);
      score_tensor of_keys(4, 1, keys, 0);
      for (index_t h = 0; h < 4; ++h) {
        for (index_t t = 0; t < keys; ++t) {
          of_keys.row(h, 0)[at(t)] = chain(p.q.row(0, h), p.k.row(t, h / 2), dim);
        }
      }
      ASSERT_EQ(of_pages.values, of_keys.values) << table->name;  // -0 is 0
      const block_lists pages = select_blocks(ctx, p.shape, of_pages, rule, 1, 1);
      selector choose;
      token_lists tokens{1, {0}, {}, 4};
      std::vector<token_t> chosen;
      for (index_t h = 0; h < 4; ++h) {
        choose.choose(of_keys.row(h, 0), rule, {}, chosen);
        tokens.append(std::span(&chosen, 1));
        const std::span of_head = std::span(pages.indices)
                                      .subspan(at(pages.indptr[at(h)]), chosen.size());
        if (rule.amount.by() == budget::kind::fixed && rule.keep.first + rule.keep.recent == 0) {
          EXPECT_TRUE(are_the_best(of_head, rule.amount.count(keys), want, h, 0));
        }
      }
      EXPECT_EQ(pages.indices, tokens.tokens);
      EXPECT_EQ(pages.indptr, tokens.indptr);
      const attention_plan by_pages = plan_decode(ctx, p.shape, pages);
      const attention_plan by_tokens = plan_decode(ctx, p.shape, tokens);
      for (index_t h = 0; h < 4; ++h) EXPECT_EQ(expand(by_pages, h), expand(by_tokens, h));
    }
  }
}

// Of `size` elements, a power of two, in double.
void hadamard(float* row, index_t size) {
  std::vector<double> x(row, row + size);
  for (index_t half = 1; half < size; half *= 2) {
    for (index_t i = 0; i < size; ++i) {
      if (i % (2 * half) >= half) continue;
      const double a = x[at(i)], b = x[at(i + half)];
      x[at(i)] = a + b;
      x[at(i + half)] = a - b;
    }
  }
  for (index_t i = 0; i < size; ++i) {
    row[i] = static_cast<float>(x[at(i)] / std::sqrt(static_cast<double>(size)));
  }
}

// A Hadamard transform of q and K, and RoPE at positions that are all shifted: attention stays,
// boxes of pages become others, and are bounds of the keys as they now are.
TEST(page_bounds, change_where_attention_does_not) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  constexpr index_t dim = 32;
  std::vector<std::pair<std::string, std::function<void(float*)>>> turns;
  turns.emplace_back("Hadamard", [](float* row) { hadamard(row, dim); });
  for (const rotary_pairs pairs : {rotary_pairs::halves, rotary_pairs::neighbours}) {
    for (const index_t positions : {1, 1000, -37}) {
      turns.emplace_back("RoPE by " + std::to_string(positions), [=](float* row) {
        rotary({.pairs = pairs}, dim).turn(row, positions);
      });
    }
  }
  const attention_problem p(random, {1, 200, 4, 2, dim, 8});
  const attention_plan plan = plan_decode(contexts.any(), p.shape, dense{}, {.split_keys = 64});
  const auto bounds = bounds_of(p.k.view(), 16, dtype::f32);
  const score_tensor before = page_scores(contexts.any(), p.q.view(), bounds);
  for (const auto& [name, turn] : turns) {
    SCOPED_TRACE(name);
    attention_problem turned = p;
    for (index_t h = 0; h < 4; ++h) turn(turned.q.row(0, h));
    for (index_t row = 0; row < 400; ++row) turn(turned.k.row(row / 2, row % 2));
    // Both elements of a product are rounded once.
    const mask_function all = mask_of(plan);
    reference::result want = expected(p, all);
    want.out_bound = expected(turned, all).out_bound;
    want.lse_bound = expected(turned, all).lse_bound;
    widen(want, p, all, [&](index_t head, index_t row, index_t key) {
      const float* const k = turned.k.row(key, head / 2);
      return logit_error(turned, head, row,
                         [&](index_t d) { return 2.01 * 0x1p-24 * std::abs(double{k[d]}); });
    }, [](index_t, index_t) { return 0.0; });
    const auto moved = bounds_of(turned.k.view(), 16, dtype::f32);
    for (context& ctx : contexts) {
      const attention_result got = run(ctx, plan, turned);
      EXPECT_TRUE(within_bound(got.out, got.lse, want)) << name_of(ctx);
    }
    for (const kernel_table* table : fusing_tables()) {
      context ctx(1, *table);
      EXPECT_TRUE(enclose(ctx, turned, moved)) << table->name;
    }
    const score_tensor after = page_scores(contexts.any(), turned.q.view(), moved);
    int others = 0;  // by more than the roundings of a sum of 32 products
    for (std::size_t i = 0; i < after.values.size(); ++i) {
      const float change = std::abs(after.values[i] - before.values[i]);
      others += change > 0x1p-15f * std::abs(before.values[i]) ? 1 : 0;
    }
    EXPECT_GT(others, std::ssize(after.values) * 3 / 4);
  }
}

}  // namespace
