// SPDX-License-Identifier: Apache-2.0
#include <sattn/method/compose.hpp>
#include <sattn/method/duo.hpp>
#include <sattn/method/quest.hpp>
#include <sattn/method/top_k.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "method/formulas.hpp"
#include "support/errors.hpp"
#include "support/plans.hpp"
#include "support/problem.hpp"
#include "support/scores.hpp"
#include "support/stored.hpp"

namespace {

using namespace sattn;         // NOLINT(google-build-using-namespace)
using namespace test_support;  // NOLINT(google-build-using-namespace)
using formulas::choice;
using formulas::numbers;

constexpr double rounding_gap = 1e-4;

attention_problem decode_problem(random_source& random, index_t kv_len, index_t rows = 1,
                                 index_t q_heads = 4, index_t kv_heads = 2) {
  return attention_problem(random, {.q_len = rows, .kv_len = kv_len, .q_heads = q_heads,
                                    .kv_heads = kv_heads, .head_dim = 16, .v_dim = 8});
}

std::vector<page_summaries> summaries_of(const attention_problem& p, token_t page_size) {
  std::vector<page_summaries> all(at(p.shape.kv_heads),
                                  page_summaries({p.k.view().dim, page_size, dtype::f32}));
  for (index_t h = 0; h < p.shape.kv_heads; ++h) all[at(h)].update(p.k.view(), h);
  return all;
}

template <attention_method M>
attention_plan plan_of_method(context& ctx, const attention_problem& p, const M& method,
                              std::span<const page_summaries> summaries = {},
                              index_t layer = method_inputs::no_layer) {
  return plan_decode(ctx, p.q.view(), p.kv(), method, {.layer = layer, .summaries = summaries})
      .plan;
}

// ---- Quest --------------------------------------------------------------------------------------

// sum_c max(q[c] min_j[c], q[c] max_j[c]) over the keys of a page that exist.
double page_bound(const attention_problem& p, index_t head, index_t row, index_t page,
                  index_t page_size) {
  double sum = 0;
  for (index_t c = 0; c < p.q.view().dim; ++c) {
    double low = formulas::infinite, high = -formulas::infinite;
    for (index_t t = page * page_size; t < std::min(p.shape.kv_len, (page + 1) * page_size); ++t) {
      const double x = p.k.row(t, head / p.shape.group_size())[c];
      low = std::min(low, x);
      high = std::max(high, x);
    }
    const double q = p.q.row(row, head)[c];
    sum += std::max(q * low, q * high);
  }
  return sum;
}

// The Sparse Frontier: B / p pages of those before the current one, by the sum over the group, and
// the current one. Quest's kernels: B / p pages with the current one, for each query head.
TEST(quest, chooses_by_the_formula) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  int clear = 0;
  for (const index_t len : {1, 15, 16, 17, 200, 640, 1000}) {
    const attention_problem p = decode_problem(random, len);
    const auto summaries = summaries_of(p, 16);
    const index_t current = (len - 1) / 16;
    for (const bool frontier : {true, false}) {
      const index_t budget_tokens = 128;
      const attention_plan plan =
          frontier ? plan_of_method(contexts.any(), p, sf_quest(budget_tokens), summaries)
                   : plan_of_method(contexts.any(), p, quest(budget_tokens), summaries);
      std::vector<choice> of_head;
      bool all_clear = true;
      for (index_t h = 0; h < 4; ++h) {
        numbers scores;
        for (index_t j = 0; j < current; ++j) {
          double score = 0;
          for (index_t g = h / 2 * 2; g < h / 2 * 2 + 2; ++g) {
            if (frontier || g == h) score += page_bound(p, g, 0, j, 16);
          }
          scores.push_back(score);
        }
        of_head.push_back(formulas::largest(scores, frontier ? 8 : 7));
        all_clear = all_clear && of_head.back().gap > rounding_gap;
        of_head.back().chosen.insert(current);
      }
      if (!all_clear) continue;
      ++clear;
      EXPECT_TRUE(selects(plan, [&](index_t head, index_t, index_t key) {
        return of_head[at(head)].chosen.contains(key / 16);
      })) << len;
      if (len >= 200) {
        // Whole pages but for the last one.
        const index_t pages = frontier ? 9 : 8;
        const index_t keys = pages * 16 - (16 - ((len - 1) % 16 + 1));
        EXPECT_EQ(plan.stats().selected, 4 * keys);
      }
      EXPECT_TRUE(within_bound(contexts, plan, p));
    }
  }
  EXPECT_GT(clear, 10);
}

