// SPDX-License-Identifier: Apache-2.0
#include <sattn/attention/merge.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <string>
#include <vector>

#include "support/patterns.hpp"
#include "support/problem.hpp"

namespace {

using namespace sattn;         // NOLINT(google-build-using-namespace)
using namespace test_support;  // NOLINT(google-build-using-namespace)

// A result as merge() takes it.
struct partial {
  owned_tensor out;
  owned_tensor lse;

  partial(index_t rows, index_t heads, index_t dim)
      : out(rows, heads, dim, memory_layout::nhd_padded),
        lse(rows, heads, 1, memory_layout::hnd_padded) {}
  attention_output view() { return {out.view(), lse.view()}; }
};

partial merged(partial a, partial b) {
  partial into = a;
  into.out.fill(quiet_nan);
  into.lse.fill(quiet_nan);
  merge(a.view(), b.view(), into.view());
  EXPECT_TRUE(into.out.padding_is_untouched());
  EXPECT_TRUE(into.lse.padding_is_untouched());
  return into;
}

partial attend_part(context& ctx, const attention_plan& plan, const attention_problem& p) {
  partial part(p.shape.q_len, p.shape.q_heads, p.v_dim);
  attend(ctx, plan, p.q.view(), p.kv(), part.view(), p.options());
  return part;
}

partial random_partial(random_source& random, index_t rows, double spread) {
  partial part(rows, 2, 5);
  part.out.fill_normal(random);
  part.lse.fill_normal(random, spread);
  return part;
}

// |a - b| within a few units of rounding of the largest value involved.
void expect_close(const partial& a, const partial& b) {
  const std::vector<float> out_a = a.out.packed();
  const std::vector<float> out_b = b.out.packed();
  const std::vector<float> lse_a = a.lse.packed();
  const std::vector<float> lse_b = b.lse.packed();
  constexpr double unit = 0x1p-24;
  for (std::size_t i = 0; i < lse_a.size(); ++i) {
    const double size = 1 + std::abs(double{lse_b[i]});
    ASSERT_NEAR(lse_a[i], lse_b[i], 16 * unit * size);
    // The weights are exponentials of differences of lse: their error grows with the lse.
    for (std::size_t c = i * 5; c < i * 5 + 5; ++c) {
      ASSERT_NEAR(out_a[c], out_b[c], 16 * unit * size * (1 + std::abs(double{out_b[c]})) * 4);
    }
  }
}

TEST(merge, of_two_parts_of_a_plan_is_the_whole) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (int round = 0; round < 20; ++round) {
    const attention_problem p(
        random,
        {.q_len = 40, .kv_len = 70, .q_heads = 4, .kv_heads = 2, .head_dim = 24, .v_dim = 5});
    // Keys of the first part at random; the second has the rest.
    token_lists first{64, {0, 0}, {}};
    token_lists second{64, {0, 0}, {}};
    for (token_t key = 0; key < 70; ++key) {
      (random.integer(0, 2) == 0 ? first : second).tokens.push_back(key);
    }
    first.indptr[1] = std::ssize(first.tokens);
    second.indptr[1] = std::ssize(second.tokens);
    for (context& ctx : contexts) {
      const attention_plan a = plan_prefill(ctx, p.shape, first);
      const attention_plan b = plan_prefill(ctx, p.shape, second);
      const partial whole = merged(attend_part(ctx, a, p), attend_part(ctx, b, p));
      reference::result want = expected(p, mask_of(plan_prefill(ctx, p.shape, dense{})));
      // The lse of a part is rounded before it weighs the part: a relative error of 2^-24 |lse|.
      const reference::result part_a = expected(p, mask_of(a));
      const reference::result part_b = expected(p, mask_of(b));
      for (std::size_t i = 0; i < want.out.size(); ++i) {
        const std::size_t row = i / 5;
        const double weights = part_a.lse_bound[row] + part_b.lse_bound[row] + 8 * 0x1p-24;
        want.out_bound[i] += part_a.out_bound[i] + part_b.out_bound[i] +
                             weights * (std::abs(part_a.out[i]) + std::abs(part_b.out[i]));
      }
      for (std::size_t i = 0; i < want.lse.size(); ++i) {
        want.lse_bound[i] += part_a.lse_bound[i] + part_b.lse_bound[i];
      }
      EXPECT_TRUE(within_bound(whole.out.packed(), whole.lse.packed(), want));
    }
  }
}

