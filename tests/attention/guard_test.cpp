// SPDX-License-Identifier: Apache-2.0
//
// Every tensor ends, or begins, at a page without access.

#include "support/guard_buffer.hpp"

#include <gtest/gtest.h>
#include <sattn/attention/attend.hpp>

#include <algorithm>
#include <cstddef>
#include <vector>

#include "support/patterns.hpp"
#include "support/problem.hpp"
#include "support/stored.hpp"

namespace {

using namespace sattn;         // NOLINT(google-build-using-namespace)
using namespace test_support;  // NOLINT(google-build-using-namespace)

// The tensors of a problem, each alone on its pages; the inputs cannot be written.
struct guarded {
  const attention_problem& p;
  bool token_outer;
  guard_buffer<float> q, k, v, out, lse, mass;

  guarded(const attention_problem& problem, guard side, bool nhd_layout)
      : p(problem),
        token_outer(nhd_layout),
        q(size(p.q.view()), side),
        k(size(p.k.view()), side),
        v(size(p.v.view()), side),
        out(p.shape.q_len * p.shape.q_heads * p.v_dim, side),
        lse(p.shape.q_len * p.shape.q_heads, side),
        mass(p.shape.kv_len * p.shape.kv_heads, side) {
    copy(p.q.view(), q);
    copy(p.k.view(), k);
    copy(p.v.view(), v);
  }

  static index_t size(const tensor_view<const float>& x) { return x.tokens * x.heads * x.dim; }

  template <class T>
  tensor_view<T> view(T* data, index_t tokens, index_t heads, index_t dim) const {
    return token_outer ? nhd(data, tokens, heads, dim) : hnd(data, tokens, heads, dim);
  }
  void copy(const tensor_view<const float>& from, guard_buffer<float>& to) {
    const tensor_view<float> x = view(to.data(), from.tokens, from.heads, from.dim);
    for (index_t t = 0; t < x.tokens; ++t) {
      for (index_t h = 0; h < x.heads; ++h) std::copy_n(from.row(t, h), x.dim, x.row(t, h));
    }
    to.read_only();
  }

  // `extra` tokens more than there are.
  void run(context& ctx, const attention_plan& plan, index_t extra = 0) {
    const attention_shape& s = p.shape;
    const auto input = [&](const guard_buffer<float>& x, index_t tokens, index_t heads) {
      const index_t rows = (tokens - extra) * heads;
      return view<const float>(x.data(), tokens, heads, x.size() / rows);
    };
    attend(ctx, plan, view<const float>(q.data(), s.q_len, s.q_heads, p.q.view().dim),
           {input(k, s.kv_len + extra, s.kv_heads), input(v, s.kv_len + extra, s.kv_heads)},
           {view(out.data(), s.q_len, s.q_heads, p.v_dim), view(lse.data(), s.q_len, s.q_heads, 1),
            view(mass.data(), s.kv_len + extra, s.kv_heads, 1)},
           p.options());
  }
};

std::vector<attention_plan> some_plans(context& ctx, const attention_shape& shape) {
  const auto last = static_cast<token_t>(shape.kv_len - 1);
  token_lists lists{1, {0}, {}};
  for (index_t row = 0; row < shape.q_len; ++row) {
    for (const token_t key : {token_t{0}, static_cast<token_t>(row), last}) {
      lists.tokens.push_back(std::min(key, last));
    }
    lists.indptr.push_back(std::ssize(lists.tokens));
  }
  const plan_options full{.legal = domain::full()};
  return {plan_prefill(ctx, shape, dense{}, full),
          plan_prefill(ctx, shape, vertical_slash{{0, last}, {0, 3}}, full),
          plan_prefill(ctx, shape, lists, full),
          plan_decode(ctx, shape, dense{}, {.legal = domain::full(), .split_keys = 4})};
}

void run_all(all_contexts& contexts, const attention_problem& p) {
  const std::vector<attention_plan> plans = some_plans(contexts.any(), p.shape);
  for (const guard side : {guard::before, guard::after}) {
    for (const bool nhd_layout : {true, false}) {
      guarded tensors(p, side, nhd_layout);
      for (context& ctx : contexts) {
        for (const attention_plan& plan : plans) tensors.run(ctx, plan);
      }
    }
  }
}

TEST(guard_pages, no_head_dim_reads_or_writes_outside_its_rows) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  std::vector<index_t> dims = {192, 256, 512, 576};
  for (index_t d = 1; d <= 130; ++d) dims.push_back(d);
  for (const index_t d : dims) {
    SCOPED_TRACE(d);
    run_all(contexts, attention_problem(random, {.q_len = 3,
                                                 .kv_len = 9,
                                                 .q_heads = 2,
                                                 .kv_heads = 1,
                                                 .head_dim = d,
                                                 .v_dim = d > 130 ? d : 131 - d}));
  }
}

