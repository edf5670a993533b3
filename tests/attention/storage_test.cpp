// SPDX-License-Identifier: Apache-2.0
//
// How K and V are stored, and whether they are copied first, changes no bit of the result: widening
// is exact, and every copy is read in the same order.

#include <sattn/attention/attend.hpp>

#include <gtest/gtest.h>

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

}  // namespace