TEST(merge, is_commutative_and_associative_to_rounding) {
  const seed_trace trace;
  random_source random;
  for (const double spread : {0.1, 3.0, 100.0}) {
    const partial a = random_partial(random, 30, spread);
    const partial b = random_partial(random, 30, spread);
    const partial c = random_partial(random, 30, spread);
    expect_close(merged(a, b), merged(b, a));
    expect_close(merged(merged(a, b), c), merged(a, merged(b, c)));
  }
}

TEST(merge, an_empty_side_is_neutral_whatever_it_holds) {
  const seed_trace trace;
  random_source random;
  const partial full = random_partial(random, 10, 5);
  partial empty(10, 2, 5);
  empty.lse.fill(-infinity);
  for (const float rubbish : {0.0f, quiet_nan, infinity}) {
    empty.out.fill(rubbish);
    for (const partial& result : {merged(full, empty), merged(empty, full)}) {
      EXPECT_TRUE(test_support::bit_equal(result.out.packed(), full.out.packed()));
      EXPECT_TRUE(test_support::bit_equal(result.lse.packed(), full.lse.packed()));
    }
    const partial nothing = merged(empty, empty);
    for (const float x : nothing.out.packed()) EXPECT_EQ(x, 0.0f);
    for (const float x : nothing.lse.packed()) EXPECT_EQ(x, -infinity);
  }
}

TEST(merge, parts_that_differ_by_ten_thousand_neither_overflow_nor_mix) {
  const seed_trace trace;
  random_source random;
  partial low = random_partial(random, 4, 1);
  partial high = random_partial(random, 4, 1);
  for (const float level : {-1e4f, 0.0f, 1e4f, -3e38f}) {
    low.lse.fill(level);
    high.lse.fill(level + (level < -1e38f ? 1e38f : 1e4f));
    for (const partial& result : {merged(low, high), merged(high, low)}) {
      EXPECT_TRUE(test_support::bit_equal(result.out.packed(), high.out.packed()));
      EXPECT_TRUE(test_support::bit_equal(result.lse.packed(), high.lse.packed()));
    }
  }
}

TEST(merge, an_lse_of_zero_is_a_sum_of_one) {
  const seed_trace trace;
  random_source random;
  partial a = random_partial(random, 3, 1);
  partial b = random_partial(random, 3, 1);
  a.lse.fill(0);
  b.lse.fill(0);
  const partial both = merged(a, b);
  for (const float x : both.lse.packed()) EXPECT_FLOAT_EQ(x, std::log(2.0f));
  const std::vector<float> x = both.out.packed();
  for (std::size_t i = 0; i < x.size(); ++i) {
    EXPECT_EQ(x[i], 0.5f * a.out.packed()[i] + 0.5f * b.out.packed()[i]);
  }
}

TEST(merge, a_nan_stays_in_its_row_and_head) {
  const seed_trace trace;
  random_source random;
  partial a = random_partial(random, 3, 1);
  const partial b = random_partial(random, 3, 1);
  const partial clean = merged(a, b);
  *a.lse.row(1, 1) = quiet_nan;
  for (const partial& result : {merged(a, b), merged(b, a)}) {
    for (index_t row = 0; row < 3; ++row) {
      for (index_t head = 0; head < 2; ++head) {
        const bool poisoned = row == 1 && head == 1;
        EXPECT_EQ(std::isnan(*result.lse.row(row, head)), poisoned);
        for (index_t i = 0; i < 5; ++i) {
          EXPECT_EQ(std::isnan(result.out.row(row, head)[i]), poisoned);
        }
      }
    }
  }
  EXPECT_FALSE(std::isnan(*clean.lse.row(1, 1)));
}

