// SPDX-License-Identifier: Apache-2.0
#include <sattn/attention/attend.hpp>

#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "support/patterns.hpp"
#include "support/plans.hpp"
#include "support/problem.hpp"

namespace {

using namespace sattn;         // NOLINT(google-build-using-namespace)
using namespace test_support;  // NOLINT(google-build-using-namespace)

constexpr token_t no_split = std::numeric_limits<token_t>::max();

class decode_patterns : public ::testing::TestWithParam<int> {};

TEST_P(decode_patterns, match_the_reference_on_random_shapes_splits_and_options) {
  constexpr int rounds = 60;
  const seed_trace trace;
  random_source random(test_seed() + static_cast<std::uint64_t>(GetParam()));
  all_contexts contexts;
  for (int round = 0; round < rounds; ++round) {
    problem_extents extents = random_extents(random);
    extents.q_len = random.integer(1, 17);
    extents.kv_len = random.integer(0, 400);
    attention_problem p(random, extents);
    if (random.integer(0, 4) == 0) p.scale = random.pick({0.0f, -0.3f, 1.0f});
    if (random.integer(0, 4) == 0) p.soft_cap = random.pick({0.5f, 50.0f});
    for (index_t h = 0; h < p.shape.q_heads && round % 4 == 0; ++h) {
      p.sink_logits.push_back(random.pick({-infinity, infinity, 0.0f, 2.0f, 200.0f, -1e30f}));
    }
    const pattern_case pattern =
        random_pattern(random, p.shape, static_cast<pattern_kind>(GetParam()));
    const decode_options options{
        .legal = random_domain(random, p.shape),
        .split_keys = random.pick<token_t>({1, 3, 16, 64, 127, 128, 129, 1000, no_split})};
    SCOPED_TRACE(::testing::Message() << "round " << round << ": " << pattern.name << "; "
                                      << extents << "; split_keys " << options.split_keys);
    const attention_plan plan = plan_decode(contexts.any(), p.shape, pattern.pattern, options);
    plan.validate();
    ASSERT_TRUE(selects(plan, pattern.selected));
    ASSERT_TRUE(within_bound(contexts, plan, p));
  }
}

INSTANTIATE_TEST_SUITE_P(kinds, decode_patterns, ::testing::Range(0, pattern_kinds));

TEST(decode, takes_every_head_dim) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  const auto check = [&](index_t head_dim, index_t v_dim, index_t group) {
    const attention_problem p(random, {.q_len = 1,
                                       .kv_len = 37,
                                       .q_heads = group,
                                       .kv_heads = 1,
                                       .head_dim = head_dim,
                                       .v_dim = v_dim,
                                       .layout = memory_layout::hnd_padded});
    const attention_plan plan = plan_decode(contexts.any(), p.shape, dense{}, {.split_keys = 30});
    EXPECT_TRUE(within_bound(contexts, plan, p)) << head_dim << "/" << v_dim;
  };
  for (index_t d = 1; d <= 130; ++d) check(d, 131 - d, 1 + d % 8);
  for (const index_t d : {192, 256, 512, 576, 1024}) check(d, d, 5);
  check(192, 128, 16);
  check(1, 7, 1);
}

TEST(decode, takes_every_group_size_number_of_rows_and_tail_of_keys) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (const index_t group : {1, 2, 3, 4, 5, 7, 8, 16, 40, 128}) {
    for (const index_t kv_len : {0, 1, 2, 3, 4, 5, 7, 8, 9, 127, 128, 129, 131}) {
      const attention_problem p(random, {.q_len = group > 8 ? 1 : 1 + kv_len % 16,
                                         .kv_len = kv_len,
                                         .q_heads = 2 * group,
                                         .kv_heads = 2,
                                         .head_dim = 9,
                                         .v_dim = 5});
      const attention_plan plan = plan_decode(contexts.any(), p.shape, dense{}, {.split_keys = 64});
      EXPECT_TRUE(within_bound(contexts, plan, p)) << group << " heads, " << kv_len << " keys";
    }
  }
}

// Multi-head latent attention: one kv head, V is a part of K.
TEST(decode, values_may_be_a_part_of_the_keys) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  attention_problem p(
      random,
      {.q_len = 2, .kv_len = 150, .q_heads = 16, .kv_heads = 1, .head_dim = 576, .v_dim = 512});
  p.v_is_k = true;
  for (const token_t split_keys : {40, 4096}) {
    const attention_plan plan =
        plan_decode(contexts.any(), p.shape, dense{}, {.split_keys = split_keys});
    EXPECT_TRUE(within_bound(contexts, plan, p));
  }
  EXPECT_TRUE(within_bound(contexts, plan_prefill(contexts.any(), p.shape, dense{}), p));
}

