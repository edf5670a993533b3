// SPDX-License-Identifier: Apache-2.0
#include <sattn/attention/attend.hpp>

#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "support/patterns.hpp"
#include "support/plans.hpp"
#include "support/problem.hpp"

namespace {

using namespace sattn;         // NOLINT(google-build-using-namespace)
using namespace test_support;  // NOLINT(google-build-using-namespace)

// ---- every pattern, every shape -----------------------------------------------------------------

// Scale, soft cap and sinks, each often absent.
void randomise_options(random_source& random, attention_problem& p) {
  if (random.integer(0, 3) == 0) p.scale = random.pick({0.0f, -0.3f, 1.0f, 0.07f});
  if (random.integer(0, 4) == 0) p.soft_cap = random.pick({0.5f, 5.0f, 50.0f});
  if (random.integer(0, 4) == 0) {
    for (index_t h = 0; h < p.shape.q_heads; ++h) {
      p.sink_logits.push_back(
          random.pick({-infinity, infinity, -2.0f, 0.0f, 0.7f, 3.0f, 200.0f, 1e30f, -1e30f}));
    }
  }
}

class patterns : public ::testing::TestWithParam<int> {};

TEST_P(patterns, match_the_reference_on_random_shapes_domains_and_options) {
  constexpr int rounds = 100;
  const seed_trace trace;
  random_source random(test_seed() + static_cast<std::uint64_t>(GetParam()));
  all_contexts contexts;
  for (int round = 0; round < rounds; ++round) {
    const problem_extents extents = random_extents(random);
    attention_problem p(random, extents);
    randomise_options(random, p);
    const pattern_case pattern =
        random_pattern(random, p.shape, static_cast<pattern_kind>(GetParam()));
    const plan_options options{.legal = random_domain(random, p.shape),
                               .tile_rows = random.pick<token_t>({0, 0, 1, 4, 8, 16, 23, 64, 128})};
    SCOPED_TRACE(::testing::Message() << "round " << round << ": " << pattern.name << "; "
                                      << extents << "; tile_rows " << options.tile_rows);
    const attention_plan plan = plan_prefill(contexts.any(), p.shape, pattern.pattern, options);
    plan.validate();
    ASSERT_TRUE(selects(plan, pattern.selected));
    ASSERT_TRUE(within_bound(contexts, plan, p));
  }
}

INSTANTIATE_TEST_SUITE_P(kinds, patterns, ::testing::Range(0, pattern_kinds));

TEST(attend, takes_every_head_dim) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  const auto check = [&](index_t head_dim, index_t v_dim) {
    const attention_problem p(random, {.q_len = 19,
                                       .kv_len = 37,
                                       .q_heads = 2,
                                       .kv_heads = 1,
                                       .head_dim = head_dim,
                                       .v_dim = v_dim,
                                       .layout = memory_layout::nhd_padded});
    const attention_plan tiles = plan_prefill(contexts.any(), p.shape, dense{});
    EXPECT_TRUE(within_bound(contexts, tiles, p)) << head_dim << "/" << v_dim;
  };
  for (index_t d = 1; d <= 130; ++d) check(d, 131 - d);
  for (const index_t d : {192, 256, 512, 576, 1024}) check(d, d);
  check(192, 128);
  check(576, 512);
  check(1, 7);
  check(7, 1);
}

// 40 keys for the rows of one tile: many lane layouts, and heads that do not fill them.
TEST(attend, takes_every_group_size_at_every_tile_height) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (const index_t group : {1, 2, 3, 4, 5, 7, 8, 16, 24}) {
    for (const token_t tile_rows : {1, 2, 3, 4, 5, 8, 9, 16, 17, 64}) {
      const attention_problem p(random, {.q_len = 18,
                                         .kv_len = 40,
                                         .q_heads = 2 * group,
                                         .kv_heads = 2,
                                         .head_dim = 5,
                                         .v_dim = 6});
      const attention_plan plan =
          plan_prefill(contexts.any(), p.shape, vertical_slash{{0, 7, 8}, {0, 1, 5, 20}},
                       {.tile_rows = tile_rows});
      EXPECT_TRUE(within_bound(contexts, plan, p)) << group << " heads, " << tile_rows << " rows";
    }
  }
}

