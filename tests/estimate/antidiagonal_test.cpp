// SPDX-License-Identifier: Apache-2.0
#include <sattn/estimate/antidiagonal.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "reference/reference.hpp"
#include "support/errors.hpp"
#include "support/plans.hpp"
#include "support/problem.hpp"
#include "support/scores.hpp"

namespace {

using sattn::antidiagonal_options;
using sattn::head_reduce;
using sattn::logit_rules;
using sattn::score_tensor;
using test_support::all_contexts;
using test_support::at;
using test_support::attention_problem;
using test_support::bit_equal;
using test_support::bounded_scores;
using test_support::error_of;
using test_support::index_t;
using test_support::name_of;
using test_support::random_source;
using test_support::seed_trace;
using test_support::thread_contexts;
using test_support::token_t;
using test_support::within_bound;

// XAttention by its formula: row a and key b of the strided map are the `stride` rows from
// a * stride on, reversed, and as many keys, zeros behind the ends; a * stride + stride - 1 is the
// last row of a group, and b is seen where its first key is. In double, as attention of rows and
// keys of stride * dim numbers.
bounded_scores expected_mass(const attention_problem& p, const antidiagonal_options& o) {
  const index_t s = o.stride;
  const index_t dim = p.q.view().dim;
  const index_t rows = (p.shape.q_len + s - 1) / s;
  const index_t keys = (p.shape.kv_len + s - 1) / s;
  const index_t block = o.block / s;
  const std::vector<double> pooling(at(keys), 0.0);  // nothing is averaged
  bounded_scores heads(p.shape.q_heads, (p.shape.q_len + o.block - 1) / o.block,
                       (p.shape.kv_len + o.block - 1) / o.block);
  for (index_t head = 0; head < p.shape.q_heads; ++head) {
    std::vector<float> q(at(rows * s * dim), 0.0f), k(at(keys * s * dim), 0.0f);
    for (index_t t = 0; t < p.shape.q_len; ++t) {
      const index_t place = t / s * s + (s - 1 - t % s);
      std::copy_n(p.q.row(t, head), dim, q.data() + place * dim);
    }
    for (index_t t = 0; t < p.shape.kv_len; ++t) {
      std::copy_n(p.k.row(t, head / p.shape.group_size()), dim, k.data() + t * dim);
    }
    const double scale =
        (o.rules.scale ? double{*o.rules.scale} : 1 / std::sqrt(static_cast<double>(dim))) /
        static_cast<double>(s);
    const auto seen = [&](index_t a, index_t b) {
      for (index_t r = a * s; r < a * s + s; ++r) {
        for (index_t key = b * s; key < b * s + s; ++key) {
          if (test_support::sees(o.rules.legal, p.shape.q_offset + r, key)) return true;
        }
      }
      return false;
    };
    for (index_t a = 0; a < rows; ++a) {
      const test_support::detail::row_oracle row{
          {.q_len = 1,
           .kv_len = keys,
           .head_dim = s * dim,
           .q = {q.data() + a * s * dim, 0, 0},
           .k = {k.data(), s * dim, 0},
           .scale = scale,
           .selected = [&](index_t, index_t, index_t b) { return seen(a, b); }},
          pooling};
      std::vector<double> value(at(keys), 0.0), bound(at(keys), 0.0);
      row.probabilities(value, bound);
      for (index_t b = 0; b < keys; ++b) {
        if (!seen(a, b)) continue;
        const std::size_t to = heads.at(head, a / block, b / block);
        if (!(heads.value[to] >= 0)) heads.value[to] = 0;
        heads.value[to] += value[at(b)];
        // Of a sum of block * block probabilities, none above 1.
        heads.bound[to] += bound[at(b)] + static_cast<double>(2 * block) * 0x1p-24 * value[at(b)];
      }
    }
  }
  // Blocks of which no pair is legal are marked, those whose groups alone see each other too.
  const auto legal = test_support::detail::legal_block_pairs(p.shape, o.rules.legal, o.block,
                                                             o.block);
  for (index_t head = 0; head < heads.sets; ++head) {
    for (std::size_t i = 0; i < legal.size(); ++i) {
      const std::size_t to = at(head) * legal.size() + i;
      if (legal[i] == 0) heads.value[to] = -test_support::infinity, heads.bound[to] = 0;
      if (legal[i] != 0 && !(heads.value[to] >= 0)) heads.value[to] = 0;
    }
  }
  return test_support::detail::join_heads(heads, p.shape.kv_heads, o.rules.reduce);
}

TEST(antidiagonal_block_scores, are_the_mass_of_blocks_by_the_formula) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (int round = 0; round < 24; ++round) {
    test_support::problem_extents e = random_extents(random);
    if (round % 4 == 0) e.q_len = e.kv_len = random.integer(200, 400);
    const attention_problem p(random, e);
    antidiagonal_options o;
    o.stride = random.pick<token_t>({1, 2, 4, 8, 16});
    o.block = o.stride * random.pick<token_t>({1, 3, 8});
    o.rules = test_support::random_rules(random);
    o.rules.soft_cap = 0;
    const bounded_scores want = expected_mass(p, o);
    for (sattn::context& ctx : contexts) {
      ASSERT_TRUE(within_bound(
          antidiagonal_block_scores(ctx, p.shape, p.q.view(), p.k.view(), o), want))
          << name_of(ctx) << ", stride " << o.stride << ", block " << o.block << ", " << e;
    }
  }
}

