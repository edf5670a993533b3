// SPDX-License-Identifier: Apache-2.0
#include <sattn/method/eviction.hpp>
#include <sattn/method/snapkv.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <sattn/attention/attend.hpp>
#include <sattn/kv/paged_cache.hpp>
#include <sattn/method/cache_method.hpp>
#include <sattn/method/recall.hpp>
#include <sattn/pattern/compose.hpp>
#include <string>
#include <vector>

#include "method/cases.hpp"
#include "method/formulas.hpp"
#include "support/errors.hpp"
#include "support/problem.hpp"
#include "support/scores.hpp"

namespace {

using namespace sattn;         // NOLINT(google-build-using-namespace)
using namespace test_support;  // NOLINT(google-build-using-namespace)
using formulas::choice;
using formulas::numbers;

constexpr index_t no_limit = std::numeric_limits<index_t>::max();

/// What a cache is cut behind: in even rounds a whole prompt, in odd ones its last chunk, some of
/// less rows than methods look at.
attention_problem prompt_or_chunk(random_source& random, int round, index_t len,
                                  index_t q_heads = 4) {
  if (round % 2 == 0) return prompt(random, len, q_heads, 2);
  const index_t rows = random.pick<index_t>({1, 20, random.integer(21, 99)});
  attention_problem p = decode_problem(random, len, rows, q_heads, 2);
  p.q.fill_normal(random, 1.5);
  return p;
}

TEST(smooth, is_pool1d) {
  const seed_trace trace;
  random_source random;
  for (const index_t n : {0, 1, 2, 7, 50}) {
    for (const index_t width : {1, 3, 5, 21}) {
      for (const pooling kind : {pooling::average, pooling::maximum}) {
        std::vector<float> x(at(n));
        for (float& e : x) e = static_cast<float>(random.normal());
        const bool maximum = kind == pooling::maximum;
        const numbers want = formulas::pool1d({x.begin(), x.end()}, width, maximum);
        numbers magnitudes;
        for (const float e : x) magnitudes.push_back(std::abs(double{e}));
        magnitudes = formulas::pool1d(magnitudes, width, maximum);
        smooth(x, width, kind);
        for (std::size_t i = 0; i < x.size(); ++i) {
          const double error =
              maximum ? 0 : formulas::rounding_of(static_cast<double>(width) + 1);
          EXPECT_NEAR(double{x[i]}, want[i], error * magnitudes[i]);
        }
      }
    }
  }
  std::vector<float> x(3);
  EXPECT_NE(error_of([&] { smooth(x, 4, pooling::average); }), "");
  EXPECT_NE(error_of([&] { smooth(x, 0, pooling::average); }), "");
}

std::vector<token_t> ascending(const formulas::units& chosen) {
  std::vector<token_t> list;
  for (const index_t i : chosen) list.push_back(static_cast<token_t>(i));
  return list;
}

// What code that looks with a window of 32 does, whatever the presets say.
snapkv_method published(index_t pool_width, pooling pool, bool pool_joined) {
  return {.last_queries = 32, .pool_width = pool_width, .pool = pool, .pool_joined = pool_joined,
          .keep = {.recent = 32}};
}

// Scores of one kv head up to the window: sums of its last rows, pooled for each query head before
// the mean of the group, or behind it.
numbers pooled_of_group(const attention_problem& p, index_t set, const snapkv_method& m) {
  const index_t group = p.shape.group_size();
  const bool maximum = m.pool == pooling::maximum;
  numbers mean(at(p.shape.kv_len - m.keep.recent), 0.0);
  for (index_t h = set * group; h < (set + 1) * group; ++h) {
    numbers sums = formulas::last_rows(p, h, m.last_queries).first;
    sums.resize(mean.size());
    const numbers of_head = m.pool_joined ? sums : formulas::pool1d(sums, m.pool_width, maximum);
    for (std::size_t i = 0; i < mean.size(); ++i) {
      mean[i] += of_head[i] / static_cast<double>(group);
    }
  }
  return m.pool_joined ? formulas::pool1d(mean, m.pool_width, maximum) : mean;
}

// How far such scores in f32 may be off, relative to themselves: sums of rows, keys and heads.
double error_of_pooled(const attention_problem& p, const snapkv_method& m) {
  return formulas::probability_error(p, m.last_queries + m.pool_width + p.shape.group_size() + 2);
}

// SnapKV as its code has it: sum over the window, pooled up to it, the window kept. A kv head takes
// the mean of its query heads.
TEST(snapkv, keeps_by_the_formula) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  int clear = 0;
  for (int round = 0; round < 30; ++round) {
    const index_t len = random.integer(100, 300), window = 32, capacity = 60;
    const attention_problem p = prompt_or_chunk(random, round, len);
    const keep_lists kept = snapkv(capacity).choose_kept(contexts.any(), inputs(p));
    const snapkv_method formula = published(5, pooling::average, false);
    const double error = error_of_pooled(p, formula);
    for (index_t set = 0; set < 2; ++set) {
      choice want =
          formulas::largest(pooled_of_group(p, set, formula), capacity - window, error);
      if (want.gap < 0) continue;
      ++clear;
      for (index_t key = len - window; key < len; ++key) want.chosen.insert(key);
      EXPECT_EQ(kept[at(set)], ascending(want.chosen));
    }
  }
  EXPECT_GT(clear, 30);
}

