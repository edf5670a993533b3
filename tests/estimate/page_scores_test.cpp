// SPDX-License-Identifier: Apache-2.0

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <sattn/estimate/page_scores.hpp>
#include <string>
#include <vector>

#include "support/errors.hpp"
#include "support/problem.hpp"
#include "support/stored.hpp"

namespace {

using namespace sattn;         // NOLINT(google-build-using-namespace)
using namespace test_support;  // NOLINT(google-build-using-namespace)

constexpr dtype summary_types[] = {dtype::f32, dtype::f16, dtype::i8};

std::vector<page_summaries> summaries_of(const stored_view& k, token_t page_size, dtype type) {
  std::vector<page_summaries> all(at(k.heads), page_summaries({k.dim, page_size, type}));
  for (index_t h = 0; h < k.heads; ++h) all[at(h)].update(k, h);
  return all;
}

// q . k in the order of d, with the roundings that fused products have.
float chain(const float* q, const float* k, index_t dim) {
  float sum = 0;
  for (index_t d = 0; d < dim; ++d) sum = std::fma(q[d], k[d], sum);
  return sum;
}

double exact(const float* q, const float* k, index_t dim) {
  double sum = 0;
  for (index_t d = 0; d < dim; ++d) sum += double{q[d]} * double{k[d]};
  return sum;
}

// Whether products and sums of a set of kernels are fused; of sse2 that is for the compiler to say.
bool fuses(const context& ctx) { return std::string(ctx.kernel_table().name) != "sse2"; }

// Of the keys as they are stored, whatever the type of the keys and of the summaries. Summaries of f32
// bound to the last bit what is summed in the same order; a page of one key is bounded by its score.
TEST(page_scores, bound_every_key_of_the_page) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  for (const token_t page_size : {1, 3, 16, 64}) {
    for (const index_t dim : {1, 24, 128}) {
      attention_problem p(random, {1, 700, 2, 2, dim, 8});
      for (const dtype type : summary_types) {
        for (const dtype k_type : {dtype::f32, dtype::bf16, dtype::i8}) {
          SCOPED_TRACE(std::string(name_of(type)) + " of " + name_of(k_type));
          const encoded_rows rows(p.k, k_type);
          const stored_tensor k(rows, random.pick({storage_layout::strided, storage_layout::paged,
                                                   storage_layout::ring}), random);
          const auto summaries = summaries_of(k.view, page_size, type);
          for (context& ctx : contexts) {
            const score_tensor scores =
                page_scores(ctx, p.q.view(), summaries, head_reduce::none);
            ASSERT_EQ(scores.cols, ceil_div(700, page_size));
            for (index_t h = 0; h < 2; ++h) {
              double slack = 0;  // roundings of a sum of dim products, for rounded summaries
              const float* const q = p.q.row(0, h);
              for (index_t t = 0; t < 700; ++t) {
                const float* const key = p.k.row(t, h);
                const float bound = scores.row(h, 0)[at(t / page_size)];
                if (type == dtype::f32 && fuses(ctx)) {
                  const float score = chain(q, key, dim);
                  ASSERT_GE(bound, score) << "key " << t;
                  if (page_size == 1) {
                    ASSERT_EQ(bound, score) << "key " << t;
                  }
                  continue;
                }
                slack = 0;
                for (index_t d = 0; d < dim; ++d) slack += std::abs(double{q[d]} * double{key[d]});
                slack *= 2.0 * static_cast<double>(dim + 2) * 0x1p-24;
                ASSERT_GE(double{bound} + slack, exact(q, key, dim)) << "key " << t;
              }
            }
          }
        }
      }
    }
  }
}