TEST(quest, runs_dense_in_its_first_layers_and_where_the_budget_is_beyond_the_length) {
  random_source random(1);
  all_contexts contexts;
  const attention_problem p = decode_problem(random, 700);
  const auto summaries = summaries_of(p, 16);
  for (const index_t layer : {0, 1, 2, 30}) {
    const auto stats = plan_of_method(contexts.any(), p, quest(256), summaries, layer).stats();
    EXPECT_EQ(stats.density_selected() == 1.0, layer < 2) << layer;
  }
  EXPECT_EQ(plan_of_method(contexts.any(), p, quest(256), {}, 0).stats().density_selected(), 1.0);
  const attention_result want =
      run(contexts.any(), plan_decode(contexts.any(), p.shape, dense{}), p);
  for (const index_t tokens : {704, 10'000}) {
    EXPECT_TRUE(bit_equal(
        run(contexts.any(), plan_of_method(contexts.any(), p, quest(tokens), summaries), p), want));
  }
}

// Rows of a draft: each by its own query, over the pages that it may see.
TEST(quest, rows_of_a_draft_choose_as_one_after_the_other) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  const attention_problem p = decode_problem(random, 330, 12);
  const attention_plan all = plan_of_method(contexts.any(), p, sf_quest(64), summaries_of(p, 16));
  for (index_t row = 0; row < 12; ++row) {
    attention_problem one = p;
    one.shape = {1, 318 + row + 1, 4, 2, static_cast<token_t>(318 + row)};
    one.q = owned_tensor(1, 4, 16);
    one.k = owned_tensor(319 + row, 2, 16);
    one.v = owned_tensor(319 + row, 2, 8);
    for (index_t h = 0; h < 4; ++h) std::copy_n(p.q.row(row, h), 16, one.q.row(0, h));
    for (index_t t = 0; t < 319 + row; ++t) {
      for (index_t h = 0; h < 2; ++h) {
        std::copy_n(p.k.row(t, h), 16, one.k.row(t, h));
        std::copy_n(p.v.row(t, h), 8, one.v.row(t, h));
      }
    }
    const attention_plan plan =
        plan_of_method(contexts.any(), one, sf_quest(64), summaries_of(one, 16));
    // Bounds of the page that is filling also know the keys of later rows.
    for (index_t h = 0; h < 4; ++h) {
      const auto mask = expand(plan, h);
      const auto of_all = expand(all, h);
      for (index_t key = 0; key < 319 + row; ++key) {
        EXPECT_EQ(of_all[at(row * 330 + key)], mask[at(key)]) << row << " " << key;
      }
    }
  }
}

TEST(quest, refuses_summaries_that_do_not_fit) {
  random_source random(1);
  all_contexts contexts;
  const attention_problem p = decode_problem(random, 50);
  auto summaries = summaries_of(p, 16);
  const auto error = [&](std::span<const page_summaries> s) {
    return error_of([&] { plan_of_method(contexts.any(), p, sf_quest(), s); });
  };
  EXPECT_EQ(error(summaries), "");
  EXPECT_NE(error({}), "");
  EXPECT_NE(error(std::span(summaries).first(1)), "");
  stored_view shorter = p.k.view();
  shorter.tokens = 49;
  summaries[1].truncate(shorter, 1);
  EXPECT_NE(error(summaries), "");
  summaries[1] = page_summaries({16, 8, dtype::f32});
  summaries[1].update(p.k.view(), 1);
  EXPECT_NE(error(summaries), "");
}

// ---- exact and quantised top-k, coverage --------------------------------------------------------