// ---- encodings ----------------------------------------------------------------------------------

TEST(attend, exact_vertical_slash_is_dense_attention_under_its_mask) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  const attention_problem p(random, {.q_len = 150, .kv_len = 170, .q_heads = 4, .kv_heads = 2});
  const vertical_slash pattern{{0, 1, 60, 169}, {0, 1, 2, 17, 40, 41, 120, 165, 300}};
  const auto contains = [](const std::vector<token_t>& list, index_t x) {
    return std::find(list.begin(), list.end(), x) != list.end();
  };
  const reference::result want = expected(p, [&](index_t, index_t row, index_t key) {
    const index_t position = row + 20;
    return key <= position &&
           (contains(pattern.columns, key) || contains(pattern.distances, position - key));
  });
  for (const token_t tile_rows : {1, 4, 8, 16, 64, 128}) {
    const attention_plan plan =
        plan_prefill(contexts.any(), p.shape, pattern, {.tile_rows = tile_rows});
    EXPECT_TRUE(within_bound(contexts, plan, p, want)) << tile_rows;
  }
}

TEST(attend, covering_vertical_slash_is_dense_attention_under_the_hulls) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  const attention_problem p(random, {.q_len = 150, .kv_len = 170, .q_heads = 4, .kv_heads = 2});
  const vertical_slash pattern{{0, 1, 60, 169}, {0, 1, 2, 17, 40, 41, 120, 165, 300}};
  std::int64_t executed = 0;
  for (const token_t tile_rows : {1, 2, 4, 8, 16, 32, 64, 128}) {
    const plan_options exact{.tile_rows = tile_rows};
    const plan_options cover{.tile_rows = tile_rows, .rounding = rounding::cover};
    const attention_plan exact_plan = plan_prefill(contexts.any(), p.shape, pattern, exact);
    const attention_plan plan = plan_prefill(contexts.any(), p.shape, pattern, cover);
    const reference::result want = expected(p, [&](index_t, index_t row, index_t key) {
      const index_t position = row + 20;
      const index_t top = row / tile_rows * tile_rows;
      const index_t bottom = std::min<index_t>(top + tile_rows, 150) - 1;
      bool selected =
          std::find(pattern.columns.begin(), pattern.columns.end(), key) != pattern.columns.end();
      for (const index_t d : pattern.distances) {
        selected |= top + 20 - d <= key && key <= bottom + 20 - d;
      }
      return selected && key <= position;
    });
    ASSERT_TRUE(within_bound(contexts, plan, p, want)) << tile_rows;

    const plan_stats stats = plan.stats();
    EXPECT_GE(stats.selected, exact_plan.stats().selected);
    if (tile_rows == 1) {
      EXPECT_EQ(stats.selected, exact_plan.stats().selected);
    }
    EXPECT_GE(stats.selected, executed) << "a taller tile covers no fewer pairs";
    executed = stats.selected;
  }
}

TEST(attend, a_window_of_everything_is_dense_and_sinks_fill_what_a_window_leaves) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  context& ctx = contexts.any();
  const attention_problem p(random, {.q_len = 90, .kv_len = 90, .q_heads = 2, .kv_heads = 1});
  const attention_result want = run(ctx, plan_prefill(ctx, p.shape, dense{}), p);
  EXPECT_TRUE(bit_equal(run(ctx, plan_prefill(ctx, p.shape, sliding_window{90}), p), want));
  const attention_plan a_shape = plan_prefill(ctx, p.shape, sink{60} | sliding_window{30});
  EXPECT_TRUE(within_bound(contexts, a_shape, p, expected(p, [](index_t, index_t row, index_t key) {
                             return key <= row;
                           })));

  // A-shape: row i sees min(i + 1, window) recent keys and what is left of the sinks before them.
  const attention_plan plan = plan_prefill(ctx, p.shape, sink{7} | sliding_window{20});
  std::int64_t pairs = 0;
  for (index_t i = 0; i < 90; ++i) {
    pairs += std::min<index_t>(i + 1, 20) + std::min<index_t>(std::max<index_t>(i + 1 - 20, 0), 7);
  }
  EXPECT_EQ(plan.stats().selected, 2 * pairs);
}

