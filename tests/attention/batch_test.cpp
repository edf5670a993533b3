// SPDX-License-Identifier: Apache-2.0
#include <sattn/attention/attend.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <iterator>
#include <set>
#include <span>
#include <utility>
#include <vector>

#include "support/patterns.hpp"
#include "support/problem.hpp"

namespace {

using namespace sattn;         // NOLINT(google-build-using-namespace)
using namespace test_support;  // NOLINT(google-build-using-namespace)

struct member {
  attention_problem problem;
  attention_plan plan;
};

attention_plan random_plan(random_source& random, context& ctx, const attention_shape& shape) {
  const auto kind = static_cast<pattern_kind>(random.integer(0, pattern_kinds));
  const pattern_case pattern = random_pattern(random, shape, kind);
  if (random.integer(0, 2) == 0) {
    return plan_decode(ctx, shape, pattern.pattern,
                       {.legal = random_domain(random, shape),
                        .split_keys = random.pick<token_t>({1, 20, 128, 4096})});
  }
  return plan_prefill(
      ctx, shape, pattern.pattern,
      {.legal = random_domain(random, shape), .tile_rows = random.pick<token_t>({0, 4, 16, 64})});
}

// Sequences that differ in everything; some are empty in one way or another.
std::vector<member> random_batch(random_source& random, context& ctx, index_t q_heads = 0) {
  std::vector<member> batch;
  for (index_t n = random.integer(1, 9); n > 0; --n) {
    problem_extents e = random_extents(random);
    e.q_len = 1 + e.q_len / 3;
    e.kv_len = 1 + e.kv_len / 3;
    if (q_heads > 0) e.kv_heads = e.q_heads = q_heads;
    const index_t empty = random.integer(0, 8);
    if (empty == 0) e.q_len = 0;
    if (empty == 1) e.kv_len = 0;
    if (empty == 2 && q_heads == 0) e.q_heads = e.kv_heads = 0;
    attention_problem p(random, e);
    attention_plan plan = p.shape.q_heads == 0 || e.q_len == 0 || e.kv_len == 0
                              ? plan_decode(ctx, p.shape, dense{})
                              : random_plan(random, ctx, p.shape);
    batch.push_back({std::move(p), std::move(plan)});
  }
  return batch;
}

std::vector<attention_result> run_batch(context& ctx, const std::vector<member>& batch,
                                        const attention_options& options = {}) {
  std::vector<owned_tensor> outs;
  std::vector<owned_tensor> lses;
  std::vector<owned_tensor> masses;
  for (const member& m : batch) {
    const attention_shape& s = m.problem.shape;
    outs.emplace_back(s.q_len, s.q_heads, m.problem.v_dim, memory_layout::hnd_padded);
    lses.emplace_back(s.q_len, s.q_heads, 1, memory_layout::nhd_padded);
    masses.emplace_back(s.kv_len, s.q_heads, 1, memory_layout::hnd_padded);
  }
  std::vector<attention_sequence> sequences;
  for (std::size_t i = 0; i < batch.size(); ++i) {
    sequences.push_back({&batch[i].plan,
                         batch[i].problem.q.view(),
                         batch[i].problem.kv(),
                         {outs[i].view(), lses[i].view(), masses[i].view()}});
  }
  attend(ctx, sequences, options);
  std::vector<attention_result> results;
  for (std::size_t i = 0; i < batch.size(); ++i) {
    EXPECT_TRUE(outs[i].padding_is_untouched());
    EXPECT_TRUE(lses[i].padding_is_untouched());
    EXPECT_TRUE(masses[i].padding_is_untouched());
    results.push_back({outs[i].packed(), lses[i].packed(), masses[i].packed()});
  }
  return results;
}

TEST(batch, of_ragged_sequences_has_the_bits_of_separate_calls_in_any_order) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (int round = 0; round < 40; ++round) {
    SCOPED_TRACE(round);
    std::vector<member> batch = random_batch(random, contexts.any());
    for (context& ctx : contexts) {
      const std::vector<attention_result> together = run_batch(ctx, batch);
      for (std::size_t i = 0; i < batch.size(); ++i) {
        ASSERT_TRUE(bit_equal(together[i], run(ctx, batch[i].plan, batch[i].problem)))
            << name_of(ctx) << ", sequence " << i;
      }
    }
    const std::vector<attention_result> forward = run_batch(contexts.any(), batch);
    std::reverse(batch.begin(), batch.end());
    std::vector<attention_result> backward = run_batch(contexts.any(), batch);
    std::reverse(backward.begin(), backward.end());
    for (std::size_t i = 0; i < batch.size(); ++i) {
      ASSERT_TRUE(bit_equal(forward[i], backward[i])) << i;
    }
  }
}

