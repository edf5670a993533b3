// SPDX-License-Identifier: Apache-2.0
//
// Scales of all bits, one for each token and head: what rows of int8 and q8_0 stand for, and how
// far that moves attention.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <sattn/attention/attend.hpp>
#include <sattn/attention/plan.hpp>
#include <sattn/kv/paged_cache.hpp>
#include <string>
#include <utility>
#include <vector>

#include "support/moved.hpp"
#include "support/patterns.hpp"
#include "support/problem.hpp"
#include "support/stored.hpp"

namespace {

using namespace sattn;         // NOLINT(google-build-using-namespace)
using namespace test_support;  // NOLINT(google-build-using-namespace)

double largest_of(const float* x, index_t count) {
  double top = 0;
  for (index_t i = 0; i < count; ++i) top = std::max(top, std::abs(double{x[i]}));
  return top;
}

// How far each element of some rows may be from what was stored, where the largest of a row, or of
// a block of 32, is `steps` steps, which are longer by `more`: half a step, and 128 times what the
// step and the quotient are off, which for q8_0 is the rounding of an f16 or half of its smallest.
class step_errors {
 public:
  step_errors(const owned_tensor& x, dtype type, double steps, double more = 0)
      : heads_(x.view().heads), dim_(x.view().dim) {
    const index_t block = type == dtype::q8_0 ? 32 : dim_;
    const double scale_error = type == dtype::q8_0 ? 0x1p-11 + 0x1p-22 : 0x1p-22;
    const double least = type == dtype::q8_0 ? 128 * 0x1p-25 : 0;
    for (index_t row = 0; row < x.view().tokens * heads_; ++row) {
      const float* const values = x.row(row / heads_, row % heads_);
      for (index_t d = 0; d < dim_; ++d) {
        const double top = largest_of(values + d / block * block, block);
        errors_.push_back((top / steps + more) * (0.5 + 128 * scale_error) + least);
      }
    }
  }
  double at(index_t token, index_t head, index_t d) const {
    return errors_[test_support::at((token * heads_ + head) * dim_ + d)];
  }
  double largest(index_t token, index_t head) const {
    const auto first = errors_.begin() + (token * heads_ + head) * dim_;
    return *std::max_element(first, first + dim_);
  }

 private:
  index_t heads_;
  index_t dim_;
  std::vector<double> errors_;
};

attention_problem random_problem(random_source& random) {
  attention_problem p(random, {.q_len = 20, .kv_len = 110, .q_heads = 4, .kv_heads = 2,
                               .head_dim = 64, .v_dim = 32});
  // Every row of a size of its own.
  for (index_t row = 0; row < 2 * 110; ++row) {
    const double size = std::exp2(2 * random.uniform() - 1);
    for (index_t i = 0; i < 64; ++i) p.k.row(row / 2, row % 2)[i] *= static_cast<float>(size);
    for (index_t i = 0; i < 32; ++i) p.v.row(row / 2, row % 2)[i] /= static_cast<float>(size);
  }
  return p;
}

// `p` has what `kv` stands for, rounded to f32, `original` what was stored.
void expect_within_bounds(all_contexts& contexts, const attention_problem& p, const kv_view& kv,
                          const attention_problem& original, const step_errors& k_errors,
                          const step_errors& v_errors) {
  constexpr double unit = 0x1p-24;
  for (const auto& [name, plan] : every_kind_of_plan(contexts.any(), p.shape)) {
    SCOPED_TRACE(name);
    const mask_function mask = mask_of(plan);
    reference::result want = expected(p, mask);
    widen(want, p, mask, [&](index_t head, index_t row, index_t key) {
      const float* const k = p.k.row(key, head / 2);
      return logit_error(p, head, row, [&](index_t d) { return unit * std::abs(double{k[d]}); });
    }, [&](index_t head, index_t key) { return unit * largest_of(p.v.row(key, head), 32); });
    reference::result moved = expected(original, mask);
    moved.out_bound = want.out_bound;
    moved.lse_bound = want.lse_bound;
    widen(moved, original, mask, [&](index_t head, index_t row, index_t key) {
      return logit_error(original, head, row,
                         [&](index_t d) { return k_errors.at(key, head / 2, d); });
    }, [&](index_t head, index_t key) { return v_errors.largest(key, head); });
    for (context& ctx : contexts) {
      for (const std::size_t pack : {std::size_t{0}, std::size_t{1} << 40}) {
        std::vector<float> out(20 * 4 * 32, quiet_nan), lse(20 * 4, quiet_nan);
        attend(ctx, plan, p.q.view(), kv,
               {nhd(out.data(), 20, 4, 32), nhd(lse.data(), 20, 4, 1)}, {.pack_bytes = pack});
        EXPECT_TRUE(within_bound(out, lse, want)) << name_of(ctx);
        EXPECT_TRUE(within_bound(out, lse, moved)) << name_of(ctx);
      }
    }
  }
}

// Scales of all bits, rows down to -128.
TEST(quantised, rows_of_an_engine_count_as_what_they_stand_for) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (const auto& [k_type, v_type] :
       {std::pair{dtype::i8, dtype::i8}, {dtype::i8, dtype::q8_0}, {dtype::q8_0, dtype::i8}}) {
    for (const storage_layout layout : all_layouts) {
      SCOPED_TRACE(std::string(name_of(k_type)) + " and " + name_of(v_type));
      const attention_problem original = random_problem(random);
      attention_problem p = original;
      const encoded_rows k_rows(p.k, k_type, true), v_rows(p.v, v_type, true);
      const stored_tensor k(k_rows, layout, random), v(v_rows, layout, random);
      const auto errors = [](const owned_tensor& x, dtype type) {
        return type == dtype::i8 ? step_errors(x, type, 127.5) : step_errors(x, type, 126, 1e-3);
      };
      expect_within_bounds(contexts, p, kv(k.view, v.view), original, errors(original.k, k_type),
                           errors(original.v, v_type));
    }
  }
}

template <class K, class V>
void expect_rows_of_a_cache() {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  const attention_problem original = random_problem(random);
  paged_kv_cache<K, V> cache(
      {.kv_heads = 2, .head_dim = 64, .v_dim = 32, .page_size = 7, .capacity = 112});
  cache.append(original.k.view(), original.v.view());
  attention_problem p = original;
  for (index_t h = 0; h < 2; ++h) {
    const kv_view head = cache.view(h);
    for (token_t t = 0; t < 110; ++t) {
      load_row(head.k.rows(0), t, 64, p.k.row(t, h));
      load_row(head.v.rows(0), t, 32, p.v.row(t, h));
    }
  }
  expect_within_bounds(contexts, p, cache.view(), original,
                       step_errors(original.k, dtype_of<K>, 127),
                       step_errors(original.v, dtype_of<V>, 127));
}

TEST(quantised, rows_of_a_cache_are_off_by_half_a_step) {
  expect_rows_of_a_cache<std::int8_t, std::int8_t>();
  expect_rows_of_a_cache<q8_0, q8_0>();
  expect_rows_of_a_cache<std::int8_t, q8_0>();
}

}  // namespace
