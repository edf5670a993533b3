// SPDX-License-Identifier: Apache-2.0
#include <sattn/method/a_shape.hpp>
#include <sattn/method/block_sparse.hpp>
#include <sattn/method/flexprefill.hpp>
#include <sattn/method/top_k.hpp>
#include <sattn/method/vertical_slash.hpp>

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "method/cases.hpp"
#include "method/formulas.hpp"
#include "support/errors.hpp"
#include "support/plans.hpp"
#include "support/problem.hpp"
#include "support/scores.hpp"

namespace {

using namespace sattn;         // NOLINT(google-build-using-namespace)
using namespace test_support;  // NOLINT(google-build-using-namespace)
using formulas::choice;
using formulas::numbers;
using formulas::units;

// ---- vertical-slash -----------------------------------------------------------------------------

struct slash_sets {
  choice columns;
  choice distances;

  bool clear() const { return columns.gap > 0 && distances.gap > 0; }
  bool holds(index_t key, index_t distance) const {
    return columns.chosen.contains(key) || distances.chosen.contains(distance);
  }
};

// vert[0:sinks] = inf, slash[-local:] = inf, top-k of each: MInference and The Sparse Frontier.
slash_sets slash_formula(const attention_problem& p, index_t head, index_t last, index_t vertical,
                         index_t slash, index_t sinks, index_t local) {
  auto [columns, distances] = formulas::last_rows(p, head, last);
  for (index_t i = 0; i < std::min(sinks, p.shape.kv_len); ++i) columns[at(i)] = infinity;
  for (index_t i = 0; i < std::min(local, p.shape.kv_len); ++i) distances[at(i)] = infinity;
  const double error = formulas::probability_error(p, last);
  return {formulas::largest(columns, vertical, error), formulas::largest(distances, slash, error)};
}

template <class Formula>
void expect_slashes(const attention_problem& p, const attention_plan& plan, int& clear,
                    const Formula& formula) {
  std::vector<slash_sets> of_head;
  bool all_clear = true;
  for (index_t h = 0; h < p.shape.q_heads; ++h) {
    of_head.push_back(formula(h));
    all_clear = all_clear && of_head.back().clear();
  }
  if (!all_clear) return;
  ++clear;
  EXPECT_TRUE(selects(plan, [&](index_t head, index_t row, index_t key) {
    return of_head[at(head)].holds(key, p.shape.q_offset + row - key);
  }));
}

TEST(vertical_slash_method, chooses_by_the_formula) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  int clear = 0;
  for (int round = 0; round < 12; ++round) {
    const attention_problem p = prompt(random, random.integer(120, 400), 2, 1);
    context& ctx = contexts.any();
    const auto vertical = static_cast<token_t>(random.integer(35, 60));
    const auto slash = static_cast<token_t>(random.integer(105, 118));
    expect_slashes(p, prefill_plan(ctx, p, sf_vertical_slash(vertical, slash, 96)), clear,
                   [&](index_t h) { return slash_formula(p, h, 96, vertical, slash, 4, 64); });
    expect_slashes(p, prefill_plan(ctx, p, minference(vertical, slash)), clear,
                   [&](index_t h) { return slash_formula(p, h, 64, vertical, slash, 30, 100); });
  }
  EXPECT_GT(clear, 4);
}

// Sizes by cover() for each head, then the forced ones take places; at any length, also one that is
// shorter than the rows that are looked at.
TEST(sf_flexprefill, chooses_by_the_formula) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  int clear = 0;
  for (int round = 0; round < 60; ++round) {
    const index_t len =
        round < 6 ? 1000 : random.pick<index_t>({65, 200, random.integer(150, 300)});
    const index_t last = random.pick<index_t>({64, 128, 256});
    const attention_problem p = prompt(random, len, 2, 1);
    const double alpha = random.pick({0.3, 0.65, 0.9});
    const index_t least = random.pick<index_t>({1, 70});
    const double error = formulas::probability_error(p, last);
    double gap = formulas::infinite;
    const auto size = [&](const numbers& x, index_t forced) {
      const std::pair<index_t, double> covering = formulas::cover(x, alpha, error);
      gap = std::min(gap, covering.second);
      // All protected ones are kept, also where the size is smaller.
      return std::max({covering.first, least, forced});
    };
    expect_slashes(p, prefill_plan(contexts.any(), p,
                                   sf_flexprefill(alpha, token_t(last), token_t(least))),
                   clear, [&](index_t h) {
                     const auto [columns, distances] = formulas::last_rows(p, h, last);
                     slash_sets sets = slash_formula(p, h, last, size(columns, 4),
                                                     size(distances, 64), 4, 64);
                     sets.columns.gap = std::min(sets.columns.gap, gap);
                     return sets;
                   });
  }
  EXPECT_GT(clear, 30);
}