// Keys in many chunks, rows in many tiles.
TEST(antidiagonal_block_scores, of_long_sequences_are_by_the_formula) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (const index_t len : {1000, 1024}) {
    const attention_problem p(random, {.q_len = len, .kv_len = len, .head_dim = 8});
    const antidiagonal_options o{.stride = 4, .block = 64, .rules = {.reduce = head_reduce::none}};
    EXPECT_TRUE(within_bound(
        antidiagonal_block_scores(contexts.any(), p.shape, p.q.view(), p.k.view(), o),
        expected_mass(p, o)));
  }
}

TEST(antidiagonal_block_scores, have_the_same_bits_on_any_threads) {
  const seed_trace trace;
  random_source random;
  thread_contexts contexts;
  const attention_problem p(random, {.q_len = 300, .kv_len = 500, .q_heads = 4, .kv_heads = 2});
  for (const head_reduce reduce : test_support::all_reductions) {
    const antidiagonal_options o{.stride = 8, .block = 32, .rules = {.reduce = reduce}};
    const auto of = [&](sattn::context& ctx) {
      return antidiagonal_block_scores(ctx, p.shape, p.q.view(), p.k.view(), o).values;
    };
    const std::vector<float> want = of(contexts.serial());
    for (sattn::context& ctx : contexts) EXPECT_TRUE(bit_equal(of(ctx), want));
  }
}

// What is not stored chooses as what is.
TEST(select_antidiagonal_blocks, chooses_what_select_blocks_chooses_of_all_mass) {
  const seed_trace trace;
  random_source random;
  thread_contexts contexts;
  for (int round = 0; round < 24; ++round) {
    test_support::problem_extents e = random_extents(random);
    if (round % 4 == 0) e.q_len = e.kv_len = random.integer(200, 400);
    const attention_problem p(random, e);
    antidiagonal_options o;
    o.stride = random.pick<token_t>({1, 4, 16});
    o.block = o.stride * random.pick<token_t>({1, 3, 8});
    o.rules = test_support::random_rules(random);
    o.rules.soft_cap = 0;
    const sattn::selection rule{sattn::budget::coverage(0.7), {.first = 1, .diagonal = true}};
    sattn::context& serial = contexts.serial();
    const sattn::block_lists want = select_blocks(
        serial, p.shape, antidiagonal_block_scores(serial, p.shape, p.q.view(), p.k.view(), o),
        rule, o.block, o.block, o.rules.legal);
    for (sattn::context& ctx : contexts) {
      const sattn::block_lists got =
          select_antidiagonal_blocks(ctx, p.shape, p.q.view(), p.k.view(), rule, o);
      ASSERT_EQ(got.sets, want.sets);
      ASSERT_EQ(got.indptr, want.indptr) << round;
      ASSERT_EQ(got.indices, want.indices) << round;
    }
  }
}

TEST(antidiagonal_block_scores, refuse_what_does_not_fit) {
  random_source random;
  thread_contexts contexts;
  const attention_problem p(random, {.q_len = 4, .kv_len = 6});
  const auto error = [&](const antidiagonal_options& o) {
    return error_of([&] {
      antidiagonal_block_scores(contexts.serial(), p.shape, p.q.view(), p.k.view(), o);
    });
  };
  EXPECT_EQ(error({}), "");
  EXPECT_NE(error({.stride = 0}), "");
  EXPECT_NE(error({.stride = 3, .block = 128}), "");
  EXPECT_NE(error({.block = 0}), "");
  EXPECT_NE(error({.rules = {.soft_cap = 1.0f}}), "");
}

}  // namespace
