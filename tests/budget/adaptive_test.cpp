// SPDX-License-Identifier: Apache-2.0
#include <sattn/budget/adaptive.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

#include "support/errors.hpp"
#include "support/numbers.hpp"
#include "support/random.hpp"

namespace {

using sattn::adaptive_budget;
using sattn::choose_over_heads;
using sattn::index_t;
using sattn::protection;
using sattn::token_t;
using test_support::error_of;
using test_support::infinity;
using test_support::random_source;
using test_support::seed_trace;

using lists = std::vector<std::vector<token_t>>;

lists choose(const std::vector<float>& scores, index_t heads, const adaptive_budget& rule) {
  lists chosen{{-7}};  // what was there must go
  choose_over_heads(scores, heads, rule, chosen);
  return chosen;
}

index_t size_of(const lists& chosen) {
  index_t total = 0;
  for (const auto& list : chosen) total += std::ssize(list);
  return total;
}

// Ada-KV with a floor, by sorting all units of all heads.
lists by_sorting(const std::vector<float>& scores, index_t heads, const adaptive_budget& rule) {
  const index_t units = std::ssize(scores) / heads;
  const auto score = [&](index_t h, index_t i) {
    return scores[static_cast<std::size_t>(h * units + i)];
  };
  lists chosen(static_cast<std::size_t>(heads));
  std::vector<std::tuple<float, index_t, index_t>> rest;
  index_t left = heads * rule.of_head;
  for (index_t h = 0; h < heads; ++h) {
    std::vector<index_t> legal;
    for (index_t i = 0; i < units; ++i) {
      if (score(h, i) != -infinity) legal.push_back(i);
    }
    const index_t n = std::ssize(legal);
    std::vector<std::pair<float, index_t>> order;
    for (index_t j = 0; j < n; ++j) {
      const index_t i = legal[static_cast<std::size_t>(j)];
      const bool kept = j < rule.keep.first || n - j <= rule.keep.recent;
      if (kept) chosen[static_cast<std::size_t>(h)].push_back(static_cast<token_t>(i));
      if (!kept) order.emplace_back(-score(h, i), i);
    }
    std::sort(order.begin(), order.end());
    const index_t floor = std::min(rule.floor, rule.of_head);
    for (const auto& [negative, i] : order) {
      if (std::ssize(chosen[static_cast<std::size_t>(h)]) < floor) {
        chosen[static_cast<std::size_t>(h)].push_back(static_cast<token_t>(i));
      } else {
        rest.emplace_back(negative, h, i);
      }
    }
    left -= std::ssize(chosen[static_cast<std::size_t>(h)]);
  }
  std::sort(rest.begin(), rest.end());
  for (const auto& [negative, h, i] : rest) {
    if (left-- <= 0) break;
    chosen[static_cast<std::size_t>(h)].push_back(static_cast<token_t>(i));
  }
  for (auto& list : chosen) std::sort(list.begin(), list.end());
  return chosen;
}

std::vector<float> random_scores(random_source& random, index_t count) {
  std::vector<float> scores(static_cast<std::size_t>(count));
  for (float& s : scores) {
    s = random.integer(0, 8) == 0 ? -infinity : static_cast<float>(random.integer(0, 12));
  }
  return scores;
}

TEST(choose_over_heads, is_the_floor_and_then_the_best_of_all_heads) {
  const seed_trace trace;
  random_source random;
  for (int round = 0; round < 2000; ++round) {
    const index_t heads = random.integer(1, 6);
    const index_t units = random.integer(0, 40);
    const std::vector<float> scores = random_scores(random, heads * units);
    adaptive_budget rule{.of_head = random.integer(0, 45), .floor = random.integer(0, 20)};
    if (random.integer(0, 2) == 0) rule.keep = {.first = 3, .recent = random.integer(0, 5)};
    ASSERT_EQ(choose(scores, heads, rule), by_sorting(scores, heads, rule));
  }
}

// The total is the budget to the unit, whatever is split evenly; Ada-KV's own rounding misses it.
TEST(choose_over_heads, spends_the_budget_exactly) {
  const seed_trace trace;
  random_source random;
  int original_misses = 0;
  for (int round = 0; round < 2000; ++round) {
    const index_t heads = random.integer(1, 8);
    const index_t units = 50;
    std::vector<float> scores(static_cast<std::size_t>(heads * units));
    for (float& s : scores) s = static_cast<float>(random.normal());
    const double share = static_cast<double>(random.integer(0, 11)) / 10;
    const index_t of_head = random.integer(3, 51);
    const adaptive_budget rule{
        .of_head = of_head, .uniform_share = share, .keep = {.first = 1, .recent = 2}};
    const lists chosen = choose(scores, heads, rule);
    ASSERT_EQ(size_of(chosen), heads * of_head);
    index_t rounded = 0;
    adaptive_budget global = rule;
    global.uniform_share = 0;
    for (const auto& list : choose(scores, heads, global)) {
      const auto count = static_cast<double>(list.size());
      rounded += static_cast<index_t>(std::nearbyint(
          count * (1 - share) + std::floor(static_cast<double>(of_head) * share)));
      // Each head is moved the share of the way, to within one unit.
    }
    if (rounded != heads * of_head) ++original_misses;
    const lists all = choose(scores, heads, global);
    for (std::size_t h = 0; h < chosen.size(); ++h) {
      const double wanted = (1 - share) * static_cast<double>(all[h].size()) +
                            share * static_cast<double>(of_head);
      ASSERT_LT(std::abs(static_cast<double>(chosen[h].size()) - wanted), 1.0);
    }
  }
  EXPECT_GT(original_misses, 100);
}

// Heads that have too few units leave theirs to the others.
TEST(choose_over_heads, spends_the_budget_exactly_on_heads_of_any_number_of_units) {
  const seed_trace trace;
  random_source random;
  for (int round = 0; round < 3000; ++round) {
    const index_t heads = random.integer(1, 6), units = 30;
    std::vector<float> scores(static_cast<std::size_t>(heads * units), -infinity);
    index_t legal = 0;
    for (index_t h = 0; h < heads; ++h) {
      for (index_t n = random.integer(0, units + 1); n > 0; --n) {
        scores[static_cast<std::size_t>(h * units + n - 1)] = static_cast<float>(random.normal());
        ++legal;
      }
    }
    const index_t of_head = random.integer(0, units + 5);
    const double share = random.pick({0.1, 0.5, 0.9, 1.0});
    const lists chosen = choose(scores, heads, {.of_head = of_head, .uniform_share = share});
    ASSERT_EQ(size_of(chosen), std::min(heads * of_head, legal)) << heads << " " << share;
  }
}

// A floor of the whole budget is SnapKV; without one no split of the budget keeps more mass.
TEST(choose_over_heads, goes_from_uniform_to_the_most_mass) {
  const seed_trace trace;
  random_source random;
  for (int round = 0; round < 300; ++round) {
    constexpr index_t units = 6;
    const std::vector<float> scores = [&] {
      std::vector<float> all(2 * units);
      for (float& s : all) s = static_cast<float>(random.integer(0, 100));
      return all;
    }();
    const index_t of_head = random.integer(0, units + 1);
    const lists uniform = choose(scores, 2, {.of_head = of_head, .floor = of_head});
    EXPECT_EQ(std::ssize(uniform[0]), of_head);
    EXPECT_EQ(std::ssize(uniform[1]), of_head);
    const auto mass = [&](const lists& chosen) {
      float sum = 0;
      for (std::size_t h = 0; h < 2; ++h) {
        for (const token_t i : chosen[h]) sum += scores[h * units + static_cast<std::size_t>(i)];
      }
      return sum;
    };
    float most = 0;
    for (unsigned subset = 0; subset < 1u << (2 * units); ++subset) {
      if (std::popcount(subset) != 2 * of_head) continue;
      float sum = 0;
      for (std::size_t i = 0; i < 2 * units; ++i) sum += (subset >> i & 1) != 0 ? scores[i] : 0;
      most = std::max(most, sum);
    }
    EXPECT_EQ(mass(choose(scores, 2, {.of_head = of_head})), most);
  }
}

TEST(choose_over_heads, keeps_what_a_smaller_budget_keeps) {
  const seed_trace trace;
  random_source random;
  for (int round = 0; round < 100; ++round) {
    const std::vector<float> scores = random_scores(random, 4 * 30);
    lists before(4);
    for (index_t of_head = 0; of_head <= 31; ++of_head) {
      const lists chosen = choose(scores, 4, {.of_head = of_head, .floor = of_head / 5});
      for (std::size_t h = 0; h < 4; ++h) {
        EXPECT_TRUE(std::includes(chosen[h].begin(), chosen[h].end(), before[h].begin(),
                                  before[h].end()));
      }
      before = chosen;
    }
  }
}

TEST(choose_over_heads, refuses_what_does_not_fit) {
  const std::vector<float> scores(12, 1.0f);
  const auto error = [&](index_t heads, const adaptive_budget& rule) {
    return error_of([&] { choose(scores, heads, rule); });
  };
  EXPECT_EQ(error(3, {.of_head = 2}), "");
  EXPECT_NE(error(0, {}), "");
  EXPECT_NE(error(5, {}), "");
  EXPECT_NE(error(3, {.of_head = -1}), "");
  EXPECT_NE(error(3, {.floor = -1}), "");
  EXPECT_NE(error(3, {.uniform_share = 1.5}), "");
  EXPECT_NE(error(3, {.keep = {.first = -1}}), "");
  EXPECT_NE(error(3, {.keep = {.counted = protection::counting::on_top}}), "");
}

}  // namespace