TEST(top_k, is_the_most_probable_keys_and_a_shadow_those_of_its_own) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (const bool shadow : {false, true}) {
    attention_problem p = decode_problem(random, 400, 2);
    attention_problem looked_at = p;
    const encoded_rows rows(looked_at.k, shadow ? dtype::i8 : dtype::f32);
    const stored_tensor copy(rows, storage_layout::strided, random);
    const attention_plan plan =
        shadow ? plan_of_method(contexts.any(), p, shadow_top_k(30, copy.view))
               : plan_of_method(contexts.any(), p, top_k(30));
    int clear = 0;
    for (index_t h = 0; h < 4; ++h) {
      const auto mask = expand(plan, h);
      for (index_t row = 0; row < 2; ++row) {
        const choice want = formulas::largest(formulas::probabilities(looked_at, h, row), 30);
        if (want.gap < 1e-6) continue;
        ++clear;
        for (index_t key = 0; key < 400; ++key) {
          EXPECT_EQ(mask[at(row * 400 + key)] != 0, want.chosen.contains(key));
        }
      }
    }
    EXPECT_GT(clear, 4);
  }
}

// The fewest keys, best first, whose probabilities among the candidates reach the share.
formulas::units covering(const numbers& scores, double share, double& gap) {
  double all = 0;
  std::vector<std::pair<double, index_t>> order;
  for (index_t i = 0; i < std::ssize(scores); ++i) {
    all += scores[at(i)];
    order.emplace_back(-scores[at(i)], i);
  }
  std::sort(order.begin(), order.end());
  formulas::units chosen;
  double mass = 0;
  for (const auto& [negative, i] : order) {
    if (mass >= share * all) break;
    mass -= negative;
    gap = std::min(gap, std::abs(mass - share * all));
    chosen.insert(i);
  }
  return chosen;
}

// Groups of up to 20 heads, more than fill a block of lanes; by the keys or by a copy of them.
TEST(twilight, covers_the_mass_of_what_was_selected_first) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  int clear = 0;
  for (const bool selects_first : {false, true}) {
    for (const index_t group : {2, 3, 20}) {
      for (const bool shadow : {false, true}) {
        const attention_problem p = decode_problem(random, 500, 1, 2 * group, 2);
        attention_problem looked_at = p;
        const encoded_rows rows(looked_at.k, shadow ? dtype::i8 : dtype::f32);
        const stored_tensor copy(rows, storage_layout::strided, random);
        const std::optional<stored_view> keys =
            shadow ? std::optional(copy.view) : std::nullopt;
        const auto summaries = summaries_of(p, 16);
        const attention_plan first = plan_of_method(contexts.any(), p, sf_quest(160), summaries);
        const attention_plan plan =
            selects_first
                ? plan_of_method(contexts.any(), p, twilight(sf_quest(160), 0.6, keys), summaries)
                : plan_of_method(contexts.any(), p, twilight(0.6, keys));
        for (index_t h = 0; h < 2 * group; ++h) {
          numbers scores = formulas::probabilities(looked_at, h, 0);
          const auto candidates = expand(first, h);
          for (index_t key = 0; key < 500 && selects_first; ++key) {
            if (candidates[at(key)] == 0) scores[at(key)] = 0;
          }
          double gap = formulas::infinite;
          const formulas::units want = covering(scores, 0.6, gap);
          if (gap < 1e-5) continue;
          ++clear;
          const auto mask = expand(plan, h);
          for (index_t key = 0; key < 500; ++key) {
            ASSERT_EQ(mask[at(key)] != 0, want.contains(key)) << h << " " << key;
          }
        }
      }
    }
  }
  EXPECT_GT(clear, 100);
}

