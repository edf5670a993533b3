// SPDX-License-Identifier: Apache-2.0
//
// What holds for every preset, whatever it estimates: presets.hpp has the list.
#include <gtest/gtest.h>

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <set>
#include <string>
#include <vector>

#include "method/presets.hpp"
#include "support/errors.hpp"
#include "support/scores.hpp"

namespace {

using namespace sattn;         // NOLINT(google-build-using-namespace)
using namespace test_support;  // NOLINT(google-build-using-namespace)

std::vector<preset> presets_of(preset_kind kind) {
  std::vector<preset> list = all_presets();
  std::erase_if(list, [&](const preset& m) { return m.kind != kind; });
  return list;
}
std::vector<preset> selecting_presets() {
  std::vector<preset> list = all_presets();
  std::erase_if(list, [&](const preset& m) { return m.kind == preset_kind::cache; });
  return list;
}

/// Words of lower case, digits and underscores within backticks, or all of them.
std::set<std::string> names_in(const std::string& text, bool quoted) {
  std::set<std::string> names;
  std::string word;
  bool inside = !quoted;
  for (const char c : text + " ") {
    if (std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_') {
      word += c;
      continue;
    }
    if (inside && !word.empty()) names.insert(word);
    word.clear();
    if (quoted && c == '`') inside = !inside;
  }
  return names;
}

TEST(presets, are_those_that_the_documentation_names) {
  std::ifstream file(std::filesystem::path(__FILE__).parent_path() / "../../docs/methods.md");
  std::set<std::string> documented;
  bool in_table = false;
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("| preset | unit |")) in_table = true;
    if (!line.starts_with("|")) in_table = false;
    if (in_table) documented.merge(names_in(line.substr(0, line.find('|', 1)), true));
  }
  ASSERT_GT(documented.size(), 20U);
  std::set<std::string> tested;
  for (const preset& m : all_presets()) {
    EXPECT_TRUE(documented.contains(m.name.substr(0, m.name.find_first_of(", ")))) << m.name;
    tested.merge(names_in(m.name, false));
  }
  for (const std::string& name : documented) EXPECT_TRUE(tested.contains(name)) << name;
}

/// Of the kind that a preset is for: a prompt, or rows at the end of a cache.
template <class F>
void at_every_preset_length(preset_kind kind, F&& f) {
  const seed_trace trace;
  random_source random;
  for (const index_t len : {1, 2, 63, 64, 65, 1000}) {
    for (const index_t rows : {1, 3}) {
      const bool decodes = kind == preset_kind::decode;
      if (decodes ? rows > len : rows > 1) continue;
      SCOPED_TRACE(std::to_string(len) + " keys, " + std::to_string(rows) + " rows");
      f(preset_inputs(random,
                      decodes ? decode_problem(random, len, rows) : prompt(random, len)));
    }
  }
}

/// Whether each row attends to a key, and to none outside its domain.
::testing::AssertionResult stays_within_the_domain(const attention_plan& plan, bool has_keys) {
  const attention_shape& shape = plan.shape();
  const std::vector<std::vector<std::uint8_t>> masks = masks_of(plan);
  for (index_t h = 0; h < shape.q_heads; ++h) {
    for (index_t row = 0; row < shape.q_len; ++row) {
      index_t keys = 0;
      for (index_t key = 0; key < shape.kv_len; ++key) {
        if (masks[at(h)][at(row * shape.kv_len + key)] == 0) continue;
        ++keys;
        if (sees(plan.data().legal, shape.position(row), key)) continue;
        return ::testing::AssertionFailure() << "head " << h << ", row " << row << " at position "
                                             << shape.position(row) << " has key " << key;
      }
      if (keys == 0 && has_keys) {
        return ::testing::AssertionFailure() << "head " << h << ", row " << row << " has no key";
      }
    }
  }
  return ::testing::AssertionSuccess();
}

