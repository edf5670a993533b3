// SPDX-License-Identifier: Apache-2.0
#include <sattn/attention/attend.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "support/patterns.hpp"
#include "support/problem.hpp"

namespace {

using namespace sattn;         // NOLINT(google-build-using-namespace)
using namespace test_support;  // NOLINT(google-build-using-namespace)

const problem_extents extents = {
    .q_len = 100, .kv_len = 150, .q_heads = 6, .kv_heads = 2, .head_dim = 20, .v_dim = 13};

TEST(determinism, the_bits_do_not_depend_on_the_number_of_threads_or_on_the_run) {
  const seed_trace trace;
  random_source random;
  const attention_problem p(random, extents);
  for (const kernel_table* table : kernel_tables()) {
    context serial(1, *table);
    for (const auto& [name, plan] : every_kind_of_plan(serial, p.shape)) {
      const attention_result want = run(serial, plan, p);
      for (const index_t threads : {1, 2, 3, 4, 7, 8, 16}) {
        context ctx(threads, *table);
        for (int repeat = 0; repeat < 3; ++repeat) {
          ASSERT_TRUE(bit_equal(run(ctx, plan, p), want)) << name << ", threads " << threads;
        }
      }
    }
  }
}

TEST(determinism, plans_do_not_depend_on_the_number_of_threads) {
  const seed_trace trace;
  random_source random;
  const attention_problem p(random, extents);
  context one(1);
  context many(5);
  const auto want = every_kind_of_plan(one, p.shape);
  const auto got = every_kind_of_plan(many, p.shape);
  for (std::size_t i = 0; i < want.size(); ++i) {
    for (index_t h = 0; h < want[i].second.heads(); ++h) {
      const plan_head& a = want[i].second.head(h);
      const plan_head& b = got[i].second.head(h);
      EXPECT_EQ(a.ranges, b.ranges) << want[i].first;
      EXPECT_EQ(a.tokens, b.tokens) << want[i].first;
      EXPECT_EQ(a.row_key_ptr, b.row_key_ptr) << want[i].first;
      EXPECT_EQ(a.row_keys, b.row_keys) << want[i].first;
      EXPECT_EQ(a.row_masks, b.row_masks) << want[i].first;
      EXPECT_EQ(a.splits, b.splits) << want[i].first;
    }
  }
}

TEST(determinism, the_bits_do_not_depend_on_where_the_tensors_lie) {
  const seed_trace trace;
  const std::uint64_t seed = test_seed();
  random_source source(seed);
  const attention_problem aligned(source, extents);
  for (const kernel_table* table : kernel_tables()) {
    context ctx(2, *table);
    for (const auto& [name, plan] : every_kind_of_plan(ctx, aligned.shape)) {
      const attention_result want = run(ctx, plan, aligned, memory_layout::nhd);
      for (index_t shift = 0; shift < 16; ++shift) {
        for (const memory_layout layout : {memory_layout::nhd, memory_layout::hnd_padded}) {
          problem_extents moved = extents;
          moved.layout = layout;
          moved.shift = shift;
          random_source same(seed);
          const attention_problem p(same, moved);
          ASSERT_TRUE(bit_equal(run(ctx, plan, p, layout, shift), want))
              << name << ", shift " << shift;
        }
      }
    }
  }
}

// ---- the caller's threads -----------------------------------------------------------------------

class reverse_executor {
 public:
  index_t concurrency() const { return 1; }
  template <class F>
  void parallel_for(index_t n, F&& f) {
    for (index_t task = n; task-- > 0;) f(task, index_t{0});
  }
};
static_assert(parallel_executor<reverse_executor>);

// Any order, any worker.
class shuffling_executor {
 public:
  index_t concurrency() const { return 5; }
  template <class F>
  void parallel_for(index_t n, F&& f) {
    std::vector<index_t> order(at(n));
    std::iota(order.begin(), order.end(), index_t{0});
    for (index_t i = n; i-- > 1;) std::swap(order[at(i)], order[at(random_.integer(0, i + 1))]);
    for (const index_t task : order) f(task, random_.integer(0, 5));
  }

