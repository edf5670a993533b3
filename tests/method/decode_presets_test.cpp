// SPDX-License-Identifier: Apache-2.0
#include <sattn/method/a_shape.hpp>
#include <sattn/method/compose.hpp>
#include <sattn/method/duo.hpp>
#include <sattn/method/quest.hpp>
#include <sattn/method/top_k.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "method/cases.hpp"
#include "method/formulas.hpp"
#include "support/problem.hpp"
#include "support/stored.hpp"

// Every decode preset against its formula, at every length and budget.

namespace {

using namespace sattn;         // NOLINT(google-build-using-namespace)
using namespace test_support;  // NOLINT(google-build-using-namespace)
using formulas::choice;
using formulas::numbers;

constexpr token_t page = 16;

/// What decode methods look at: the keys, bounds of their pages and a copy in int8.
struct decode_step {
  attention_problem p;
  std::vector<page_summaries> summaries = summaries_of(p, page);
  attention_problem rounded = p;  // with the keys of the copy
  encoded_rows rows{rounded.k, dtype::i8};
  stored_tensor copy;

  decode_step(random_source& random, index_t len, index_t q_len)
      : p(decode_problem(random, len, q_len)), copy(rows, storage_layout::paged, random) {}

  index_t len() const { return p.shape.kv_len; }
  /// Of all attention, for budgets that are a share of it.
  double share(index_t budget) const {
    return std::min(1.0, static_cast<double>(budget) / static_cast<double>(len()));
  }
  /// Keys that were there when some were kept.
  index_t known() const { return len() - len() / 4; }
  /// As many of them as a budget has or all, evenly spread, for each kv head.
  keep_lists spread(index_t budget) const {
    keep_lists kept(2);
    for (index_t key = 0; key < known(); key += std::max<index_t>(1, known() / budget)) {
      for (std::vector<token_t>& list : kept) list.push_back(static_cast<token_t>(key));
    }
    return kept;
  }
  /// Up to three keys ago, where there were as many as rows.
  index_t keys_before() const { return std::max(len() - 3, p.shape.q_len); }
  attention_problem before() const {
    attention_problem earlier = part_of(p, 0, p.shape.q_len, keys_before());
    earlier.shape.q_offset = static_cast<token_t>(keys_before() - p.shape.q_len);
    return earlier;
  }
};

/// A row of a query head, for which a formula chooses by a budget.
struct asked {
  const decode_step& step;
  index_t head;
  index_t row;
  index_t budget;