// The paper's setting: no share, so that the least budget is all there is.
TEST(sf_flexprefill, of_no_share_is_vertical_slash_with_the_least_budget) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (const index_t len : {1, 100, 400, 1000}) {
    const attention_problem p = prompt(random, len, 2, 1);
    context& ctx = contexts.any();
    EXPECT_EQ(masks_of(prefill_plan(ctx, p, sf_flexprefill(0, 512, 164))),
              masks_of(prefill_plan(ctx, p, sf_vertical_slash(164, 164, 512))));
  }
}

TEST(minference_heads, choose_as_each_setting_says) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  const attention_problem p = prompt(random, 300, 2, 1);
  using kind = minference_head::kind;
  const minference_heads method{{{kind::vertical_slash, 40, 110}, {kind::streaming, 5, 33}}};
  const attention_plan both = prefill_plan(contexts.any(), p, method);
  const auto first = expand(prefill_plan(contexts.any(), p, minference(40, 110)), 0);
  EXPECT_EQ(expand(both, 0), first);
  EXPECT_EQ(expand(both, 1), expand(prefill_plan(contexts.any(), p, a_shape{5, 33}), 1));
  EXPECT_NE(error_of([&] {
              prefill_plan(contexts.any(), p, minference_heads{{method.heads[0]}});
            }), "");
}

// ---- blocks -------------------------------------------------------------------------------------

// S[i][i] = S[i][i-1] = S[i][0] = inf, S[i][j > i] = -inf, the k largest of each row.
choice block_row(const attention_problem& p, index_t head, index_t i, index_t block, index_t k,
                 bool forced) {
  numbers scores;
  for (index_t j = 0; j * block < p.shape.kv_len; ++j) {
    const bool own = forced && (j == 0 || j == i || j == i - 1);
    scores.push_back(j > i ? -formulas::infinite
                     : own ? formulas::infinite
                           : formulas::pooled(p, head, i, j, block, block));
  }
  choice row = formulas::largest(scores, k);
  row.gap -= 2 * formulas::logit_error(p, formulas::means_of(block, block));
  return row;
}

TEST(block_sparse_method, chooses_by_the_formula) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (const bool forced : {true, false}) {
    const index_t block = forced ? 16 : 64;
    const attention_problem p = prompt(random, 700, 2, 1);
    const index_t k = 5;
    const attention_plan plan =
        forced ? prefill_plan(contexts.any(), p, sf_block_sparse(16, k))
               : prefill_plan(contexts.any(), p, minference_block(k));
    int clear = 0;
    std::vector<std::vector<choice>> want(2);
    for (index_t h = 0; h < 2; ++h) {
      for (index_t i = 0; i * block < 700; ++i) {
        want[at(h)].push_back(block_row(p, h, i, block, k, forced));
      }
    }
    EXPECT_TRUE(selects_choices(plan, block, clear, [&](index_t head, index_t row) {
      return want[at(head)][at(row / block)];
    }));
    EXPECT_GT(clear, 700);
  }
}