 private:
  random_source random_;
};
static_assert(parallel_executor<shuffling_executor>);

TEST(determinism, the_order_of_tasks_and_the_choice_of_workers_do_not_matter) {
  const seed_trace trace;
  random_source random;
  const attention_problem p(random, extents);
  reverse_executor reverse;
  shuffling_executor shuffling;
  for (const kernel_table* table : kernel_tables()) {
    context serial(1, *table);
    context backward(reverse, *table);
    context shuffled(shuffling, *table);
    for (const auto& [name, plan] : every_kind_of_plan(shuffled, p.shape)) {
      const attention_result want = run(serial, plan, p);
      EXPECT_TRUE(bit_equal(run(backward, plan, p), want)) << name;
      for (int repeat = 0; repeat < 5; ++repeat) {
        EXPECT_TRUE(bit_equal(run(shuffled, plan, p), want)) << name;
      }
    }
  }
}

TEST(determinism, one_plan_serves_several_threads_at_once) {
  const seed_trace trace;
  random_source random;
  const attention_problem p(random, extents);
  context planning(1);
  for (const auto& [name, plan] : every_kind_of_plan(planning, p.shape)) {
    const attention_result want = run(planning, plan, p);
    std::vector<attention_result> got(3);
    std::vector<std::thread> callers;
    for (attention_result& result : got) {
      callers.emplace_back([&result, &shared = plan, &p] {
        context ctx(2);
        result = run(ctx, shared, p);
      });
    }
    for (std::thread& caller : callers) caller.join();
    for (const attention_result& result : got) EXPECT_TRUE(bit_equal(result, want)) << name;
  }
}

// ---- how a plan says it -------------------------------------------------------------------------

std::vector<index_t> full_indptr(index_t lists, index_t each) {
  std::vector<index_t> indptr;
  for (index_t i = 0; i <= lists; ++i) indptr.push_back(i * each);
  return indptr;
}

// Patterns that leave out no legal key.
std::vector<std::pair<std::string, any_pattern>> everything(const attention_shape& shape,
                                                            const domain& legal) {
  const auto kv_len = static_cast<token_t>(shape.kv_len);
  const auto all = [](token_t end) {
    std::vector<token_t> list(at(end));
    std::iota(list.begin(), list.end(), token_t{0});
    return list;
  };
  static const std::vector<std::uint8_t> ones(100000, 1);
  std::vector<std::pair<std::string, any_pattern>> patterns;
  patterns.emplace_back("sink", sink{kv_len});
  patterns.emplace_back("columns", vertical_slash{all(kv_len), {}});
  patterns.emplace_back("union", vertical_slash{{3}, {1}} | dense{});
  for (const token_t q_block : {1, 5, 16, 48, 128, 1000}) {
    for (const token_t k_block : {16, 1000}) {
      const auto blocks = at(ceil_div(shape.q_len, q_block) * ceil_div(kv_len, k_block));
      patterns.emplace_back("blocks of " + std::to_string(q_block),
                            block_mask{q_block, k_block, std::span(ones).first(blocks)});
    }
  }
  for (const token_t rows : {1, 16, 300}) {
    const index_t lists = ceil_div(shape.q_len, rows);
    std::vector<token_t> tokens;
    for (index_t i = 0; i < shape.q_heads * lists; ++i) {
      const std::vector<token_t> list = all(kv_len);
      tokens.insert(tokens.end(), list.rbegin(), list.rend());
    }
    patterns.emplace_back(
        "lists for " + std::to_string(rows) + " rows",
        token_lists{rows, full_indptr(shape.q_heads * lists, kv_len), tokens, shape.q_heads});
  }
  if (legal.causal && legal.prefix == 0) {
    const token_t reach = std::max(shape.position(shape.q_len - 1) + 1, 0);
    patterns.emplace_back("window", sliding_window{reach});
    patterns.emplace_back("distances", vertical_slash{{}, all(reach)});
    if (legal.window > 0) patterns.emplace_back("same window", sliding_window{legal.window});
  }
  return patterns;
}

TEST(determinism, patterns_that_select_everything_give_the_bits_of_dense) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  context& ctx = contexts.any();
  for (const std::optional<token_t> q_offset : {std::optional<token_t>{}, {0}, {-9}, {200}}) {
    problem_extents e = extents;
    e.kv_len = 400;
    e.q_offset = q_offset;
    const attention_problem p(random, e);
    for (const domain& legal :
         {domain{}, domain::full(), domain{.window = 40}, domain{.window = 250},
          domain{.window = 7, .prefix = 30}, domain{.prefix = 60}}) {
      for (const token_t tile_rows : {0, 64}) {
        const plan_options options{.legal = legal, .tile_rows = tile_rows};
        const attention_result want = run(ctx, plan_prefill(ctx, p.shape, dense{}, options), p);
        for (const auto& [name, pattern] : everything(p.shape, legal)) {
          EXPECT_TRUE(bit_equal(run(ctx, plan_prefill(ctx, p.shape, pattern, options), p), want))
              << name << ", tile_rows " << tile_rows << ", window " << legal.window << ", prefix "
              << legal.prefix << ", q_offset " << p.shape.q_offset;
        }
      }
      const decode_options options{.legal = legal, .split_keys = 37};
      const attention_result want = run(ctx, plan_decode(ctx, p.shape, dense{}, options), p);
      for (const auto& [name, pattern] : everything(p.shape, legal)) {
        EXPECT_TRUE(bit_equal(run(ctx, plan_decode(ctx, p.shape, pattern, options), p), want))
            << name << ", window " << legal.window << ", prefix " << legal.prefix << ", q_offset "
            << p.shape.q_offset;
      }
    }
  }
}

TEST(determinism, one_set_of_keys_gives_the_same_bits_however_it_is_encoded) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  const attention_problem p(random, {.q_len = 64, .kv_len = 300, .q_heads = 2, .kv_heads = 1});
  std::vector<token_t> keys;
  std::vector<std::uint8_t> mask(300);
  for (token_t key = 0; key < 300; ++key) {
    if (random.integer(0, 2) == 0) continue;
    keys.push_back(key);
    mask[at(key)] = 1;
  }
  const plan_options options{.tile_rows = 64};
  for (context& ctx : contexts) {
    const attention_plan columns = plan_prefill(ctx, p.shape, vertical_slash{keys, {}}, options);
    const attention_result want = run(ctx, columns, p);
    EXPECT_TRUE(within_bound(want.out, want.lse, expected(p, mask_of(columns))));
    EXPECT_TRUE(bit_equal(
        run(ctx, plan_prefill(ctx, p.shape, token_lists{64, {0, std::ssize(keys)}, keys}, options),
            p),
        want));
    EXPECT_TRUE(
        bit_equal(run(ctx, plan_prefill(ctx, p.shape, block_mask{64, 1, mask}, options), p), want));
    std::vector<token_t> half(keys.begin(), keys.begin() + std::ssize(keys) / 2);
    std::vector<token_t> rest(keys.begin() + std::ssize(keys) / 3, keys.end());
    EXPECT_TRUE(bit_equal(
        run(ctx,
            plan_prefill(ctx, p.shape,
                         vertical_slash{half, {}} | token_lists{64, {0, std::ssize(rest)}, rest},
                         options),
            p),
        want));
  }
}

}  // namespace