// The Sparse Frontier: mean over the group, then the sum, pooled with the window; 4 first and 128
// last keys are +inf.
numbers frontier_scores(const attention_problem& p, index_t set, index_t window, bool maxima) {
  numbers scores(at(p.shape.kv_len), 0.0);
  for (index_t row = std::max<index_t>(p.shape.q_len - window, 0); row < p.shape.q_len; ++row) {
    numbers of_row(scores.size(), 0.0);
    for (index_t h = 2 * set; h < 2 * set + 2; ++h) {
      const numbers a = formulas::probabilities(p, h, row);
      for (std::size_t i = 0; i < a.size(); ++i) {
        of_row[i] = maxima ? std::max(of_row[i], a[i]) : of_row[i] + a[i] / 2;
      }
    }
    for (std::size_t i = 0; i < scores.size(); ++i) {
      scores[i] = maxima ? std::max(scores[i], of_row[i]) : scores[i] + of_row[i];
    }
  }
  scores = formulas::pool1d(scores, 21, false);
  for (index_t i = 0; i < 4; ++i) scores[at(i)] = formulas::infinite;
  std::fill(scores.end() - 128, scores.end(), formulas::infinite);
  return scores;
}

// How far they may be off in f32, relative to themselves: maxima are not summed but pooled.
double error_of_frontier(const attention_problem& p, index_t window, bool maxima) {
  return formulas::probability_error(p, (maxima ? 0 : window) + 21 + p.shape.group_size() + 2);
}

TEST(sf_snapkv, keeps_by_the_formula) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  int clear = 0;
  for (int round = 0; round < 30; ++round) {
    const attention_problem p = prompt_or_chunk(random, round, random.integer(200, 300));
    const index_t capacity = random.integer(140, 180);
    const keep_lists kept = sf_snapkv(capacity, 100).choose_kept(contexts.any(), inputs(p));
    for (index_t set = 0; set < 2; ++set) {
      const choice want = formulas::largest(frontier_scores(p, set, 100, false), capacity,
                                            error_of_frontier(p, 100, false));
      if (want.gap < 0) continue;
      ++clear;
      EXPECT_EQ(kept[at(set)], ascending(want.chosen));
    }
  }
  EXPECT_GT(clear, 28);
}

// Each head keeps its best max(int(B * 0.2), protected); the rest of H * B is of all heads.
TEST(sf_ada_snapkv, keeps_by_the_formula_and_spends_the_budget_exactly) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  int clear = 0;
  for (int round = 0; round < 40; ++round) {
    const attention_problem p = prompt_or_chunk(random, round, random.integer(200, 300));
    const index_t capacity = random.integer(140, 180);
    const keep_lists kept = sf_ada_snapkv(capacity, 100).choose_kept(contexts.any(), inputs(p));
    ASSERT_EQ(std::ssize(kept[0]) + std::ssize(kept[1]), 2 * capacity);
    const index_t floor = std::max<index_t>(capacity / 5, 132);
    std::vector<formulas::units> want(2);
    numbers rest;
    const double error = error_of_frontier(p, 100, true);
    double gap = formulas::infinite;
    for (index_t set = 0; set < 2; ++set) {
      numbers scores = frontier_scores(p, set, 100, true);
      const choice best = formulas::largest(scores, floor, error);
      gap = std::min(gap, best.gap);
      want[at(set)] = best.chosen;
      for (const index_t i : best.chosen) scores[at(i)] = -formulas::infinite;
      rest.insert(rest.end(), scores.begin(), scores.end());
    }
    const choice more = formulas::largest(rest, 2 * (capacity - floor), error);
    if (std::min(gap, more.gap) < 0) continue;
    ++clear;
    for (const index_t i : more.chosen) {
      want[at(i / p.shape.kv_len)].insert(i % p.shape.kv_len);
    }
    for (index_t set = 0; set < 2; ++set) EXPECT_EQ(kept[at(set)], ascending(want[at(set)]));
  }
  EXPECT_GT(clear, 18);
}

