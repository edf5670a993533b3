// SPDX-License-Identifier: Apache-2.0
//
// Caches that are cut behind the last chunk of a prompt: the chunk's last rows choose among all
// keys, as many rows as there are where the window is longer.
#include <sattn/method/eviction.hpp>
#include <sattn/method/snapkv.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "method/cases.hpp"
#include "method/formulas.hpp"
#include "support/problem.hpp"

namespace {

using namespace sattn;         // NOLINT(google-build-using-namespace)
using namespace test_support;  // NOLINT(google-build-using-namespace)
using formulas::choice;
using formulas::numbers;

/// The end of a prompt: up to 100 rows, some of them fewer than methods look at, of up to 300 keys.
attention_problem last_chunk(random_source& random, index_t q_heads = 4) {
  attention_problem p = decode_problem(random, random.integer(200, 300),
                                       random.pick<index_t>({1, 20, random.integer(21, 100)}),
                                       q_heads, 2);
  p.q.fill_normal(random, 1.5);
  return p;
}

/// Whether a score of f32 would have decided the same; what is equal is equal in f32, too.
bool is_clear(const choice& c, const numbers& scores, double error) {
  double most = 0;
  for (const double x : scores) most = x == formulas::infinite ? most : std::max(most, x);
  return c.gap == 0 || c.gap > 2 * error * most;
}

/// What a list for a head is to be: the chosen ones and the keys from `recent` on.
std::vector<token_t> chosen_and_recent(const formulas::units& chosen, index_t recent,
                                       index_t len) {
  formulas::units all = chosen;
  for (index_t key = recent; key < len; ++key) all.insert(key);
  return {all.begin(), all.end()};
}

// Sums over the rows, averages of 5 up to the window of 32 keys, which stay; the mean of a group.
TEST(snapkv, looks_with_the_rows_of_the_chunk) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  int clear = 0;
  for (int round = 0; round < 20; ++round) {
    const attention_problem p = last_chunk(random);
    const index_t len = p.shape.kv_len, window = 32, capacity = 60;
    const keep_lists kept = snapkv(capacity).choose_kept(contexts.any(), inputs(p));
    const double error = formulas::probability_error(p, window + 5 + 3);
    for (index_t set = 0; set < 2; ++set) {
      numbers mean(at(len - window), 0.0);
      for (index_t h = 2 * set; h < 2 * set + 2; ++h) {
        numbers sums = formulas::last_rows(p, h, window).first;
        sums.resize(mean.size());
        for (std::size_t i = 0; i < mean.size(); ++i) mean[i] += sums[i] / 2;
      }
      const choice want =
          formulas::largest(formulas::pool1d(mean, 5, false), capacity - window, error);
      if (want.gap < 0) continue;
      ++clear;
      EXPECT_EQ(kept[at(set)], chosen_and_recent(want.chosen, len - window, len));
    }
  }
  EXPECT_GT(clear, 20);
}

/// The Sparse Frontier's: of a group the mean or the largest, of the rows the sum or the largest,
/// averages of 21 with the window; 4 first and 128 last keys stay.
numbers frontier_scores_of_chunk(const attention_problem& p, index_t set, index_t window,
                                 bool maxima) {
  numbers scores(at(p.shape.kv_len), 0.0);
  for (index_t row = std::max<index_t>(p.shape.q_len - window, 0); row < p.shape.q_len; ++row) {
    const numbers a = formulas::probabilities(p, 2 * set, row);
    const numbers b = formulas::probabilities(p, 2 * set + 1, row);
    for (std::size_t i = 0; i < scores.size(); ++i) {
      scores[i] = maxima ? std::max({scores[i], a[i], b[i]}) : scores[i] + (a[i] + b[i]) / 2;
    }
  }
  scores = formulas::pool1d(scores, 21, false);
  std::fill_n(scores.begin(), 4, formulas::infinite);
  std::fill(scores.end() - 128, scores.end(), formulas::infinite);
  return scores;
}

TEST(sf_snapkv, looks_with_the_rows_of_the_chunk) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  int clear = 0;
  for (int round = 0; round < 20; ++round) {
    const attention_problem p = last_chunk(random);
    const index_t capacity = random.integer(140, 180);
    const keep_lists kept = sf_snapkv(capacity, 50).choose_kept(contexts.any(), inputs(p));
    for (index_t set = 0; set < 2; ++set) {
      const choice want = formulas::largest(frontier_scores_of_chunk(p, set, 50, false), capacity,
                                            formulas::probability_error(p, 50 + 21 + 3));
      if (want.gap < 0) continue;
      ++clear;
      EXPECT_EQ(kept[at(set)], chosen_and_recent(want.chosen, p.shape.kv_len, p.shape.kv_len));
    }
  }
  EXPECT_GT(clear, 20);
}

