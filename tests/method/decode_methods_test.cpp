// SPDX-License-Identifier: Apache-2.0
#include <sattn/method/a_shape.hpp>
#include <sattn/method/compose.hpp>
#include <sattn/method/duo.hpp>
#include <sattn/method/quest.hpp>
#include <sattn/method/top_k.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "method/cases.hpp"
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

// ---- Quest --------------------------------------------------------------------------------------

TEST(quest, runs_dense_in_its_first_layers_and_where_the_budget_is_beyond_the_length) {
  random_source random(1);
  all_contexts contexts;
  const attention_problem p = decode_problem(random, 700);
  const auto summaries = summaries_of(p, 16);
  for (const index_t layer : {0, 1, 2, 30}) {
    const auto stats = decode_plan(contexts.any(), p, quest(256), summaries, layer).stats();
    EXPECT_EQ(stats.density_selected() == 1.0, layer < 2) << layer;
  }
  EXPECT_EQ(decode_plan(contexts.any(), p, quest(256), {}, 0).stats().density_selected(), 1.0);
  const attention_result want =
      run(contexts.any(), plan_decode(contexts.any(), p.shape, dense{}), p);
  for (const index_t tokens : {704, 10'000}) {
    EXPECT_TRUE(bit_equal(
        run(contexts.any(), decode_plan(contexts.any(), p, quest(tokens), summaries), p), want));
  }
}

// Rows of a draft: each by its own query, over the pages that it may see.
TEST(quest, rows_of_a_draft_choose_as_one_after_the_other) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  const attention_problem p = decode_problem(random, 330, 12);
  const attention_plan all = decode_plan(contexts.any(), p, sf_quest(64), summaries_of(p, 16));
  for (index_t row = 0; row < 12; ++row) {
    const attention_problem one = part_of(p, row, 1, 319 + row);
    const attention_plan plan =
        decode_plan(contexts.any(), one, sf_quest(64), summaries_of(one, 16));
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
    return error_of([&] { decode_plan(contexts.any(), p, sf_quest(), s); });
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

// ---- Twilight -----------------------------------------------------------------------------------

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
        const attention_plan first = decode_plan(contexts.any(), p, sf_quest(160), summaries);
        const attention_plan plan =
            selects_first
                ? decode_plan(contexts.any(), p, twilight(sf_quest(160), 0.6, keys), summaries)
                : decode_plan(contexts.any(), p, twilight(0.6, keys));
        const double error = formulas::probability_error(looked_at);
        EXPECT_TRUE(selects_choices(plan, 1, clear, [&](index_t head, index_t) {
          numbers scores = formulas::probabilities(looked_at, head, 0);
          const auto candidates = expand(first, head);
          for (index_t key = 0; key < 500 && selects_first; ++key) {
            if (candidates[at(key)] == 0) scores[at(key)] = 0;
          }
          return formulas::covering(scores, 0.6, error);
        }));
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
    const attention_plan plan = decode_plan(contexts.any(), p, method);
    const double error = formulas::probability_error(p, group);
    std::vector<choice> of_set;
    for (index_t set = 0; set < 2; ++set) {
      numbers mean(300, 0.0);
      for (index_t h = set * group; h < (set + 1) * group; ++h) {
        const numbers of_head = formulas::probabilities(p, h, 0);
        for (std::size_t i = 0; i < 300; ++i) mean[i] += of_head[i];
      }
      of_set.push_back(formulas::largest(mean, 25, error));
    }
    EXPECT_TRUE(selects_choices(plan, 1, clear, [&](index_t head, index_t) {
      return of_set[at(head / group)];
    }));
    // Heads with lists of their own have no common candidates.
    const pruned<quest_method> apart{quest(64), {budget::fixed(25)}, head_reduce::mean};
    const auto summaries = summaries_of(p, 16);
    EXPECT_NE(error_of([&] { decode_plan(contexts.any(), p, apart, summaries); }), "");
  }
  EXPECT_GT(clear, 40);
}