// A floor above what is protected: of smaller windows than the preset's.
TEST(sf_ada_snapkv, keeps_a_floor_of_every_head) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  int above_floor = 0;
  for (int round = 0; round < 10; ++round) {
    attention_problem p = prompt(random, 200);
    for (index_t t = 0; t < 200; ++t) {  // the first kv head has one key that takes all
      for (index_t d = 0; d < 16; ++d) p.k.row(t, 0)[d] *= t == 50 ? 8.0f : 0.01f;
    }
    snapkv_method m = sf_ada_snapkv(50, 20, 0.4);
    m.pool_width = 1;
    m.keep = {.first = 1, .recent = 2};
    m.adaptive = adaptive_budget{.floor = 20};
    const keep_lists kept = m.choose_kept(contexts.any(), inputs(p));
    EXPECT_EQ(std::ssize(kept[0]) + std::ssize(kept[1]), 100);
    EXPECT_GE(std::ssize(kept[0]), 20);
    EXPECT_GE(std::ssize(kept[1]), 20);
    above_floor += std::ssize(kept[0]) > 20 && std::ssize(kept[1]) > 20 ? 1 : 0;
    m.adaptive->floor = 0;
    const keep_lists free = m.choose_kept(contexts.any(), inputs(p));
    EXPECT_LE(std::min(std::ssize(free[0]), std::ssize(free[1])),
              std::min(std::ssize(kept[0]), std::ssize(kept[1])));
  }
  EXPECT_LT(above_floor, 10);
}

// Neighbours often have the same maximum, in f32 as well: of these the first ones are chosen. The
// gap is that to the nearest other score.
choice largest_of_maxima(const numbers& scores, index_t k, double error) {
  choice result = formulas::largest(scores, k);
  if (k == 0 || k >= std::ssize(scores)) return result;
  double last = formulas::infinite;
  for (const index_t i : result.chosen) last = std::min(last, scores[at(i)]);
  for (const double x : scores) {
    if (x != last) result.gap = std::min(result.gap, std::abs(x - last) - error * (x + last));
  }
  if (result.gap == 0) result.gap = formulas::infinite;  // a tie, and all others far from it
  return result;
}

// Ada-KV's code: maxima of 7 of the mean of a group's sums up to the window, the best of all heads,
// then each head's count moved half of the way to the mean and its best keys.
TEST(ada_snapkv, keeps_by_the_formula) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  int clear[4] = {};
  for (int round = 0; round < 60; ++round) {
    const index_t group = 1 + round / 2 % 3;
    const index_t len = random.integer(100, 160), window = 32, capacity = 50;
    const attention_problem p = prompt_or_chunk(random, round, len, 2 * group);
    const keep_lists kept = ada_snapkv(capacity).choose_kept(contexts.any(), inputs(p));
    const snapkv_method formula = published(7, pooling::maximum, true);
    const double error = error_of_pooled(p, formula);
    const index_t prefix = len - window;
    numbers all;
    for (index_t h = 0; h < 2; ++h) {
      const numbers of_head = pooled_of_group(p, h, formula);
      all.insert(all.end(), of_head.begin(), of_head.end());
    }
    const choice global = largest_of_maxima(all, 2 * (capacity - window), error);
    index_t counts[2] = {0, 0};
    for (const index_t i : global.chosen) ++counts[i / prefix];
    // Of two halves the first is rounded up.
    const index_t first = (counts[0] + 18 + 1) / 2;
    const index_t counts_kept[2] = {first, 36 - first};
    double gap = global.gap;
    std::vector<std::vector<token_t>> want(2);
    for (index_t h = 0; h < 2; ++h) {
      const numbers of_head(all.begin() + h * prefix, all.begin() + (h + 1) * prefix);
      choice best = largest_of_maxima(of_head, counts_kept[h], error);
      gap = std::min(gap, best.gap);
      for (index_t key = prefix; key < len; ++key) best.chosen.insert(key);
      want[at(h)] = ascending(best.chosen);
    }
    if (gap < 0) continue;
    ++clear[group];
    EXPECT_EQ(kept, want) << counts[0] << " " << counts[1] << ", group of " << group;
  }
  for (const index_t group : {1, 2, 3}) EXPECT_GT(clear[group], 3) << group;
}

