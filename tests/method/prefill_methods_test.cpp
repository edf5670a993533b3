// SPDX-License-Identifier: Apache-2.0
#include <sattn/method/a_shape.hpp>
#include <sattn/method/block_sparse.hpp>
#include <sattn/method/flexprefill.hpp>
#include <sattn/method/top_k.hpp>
#include <sattn/method/vertical_slash.hpp>

#include <gtest/gtest.h>

#include <cmath>
#include <utility>
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
  for (int round = 0; round < 24; ++round) {
    const index_t len = random.pick<index_t>({30, random.integer(120, 400)});
    const attention_problem p = prompt_or_chunk(random, len, 2, 1);
    context& ctx = contexts.any();
    const auto vertical = static_cast<token_t>(random.integer(35, 60));
    const auto slash = static_cast<token_t>(random.integer(105, 118));
    expect_slashes(p, prefill_plan(ctx, p, sf_vertical_slash(vertical, slash, 96)), clear,
                   [&](index_t h) { return slash_formula(p, h, 96, vertical, slash, 4, 64); });
    expect_slashes(p, prefill_plan(ctx, p, minference(vertical, slash)), clear,
                   [&](index_t h) { return slash_formula(p, h, 64, vertical, slash, 30, 100); });
  }
  EXPECT_GT(clear, 15);
}

// Of a chunk, too: its last rows choose, and no others.
TEST(vertical_slash_method, does_not_look_at_rows_before_the_last_ones) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  const attention_problem p = decode_problem(random, 500, 200);
  const auto without_rows = [&](index_t begin, index_t end) {
    attention_problem other = p;
    for (index_t t = begin; t < end; ++t) {
      for (index_t h = 0; h < 4; ++h) other.q.fill_row(t, h, 0.1f);
    }
    return other;
  };
  const auto same = [&](const auto& method) {
    const auto masks = [&](const attention_problem& of) {
      return masks_of(prefill_plan(contexts.any(), of, method));
    };
    EXPECT_TRUE(masks(without_rows(0, 136)) == masks(p));
    EXPECT_FALSE(masks(without_rows(136, 200)) == masks(p));
  };
  same(minference(40, 120));
  same(sf_vertical_slash(16, 80, 64));
  same(sf_flexprefill(0.3, 64, 20));
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
    const attention_problem p = prompt_or_chunk(random, len, 2, 1);
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
  EXPECT_EQ(expand(both, 1), expand(prefill_plan(contexts.any(), p, a_shape(5, 33)), 1));
  EXPECT_NE(error_of([&] {
              prefill_plan(contexts.any(), p, minference_heads{{method.heads[0]}});
            }), "");
}

// ---- blocks -------------------------------------------------------------------------------------

/// The blocks of keys that hold the positions of a block of rows: [first, last]. Rows count from
/// the first of the chunk, keys from 0.
std::pair<index_t, index_t> own_blocks(const attention_problem& p, index_t i, index_t block) {
  const index_t end = std::min((i + 1) * block, p.shape.q_len);
  return {p.shape.position(i * block) / block, p.shape.position(end - 1) / block};
}