TEST(attend, duplicate_and_unsorted_tokens_count_once) {
  const seed_trace trace;
  random_source random;
  context ctx(1);
  const attention_problem p(random, {.q_len = 1, .kv_len = 30});
  const attention_plan once = plan_prefill(ctx, p.shape, token_lists{1, {0, 4}, {3, 9, 20, 21}});
  const attention_plan twice =
      plan_prefill(ctx, p.shape, token_lists{1, {0, 7}, {21, 3, 9, 3, 20, 21, 3}});
  EXPECT_TRUE(bit_equal(run(ctx, once, p), run(ctx, twice, p)));
}

// Lists that overlap so much that whole tiles run, where they fill more than half of the lanes.
TEST(attend, row_lists_that_share_almost_all_keys_run_as_whole_tiles) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  token_lists lists{1, {0}, {}, 2};  // of seven keys in eight
  for (token_t row = 0; row < 2 * 70; ++row) {
    for (token_t key = 0; key < 310; ++key) {
      if ((key + row) % 8 != 0) lists.tokens.push_back(key);
    }
    lists.indptr.push_back(std::ssize(lists.tokens));
  }
  for (const index_t heads : {1, 2, 4, 5}) {
    for (const token_t tile_rows : {16, 8, 4}) {
      attention_problem p(random, {.q_len = 70, .kv_len = 310, .q_heads = 2 * heads, .kv_heads = 2,
                                   .head_dim = 24, .v_dim = 19});
      if (heads == 2) p.sink_logits.assign(at(2 * heads), 0.7f);
      const attention_plan plan =
          plan_prefill(contexts.any(), p.shape, lists,
                       {.legal = domain::full(), .tile_rows = tile_rows});
      // For the 16 rows of one of many heads at a time, dividing costs nothing.
      ASSERT_EQ(plan.has_dense_row_keys(), tile_rows < 16 || heads < 4);
      ASSERT_TRUE(within_bound(contexts, plan, p))
          << "heads " << heads << ", tiles of " << tile_rows;
    }
  }
}

// Keys that many neighbouring rows share go through the tile kernel, the rest row by row, and both
// meet in the output.
TEST(attend, row_lists_that_share_many_few_or_no_keys) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (const index_t heads : {1, 2, 4, 5}) {
    for (const auto& [common, own] : {std::pair{150, 0}, {150, 20}, {20, 150}, {5, 5}, {0, 40}}) {
      attention_problem p(random, {.q_len = 70, .kv_len = 310, .q_heads = 2 * heads, .kv_heads = 2,
                                   .head_dim = 24, .v_dim = 19});
      p.soft_cap = common == 20 ? 3.0f : 0.0f;
      if (own == 20) p.sink_logits.assign(at(2 * heads), 0.7f);
      const attention_plan plan =
          plan_prefill(contexts.any(), p.shape, alike_lists(random, p.shape, common, own));
      ASSERT_TRUE(within_bound(contexts, plan, p))
          << "heads " << heads << ", common " << common << ", own " << own;
    }
  }
}

// More keys of its own than one call of the row kernel takes.
TEST(attend, row_lists_longer_than_a_chunk) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (const index_t heads : {1, 4}) {
    const attention_problem p(random, {.q_len = 20, .kv_len = 4000, .q_heads = heads});
    const token_lists lists = alike_lists(random, p.shape, 3, 300);
    ASSERT_TRUE(within_bound(contexts, plan_prefill(contexts.any(), p.shape, lists), p));
    ASSERT_TRUE(within_bound(
        contexts, plan_decode(contexts.any(), p.shape, lists, {.split_keys = 3000}), p));
  }
}

// ---- options ------------------------------------------------------------------------------------