// Averages and the mean of a group commute; maxima and the mean do not.
TEST(snapkv_method, the_order_of_pooling_and_mean_matters_for_maxima_alone) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  int clear = 0, differ = 0;
  for (int round = 0; round < 12; ++round) {
    const attention_problem p = prompt(random, random.integer(100, 160), 6, 2);
    for (const pooling kind : {pooling::average, pooling::maximum}) {
      keep_lists kept[2];
      std::vector<choice> want[2];
      for (const bool joined : {false, true}) {
        snapkv_method m = snapkv(60, 32, 7);
        m.pool = kind;
        m.pool_joined = joined;
        kept[joined] = m.choose_kept(contexts.any(), inputs(p));
        for (index_t set = 0; set < 2; ++set) {
          const numbers scores = pooled_of_group(p, set, m);
          want[joined].push_back(largest_of_maxima(scores, 28, error_of_pooled(p, m)));
          for (index_t key = p.shape.kv_len - 32; key < p.shape.kv_len; ++key) {
            want[joined].back().chosen.insert(key);
          }
        }
      }
      for (std::size_t set = 0; set < 2; ++set) {
        if (std::min(want[0][set].gap, want[1][set].gap) < 0) continue;
        ++clear;
        EXPECT_EQ(kept[0][set], ascending(want[0][set].chosen));
        EXPECT_EQ(kept[1][set], ascending(want[1][set].chosen));
        if (kind == pooling::average) {
          EXPECT_EQ(kept[0][set], kept[1][set]);
        } else {
          differ += kept[0][set] != kept[1][set] ? 1 : 0;
        }
      }
    }
  }
  EXPECT_GT(clear, 20);
  EXPECT_GT(differ, 5);
}

TEST(ada_snapkv, spends_the_budget_exactly_whatever_is_split_evenly) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (int round = 0; round < 10; ++round) {
    const attention_problem p = prompt(random, random.integer(100, 200), 8, 4);
    const index_t capacity = random.integer(33, 90);
    for (const double share : {0.0, 0.5, 1.0}) {
      const keep_lists kept =
          ada_snapkv(capacity, 32, share).choose_kept(contexts.any(), inputs(p));
      index_t total = 0;
      for (const auto& list : kept) {
        total += std::ssize(list);
        for (token_t key = static_cast<token_t>(p.shape.kv_len) - 32; key < p.shape.kv_len; ++key) {
          EXPECT_TRUE(std::binary_search(list.begin(), list.end(), key));
        }
        if (share == 1.0) {
          EXPECT_EQ(std::ssize(list), capacity);
        }
      }
      EXPECT_EQ(total, 4 * capacity) << share;
    }
  }
}