TEST(batch, shares_its_options) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  const std::vector<float> sinks = {0.5f, -infinity, 2.0f};
  const attention_options options{.scale = 0.1f, .soft_cap = 4.0f, .sink_logits = sinks};
  for (int round = 0; round < 10; ++round) {
    std::vector<member> batch = random_batch(random, contexts.any(), 3);
    const std::vector<attention_result> together = run_batch(contexts.any(), batch, options);
    for (std::size_t i = 0; i < batch.size(); ++i) {
      attention_problem& p = batch[i].problem;
      p.scale = options.scale;
      p.soft_cap = options.soft_cap;
      p.sink_logits = sinks;
      ASSERT_TRUE(bit_equal(together[i], run(contexts.any(), batch[i].plan, p))) << i;
    }
  }
}

TEST(batch, of_nothing_is_nothing) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (context& ctx : contexts) {
    attend(ctx, std::span<const attention_sequence>());
    for (const problem_extents& e :
         {problem_extents{.q_len = 0, .kv_len = 0}, problem_extents{.q_len = 0, .kv_len = 5},
          problem_extents{.q_len = 5, .kv_len = 5, .q_heads = 0, .kv_heads = 0}}) {
      const attention_problem p(random, e);
      EXPECT_TRUE(run(ctx, plan_prefill(ctx, p.shape, dense{}), p).out.empty());
      EXPECT_TRUE(run(ctx, plan_decode(ctx, p.shape, dense{}), p).out.empty());
      const auto lists = any_pattern(token_lists{1, std::vector<index_t>(at(e.q_len + 1)), {}});
      EXPECT_TRUE(run(ctx, plan_prefill(ctx, p.shape, lists), p).out.empty());
    }
    // Rows without any key to look at still have results.
    const attention_problem p(random, {.q_len = 5, .kv_len = 0, .q_heads = 2, .kv_heads = 2});
    for (const attention_plan& plan :
         {plan_prefill(ctx, p.shape, dense{}), plan_decode(ctx, p.shape, dense{})}) {
      const attention_result got = run(ctx, plan, p);
      EXPECT_TRUE(test_support::bit_equal(got.out, std::vector<float>(at(5 * 2 * 16), 0.0f)));
      EXPECT_TRUE(test_support::bit_equal(got.lse, std::vector<float>(at(5 * 2), -infinity)));
    }
  }
}

TEST(batch, empty_tensors_may_have_no_memory) {
  context ctx(1);
  const attention_shape shape{0, 0, 2, 1, 0};
  const attention_plan plan = plan_prefill(ctx, shape, dense{});
  attend(ctx, plan, nhd<const float>(nullptr, 0, 2, 8),
         {nhd<const float>(nullptr, 0, 1, 8), nhd<const float>(nullptr, 0, 1, 8)},
         nhd<float>(nullptr, 0, 2, 8));
}

// ---- the order of tasks -------------------------------------------------------------------------

// Runs one task of a call alone, or none.
class single_task_executor {
 public:
  index_t concurrency() const { return 1; }
  template <class F>
  void parallel_for(index_t n, F&& f) {
    ++calls;
    tasks = n;
    if (only >= 0) f(only, index_t{0});
  }
  index_t only = -1;
  index_t calls = 0;
  index_t tasks = 0;
};
static_assert(parallel_executor<single_task_executor>);

// What is long must not begin when the others end: told by the rows that each task writes.
TEST(batch, the_longest_sequences_come_first_and_their_last_rows) {
  const seed_trace trace;
  random_source random;
  single_task_executor executor;
  context planning(1), ctx(executor, *kernel_tables().back());
  for (const token_t tile_rows : {4, 64}) {  // the row kernel and the tile kernel
    std::vector<member> batch;
    for (const index_t length : {200, 10, 700, 200, 2000, 64, 1100}) {
      attention_problem p(random, {.q_len = std::min<index_t>(length, 130), .kv_len = length});
      attention_plan plan = plan_prefill(planning, p.shape, dense{}, {.tile_rows = tile_rows});
      batch.push_back({std::move(p), std::move(plan)});
    }
    executor.tasks = 0;
    index_t before_sequence = -1, before_row = 0;
    std::set<index_t> seen;
    for (index_t task = -1; task < executor.tasks; ++task) {
      executor.calls = 0;
      executor.only = task;
      std::vector<std::vector<float>> outs;
      std::vector<attention_sequence> sequences;
      for (const member& m : batch) {
        const attention_problem& p = m.problem;
        outs.emplace_back(at(p.shape.q_len * 16), quiet_nan);
        sequences.push_back({&m.plan, p.q.view(), p.kv(),
                             {nhd(outs.back().data(), p.shape.q_len, 1, 16)}});
      }
      attend(ctx, sequences, {.pack_bytes = 0});
      ASSERT_EQ(executor.calls, 1) << "nothing is copied, nothing to be merged";
      index_t sequence = -1, last_row = -1;
      for (index_t i = 0; i < std::ssize(outs); ++i) {
        for (index_t row = 0; row < batch[at(i)].problem.shape.q_len; ++row) {
          if (std::isnan(outs[at(i)][at(row * 16)])) continue;
          ASSERT_TRUE(sequence == -1 || sequence == i) << "task " << task << " writes to two";
          sequence = i;
          last_row = row;
        }
      }
      ASSERT_EQ(sequence >= 0, task >= 0);
      if (task > 0) {
        const index_t length = batch[at(sequence)].problem.shape.kv_len;
        const index_t before = batch[at(before_sequence)].problem.shape.kv_len;
        ASSERT_TRUE(before > length || (before == length && before_sequence <= sequence))
            << "task " << task << " is of sequence " << sequence << ", after " << before_sequence;
        if (before_sequence == sequence) {
          ASSERT_LT(last_row, before_row) << "task " << task;
        }
      }
      before_sequence = sequence;
      before_row = last_row;
      seen.insert(sequence);
    }
    EXPECT_EQ(seen.size(), batch.size() + 1);
  }
}