TEST(attend, a_sink_logit_equals_a_key_with_that_logit_and_value_zero) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  attention_problem p(random, {.q_len = 33, .kv_len = 33, .q_heads = 3, .kv_heads = 3});
  const attention_plan plan = plan_prefill(contexts.any(), p.shape, sliding_window{9});
  const reference::result plain = expected(p, mask_of(plan));
  p.sink_logits = {0.4f, -infinity, infinity};
  ASSERT_TRUE(within_bound(contexts, plan, p));
  for (context& ctx : contexts) {
    const attention_result got = run(ctx, plan, p);
    for (index_t row = 0; row < 33; ++row) {
      for (index_t h = 0; h < 3; ++h) {
        const double share =
            1 / (1 + std::exp(double{p.sink_logits[at(h)]} - plain.lse[at(row * 3 + h)]));
        const std::size_t i = at((row * 3 + h) * p.v_dim);
        EXPECT_NEAR(got.out[i], plain.out[i] * share, plain.out_bound[i] + 1e-6) << row << " " << h;
        if (h == 2) {
          EXPECT_EQ(got.out[i], 0.0f);
        }
      }
    }
  }
}

TEST(attend, no_sink_and_a_sink_of_minus_infinity_give_the_same_bits) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  attention_problem p(random, {.q_len = 20, .kv_len = 20});
  for (const index_t q_block : {1, 64}) {  // the row kernel and the tile kernel
    const std::vector<std::uint8_t> mask(at(ceil_div(20, q_block)), 1);
    const block_mask pattern{static_cast<token_t>(q_block), 64, mask};
    const attention_plan plan = plan_prefill(contexts.any(), p.shape, pattern | sink{1});
    for (context& ctx : contexts) {
      p.sink_logits.clear();
      const attention_result plain = run(ctx, plan, p);
      p.sink_logits = {-infinity};
      EXPECT_TRUE(bit_equal(run(ctx, plan, p), plain)) << name_of(ctx);
    }
  }
}

TEST(attend, a_huge_soft_cap_is_none_and_a_small_one_bounds_the_logits) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  attention_problem p(random,
                      {.q_len = 40, .kv_len = 60, .q_heads = 2, .kv_heads = 2, .head_dim = 64});
  const attention_plan plan = plan_prefill(contexts.any(), p.shape, dense{});
  const attention_plan row_plan = plan_decode(contexts.any(), p.shape, dense{});
  const reference::result uncapped = expected(p, mask_of(plan));
  p.soft_cap = 1e9f;  // |logit / cap| < 1e-8: tanh is the identity
  EXPECT_TRUE(within_bound(contexts, plan, p, uncapped));
  EXPECT_TRUE(within_bound(contexts, row_plan, p, uncapped));

  p.soft_cap = 0.25f;
  p.scale = 1000.0f;  // before the cap: every logit is then +-cap
  EXPECT_TRUE(within_bound(contexts, plan, p));
  EXPECT_TRUE(within_bound(contexts, row_plan, p));
  for (const float lse : run(contexts.any(), plan, p).lse) {
    EXPECT_LE(lse, 0.25f + std::log(60.0f) + 1e-5f);
    EXPECT_GE(lse, -0.25f + std::log(21.0f) - 1e-5f);
  }
}

// ---- algebra ------------------------------------------------------------------------------------

/// Adds the bounds of another result, of inputs that were rounded.
void widen(reference::result& want, const reference::result& rounded) {
  const auto add = [](std::vector<double>& bound, const std::vector<double>& more) {
    for (std::size_t i = 0; i < bound.size(); ++i) bound[i] += more[i];
  };
  add(want.out_bound, rounded.out_bound);
  add(want.lse_bound, rounded.lse_bound);
  add(want.mass_bound, rounded.mass_bound);
}

TEST(attend, adding_one_vector_to_all_keys_shifts_lse_alone) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  attention_problem p(random, {.q_len = 30, .kv_len = 50, .q_heads = 2, .kv_heads = 1});
  const attention_plan plan = plan_prefill(contexts.any(), p.shape, sink{3} | sliding_window{20});
  reference::result want = expected(p, mask_of(plan));
  std::vector<float> shift(16);
  for (float& x : shift) x = static_cast<float>(random.normal());
  for (index_t key = 0; key < 50; ++key) {
    for (index_t i = 0; i < 16; ++i) p.k.row(key, 0)[i] += shift[at(i)];
  }
  const reference::result shifted = expected(p, mask_of(plan));
  for (index_t row = 0; row < 30; ++row) {
    for (index_t h = 0; h < 2; ++h) {
      double logit = 0;
      for (index_t i = 0; i < 16; ++i) logit += 0.25 * p.q.row(row, h)[i] * shift[at(i)];
      want.lse[at(row * 2 + h)] += logit;
    }
  }
  // Rounding the shifted keys to float moves logits by a few times the bound's own unit.
  widen(want, shifted);
  EXPECT_TRUE(within_bound(contexts, plan, p, want));
}