// KVCache-Factory's integers: 8 layers, 120 + 8 of 1,000 keys, beta 20.
TEST(pyramid, follows_the_published_schedule) {
  // middle 120, least 6, most 234, steps of (234 - 6) / 7 = 32.
  for (index_t layer = 0; layer < 8; ++layer) {
    EXPECT_EQ(pyramid_capacity(layer, 8, 1000, 128, 8), 234 - 32 * layer + 8);
  }
  // A prompt so short that the first layer would keep more than there is: 234 >= 230 - 8 ...
  EXPECT_EQ(pyramid_capacity(0, 8, 241, 128, 8), 233 + 8);
  EXPECT_EQ(pyramid_capacity(7, 8, 241, 128, 8), 233 - 7 * ((233 - 7) / 7) + 8);
  EXPECT_EQ(pyramid_capacity(3, 8, 100, 128, 8), 100);   // ... nothing is dropped
  EXPECT_EQ(pyramid_capacity(3, 8, 239, 128, 8), 128);   // ... all layers are alike
  EXPECT_EQ(pyramid_capacity(0, 1, 1000, 128, 8), 128);
  EXPECT_NE(error_of([] { pyramid_capacity(8, 8, 1000, 128, 8); }), "");
  EXPECT_NE(error_of([] { pyramid_capacity(0, 8, 1000, 7, 8); }), "");
  EXPECT_EQ(pyramid_capacity(0, 8, 7, 7, 8), 7);  // ... all is kept
  EXPECT_NE(error_of([] { pyramid_capacity(0, 8, -10, 128, 8); }), "");
  EXPECT_NE(error_of([] { pyramid_capacity(0, 8, 10, 128, -8); }), "");
  EXPECT_NE(error_of([] { pyramid_capacity(0, 8, 10, 128, 8, {.beta = 0}); }), "");
  // beta 10: least 12, most 228, steps of 216 / 7 = 30.
  const snapkv_method m = pyramid(6, 8, 1000, 128, 8, {.beta = 10});
  EXPECT_EQ(m.capacity, 228 - 6 * 30 + 8);
  EXPECT_EQ(m.last_queries, 8);
}

TEST(pyramid, exact_steps_add_up_and_stay_within_a_key_of_the_line) {
  for (index_t layers = 2; layers < 70; ++layers) {
    for (const index_t len : {1001, 1999, 2050, 9000}) {
      index_t all = 0;
      for (index_t layer = 0; layer < layers; ++layer) {
        const index_t kept =
            pyramid_capacity(layer, layers, len, 1000, 31,
                             {.steps = sattn::pyramid_steps::exact});
        all += kept;
        if (len < 2 * 969) continue;
        const double most = std::min<double>(2 * 969 - 48, static_cast<double>(len - 31));
        const double share = static_cast<double>(layer) / static_cast<double>(layers - 1);
        EXPECT_NEAR(static_cast<double>(kept), most + share * (2 * 969 - 2 * most) + 31, 1);
      }
      EXPECT_EQ(all, layers * 1000) << layers << " layers, " << len << " keys";
    }
  }
}

// Each layer's cache keeps what the schedule gives its layer, of its own keys; what integer steps
// lose, the sum over the layers has too much, and nothing else.
TEST(pyramid, spends_its_schedule_over_the_caches_of_a_model) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  context& ctx = contexts.any();
  constexpr index_t capacity = 128;
  constexpr token_t window = 8;
  struct model {
    index_t layers, len, most, least;
  };
  for (const model& m : {model{4, 300, 234, 6}, model{8, 300, 234, 6}, model{5, 240, 232, 8},
                         model{8, 239, 120, 120}, model{3, 128, 120, 120}}) {
    SCOPED_TRACE(std::to_string(m.layers) + " layers, " + std::to_string(m.len) + " keys");
    index_t kept_of_all = 0, previous = m.len;
    for (index_t layer = 0; layer < m.layers; ++layer) {
      const attention_problem p = prompt(random, m.len + 1);
      const attention_problem past = part_of(p, 0, m.len, m.len);
      paged_kv_cache<float> cache({.kv_heads = 2, .head_dim = 16, .v_dim = 8, .page_size = 16,
                                   .capacity = 300});
      cache.append(past.k.view(), past.v.view());
      const keep_lists kept =
          pyramid(layer, m.layers, m.len, capacity, window).choose_kept(ctx, inputs(past));
      cache.evict(kept);
      const index_t budget =
          window + m.most - layer * ((m.most - m.least) / (m.layers - 1));
      EXPECT_LE(budget, previous);
      previous = budget;
      for (index_t h = 0; h < 2; ++h) {
        ASSERT_EQ(cache.tokens(h), budget);
        kept_of_all += cache.tokens(h);
        for (token_t i = 0; i < window; ++i) {
          EXPECT_EQ(*(kept[at(h)].rbegin() + i), m.len - 1 - i);
        }
      }
      // The next token attends to these keys alone.
      const attention_problem next = part_of(p, m.len, 1, m.len);
      const attention_plan plan = plan_decode(ctx, next.shape, columns_of(kept));
      EXPECT_TRUE(within_bound(contexts, plan, next));
      std::vector<float> out(4 * 8), lse(4);
      attend(ctx, plan_decode(ctx, shape_of(next.q.view(), cache.view()), dense{}), next.q.view(),
             cache.view(), {nhd(out.data(), 1, 4, 8), nhd(lse.data(), 1, 4, 1)});
      const attention_result want = run(ctx, plan, next);
      EXPECT_TRUE(bit_equal(out, want.out));
      EXPECT_TRUE(bit_equal(lse, want.lse));
    }
    const index_t lost = m.layers * ((m.most - m.least) % (m.layers - 1)) / 2;
    EXPECT_EQ(kept_of_all, 2 * (m.layers * capacity + lost));
  }
}

