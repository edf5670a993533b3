// SPDX-License-Identifier: Apache-2.0
#include <sattn/plan/domain.hpp>

#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <vector>

#include "support/errors.hpp"
#include "support/plans.hpp"
#include "support/random.hpp"

namespace {

using sattn::attention_shape;
using sattn::check_shape;
using sattn::domain;
using sattn::index_t;
using sattn::key_range;
using sattn::token_t;
using test_support::error_of;
using test_support::random_source;
using test_support::seed_trace;
using test_support::sees;

constexpr token_t last_token = std::numeric_limits<token_t>::max();

TEST(key_range, has_a_size_of_zero_when_it_ends_before_it_begins) {
  EXPECT_TRUE((key_range{3, 3}.empty()));
  EXPECT_TRUE((key_range{3, -3}.empty()));
  EXPECT_EQ((key_range{3, -3}.size()), 0);
  EXPECT_EQ((key_range{-last_token, last_token}.size()), 2 * index_t{last_token});
}

TEST(attention_shape, places_rows_behind_the_offset_and_groups_heads) {
  const attention_shape shape{10, 20, 8, 2, -3};
  EXPECT_EQ(shape.position(0), -3);
  EXPECT_EQ(shape.position(9), 6);
  EXPECT_EQ(shape.group_size(), 4);
  EXPECT_EQ((attention_shape{10, 20, 0, 0, 0}.group_size()), 0);
}

TEST(domain, is_causal_by_default_and_full_sees_everything) {
  EXPECT_EQ(domain{}.legal(4, 10), (key_range{0, 5}));
  EXPECT_EQ(domain::full().legal(4, 10), (key_range{0, 10}));
  EXPECT_EQ(domain::full().legal(-100, 10), (key_range{0, 10}));
}

TEST(domain, counts_the_row_itself_as_part_of_its_window) {
  const domain legal{.causal = true, .window = 3, .prefix = 0};
  EXPECT_EQ(legal.legal(0, 10), (key_range{0, 1}));
  EXPECT_EQ(legal.legal(5, 10), (key_range{3, 6}));
  EXPECT_EQ(legal.legal(11, 10), (key_range{9, 10}));
  EXPECT_TRUE(legal.legal(12, 10).empty());
}

TEST(domain, lets_early_rows_see_the_whole_prefix_but_not_past_their_window) {
  const domain legal{.causal = true, .window = 4, .prefix = 6};
  EXPECT_EQ(legal.legal(0, 20), (key_range{0, 6}));
  EXPECT_EQ(legal.legal(5, 20), (key_range{2, 6}));
  EXPECT_EQ(legal.legal(8, 20), (key_range{5, 9}));
}

TEST(domain, equals_its_definition_key_by_key_and_its_ends_never_move_left) {
  const seed_trace trace;
  random_source random;
  for (int n = 0; n < 2000; ++n) {
    const auto kv_len = static_cast<token_t>(random.integer(0, 40));
    const domain legal = test_support::random_domain(random, kv_len + 1);
    key_range previous{0, 0};
    for (token_t position = -50; position < 90; ++position) {
      const key_range range = legal.legal(position, kv_len);
      ASSERT_TRUE(range.begin >= 0 && range.begin <= range.end && range.end <= kv_len);
      ASSERT_TRUE(range.begin >= previous.begin && range.end >= previous.end)
          << "position " << position;
      previous = range;
      for (token_t key = 0; key < kv_len; ++key) {
        ASSERT_EQ(key >= range.begin && key < range.end, sees(legal, position, key))
            << "causal " << legal.causal << ", window " << legal.window << ", prefix "
            << legal.prefix << ", position " << position << ", key " << key << " of " << kv_len;
      }
    }
  }
}

TEST(domain, does_not_overflow_at_the_ends_of_the_positions) {
  const domain all{.causal = true, .window = last_token, .prefix = last_token};
  EXPECT_EQ(all.legal(last_token, last_token), (key_range{1, last_token}));
  EXPECT_EQ(all.legal(-last_token, last_token), (key_range{0, last_token}));
  EXPECT_EQ(domain{}.legal(last_token, last_token), (key_range{0, last_token}));
}

TEST(check_shape, accepts_empty_problems_and_the_longest_one) {
  EXPECT_NO_THROW(check_shape({}, {}));
  EXPECT_NO_THROW(check_shape({0, 10, 0, 2, 10}, domain::full()));
  EXPECT_NO_THROW(check_shape({last_token, last_token, 8, 8, 0}, {}));
  EXPECT_NO_THROW(check_shape({5, 5, 8, 2, -last_token + 1}, {}));
}

TEST(check_shape, names_the_numbers_that_do_not_fit) {
  const index_t past = index_t{last_token} + 1;
  struct fault {
    attention_shape shape;
    domain legal;
    const char* message;
  };
  const std::vector<fault> faults = {
      {{-1, 2, 4, 2, 0}, {}, "negative extent: q_len -1, kv_len 2, q_heads 4, kv_heads 2"},
      {{1, -2, 4, 2, 0}, {}, "kv_len -2"},
      {{1, 2, -4, 2, 0}, {}, "q_heads -4"},
      {{1, 2, 4, -2, 0}, {}, "kv_heads -2"},
      {{past, 2, 4, 2, 0}, {}, "q_len 2147483648"},
      {{1, past, 4, 2, 0}, {}, "kv_len 2147483648"},
      {{1, 2, past, 2, 0}, {}, "q_heads 2147483648"},
      {{1, 2, past, past, 0}, {}, "kv_heads 2147483648"},
      {{1, 2, 6, 4, 0}, {}, "q_heads 6 is not a multiple of kv_heads 4"},
      {{1, 2, 6, 0, 0}, {}, "q_heads 6 is not a multiple of kv_heads 0"},
      {{2, 2, 4, 2, last_token - 1}, {}, "q_offset 2147483646 for q_len 2"},
      {{2, 2, 4, 2, -last_token}, {}, "q_offset -2147483647 for q_len 2"},
      {{1, 2, 4, 2, 0}, {.window = -1}, "window -1 is negative"},
      {{1, 2, 4, 2, 0}, {.prefix = -2}, "prefix -2 is negative"},
  };
  for (const fault& f : faults) {
    const std::string message = error_of([&] { check_shape(f.shape, f.legal); });
    EXPECT_NE(message.find(f.message), std::string::npos)
        << "got '" << message << "', expected '" << f.message << "'";
  }
}

}  // namespace