// A column more, [q, 1 / scale] . [k, log w], adds log w to the logit of a key. A key of weight n
// then is n equal ones, and a common factor of all weights shifts the lse alone.
TEST(attend, a_weight_of_a_key_rides_in_one_more_column) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  constexpr index_t dim = 24, keys = 40, rows = 9;
  const std::optional<token_t> behind_all = 200;
  std::vector<index_t> copies(at(keys));
  index_t total = 0;
  for (index_t& n : copies) total += n = random.integer(1, 5);
  attention_problem weighted(random, {rows, keys, 4, 2, dim + 1, 16, behind_all});
  attention_problem repeated(random, {rows, total, 4, 2, dim, 16, behind_all});
  weighted.scale = repeated.scale = 0.25f;
  for (index_t row = 0; row < rows; ++row) {
    for (index_t h = 0; h < 4; ++h) {
      std::copy_n(weighted.q.row(row, h), dim, repeated.q.row(row, h));
      weighted.q.row(row, h)[dim] = 4;
    }
  }
  const auto all = [](index_t, index_t, index_t) { return true; };
  for (const float factor : {1.0f, 3.0f}) {
    index_t place = 0;
    for (index_t key = 0; key < keys; ++key) {
      for (index_t i = 0; i < copies[at(key)]; ++i, ++place) {
        for (index_t h = 0; h < 2; ++h) {
          std::copy_n(weighted.k.row(key, h), dim, repeated.k.row(place, h));
          std::copy_n(weighted.v.row(key, h), 16, repeated.v.row(place, h));
        }
      }
      const float weight = factor * static_cast<float>(copies[at(key)]);
      for (index_t h = 0; h < 2; ++h) weighted.k.row(key, h)[dim] = std::log(weight);
    }
    reference::result want = expected(repeated, all);
    // Rounding a logarithm moves a logit by less than the bound's own unit.
    const reference::result own = expected(weighted, all);
    for (std::size_t i = 0; i < want.out.size(); ++i) want.out_bound[i] += own.out_bound[i];
    for (std::size_t i = 0; i < want.lse.size(); ++i) {
      want.lse[i] += std::log(double{factor});
      want.lse_bound[i] += own.lse_bound[i];
    }
    for (const attention_plan& plan : {plan_prefill(contexts.any(), weighted.shape, dense{}),
                                       plan_decode(contexts.any(), weighted.shape, dense{})}) {
      for (context& ctx : contexts) {
        const attention_result got = run(ctx, plan, weighted);
        EXPECT_TRUE(within_bound(got.out, got.lse, want)) << name_of(ctx);
      }
    }
  }
}

// As a Hadamard transform or a shift of all positions under RoPE does.
TEST(attend, one_reflection_of_all_queries_and_keys_changes_nothing) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  attention_problem p(random, {.q_len = 30, .kv_len = 50, .q_heads = 2, .kv_heads = 1});
  const attention_plan plan = plan_prefill(contexts.any(), p.shape, sink{3} | sliding_window{20});
  reference::result want = expected(p, mask_of(plan));
  std::vector<double> normal(16);
  double square = 0;
  for (double& x : normal) {
    x = random.normal();
    square += x * x;
  }
  const auto reflect = [&](float* row) {
    double along = 0;
    for (std::size_t i = 0; i < 16; ++i) along += normal[i] * double{row[i]};
    for (std::size_t i = 0; i < 16; ++i) {
      row[i] = static_cast<float>(double{row[i]} - 2 * along / square * normal[i]);
    }
  };
  for (index_t t = 0; t < 50; ++t) {
    reflect(p.k.row(t, 0));
    for (index_t h = 0; h < 2 && t < 30; ++h) reflect(p.q.row(t, h));
  }
  const reference::result reflected = expected(p, mask_of(plan));
  // The reflected rows are rounded to float, which costs the logits no more than their sums do.
  widen(want, reflected);
  EXPECT_TRUE(within_bound(contexts, plan, p, want));
}