TEST(decode, a_budget_of_all_keys_gives_the_bits_of_dense) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (const index_t kv_len : {0, 1, 130, 300}) {
    const attention_problem p(random, {.q_len = 1, .kv_len = kv_len, .q_heads = 8, .kv_heads = 2});
    token_lists all{1, {0, kv_len}, {}};
    for (index_t key = kv_len; key-- > 0;) all.tokens.push_back(static_cast<token_t>(key));
    const std::vector<std::uint8_t> mask(at(ceil_div(kv_len, 16)), 1);
    for (const token_t split_keys : {50, 4096}) {
      const decode_options options{.split_keys = split_keys};
      for (context& ctx : contexts) {
        const attention_result want = run(ctx, plan_decode(ctx, p.shape, dense{}, options), p);
        EXPECT_TRUE(bit_equal(run(ctx, plan_decode(ctx, p.shape, all, options), p), want));
        EXPECT_TRUE(bit_equal(
            run(ctx, plan_decode(ctx, p.shape, block_mask{16, 16, mask}, options), p), want));
        EXPECT_TRUE(
            bit_equal(run(ctx, plan_decode(ctx, p.shape, sliding_window{300}, options), p), want));
        EXPECT_TRUE(bit_equal(run(ctx, plan_decode(ctx, p.shape, sink{300}, options), p), want));
      }
    }
  }
}

TEST(decode, several_rows_at_once_give_the_bits_of_one_after_the_other) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  const attention_problem p(random, {.q_len = 12, .kv_len = 300, .q_heads = 6, .kv_heads = 2});
  for (const token_t split_keys : {40, 128, 4096}) {
    const decode_options options{.split_keys = split_keys};
    for (context& ctx : contexts) {
      const attention_result together = run(ctx, plan_decode(ctx, p.shape, dense{}, options), p);
      for (index_t row = 0; row < 12; ++row) {
        const index_t keys = 300 - 12 + row + 1;
        const attention_shape one{1, keys, 6, 2, static_cast<token_t>(keys - 1)};
        owned_tensor out(1, 6, 16);
        attend(ctx, plan_decode(ctx, one, dense{}, options), p.q.view().slice(row, row + 1),
               {p.k.view().slice(0, keys), p.v.view().slice(0, keys)}, out.view());
        EXPECT_TRUE(test_support::bit_equal(out.packed(), together.rows(p, row, row + 1))) << row;
      }
    }
  }
}

// Verifying drafted tokens, each with keys of its own, more than a chunk of them.
TEST(decode, rows_with_lists_of_their_own_give_the_bits_of_one_after_the_other) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (const index_t group : {1, 3, 4}) {
    const attention_problem p(
        random, {.q_len = 7, .kv_len = 500, .q_heads = 2 * group, .kv_heads = 2});
    const token_lists lists = alike_lists(random, p.shape, 120, 90);
    for (context& ctx : contexts) {
      const attention_result together = run(ctx, plan_decode(ctx, p.shape, lists), p);
      for (index_t row = 0; row < 7; ++row) {
        token_lists own{1, {0}, {}, 2};
        for (index_t h = 0; h < 2; ++h) {
          const std::size_t list = at(h * 7 + row);
          own.tokens.insert(own.tokens.end(), lists.tokens.begin() + lists.indptr[list],
                            lists.tokens.begin() + lists.indptr[list + 1]);
          own.indptr.push_back(std::ssize(own.tokens));
        }
        const attention_shape one{1, 500, 2 * group, 2, static_cast<token_t>(493 + row)};
        owned_tensor out(1, 2 * group, 16);
        attend(ctx, plan_decode(ctx, one, own), p.q.view().slice(row, row + 1), p.kv(), out.view());
        EXPECT_TRUE(test_support::bit_equal(out.packed(), together.rows(p, row, row + 1)))
            << "group " << group << ", row " << row;
      }
    }
  }
}

TEST(decode, every_size_of_split_and_the_tile_kernel_agree_with_one_reference) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  const attention_problem p(random, {.q_len = 7, .kv_len = 1000, .q_heads = 4, .kv_heads = 2});
  const domain window{.window = 700};
  const attention_plan prefill = plan_prefill(contexts.any(), p.shape, dense{}, {.legal = window});
  const reference::result want = expected(p, mask_of(prefill));
  EXPECT_TRUE(within_bound(contexts, prefill, p, want));
  for (const token_t split_keys : {1, 2, 37, 128, 256, 699, 700, 701, 10000}) {
    const attention_plan plan =
        plan_decode(contexts.any(), p.shape, dense{}, {.legal = window, .split_keys = split_keys});
    EXPECT_TRUE(within_bound(contexts, plan, p, want)) << split_keys;
  }
}

// Splits in which a row has no key: the first ones for late rows, the last ones for early rows.
TEST(decode, splits_without_a_key_for_some_rows_are_neutral) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  const attention_problem p(random, {.q_len = 16, .kv_len = 40, .q_heads = 3, .kv_heads = 3});
  for (const token_t window : {1, 2, 5, 12}) {
    for (const token_t split_keys : {1, 2, 4}) {
      const attention_plan plan =
          plan_decode(contexts.any(), p.shape, dense{},
                      {.legal = {.window = window}, .split_keys = split_keys});
      EXPECT_TRUE(within_bound(contexts, plan, p)) << window << " " << split_keys;
    }
  }
  const attention_problem early(
      random, {.q_len = 16, .kv_len = 8, .q_heads = 2, .kv_heads = 1, .q_offset = -10});
  for (const token_t split_keys : {1, 3, 64}) {
    const attention_plan plan =
        plan_decode(contexts.any(), early.shape, dense{}, {.split_keys = split_keys});
    EXPECT_TRUE(within_bound(contexts, plan, early)) << split_keys;
  }
}

