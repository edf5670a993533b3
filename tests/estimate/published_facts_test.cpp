// SPDX-License-Identifier: Apache-2.0
//
// Closed forms from the papers and their code, which the library's selections must reproduce.

#include <sattn/api.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <set>
#include <utility>
#include <vector>

#include "method/cases.hpp"
#include "method/formulas.hpp"
#include "support/plans.hpp"
#include "support/problem.hpp"
#include "support/random.hpp"

namespace {

using sattn::attention_plan;
using sattn::budget;
using sattn::index_t;
using sattn::score_tensor;
using sattn::token_t;
using test_support::at;
using test_support::attention_problem;
using test_support::random_source;
using test_support::seed_trace;

/// One head.
attention_problem one_head_problem(random_source& random, index_t tokens, index_t dim = 16) {
  return attention_problem(random, {.q_len = tokens, .kv_len = tokens, .head_dim = dim,
                                    .v_dim = 4});
}

/// What the code of The Sparse Frontier reports for k of n blocks in each row; of k > n, too.
double frontier_sparsity(index_t n, index_t k) {
  const auto blocks = static_cast<double>(n);
  const auto kept = static_cast<double>(k);
  return 1 - (kept * (kept + 1) / 2 + (blocks - kept) * kept) / (blocks * (blocks + 1) / 2);
}

// The Sparse Frontier's Block-Sparse: sink, previous and diagonal block count inside k, so row i
// keeps min(i + 1, k) blocks and the sparsity is (n - k)(n - k + 1) / (n (n + 1)).
TEST(block_sparse, has_the_papers_sparsity) {
  const seed_trace trace;
  random_source random;
  test_support::all_contexts contexts;
  for (const index_t n : {3, 7, 16}) {
    const attention_problem p = one_head_problem(random, 16 * n);
    for (index_t k = 3; k <= n + 2; ++k) {
      const auto lists =
          sattn::sf_block_sparse(16, k).choose(contexts.any(), test_support::inputs(p));
      index_t blocks = 0;
      for (index_t i = 0; i < n; ++i) {
        EXPECT_EQ(lists.indptr[at(i + 1)] - lists.indptr[at(i)], std::min(i + 1, k));
        blocks += lists.indptr[at(i + 1)] - lists.indptr[at(i)];
      }
      const index_t dropped = k >= n ? 0 : (n - k) * (n - k + 1);
      EXPECT_EQ(n * (n + 1) - 2 * blocks, dropped) << n << " blocks, k " << k;
      if (k <= n) {
        EXPECT_NEAR(frontier_sparsity(n, k),
                    static_cast<double>(dropped) / static_cast<double>(n * (n + 1)), 1e-14);
      }
    }
  }
}

/// The k in [3, n] whose sparsity is nearest: what _get_blocks_for_sparsity of its code finds.
index_t blocks_for_sparsity(index_t n, double sparsity) {
  index_t best = 3;
  for (index_t k = 3; k <= n; ++k) {
    if (std::abs(frontier_sparsity(n, k) - sparsity) <
        std::abs(frontier_sparsity(n, best) - sparsity)) {
      best = k;
    }
  }
  return best;
}

// The block counts of its table of hyper-parameters, for budgets from 1/20 to 1/2; about
// n (1 - sqrt(sparsity)); and what the preset keeps then.
TEST(block_sparse, keeps_as_many_blocks_as_the_papers_budgets_say) {
  const std::vector<double> budgets{20, 15, 10, 7.5, 5, 3, 2};  // 1 of so many
  struct row {
    index_t tokens;
    std::vector<index_t> blocks;
  };
  for (const row& r : {row{16'384, {26, 35, 53, 71, 108, 188, 300}},
                       row{32'768, {52, 69, 105, 141, 216, 376, 600}},
                       row{65'536, {104, 139, 210, 283, 432, 752, 1200}}}) {
    const index_t n = r.tokens / 16;
    for (std::size_t i = 0; i < budgets.size(); ++i) {
      const double sparsity = 1 - 1 / budgets[i];
      EXPECT_EQ(blocks_for_sparsity(n, sparsity), r.blocks[i]) << r.tokens << ", " << budgets[i];
      EXPECT_NEAR(static_cast<double>(r.blocks[i]),
                  static_cast<double>(n) * (1 - std::sqrt(sparsity)), 1);
    }
  }
  const seed_trace trace;
  random_source random;
  test_support::all_contexts contexts;
  const index_t n = 1024;
  const attention_problem p = one_head_problem(random, 16 * n, 4);
  for (const double share : budgets) {
    const index_t k = blocks_for_sparsity(n, 1 - 1 / share);
    const auto lists =
        sattn::sf_block_sparse(16, k).choose(contexts.any(), test_support::inputs(p));
    const double kept = 2 * static_cast<double>(lists.indices.size()) /
                        static_cast<double>(n * (n + 1));
    // Within half of what one block more or less in each row changes.
    EXPECT_NEAR(kept, 1 / share, 1 / static_cast<double>(n)) << k;
  }
}

/// The tiles and single columns that MInference's kernel computes for 64 rows: its converter, which
/// walks the slashes from far to near. Needs distance 0.
struct minference_row {
  std::vector<index_t> tiles;  // first key of each 64
  std::vector<index_t> columns;
};
minference_row convert_row(index_t block_row, const std::set<token_t>& vertical,
                           const std::set<token_t>& slash) {
  constexpr index_t tile = 64;
  const index_t end_m = (block_row + 1) * tile;
  const std::vector<index_t> columns(vertical.begin(), vertical.end());
  const std::vector<index_t> slashes(slash.rbegin(), slash.rend());
  minference_row row;
  const auto save = [&](index_t begin, index_t end) {
    for (index_t key = begin; key < end; key += tile) row.tiles.push_back(key);
  };
  std::size_t s = 0, v = 0;
  const auto next_column = [&] { return v < columns.size() ? columns[v++] : end_m + tile; };
  index_t column = next_column();
  while (slashes[s] >= end_m) ++s;
  index_t range_end = std::max(end_m - slashes[s++], tile);
  index_t range_begin = range_end - tile;
  for (;;) {
    if (column < range_end) {
      if (column < range_begin) row.columns.push_back(column);
      column = next_column();
      continue;
    }
    if (s == slashes.size()) break;
    const index_t end = std::max(end_m - slashes[s++], tile);
    if (end > range_end + tile) {
      save(range_begin, range_end);
      range_begin = end - tile;
      range_end = end;
    } else if (end > range_end) {
      range_end += tile;
    }
  }
  save(range_begin, range_end);
  return row;
}

// What rows attend to: exactly the columns and distances, of tiles of 64 rows all that their
// diagonals touch, and whole tiles of 64 keys in MInference's kernel, in this order of size.
TEST(vertical_slash, of_covered_tiles_lies_between_the_exact_one_and_minferences_kernel) {
  const seed_trace trace;
  random_source random;
  int wider = 0;
  for (int round = 0; round < 40; ++round) {
    const index_t n = 64 * random.integer(1, 9);
    sattn::vertical_slash pattern;
    std::set<token_t> vertical, slash{0};
    for (index_t i = random.integer(0, 30); i > 0; --i) {
      vertical.insert(static_cast<token_t>(random.integer(0, n)));
    }
    for (index_t i = random.integer(0, 12); i > 0; --i) {
      slash.insert(static_cast<token_t>(random.integer(0, n)));
    }
    if (vertical.empty()) vertical.insert(0);
    pattern.columns.assign(vertical.begin(), vertical.end());
    pattern.distances.assign(slash.begin(), slash.end());
    const sattn::attention_shape shape = test_support::aligned_shape(n, n);
    const auto mask = [&](sattn::rounding rounding) {
      return expand(test_support::plan_of(shape, pattern,
                                          {.tile_rows = 64, .rounding = rounding}), 0);
    };
    const std::vector<std::uint8_t> exact = mask(sattn::rounding::exact);
    const std::vector<std::uint8_t> cover = mask(sattn::rounding::cover);
    for (index_t block = 0; block < n / 64; ++block) {
      const minference_row row = convert_row(block, vertical, slash);
      EXPECT_LE(row.tiles.size(), slash.size());
      std::vector<int> times(at(n + 64), 0);  // that a key is computed
      for (const index_t tile : row.tiles) {
        for (index_t key = tile; key < tile + 64; ++key) ++times[at(key)];
      }
      for (const index_t key : row.columns) ++times[at(key)];
      for (index_t q = 64 * block; q < 64 * (block + 1); ++q) {
        for (index_t key = 0; key < n; ++key) {
          const std::size_t pair = at(q * n + key);
          const bool wanted = key <= q && (vertical.contains(static_cast<token_t>(key)) ||
                                           slash.contains(static_cast<token_t>(q - key)));
          ASSERT_EQ(exact[pair] != 0, wanted) << q << ", " << key;
          ASSERT_LE(exact[pair], cover[pair]) << q << ", " << key;
          const int computed = key <= q ? times[at(key)] : 0;
          ASSERT_LE(int{cover[pair]}, computed) << q << ", " << key;
          ASSERT_LE(computed, 1) << q << ", " << key;
          wider += computed > int{cover[pair]} ? 1 : 0;
        }
      }
    }
  }
  EXPECT_GT(wider, 0);
}

// calc_sparsity of both papers' code, 1 - (64 * 64 * tiles + 64 * columns) / (N (N + 1) / 2), which
// is -63 / (N + 1) where every distance is selected.
TEST(vertical_slash, of_all_distances_has_the_sparsity_that_the_papers_code_reports) {
  for (const index_t n : {64, 640, 1024}) {
    std::set<token_t> slash;
    for (token_t d = 0; d < n; ++d) slash.insert(d);
    index_t cells = 0;
    for (index_t block = 0; block < n / 64; ++block) {
      const minference_row row = convert_row(block, {0, 5}, slash);
      cells += 64 * 64 * std::ssize(row.tiles) + 64 * std::ssize(row.columns);
    }
    EXPECT_EQ(n * (n + 1) - 2 * cells, -63 * n);
  }
}

// FlexPrefill's code divides the blocks that it computes by all pairs of blocks.
TEST(flexprefill, dense_has_the_ratio_that_its_code_reports) {
  const seed_trace trace;
  random_source random;
  test_support::all_contexts contexts;
  for (const index_t n : {3, 8, 13}) {  // blocks
    const attention_problem p = one_head_problem(random, 32 * n);
    const attention_plan plan = test_support::prefill_plan(
        contexts.any(), p,
        sattn::flexprefill(1, 0.1, 32, 100'000, 32));
    const std::vector<std::uint8_t> mask = expand(plan, 0);
    index_t blocks = 0;
    for (index_t i = 0; i < n; ++i) {
      for (index_t j = 0; j < n; ++j) {  // the lower left pair of a block is the first to be legal
        blocks += mask[at((32 * i + 31) * 32 * n + 32 * j)];
      }
    }
    EXPECT_EQ(2 * n * blocks, (n + 1) * n * n);  // blocks / n^2 = (n + 1) / (2 n)
  }
}

// Its code counts whole 64 x 64 tiles, so that a dense plan has a sparsity of -63 / (N + 1).
TEST(vertical_slash, dense_fills_as_many_64_wide_tiles_as_minference_counts) {
  sattn::serial_executor executor;
  sattn::context ctx(executor);
  for (const index_t n : {64, 640}) {
    const sattn::attention_shape shape{
        .q_len = n, .kv_len = n, .q_heads = 1, .kv_heads = 1, .q_offset = 0};
    sattn::vertical_slash all_distances{{0, 5}, {}};
    for (token_t d = 0; d < n; ++d) all_distances.distances.push_back(d);
    const auto expect_cells = [&](const sattn::any_pattern& pattern) {
      const auto plan = sattn::plan_prefill(
          ctx, shape, pattern, {.tile_rows = 64, .rounding = sattn::rounding::cover});
      index_t cells = 0;
      for (index_t tile = 0; tile < plan.tiles(); ++tile) {
        sattn::tile_cursor cursor(plan, 0, tile, 16, {0, static_cast<token_t>(n)});
        sattn::key_range keys;
        while (cursor.next_range(keys)) cells += 64 * sattn::round_up(keys.size(), 64);
      }
      // 1 - cells / (n (n + 1) / 2) = -63 / (n + 1), without a division.
      EXPECT_EQ(n * (n + 1) - 2 * cells, -63 * n);
    };
    expect_cells(sattn::dense{});
    expect_cells(all_distances);
  }
}

// XAttention at stride 1 is exact block mass: what is chosen reaches the threshold and would not
// without the block that came last. How long the prompt is does not matter to what came before.
TEST(xattention, of_stride_1_is_block_mass_that_just_reaches_the_threshold) {
  constexpr index_t block = 16, blocks = 16;
  constexpr double threshold = 0.7;
  const seed_trace trace;
  random_source random;
  test_support::all_contexts contexts;
  sattn::context& ctx = contexts.any();
  attention_problem p = one_head_problem(random, 256);
  p.q.fill_normal(random, 2);
  const double error = formulas::probability_error(p, block * block + blocks);
  std::vector<formulas::numbers> mass(blocks, formulas::numbers(blocks, 0.0));
  for (index_t row = 0; row < 256; ++row) {
    const formulas::numbers a = formulas::probabilities(p, 0, row);
    for (index_t key = 0; key <= row; ++key) mass[at(row / block)][at(key / block)] += a[at(key)];
  }
  const auto scores_of = [&](const attention_problem& of) {
    return sattn::antidiagonal_block_scores(ctx, of.shape, of.q.view(), of.k.view(),
                                            {1, block, {.reduce = sattn::head_reduce::none}});
  };
  const score_tensor scores = scores_of(p);
  const auto method = [](double share) {
    return sattn::xattention(1, share, block);
  };
  const auto lists = method(threshold).choose(ctx, test_support::inputs(p));
  int dropped = 0;
  for (index_t i = 0; i < blocks; ++i) {
    double total = 0;
    for (index_t j = 0; j <= i; ++j) {
      const double exact = mass[at(i)][at(j)];
      EXPECT_NEAR(double{scores.row(0, i)[at(j)]}, exact, error * exact);
      total += exact;
    }
    double chosen = 0, last = formulas::infinite;
    for (index_t n = lists.indptr[at(i)]; n < lists.indptr[at(i + 1)]; ++n) {
      const index_t j = lists.indices[at(n)];
      chosen += mass[at(i)][at(j)];
      if (j != 0 && j != i) last = std::min(last, mass[at(i)][at(j)]);  // not protected
    }
    EXPECT_GE(chosen, threshold * total * (1 - 2 * error));
    if (last != formulas::infinite) {
      EXPECT_LT(chosen - last, threshold * total * (1 + 2 * error));
    }
    dropped += total > chosen * (1 + 2 * error) ? 1 : 0;
  }
  EXPECT_GT(dropped, 2);
  EXPECT_EQ(test_support::prefill_plan(ctx, p, method(1.0)).stats().density_selected(), 1.0);
  for (const index_t shorter : {255, 241, 230}) {
    const attention_problem part = test_support::part_of(p, 0, shorter, shorter);
    const score_tensor of_part = scores_of(part);
    for (index_t i = 0; i < shorter / block; ++i) {
      for (index_t j = 0; j <= i; ++j) {
        EXPECT_EQ(of_part.row(0, i)[at(j)], scores.row(0, i)[at(j)]) << shorter;
      }
    }
  }
}

// MoBA: every row takes the k blocks of keys whose mean fits its query best, its own, up to its
// position, among them. One block is block-diagonal attention, all of them are dense attention.
TEST(moba, is_block_diagonal_for_one_block_and_dense_for_all) {
  constexpr index_t len = 210, block = 32, blocks = 7;
  const seed_trace trace;
  random_source random;
  test_support::all_contexts contexts;
  sattn::context& ctx = contexts.any();
  attention_problem p(random, {.q_len = len, .kv_len = len, .q_heads = 2, .kv_heads = 1});
  score_tensor gate(2, len, blocks, 0.0f);
  for (index_t h = 0; h < 2; ++h) {
    for (index_t row = 0; row < len; ++row) {
      for (index_t j = 0; j < blocks; ++j) {
        gate.row(h, row)[at(j)] = static_cast<float>(formulas::pooled(p, h, row, j, 1, block));
      }
    }
  }
  for (const index_t k : {1, 2, 4, 7}) {
    const attention_plan plan = test_support::prefill_plan(
        ctx, p,
        sattn::scored_blocks{gate, {budget::fixed(k), {.diagonal = true}}, 1, token_t(block)});
    EXPECT_TRUE(test_support::selects(plan, [&](index_t head, index_t row, index_t key) {
      const index_t own = row / block, j = key / block;
      if (j == own) return true;
      index_t better = 1;  // the row's own block
      for (index_t other = 0; other < own; ++other) {
        const float a = gate.row(head, row)[at(other)], b = gate.row(head, row)[at(j)];
        better += a > b || (a == b && other < j) ? 1 : 0;
      }
      return better < k;
    })) << k;
    EXPECT_EQ(plan.stats().density_selected() == 1, k == blocks);
    if (k == 1) {
      EXPECT_TRUE(test_support::selects(plan, [](index_t, index_t row, index_t key) {
        return key / block == row / block;
      }));
    }
    EXPECT_TRUE(test_support::within_bound(contexts, plan, p));
  }
}

// DeepSeek's indexer: sum over its heads of w relu(q . k), after the causal mask the best
// min(2048, keys), the same for all heads. Rectified products are often 0: the first of them stay.
TEST(sparse_indexer, keeps_2048_keys_or_all) {
  const seed_trace trace;
  random_source random;
  test_support::all_contexts contexts;
  sattn::context& ctx = contexts.any();
  for (const index_t keys : {100, 2049, 2300}) {
    constexpr index_t rows = 3, heads = 2, dim = 4;
    const attention_problem p = test_support::decode_problem(random, keys, rows);
    const std::vector<float> q = random.normal_tensor(rows * heads * dim);
    const std::vector<float> k = random.normal_tensor(keys * dim);
    score_tensor scores(1, rows, keys, 0.0f);
    int zeros = 0;
    for (index_t row = 0; row < rows; ++row) {
      for (index_t key = 0; key < keys; ++key) {
        double sum = 0;
        for (index_t h = 0; h < heads; ++h) {
          const double weight = h == 0 ? 0.7 : -0.2;
          sum += weight * std::max(0.0, formulas::dot(q.data() + (row * heads + h) * dim,
                                                      k.data() + key * dim, dim));
        }
        scores.row(0, row)[at(key)] = static_cast<float>(sum);
        zeros += sum == 0 ? 1 : 0;
      }
    }
    EXPECT_GT(zeros, keys / 4);
    const attention_plan plan = test_support::decode_plan(
        ctx, p, sattn::scored_tokens{scores, {budget::fixed(2048)}});
    for (index_t row = 0; row < rows; ++row) {
      const index_t legal = keys - rows + row + 1;
      std::vector<std::pair<float, index_t>> order;
      for (index_t key = 0; key < legal; ++key) {
        order.emplace_back(-scores.row(0, row)[at(key)], key);
      }
      std::sort(order.begin(), order.end());
      std::vector<std::uint8_t> want(at(keys), 0);
      for (index_t i = 0; i < std::min<index_t>(2048, legal); ++i) {
        want[at(order[at(i)].second)] = 1;
      }
      for (index_t h = 0; h < 4; ++h) {
        const std::vector<std::uint8_t> mask = expand(plan, h);
        const auto first = mask.begin() + row * keys;
        EXPECT_TRUE(std::equal(want.begin(), want.end(), first)) << keys << ", row " << row;
      }
    }
  }
}

// The Sparse Frontier adds to what each head keeps the best of what is left; kvpress drops the
// worst of all heads, but for what each keeps. Both keep the same.
TEST(ada_kv, keeps_what_kvpress_does_not_prune) {
  const seed_trace trace;
  random_source random;
  for (int round = 0; round < 60; ++round) {
    const index_t heads = random.integer(1, 5), keys = random.integer(1, 60);
    std::vector<float> scores;
    for (index_t h = 0; h < heads; ++h) {
      const double scale = random.uniform();
      for (index_t i = 0; i < keys; ++i) {
        scores.push_back(static_cast<float>(scale * std::abs(random.normal())));
      }
    }
    for (index_t kept = 0; kept <= keys; kept += random.integer(1, 4)) {
      const double alpha = random.pick({0.0, 0.2, 0.5, 1.0});
      const auto safe = static_cast<index_t>(static_cast<double>(kept) * alpha);
      std::vector<float> protected_scores = scores;
      for (index_t h = 0; h < heads; ++h) {
        const formulas::numbers of_head(scores.begin() + h * keys,
                                        scores.begin() + (h + 1) * keys);
        for (const index_t i : formulas::largest(of_head, safe).chosen) {
          protected_scores[at(h * keys + i)] = std::numeric_limits<float>::max();
        }
      }
      std::vector<std::pair<float, index_t>> order;
      for (index_t i = 0; i < heads * keys; ++i) order.emplace_back(protected_scores[at(i)], i);
      std::sort(order.begin(), order.end());
      std::vector<std::set<token_t>> want(at(heads));
      for (index_t i = heads * (keys - kept); i < heads * keys; ++i) {
        const index_t unit = order[at(i)].second;
        want[at(unit / keys)].insert(static_cast<token_t>(unit % keys));
      }
      std::vector<std::vector<token_t>> got;
      sattn::choose_over_heads(scores, heads, {.of_head = kept, .floor = safe}, got);
      for (index_t h = 0; h < heads; ++h) {
        EXPECT_EQ(std::set<token_t>(got[at(h)].begin(), got[at(h)].end()), want[at(h)])
            << kept << " of " << keys << ", " << safe << " safe";
      }
    }
  }
}

}  // namespace