// The first block and the row's own are chosen and counted; then the best until the threshold of
// the row's mass is reached.
TEST(xattention, chooses_by_the_formula) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  int clear = 0;
  for (int round = 0; round < 8; ++round) {
    const xattention m{.stride = 4, .threshold = random.pick({0.5, 0.8}), .block_size = 32};
    const index_t len = random.integer(250, 400);
    const attention_problem p = prompt(random, len, 1, 1);
    const index_t rows = (len + 3) / 4, dim = 16;
    const auto element = [&](const owned_tensor& x, index_t t, index_t d) {
      return t < len ? double{x.row(t, 0)[d]} : 0.0;
    };
    const index_t blocks = (len + 31) / 32;
    std::vector<numbers> mass(at(blocks), numbers(at(blocks), 0.0));
    for (index_t a = 0; a < rows; ++a) {
      numbers x;
      for (index_t b = 0; b <= a; ++b) {
        double sum = 0;
        for (index_t t = 0; t < 4; ++t) {
          for (index_t d = 0; d < dim; ++d) {
            sum += element(p.q, a * 4 + 3 - t, d) * element(p.k, b * 4 + t, d);
          }
        }
        x.push_back(sum / std::sqrt(16.0) / 4);
      }
      x = formulas::softmax(x);
      for (index_t b = 0; b <= a; ++b) mass[at(a / 8)][at(b / 8)] += x[at(b)];
    }
    const attention_plan plan = prefill_plan(contexts.any(), p, m);
    // Sums of stride * dim products, and of the mass of 8 x 8 groups.
    const double error = formulas::probability_error(p, 64, 3 * dim);
    std::vector<choice> want;
    for (index_t i = 0; i < blocks; ++i) {
      double total = 0, gap = formulas::infinite;
      for (const double x : mass[at(i)]) total += x;
      units chosen{0, i};
      double have = mass[at(i)][0] + (i > 0 ? mass[at(i)][at(i)] : 0);
      std::vector<std::pair<double, index_t>> order;
      for (index_t j = 1; j < i; ++j) order.emplace_back(-mass[at(i)][at(j)], j);
      std::sort(order.begin(), order.end());
      const double target = m.threshold * total;
      const auto decides = [&] {
        gap = std::min(gap, std::abs(have - target) - error * (have + target));
      };
      decides();
      double last = 0;
      for (const auto& [negative, j] : order) {
        if (have >= target) {
          if (last < 0) gap = std::min(gap, negative - last + error * (negative + last));
          break;
        }
        have -= negative;
        last = negative;
        decides();
        chosen.insert(j);
      }
      want.push_back({chosen, gap});
    }
    EXPECT_TRUE(selects_choices(plan, 32, clear, [&](index_t, index_t row) {
      return want[at(row / 32)];
    }));
  }
  EXPECT_GT(clear, 40 * 32);
}

// ---- FlexPrefill --------------------------------------------------------------------------------

// The blocks of one head, row by row, as pairs row * blocks + column.
choice flexprefill_formula(const attention_problem& p, index_t head, const flexprefill& m,
                           bool& query_aware) {
  const index_t block = m.block_size;
  const index_t n = (p.shape.q_len + block - 1) / block;
  const double error = formulas::probability_error(p, block);
  const double pooled_error = formulas::probability_error(p, 1, formulas::means_of(block, block));
  const auto [columns, distances] = formulas::last_rows(p, head, block);
  const index_t least = (m.min_budget + block - 1) / block;
  const index_t most = std::max(least, (index_t{m.max_budget} + block - 1) / block);
  choice result;
  const auto blocks_for = [&](const numbers& x) {
    const std::pair<index_t, double> covering = formulas::cover(x, m.coverage, error);
    result.gap = std::min(result.gap, covering.second);
    return std::clamp(covering.first / block + 1, least, most);
  };
  const numbers vertical = formulas::blocks_of(columns, block);
  const numbers slash = formulas::blocks_of(distances, block);
  std::vector<numbers> rows;  // softmax of mean products, causal
  for (index_t i = 0; i < n; ++i) {
    numbers row;
    for (index_t j = 0; j <= i; ++j) row.push_back(formulas::pooled(p, head, i, j, block, block));
    rows.push_back(formulas::softmax(row));
  }
  // The means of the last `block` rows, which are not the last block of the others.
  const attention_problem last = part_of(p, p.shape.q_len - block, block, p.shape.kv_len);
  numbers estimate;
  for (index_t j = 0; j < n; ++j) {
    estimate.push_back(formulas::pooled(last, head, 0, j, block, block));
  }
  estimate = formulas::softmax(estimate);
  double all = 0;
  for (const double x : vertical) all += x;
  double divergence = 0, slope = 0;  // what it moves by where all probabilities do
  const auto add = [&](double x, double mean) {
    if (x == 0) return;
    divergence += x * std::log(x / mean) / 2;
    slope += x * std::abs(std::log(x / mean)) / 2;
  };
  for (index_t j = 0; j < n; ++j) {
    const double a = estimate[at(j)], b = vertical[at(j)] / all, mean = (a + b) / 2;
    add(a, mean);
    add(b, mean);
  }
  const double limit = m.divergence_limit * m.divergence_limit;
  query_aware = divergence < limit;
  result.gap = std::abs(divergence - limit) - 4 * pooled_error * slope;
  numbers v = vertical, s = slash;
  v[0] = s[0] = formulas::infinite;
  const choice wide = formulas::largest(v, query_aware ? least : blocks_for(columns), error);
  const choice deep = formulas::largest(s, query_aware ? least : blocks_for(distances), error);
  result.gap = std::min({result.gap, wide.gap, deep.gap});
  for (index_t i = 0; i < n; ++i) {
    for (const index_t j : wide.chosen) {
      if (j <= i) result.chosen.insert(i * n + j);
    }
    for (const index_t d : deep.chosen) {
      if (d <= i) result.chosen.insert(i * n + i - d);
    }
  }
  if (query_aware) {
    numbers pool(at(n * n), 0.0);
    for (index_t i = 0; i < n; ++i) {
      std::copy(rows[at(i)].begin(), rows[at(i)].end(), pool.begin() + i * n);
    }
    const choice pairs = formulas::covering(pool, m.coverage, pooled_error);
    result.gap = std::min(result.gap, pairs.gap);
    result.chosen.insert(pairs.chosen.begin(), pairs.chosen.end());
  }
  return result;
}

