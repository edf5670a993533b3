// SPDX-License-Identifier: Apache-2.0
//
// How K and V are stored, and whether they are copied first, changes no bit of the result: widening
// is exact, and every copy is read in the same order.

#include <sattn/attention/attend.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <span>
#include <vector>

#include "support/patterns.hpp"
#include "support/problem.hpp"

namespace {

using namespace sattn;         // NOLINT(google-build-using-namespace)
using namespace test_support;  // NOLINT(google-build-using-namespace)

// The elements of a tensor rounded to T, between guards that are NaN, and the tensor holding what
// they are as f32.
template <class T>
struct stored_copy {
  std::vector<T> memory;
  tensor_view<const T> view;

  stored_copy(owned_tensor& from, T (*round)(float), index_t gap) {
    const tensor_view<float> x = from.view();
    const index_t row = x.dim + gap;
    memory.assign(at(x.tokens * x.heads * row + gap), round(quiet_nan));
    view = {memory.data() + gap, x.tokens, x.heads, x.dim, x.heads * row, row};
    for (index_t t = 0; t < x.tokens; ++t) {
      for (index_t h = 0; h < x.heads; ++h) {
        for (index_t i = 0; i < x.dim; ++i) {
          const T rounded = round(from.row(t, h)[i]);
          const_cast<T*>(view.row(t, h))[i] = rounded;
          from.row(t, h)[i] = to_float(rounded);
        }
      }
    }
  }
};

attention_result run_with(context& ctx, const attention_plan& plan, const attention_problem& p,
                          const kv_view& kv, std::size_t pack_bytes) {
  attention_result r;
  r.out.assign(at(p.shape.q_len * p.shape.q_heads * p.v_dim), quiet_nan);
  r.lse.assign(at(p.shape.q_len * p.shape.q_heads), quiet_nan);
  attention_options options = p.options();
  options.pack_bytes = pack_bytes;
  attend(ctx, plan, p.q.view(), kv,
         {nhd(r.out.data(), p.shape.q_len, p.shape.q_heads, p.v_dim),
          nhd(r.lse.data(), p.shape.q_len, p.shape.q_heads, 1)},
         options);
  return r;
}

constexpr std::size_t no_limit = std::size_t{1} << 40;

// All pairs of types, at limits that pack nothing, one kv head at a time, or everything.
void expect_same_bits(const attention_problem& original, const attention_plan& plan) {
  all_contexts contexts;
  attention_problem p = original;
  const stored_copy<f16> k16(p.k, to_f16, 3);
  const stored_copy<f16> v16(p.v, to_f16, 1);
  attention_problem b = original;
  const stored_copy<bf16> kb(b.k, to_bf16, 0);
  const stored_copy<bf16> vb(b.v, to_bf16, 5);
  for (context& ctx : contexts) {
    SCOPED_TRACE(name_of(ctx));
    const attention_result plain = run_with(ctx, plan, p, p.kv(), 0);
    const attention_result brain = run_with(ctx, plan, b, b.kv(), 0);
    for (const std::size_t limit : {std::size_t{0}, std::size_t{150'000}, no_limit}) {
      SCOPED_TRACE(limit);
      EXPECT_TRUE(bit_equal(plain, run_with(ctx, plan, p, p.kv(), limit)));
      EXPECT_TRUE(bit_equal(plain, run_with(ctx, plan, p, kv(k16.view, v16.view), limit)));
      EXPECT_TRUE(bit_equal(plain, run_with(ctx, plan, p, kv(p.k.view(), v16.view), limit)));
      EXPECT_TRUE(bit_equal(plain, run_with(ctx, plan, p, kv(k16.view, p.v.view()), limit)));
      EXPECT_TRUE(bit_equal(brain, run_with(ctx, plan, b, kv(kb.view, vb.view), limit)));
    }
  }
}

TEST(storage, type_and_copies_change_no_bit) {
  random_source random(71);
  for (const problem_extents& e : {
           problem_extents{260, 260, 4, 2, 16, 16},
           problem_extents{300, 391, 3, 3, 20, 13},   // dims that no register width divides
           problem_extents{129, 257, 8, 2, 7, 40},
           problem_extents{5, 200, 2, 1, 33, 9},      // too few rows to copy for
           problem_extents{260, 130, 2, 2, 5, 1},     // values narrower than a panel
           problem_extents{260, 130, 2, 2, 1, 5},
       }) {
    for (const memory_layout layout : {memory_layout::nhd, memory_layout::hnd_padded}) {
      problem_extents extents = e;
      extents.layout = layout;
      const attention_problem p(random, extents);
      SCOPED_TRACE(::testing::PrintToString(extents));
      context planner(1);
      for (const auto& [name, plan] : every_kind_of_plan(planner, p.shape)) {
        SCOPED_TRACE(name);
        expect_same_bits(p, plan);
      }
    }
  }
}

// Sequences that are copied and sequences that are not, with and without heads, in waves of any
// size.
TEST(storage, waves_over_a_batch_change_no_bit) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  std::vector<attention_problem> problems;
  std::vector<attention_plan> plans;
  const auto add = [&](const problem_extents& e, auto&& plan_it) {
    problems.emplace_back(random, e);
    plans.push_back(plan_it(contexts.any(), problems.back().shape));
  };
  const auto prefill = [](context& ctx, const attention_shape& shape) {
    return plan_prefill(ctx, shape, dense{});
  };
  const auto decode = [](context& ctx, const attention_shape& shape) {
    return plan_decode(ctx, shape, dense{}, {.split_keys = 20});
  };
  add({260, 260, 4, 2, 8, 8}, prefill);
  add({1, 90, 4, 2, 8, 8}, decode);
  add({260, 150, 3, 3, 8, 12}, prefill);
  add({7, 50, 2, 1, 8, 8}, prefill);
  add({300, 300, 2, 2, 12, 4}, prefill);

  // One kv head of the first takes this much, in whatever way it is copied.
  const auto head_bytes = static_cast<std::size_t>(3 * 128 * (8 + 12) * 4);
  for (context& ctx : contexts) {
    SCOPED_TRACE(name_of(ctx));
    std::vector<attention_result> want;
    for (std::size_t i = 0; i < problems.size(); ++i) {
      want.push_back(run_with(ctx, plans[i], problems[i], problems[i].kv(), 0));
    }
    for (const std::size_t limit : {std::size_t{1}, head_bytes / 2, head_bytes, head_bytes + 1,
                                    head_bytes * 3 / 2, head_bytes * 2, head_bytes * 5, no_limit}) {
      SCOPED_TRACE(limit);
      std::vector<attention_result> got = want;
      std::vector<attention_sequence> batch;
      for (std::size_t i = 0; i < problems.size(); ++i) {
        const attention_shape& shape = problems[i].shape;
        std::fill(got[i].out.begin(), got[i].out.end(), quiet_nan);
        std::fill(got[i].lse.begin(), got[i].lse.end(), quiet_nan);
        batch.push_back({&plans[i], problems[i].q.view(), problems[i].kv(),
                         {nhd(got[i].out.data(), shape.q_len, shape.q_heads, problems[i].v_dim),
                          nhd(got[i].lse.data(), shape.q_len, shape.q_heads, 1)}});
      }
      attention_options options;
      options.pack_bytes = limit;
      aligned_buffer exact;
      exact.reserve(workspace_bytes(ctx, batch, options));
      ctx.use_workspace(exact.bytes().first(workspace_bytes(ctx, batch, options)));
      attend(ctx, batch, options);
      ctx.use_workspace({});
      for (std::size_t i = 0; i < problems.size(); ++i) {
        EXPECT_TRUE(bit_equal(got[i], want[i])) << "sequence " << i;
      }
    }
  }
}

// Nothing is copied for the sake of a few keys, and nothing of a cache without keys is touched.
TEST(storage, copies_are_made_only_where_they_pay) {
  context ctx(1);
  const auto packed = [&](const attention_shape& shape, const auto& pattern, dtype type) {
    const attention_plan plan = plan_prefill(ctx, shape, pattern);
    std::vector<float> memory(at(shape.kv_len * 16 + shape.q_len * 64));
    const auto view = nhd(memory.data(), shape.kv_len, 1, 8);
    kv_view keys = kv(view, view);
    keys.k.type = keys.v.type = type;
    const auto out = nhd(memory.data(), shape.q_len, shape.q_heads, 8);
    attention_options options;
    const std::size_t with = workspace_bytes(ctx, plan, out, keys, {out}, options);
    options.pack_bytes = 0;
    return with > workspace_bytes(ctx, plan, out, keys, {out}, options);
  };
  EXPECT_TRUE(packed({256, 5000, 1, 1, 4744}, dense{}, dtype::f32));
  EXPECT_FALSE(packed({255, 5000, 1, 1, 4745}, dense{}, dtype::f32));
  EXPECT_FALSE(packed({256, 5000, 1, 1, 4744}, sliding_window{200}, dtype::f16));
  EXPECT_TRUE(packed({1000, 1000, 1, 1, 0}, sliding_window{300}, dtype::f32));
  EXPECT_FALSE(packed({1000, 0, 1, 1, 0}, dense{}, dtype::f16));
  // Through views of no memory too.
  std::vector<float> q(40, 1.0f), out(40, 7.0f);
  const attention_plan plan = plan_prefill(ctx, {5, 0, 2, 2, 0}, dense{});
  attend(ctx, plan, nhd(q.data(), 5, 2, 4), kv(nhd<float>(nullptr, 0, 2, 4),
                                               nhd<float>(nullptr, 0, 2, 4)),
         {nhd(out.data(), 5, 2, 4)});
  EXPECT_TRUE(std::all_of(out.begin(), out.end(), [](float x) { return x == 0.0f; }));
}

}  // namespace