// acc_j += the attention of all rows; heaviest and most recent stay, with their sums.
TEST(h2o, follows_a_cache_through_evictions) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  context& ctx = contexts.any();
  const attention_problem p = prompt(random, 90);
  paged_kv_cache<float> cache({.kv_heads = 2, .head_dim = 16, .v_dim = 8, .page_size = 8,
                               .capacity = 200});
  attention_history history(2);
  const h2o method{20, 10};
  std::vector<numbers> sums(2);                   // by place in the cache
  std::vector<std::vector<index_t>> original(2);  // token of each place
  double errors[2] = {0, 0};                      // of sums in f32, relative to themselves
  int clear = 0;
  for (index_t begin = 0; begin < 90; begin += 45) {
    cache.append(p.k.view().slice(begin, begin + 45), p.v.view().slice(begin, begin + 45));
    choice want[2];
    for (index_t h = 0; h < 2; ++h) {
      for (index_t t = begin; t < begin + 45; ++t) original[at(h)].push_back(t);
      const index_t keys = cache.tokens(h);
      ASSERT_EQ(keys, std::ssize(original[at(h)]));
      const attention_shape shape{45, keys, 2, 1, static_cast<token_t>(keys - 45)};
      std::vector<float> out(45 * 2 * 8), lse(45 * 2), mass(at(keys));
      const auto q = p.q.view().slice(begin, begin + 45).head_slice(2 * h, 2 * h + 2);
      attend(ctx, plan_prefill(ctx, shape, dense{}), q, cache.view(h),
             {nhd(out.data(), 45, 2, 8), nhd(lse.data(), 45, 2, 1), nhd(mass.data(), keys, 1, 1)});
      history.add(h, nhd(mass.data(), keys, 1, 1));
      // The same by the formula.
      attention_problem now(random, {.q_len = 45, .kv_len = keys, .q_heads = 2, .kv_heads = 1,
                                     .head_dim = 16, .v_dim = 8});
      for (index_t t = 0; t < keys; ++t) {
        std::copy_n(p.k.row(original[at(h)][at(t)], h), 16, now.k.row(t, 0));
      }
      for (index_t r = 0; r < 45; ++r) {
        for (index_t g = 0; g < 2; ++g) {
          std::copy_n(p.q.row(begin + r, 2 * h + g), 16, now.q.row(r, g));
        }
      }
      sums[at(h)].resize(at(keys), 0.0);
      for (index_t g = 0; g < 2; ++g) {
        const numbers columns = formulas::last_rows(now, g, 45).first;
        for (std::size_t i = 0; i < columns.size(); ++i) sums[at(h)][i] += columns[i];
      }
      if (begin == 0) {
        EXPECT_NEAR(std::accumulate(sums[at(h)].begin(), sums[at(h)].end(), 0.0), 90,
                    90 * 0x1p-52 * static_cast<double>(4 * keys + 90));  // roundings of double
      }
      // 45 rows of two heads, and what was there.
      errors[h] = std::max(errors[h], formulas::probability_error(now, 2 * 45 + 2));
      for (std::size_t i = 0; i < sums[at(h)].size(); ++i) {
        EXPECT_NEAR(double{history.of_head(h)[i]}, sums[at(h)][i], errors[h] * sums[at(h)][i]);
      }
      numbers scores = sums[at(h)];
      for (index_t i = keys - 10; i < keys; ++i) scores[at(i)] = formulas::infinite;
      want[h] = formulas::largest(scores, 30, errors[h]);
    }
    const keep_lists kept = method.choose_kept(history);
    cache.evict(kept);
    history.evict(kept);
    for (index_t h = 0; h < 2; ++h) {
      EXPECT_EQ(kept[at(h)].size(), 30U);
      if (want[h].gap >= 0) {
        ++clear;
        EXPECT_EQ(kept[at(h)], ascending(want[h].chosen));
      }
      numbers left;
      std::vector<index_t> tokens;
      for (const token_t i : kept[at(h)]) {
        left.push_back(sums[at(h)][at(i)]);
        tokens.push_back(original[at(h)][at(i)]);
      }
      sums[at(h)] = left;
      original[at(h)] = tokens;
    }
  }
  EXPECT_GT(clear, 1);
  EXPECT_NE(error_of([&] { history.evict({{0}}); }), "");
  EXPECT_NE(error_of([&] { history.evict({{0}, {5, 5}}); }), "");
  EXPECT_NE(error_of([&] { history.evict({{0}, {30}}); }), "");
  EXPECT_EQ(history.of_head(0).size(), 30U);
  const float none = 0;
  EXPECT_NE(error_of([&] { history.add(2, nhd(&none, 1, 1, 1)); }), "");
  EXPECT_NE(error_of([&] { history.add(0, nhd(&none, 1, 1, 1)); }), "");
}