// Lengths that blocks divide and others, each head by itself.
TEST(flexprefill, chooses_by_the_formula) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  int clear = 0, aware = 0, both = 0;
  for (int round = 0; round < 120; ++round) {
    const index_t block = random.pick<index_t>({32, 64, 128});
    const index_t len = round < 8 ? 1000
                        : round < 16
                            ? block * random.integer(3, 7)
                            : random.pick<index_t>({65, 129, 200, 257, random.integer(150, 400)});
    if (len <= 2 * block) continue;
    attention_problem p = prompt(random, len, 2, 2, random.pick({0.3, 1.5}));
    // The second head looks at a key that means hide, or at a block that they show.
    const bool hidden = random.integer(0, 2) == 0;
    for (index_t d = 0; d < 16; ++d) {
      for (index_t t = 0; t < len; ++t) p.q.row(t, 1)[d] += 0.5f;
      for (index_t t = 0; t < block; ++t) p.k.row(t, 1)[d] += hidden ? 0.0f : 1.0f;
      if (hidden) p.k.row(10, 1)[d] = 4;
    }
    flexprefill m{.coverage = random.pick({0.0, 0.5, 0.8}), .block_size = token_t(block)};
    m.min_budget = token_t(random.pick<index_t>({1, block, block + 5, 2 * block}));
    m.max_budget = random.pick({3 * m.block_size, 100'000});
    m.divergence_limit = random.pick({0.05, 0.3});
    bool query_aware[2] = {};
    choice want[2];
    for (index_t h = 0; h < 2; ++h) want[h] = flexprefill_formula(p, h, m, query_aware[h]);
    if (std::min(want[0].gap, want[1].gap) < 0) continue;
    ++clear;
    for (const bool head_is_aware : query_aware) aware += head_is_aware ? 1 : 0;
    both += query_aware[0] != query_aware[1] ? 1 : 0;
    const index_t n = (len + block - 1) / block;
    EXPECT_TRUE(selects(prefill_plan(contexts.any(), p, m),
                        [&](index_t head, index_t row, index_t key) {
                          return want[head].chosen.contains(row / block * n + key / block);
                        }))
        << len << " in blocks of " << block << ", query-aware " << query_aware[0] << query_aware[1];
  }
  EXPECT_GT(clear, 30);
  EXPECT_GT(aware, 5);
  EXPECT_GT(2 * clear - aware, 10);
  EXPECT_GT(both, 5);
}

TEST(flexprefill, short_prompts_run_dense) {
  random_source random(1);
  all_contexts contexts;
  const attention_problem p = prompt(random, 256, 2, 1);
  EXPECT_EQ(prefill_plan(contexts.any(), p, flexprefill{}).stats().density_selected(), 1.0);
  const flexprefill m{.coverage = 0.1, .min_budget = 1};
  EXPECT_EQ(prefill_plan(contexts.any(), p, m).stats().density_selected(), 1.0);
  const attention_problem longer = prompt(random, 500, 2, 1);
  EXPECT_LT(prefill_plan(contexts.any(), longer, m).stats().density_selected(), 1.0);
  // Up to two blocks or the least budget, in whole blocks.
  for (const index_t len : {1, 65, 128, 129, 192, 400}) {
    const attention_problem q = prompt(random, len, 1, 1);
    flexprefill blocks{.coverage = 0.01, .divergence_limit = 0, .min_budget = 1, .block_size = 64};
    EXPECT_EQ(prefill_plan(contexts.any(), q, blocks).stats().density_selected() == 1, len <= 128);
    blocks.min_budget = 129;
    EXPECT_EQ(prefill_plan(contexts.any(), q, blocks).stats().density_selected() == 1, len <= 192);
  }
}

TEST(jensen_shannon_distance, is_0_for_equal_and_largest_for_disjoint_distributions) {
  const std::vector<float> a{1, 2, 3, 0}, twice{2, 4, 6, 0}, other{0, 0, 0, 5}, none(4, 0.0f);
  EXPECT_EQ(jensen_shannon_distance(a, a), 0);
  EXPECT_EQ(jensen_shannon_distance(a, twice), 0);
  EXPECT_NEAR(jensen_shannon_distance(a, other), std::sqrt(std::log(2.0)), 1e-12);
  EXPECT_EQ(jensen_shannon_distance(a, none), 0);
  EXPECT_EQ(jensen_shannon_distance(other, a), jensen_shannon_distance(a, other));
}

// ---- streaming ----------------------------------------------------------------------------------

TEST(tri_shape, is_the_a_shape_and_its_last_rows_are_dense) {
  random_source random(1);
  all_contexts contexts;
  for (const index_t len : {1, 50, 99, 100, 101, 300, 1000}) {
    const attention_problem p = prompt(random, len, 2, 1);
    EXPECT_TRUE(selects(prefill_plan(contexts.any(), p, tri_shape{8, 40}),
                        [&](index_t, index_t row, index_t key) {
                          return key < 8 || row - key < 40 || row >= len - 100;
                        }))
        << len;
    EXPECT_TRUE(selects(prefill_plan(contexts.any(), p, a_shape{8, 40}),
                        [&](index_t, index_t row, index_t key) {
                          return key < 8 || row - key < 40;
                        }))
        << len;
  }
}

// ---- what holds for every method ----------------------------------------------------------------

struct named_method {
  std::string name;
  std::function<attention_plan(context&, const attention_problem&)> plan;
  bool estimates = true;
};

template <attention_method M>
named_method named(std::string name, const M& method, bool estimates = true) {
  return {std::move(name), [=](context& ctx, const attention_problem& p) {
            return prefill_plan(ctx, p, method);
          }, estimates};
}

// With budgets so small that 1,000 tokens are sparse.
std::vector<named_method> small_methods() {
  return {named("a_shape", a_shape{4, 60}, false),
          named("tri_shape", tri_shape{4, 60, 30}, false),
          named("sf_vertical_slash", sf_vertical_slash(16, 80, 64)),
          named("minference", minference(40, 120)),
          named("sf_flexprefill", sf_flexprefill(0.3, 64, 20)),
          named("flexprefill", flexprefill{.coverage = 0.3, .min_budget = 64, .block_size = 32}),
          named("sf_block_sparse", sf_block_sparse(16, 6)),
          named("minference_block", minference_block(3)),
          named("xattention", xattention{.stride = 8, .threshold = 0.3, .block_size = 64}),
          named("top_k", top_k(20)),
          named("twilight", twilight(0.5))};
}
std::vector<named_method> large_methods() {
  return {named("a_shape", a_shape{}),
          named("tri_shape", tri_shape{}),
          named("sf_vertical_slash", sf_vertical_slash(2000, 2000)),
          named("minference", minference()),
          named("sf_flexprefill", sf_flexprefill(1.0)),
          named("flexprefill", flexprefill{}),
          named("sf_block_sparse", sf_block_sparse()),
          named("minference_block", minference_block()),
          named("xattention", xattention{.threshold = 1.0}),
          named("top_k", top_k(1000)),
          named("twilight", twilight(1.0))};
}

// The budgets of the presets cover all of these lengths: the bits of dense attention.
TEST(prefill_methods, run_dense_where_the_budget_is_beyond_the_length) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  context& ctx = contexts.any();
  for (const index_t len : {1, 2, 63, 64, 65, 1000}) {
    const attention_problem p = prompt(random, len, 4, 2);
    const attention_result dense_result = run(ctx, plan_prefill(ctx, p.shape, dense{}), p);
    for (const named_method& m : large_methods()) {
      const attention_plan plan = m.plan(ctx, p);
      EXPECT_EQ(plan.stats().density_selected(), 1.0) << m.name << ", " << len;
      EXPECT_TRUE(bit_equal(run(ctx, plan, p), dense_result)) << m.name << ", " << len;
    }
  }
}