TEST(twilight, of_selected_keys_has_two_dense_layers) {
  random_source random(1);
  all_contexts contexts;
  const attention_problem p = decode_problem(random, 700);
  const auto summaries = summaries_of(p, 16);
  for (const index_t layer : {0, 1, 2}) {
    const auto plan = decode_plan(contexts.any(), p, twilight(quest(256)), summaries, layer);
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
  const attention_plan plan = decode_plan(contexts.any(), p, method, summaries);
  const attention_plan first = decode_plan(contexts.any(), p, sf_quest(64), summaries);
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
  EXPECT_TRUE(selects(decode_plan(contexts.any(), p, duo{{false, true}, 4, 50}),
                      [&](index_t head, index_t row, index_t key) {
                        return head >= 2 || key < 4 || 497 + row - key < 50;
                      }));
  EXPECT_NE(error_of([&] { decode_plan(contexts.any(), p, duo{{true}}); }), "");
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
  // 0.07 * 100 is more than 7 in double.
  duo_gates many(1);
  for (index_t i = 0; i < 101; ++i) many[0].push_back(static_cast<double>(i));
  for (index_t percent = 0; percent < 100; ++percent) {
    const bits retrieves = duo_layer(many, 0, static_cast<double>(percent) / 100).retrieves;
    EXPECT_EQ(std::count(retrieves.begin(), retrieves.end(), false), percent);
  }
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
    const attention_plan plan = decode_plan(contexts.any(), p, method, summaries);
    EXPECT_TRUE(selects_choices(plan, 16, clear, [&](index_t head, index_t row) {
      const index_t current = (len - rows + row) / 16;
      numbers scores(at(current), -formulas::infinite);
      double error = 0;
      for (index_t j = 0; j < current; ++j) {
        bool inside = j >= known / 16;
        for (const token_t key : kept[at(head / 2)]) inside = inside || key / 16 == j;
        if (!inside) continue;
        const formulas::bounded first = formulas::page_bound(p, head / 2 * 2, row, j, 16);
        const formulas::bounded second = formulas::page_bound(p, head / 2 * 2 + 1, row, j, 16);
        scores[at(j)] = first.value + second.value;
        error = std::max(error, first.error + second.error);
      }
      choice want = formulas::largest(scores, 5);
      want.gap -= 2 * error;
      want.chosen.insert(current);
      return want;
    }));
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
    return error_of([&] { decode_plan(contexts.any(), p, method, summaries); });
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
  EXPECT_EQ(decode_plan(contexts.any(), p, sf_quest()).stats().legal, 0);
  EXPECT_EQ(decode_plan(contexts.any(), p, twilight(0.5)).stats().legal, 0);
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
    method_inputs in = inputs(*p);
    for (in.layer = 0; in.layer < 5; ++in.layer) {
      if (step % 3 == 0 && in.layer % 2 == 0) ++expected_calls;
      const any_pattern pattern = method.at(step).choose(contexts.any(), in);
      EXPECT_EQ(calls, expected_calls);
      const index_t made = step / 3 * 3;
      EXPECT_TRUE(selects(plan_decode(contexts.any(), p->shape, pattern),
                          [&](index_t, index_t, index_t key) {
                            return key == (100 + made) / 2 || key >= 100 + made;
                          }))
          << step << " " << in.layer;
    }
  }
  // The method is told the layer, and what is forgotten is chosen anew.
  const auto summaries = summaries_of(*p, 16);
  reused layers(quest(32), 4, 1);
  for (const index_t layer : {0, 2}) {
    const method_report did = plan_decode(contexts.any(), p->q.view(), p->kv(), layers.at(0),
                                          {.layer = layer, .summaries = summaries})
                                  .report();
    EXPECT_EQ(did.pairs.density_selected() == 1.0, layer == 0);
  }
  method.forget();
  method.at(8).choose(contexts.any(), inputs(*p));
  EXPECT_EQ(calls, expected_calls + 1);
  // Back to before a choice, and on again; a layer far away; layers that come first.
  calls = 0;
  method.forget();
  const auto ask = [&](index_t step, index_t layer) {
    method_inputs in = inputs(*p);
    in.layer = layer;
    method.at(step).choose(contexts.any(), in);
    return calls;
  };
  EXPECT_EQ(ask(4, 0), 1);
  EXPECT_EQ(ask(6, 0), 1);
  EXPECT_EQ(ask(5, 0), 1);
  EXPECT_EQ(ask(3, 0), 2);
  EXPECT_EQ(ask(5, 1), 2);
  EXPECT_NE(error_of([&] { ask(6, 1); }), "");
  EXPECT_NE(error_of([&] { ask(2, 1); }), "");
  EXPECT_EQ(ask(std::numeric_limits<index_t>::max(), 0), 3);
  EXPECT_EQ(ask(0, std::numeric_limits<index_t>::max() - 1), 4);
  EXPECT_NE(error_of([&] { ask(0, -1); }), "");
  EXPECT_NE(error_of([&] { ask(-1, 0); }), "");
  reused fresh(counting_method{&calls}, 3, 2);
  method_inputs second = inputs(*p);
  second.layer = 1;
  EXPECT_NE(error_of([&] { fresh.at(0).choose(contexts.any(), second); }), "");
  fresh.at(0).choose(contexts.any(), inputs(*p));
  const attention_problem rows = decode_problem(random, 110, 2);
  EXPECT_NE(error_of([&] { fresh.at(1).choose(contexts.any(), inputs(rows)); }), "");
  EXPECT_NE(error_of([&] { reused(counting_method{&calls}, 0, 1); }), "");
}