TEST(presets, of_small_budgets_are_sparse_and_run_as_they_select) {
  all_contexts contexts;
  context& ctx = contexts.any();
  for (const preset_kind kind : {preset_kind::prefill, preset_kind::decode}) {
    at_every_preset_length(kind, [&](const preset_inputs& in) {
      const attention_result dense_result =
          run(ctx, plan_prefill(ctx, in.p.shape, dense{}), in.p);
      for (const preset& m : presets_of(kind)) {
        for (const index_t budget : {16, 48}) {
          SCOPED_TRACE(m.name + ", budget " + std::to_string(budget));
          const attention_plan plan = m.plan(ctx, in, budget);
          EXPECT_NO_THROW(attention_plan{plan.data()});
          EXPECT_TRUE(stays_within_the_domain(plan, true));
          if (in.p.shape.q_len <= 65) {
            EXPECT_TRUE(within_bound(contexts, plan, in.p));
          }
          if (in.len() == 1000) {
            EXPECT_LT(plan.stats().density_selected(), 0.8);
            EXPECT_FALSE(bit_equal(run(ctx, plan, in.p).out, dense_result.out));
          }
        }
      }
    });
  }
}

TEST(presets, run_dense_where_the_budget_is_beyond_the_length) {
  all_contexts contexts;
  context& ctx = contexts.any();
  for (const preset_kind kind : {preset_kind::prefill, preset_kind::decode}) {
    at_every_preset_length(kind, [&](const preset_inputs& in) {
      const bool decodes = kind == preset_kind::decode;
      const attention_result want =
          run(ctx, decodes ? plan_decode(ctx, in.p.shape, dense{})
                           : plan_prefill(ctx, in.p.shape, dense{}), in.p);
      for (const preset& m : presets_of(kind)) {
        for (const index_t budget : {round_up(in.len(), index_t{preset_inputs::page}),
                                     index_t{10'000}}) {
          const attention_plan plan = m.plan(ctx, in, budget);
          EXPECT_EQ(plan.stats().density_selected(), 1.0) << m.name << ", " << budget;
          attention_result got = run(ctx, plan, in.p);
          // A window beside the lists of several rows is not taken for dense: same outputs, but
          // the mass of a column is summed otherwise.
          if (m.name == "top_k, reused" && in.p.shape.q_len > 1) got.mass = want.mass;
          EXPECT_TRUE(bit_equal(got, want)) << m.name << ", " << budget;
        }
      }
    });
  }
}

TEST(presets, of_caches_keep_their_budget_and_what_they_protect) {
  all_contexts contexts;
  context& ctx = contexts.any();
  at_every_preset_length(preset_kind::cache, [&](const preset_inputs& in) {
    const index_t len = in.len();
    const attention_problem last = part_of(in.p, len - 1, 1, len);
    const attention_result all_of_it = run(ctx, plan_decode(ctx, last.shape, dense{}), last);
    for (const preset& m : presets_of(preset_kind::cache)) {
      for (const index_t budget :
           {m.least(), m.least() + 1, m.least() + 30, len, index_t{10'000}}) {
        if (budget < m.least()) continue;
        SCOPED_TRACE(m.name + ", budget " + std::to_string(budget));
        const keep_lists kept = m.keep(ctx, in, budget);
        ASSERT_EQ(kept.size(), 2U);
        const index_t capacity = m.capacity(len, budget);
        EXPECT_EQ(std::ssize(kept[0]) + std::ssize(kept[1]), 2 * capacity);
        for (const std::vector<token_t>& list : kept) {
          EXPECT_TRUE(std::is_sorted(list.begin(), list.end(), std::less_equal<>()));
          for (index_t key = 0; key < len; ++key) {
            if (key >= m.first && key < len - m.recent) continue;
            EXPECT_TRUE(std::binary_search(list.begin(), list.end(), key)) << key;
          }
          EXPECT_TRUE(list.empty() || (list.front() >= 0 && list.back() < len));
        }
        const attention_plan plan = plan_decode(ctx, last.shape, columns_of(kept));
        EXPECT_EQ(bit_equal(run(ctx, plan, last).out, all_of_it.out), capacity == len);
      }
    }
  });
}

TEST(presets, choose_the_same_on_any_threads) {
  const seed_trace trace;
  random_source random;
  thread_contexts contexts;
  const preset_inputs of_prompt(random, prompt(random, 500));
  const preset_inputs of_step(random, decode_problem(random, 500, 3));
  for (const preset& m : all_presets()) {
    const preset_inputs& in = m.kind == preset_kind::decode ? of_step : of_prompt;
    for (const index_t budget : {48, 200}) {
      if (m.kind == preset_kind::cache) {
        const keep_lists want = m.keep(contexts.serial(), in, std::max(budget, m.least()));
        for (context& ctx : contexts) {
          EXPECT_EQ(m.keep(ctx, in, std::max(budget, m.least())), want) << m.name;
        }
        continue;
      }
      const auto want = masks_of(m.plan(contexts.serial(), in, budget));
      for (context& ctx : contexts) {
        EXPECT_EQ(masks_of(m.plan(ctx, in, budget)), want) << m.name;
      }
    }
  }
}

/// Whether everything that is set in `less` is set in `more`.
::testing::AssertionResult holds_all_of(const std::vector<std::vector<std::uint8_t>>& more,
                                        const std::vector<std::vector<std::uint8_t>>& less) {
  for (std::size_t h = 0; h < less.size(); ++h) {
    for (std::size_t i = 0; i < less[h].size(); ++i) {
      if (more[h][i] < less[h][i]) {
        return ::testing::AssertionFailure() << "head " << h << " lost pair " << i;
      }
    }
  }
  return ::testing::AssertionSuccess();
}
index_t pairs_of(const std::vector<std::vector<std::uint8_t>>& masks) {
  index_t pairs = 0;
  for (const std::vector<std::uint8_t>& mask : masks) {
    pairs += std::count(mask.begin(), mask.end(), 1);
  }
  return pairs;
}

// A larger budget selects what a smaller one did, and more: so that neither recall nor lse falls.
TEST(presets, select_more_for_larger_budgets) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  context& ctx = contexts.any();
  const preset_inputs of_prompt(random, prompt(random, 400));
  const preset_inputs of_step(random, decode_problem(random, 400, 3));
  for (const preset& m : all_presets()) {
    if (!m.nested) continue;
    const preset_inputs& in = m.kind == preset_kind::decode ? of_step : of_prompt;
    const bool evicts = m.kind == preset_kind::cache;
    std::vector<std::vector<std::uint8_t>> before;
    index_t first_pairs = 0;
    for (index_t budget = std::max<index_t>(m.least(), 16); budget <= 400; budget += 24) {
      SCOPED_TRACE(m.name + ", budget " + std::to_string(budget));
      const auto masks = masks_of(
          evicts ? plan_prefill(ctx, in.p.shape, columns_of(m.keep(ctx, in, budget)))
                 : m.plan(ctx, in, budget));
      if (before.empty()) {
        first_pairs = pairs_of(masks);
      } else {
        EXPECT_TRUE(holds_all_of(masks, before));
      }
      before = masks;
    }
    EXPECT_GT(pairs_of(before), first_pairs) << m.name;
  }
}

// What was selected first stays: more of it is kept, and nothing is lost.
TEST(presets, that_choose_among_selected_keys_take_more_of_them_for_larger_budgets) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  context& ctx = contexts.any();
  const preset_inputs in(random, decode_problem(random, 400, 3));
  const auto grows = [&](const auto& method_at) {
    std::vector<std::vector<std::uint8_t>> before;
    index_t last_pairs = 0, grown = 0;
    for (int step = 1; step <= 8; ++step) {
      const auto masks = masks_of(decode_plan(ctx, in.p, method_at(step), in.summaries));
      if (!before.empty()) {
        EXPECT_TRUE(holds_all_of(masks, before));
      }
      grown += pairs_of(masks) > last_pairs ? 1 : 0;
      last_pairs = pairs_of(masks);
      before = masks;
    }
    EXPECT_GE(grown, 6);
  };
  grows([&](int s) { return twilight(sf_quest(160), s / 8.0, in.copy.view); });
  grows([&](int s) {
    quest_method method = sf_quest(16 * s);
    method.within = pages_of(in.spread(12), 16, in.known());
    return method;
  });
}

// Chunks and drafts that stand anywhere, under every domain.
TEST(presets, select_within_any_domain) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  context& ctx = contexts.any();
  for (const domain& legal : {domain{}, domain{.window = 40}, domain{.prefix = 70},
                              domain{.window = 100, .prefix = 30}, domain::full()}) {
    for (const auto& [rows, keys] : {std::pair<index_t, index_t>{130, 130}, {101, 237}, {7, 130}}) {
      SCOPED_TRACE(std::to_string(rows) + " rows, " + std::to_string(keys) + " keys, window " +
                   std::to_string(legal.window) + ", prefix " + std::to_string(legal.prefix) +
                   (legal.causal ? "" : ", full"));
      preset_inputs in(random, decode_problem(random, keys, rows));
      in.legal = legal;
      for (const preset& m : selecting_presets()) {
        SCOPED_TRACE(m.name);
        const attention_plan plan = m.plan(ctx, in, 16);
        EXPECT_EQ(plan.data().legal, legal);
        EXPECT_TRUE(stays_within_the_domain(plan, false));
        // Methods that count keys spend nothing on those that a row may not see.
        const std::set<std::string> counting{"scored_tokens", "shadow_top_k", "top_k",
                                             "top_k by_layer", "top_k, rows of a prompt"};
        if (!counting.contains(m.name)) continue;
        std::int64_t budgets = 0;
        for (index_t row = 0; row < rows; ++row) {
          const key_range seen = legal.legal(in.p.shape.position(row), keys);
          budgets += 4 * std::min<index_t>(16, seen.size());
        }
        EXPECT_EQ(plan.stats().selected, budgets);
      }
    }
  }
}

// What comes after a row changes neither what the row attends to nor, for methods that choose for
// each block of rows, what is chosen.
TEST(presets, choose_for_a_row_by_what_came_before_its_block_ended) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  context& ctx = contexts.any();
  for (const preset_kind kind : {preset_kind::prefill, preset_kind::decode}) {
    const bool decodes = kind == preset_kind::decode;
    const index_t first = 192, rows = decodes ? 12 : 320, keys = decodes ? 200 : 320;
    const attention_problem p =
        decodes ? decode_problem(random, keys, rows) : prompt(random, keys);
    attention_problem changed = p;
    for (index_t t = first; t < keys; ++t) {
      for (index_t h = 0; h < 2; ++h) {
        changed.k.fill_row(t, h, 7.0f);
        changed.v.fill_row(t, h, -3.0f);
      }
    }
    random_source layout(1);  // of the copies, and scores from elsewhere that do not change
    random_source same_layout(1);
    const preset_inputs before(layout, p), after(same_layout, changed);
    const index_t seen = first - p.shape.q_offset;  // rows
    int compared = 0;
    for (const preset& m : presets_of(kind)) {
      if (m.looks_back) continue;
      ++compared;
      const attention_result a = run(ctx, m.plan(ctx, before, 32), p);
      const attention_result b = run(ctx, m.plan(ctx, after, 32), changed);
      EXPECT_TRUE(bit_equal(a.rows(p, 0, seen), b.rows(p, 0, seen))) << m.name;
      EXPECT_FALSE(bit_equal(a.rows(p, seen, rows), b.rows(p, seen, rows))) << m.name;
    }
    EXPECT_GE(compared, 9);
  }
}