  index_t position() const { return step.p.shape.q_offset + row; }
};

// ---- formulas: what is chosen, and by how much more than rounding can move scores ---------------

choice keys_where(const asked& a, const std::function<bool(index_t)>& wanted) {
  choice result;
  for (index_t key = 0; key <= a.position(); ++key) {
    if (wanted(key)) result.chosen.insert(key);
  }
  return result;
}

choice streaming_keys(const asked& a) {
  return keys_where(a, [&](index_t key) { return key < 4 || a.position() - key < a.budget; });
}

choice best_keys(const asked& a, const attention_problem& p) {
  return formulas::largest(formulas::probabilities(p, a.head, a.row), a.budget,
                           formulas::probability_error(p));
}

/// The page of the row's position, and so many of the others by their bounds.
choice pages_by_bound(const asked& a, index_t count, bool of_group,
                      const std::function<bool(index_t)>& among = [](index_t) { return true; }) {
  const index_t current = a.position() / page;
  numbers scores(at(current), -formulas::infinite);
  double error = 0;
  for (index_t j = 0; j < current; ++j) {
    if (!among(j)) continue;
    formulas::bounded sum;
    for (index_t h = a.head / 2 * 2; h < a.head / 2 * 2 + 2; ++h) {
      if (!of_group && h != a.head) continue;
      const formulas::bounded bound = formulas::page_bound(a.step.p, h, a.row, j, page);
      sum.value += bound.value;
      sum.error += bound.error;
    }
    scores[at(j)] = sum.value;
    error = std::max(error, sum.error);
  }
  const choice pages = formulas::largest(scores, count);
  choice keys = keys_where(a, [&](index_t key) {
    return key / page == current || pages.chosen.contains(key / page);
  });
  keys.gap = pages.gap - 2 * error;
  return keys;
}

/// The fewest of the keys chosen before that hold the share of their attention.
choice pruned_keys(const asked& a, const attention_problem& p, const choice& first) {
  numbers scores = formulas::probabilities(p, a.head, a.row);
  for (index_t key = 0; key < std::ssize(scores); ++key) {
    if (!first.chosen.contains(key)) scores[at(key)] = 0;
  }
  choice keys = formulas::covering(scores, a.step.share(a.budget), formulas::probability_error(p));
  keys.gap = std::min(keys.gap, first.gap);
  return keys;
}
choice all_keys(const asked& a) {
  return keys_where(a, [](index_t) { return true; });
}

/// What was chosen three keys ago, and the keys since then.
choice reused_keys(const asked& a) {
  const attention_problem before = a.step.before();
  choice keys = formulas::largest(formulas::probabilities(before, a.head, a.row), a.budget,
                                  formulas::probability_error(before));
  const index_t since = a.step.len() - a.step.keys_before();
  for (index_t key = a.position() - since + 1; key <= a.position(); ++key) keys.chosen.insert(key);
  return keys;
}

// ---- presets ------------------------------------------------------------------------------------

struct decode_preset {
  std::string name;
  std::function<attention_plan(context&, const decode_step&, index_t budget)> plan;
  std::function<choice(const asked&)> keys;
};

/// method_for(step, budget of keys).
template <class F>
auto plan_by(F method_for) {
  return [=](context& ctx, const decode_step& step, index_t budget) {
    return decode_plan(ctx, step.p, method_for(step, budget), step.summaries);
  };
}

attention_plan reused_plan(context& ctx, const decode_step& step, index_t budget) {
  reused method(top_k(budget), 2);
  const attention_problem before = step.before();
  method.choose(ctx, inputs(before), 0, 0);
  return plan_decode(ctx, step.p.shape, method.choose(ctx, inputs(step.p), 1, 0));
}

quest_method within_spread(const decode_step& step, index_t budget) {
  quest_method method = sf_quest(budget, page);
  method.within = pages_of(step.spread(budget), page, step.known());
  return method;
}

std::vector<decode_preset> presets() {
  using s = decode_step;
  return {
      {"streaming", plan_by([](const s&, index_t b) { return streaming(4, token_t(b)); }),
       streaming_keys},
      {"duo", plan_by([](const s&, index_t b) { return duo{{true, false}, 4, token_t(b)}; }),
       [](const asked& a) { return a.head < 2 ? all_keys(a) : streaming_keys(a); }},
      {"quest", plan_by([](const s&, index_t b) { return quest(b); }),
       [](const asked& a) { return pages_by_bound(a, a.budget / page - 1, false); }},
      {"sf_quest", plan_by([](const s&, index_t b) { return sf_quest(b); }),
       [](const asked& a) { return pages_by_bound(a, a.budget / page, true); }},
      {"sf_quest, each head", plan_by([](const s&, index_t b) { return sf_quest(b, page, false); }),
       [](const asked& a) { return pages_by_bound(a, a.budget / page, false); }},
      {"sf_quest within", plan_by(within_spread),
       [](const asked& a) {
         const keep_lists kept = a.step.spread(a.budget);
         return pages_by_bound(a, a.budget / page, true, [&](index_t j) {
           const auto on_page = [&](token_t key) { return key / page == j; };
           return j >= a.step.known() / page ||
                  std::any_of(kept[0].begin(), kept[0].end(), on_page);
         });
       }},
      {"top_k", plan_by([](const s&, index_t b) { return top_k(b); }),
       [](const asked& a) { return best_keys(a, a.step.p); }},
      {"shadow_top_k", plan_by([](const s& c, index_t b) { return shadow_top_k(b, c.copy.view); }),
       [](const asked& a) { return best_keys(a, a.step.rounded); }},
      {"twilight", plan_by([](const s& c, index_t b) { return twilight(c.share(b)); }),
       [](const asked& a) { return pruned_keys(a, a.step.p, all_keys(a)); }},
      {"twilight of sf_quest by a copy", plan_by([](const s& c, index_t b) {
         return twilight(sf_quest(b), c.share(b), c.copy.view);
       }),
       [](const asked& a) {
         return pruned_keys(a, a.step.rounded, pages_by_bound(a, a.budget / page, true));
       }},
      {"reused top_k", reused_plan, reused_keys},
  };
}

// One row, and rows of a draft.
template <class F>
void at_every_length(F&& f) {
  const seed_trace trace;
  random_source random;
  for (const index_t len : {1, 2, 15, 16, 17, 63, 64, 65, 200, 640, 1000}) {
    for (const index_t rows : {1, 3}) {
      if (rows > len) continue;
      SCOPED_TRACE(std::to_string(len) + " keys, " + std::to_string(rows) + " rows");
      f(decode_step(random, len, rows));
    }
  }
}

TEST(decode_presets, choose_by_their_formulas) {
  all_contexts contexts;
  for (const decode_preset& preset : presets()) {
    SCOPED_TRACE(preset.name);
    int clear = 0, rows = 0;
    at_every_length([&](const decode_step& step) {
      for (const index_t budget : {16, 48}) {
        const attention_plan plan = preset.plan(contexts.any(), step, budget);
        EXPECT_NO_THROW(attention_plan{plan.data()});
        EXPECT_TRUE(selects_choices(plan, 1, clear, [&](index_t head, index_t row) {
          return preset.keys({step, head, row, budget});
        }));
        rows += static_cast<int>(4 * step.p.shape.q_len);
        EXPECT_TRUE(within_bound(contexts, plan, step.p));
      }
    });
    EXPECT_GT(clear, rows * 2 / 3);
  }
}

TEST(decode_presets, run_dense_where_the_budget_is_beyond_the_length) {
  all_contexts contexts;
  context& ctx = contexts.any();
  at_every_length([&](const decode_step& step) {
    const attention_result want = run(ctx, plan_decode(ctx, step.p.shape, dense{}), step.p);
    for (const decode_preset& preset : presets()) {
      for (const index_t budget : {round_up(step.len(), index_t{page}), index_t{10'000}}) {
        attention_result got = run(ctx, preset.plan(ctx, step, budget), step.p);
        // A window beside the lists of several rows is not taken for dense: same outputs, but the
        // mass of a column is summed otherwise.
        if (preset.name == "reused top_k" && step.p.shape.q_len > 1) got.mass = want.mass;
        EXPECT_TRUE(bit_equal(got, want)) << preset.name << ", " << budget;
      }
    }
  });
}

TEST(decode_presets, differ_from_dense_where_the_budget_is_small) {
  all_contexts contexts;
  context& ctx = contexts.any();
  at_every_length([&](const decode_step& step) {
    if (step.len() < 63) return;
    const attention_result dense_result = run(ctx, plan_decode(ctx, step.p.shape, dense{}), step.p);
    for (const decode_preset& preset : presets()) {
      const attention_plan plan = preset.plan(ctx, step, page);
      EXPECT_LT(plan.stats().density_selected(), 0.75) << preset.name;
      EXPECT_FALSE(bit_equal(run(ctx, plan, step.p), dense_result)) << preset.name;
    }
  });
}

}  // namespace