// One list for a group, by the mean of its heads' probabilities; of up to 40 heads.
TEST(twilight, joins_the_heads_of_a_group_where_asked) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  int clear = 0;
  for (const index_t group : {2, 20, 2, 20, 3}) {
    const attention_problem p = decode_problem(random, 300, 1, 2 * group, 2);
    pruned<top_k_method> method{top_k(300), {budget::fixed(25)}, head_reduce::mean};
    const attention_plan plan = plan_of_method(contexts.any(), p, method);
    for (index_t set = 0; set < 2; ++set) {
      numbers mean(300, 0.0);
      for (index_t h = set * group; h < (set + 1) * group; ++h) {
        const numbers of_head = formulas::probabilities(p, h, 0);
        for (std::size_t i = 0; i < 300; ++i) mean[i] += of_head[i];
      }
      const choice want = formulas::largest(mean, 25);
      if (want.gap < 1e-6) continue;
      ++clear;
      const auto mask = expand(plan, set * group);
      for (index_t key = 0; key < 300; ++key) {
        EXPECT_EQ(mask[at(key)] != 0, want.chosen.contains(key));
      }
    }
    // Heads with lists of their own have no common candidates.
    const pruned<quest_method> apart{quest(64), {budget::fixed(25)}, head_reduce::mean};
    const auto summaries = summaries_of(p, 16);
    EXPECT_NE(error_of([&] { plan_of_method(contexts.any(), p, apart, summaries); }), "");
  }
  EXPECT_GT(clear, 4);
}

TEST(twilight, of_selected_keys_has_two_dense_layers) {
  random_source random(1);
  all_contexts contexts;
  const attention_problem p = decode_problem(random, 700);
  const auto summaries = summaries_of(p, 16);
  for (const index_t layer : {0, 1, 2}) {
    const auto plan = plan_of_method(contexts.any(), p, twilight(quest(256)), summaries, layer);
    EXPECT_EQ(plan.stats().density_selected() == 1.0, layer < 2) << layer;
  }
}

TEST(twilight, keeps_protected_keys_of_the_list) {
  random_source random(3);
  all_contexts contexts;
  const attention_problem p = decode_problem(random, 300);
  const auto summaries = summaries_of(p, 16);
  const pruned<quest_method> method{
      sf_quest(64), {budget::fixed(10), {.first = 2, .recent = 3, .diagonal = true}}};
  const attention_plan plan = plan_of_method(contexts.any(), p, method, summaries);
  const attention_plan first = plan_of_method(contexts.any(), p, sf_quest(64), summaries);
  for (index_t h = 0; h < 4; ++h) {
    const auto mask = expand(plan, h), candidates = expand(first, h);
    std::vector<index_t> listed;
    for (index_t key = 0; key < 300; ++key) {
      if (candidates[at(key)] != 0) listed.push_back(key);
    }
    EXPECT_EQ(std::count(mask.begin(), mask.end(), 1), 10);
    for (const std::size_t i : {std::size_t{0}, std::size_t{1}, listed.size() - 3,
                                listed.size() - 2, listed.size() - 1}) {
      EXPECT_EQ(mask[at(listed[i])], 1);
    }
  }
}

// ---- DuoAttention -------------------------------------------------------------------------------

TEST(duo, streams_the_heads_that_do_not_retrieve) {
  random_source random(1);
  all_contexts contexts;
  const attention_problem p = decode_problem(random, 500, 3);
  EXPECT_TRUE(selects(plan_of_method(contexts.any(), p, duo{{false, true}, 4, 50}),
                      [&](index_t head, index_t row, index_t key) {
                        return head >= 2 || key < 4 || 497 + row - key < 50;
                      }));
  EXPECT_NE(error_of([&] { plan_of_method(contexts.any(), p, duo{{true}}); }), "");
}

TEST(duo, reads_its_gates_and_takes_the_quantile) {
  const duo_gates gates = read_duo_gates("0.1\t0.9\t0.5\n 1 0.5  0.0\r\n\n");
  EXPECT_EQ(gates, (duo_gates{{0.1, 0.9, 0.5}, {1.0, 0.5, 0.0}}));
  const auto heads = [&](index_t layer, double sparsity) {
    return duo_layer(gates, layer, sparsity).retrieves;
  };
  using bits = std::vector<bool>;
  EXPECT_EQ(heads(0, 0.0), (bits{true, true, true}));
  EXPECT_EQ(heads(1, 0.0), (bits{true, true, true}));
  // ceil(0.5 * 5) = 3 stream: of the two gates of 0.5 the first retrieves.
  EXPECT_EQ(heads(0, 0.5), (bits{false, true, true}));
  EXPECT_EQ(heads(1, 0.5), (bits{true, false, false}));
  EXPECT_EQ(heads(1, 0.9), (bits{true, false, false}));
  EXPECT_EQ(heads(1, 1.0), (bits{false, false, false}));
  EXPECT_TRUE(read_duo_gates("").empty());
  EXPECT_NE(error_of([] { read_duo_gates("1 2\n3"); }), "");
  EXPECT_NE(error_of([] { read_duo_gates("1 2\n3 x"); }).find("line 2"), std::string::npos);
  EXPECT_NE(error_of([&] { duo_layer(gates, 2, 0.5); }), "");
  EXPECT_NE(error_of([&] { duo_layer(gates, 0, 1.5); }), "");
}