TEST(presets, choose_nothing_where_there_is_nothing) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  context& ctx = contexts.any();
  for (const auto& [rows, keys] : {std::pair<index_t, index_t>{0, 0}, {0, 70}, {3, 0}}) {
    const preset_inputs in(random, decode_problem(random, keys, rows));
    for (const preset& m : all_presets()) {
      SCOPED_TRACE(m.name + ", " + std::to_string(rows) + " rows, " + std::to_string(keys) +
                   " keys");
      if (m.kind == preset_kind::cache) {
        const index_t budget = m.least();
        if (m.name == "tova" && rows == 0) {  // there is no last query
          EXPECT_NE(error_of([&] { m.keep(ctx, in, budget); }), "");
          continue;
        }
        const keep_lists kept = m.keep(ctx, in, budget);
        ASSERT_EQ(kept.size(), 2U);
        EXPECT_EQ(std::ssize(kept[0]) + std::ssize(kept[1]), 2 * m.capacity(keys, budget));
        continue;
      }
      const attention_plan plan = m.plan(ctx, in, 16);
      EXPECT_EQ(plan.stats().legal, 0);
      EXPECT_EQ(plan.stats().selected, 0);
      EXPECT_TRUE(within_bound(contexts, plan, in.p));
      for (const float lse : run(ctx, plan, in.p).lse) EXPECT_EQ(lse, -infinity);
    }
  }
}

