// SPDX-License-Identifier: Apache-2.0
#include <sattn/budget/budget.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <string>

#include "support/errors.hpp"

namespace {

using sattn::budget;
using sattn::index_t;
using test_support::error_of;

TEST(budget, fixed_is_its_count_until_units_run_out) {
  for (index_t count = 0; count < 12; ++count) {
    for (index_t legal = 0; legal < 12; ++legal) {
      EXPECT_EQ(budget::fixed(count).count(legal), std::min(count, legal));
    }
  }
}

// Shares of 64ths are exact in binary, so integers know the answer.
TEST(budget, ratio_is_rounded_up) {
  for (index_t share = 0; share <= 64; ++share) {
    for (index_t legal = 0; legal < 200; ++legal) {
      EXPECT_EQ(budget::ratio(static_cast<double>(share) / 64).count(legal),
                (share * legal + 63) / 64)
          << share << "/64 of " << legal;
    }
  }
}

// 0.07 * 100 is more than 7 in double.
TEST(budget, ratio_of_decimal_shares_does_not_round_up_twice) {
  for (index_t percent = 0; percent <= 100; ++percent) {
    for (index_t hundreds = 0; hundreds < 50; ++hundreds) {
      EXPECT_EQ(budget::ratio(static_cast<double>(percent) / 100).count(100 * hundreds),
                percent * hundreds)
          << percent << " % of " << 100 * hundreds;
    }
  }
}

TEST(budget, ratio_keeps_one_of_many_however_small_and_none_only_for_zero) {
  EXPECT_EQ(budget::ratio(1e-12).count(1000), 1);
  EXPECT_EQ(budget::ratio(std::numeric_limits<double>::denorm_min()).count(1), 1);
  EXPECT_EQ(budget::ratio(0).count(1000), 0);
  EXPECT_EQ(budget::ratio(-0.0).count(1000), 0);
}

// Powers of integers by multiplication: 16^(3/4) = 8, 81^(1/4) = 3, 10,000^(1/2) = 100.
TEST(budget, power_follows_the_length) {
  EXPECT_EQ(budget::power(2, 0.75).count(16), 16);
  EXPECT_EQ(budget::power(1, 0.75).count(16), 8);
  EXPECT_EQ(budget::power(1.1, 0.75).count(16), 9);
  EXPECT_EQ(budget::power(2, 0.25).count(81), 6);
  EXPECT_EQ(budget::power(3, 0.5).count(10000), 300);
  EXPECT_EQ(budget::power(7, 0).count(10000), 7);
  EXPECT_EQ(budget::power(7, 0).count(3), 3);
  EXPECT_EQ(budget::power(1, 2).count(100), 100);
  EXPECT_EQ(budget::power(1e300, 300).count(100), 100);
  EXPECT_EQ(budget::power(0, 1).count(100), 0);
  EXPECT_EQ(budget::power(0, 200).count(100), 0);
  EXPECT_EQ(budget::power(5, 1).count(0), 0);
  // Grows with the length, and more slowly than it.
  for (index_t n = 1; n < 5000; ++n) {
    const budget b = budget::power(8, 0.6);
    EXPECT_GE(b.count(n + 1), b.count(n));
    EXPECT_LE(b.count(2 * n), 2 * b.count(n));
  }
}

TEST(budget, bounds_clamp_the_count_and_legal_units_clamp_the_bounds) {
  EXPECT_EQ(budget::fixed(2).at_least(5).count(100), 5);
  EXPECT_EQ(budget::fixed(7).at_least(5).count(100), 7);
  EXPECT_EQ(budget::fixed(7).at_most(5).count(100), 5);
  EXPECT_EQ(budget::fixed(2).at_most(5).count(100), 2);
  EXPECT_EQ(budget::fixed(2).at_least(5).count(3), 3);
  EXPECT_EQ(budget::ratio(0.5).at_least(5).at_most(9).count(8), 5);
  EXPECT_EQ(budget::ratio(0.5).at_least(5).at_most(9).count(14), 7);
  EXPECT_EQ(budget::ratio(0.5).at_most(9).at_least(5).count(40), 9);
  EXPECT_EQ(budget::fixed(7).at_most(0).count(100), 0);
}

TEST(budget, the_last_of_two_bounds_of_a_kind_holds) {
  EXPECT_EQ(budget::fixed(0).at_least(5).at_least(3).count(100), 3);
  EXPECT_EQ(budget::fixed(100).at_most(3).at_most(5).count(100), 5);
}

TEST(budget, a_bound_leaves_the_budget_it_is_asked_of_alone) {
  const budget all = budget::fixed(10);
  EXPECT_EQ(all.at_most(3).count(100), 3);
  EXPECT_EQ(all.count(100), 10);
}

TEST(budget, coverage_keeps_its_mass_and_its_bounds) {
  const budget b = budget::coverage(0.75).at_least(2).at_most(6);
  EXPECT_EQ(b.by(), budget::kind::coverage);
  EXPECT_EQ(b.share(), 0.75);
  EXPECT_EQ(b.clamp(1), 2);
  EXPECT_EQ(b.clamp(4), 4);
  EXPECT_EQ(b.clamp(7), 6);
}

TEST(budget, the_largest_amounts_are_all_units) {
  constexpr index_t most = std::numeric_limits<index_t>::max();
  constexpr index_t tokens = std::numeric_limits<sattn::token_t>::max();
  EXPECT_EQ(budget::fixed(most).count(10), 10);
  EXPECT_EQ(budget::ratio(1).count(tokens), tokens);
  EXPECT_EQ(budget::ratio(0).at_least(most).count(tokens), tokens);
}

TEST(budget, amounts_out_of_range_are_refused) {
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  EXPECT_EQ(error_of([] { budget::fixed(-1); }), "budget: fixed -1 is negative");
  for (const double share : {-0.25, 1.25, nan}) {
    const std::string what = error_of([=] { budget::ratio(share); });
    EXPECT_EQ(what, "budget: ratio " + std::to_string(share) + " is outside [0, 1]");
  }
  for (const double mass : {0.0, -0.25, 1.25, nan}) {
    const std::string what = error_of([=] { budget::coverage(mass); });
    EXPECT_EQ(what, "budget: coverage " + std::to_string(mass) + " is outside (0, 1]");
  }
  EXPECT_NE(error_of([] { budget::power(-1, 1); }), "");
  EXPECT_NE(error_of([] { budget::power(1, -1); }), "");
  EXPECT_NE(error_of([] { budget::power(1, std::numeric_limits<double>::infinity()); }), "");
  EXPECT_NE(error_of([=] { budget::power(nan, 1); }), "");
  for (const double mass : {-0.25, 1.25, nan}) {
    const std::string what = error_of([=] { budget::coverage_above(mass); });
    EXPECT_EQ(what, "budget: coverage " + std::to_string(mass) + " is outside [0, 1]");
  }
  EXPECT_NE(error_of([=] { budget::threshold(nan); }), "");
}

TEST(budget, bounds_that_are_negative_or_cross_are_refused) {
  EXPECT_NE(error_of([] { budget::fixed(1).at_least(-1); }), "");
  EXPECT_NE(error_of([] { budget::fixed(1).at_most(-1); }), "");
  EXPECT_EQ(error_of([] { budget::ratio(0.5).at_least(5).at_most(4); }),
            "budget: at least 5 and at most 4");
  EXPECT_EQ(error_of([] { budget::ratio(0.5).at_most(4).at_least(5); }),
            "budget: at least 5 and at most 4");
  EXPECT_EQ(error_of([] { budget::ratio(0.5).at_most(4).at_least(4); }), "");
}

}  // namespace