TEST(decode, one_key_far_below_the_others_is_harmless_wherever_it_lies) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (const float logit : {-1e4f, 1e4f, -200.0f, 200.0f, -infinity}) {
    for (const index_t place : {0, 5, 63, 64, 127, 128, 199}) {
      attention_problem p(random, {.q_len = 1, .kv_len = 200, .head_dim = 1, .v_dim = 8});
      p.scale = 1.0f;
      p.q.fill(1);
      p.k.fill_row(place, 0, logit);
      const attention_plan plan = plan_decode(contexts.any(), p.shape, dense{}, {.split_keys = 64});
      EXPECT_TRUE(within_bound(contexts, plan, p)) << logit << " at " << place;
    }
  }
}

TEST(decode, a_sink_counts_once_however_many_splits_there_are) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  attention_problem p(random, {.q_len = 1, .kv_len = 90, .q_heads = 5, .kv_heads = 1});
  p.sink_logits = {3.0f, 0.0f, -infinity, infinity, 500.0f};
  for (const token_t split_keys : {1, 10, 1000}) {
    const attention_plan plan =
        plan_decode(contexts.any(), p.shape, dense{}, {.split_keys = split_keys});
    EXPECT_TRUE(within_bound(contexts, plan, p)) << split_keys;
  }
}

// Partial results combined as ranks of a cluster would: the maximum, then sums.
TEST(decode, reducing_maxima_then_sums_over_shards_equals_one_call) {
  const seed_trace trace;
  random_source random;
  context ctx(1);
  const attention_problem p(random, {.q_len = 1, .kv_len = 120, .q_heads = 4, .kv_heads = 2});
  const reference::result want = expected(p, {});
  struct shard {
    std::vector<float> out;
    std::vector<float> lse;
  };
  std::vector<shard> shards;
  double bound = 0;
  for (const auto& [begin, end] :
       {std::pair<index_t, index_t>{0, 70}, {70, 70}, {70, 71}, {71, 120}}) {
    const attention_shape part{1, end - begin, 4, 2, static_cast<token_t>(end - begin)};
    owned_tensor out(1, 4, 16);
    owned_tensor lse(1, 4, 1);
    attend(ctx, plan_decode(ctx, part, dense{}, {.legal = domain::full()}), p.q.view(),
           {p.k.view().slice(begin, end), p.v.view().slice(begin, end)}, {out.view(), lse.view()});
    shards.push_back({out.packed(), lse.packed()});
  }
  for (const double b : want.out_bound) bound = std::max(bound, b);
  for (std::size_t h = 0; h < 4; ++h) {
    double top = -std::numeric_limits<double>::infinity();
    for (const shard& s : shards) top = std::max(top, double{s.lse[h]});
    double sum = 0;
    for (const shard& s : shards) sum += std::exp(s.lse[h] - top);
    EXPECT_NEAR(top + std::log(sum), want.lse[h], 4 * want.lse_bound[h]);
    for (std::size_t i = 0; i < 16; ++i) {
      double x = 0;
      for (const shard& s : shards) x += std::exp(s.lse[h] - top) * s.out[h * 16 + i];
      EXPECT_NEAR(x / sum, want.out[h * 16 + i], 4 * bound);
    }
  }
}

TEST(decode, lists_of_each_row_and_lists_of_all_rows_select_what_they_say) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  const attention_problem p(
      random, {.q_len = 3, .kv_len = 64, .q_heads = 4, .kv_heads = 2, .q_offset = 63});
  // [kv_head][row] -> keys
  const token_lists own{1, {0, 3, 3, 5, 6, 9, 10}, {9, 1, 63, 4, 5, 60, 7, 8, 9, 0}, 2};
  const attention_plan plan = plan_decode(contexts.any(), p.shape, own, {.split_keys = 2});
  EXPECT_TRUE(within_bound(contexts, plan, p, expected(p, [&](index_t h, index_t row, index_t key) {
                             const std::size_t list = at(h / 2 * 3 + row);
                             for (index_t i = own.indptr[list]; i < own.indptr[list + 1]; ++i) {
                               if (own.tokens[at(i)] == key) return true;
                             }
                             return false;
                           })));
  const token_lists shared{3, {0, 4}, {50, 2, 3, 4}};
  const attention_plan one = plan_decode(contexts.any(), p.shape, shared, {.split_keys = 2});
  EXPECT_TRUE(within_bound(contexts, one, p, expected(p, [](index_t, index_t, index_t key) {
                             return key == 50 || (key >= 2 && key <= 4);
                           })));
}

}  // namespace