TEST(prefill_methods, select_within_the_causal_mask_what_attend_then_attends_to) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (const index_t len : {1, 2, 63, 64, 65, 1000}) {
    const attention_problem p = prompt(random, len, 2, 1);
    for (const named_method& m : small_methods()) {
      SCOPED_TRACE(m.name + ", " + std::to_string(len));
      const attention_plan plan = m.plan(contexts.any(), p);
      const mask_function mask = mask_of(plan);
      for (index_t h = 0; h < 2; ++h) {
        for (index_t row = 0; row < len; ++row) {
          index_t keys = 0;
          for (index_t key = 0; key < len; ++key) {
            if (!mask(h, row, key)) continue;
            ++keys;
            ASSERT_LE(key, row);
          }
          ASSERT_GT(keys, 0) << "row " << row;
        }
      }
      if (len == 1000) {
        EXPECT_LT(plan.stats().density_selected(), 0.8);
      }
      if (len <= 65) {
        EXPECT_TRUE(within_bound(contexts, plan, p));
      }
    }
  }
}

// What comes after a row changes neither what the row attends to nor, for methods that choose for
// each block of rows, what is chosen.
TEST(prefill_methods, choose_for_a_row_by_what_came_before_its_block_ended) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  context& ctx = contexts.any();
  attention_problem p = prompt(random, 320, 2, 1);
  attention_problem changed = p;
  for (index_t t = 192; t < 320; ++t) {
    changed.k.fill_row(t, 0, 7.0f);
    changed.v.fill_row(t, 0, -3.0f);
  }
  int by_block = 0;
  for (const named_method& m : small_methods()) {
    const bool looks_back = m.name.find("slash") != std::string::npos ||
                            m.name.find("flexprefill") != std::string::npos ||
                            m.name == "minference" || m.name == "tri_shape";
    if (looks_back) continue;  // the last rows choose for all
    ++by_block;
    const attention_result before = run(ctx, m.plan(ctx, p), p);
    const attention_result after = run(ctx, m.plan(ctx, changed), changed);
    EXPECT_TRUE(bit_equal(before.rows(p, 0, 192), after.rows(p, 0, 192))) << m.name;
    EXPECT_FALSE(bit_equal(before.rows(p, 192, 320), after.rows(p, 192, 320))) << m.name;
  }
  EXPECT_GE(by_block, 5);
}