TEST(tova, keeps_the_same_keys_in_every_head) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  int clear = 0;
  for (int round = 0; round < 30; ++round) {
    const attention_problem p = prompt_or_chunk(random, round, random.integer(60, 300));
    numbers mean(at(p.shape.kv_len), 0.0);
    for (index_t h = 0; h < 4; ++h) {
      const numbers a = formulas::probabilities(p, h, p.shape.q_len - 1);
      for (std::size_t i = 0; i < a.size(); ++i) mean[i] += a[i] / 4;
    }
    // The sum of four heads, and the division.
    const choice want = formulas::largest(mean, 40, formulas::probability_error(p, 5));
    if (want.gap < 0) continue;
    ++clear;
    const keep_lists kept = tova(40).choose_kept(contexts.any(), inputs(p));
    EXPECT_EQ(kept, (keep_lists{ascending(want.chosen), ascending(want.chosen)}));
  }
  EXPECT_GT(clear, 17);
}

static_assert(cache_method<snapkv_method> && cache_method<tova> && !cache_method<h2o>);

// Counts by hand, and the recall by the probabilities.
TEST(cache_methods, report_what_they_did) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  context& ctx = contexts.any();
  const attention_problem p = prompt(random, 200);
  attention_history history(2);
  std::vector<float> received(200);
  for (index_t h = 0; h < 2; ++h) {
    for (float& x : received) x = static_cast<float>(random.integer(0, 1000));
    history.add(h, nhd<const float>(received.data(), 200, 1, 1));
  }
  const auto expect_report = [&](const cache_choice& choice, const keep_lists& want) {
    EXPECT_EQ(choice.kept, want);
    const cache_report report = choice.report();
    EXPECT_EQ(report.keys_of_head,
              (std::vector<index_t>{std::ssize(want[0]), std::ssize(want[1])}));
    EXPECT_EQ(report.density, static_cast<double>(want[0].size() + want[1].size()) / 400);
    EXPECT_GT(report.estimate_ms, 0);
    paged_kv_cache<float> cache({.kv_heads = 2, .head_dim = 16, .v_dim = 8, .page_size = 16,
                                 .capacity = 300});
    cache.append(p.k.view(), p.v.view());
    cache.evict(choice.kept);
    for (index_t h = 0; h < 2; ++h) EXPECT_EQ(cache.tokens(h), report.keys_of_head[at(h)]);
    // What the last row loses.
    const attention_problem last = part_of(p, 199, 1, 200);
    const recall_report recall = measure_recall(
        ctx, plan_decode(ctx, last.shape, columns_of(choice.kept)), last.q.view(), last.kv());
    double sum = 0;
    for (index_t h = 0; h < 4; ++h) {
      const numbers a = formulas::probabilities(last, h, 0);
      for (const token_t key : want[at(h / 2)]) sum += a[at(key)] / 4;
    }
    // Relative to the mass: that of two lse.
    EXPECT_NEAR(recall.mean, sum, 2 * formulas::probability_error(last, 200));
  };
  const auto expect_of = [&](const auto& method) {
    expect_report(choose_kept_by(ctx, inputs(p), method), method.choose_kept(ctx, inputs(p)));
  };
  expect_of(snapkv(60));
  expect_of(ada_snapkv(60));
  expect_of(tova(30));
  expect_of(snapkv(5000));
  const h2o heaviest{20, 10};
  expect_report(choose_kept_by(history, heaviest), heaviest.choose_kept(history));
  // Of nothing all is kept.
  EXPECT_EQ(choose_kept_by(attention_history(2), heaviest).report().density, 1);
}