// The decoded summaries themselves: exact bounds of every element, and close ones.
TEST(page_summaries, are_rounded_outwards) {
  random_source random(17);
  const auto decoded = [](const page_summaries& s, index_t which, index_t d) -> double {
    const index_t i = (2 * d + which) * page_summaries::tile_pages;
    const void* const tile = s.tile(0);
    if (s.options().type == dtype::f32) return double{static_cast<const float*>(tile)[i]};
    if (s.options().type == dtype::f16) {
      return double{to_float(static_cast<const f16*>(tile)[i])};
    }
    float scale = 0;
    std::memcpy(&scale, static_cast<const char*>(tile) + 2 * 64 * s.options().head_dim, 4);
    return static_cast<const std::int8_t*>(tile)[i] * double{scale};
  };
  int nearest_fails = 0;
  for (int round = 0; round < 3000; ++round) {
    const double size = std::pow(2.0, static_cast<double>(random.integer(-150, 125)));
    std::vector<float> keys(6);
    for (float& x : keys) x = static_cast<float>(size * random.normal());
    for (const dtype type : summary_types) {
      page_summaries s({2, 3, type});
      s.update(nhd(keys.data(), 3, 1, 2), 0);
      for (index_t d = 0; d < 2; ++d) {
        const float low = std::min({keys[at(d)], keys[at(2 + d)], keys[at(4 + d)]});
        const float high = std::max({keys[at(d)], keys[at(2 + d)], keys[at(4 + d)]});
        ASSERT_LE(decoded(s, 0, d), double{low}) << name_of(type);
        ASSERT_GE(decoded(s, 1, d), double{high}) << name_of(type);
        if (type == dtype::f16 && to_float(to_f16(high)) < high) ++nearest_fails;
        const double top = std::max(std::abs(double{low}), std::abs(double{high}));
        if ((type == dtype::f16 && top > 65000) || size < 1e-4) continue;
        const double step = type == dtype::f32 ? 0 : type == dtype::f16 ? top / 1024 + 1e-7
                                                                        : 10 * size / 126;
        ASSERT_GE(decoded(s, 0, d), double{low} - step) << name_of(type);
        ASSERT_LE(decoded(s, 1, d), double{high} + step) << name_of(type);
      }
    }
  }
  EXPECT_GT(nearest_fails, 100);  // rounding to the nearest would not do
}

// A bound of a page is at least that of every page within it.
TEST(page_scores, of_larger_pages_are_larger) {
  random_source random(5);
  all_contexts contexts;
  attention_problem p(random, {1, 500, 1, 1, 40, 8});
  for (const dtype type : {dtype::f32, dtype::f16}) {
    const auto small = summaries_of(p.k.view(), 8, type);
    const auto large = summaries_of(p.k.view(), 32, type);
    for (context& ctx : contexts) {
      const score_tensor fine = page_scores(ctx, p.q.view(), small);
      const score_tensor coarse = page_scores(ctx, p.q.view(), large);
      for (index_t i = 0; i < fine.cols; ++i) {
        ASSERT_GE(coarse.values[at(i / 4)], fine.values[at(i)]);
      }
    }
  }
}