TEST(prefill_methods, choose_the_same_on_any_threads) {
  const seed_trace trace;
  random_source random;
  thread_contexts contexts;
  const attention_problem p = prompt(random, 500, 4, 2);
  for (const named_method& m : small_methods()) {
    const attention_plan want = m.plan(contexts.serial(), p);
    for (context& ctx : contexts) {
      const attention_plan got = m.plan(ctx, p);
      EXPECT_EQ(masks_of(got), masks_of(want)) << m.name;
    }
  }
}

// A chunk of a prompt at the end of a longer cache, its rows not aligned with blocks of keys.
TEST(prefill_methods, of_a_chunk_look_at_the_chunk) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  context& ctx = contexts.any();
  int clear = 0;
  for (int round = 0; round < 10; ++round) {
    attention_problem p(random, {.q_len = 200, .kv_len = 500, .head_dim = 16, .v_dim = 8});
    p.q.fill_normal(random, 1.5);
    const slash_sets want = slash_formula(p, 0, 64, 40, 120, 30, 100);
    if (!want.clear()) continue;
    ++clear;
    EXPECT_TRUE(selects(prefill_plan(ctx, p, minference(40, 120)),
                        [&](index_t, index_t row, index_t key) {
                          return want.holds(key, 300 + row - key);
                        }));
  }
  EXPECT_GT(clear, 3);
  attention_problem p(random, {.q_len = 200, .kv_len = 500, .head_dim = 16, .v_dim = 8});
  for (const named_method& m : small_methods()) {
    const attention_plan plan = m.plan(ctx, p);
    EXPECT_LT(plan.stats().density_selected(), 0.9) << m.name;
    const auto mask = expand(plan, 0);
    for (index_t row = 0; row < 200 && m.name != "minference_block" && m.name != "top_k" &&
                          m.name != "twilight"; ++row) {
      ASSERT_EQ(mask[at(row * 500 + 300 + row)], 1) << m.name << " hides row " << row;
    }
    // Rows before the last ones of the chunk decide nothing for vertical-slash.
    attention_problem other = p;
    for (index_t t = 0; t < 100; ++t) other.q.fill_row(t, 0, 0.1f);
    if (m.name == "minference" || m.name == "sf_vertical_slash" || m.name == "sf_flexprefill") {
      EXPECT_EQ(expand(m.plan(ctx, other), 0), expand(plan, 0)) << m.name;
    }
  }
}

