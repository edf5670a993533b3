// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "method/cases.hpp"
#include "method/formulas.hpp"
#include "method/presets.hpp"
#include "support/problem.hpp"

// Every decode preset against its formula, at every length.

namespace {

using namespace sattn;         // NOLINT(google-build-using-namespace)
using namespace test_support;  // NOLINT(google-build-using-namespace)
using formulas::choice;
using formulas::numbers;

constexpr token_t page = preset_inputs::page;

/// A row of a query head, for which a formula chooses by a budget.
struct asked {
  const preset_inputs& step;
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

// ---- by preset ----------------------------------------------------------------------------------

const std::map<std::string, std::function<choice(const asked&)>>& formulas_by_preset() {
  static const std::map<std::string, std::function<choice(const asked&)>> by_name = {
      {"streaming", streaming_keys},
      {"duo", [](const asked& a) { return a.head < 2 ? all_keys(a) : streaming_keys(a); }},
      {"quest", [](const asked& a) { return pages_by_bound(a, a.budget / page - 1, false); }},
      {"sf_quest", [](const asked& a) { return pages_by_bound(a, a.budget / page, true); }},
      {"sf_quest, each head",
       [](const asked& a) { return pages_by_bound(a, a.budget / page, false); }},
      {"sf_quest by_head",
       [](const asked& a) { return pages_by_bound(a, a.budget / page, false); }},
      {"sf_quest within pages_of",
       [](const asked& a) {
         const keep_lists kept = a.step.spread(a.budget);
         return pages_by_bound(a, a.budget / page, true, [&](index_t j) {
           const auto on_page = [&](token_t key) { return key / page == j; };
           return j >= a.step.known() / page ||
                  std::any_of(kept[0].begin(), kept[0].end(), on_page);
         });
       }},
      {"top_k", [](const asked& a) { return best_keys(a, a.step.p); }},
      {"top_k by_layer", [](const asked& a) { return best_keys(a, a.step.p); }},
      {"shadow_top_k", [](const asked& a) { return best_keys(a, a.step.rounded); }},
      {"twilight", [](const asked& a) { return pruned_keys(a, a.step.p, all_keys(a)); }},
      {"twilight of sf_quest by a copy",
       [](const asked& a) {
         return pruned_keys(a, a.step.rounded, pages_by_bound(a, a.budget / page, true));
       }},
      {"top_k, reused", reused_keys},
  };
  return by_name;
}

// One row, and rows of a draft.
TEST(decode_presets, choose_by_their_formulas) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  std::map<std::string, int> clear, rows_asked;
  for (const index_t len : {1, 2, 15, 16, 17, 63, 64, 65, 200, 640, 1000}) {
    for (const index_t rows : {1, 3}) {
      if (rows > len) continue;
      const preset_inputs step(random, decode_problem(random, len, rows));
      for (const preset& m : all_presets()) {
        if (m.kind != preset_kind::decode) continue;
        SCOPED_TRACE(m.name + ", " + std::to_string(len) + " keys, " + std::to_string(rows) +
                     " rows");
        const auto formula = formulas_by_preset().find(m.name);
        ASSERT_NE(formula, formulas_by_preset().end());
        for (const index_t budget : {16, 48}) {
          const attention_plan plan = m.plan(contexts.any(), step, budget);
          EXPECT_TRUE(selects_choices(plan, 1, clear[m.name], [&](index_t head, index_t row) {
            return formula->second({step, head, row, budget});
          }));
          rows_asked[m.name] += static_cast<int>(4 * rows);
        }
      }
    }
  }
  EXPECT_EQ(clear.size(), formulas_by_preset().size());
  for (const auto& [name, count] : rows_asked) EXPECT_GT(clear[name], count * 2 / 3) << name;
}

}  // namespace