// S[i][i] = S[i][i-1] = S[i][0] = inf, S[i][j > i] = -inf, the k largest of each row; the diagonal
// of a chunk's blocks are those that hold its rows' positions.
choice block_row(const attention_problem& p, index_t head, index_t i, index_t block, index_t k,
                 bool forced) {
  numbers scores;
  const auto [first, last] = own_blocks(p, i, block);
  for (index_t j = 0; j * block < p.shape.kv_len; ++j) {
    const bool own = forced && (j == 0 || (j >= first - 1 && j <= last));
    scores.push_back(j > last ? -formulas::infinite
                     : own    ? formulas::infinite
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
    for (const index_t before : {0, 64, 9, 250}) {
      const index_t block = forced ? 16 : 64, rows = 700 - before;
      attention_problem p = decode_problem(random, 700, rows, 2, 1);
      p.q.fill_normal(random, 1.5);
      const index_t k = 5;
      const attention_plan plan =
          forced ? prefill_plan(contexts.any(), p, sf_block_sparse(16, k))
                 : prefill_plan(contexts.any(), p, minference_block(k));
      int clear = 0;
      std::vector<std::vector<choice>> want(2);
      for (index_t h = 0; h < 2; ++h) {
        for (index_t i = 0; i * block < rows; ++i) {
          want[at(h)].push_back(block_row(p, h, i, block, k, forced));
        }
      }
      EXPECT_TRUE(selects_choices(plan, block, clear, [&](index_t head, index_t row) {
        return want[at(head)][at(row / block)];
      })) << before;
      EXPECT_GT(clear, rows) << before;
    }
  }
}

// The first block and the row's own are chosen and counted; then the best until the threshold of
// the row's mass is reached.
TEST(xattention, chooses_by_the_formula) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  int clear = 0, rows_asked = 0;
  for (int round = 0; round < 16; ++round) {
    const xattention m(4, random.pick({0.5, 0.8}), 32);
    const attention_problem p = prompt_or_chunk(random, random.integer(250, 400), 1, 1);
    const index_t dim = 16;
    const auto element = [&](const owned_tensor& x, index_t t, index_t d) {
      return t < x.view().tokens ? double{x.row(t, 0)[d]} : 0.0;
    };
    // Four rows of the chunk as one, and four keys: a pair counts where one of theirs is legal.
    const index_t rows = (p.shape.q_len + 3) / 4, keys = (p.shape.kv_len + 3) / 4;
    const index_t row_blocks = (p.shape.q_len + 31) / 32, key_blocks = (p.shape.kv_len + 31) / 32;
    std::vector<numbers> mass(at(row_blocks), numbers(at(key_blocks), 0.0));
    for (index_t a = 0; a < rows; ++a) {
      numbers x;
      for (index_t b = 0; b < keys && 4 * b <= p.shape.position(4 * a + 3); ++b) {
        double sum = 0;
        for (index_t t = 0; t < 4; ++t) {
          for (index_t d = 0; d < dim; ++d) {
            sum += element(p.q, a * 4 + 3 - t, d) * element(p.k, b * 4 + t, d);
          }
        }
        x.push_back(sum / std::sqrt(16.0) / 4);
      }
      x = formulas::softmax(x);
      for (index_t b = 0; b < std::ssize(x); ++b) mass[at(a / 8)][at(b / 8)] += x[at(b)];
    }
    const attention_plan plan = prefill_plan(contexts.any(), p, m);
    // Sums of stride * dim products, and of the mass of 8 x 8 groups.
    const double error = formulas::probability_error(p, 64, 3 * dim);
    std::vector<choice> want;
    for (index_t i = 0; i < row_blocks; ++i) {
      const auto [first, last] = own_blocks(p, i, 32);
      double total = 0, have = 0, gap = formulas::infinite;
      units chosen;
      std::vector<std::pair<double, index_t>> order;
      for (index_t j = 0; j <= last; ++j) {
        total += mass[at(i)][at(j)];
        if (j == 0 || j >= first) {
          chosen.insert(j);
          have += mass[at(i)][at(j)];
        } else {
          order.emplace_back(-mass[at(i)][at(j)], j);
        }
      }
      std::sort(order.begin(), order.end());
      const double target = m.threshold * total;
      const auto decides = [&] {
        gap = std::min(gap, std::abs(have - target) - error * (have + target));
      };
      decides();
      double before = 0;
      for (const auto& [negative, j] : order) {
        if (have >= target) {
          if (before < 0) gap = std::min(gap, negative - before + error * (negative + before));
          break;
        }
        have -= negative;
        before = negative;
        decides();
        chosen.insert(j);
      }
      want.push_back({chosen, gap});
    }
    rows_asked += static_cast<int>(p.shape.q_len);
    EXPECT_TRUE(selects_choices(plan, 32, clear, [&](index_t, index_t row) {
      return want[at(row / 32)];
    })) << p.shape.q_offset;
  }
  EXPECT_GT(clear, rows_asked / 2);
}

// ---- FlexPrefill --------------------------------------------------------------------------------

// The blocks of one head, row by row, as pairs row * blocks of keys + column. Rows of a chunk that
// stand in two blocks of keys have the diagonals of both.
choice flexprefill_formula(const attention_problem& p, index_t head, const flexprefill& m,
                           bool& query_aware) {
  const index_t block = m.block_size;
  const index_t n = (p.shape.q_len + block - 1) / block;
  const index_t cols = (p.shape.kv_len + block - 1) / block;
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
    for (index_t j = 0; j <= own_blocks(p, i, block).second; ++j) {
      row.push_back(formulas::pooled(p, head, i, j, block, block));
    }
    rows.push_back(formulas::softmax(row));
  }
  // The means of the last `block` rows, which are not the last block of the others.
  const index_t looking = std::min(block, p.shape.q_len);
  const attention_problem last = part_of(p, p.shape.q_len - looking, looking, p.shape.kv_len);
  numbers estimate;
  for (index_t j = 0; j < cols; ++j) {
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
  for (index_t j = 0; j < cols; ++j) {
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
    const auto [first, last_own] = own_blocks(p, i, block);
    for (const index_t j : wide.chosen) {
      if (j <= last_own) result.chosen.insert(i * cols + j);
    }
    for (const index_t d : deep.chosen) {
      for (index_t own = std::max(first, d); own <= last_own; ++own) {
        result.chosen.insert(i * cols + own - d);
      }
    }
  }
  if (query_aware) {
    numbers pool(at(n * cols), 0.0);
    for (index_t i = 0; i < n; ++i) {
      std::copy(rows[at(i)].begin(), rows[at(i)].end(), pool.begin() + i * cols);
    }
    const choice pairs = formulas::covering(pool, m.coverage, pooled_error);
    result.gap = std::min(result.gap, pairs.gap);
    result.chosen.insert(pairs.chosen.begin(), pairs.chosen.end());
  }
  return result;
}

