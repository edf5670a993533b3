// SPDX-License-Identifier: Apache-2.0
#include <sattn/exec/context.hpp>

#include <gtest/gtest.h>

#include <cstddef>
#include <memory>
#include <new>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "support/alloc_counter.hpp"
#include "support/patterns.hpp"
#include "support/problem.hpp"

namespace {

using namespace sattn;         // NOLINT(google-build-using-namespace)
using namespace test_support;  // NOLINT(google-build-using-namespace)

template <class F>
std::size_t allocations_of(F&& call) {
  const std::size_t before = allocation_count::current();
  call();
  return allocation_count::current() - before;
}

// One problem, a plan for it, and where its results go.
struct prepared {
  std::string name;
  attention_problem problem;
  attention_plan plan;
  owned_tensor out;
  owned_tensor lse;
  owned_tensor mass;

  prepared(std::string what, attention_problem p, attention_plan made)
      : name(std::move(what)),
        problem(std::move(p)),
        plan(std::move(made)),
        out(problem.shape.q_len, problem.shape.q_heads, problem.v_dim),
        lse(problem.shape.q_len, problem.shape.q_heads, 1),
        mass(problem.shape.kv_len, problem.shape.kv_heads, 1) {}

  attention_sequence sequence() {
    return {&plan, problem.q.view(), problem.kv(), {out.view(), lse.view(), mass.view()}};
  }
};

std::vector<std::unique_ptr<prepared>> every_kind_of_call() {
  random_source random;
  context ctx(1);
  std::vector<std::unique_ptr<prepared>> calls;
  const auto add = [&](std::string name, const problem_extents& e, bool decode,
                       const auto& pattern_of, token_t split_keys = 4096) {
    attention_problem p(random, e);
    const any_pattern pattern = pattern_of(p.shape);
    attention_plan plan = decode ? plan_decode(ctx, p.shape, pattern, {.split_keys = split_keys})
                                 : plan_prefill(ctx, p.shape, pattern);
    calls.push_back(std::make_unique<prepared>(std::move(name), std::move(p), std::move(plan)));
  };
  const auto all = [](const attention_shape&) { return any_pattern(dense{}); };
  const auto lists = [&](const attention_shape& shape) {
    return random_pattern(random, shape, pattern_kind::row_lists).pattern;
  };
  const auto slash = [](const attention_shape&) {
    return any_pattern(vertical_slash{{0, 3}, {0, 1, 9}});
  };
  const problem_extents prompt = {
      .q_len = 90, .kv_len = 120, .q_heads = 6, .kv_heads = 2, .head_dim = 37, .v_dim = 21};
  const problem_extents token = {
      .q_len = 1, .kv_len = 333, .q_heads = 6, .kv_heads = 2, .head_dim = 64, .v_dim = 50};
  add("dense prefill", prompt, false, all);
  add("vertical-slash prefill", prompt, false, slash);
  add("row lists", prompt, false, lists);
  add("decode", token, true, all);
  add("decode in splits", token, true, all, 10);
  add("decode of lists", token, true, lists, 4);
  add("large heads",
      {.q_len = 3, .kv_len = 9, .q_heads = 16, .kv_heads = 1, .head_dim = 576, .v_dim = 512}, false,
      all);
  add("no rows", {.q_len = 0, .kv_len = 9}, false, all);
  add("no keys", {.q_len = 2, .kv_len = 0}, true, all);
  return calls;
}

TEST(allocation, the_counter_counts) {
  // Called as a function: a compiler may leave out a new-expression that nothing depends on.
  EXPECT_GT(allocations_of([] { ::operator delete(::operator new(100)); }), 0u);
}

TEST(allocation, attend_makes_none_once_the_workspace_is_reserved) {
  const seed_trace trace;
  serial_executor serial;
  thread_pool pool(3);
  for (const auto& c : every_kind_of_call()) {
    for (const kernel_table* table : kernel_tables()) {
      context on_one(serial, *table);
      context on_pool(pool, *table);
      for (context* ctx : {&on_one, &on_pool}) {
        const attention_sequence s = c->sequence();
        ctx->reserve(workspace_bytes(*ctx, {&s, 1}));
        EXPECT_EQ(allocations_of([&] { attend(*ctx, {&s, 1}); }), 0u) << c->name;
        EXPECT_EQ(allocations_of([&] { attend(*ctx, *s.plan, s.q, s.kv, s.output); }), 0u)
            << c->name;
      }
    }
  }
}

TEST(allocation, the_second_of_two_like_calls_makes_none) {
  context ctx(2);
  for (const auto& c : every_kind_of_call()) {
    const attention_sequence s = c->sequence();
    attend(ctx, {&s, 1});
    EXPECT_EQ(allocations_of([&] { attend(ctx, {&s, 1}); }), 0u) << c->name;
  }
}

TEST(allocation, workspace_bytes_is_exact) {
  serial_executor serial;
  thread_pool pool(3);
  context on_one(serial);
  context on_pool(pool);
  const auto calls = every_kind_of_call();
  std::vector<attention_sequence> batch;
  for (const auto& c : calls) batch.push_back(c->sequence());
  std::vector<std::span<const attention_sequence>> groups = {batch};
  for (const attention_sequence& s : batch) groups.push_back({&s, 1});
  for (context* ctx : {&on_one, &on_pool}) {
    for (const auto& group : groups) {
      const std::size_t bytes = workspace_bytes(*ctx, group);
      // Of its own size, so that one byte too many is outside of the allocation.
      aligned_buffer exact;
      exact.reserve(bytes);
      ctx->use_workspace(exact.bytes());
      EXPECT_EQ(allocations_of([&] { attend(*ctx, group); }), 0u);
      ctx->use_workspace(exact.bytes().first(bytes - 1));
      EXPECT_THROW(attend(*ctx, group), shape_error);
      ctx->use_workspace({});
    }
  }
}

TEST(allocation, planning_into_a_used_plan_makes_none) {
  const seed_trace trace;
  random_source random;
  serial_executor serial;
  context ctx(serial);
  const attention_shape prompt{200, 300, 4, 2, 100};
  const attention_shape token{1, 300, 4, 2, 299};
  for (int kind = 0; kind < pattern_kinds; ++kind) {
    SCOPED_TRACE(kind);
    attention_plan prefill;
    attention_plan decode;
    const pattern_case p = random_pattern(random, prompt, static_cast<pattern_kind>(kind), 2);
    const pattern_case d = random_pattern(random, token, static_cast<pattern_kind>(kind), 2);
    // Distances that are not sorted are copied once, and these are not.
    if ((p.name + d.name).find("vertical-slash") != std::string::npos) continue;
    const auto plan_both = [&] {
      plan_prefill_into(ctx, prefill, prompt, p.pattern);
      plan_decode_into(ctx, decode, token, d.pattern, {.split_keys = 16});
    };
    plan_both();
    EXPECT_EQ(allocations_of(plan_both), 0u) << p.name << "; " << d.name;
  }
}

TEST(allocation, planning_two_lists_of_each_row_makes_none) {
  serial_executor serial;
  context ctx(serial);
  const attention_shape prompt{200, 300, 4, 2, 100};
  token_lists first{1, {0}, {}};
  token_lists second{1, {0}, {}};
  for (token_t row = 0; row < 200; ++row) {
    for (token_t key = row % 7; key < 100; key += 5) first.tokens.push_back(key);
    for (token_t key = row % 3; key < 100; key += 4) second.tokens.push_back(key);
    first.indptr.push_back(std::ssize(first.tokens));
    second.indptr.push_back(std::ssize(second.tokens));
  }
  attention_plan plan;
  const auto pattern = first | second;
  const auto plan_it = [&] { plan_prefill_into(ctx, plan, prompt, pattern); };
  plan_it();
  EXPECT_EQ(allocations_of(plan_it), 0u);
}

TEST(allocation, planning_sorted_slashes_makes_none) {
  serial_executor serial;
  context ctx(serial);
  const attention_shape prompt{200, 300, 4, 2, 100};
  attention_plan plan;
  const vertical_slash pattern{{9, 3, 80}, {0, 1, 2, 50, 60, 200}};
  const auto plan_it = [&] { plan_prefill_into(ctx, plan, prompt, pattern); };
  plan_it();
  EXPECT_EQ(allocations_of(plan_it), 0u);
}

// A decode loop: one key more each step, the same plan and context.
TEST(allocation, a_decode_loop_reaches_a_steady_state) {
  const seed_trace trace;
  random_source random;
  serial_executor serial;
  context ctx(serial);
  const attention_problem p(random, {.q_len = 1, .kv_len = 400, .q_heads = 4, .kv_heads = 2});
  owned_tensor out(1, 4, 16);
  attention_plan plan;
  std::size_t late = 0;
  for (token_t length = 300; length < 400; ++length) {
    const attention_shape shape{1, length, 4, 2, length - 1};
    const std::size_t made = allocations_of([&] {
      plan_decode_into(ctx, plan, shape, sink{4} | sliding_window{128}, {.split_keys = 64});
      attend(ctx, plan, p.q.view(), {p.k.view().slice(0, length), p.v.view().slice(0, length)},
             out.view());
    });
    if (length > 310) late += made;
  }
  EXPECT_LE(late, 2u) << "a distance bitmap may grow once in a while, nothing else";
}

}  // namespace