// The numbers of the sources, for callers that name none.
TEST(presets, have_their_published_defaults) {
  const auto units = [](const selection& s) { return s.amount.count(1'000'000); };
  EXPECT_EQ(a_shape{}.sinks, 128);
  EXPECT_EQ(a_shape{}.window, 3968);
  EXPECT_EQ(tri_shape{}.sinks, 128);
  EXPECT_EQ(tri_shape{}.window, 3968);
  EXPECT_EQ(tri_shape{}.last_rows, 100);
  EXPECT_EQ(units(minference().columns), 1000);
  EXPECT_EQ(units(minference().distances), 6096);
  EXPECT_EQ(minference().last_queries, 64);
  EXPECT_EQ(units(sf_vertical_slash().columns), 512);
  EXPECT_EQ(units(sf_vertical_slash().distances), 512);
  EXPECT_EQ(sf_vertical_slash().last_queries, 256);
  EXPECT_EQ(sf_flexprefill().columns.amount.share(), 0.65);
  EXPECT_EQ(sf_flexprefill().columns.amount.clamp(0), 512);
  EXPECT_EQ(sf_flexprefill().distances.amount.share(), 0.65);
  EXPECT_EQ(sf_flexprefill().distances.amount.clamp(0), 512);
  EXPECT_EQ(sf_flexprefill().last_queries, 512);
  EXPECT_EQ(flexprefill{}.coverage, 0.9);
  EXPECT_EQ(flexprefill{}.divergence_limit, 0.1);
  EXPECT_EQ(flexprefill{}.min_budget, 1024);
  EXPECT_EQ(flexprefill{}.block_size, 128);
  EXPECT_EQ(units(sf_block_sparse().blocks), 64);
  EXPECT_EQ(sf_block_sparse().q_block, 16);
  EXPECT_EQ(sf_block_sparse().k_block, 16);
  EXPECT_EQ(units(minference_block().blocks), 100);
  EXPECT_EQ(minference_block().q_block, 64);
  EXPECT_EQ(minference_block().k_block, 64);
  EXPECT_EQ(xattention{}.stride, 16);
  EXPECT_EQ(xattention{}.threshold, 0.9);
  EXPECT_EQ(xattention{}.block_size, 128);
  EXPECT_EQ(units(quest().pages), 512 / 16);
  EXPECT_EQ(quest().page_size, 16);
  EXPECT_EQ(quest().dense_layers, 2);
  EXPECT_EQ(units(sf_quest().pages), 1024 / 16);
  EXPECT_EQ(sf_quest().pages.keep.counted, protection::counting::on_top);
  EXPECT_EQ(sf_quest().page_size, 16);
  EXPECT_EQ(sf_quest().dense_layers, 0);
  EXPECT_EQ(duo{}.sinks, 64);
  EXPECT_EQ(duo{}.window, 256);
  EXPECT_EQ(twilight().tokens.amount.share(), 0.85);
  EXPECT_EQ(twilight(quest()).tokens.amount.share(), 0.85);
  EXPECT_EQ(twilight(quest()).dense_layers, 2);
  EXPECT_EQ(snapkv().capacity, 1024);
  EXPECT_EQ(snapkv().last_queries, 32);
  EXPECT_EQ(snapkv().pool_width, 5);
  EXPECT_EQ(sf_snapkv().capacity, 1024);
  EXPECT_EQ(sf_snapkv().last_queries, 256);
  EXPECT_EQ(sf_snapkv().pool_width, 21);
  EXPECT_EQ(ada_snapkv().last_queries, 32);
  EXPECT_EQ(ada_snapkv().pool_width, 7);
  EXPECT_EQ(ada_snapkv().adaptive->uniform_share, 0.5);
  EXPECT_EQ(sf_ada_snapkv().last_queries, 256);
  EXPECT_EQ(sf_ada_snapkv().adaptive->floor, 1024 / 5);
}

}  // namespace