// Lengths that blocks divide and others, chunks too, each head by itself.
TEST(flexprefill, chooses_by_the_formula) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  int clear = 0, aware = 0, both = 0;
  int chunks = 0;
  for (int round = 0; round < 200; ++round) {
    const index_t block = random.pick<index_t>({32, 64, 128});
    const index_t len = round < 8 ? 1000
                        : round < 16
                            ? block * random.integer(3, 7)
                            : random.pick<index_t>({65, 129, 200, 257, random.integer(150, 400)});
    attention_problem p = prompt_or_chunk(random, len, 2, 2, random.pick({0.3, 1.5}));
    if (p.shape.kv_len <= 2 * block) continue;
    // The second head looks at a key that means hide, or at a block that they show.
    const bool hidden = random.integer(0, 2) == 0;
    for (index_t d = 0; d < 16; ++d) {
      for (index_t t = 0; t < len; ++t) p.q.row(t, 1)[d] += 0.5f;
      for (index_t t = 0; t < block; ++t) p.k.row(t, 1)[d] += hidden ? 0.0f : 1.0f;
      if (hidden) p.k.row(10, 1)[d] = 4;
    }
    flexprefill m(random.pick({0.0, 0.5, 0.8}));
    m.block_size = token_t(block);
    m.min_budget = token_t(random.pick<index_t>({1, block, block + 5, 2 * block}));
    m.max_budget = random.pick({3 * m.block_size, 100'000});
    m.divergence_limit = random.pick({0.05, 0.3});
    bool query_aware[2] = {};
    choice want[2];
    for (index_t h = 0; h < 2; ++h) want[h] = flexprefill_formula(p, h, m, query_aware[h]);
    if (std::min(want[0].gap, want[1].gap) < 0) continue;
    ++clear;
    chunks += p.shape.q_offset > 0 ? 1 : 0;
    for (const bool head_is_aware : query_aware) aware += head_is_aware ? 1 : 0;
    both += query_aware[0] != query_aware[1] ? 1 : 0;
    const index_t cols = (p.shape.kv_len + block - 1) / block;
    EXPECT_TRUE(selects(prefill_plan(contexts.any(), p, m),
                        [&](index_t head, index_t row, index_t key) {
                          return want[head].chosen.contains(row / block * cols + key / block);
                        }))
        << len << " of " << p.shape.kv_len << " in blocks of " << block << ", query-aware "
        << query_aware[0] << query_aware[1];
  }
  EXPECT_GT(clear, 30);
  EXPECT_GT(chunks, 20);
  EXPECT_GT(aware, 5);
  EXPECT_GT(2 * clear - aware, 10);
  EXPECT_GT(both, 5);
}

TEST(flexprefill, short_prompts_run_dense) {
  random_source random(1);
  all_contexts contexts;
  const attention_problem p = prompt(random, 256, 2, 1);
  EXPECT_EQ(prefill_plan(contexts.any(), p, flexprefill()).stats().density_selected(), 1.0);
  const flexprefill m(0.1, 0.1, 1);
  EXPECT_EQ(prefill_plan(contexts.any(), p, m).stats().density_selected(), 1.0);
  EXPECT_EQ(prefill_plan(contexts.any(), p, flexprefill(0.1, 0.1, 0, 0, 1 << 30))
                .stats()
                .density_selected(),
            1.0);
  const attention_problem longer = prompt(random, 500, 2, 1);
  EXPECT_LT(prefill_plan(contexts.any(), longer, m).stats().density_selected(), 1.0);
  // Up to two blocks or the least budget, in whole blocks.
  for (const index_t len : {1, 65, 128, 129, 192, 400}) {
    const attention_problem q = prompt(random, len, 1, 1);
    flexprefill blocks(0.01, 0, 1, 100'000, 64);
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
    EXPECT_TRUE(selects(prefill_plan(contexts.any(), p, tri_shape(8, 40)),
                        [&](index_t, index_t row, index_t key) {
                          return key < 8 || row - key < 40 || row >= len - 100;
                        }))
        << len;
    EXPECT_TRUE(selects(prefill_plan(contexts.any(), p, a_shape(8, 40)),
                        [&](index_t, index_t row, index_t key) {
                          return key < 8 || row - key < 40;
                        }))
        << len;
  }
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