TEST(cache_methods, choose_the_same_on_any_threads) {
  const seed_trace trace;
  random_source random;
  thread_contexts contexts;
  const attention_problem p = prompt(random, 250, 8, 4);
  const auto same = [&](const auto& method) {
    const keep_lists want = method.choose_kept(contexts.serial(), inputs(p));
    for (context& ctx : contexts) EXPECT_EQ(method.choose_kept(ctx, inputs(p)), want);
  };
  same(snapkv(60));
  same(sf_snapkv(150, 64));
  same(ada_snapkv(60));
  same(sf_ada_snapkv(150, 64));
  same(tova(30));
}

TEST(cache_methods, refuse_what_does_not_fit) {
  random_source random(1);
  all_contexts contexts;
  const attention_problem p = prompt(random, 50);
  const auto error = [&](const auto& method) {
    return error_of([&] { method.choose_kept(contexts.any(), inputs(p)); });
  };
  snapkv_method m = snapkv(40);
  EXPECT_EQ(error(m), "");
  m.pool_width = 4;
  EXPECT_NE(error(m), "");
  m = snapkv(-1);
  EXPECT_NE(error(m), "");
  m = snapkv(40);
  m.keep.diagonal = true;
  EXPECT_NE(error(m), "");
  m = snapkv(40);
  m.reduce = head_reduce::none;
  EXPECT_NE(error(m), "");
  EXPECT_NE(error(tova(-1)), "");
  for (const double share : {-0.1, 1.1, std::nan("")}) {
    EXPECT_NE(error_of([=] { sf_ada_snapkv(1024, 256, share); }), "") << share;
    EXPECT_NE(error(ada_snapkv(40, 32, share)), "") << share;
  }
  EXPECT_EQ(sf_ada_snapkv(no_limit, 256, 1.0).adaptive->floor, no_limit);
  EXPECT_NE(error_of([] { attention_history(-1); }), "");
  const attention_history history(1);
  EXPECT_NE(error_of([&] { h2o(-5, 10).choose_kept(history); }), "");
  EXPECT_NE(error_of([&] { h2o(10, -5).choose_kept(history); }), "");
}

// SnapKV's code and The Sparse Frontier's assert so; a cache that holds all keys holds those, too.
TEST(cache_methods, refuse_to_keep_fewer_keys_than_are_protected) {
  random_source random(1);
  all_contexts contexts;
  const auto refuses = [&](index_t len, const snapkv_method& m) {
    const attention_problem p = prompt(random, len);
    return !error_of([&] { m.choose_kept(contexts.any(), inputs(p)); }).empty();
  };
  for (const index_t len : {31, 32, 33, 50, 131, 132, 133, 150}) {
    for (const index_t capacity : {len - 1, len, index_t{31}, index_t{32}, index_t{131},
                                   index_t{132}, no_limit}) {
      SCOPED_TRACE(std::to_string(capacity) + " of " + std::to_string(len));
      const bool drops = capacity < len;
      EXPECT_EQ(refuses(len, snapkv(capacity)), drops && capacity < 32);
      EXPECT_EQ(refuses(len, ada_snapkv(capacity)), drops && capacity < 32);
      EXPECT_EQ(refuses(len, sf_snapkv(capacity)), drops && capacity < 132);
      EXPECT_EQ(refuses(len, sf_ada_snapkv(capacity)), drops && capacity < 132);
    }
  }
  snapkv_method m = snapkv(40);
  m.keep.first = m.keep.recent = no_limit;
  EXPECT_TRUE(refuses(50, m));
}

// Their sum does not fit an index.
TEST(h2o, keeps_all_that_a_budget_without_end_allows) {
  attention_history history(1);
  const std::vector<float> received = {3, 1, 2};
  history.add(0, nhd<const float>(received.data(), 3, 1, 1));
  EXPECT_EQ(h2o(no_limit, no_limit).choose_kept(history), (keep_lists{{0, 1, 2}}));
  EXPECT_EQ(h2o(no_limit, 0).choose_kept(history), (keep_lists{{0, 1, 2}}));
}

}  // namespace