TEST(sf_ada_snapkv, looks_with_the_rows_of_the_chunk) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  int clear = 0;
  for (int round = 0; round < 20; ++round) {
    const attention_problem p = last_chunk(random);
    const index_t len = p.shape.kv_len, capacity = random.integer(140, 180);
    const keep_lists kept = sf_ada_snapkv(capacity, 50).choose_kept(contexts.any(), inputs(p));
    // A fifth of the budget is less than what is protected: all else is of both heads.
    numbers rest;
    for (index_t set = 0; set < 2; ++set) {
      const numbers scores = frontier_scores_of_chunk(p, set, 50, true);
      rest.insert(rest.end(), scores.begin(), scores.end());
    }
    const choice all =
        formulas::largest(rest, 2 * capacity, formulas::probability_error(p, 21 + 1));
    if (all.gap < 0) continue;
    ++clear;
    std::vector<formulas::units> want(2);
    for (const index_t i : all.chosen) want[at(i / len)].insert(i % len);
    for (index_t set = 0; set < 2; ++set) {
      EXPECT_EQ(kept[at(set)], chosen_and_recent(want[at(set)], len, len));
    }
  }
  EXPECT_GT(clear, 10);
}

// Maxima of 7 of the sums up to the window; half of each head's count is an even share. One query
// head a kv head.
TEST(ada_snapkv, looks_with_the_rows_of_the_chunk) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  int clear = 0;
  for (int round = 0; round < 20; ++round) {
    const attention_problem p = last_chunk(random, 2);
    const index_t len = p.shape.kv_len, window = 32, capacity = 50, prefix = len - window;
    const keep_lists kept = ada_snapkv(capacity).choose_kept(contexts.any(), inputs(p));
    const double error = formulas::probability_error(p, window);
    numbers of_head[2], all;
    for (index_t h = 0; h < 2; ++h) {
      numbers sums = formulas::last_rows(p, h, window).first;
      sums.resize(at(prefix));
      of_head[h] = formulas::pool1d(sums, 7, true);
      all.insert(all.end(), of_head[h].begin(), of_head[h].end());
    }
    const choice both = formulas::largest(all, 2 * (capacity - window));
    bool decided = is_clear(both, all, error);
    const auto first = static_cast<index_t>(
        std::count_if(both.chosen.begin(), both.chosen.end(),
                      [&](index_t i) { return i < prefix; }));
    // Halves are rounded up for the first head.
    const index_t of_first = (first + capacity - window + 1) / 2;
    const index_t counts[2] = {of_first, 2 * (capacity - window) - of_first};
    keep_lists want;
    for (index_t h = 0; h < 2; ++h) {
      const choice best = formulas::largest(of_head[h], counts[h]);
      decided = decided && is_clear(best, of_head[h], error);
      want.push_back(chosen_and_recent(best.chosen, prefix, len));
    }
    if (!decided) continue;
    ++clear;
    EXPECT_EQ(kept, want) << first;
  }
  EXPECT_GT(clear, 8);
}

// The mean over all query heads of the last row, which may be the only one.
TEST(tova, looks_with_the_last_row_of_the_chunk) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  int clear = 0;
  for (int round = 0; round < 20; ++round) {
    const attention_problem p = last_chunk(random);
    numbers mean(at(p.shape.kv_len), 0.0);
    for (index_t h = 0; h < 4; ++h) {
      const numbers a = formulas::probabilities(p, h, p.shape.q_len - 1);
      for (std::size_t i = 0; i < a.size(); ++i) mean[i] += a[i] / 4;
    }
    const choice want = formulas::largest(mean, 40, formulas::probability_error(p, 4 + 1));
    if (want.gap < 0) continue;
    ++clear;
    const keep_lists kept = tova{40}.choose_kept(contexts.any(), inputs(p));
    const std::vector<token_t> list =
        chosen_and_recent(want.chosen, p.shape.kv_len, p.shape.kv_len);
    EXPECT_EQ(kept, (keep_lists{list, list}));
  }
  EXPECT_GT(clear, 12);
}

}  // namespace
