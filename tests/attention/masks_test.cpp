// SPDX-License-Identifier: Apache-2.0
//
// Plans and their masks say the same: each is made of the other.

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <sattn/attention/attend.hpp>
#include <sattn/attention/plan.hpp>
#include <sattn/pattern/block_mask.hpp>
#include <sattn/pattern/token_lists.hpp>
#include <string>
#include <utility>
#include <vector>

#include "support/patterns.hpp"
#include "support/plans.hpp"
#include "support/problem.hpp"

namespace {

using namespace sattn;         // NOLINT(google-build-using-namespace)
using namespace test_support;  // NOLINT(google-build-using-namespace)

// [q_heads, q_len, kv_len]
std::vector<std::uint8_t> to_mask(const attention_plan& plan) {
  std::vector<std::uint8_t> all;
  for (index_t h = 0; h < plan.shape().q_heads; ++h) {
    const std::vector<std::uint8_t> mask = expand(plan, h);
    all.insert(all.end(), mask.begin(), mask.end());
  }
  return all;
}

// A list of keys for each row and query head.
token_lists from_mask(const attention_shape& shape, const std::vector<std::uint8_t>& mask) {
  token_lists lists{1, {0}, {}, shape.q_heads};
  for (index_t row = 0; row < shape.q_heads * shape.q_len; ++row) {
    for (index_t key = 0; key < shape.kv_len; ++key) {
      if (mask[at(row * shape.kv_len + key)] == 0) continue;
      lists.tokens.push_back(static_cast<token_t>(key));
    }
    lists.indptr.push_back(std::ssize(lists.tokens));
  }
  return lists;
}

// The mask of a plan as lists and as blocks of one pair; all select the same pairs, and attention
// by any of them is within the bound of the one oracle, which knows the mask.
void expect_round_trip(all_contexts& contexts, const attention_plan& plan,
                       const attention_problem& p) {
  const std::vector<std::uint8_t> mask = to_mask(plan);
  const reference::result want = expected(p, [&](index_t h, index_t row, index_t key) {
    return mask[at((h * p.shape.q_len + row) * p.shape.kv_len + key)] != 0;
  });
  ASSERT_TRUE(within_bound(contexts, plan, p, want));
  const domain legal = plan.data().legal;
  const token_lists lists = from_mask(p.shape, mask);
  const block_mask pairs{1, 1, mask, p.shape.q_heads};
  for (const auto& [name, again] :
       {std::pair{"lists", plan_prefill(contexts.any(), p.shape, lists, {.legal = legal})},
        {"splits of lists", plan_decode(contexts.any(), p.shape, lists,
                                        {.legal = legal, .split_keys = 30})},
        {"pairs", plan_prefill(contexts.any(), p.shape, pairs, {.legal = legal})},
        {"splits of pairs", plan_decode(contexts.any(), p.shape, pairs,
                                        {.legal = legal, .split_keys = 30})}}) {
    SCOPED_TRACE(name);
    ASSERT_EQ(to_mask(again), mask);
    ASSERT_TRUE(within_bound(contexts, again, p, want));
  }
}

class masks : public ::testing::TestWithParam<int> {};

TEST_P(masks, of_random_patterns_and_back) {
  const seed_trace trace;
  random_source random(test_seed() + static_cast<std::uint64_t>(GetParam()));
  all_contexts contexts;
  for (int round = 0; round < 20; ++round) {
    problem_extents e = random_extents(random);
    e.q_len = 1 + e.q_len / 2;
    const attention_problem p(random, e);
    const pattern_case pattern =
        random_pattern(random, p.shape, static_cast<pattern_kind>(GetParam()));
    SCOPED_TRACE(::testing::Message() << pattern.name << "; " << e);
    const domain legal = test_support::random_domain(random, p.shape);
    expect_round_trip(
        contexts,
        round % 2 == 0
            ? plan_prefill(contexts.any(), p.shape, pattern.pattern, {.legal = legal})
            : plan_decode(contexts.any(), p.shape, pattern.pattern, {.legal = legal}),
        p);
  }
}

INSTANTIATE_TEST_SUITE_P(kinds, masks, ::testing::Range(0, pattern_kinds));

// Every encoding at once, either rounding: more than any pattern writes.
TEST(masks, of_random_plans_and_back) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (int round = 0; round < 100; ++round) {
    const plan_data data = random_plan_data(random, 100);
    SCOPED_TRACE(describe(data));
    attention_problem p(random, {.q_len = data.shape.q_len, .kv_len = data.shape.kv_len,
                                 .q_heads = data.shape.q_heads, .kv_heads = data.shape.kv_heads,
                                 .head_dim = random.integer(1, 30), .v_dim = random.integer(1, 30),
                                 .q_offset = data.shape.q_offset});
    expect_round_trip(contexts, attention_plan(data), p);
  }
}

}  // namespace