TEST(merge, may_write_over_either_side) {
  const seed_trace trace;
  random_source random;
  partial a = random_partial(random, 6, 2);
  partial b = random_partial(random, 6, 2);
  const partial want = merged(a, b);
  partial into_a = a;
  merge(into_a.view(), b.view(), into_a.view());
  EXPECT_TRUE(test_support::bit_equal(into_a.out.packed(), want.out.packed()));
  EXPECT_TRUE(test_support::bit_equal(into_a.lse.packed(), want.lse.packed()));
  partial into_b = b;
  merge(a.view(), into_b.view(), into_b.view());
  EXPECT_TRUE(test_support::bit_equal(into_b.out.packed(), want.out.packed()));
  EXPECT_TRUE(test_support::bit_equal(into_b.lse.packed(), want.lse.packed()));
}

// With recall r = exp(lse of the selected - lse of all), the error of leaving keys out is
// (1 - r) (selected - left out), and the weights move by 2 (1 - r).
TEST(merge, recall_explains_the_error_of_leaving_keys_out) {
  const seed_trace trace;
  random_source random;
  context ctx(1);
  const attention_problem p(
      random, {.q_len = 20, .kv_len = 60, .q_heads = 2, .kv_heads = 1, .q_offset = 59});
  const attention_plan some = plan_prefill(ctx, p.shape, sink{25});
  const attention_plan rest =
      plan_prefill(ctx, p.shape, token_lists{64, {0, 35}, [] {
                                               std::vector<token_t> keys;
                                               for (token_t key = 25; key < 60; ++key)
                                                 keys.push_back(key);
                                               return keys;
                                             }()});
  const attention_result all = run(ctx, plan_prefill(ctx, p.shape, dense{}), p);
  const attention_result selected = run(ctx, some, p);
  const attention_result left_out = run(ctx, rest, p);
  for (std::size_t pair = 0; pair < all.lse.size(); ++pair) {
    const double recall = std::exp(double{selected.lse[pair]} - all.lse[pair]);
    ASSERT_GT(recall, 0);
    ASSERT_LT(recall, 1);
    for (std::size_t i = pair * 16; i < pair * 16 + 16; ++i) {
      EXPECT_NEAR(double{selected.out[i]} - all.out[i],
                  (1 - recall) * (double{selected.out[i]} - left_out.out[i]), 1e-5);
    }
  }
}

// The probabilities of all keys and those of the selected ones alone differ by 2 (1 - r) in sum,
// and outputs by no more than that times the largest value. The recall r is the library's, off by
// the errors of two lse.
TEST(merge, recall_is_the_distance_of_the_probabilities) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (int round = 0; round < 4 * pattern_kinds; ++round) {
    const attention_problem p(random, {.q_len = 30, .kv_len = 90, .q_heads = 4, .kv_heads = 2,
                                       .head_dim = 24, .v_dim = 5});
    const auto kind = static_cast<pattern_kind>(round % pattern_kinds);
    const pattern_case pattern = random_pattern(random, p.shape, kind);
    SCOPED_TRACE(pattern.name);
    const domain legal = random_domain(random, p.shape);
    const attention_plan some =
        round < 2 * pattern_kinds
            ? plan_prefill(contexts.any(), p.shape, pattern.pattern, {.legal = legal})
            : plan_decode(contexts.any(), p.shape, pattern.pattern,
                          {.legal = legal, .split_keys = 20});
    const attention_plan all = plan_prefill(contexts.any(), p.shape, dense{}, {.legal = legal});
    const mask_function selected = mask_of(some), seen = mask_of(all);
    const reference::result want_some = expected(p, selected), want_all = expected(p, seen);
    for (context& ctx : contexts) {
      const attention_result got_some = run(ctx, some, p), got_all = run(ctx, all, p);
      for (index_t pair = 0; pair < std::ssize(got_all.lse); ++pair) {
        if (got_some.lse[at(pair)] == -infinity) continue;  // no key, no probabilities
        const index_t row = pair / 4, head = pair % 4;
        const auto of = [&](const mask_function& mask) {
          return reference::probabilities(problem_of(p, mask), head, row);
        };
        const std::vector<double> part = of(selected), whole = of(seen);
        double distance = 0;
        for (std::size_t key = 0; key < 90; ++key) distance += std::abs(part[key] - whole[key]);
        const double recall = std::exp(double{got_some.lse[at(pair)]} - got_all.lse[at(pair)]);
        const double error =
            recall * std::expm1(want_some.lse_bound[at(pair)] + want_all.lse_bound[at(pair)]);
        ASSERT_NEAR(distance, 2 * (1 - recall), 2 * error + 1e-12) << name_of(ctx);
        double largest = 0;
        for (index_t key = 0; key < 90; ++key) {
          for (index_t i = 0; i < 5; ++i) {
            largest = std::max(largest, std::abs(double{p.v.row(key, head / 2)[i]}));
          }
        }
        for (index_t i = 5 * pair; i < 5 * pair + 5; ++i) {
          ASSERT_LE(std::abs(double{got_some.out[at(i)]} - got_all.out[at(i)]),
                    2 * (1 - recall + error) * largest + want_some.out_bound[at(i)] +
                        want_all.out_bound[at(i)]);
        }
      }
    }
  }
}