// A larger budget keeps what a smaller one kept.
TEST(prefill_methods, budgets_are_monotone) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  context& ctx = contexts.any();
  const attention_problem p = prompt(random, 400, 2, 1);
  const auto grows = [&](const auto& method_at) {
    std::vector<std::uint8_t> before(at(400 * 400), 0);
    for (int step = 1; step <= 8; ++step) {
      const std::vector<std::uint8_t> mask = expand(prefill_plan(ctx, p, method_at(step)), 1);
      for (std::size_t i = 0; i < mask.size(); ++i) ASSERT_GE(mask[i], before[i]);
      before = mask;
    }
  };
  grows([](int s) { return sf_vertical_slash(token_t(8 * s), token_t(64 + 20 * s), 64); });
  grows([](int s) { return minference(token_t(30 + s), token_t(100 + 10 * s)); });
  grows([](int s) { return sf_flexprefill(s / 8.0, 64, 10); });
  grows([](int s) { return sf_block_sparse(16, 3 + s); });
  grows([](int s) { return minference_block(s); });
  grows([](int s) { return xattention{.stride = 8, .threshold = s / 8.0, .block_size = 32}; });
  grows([](int s) {
    return flexprefill{.coverage = s / 8.0, .divergence_limit = 0, .min_budget = 32,
                       .block_size = 32};
  });
  grows([](int s) { return top_k(10 * s); });
  grows([](int s) { return twilight(s / 8.0); });
  grows([](int s) { return a_shape{token_t(s), token_t(10 * s)}; });
}

// ---- scores from elsewhere ----------------------------------------------------------------------

TEST(scored_blocks, choose_by_the_scores_given) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  const attention_problem p = prompt(random, 200, 4, 2);
  score_tensor scores(2, 4, 4, 0.0f);
  for (float& s : scores.values) s = static_cast<float>(random.normal());
  for (index_t set = 0; set < 2; ++set) {
    for (std::size_t i = 0; i < 4; ++i) {
      for (std::size_t j = i + 1; j < 4; ++j) scores.row(set, index_t(i))[j] = -infinity;
    }
  }
  const attention_plan plan = prefill_plan(
      contexts.any(), p, scored_blocks{scores, {budget::threshold(0.3), {.diagonal = true}}});
  EXPECT_TRUE(selects(plan, [&](index_t head, index_t row, index_t key) {
    return row / 64 == key / 64 || scores.row(head / 2, row / 64)[at(key / 64)] > 0.3f;
  }));
}

TEST(scored_tokens, choose_by_the_scores_given) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  const attention_problem p = prompt(random, 90, 2, 1);
  score_tensor scores(1, 90, 90, 9.0f);  // of keys that a row may not see, too
  // As a sum of rectified products: many zeros, so that ties decide.
  for (index_t row = 0; row < 90; ++row) {
    for (index_t key = 0; key <= row; ++key) {
      scores.row(0, row)[at(key)] = std::max(0.0f, static_cast<float>(random.integer(-3, 4)));
    }
  }
  const attention_plan plan =
      prefill_plan(contexts.any(), p, scored_tokens{scores, {budget::fixed(20)}});
  EXPECT_TRUE(selects(plan, [&](index_t, index_t row, index_t key) {
    index_t better = 0;
    for (index_t other = 0; other <= row; ++other) {
      const float a = scores.row(0, row)[at(other)], b = scores.row(0, row)[at(key)];
      better += a > b || (a == b && other < key) ? 1 : 0;
    }
    return better < 20;
  }));
  const score_tensor wrong(1, 90, 80, 0.0f);
  EXPECT_NE(error_of([&] {
              prefill_plan(contexts.any(), p, scored_tokens{wrong, {budget::fixed(1)}});
            }), "");
}

}  // namespace
