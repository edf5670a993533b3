// SPDX-License-Identifier: Apache-2.0
#include <sattn/budget/select.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <set>
#include <span>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "support/errors.hpp"
#include "support/numbers.hpp"
#include "support/random.hpp"

namespace {

using sattn::budget;
using sattn::index_t;
using sattn::key_range;
using sattn::protection;
using sattn::selection;
using sattn::token_t;
using test_support::error_of;
using test_support::infinity;
using test_support::quiet_nan;
using test_support::random_source;
using test_support::seed_trace;

using positions = std::vector<token_t>;

constexpr float lowest = std::numeric_limits<float>::lowest();

positions choose(const std::vector<float>& scores, const selection& rule, key_range diagonal = {}) {
  positions chosen = {-7};  // what was there must go
  sattn::selector().choose(scores, rule, diagonal, chosen);
  return chosen;
}

positions legal_positions(std::span<const float> scores) {
  positions legal;
  for (std::size_t i = 0; i < scores.size(); ++i) {
    if (scores[i] != -infinity) legal.push_back(static_cast<token_t>(i));
  }
  return legal;
}

// Far apart, close to each other, all alike but for a few bits, and one far from all others.
TEST(nth_largest, is_the_nth_of_the_sorted_numbers) {
  const seed_trace trace;
  random_source random;
  const auto some_bits = [&](int bits) {
    const auto word = [&] { return static_cast<std::uint64_t>(random.integer(0, 1 << 16)); };
    const std::uint64_t all = word() << 48 | word() << 32 | word() << 16 | word();
    return all >> (64 - bits);
  };
  for (const int bits : {12, 20, 33, 64}) {
    for (const std::size_t size : {1u, 2u, 127u, 128u, 129u, 1000u, 2001u}) {
      std::set<std::uint64_t> different;
      if (size % 2 == 1) different.insert(std::numeric_limits<std::uint64_t>::max());
      // Together and away from 0, so that more than a few share their leading bits.
      const std::uint64_t offset = size % 3 == 0 && bits < 62 ? std::uint64_t{1} << 62 : 0;
      while (different.size() < size) different.insert(offset + some_bits(bits));
      const std::vector<std::uint64_t> ascending(different.begin(), different.end());
      const index_t count = std::ssize(ascending);
      for (const index_t n : {index_t{1}, index_t{2}, count / 2, count - 1, count}) {
        if (n < 1 || n > count) continue;
        std::vector<std::uint64_t> numbers = ascending;
        for (std::size_t i = numbers.size(); i-- > 1;) {
          const index_t j = random.integer(0, std::ssize(numbers));
          std::swap(numbers[i], numbers[static_cast<std::size_t>(j)]);
        }
        EXPECT_EQ(sattn::detail::nth_largest(numbers, n),
                  ascending[static_cast<std::size_t>(count - n)])
            << bits << " bits, " << n << " of " << count;
      }
    }
  }
}

/// What choose() promises, by sorting: protected units, then the best of the others. Exact where
/// sums of the scores are exact in double.
positions chosen_by_sorting(std::span<const float> scores, const selection& rule,
                            key_range diagonal) {
  const auto score = [&](token_t i) { return scores[static_cast<std::size_t>(i)]; };
  const positions legal = legal_positions(scores);
  const auto count = std::ssize(legal);
  positions chosen;
  positions others;
  for (index_t n = 0; n < count; ++n) {
    const token_t i = legal[static_cast<std::size_t>(n)];
    const bool first = n < rule.keep.first;
    const bool recent = count - n <= rule.keep.recent;
    const bool own =
        rule.keep.diagonal && diagonal.begin - rule.keep.before <= i && i < diagonal.end;
    (first || recent || own ? chosen : others).push_back(i);
  }
  std::sort(others.begin(), others.end(), [&](token_t a, token_t b) {
    if (std::isnan(score(a)) || std::isnan(score(b))) {
      if (std::isnan(score(a)) != std::isnan(score(b))) return std::isnan(score(b));
      return a < b;
    }
    return score(a) != score(b) ? score(a) > score(b) : a < b;
  });

  const bool inside = rule.keep.counted != protection::counting::on_top;
  const bool slots = rule.keep.counted == protection::counting::slots;
  const index_t counted = inside ? std::ssize(chosen) : 0;
  index_t wanted = slots ? 0 : counted;  // units that the budget pays for
  if (rule.amount.by() == budget::kind::coverage) {
    // With slots the protected units stand where their scores put them.
    positions candidates = slots ? legal : others;
    std::sort(candidates.begin(), candidates.end(), [&](token_t a, token_t b) {
      return std::pair(-score(a), a) < std::pair(-score(b), b);
    });
    double have = 0;
    if (inside && !slots) {
      for (const token_t i : chosen) have += double{score(i)};
    }
    double all = have;
    for (const token_t i : candidates) all += double{score(i)};
    const double target = rule.amount.share() * all;
    for (const token_t i : candidates) {
      const bool enough = rule.amount.beyond() ? have > target : have >= target;
      if (enough && rule.amount.share() < 1) break;
      have += double{score(i)};
      ++wanted;
    }
    wanted = rule.amount.clamp(wanted);
  } else if (rule.amount.by() == budget::kind::threshold) {
    const positions& candidates = slots ? legal : others;
    for (const token_t i : candidates) wanted += double{score(i)} > rule.amount.threshold() ? 1 : 0;
    wanted = rule.amount.clamp(wanted);
  } else {
    wanted = rule.amount.count(count);
  }
  const index_t free = std::clamp<index_t>(wanted - counted, 0, std::ssize(others));
  chosen.insert(chosen.end(), others.begin(), others.begin() + free);
  std::sort(chosen.begin(), chosen.end());
  return chosen;
}

// ---- random rows against the sort

protection random_protection(random_source& random) {
  protection keep;
  if (random.integer(0, 2) == 0) keep.first = random.integer(0, 6);
  if (random.integer(0, 2) == 0) keep.recent = random.integer(0, 6);
  keep.diagonal = random.integer(0, 2) == 0;
  if (random.integer(0, 2) == 0) keep.before = random.integer(0, 3);
  using enum protection::counting;
  keep.counted = random.pick({inside, inside, on_top, slots});
  return keep;
}

key_range random_diagonal(random_source& random) {
  const index_t begin = random.integer(-5, 100);
  return {static_cast<token_t>(begin), static_cast<token_t>(begin + random.integer(0, 10))};
}

budget random_bounds(random_source& random, budget b) {
  if (random.integer(0, 3) == 0) b = b.at_least(random.integer(0, 10));
  if (random.integer(0, 3) == 0) b = b.at_most(random.integer(10, 40));
  return b;
}

std::string describe(std::span<const float> scores, const selection& rule, key_range diagonal) {
  std::ostringstream text;
  text << "kind " << static_cast<int>(rule.amount.by()) << ", amount " << rule.amount.share()
       << ", first " << rule.keep.first << ", recent " << rule.keep.recent << ", diagonal "
       << rule.keep.diagonal << " [" << diagonal.begin << ", " << diagonal.end << ")"
       << ", counted " << static_cast<int>(rule.keep.counted)
       << ", scores";
  for (const float s : scores) text << ' ' << s;
  return text.str();
}

TEST(selector, counted_budgets_choose_what_a_sort_chooses) {
  const seed_trace trace;
  random_source random;
  for (int round = 0; round < 5000; ++round) {
    // A handful of values, so that most choices are between equal scores.
    const bool many = round % 50 == 0;  // more than are told apart without the radix
    std::vector<float> scores(static_cast<std::size_t>(random.integer(0, many ? 3000 : 100)));
    for (float& s : scores) {
      if (many && round % 100 == 0) {
        s = static_cast<float>(random.normal());
        continue;
      }
      s = random.pick({0.0f, -0.0f, 1.0f, 1.0f, -2.0f, 0x1p-149f, -0x1p-149f, 3.5f, lowest, -lowest,
                       infinity, quiet_nan, -quiet_nan, -infinity, -infinity});
    }
    const double share = static_cast<double>(random.integer(0, 33)) / 32;
    const budget amount =
        random.pick({budget::fixed(random.integer(0, many ? 3100 : 110)), budget::ratio(share),
                     budget::power(4 * share, 0.5),
                     budget::threshold(random.pick({-3.0, 0.0, 1.0, 2.5, double{infinity}}))});
    const selection rule = {random_bounds(random, amount), random_protection(random)};
    const key_range diagonal = random_diagonal(random);
    ASSERT_EQ(choose(scores, rule, diagonal), chosen_by_sorting(scores, rule, diagonal))
        << describe(scores, rule, diagonal);
  }
}

TEST(selector, coverage_chooses_the_fewest_units_that_reach_the_mass) {
  const seed_trace trace;
  random_source random;
  for (int round = 0; round < 5000; ++round) {
    // Multiples of 1/8 and targets in 64ths: every sum and product is exact.
    const index_t most = random.integer(0, 20) == 0 ? 3000 : 100;  // sorted part by part
    std::vector<float> scores(static_cast<std::size_t>(random.integer(0, most)));
    for (float& s : scores) {
      s = random.integer(0, 4) == 0 ? -infinity : static_cast<float>(random.integer(0, 17)) / 8;
    }
    const auto share = [&](index_t least) {
      return static_cast<double>(random.integer(least, 65)) / 64;
    };
    const budget amount = random.integer(0, 2) == 0 ? budget::coverage(share(1))
                                                    : budget::coverage_above(share(0));
    const selection rule = {random_bounds(random, amount), random_protection(random)};
    const key_range diagonal = random_diagonal(random);
    ASSERT_EQ(choose(scores, rule, diagonal), chosen_by_sorting(scores, rule, diagonal))
        << describe(scores, rule, diagonal);
  }
}

TEST(selector, a_larger_budget_chooses_a_superset) {
  const seed_trace trace;
  random_source random;
  for (int round = 0; round < 100; ++round) {
    std::vector<float> scores(60);
    for (float& s : scores) {
      s = random.integer(0, 5) == 0 ? -infinity : static_cast<float>(random.integer(0, 6));
    }
    const protection keep = random_protection(random);
    const key_range diagonal = random_diagonal(random);
    const auto expect_supersets = [&](auto&& budget_at) {
      positions smaller;
      for (int step = 1; step <= 64; ++step) {
        const positions larger = choose(scores, {budget_at(step), keep}, diagonal);
        EXPECT_TRUE(std::includes(larger.begin(), larger.end(), smaller.begin(), smaller.end()));
        smaller = larger;
      }
      EXPECT_EQ(smaller, legal_positions(scores));
    };
    expect_supersets([](int step) { return budget::fixed(step); });
    expect_supersets([](int step) { return budget::ratio(step / 64.0); });
    expect_supersets([](int step) { return budget::coverage(step / 64.0); });
    expect_supersets([](int step) { return budget::coverage_above(step / 64.0); });
    expect_supersets([](int step) { return budget::power(step, 0.7); });
    expect_supersets([](int step) { return budget::threshold(6 - step / 8.0); });
  }
}

// ---- order of the scores

TEST(selector, equal_scores_go_to_the_lowest_positions) {
  for (index_t k = 0; k <= 1000; k += 37) {
    positions want(static_cast<std::size_t>(k));
    for (std::size_t i = 0; i < want.size(); ++i) want[i] = static_cast<token_t>(i);
    EXPECT_EQ(choose(std::vector<float>(1000, 0.25f), {budget::fixed(k)}), want);
  }
}

TEST(selector, zeros_of_both_signs_are_equal) {
  EXPECT_EQ(choose({-0.0f, 0.0f, 0.0f}, {budget::fixed(1)}), positions{0});
  EXPECT_EQ(choose({0.0f, -0.0f, -0.0f}, {budget::fixed(1)}), positions{0});
  EXPECT_EQ(choose({-0x1p-149f, -0.0f, 0x1p-149f}, {budget::fixed(2)}), (positions{1, 2}));
}

TEST(selector, nan_is_the_lowest_legal_score) {
  const std::vector<float> scores = {quiet_nan, lowest, -infinity, -quiet_nan};
  EXPECT_EQ(choose(scores, {budget::fixed(1)}), positions{1});
  EXPECT_EQ(choose(scores, {budget::fixed(2)}), (positions{0, 1}));
  EXPECT_EQ(choose(scores, {budget::fixed(9)}), (positions{0, 1, 3}));
}

TEST(selector, nan_has_no_mass) {
  EXPECT_EQ(choose({1.0f, quiet_nan, 5.0f, 4.0f}, {budget::coverage(0.5)}), positions{2});
  EXPECT_EQ(choose({1.0f, quiet_nan, 5.0f, 4.0f}, {budget::coverage(0.8)}), (positions{2, 3}));
}

TEST(selector, infinity_is_the_highest_score_and_minus_infinity_is_not_legal) {
  EXPECT_EQ(choose({1.0f, infinity, -lowest}, {budget::fixed(1)}), positions{1});
  EXPECT_EQ(choose({-infinity, 1.0f, -infinity}, {budget::fixed(3)}), positions{1});
}

TEST(selector, nothing_legal_gives_nothing) {
  const protection all_kept = {.first = 2, .recent = 2, .diagonal = true};
  for (const budget& b : {budget::fixed(3), budget::ratio(1), budget::coverage(1),
                          budget::coverage(0.5).at_least(2)}) {
    for (const std::size_t n : {0U, 1U, 5U}) {
      EXPECT_EQ(choose(std::vector<float>(n, -infinity), {b, all_kept}, {0, 5}), positions{});
    }
  }
}

TEST(selector, ratio_counts_legal_units_alone) {
  EXPECT_EQ(choose({-infinity, 1.0f, 3.0f, 2.0f, -infinity, 0.0f}, {budget::ratio(0.5)}),
            (positions{2, 3}));
}

// ---- protected units

TEST(selector, protected_units_are_the_first_and_last_legal_ones) {
  const std::vector<float> scores = {-infinity, 1, 9, 9, 9, 1, 1, -infinity};
  EXPECT_EQ(choose(scores, {budget::fixed(0), {.first = 1, .recent = 2}}), (positions{1, 5, 6}));
}

TEST(selector, the_diagonal_is_kept_only_when_asked_for_and_where_it_is_legal) {
  const std::vector<float> scores = {9, 1, 1, 1, -infinity};
  EXPECT_EQ(choose(scores, {budget::fixed(1), {.diagonal = true}}, {2, 5}), (positions{2, 3}));
  EXPECT_EQ(choose(scores, {budget::fixed(1)}, {2, 5}), positions{0});
  EXPECT_EQ(choose(scores, {budget::fixed(1), {.diagonal = true}}, {4, 9}), positions{0});
}

TEST(selector, protected_units_use_up_the_budget_or_come_on_top) {
  const std::vector<float> scores = {1, 5, 4, 3, 1};
  constexpr protection inside = {.first = 1, .recent = 1};
  constexpr protection on_top = {.first = 1, .recent = 1, .counted = protection::counting::on_top};
  EXPECT_EQ(choose(scores, {budget::fixed(3), inside}), (positions{0, 1, 4}));
  EXPECT_EQ(choose(scores, {budget::fixed(2), on_top}), (positions{0, 1, 2, 4}));
  EXPECT_EQ(choose(scores, {budget::fixed(1), inside}), (positions{0, 4}));  // kept all the same
  EXPECT_EQ(choose(scores, {budget::fixed(0), on_top}), (positions{0, 4}));
}

TEST(selector, a_unit_protected_twice_is_chosen_and_counted_once) {
  const std::vector<float> scores = {1, 5, 4};
  const protection keep = {.first = 2, .recent = 3, .diagonal = true};
  EXPECT_EQ(choose(scores, {budget::fixed(3), keep}, {0, 3}), (positions{0, 1, 2}));
  EXPECT_EQ(choose(scores, {budget::fixed(2), {.first = 1, .diagonal = true}}, {0, 1}),
            (positions{0, 1}));
}

TEST(selector, negative_protection_is_refused) {
  EXPECT_EQ(error_of([] {
              choose({1.0f}, {budget::fixed(1), {.first = -1}});
            }),
            "selection: protected first -1, recent 0 and before 0 must not be negative");
  EXPECT_NE(error_of([] { choose({1.0f}, {budget::fixed(1), {.recent = -2}}); }), "");
}

// ---- coverage

TEST(selector, coverage_stops_as_soon_as_the_mass_is_reached) {
  EXPECT_EQ(choose(std::vector<float>(8, 1.0f), {budget::coverage(0.5)}), (positions{0, 1, 2, 3}));
  EXPECT_EQ(choose({1, 8, 4, 3}, {budget::coverage(0.5)}), positions{1});
  EXPECT_EQ(choose({1, 8, 4, 3}, {budget::coverage(0.51)}), (positions{1, 2}));
}

TEST(selector, full_coverage_is_all_legal_units_even_without_mass) {
  EXPECT_EQ(choose({0, 1, -infinity, 0}, {budget::coverage(1)}), (positions{0, 1, 3}));
  EXPECT_EQ(choose({0, 1, -infinity, 0}, {budget::coverage(0.999)}), positions{1});
  EXPECT_EQ(choose({0, 0}, {budget::coverage(1)}), (positions{0, 1}));
}

// Adding small numbers in another order may not make the last units unreachable.
TEST(selector, full_coverage_is_all_units_whatever_the_rounding) {
  const seed_trace trace;
  random_source random;
  for (int round = 0; round < 200; ++round) {
    std::vector<float> scores(300);
    for (float& s : scores) s = static_cast<float>(std::exp(12 * random.normal()));
    EXPECT_EQ(choose(scores, {budget::coverage(1)}), legal_positions(scores));
  }
}

TEST(selector, protected_mass_counts_inside_and_not_on_top) {
  const std::vector<float> scores = {4, 1, 2, 1};
  EXPECT_EQ(choose(scores, {budget::coverage(0.75), {.first = 1}}), (positions{0, 2}));
  EXPECT_EQ(choose(scores, {budget::coverage(0.5), {.first = 1}}), positions{0});
  EXPECT_EQ(choose(scores,
                   {budget::coverage(0.5), {.first = 1, .counted = protection::counting::on_top}}),
            (positions{0, 2}));
}

TEST(selector, more_than_a_share_of_nothing_is_the_best_unit) {
  const std::vector<float> scores = {1, 8, 4, 3};
  const budget b = budget::coverage_above(0);
  EXPECT_EQ(choose(scores, {b}), positions{1});
  EXPECT_EQ(choose(scores, {b.at_least(3)}), (positions{1, 2, 3}));
  EXPECT_EQ(choose(scores, {b, {.first = 1}}), positions{0});
  EXPECT_EQ(choose(scores, {b, {.first = 1, .counted = protection::counting::slots}}),
            positions{0});
  EXPECT_EQ(choose(scores, {b, {.first = 1, .counted = protection::counting::on_top}}),
            (positions{0, 1}));
}

TEST(selector, coverage_keeps_to_its_bounds) {
  const std::vector<float> scores = {1, 8, 4, 3};
  EXPECT_EQ(choose(scores, {budget::coverage(0.5).at_least(3)}), (positions{1, 2, 3}));
  EXPECT_EQ(choose(scores, {budget::coverage(1).at_most(2)}), (positions{1, 2}));
  EXPECT_EQ(choose(scores, {budget::coverage(0.01).at_least(2), {.first = 1}}), (positions{0, 1}));
}

// The share of an infinite sum is no number.
TEST(selector, a_unit_of_infinite_mass_covers_any_share_alone) {
  using enum protection::counting;
  const std::vector<float> scores = {2, infinity, 8, infinity};
  for (const double share : {0.01, 0.5, 0.99}) {
    for (const budget& b : {budget::coverage(share), budget::coverage_above(share)}) {
      EXPECT_EQ(choose(scores, {b}), positions{1}) << share;
      EXPECT_EQ(choose(scores, {b, {.recent = 1}}), positions{3}) << share;
      EXPECT_EQ(choose(scores, {b, {.recent = 1, .counted = slots}}), positions{3}) << share;
      EXPECT_EQ(choose(scores, {b, {.first = 1}}), (positions{0, 1})) << share;
      EXPECT_EQ(choose(scores, {b, {.recent = 1, .counted = on_top}}), (positions{1, 3})) << share;
      EXPECT_EQ(choose(scores, {b.at_least(3)}), (positions{1, 2, 3})) << share;
    }
  }
  EXPECT_EQ(choose(scores, {budget::coverage(1)}), (positions{0, 1, 2, 3}));
  EXPECT_EQ(choose(scores, {budget::coverage_above(0)}), positions{1});
}

TEST(selector, refuses_more_units_than_positions_can_name) {
  // Refused before any of them is read.
  const float one = 1;
  const std::span<const float> scores(&one, std::size_t{1} << 31);
  positions chosen;
  EXPECT_EQ(error_of([&] { sattn::selector().choose(scores, {budget::fixed(1)}, {}, chosen); }),
            "selection: 2147483648 scores, positions are 32 bit");
}

TEST(selector, coverage_refuses_negative_scores) {
  EXPECT_EQ(error_of([] {
              choose({1.0f, -0.5f}, {budget::coverage(0.5)});
            }),
            "selection: coverage needs scores >= 0, unit 1 has -0.500000");
  EXPECT_EQ(choose({1.0f, -0.0f, -infinity}, {budget::coverage(1)}), (positions{0, 1}));
  EXPECT_EQ(choose({1.0f, -0.5f}, {budget::fixed(2)}), (positions{0, 1}));
}

// ---- state

TEST(selector, choices_do_not_depend_on_earlier_ones) {
  sattn::selector used;
  positions chosen;
  used.choose(std::vector<float>(100, 9.0f), {budget::coverage(0.9)}, {}, chosen);
  used.choose(std::vector<float>{3, 1, 2}, {budget::fixed(2)}, {}, chosen);
  EXPECT_EQ(chosen, (positions{0, 2}));
  used.choose(std::vector<float>(100, 9.0f), {budget::coverage(0.9)}, {}, chosen);
  used.choose(std::vector<float>{3, 1, 2},
              {budget::fixed(2), {.counted = protection::counting::on_top}}, {}, chosen);
  EXPECT_EQ(chosen, (positions{0, 2}));
  used.choose(std::vector<float>{-infinity}, {budget::fixed(2)}, {}, chosen);
  EXPECT_EQ(chosen, positions{});
}

}  // namespace