// ---- compositions -------------------------------------------------------------------------------

// Preselect, then retrieve: Quest among the pages that hold what was kept of the first keys, those
// that came later and, for each row of a draft, its own.
TEST(quest, chooses_within_what_was_preselected) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  int clear = 0;
  for (int round = 0; round < 6; ++round) {
    const index_t len = random.integer(560, 600), rows = random.integer(1, 20);
    const index_t known = random.pick<index_t>({500, 512, len});
    const attention_problem p = decode_problem(random, len, rows);
    const auto summaries = summaries_of(p, 16);
    const keep_lists kept = {{1, 2, 40, 41, 100, 101, 200, 260, 300, 333, 400},
                             {0, 17, 33, 64, 90, 128, 150, 188, 210, 480}};
    quest_method method = sf_quest(80);
    method.within = pages_of(kept, 16, known);
    const attention_plan plan = plan_of_method(contexts.any(), p, method, summaries);
    for (index_t h = 0; h < 4; ++h) {
      const auto mask = expand(plan, h);
      for (index_t row = 0; row < rows; ++row) {
        const index_t position = len - rows + row;
        const index_t current = position / 16;
        numbers scores(at(current), -formulas::infinite);
        for (index_t j = 0; j < current; ++j) {
          bool inside = j >= known / 16;
          for (const token_t key : kept[at(h / 2)]) inside = inside || key / 16 == j;
          if (!inside) continue;
          scores[at(j)] = page_bound(p, h / 2 * 2, row, j, 16) +
                          page_bound(p, h / 2 * 2 + 1, row, j, 16);
        }
        choice want = formulas::largest(scores, 5);
        if (want.gap < rounding_gap) continue;
        ++clear;
        want.chosen.insert(current);
        for (index_t key = 0; key < len; ++key) {
          ASSERT_EQ(mask[at(row * len + key)] != 0,
                    key <= position && want.chosen.contains(key / 16)) << row << " " << key;
        }
      }
    }
  }
  EXPECT_GT(clear, 50);
}

TEST(quest, refuses_preselected_pages_that_do_not_fit) {
  random_source random(1);
  all_contexts contexts;
  const attention_problem p = decode_problem(random, 600);
  const auto summaries = summaries_of(p, 16);
  const auto error = [&](const block_lists& pages) {
    quest_method method = sf_quest(80);
    method.within = preselected_pages{pages, 600};
    return error_of([&] { plan_of_method(contexts.any(), p, method, summaries); });
  };
  EXPECT_EQ(error({1, 16, {0, 2}, {1, 5}}), "");
  EXPECT_EQ(error({1, 16, {0, 1}, {40}}), "");  // a page that does not exist chooses nothing
  EXPECT_NE(error({1, 8, {0, 2}, {1, 5}}), "");
  EXPECT_NE(error({1, 16, {0, 5}, {1}}), "");
  EXPECT_NE(error({1, 16, {0, 2}, {5, 1}}), "");
  EXPECT_NE(error({1, 16, {1, 2}, {5, 6}}), "");
  EXPECT_NE(error({1, 16, {0, 2, 1, 3}, {5, 6, 7}, 3}), "");
  EXPECT_NE(error_of([] { quest(512, 0); }), "");
  EXPECT_NE(error_of([] { sf_quest(-1); }), "");
}