// As any other method: within another one.
TEST(reused, is_a_method) {
  random_source random(1);
  context ctx(1);
  const attention_problem p = decode_problem(random, 300);
  reused best(top_k(80), 4);
  static_assert(attention_method<decltype(best.at(0))>);
  const attention_plan all = plan_decode(ctx, p.q.view(), p.kv(), best.at(0)).plan;
  const attention_plan some =
      plan_decode(ctx, p.q.view(), p.kv(), pruned{best.at(1), selection{budget::fixed(9)}}).plan;
  EXPECT_EQ(some.stats().selected, 9 * p.shape.q_heads);
  EXPECT_TRUE(selects(some, [&](index_t head, index_t, index_t key) {
    return formulas::largest(formulas::probabilities(p, head, 0), 9, 0).chosen.contains(key);
  }));
  EXPECT_EQ(all.stats().selected, 80 * p.shape.q_heads);
}

// Every head as if it were the only one.
TEST(by_head, asks_each_head_for_itself) {
  const seed_trace trace;
  random_source random;
  context ctx(1);
  const attention_problem p = decode_problem(random, 300, 3);
  const auto summaries = summaries_of(p, 16);
  const auto rising = by_head{[](index_t head) { return sf_quest(16 * (head + 1), 16, false); }};
  static_assert(attention_method<decltype(rising)>);
  const attention_plan plan = decode_plan(ctx, p, rising, summaries);
  for (index_t h = 0; h < p.shape.q_heads; ++h) {
    const attention_plan alone =
        decode_plan(ctx, p, sf_quest(16 * (h + 1), 16, false), summaries);
    EXPECT_EQ(expand(plan, h), expand(alone, h)) << h;
  }
  EXPECT_NE(error_of([&] { decode_plan(ctx, p, rising, std::span(summaries).first(1)); }), "");
  // Different methods.
  const auto two = by_head{[](index_t head) {
    return head == 2 ? any_method(streaming(4, 9)) : any_method(top_k(head + 1));
  }};
  const attention_plan of_two = decode_plan(ctx, p, two);
  for (index_t h = 0; h < p.shape.q_heads; ++h) {
    const attention_plan alone =
        h == 2 ? decode_plan(ctx, p, streaming(4, 9)) : decode_plan(ctx, p, top_k(h + 1));
    EXPECT_EQ(expand(of_two, h), expand(alone, h)) << h;
  }
  const auto keys = by_head{[](index_t head) { return top_k(head + 1); }};
  const attention_plan of_keys = decode_plan(ctx, p, keys);
  for (index_t h = 0; h < p.shape.q_heads; ++h) {
    EXPECT_EQ(expand(of_keys, h), expand(decode_plan(ctx, p, top_k(h + 1)), h)) << h;
  }
}

TEST(by_layer, takes_the_budget_of_the_layer) {
  const seed_trace trace;
  random_source random;
  context ctx(1);
  const attention_problem p(random, {1, 200, 2, 1, 16, 16});
  const auto falling = by_layer{[](index_t layer) { return top_k(300 / (layer + 1)); }};
  static_assert(attention_method<decltype(falling)>);
  method_inputs in = inputs(p);
  for (const index_t layer : {0, 1, 2, 9}) {
    in.layer = layer;
    const attention_plan plan = plan_decode(ctx, p.shape, falling.choose(ctx, in));
    EXPECT_EQ(plan.stats().selected, 2 * std::min<index_t>(200, 300 / (layer + 1)));
  }
  in.layer = method_inputs::no_layer;
  EXPECT_NE(error_of([&] { falling.choose(ctx, in); }).find("layer"), std::string::npos);
}

}  // namespace