TEST(attend, values_of_one_give_one_and_outputs_stay_in_the_hull_of_the_values) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  attention_problem p(random, {.q_len = 70, .kv_len = 70, .q_heads = 2, .kv_heads = 2});
  const attention_plan plan = plan_prefill(contexts.any(), p.shape, sliding_window{11});
  for (context& ctx : contexts) {
    const attention_result got = run(ctx, plan, p);
    for (index_t row = 0; row < 70; ++row) {
      for (index_t i = 0; i < p.v_dim; ++i) {
        float low = infinity;
        float high = -infinity;
        for (index_t key = std::max<index_t>(row - 10, 0); key <= row; ++key) {
          low = std::min(low, p.v.row(key, 0)[i]);
          high = std::max(high, p.v.row(key, 0)[i]);
        }
        const float x = got.out[at(row * 2 * p.v_dim + i)];
        EXPECT_GE(x, low - 1e-5f);
        EXPECT_LE(x, high + 1e-5f);
      }
    }
  }
  p.v.fill(1);
  const reference::result want = expected(p, mask_of(plan));
  for (context& ctx : contexts) {
    const attention_result got = run(ctx, plan, p);
    for (std::size_t i = 0; i < got.out.size(); ++i) {
      ASSERT_NEAR(got.out[i], 1.0, want.out_bound[i]);
    }
  }
}

TEST(attend, the_order_of_the_selected_keys_does_not_matter) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  attention_problem p(random,
                      {.q_len = 20, .kv_len = 90, .q_heads = 2, .kv_heads = 1, .q_offset = 89});
  reference::result want = expected(p, {});
  for (index_t key = 0; key < 45; ++key) {
    for (auto* mass : {&want.mass, &want.mass_bound}) {
      std::swap_ranges(mass->begin() + key * 2, mass->begin() + key * 2 + 2,
                       mass->begin() + (89 - key) * 2);
    }
    std::swap_ranges(p.k.row(key, 0), p.k.row(key, 0) + 16, p.k.row(89 - key, 0));
    std::swap_ranges(p.v.row(key, 0), p.v.row(key, 0) + 16, p.v.row(89 - key, 0));
  }
  EXPECT_TRUE(within_bound(contexts, plan_prefill(contexts.any(), p.shape, dense{}), p, want));
}

TEST(attend, grouped_heads_equal_repeated_keys_and_values) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  const attention_problem grouped(random, {.q_len = 40, .kv_len = 50, .q_heads = 6, .kv_heads = 2});
  attention_problem repeated(random, {.q_len = 40, .kv_len = 50, .q_heads = 6, .kv_heads = 6});
  repeated.q = grouped.q;
  for (index_t key = 0; key < 50; ++key) {
    for (index_t h = 0; h < 6; ++h) {
      std::copy_n(grouped.k.row(key, h / 3), 16, repeated.k.row(key, h));
      std::copy_n(grouped.v.row(key, h / 3), 16, repeated.v.row(key, h));
    }
  }
  const auto pattern = vertical_slash{{0, 30}, {0, 1, 2, 9, 33}};
  const attention_plan plan = plan_prefill(contexts.any(), grouped.shape, pattern);
  const attention_plan plan_repeated = plan_prefill(contexts.any(), repeated.shape, pattern);
  for (context& ctx : contexts) {
    const attention_result one = run(ctx, plan, grouped);
    const attention_result other = run(ctx, plan_repeated, repeated);
    EXPECT_TRUE(test_support::bit_equal(one.out, other.out));
    EXPECT_TRUE(test_support::bit_equal(one.lse, other.lse));
  }
}