// ---- one long prompt in pieces ------------------------------------------------------------------

// Rows [begin, end) of the problem as a call of their own that sees the keys so far.
attention_result run_piece(context& ctx, const attention_problem& p, const any_pattern& pattern,
                           const plan_options& options, index_t begin, index_t end) {
  const index_t position = p.shape.q_offset + end;
  const index_t keys = options.legal.causal && options.legal.prefix == 0
                           ? std::clamp<index_t>(position, 0, p.shape.kv_len)
                           : p.shape.kv_len;
  const attention_shape shape{end - begin, keys, p.shape.q_heads, p.shape.kv_heads,
                              static_cast<token_t>(p.shape.q_offset + begin)};
  owned_tensor out(end - begin, p.shape.q_heads, p.v_dim);
  owned_tensor lse(end - begin, p.shape.q_heads, 1);
  owned_tensor mass(keys, p.shape.q_heads, 1);
  attend(ctx, plan_prefill(ctx, shape, pattern, options), p.q.view().slice(begin, end),
         {p.k.view().slice(0, keys), p.v.view().slice(0, keys)},
         {out.view(), lse.view(), mass.view()});
  return {out.packed(), lse.packed(), mass.packed()};
}

attention_result run_pieces(context& ctx, const attention_problem& p, const any_pattern& pattern,
                            const plan_options& options, const std::vector<index_t>& cuts) {
  attention_result all;
  all.mass.resize(at(p.shape.kv_len * p.shape.q_heads));
  for (std::size_t i = 0; i + 1 < cuts.size(); ++i) {
    const attention_result piece = run_piece(ctx, p, pattern, options, cuts[i], cuts[i + 1]);
    all.out.insert(all.out.end(), piece.out.begin(), piece.out.end());
    all.lse.insert(all.lse.end(), piece.lse.begin(), piece.lse.end());
    for (std::size_t k = 0; k < piece.mass.size(); ++k) all.mass[k] += piece.mass[k];
  }
  return all;
}

TEST(chunked_prefill, has_the_bits_of_one_call_when_tiles_agree_and_is_within_bound_otherwise) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  const attention_problem p(
      random,
      {.q_len = 160, .kv_len = 190, .q_heads = 4, .kv_heads = 2, .head_dim = 8, .v_dim = 8});
  const std::vector<any_pattern> patterns = {dense{}, sliding_window{50},
                                             sink{4} | sliding_window{21},
                                             vertical_slash{{0, 1, 29}, {0, 1, 7, 40, 41, 100}}};
  for (const any_pattern& pattern : patterns) {
    for (const domain& legal : {domain{}, domain{.window = 33}, domain{.prefix = 50}}) {
      const plan_options options{.legal = legal, .tile_rows = 16};
      const attention_plan plan = plan_prefill(contexts.any(), p.shape, pattern, options);
      const reference::result want = expected(p, mask_of(plan));
      for (context& ctx : contexts) {
        const attention_result whole = run(ctx, plan, p);
        const attention_result even = run_pieces(ctx, p, pattern, options, {0, 16, 80, 160});
        EXPECT_TRUE(test_support::bit_equal(even.out, whole.out));
        EXPECT_TRUE(test_support::bit_equal(even.lse, whole.lse));
        const attention_result uneven =
            run_pieces(ctx, p, pattern, options, {0, 1, 18, 18, 85, 159, 160});
        EXPECT_TRUE(within_bound(uneven.out, uneven.lse, want));
        EXPECT_TRUE(elements_within_bound("mass", uneven.mass, want.mass, want.mass_bound));
      }
    }
  }
}

}  // namespace
