// SPDX-License-Identifier: Apache-2.0
#include <sattn/method/recall.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <sattn/method/vertical_slash.hpp>
#include <sattn/pattern/token_lists.hpp>
#include <vector>

#include "method/formulas.hpp"
#include "support/problem.hpp"
#include "support/stored.hpp"

namespace {

using namespace sattn;         // NOLINT(google-build-using-namespace)
using namespace test_support;  // NOLINT(google-build-using-namespace)

// From the probabilities themselves, and the bound by the outputs; values in any type.
TEST(recall, is_the_mass_of_the_selected_keys_and_bounds_the_error) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (const dtype type : {dtype::f32, dtype::i8}) {
    attention_problem p(random, {.q_len = 90, .kv_len = 130, .q_heads = 4, .kv_heads = 2,
                                 .head_dim = 16, .v_dim = 8});
    p.q.fill_normal(random, 2);
    const encoded_rows rows(p.v, type);
    const stored_tensor v(rows, storage_layout::paged, random);
    context& ctx = contexts.any();
    const attention_plan plan = plan_prefill(ctx, p.shape, sink{2} | sliding_window{20});
    const recall_report got = measure_recall(ctx, plan, p.q.view(), kv(p.k.view(), v.view));
    const mask_function mask = mask_of(plan);
    double sum = 0, least = 1, bound = 0;
    for (index_t h = 0; h < 4; ++h) {
      double largest = 0;
      for (index_t t = 0; t < 130; ++t) {
        for (index_t d = 0; d < 8; ++d) {
          largest = std::max(largest, std::abs(double{p.v.row(t, h / 2)[d]}));
        }
      }
      for (index_t row = 0; row < 90; ++row) {
        const formulas::numbers a = formulas::probabilities(p, h, row);
        double mass = 0;
        for (index_t key = 0; key < 130; ++key) mass += mask(h, row, key) ? a[at(key)] : 0;
        sum += mass;
        least = std::min(least, mass);
        bound = std::max(bound, 2 * (1 - mass) * largest);
      }
    }
    EXPECT_NEAR(got.mean, sum / 360, 1e-5);
    EXPECT_NEAR(got.least, least, 1e-5);
    EXPECT_NEAR(got.error_bound, bound, 1e-4);
    const attention_result sparse = run(ctx, plan, p);
    const attention_result full = run(ctx, plan_prefill(ctx, p.shape, dense{}), p);
    double worst = 0;
    for (std::size_t i = 0; i < full.out.size(); ++i) {
      worst = std::max(worst, std::abs(double{sparse.out[i]} - double{full.out[i]}));
    }
    EXPECT_GT(worst, 0.1);
    EXPECT_LE(worst, got.error_bound);
  }
}

TEST(recall, of_everything_is_one) {
  random_source random(1);
  all_contexts contexts;
  attention_problem p(random, {.q_len = 40, .kv_len = 30, .q_offset = -5});  // rows without keys
  const recall_report got = measure_recall(
      contexts.any(), plan_prefill(contexts.any(), p.shape, dense{}), p.q.view(), p.kv());
  EXPECT_EQ(got.mean, 1);
  EXPECT_EQ(got.least, 1);
  EXPECT_EQ(got.error_bound, 0);
  const recall_report nothing = measure_recall(
      contexts.any(), plan_prefill(contexts.any(), p.shape, sink{0}), p.q.view(), p.kv());
  EXPECT_EQ(nothing.least, 0);
}

// What is not a number must not read as perfect.
TEST(recall, of_nan_is_nan) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  const attention_problem fine(random, {.q_len = 20, .kv_len = 20, .q_heads = 4, .kv_heads = 2});
  context& ctx = contexts.any();
  const auto measure = [&](const attention_problem& p) {
    return measure_recall(ctx, plan_prefill(ctx, p.shape, sliding_window{5}), p.q.view(), p.kv());
  };
  EXPECT_GT(measure(fine).error_bound, 0);
  attention_problem p = fine;
  // One row of one head, neither the first nor the last.
  p.q.row(random.integer(1, 19), 1)[0] = std::nanf("");
  recall_report got = measure(p);
  EXPECT_TRUE(std::isnan(got.mean));
  EXPECT_TRUE(std::isnan(got.least));
  EXPECT_TRUE(std::isnan(got.error_bound));
  // A value that no row has selected but the first ones.
  p = fine;
  p.v.row(0, 0)[random.integer(0, 16)] = std::nanf("");
  got = measure(p);
  EXPECT_EQ(got.mean, measure(fine).mean);
  EXPECT_EQ(got.least, measure(fine).least);
  EXPECT_TRUE(std::isnan(got.error_bound));
}

TEST(method_report, says_how_many_keys_each_head_keeps) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  const attention_problem p(random, {.q_len = 300, .kv_len = 300, .q_heads = 4, .kv_heads = 2});
  using kind = minference_head::kind;
  const minference_heads settings{{{kind::vertical_slash, 40, 110},
                                   {kind::streaming, 5, 33},
                                   {kind::streaming, 2, 300},
                                   {kind::vertical_slash, 30, 100}}};
  const method_plan m = plan_prefill(contexts.any(), p.q.view(), p.kv(), settings);
  const method_report report = m.report();
  const mask_function mask = mask_of(m.plan);
  ASSERT_EQ(report.keys_of_head.size(), 4U);
  double total = 0;
  for (index_t h = 0; h < 4; ++h) {
    double keys = 0;
    for (index_t row = 0; row < 300; ++row) {
      for (index_t key = 0; key < 300; ++key) keys += mask(h, row, key) ? 1 : 0;
    }
    EXPECT_NEAR(report.keys_of_head[at(h)], keys / 300, 1e-9) << h;
    total += keys;
  }
  EXPECT_EQ(static_cast<double>(report.pairs.selected), total);
  EXPECT_GT(report.estimate_ms, 0);
  EXPECT_GT(report.plan_ms, 0);
  // Of heads that share a list and lanes, each its share.
  const attention_plan shared = plan_prefill(contexts.any(), p.shape, sliding_window{40});
  for (index_t h = 0; h < 4; ++h) {
    EXPECT_EQ(4 * shared.stats(h).selected, shared.stats().selected);
    EXPECT_EQ(4 * shared.stats(h).executed, shared.stats().executed);
    EXPECT_EQ(4 * shared.stats(h).legal, shared.stats().legal);
  }
}

}  // namespace