TEST(attend, zero_columns_added_to_a_head_change_nothing) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  attention_problem narrow(random, {.q_len = 25, .kv_len = 25, .head_dim = 37, .v_dim = 13});
  narrow.scale = 0.2f;
  attention_problem wide(random, {.q_len = 25, .kv_len = 25, .head_dim = 64, .v_dim = 32});
  wide.scale = 0.2f;
  wide.q.fill(0);
  wide.k.fill(0);
  wide.v.fill(0);
  for (index_t t = 0; t < 25; ++t) {
    std::copy_n(narrow.q.row(t, 0), 37, wide.q.row(t, 0));
    std::copy_n(narrow.k.row(t, 0), 37, wide.k.row(t, 0));
    std::copy_n(narrow.v.row(t, 0), 13, wide.v.row(t, 0));
  }
  const attention_plan plan = plan_prefill(contexts.any(), narrow.shape, sliding_window{8});
  const reference::result want = expected(narrow, mask_of(plan));
  for (context& ctx : contexts) {
    const attention_result got = run(ctx, plan, wide);
    std::vector<float> first;
    for (index_t t = 0; t < 25; ++t) {
      for (index_t i = 0; i < 32; ++i) {
        const float x = got.out[at(t * 32 + i)];
        if (i < 13) {
          first.push_back(x);
        } else {
          ASSERT_EQ(x, 0.0f);
        }
      }
    }
    EXPECT_TRUE(within_bound(first, got.lse, want));
  }
}

// ---- empty rows and extreme logits --------------------------------------------------------------

TEST(attend, rows_without_keys_are_zero_and_minus_infinity) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  // Rows 0 to 19 stand before every key; the first tile has none at all, the second only some.
  const attention_problem p(
      random, {.q_len = 40, .kv_len = 30, .q_heads = 4, .kv_heads = 2, .q_offset = -20});
  const std::vector<std::uint8_t> mask = {0, 1, 1};
  for (const any_pattern& pattern :
       {any_pattern(dense{}), any_pattern(sink{0}), any_pattern(sliding_window{3}),
        any_pattern(block_mask{16, 64, mask}), any_pattern(token_lists{40, {0, 0}, {}})}) {
    for (const token_t tile_rows : {1, 4, 16, 64}) {
      const attention_plan plan =
          plan_prefill(contexts.any(), p.shape, pattern, {.tile_rows = tile_rows});
      ASSERT_TRUE(within_bound(contexts, plan, p));
      for (context& ctx : contexts) {
        const attention_result got = run(ctx, plan, p);
        for (index_t i = 0; i < 20 * 4; ++i) EXPECT_EQ(got.lse[at(i)], -infinity);
        const auto zeros = got.rows(p, 0, 20);
        EXPECT_TRUE(bit_equal(zeros, std::vector<float>(zeros.size(), 0.0f)));
      }
    }
  }
}

// Logits as given, exactly: q = 1, k = logit, scale 1.
attention_problem with_logits(random_source& random, const std::vector<float>& logits,
                              index_t q_len) {
  attention_problem p(random, {.q_len = q_len,
                               .kv_len = std::ssize(logits),
                               .head_dim = 1,
                               .v_dim = 9,
                               .q_offset = static_cast<token_t>(logits.size())});
  p.scale = 1.0f;
  p.q.fill(1);
  for (index_t key = 0; key < std::ssize(logits); ++key) p.k.fill_row(key, 0, logits[at(key)]);
  return p;
}

// A finite stand-in for -inf (-5e4, -1e30) makes valid keys with lower logits vanish.
TEST(attend, logits_of_any_size_are_not_mistaken_for_masked_ones) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  const std::vector<std::vector<float>> cases = {
      {-1e5f, -1e5f + 1},         {-1e5f, -1e5f + 1, -infinity, -2e5f},
      {-1e30f, -1e30f},           {-3e38f, -3e38f, -3e38f},
      {-3e38f, -infinity},        {-infinity, -infinity},
      {1e4f, 1e4f - 1, -1e4f, 0}, {1e4f, 1e4f - 200},
      {3e38f, 3e38f, -3e38f},     {88.0f, -88.0f, 0, -104.0f, -87.4f},
  };
  for (const std::vector<float>& logits : cases) {
    for (const std::size_t copies : {1u, 100u, 300u}) {  // one chunk, one full, several
      std::vector<float> all;
      for (std::size_t i = 0; i < copies; ++i) {
        // Alternately reversed: the maximum comes first and last.
        if (i % 2 == 0) all.insert(all.end(), logits.begin(), logits.end());
        if (i % 2 == 1) all.insert(all.end(), logits.rbegin(), logits.rend());
      }
      const attention_problem p = with_logits(random, all, 3);
      const reference::result want = expected(p, {});
      SCOPED_TRACE(::testing::Message() << logits[0] << " and others, " << copies << " times");
      EXPECT_TRUE(within_bound(contexts, plan_prefill(contexts.any(), p.shape, dense{}), p, want));
      EXPECT_TRUE(within_bound(contexts, plan_decode(contexts.any(), p.shape, dense{}), p, want));
      EXPECT_TRUE(within_bound(
          contexts, plan_decode(contexts.any(), p.shape, dense{}, {.split_keys = 3}), p, want));
    }
  }
}