TEST(decode_methods, of_no_heads_choose_nothing) {
  all_contexts contexts;
  random_source random(1);
  const attention_problem p(random, {.q_len = 1, .kv_len = 5, .q_heads = 0, .kv_heads = 0});
  EXPECT_EQ(plan_of_method(contexts.any(), p, sf_quest()).stats().legal, 0);
  EXPECT_EQ(plan_of_method(contexts.any(), p, twilight(0.5)).stats().legal, 0);
}

TEST(pages_of, are_those_that_hold_a_key) {
  const preselected_pages chosen = pages_of({{0, 1, 15, 16, 50}, {}, {31}}, 16, 60);
  EXPECT_EQ(chosen.pages.indptr, (std::vector<index_t>{0, 3, 3, 4}));
  EXPECT_EQ(chosen.pages.indices, (std::vector<token_t>{0, 1, 3, 1}));
  EXPECT_EQ(chosen.pages.sets, 3);
  EXPECT_EQ(chosen.keys, 60);
  EXPECT_NE(error_of([] { pages_of({{2, 1}}, 16, 60); }), "");
  EXPECT_NE(error_of([] { pages_of({{}}, 0, 60); }), "");
}

// A method that counts how often it is asked.
struct counting_method {
  int* calls;
  token_lists choose(context&, const method_inputs& in) const {
    ++*calls;
    return {1, {0, 1}, {static_cast<token_t>(in.shape.kv_len / 2)}};
  }
};

TEST(reused, asks_once_for_so_many_steps_and_layers) {
  random_source random(1);
  all_contexts contexts;
  int calls = 0;
  reused method(counting_method{&calls}, 3, 2);
  std::optional<attention_problem> p;
  int expected_calls = 0;
  for (index_t step = 0; step < 8; ++step) {
    p.emplace(decode_problem(random, 100 + step));
    const method_inputs in{p->shape, p->q.view(), p->k.view()};
    for (index_t layer = 0; layer < 5; ++layer) {
      if (step % 3 == 0 && layer % 2 == 0) ++expected_calls;
      const any_pattern pattern = method.choose(contexts.any(), in, step, layer);
      EXPECT_EQ(calls, expected_calls);
      const index_t made = step / 3 * 3;
      EXPECT_TRUE(selects(plan_decode(contexts.any(), p->shape, pattern),
                          [&](index_t, index_t, index_t key) {
                            return key == (100 + made) / 2 || key >= 100 + made;
                          }))
          << step << " " << layer;
    }
  }
  // The method is told the layer, and what is forgotten is chosen anew.
  const auto summaries = summaries_of(*p, 16);
  reused layers(quest(32), 4, 1);
  method_inputs known{p->shape, p->q.view(), p->k.view()};
  known.summaries = summaries;
  for (const index_t layer : {0, 2}) {
    const auto plan = plan_decode(contexts.any(), p->shape,
                                  layers.choose(contexts.any(), known, 0, layer));
    EXPECT_EQ(plan.stats().density_selected() == 1.0, layer == 0);
  }
  method.forget();
  method.choose(contexts.any(), {p->shape, p->q.view(), p->k.view()}, 8, 0);
  EXPECT_EQ(calls, expected_calls + 1);
  reused fresh(counting_method{&calls}, 3, 2);
  const method_inputs in{p->shape, p->q.view(), p->k.view()};
  EXPECT_NE(error_of([&] { fresh.choose(contexts.any(), in, 0, 1); }), "");
  EXPECT_NE(error_of([&] { reused(counting_method{&calls}, 0, 1); }), "");
}

TEST(decode_methods, choose_the_same_on_any_threads) {
  const seed_trace trace;
  random_source random;
  thread_contexts contexts;
  const attention_problem p = decode_problem(random, 500, 3);
  const auto summaries = summaries_of(p, 16);
  const auto same = [&](const auto& method) {
    const attention_plan want = plan_of_method(contexts.serial(), p, method, summaries);
    for (context& ctx : contexts) {
      const attention_plan got = plan_of_method(ctx, p, method, summaries);
      for (index_t h = 0; h < 4; ++h) EXPECT_EQ(expand(got, h), expand(want, h));
    }
  };
  same(quest(64));
  same(sf_quest(64));
  same(top_k(20));
  same(twilight(0.7));
  same(twilight(sf_quest(128), 0.7));
}

}  // namespace