// Sums, means and maxima over heads and rows, by brute force over the summaries' own keys.
TEST(page_scores, reduce_heads_and_rows) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  attention_problem p(random, {3, 333, 6, 2, 20, 8});
  const token_t page_size = 5;
  const auto summaries = summaries_of(p.k.view(), page_size, dtype::f32);
  const auto bound = [&](index_t head, index_t row, index_t page) {
    const index_t kv_head = head / 3;
    double sum = 0;
    for (index_t d = 0; d < 20; ++d) {
      double best = -1e300;
      for (index_t t = page * 5; t < std::min<index_t>(333, page * 5 + 5); ++t) {
        best = std::max(best, double{p.q.row(row, head)[d]} * double{p.k.row(t, kv_head)[d]});
      }
      sum += best;
    }
    return sum;
  };
  for (context& ctx : contexts) {
    for (const head_reduce heads :
         {head_reduce::none, head_reduce::sum, head_reduce::mean, head_reduce::max}) {
      for (const row_reduce rows : {row_reduce::none, row_reduce::sum}) {
        if (heads == head_reduce::max && rows == row_reduce::sum) continue;
        const score_tensor scores = page_scores(ctx, p.q.view(), summaries, heads, rows);
        ASSERT_EQ(scores.sets, heads == head_reduce::none ? 6 : 2);
        ASSERT_EQ(scores.rows, rows == row_reduce::none ? 3 : 1);
        ASSERT_EQ(scores.cols, 67);
        for (index_t set = 0; set < scores.sets; ++set) {
          for (index_t row = 0; row < scores.rows; ++row) {
            for (index_t page = 0; page < 67; ++page) {
              double want = heads == head_reduce::max ? -1e300 : 0;
              const index_t set_heads = heads == head_reduce::none ? 1 : 3;
              for (index_t h = set * set_heads; h < (set + 1) * set_heads; ++h) {
                const index_t end = rows == row_reduce::none ? row + 1 : 3;
                for (index_t r = row; r < end; ++r) {
                  const double b = bound(h, r, page);
                  want = heads == head_reduce::max ? std::max(want, b) : want + b;
                }
              }
              if (heads == head_reduce::mean) want /= 3;
              ASSERT_NEAR(scores.row(set, row)[at(page)], want, 1e-4);
            }
          }
        }
      }
    }
  }
}

TEST(page_scores, heads_of_different_lengths_and_thread_counts) {
  random_source random(8);
  attention_problem p(random, {1, 3000, 4, 2, 16, 8});
  std::vector<page_summaries> summaries(2, page_summaries({16, 4, dtype::f16}));
  stored_view k = p.k.view();
  summaries[0].update(k, 0);
  k.tokens = 41;
  summaries[1].update(k, 1);
  serial_executor serial;
  thread_pool pool(3);
  for (const kernel_table* table : kernel_tables()) {
    context one(serial, *table);
    context three(pool, *table);
    const score_tensor want = page_scores(one, p.q.view(), summaries);
    EXPECT_TRUE(bit_equal(page_scores(three, p.q.view(), summaries).values, want.values));
    EXPECT_EQ(want.cols, 750);
    EXPECT_TRUE(std::isfinite(want.row(0, 0)[749]));
    EXPECT_TRUE(std::isfinite(want.row(1, 0)[10]));
    for (index_t i = 11; i < 750; ++i) ASSERT_EQ(want.row(1, 0)[at(i)], -infinity);
  }
}

TEST(page_scores, say_what_does_not_fit) {
  context ctx(1);
  random_source random(8);
  attention_problem p(random, {1, 30, 4, 2, 16, 8});
  const auto good = summaries_of(p.k.view(), 4, dtype::f32);
  const auto other = summaries_of(p.v.view(), 4, dtype::f32);
  EXPECT_NE(error_of([&] { page_scores(ctx, p.q.view(), {}); }), "");
  EXPECT_NE(error_of([&] { page_scores(ctx, p.q.view(), other); }), "");
  EXPECT_NE(error_of([&] { page_scores(ctx, p.q.view().head_slice(0, 3), good); }), "");
  EXPECT_NE(error_of([&] { page_summaries({0, 4, dtype::f32}); }), "");
  EXPECT_NE(error_of([&] { page_summaries({4, 0, dtype::f32}); }), "");
  EXPECT_NE(error_of<unsupported>([&] { page_summaries({4, 4, dtype::q8_0}); }), "");
  page_summaries s({16, 4, dtype::f32});
  EXPECT_NE(error_of([&] { s.update(p.k.view(), 2); }), "");
  EXPECT_NE(error_of([&] { s.update(p.v.view(), 0); }), "");
  EXPECT_NE(error_of([&] { s.truncate(p.k.view(), 0); }), "");
  s.update(p.k.view(), 0);
  stored_view less = p.k.view();
  less.tokens = 10;
  EXPECT_NE(error_of([&] { s.update(less, 0); }), "");
  s.truncate(less, 0);
  EXPECT_EQ(s.tokens(), 10);
}

}  // namespace