TEST(attend, masked_rows_beside_huge_negative_logits_stay_empty) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  attention_problem p = with_logits(random, {-1e30f, -1e30f, -3e38f, -3e38f}, 8);
  p.shape.q_offset = -4;  // four rows without a key, then one key more each
  for (const token_t tile_rows : {4, 8, 64}) {
    const attention_plan plan =
        plan_prefill(contexts.any(), p.shape, dense{}, {.tile_rows = tile_rows});
    EXPECT_TRUE(within_bound(contexts, plan, p));
  }
}

// ---- what a row depends on ----------------------------------------------------------------------

TEST(attend, keys_after_a_row_never_change_it) {
  const seed_trace trace;
  random_source random;
  context ctx(1);
  for (const bool sparse : {false, true}) {
    for (const token_t tile_rows : {1, 16, 128}) {
      attention_problem p(random, {.q_len = 60, .kv_len = 60});
      const plan_options options{.tile_rows = tile_rows};
      const attention_plan plan =
          sparse ? plan_prefill(ctx, p.shape, vertical_slash{{0, 20, 50}, {0, 3, 30}}, options)
                 : plan_prefill(ctx, p.shape, dense{}, options);
      const attention_result before = run(ctx, plan, p);
      for (const index_t cut : {59, 40, 33, 16, 1}) {
        for (index_t key = cut; key < 60; ++key) {
          p.k.fill_row(key, 0, 7);
          p.v.fill_row(key, 0, -5);
        }
        const attention_result after = run(ctx, plan, p);
        EXPECT_TRUE(bit_equal(after.rows(p, 0, cut), before.rows(p, 0, cut))) << cut;
      }
    }
  }
}

TEST(attend, every_selected_key_changes_its_row_and_no_other_key_does) {
  const seed_trace trace;
  random_source random;
  context ctx(1);
  attention_problem p(random, {.q_len = 24, .kv_len = 40});
  const attention_plan plan = plan_prefill(ctx, p.shape, vertical_slash{{2, 30}, {0, 5, 11}});
  const mask_function selected = mask_of(plan);
  const attention_result before = run(ctx, plan, p);
  for (index_t key = 0; key < 40; ++key) {
    attention_problem changed = p;
    for (index_t i = 0; i < p.v_dim; ++i) changed.v.row(key, 0)[i] += 1;
    const attention_result after = run(ctx, plan, changed);
    for (index_t row = 0; row < 24; ++row) {
      EXPECT_EQ(static_cast<bool>(test_support::bit_equal(after.rows(p, row, row + 1),
                                                          before.rows(p, row, row + 1))),
                !selected(0, row, key))
          << "row " << row << ", key " << key;
    }
  }
  EXPECT_FALSE(bit_equal(before, run(ctx, plan_prefill(ctx, p.shape, dense{}), p)))
      << "a sparse plan ran as a dense one";
}

TEST(attend, works_without_an_lse) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  const attention_problem p(random, {.q_len = 20, .kv_len = 20, .q_heads = 2, .kv_heads = 1});
  for (context& ctx : contexts) {
    for (const bool by_rows : {false, true}) {
      const attention_plan plan =
          by_rows ? plan_decode(ctx, p.shape, dense{}) : plan_prefill(ctx, p.shape, dense{});
      owned_tensor out(20, 2, 16);
      attend(ctx, plan, p.q.view(), p.kv(), out.view());
      EXPECT_TRUE(test_support::bit_equal(out.packed(), run(ctx, plan, p).out));
    }
  }
}

}  // namespace