// Rows of every type, and their scales.
TEST(guard_pages, no_type_is_read_outside_its_rows) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (const dtype type : all_types) {
    for (const index_t dim : {1, 7, 31, 32, 33, 64, 72, 96}) {
      if (dim % block_of(type) != 0) continue;
      for (const index_t q_len : {1, 3, 40}) {
        SCOPED_TRACE(::testing::Message() << name_of(type) << ", dim " << dim << ", " << q_len);
        attention_problem p(random, {.q_len = q_len,
                                     .kv_len = 41,
                                     .q_heads = 6,
                                     .kv_heads = 2,
                                     .head_dim = dim,
                                     .v_dim = dim});
        const encoded_rows rows(p.k, type);
        for (const guard side : {guard::before, guard::after}) {
          guard_buffer<std::byte> bytes(std::ssize(rows.bytes), side);
          guard_buffer<float> scales(std::ssize(rows.scales), side);
          std::copy(rows.bytes.begin(), rows.bytes.end(), bytes.data());
          std::copy(rows.scales.begin(), rows.scales.end(), scales.data());
          stored_view view;
          view.data = bytes.data();
          view.type = type;
          view.tokens = 41;
          view.heads = 2;
          view.dim = dim;
          view.token_stride = 2 * rows.row_bytes();
          view.head_stride = rows.row_bytes();
          if (has_row_scale(type)) view.scales = {scales.data(), 2, 1, 0};
          owned_tensor out(q_len, 6, dim), lse(q_len, 6, 1), mass(41, 6, 1);
          for (context& ctx : contexts) {
            for (const attention_plan& plan : some_plans(ctx, p.shape)) {
              for (const std::size_t pack : {std::size_t{0}, std::size_t{1} << 30}) {
                attend(ctx, plan, p.q.view(), kv(view, view),
                       {out.view(), lse.view(), mass.view()}, {.pack_bytes = pack});
              }
            }
          }
        }
      }
    }
  }
}

// Enough rows for K and V to be copied first.
TEST(guard_pages, packing_reads_and_writes_nothing_outside) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (const index_t kv_heads : {1, 2}) {
    for (const index_t v_dim : {1, 2, 5, 6, 7, 8, 9, 11, 15, 16, 17, 20}) {
      SCOPED_TRACE(v_dim);
      run_all(contexts, attention_problem(random, {.q_len = 130,
                                                   .kv_len = 137,
                                                   .q_heads = 2 * kv_heads,
                                                   .kv_heads = kv_heads,
                                                   .head_dim = 21 - v_dim,
                                                   .v_dim = v_dim}));
    }
  }
}

TEST(guard_pages, no_number_of_rows_and_keys_reads_or_writes_outside) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (const index_t q_len : {1, 2, 7, 15, 16, 17, 33}) {
    for (const index_t kv_len : {1, 2, 3, 5, 6, 7, 11, 12, 13, 127, 128, 129, 257}) {
      SCOPED_TRACE(::testing::Message() << q_len << " rows, " << kv_len << " keys");
      attention_problem p(random, {.q_len = q_len,
                                   .kv_len = kv_len,
                                   .q_heads = 3,
                                   .kv_heads = 1,
                                   .head_dim = 5,
                                   .v_dim = 7});
      if (q_len % 2 == 0) p.soft_cap = 2;
      run_all(contexts, p);
    }
  }
}

TEST(guard_pages, results_are_those_of_ordinary_memory) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  const attention_problem p(
      random,
      {.q_len = 20, .kv_len = 30, .q_heads = 4, .kv_heads = 2, .head_dim = 19, .v_dim = 21});
  guarded tensors(p, guard::after, true);
  for (context& ctx : contexts) {
    for (const attention_plan& plan : some_plans(ctx, p.shape)) {
      tensors.run(ctx, plan);
      const attention_result want = run(ctx, plan, p);
      EXPECT_TRUE(test_support::bit_equal(tensors.out, want.out));
      EXPECT_TRUE(test_support::bit_equal(tensors.lse, want.lse));
    }
  }
}

// Control: a key too many is a fault, with every set of kernels.
TEST(guard_pages, catch_one_key_too_many) {
  const seed_trace trace;
  random_source random;
  serial_executor serial;
  attention_problem p(
      random, {.q_len = 3, .kv_len = 16, .q_heads = 2, .kv_heads = 1, .head_dim = 64, .v_dim = 64});
  attention_shape longer = p.shape;
  longer.kv_len += 1;
  guarded tensors(p, guard::after, true);
  for (const kernel_table* table : kernel_tables()) {
    context ctx(serial, *table);
    for (const attention_plan& plan : some_plans(ctx, longer)) {
      ctx.reserve(1 << 20);  // a fault runs no destructors
      EXPECT_EQ(faults([&] { tensors.run(ctx, plan, 1); }), 1);
    }
  }
}

}  // namespace