TEST(merge, refuses_what_does_not_fit_and_writes_nothing) {
  random_source random;
  partial a = random_partial(random, 3, 1);
  partial b = random_partial(random, 3, 1);
  partial into(3, 2, 5);
  partial taller(4, 2, 5);
  partial wider(3, 2, 6);
  attention_output without_lse = b.view();
  without_lse.lse = {};
  EXPECT_THROW(merge(a.view(), taller.view(), into.view()), shape_error);
  EXPECT_THROW(merge(wider.view(), b.view(), into.view()), shape_error);
  EXPECT_THROW(merge(a.view(), without_lse, into.view()), shape_error);
  attention_output with_mass = into.view();
  std::vector<float> mass(8);
  with_mass.mass = sattn::nhd(mass.data(), 4, 2, 1);
  EXPECT_THROW(merge(a.view(), b.view(), with_mass), shape_error);
  for (const float x : into.out.packed()) EXPECT_TRUE(std::isnan(x));
}

TEST(merge, a_sink_takes_its_share_and_leaves_the_lse) {
  const seed_trace trace;
  random_source random;
  partial a = random_partial(random, 4, 2);
  partial b = random_partial(random, 4, 2);
  const partial plain = merged(a, b);
  const std::vector<float> sinks = {0.5f, -infinity};
  partial into(4, 2, 5);
  merge(a.view(), b.view(), into.view(), sinks);
  EXPECT_TRUE(bit_equal(into.lse.packed(), plain.lse.packed()));
  const std::vector<float> out = into.out.packed();
  const std::vector<float> without = plain.out.packed();
  const std::vector<float> lse = plain.lse.packed();
  const std::vector<float> parts[] = {a.out.packed(), b.out.packed()};
  for (std::size_t i = 0; i < out.size(); ++i) {
    const std::size_t row = i / 5;  // [token, head]
    // Relative to what is added, which may cancel; a weight carries the rounding of its lse.
    const double size = std::abs(double{parts[0][i]}) + std::abs(double{parts[1][i]});
    const double keep = 1 / (1 + std::exp(double{sinks[row % 2]} - double{lse[row]}));
    EXPECT_NEAR(out[i], keep * double{without[i]},
                16 * 0x1p-24 * size * (1 + std::abs(double{lse[row]})));
  }
  const std::vector<float> all = {infinity, infinity};
  merge(a.view(), b.view(), into.view(), all);
  for (const float x : into.out.packed()) EXPECT_EQ(x, 0.0f);
}

TEST(merge, refuses_memory_that_overlaps_in_part) {
  random_source random;
  partial a = random_partial(random, 3, 1);
  partial b = random_partial(random, 3, 1);
  partial into(3, 2, 5);
  std::vector<float> memory(64, 1.0f);
  const auto out = sattn::nhd(memory.data(), 3, 2, 5);
  const auto shifted = sattn::nhd(memory.data() + 1, 3, 2, 5);
  const auto lse = sattn::nhd(memory.data() + 40, 3, 2, 1);
  const attention_output part{out, lse};
  EXPECT_NO_THROW(merge(part, b.view(), part));
  EXPECT_THROW(merge(part, b.view(), {shifted, into.view().lse}), shape_error);
  EXPECT_THROW(merge(a.view(), b.view(), {out, sattn::nhd(memory.data() + 3, 3, 2, 1)}),
               shape_error);
  EXPECT_THROW(merge(a.view(), part, {sattn::nhd(memory.data() + 31, 3, 2, 5), into.view().lse}),
               shape_error);
}

}  // namespace
