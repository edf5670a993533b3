// SPDX-License-Identifier: Apache-2.0

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <sattn/estimate/page_scores.hpp>
#include <string>
#include <utility>
#include <vector>

#include "support/compare.hpp"
#include "support/errors.hpp"
#include "support/problem.hpp"
#include "support/scores.hpp"
#include "support/stored.hpp"

namespace {

using namespace sattn;         // NOLINT(google-build-using-namespace)
using namespace test_support;  // NOLINT(google-build-using-namespace)

constexpr dtype summary_types[] = {dtype::f32, dtype::f16, dtype::i8};
constexpr summary_kind summary_kinds[] = {summary_kind::bounds, summary_kind::mean};

std::string kind_name(summary_kind kind) { return kind == summary_kind::mean ? "means" : "bounds"; }

std::vector<page_summaries> summaries_of(const stored_view& k, token_t page_size, dtype type,
                                         summary_kind kind = summary_kind::bounds) {
  std::vector<page_summaries> all(at(k.heads), page_summaries({k.dim, page_size, type, kind}));
  for (index_t h = 0; h < k.heads; ++h) all[at(h)].update(k, h);
  return all;
}

double exact(const float* q, const float* k, index_t dim) {
  double sum = 0;
  for (index_t d = 0; d < dim; ++d) sum += double{q[d]} * double{k[d]};
  return sum;
}

// An element of a summary: row 0 is min or mean, row 1 max.
double decoded(const page_summaries& s, index_t page, index_t row, index_t d) {
  const index_t rows = s.options().kind == summary_kind::mean ? 1 : 2;
  const index_t i = (d * rows + row) * page_summaries::tile_pages + page % 64;
  const void* const tile = s.tile(page / 64);
  if (s.options().type == dtype::f32) return double{static_cast<const float*>(tile)[i]};
  if (s.options().type == dtype::f16) return double{to_float(static_cast<const f16*>(tile)[i])};
  float scale = 0;
  const auto* const bytes = static_cast<const char*>(tile);
  std::memcpy(&scale, bytes + rows * 64 * s.options().head_dim + page % 64 * 4, 4);
  return static_cast<const std::int8_t*>(tile)[i] * double{scale};
}

struct estimate {
  double value;
  double error;  // how far a correct result may be off
};

// The mean of keys [begin, end), as a summary of a type may have it. The sum of n keys has n - 1
// roundings and the quotient one, each of at most 2^-24 of the sum of the magnitudes; f16 rounds to
// 11 bits or to a multiple of 2^-24, int8 to a step, give or take the roundings of scale and
// quotient.
std::vector<estimate> reference_mean(const owned_tensor& k, index_t head, index_t begin,
                                     index_t end, index_t dim, dtype type) {
  std::vector<estimate> mean(at(dim), {0, 0});
  const auto n = static_cast<double>(end - begin);
  double top = 0;
  for (index_t d = 0; d < dim; ++d) {
    double sum = 0;
    double magnitude = 0;
    for (index_t t = begin; t < end; ++t) {
      sum += double{k.row(t, head)[d]};
      magnitude += std::abs(double{k.row(t, head)[d]});
    }
    mean[at(d)] = {sum / n, 1.01 * n * 0x1p-24 * magnitude / n + 0x1p-149};
    top = std::max(top, std::abs(mean[at(d)].value) + mean[at(d)].error);
  }
  const double step = top / 127 + double{std::numeric_limits<float>::min()};
  for (estimate& m : mean) {
    if (type == dtype::f16) m.error += (std::abs(m.value) + m.error) * 0x1p-11 + 0x1p-25;
    if (type == dtype::i8) m.error += step * (0.5 + 127 * 0x1p-22);
  }
  return mean;
}

// Whether products and sums of a set of kernels are fused; of sse2 that is for the compiler to say.
bool fuses(const context& ctx) { return std::string(ctx.kernel_table().name) != "sse2"; }

// Of the keys as they are stored, whatever the type of the keys and of the summaries: to the last
// bit what is summed in the same order. In f32 a page of one key is bounded by its score.
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
              const float* const q = p.q.row(0, h);
              for (index_t t = 0; t < 700; ++t) {
                const float* const key = p.k.row(t, h);
                const float bound = scores.row(h, 0)[at(t / page_size)];
                if (fuses(ctx)) {
                  const float score = chain(q, key, dim);
                  ASSERT_GE(bound, score) << "key " << t;
                  if (type == dtype::f32 && page_size == 1) {
                    ASSERT_EQ(bound, score) << "key " << t;
                  }
                  continue;
                }
                double slack = 0;  // roundings of a sum of dim products
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

// Of f32 and f16, whose rounding keeps order; int8 has a scale for each page. Best-first search
// thus finds the best pages without scoring all.
TEST(page_scores, of_large_pages_bound_those_of_the_pages_in_them) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  constexpr index_t dim = 24, tokens = 3000, best = 10;
  attention_problem p(random, {1, tokens, 1, 1, dim, 8});
  for (index_t t = 1; t < tokens; ++t) {  // neighbours are alike
    for (index_t d = 0; d < dim; ++d) {
      p.k.row(t, 0)[d] = 0.998f * p.k.row(t - 1, 0)[d] + 0.063f * p.k.row(t, 0)[d];
    }
  }
  for (const dtype type : {dtype::f32, dtype::f16}) {
    const auto small = summaries_of(p.k.view(), 16, type);
    const auto large = summaries_of(p.k.view(), 128, type);
    for (context& ctx : contexts) {
      SCOPED_TRACE(std::string(name_of(type)) + ", " + name_of(ctx));
      const std::vector<float> of_small = page_scores(ctx, p.q.view(), small).values;
      const std::vector<float> of_large = page_scores(ctx, p.q.view(), large).values;
      for (std::size_t i = 0; i < of_small.size(); ++i) {
        ASSERT_GE(of_large[i / 8], of_small[i]) << i;
      }

      std::vector<std::pair<float, std::size_t>> order;  // of large pages, the best first
      for (std::size_t i = 0; i < of_large.size(); ++i) order.emplace_back(-of_large[i], i);
      std::sort(order.begin(), order.end());
      std::vector<std::pair<float, std::size_t>> found;  // of small pages
      std::size_t scored = 0;
      for (const auto& [negative, page] : order) {
        if (found.size() == best && found.back().first < negative) break;
        for (std::size_t i = 8 * page; i < std::min(8 * page + 8, of_small.size()); ++i) {
          found.emplace_back(-of_small[i], i);
          ++scored;
        }
        std::sort(found.begin(), found.end());
        found.resize(std::min<std::size_t>(found.size(), best));
      }
      std::vector<std::pair<float, std::size_t>> flat;
      for (std::size_t i = 0; i < of_small.size(); ++i) flat.emplace_back(-of_small[i], i);
      std::sort(flat.begin(), flat.end());
      flat.resize(best);
      EXPECT_EQ(found, flat);
      EXPECT_LT(scored, of_small.size());
    }
  }
}

// ArkVale's box, which reaches from the middle by the mean distance and not by the largest: no
// bound, except for a single key.
TEST(page_scores, of_a_shrunken_box_would_be_no_bounds) {
  random_source random(5);
  constexpr index_t dim = 2;
  attention_problem p(random, {1, 640, 1, 1, dim, 8});
  const float* const q = p.q.row(0, 0);
  const auto shrunken = [&](index_t begin, index_t end) {
    double score = 0;
    for (index_t d = 0; d < dim; ++d) {
      double low = infinity, high = -infinity, reach = 0;
      for (index_t t = begin; t < end; ++t) {
        low = std::min(low, double{p.k.row(t, 0)[d]});
        high = std::max(high, double{p.k.row(t, 0)[d]});
      }
      const double middle = (low + high) / 2;
      for (index_t t = begin; t < end; ++t) reach += std::abs(double{p.k.row(t, 0)[d]} - middle);
      reach /= static_cast<double>(end - begin);
      score += double{q[d]} * middle + std::abs(double{q[d]}) * reach;
    }
    return score;
  };
  int violations = 0;
  for (index_t page = 0; page < 160; ++page) {
    for (index_t t = 4 * page; t < 4 * page + 4; ++t) {
      violations += exact(q, p.k.row(t, 0), dim) > shrunken(4 * page, 4 * page + 4) ? 1 : 0;
      EXPECT_NEAR(exact(q, p.k.row(t, 0), dim), shrunken(t, t + 1), 1e-12);
    }
  }
  EXPECT_GT(violations, 10);
}

// The mass of a page of n keys lies between n exp(s q . mean) and n exp(s bound), and no key is
// further from the mean key than by |q| times their largest distance.
TEST(page_scores, of_means_and_bounds_enclose_the_mass_of_a_page) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  constexpr index_t dim = 24;
  constexpr double scale = 0.2;
  attention_problem p(random, {1, 700, 1, 1, dim, 8});
  const float* const q = p.q.row(0, 0);
  double length = 0;
  for (index_t d = 0; d < dim; ++d) length += double{q[d]} * double{q[d]};
  length = std::sqrt(length);
  const auto bounds = summaries_of(p.k.view(), 16, dtype::f32);
  const auto means = summaries_of(p.k.view(), 16, dtype::f32, summary_kind::mean);
  for (context& ctx : contexts) {
    const std::vector<float> most = page_scores(ctx, p.q.view(), bounds).values;
    const std::vector<float> average = page_scores(ctx, p.q.view(), means).values;
    for (index_t page = 0; page < 44; ++page) {
      const index_t end = std::min<index_t>(700, 16 * page + 16);
      const auto n = static_cast<double>(end - 16 * page);
      double mass = 0, magnitude = 0, radius = 0;
      for (index_t t = 16 * page; t < end; ++t) {
        double distance = 0;
        mass += std::exp(scale * exact(q, p.k.row(t, 0), dim));
        for (index_t d = 0; d < dim; ++d) {
          const double off = double{p.k.row(t, 0)[d]} - decoded(means[0], page, 0, d);
          distance += off * off;
          magnitude = std::max(magnitude, std::abs(double{q[d]} * double{p.k.row(t, 0)[d]}));
        }
        radius = std::max(radius, std::sqrt(distance));
      }
      const double slack = magnitude * dim * (dim + 20) * 0x1p-23;  // of sums of products and keys
      EXPECT_LE(n * std::exp(scale * (double{average[at(page)]} - slack)), mass);
      EXPECT_GE(n * std::exp(scale * (double{most[at(page)]} + slack)), mass);
      for (index_t t = 16 * page; t < end; ++t) {
        EXPECT_LE(exact(q, p.k.row(t, 0), dim),
                  double{average[at(page)]} + length * radius + slack);
      }
    }
  }
}

// The decoded summaries themselves: exact bounds of every element, and close ones.
TEST(page_summaries, are_rounded_outwards) {
  random_source random(17);
  int nearest_fails = 0;
  int nearest_int8_fails = 0;
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
        ASSERT_LE(decoded(s, 0, 0, d), double{low}) << name_of(type);
        ASSERT_GE(decoded(s, 0, 1, d), double{high}) << name_of(type);
        if (type == dtype::f16 && to_float(to_f16(high)) < high) ++nearest_fails;
        const double top = std::max(std::abs(double{low}), std::abs(double{high}));
        const double unit = top / 127;
        if (type == dtype::i8 && std::nearbyint(high / unit) * unit < high) ++nearest_int8_fails;
        if ((type == dtype::f16 && top > 65000) || size < 1e-4) continue;
        const double step = type == dtype::f32 ? 0 : type == dtype::f16 ? top / 1024 + 1e-7
                                                                        : 10 * size / 63;
        ASSERT_GE(decoded(s, 0, 0, d), double{low} - step) << name_of(type);
        ASSERT_LE(decoded(s, 0, 1, d), double{high} + step) << name_of(type);
      }
    }
  }
  EXPECT_GT(nearest_fails, 100);  // rounding to the nearest would not do
  EXPECT_GT(nearest_int8_fails, 100);
}

// The quotient of a key and a step would underflow in f32.
TEST(page_summaries, in_int8_enclose_tiny_keys_beside_huge_ones) {
  for (const float top : {1e4f, 3e38f}) {
    const std::vector<float> keys = {top, 1e-45f, -top, -1e-45f, top, -1e-45f};
    page_summaries s({2, 3, dtype::i8});
    s.update(nhd(keys.data(), 3, 1, 2), 0);
    EXPECT_LE(decoded(s, 0, 0, 1), -1e-45);
    EXPECT_GE(decoded(s, 0, 1, 1), 1e-45);
    EXPECT_GE(decoded(s, 0, 1, 0), double{top});
  }
}

// Of keys of any size, those below what f16 has among them.
TEST(page_summaries, hold_means_rounded_to_the_nearest) {
  const seed_trace trace;
  random_source random;
  constexpr index_t tokens = 2100;
  for (const token_t page_size : {1, 3, 16, 64}) {
    for (const index_t dim : {1, 24, 128}) {
      owned_tensor k(tokens, 1, dim);
      k.fill_normal(random);
      for (index_t t = 0; t < tokens; ++t) {
        const auto size = static_cast<float>(std::exp2(static_cast<double>(t / 200) * 3 - 24));
        for (index_t d = 0; d < dim; ++d) k.row(t, 0)[d] *= size;
      }
      for (const dtype type : summary_types) {
        SCOPED_TRACE(std::string(name_of(type)) + ", pages of " + std::to_string(page_size));
        const auto means = summaries_of(k.view(), page_size, type, summary_kind::mean);
        std::vector<float> errors;  // in units of what they may be, so that all sizes count alike
        for (index_t page = 0; page < means[0].pages(); ++page) {
          const index_t end = std::min<index_t>(tokens, (page + 1) * page_size);
          const auto want = reference_mean(k, 0, page * page_size, end, dim, type);
          for (index_t d = 0; d < dim; ++d) {
            const double error = decoded(means[0], page, 0, d) - want[at(d)].value;
            errors.push_back(static_cast<float>(error / want[at(d)].error));
          }
        }
        EXPECT_TRUE(elements_within_bound("means", errors, std::vector<double>(errors.size(), 0),
                                          std::vector<double>(errors.size(), 1)));
      }
    }
  }
}

// Appended in pieces of any length, truncated, forked: the bits of summaries made anew.
TEST(page_summaries, are_the_same_bits_however_the_keys_came) {
  const seed_trace trace;
  random_source random;
  owned_tensor keys(600, 1, 7);
  keys.fill_normal(random);
  const auto bytes_of = [](const page_summaries& s) {
    std::vector<std::byte> all;
    for (index_t i = 0; i < s.tiles(); ++i) {
      const auto* const tile = static_cast<const std::byte*>(s.tile(i));
      all.insert(all.end(), tile, tile + s.bytes() / at(s.tiles()));
    }
    return all;
  };
  for (const summary_kind kind : summary_kinds) {
    for (const dtype type : summary_types) {
      for (const token_t page_size : {1, 3, 16}) {
        SCOPED_TRACE(kind_name(kind) + " in " + name_of(type));
        const page_summary_options options{7, page_size, type, kind};
        page_summaries one(options), other(options);
        for (int step = 0; step < 150; ++step) {
          stored_view k = keys.view();
          k.tokens = random.integer(0, 3) == 0
                         ? random.integer(0, 601)
                         : std::clamp<index_t>(one.tokens() + random.integer(-2, 4), 0, 600);
          k.tokens < one.tokens() ? one.truncate(k, 0) : one.update(k, 0);
          for (const page_summaries* s : {&one, &other}) {
            page_summaries anew(options);
            k.tokens = s->tokens();
            anew.update(k, 0);
            ASSERT_EQ(s->pages(), ceil_div(k.tokens, page_size));
            ASSERT_EQ(bytes_of(*s), bytes_of(anew)) << k.tokens << " tokens";
          }
          if (random.integer(0, 4) == 0) other = one;
          if (random.integer(0, 4) == 0) std::swap(one, other);
        }
      }
    }
  }
}

// A copy made when there is room to spare: neither writes where the other reads.
TEST(page_summaries, copies_share_no_tile_that_is_written_later) {
  const seed_trace trace;
  random_source random;
  owned_tensor first(300, 1, 3), second(300, 1, 3);
  first.fill_normal(random);
  second.fill_normal(random);
  for (index_t t = 0; t < 5; ++t) std::copy_n(first.row(t, 0), 3, second.row(t, 0));
  for (const dtype type : summary_types) {
    page_summaries one({3, 1, type});
    one.reserve(300);
    stored_view start = first.view();
    start.tokens = 5;
    one.update(start, 0);
    page_summaries other = one;
    one.update(first.view(), 0);
    other.update(second.view(), 0);
    for (const auto& [summaries, keys] :
         {std::pair{&one, &first}, std::pair{&other, &second}}) {
      const page_summaries anew = summaries_of(keys->view(), 1, type)[0];
      for (index_t i = 0; i < anew.tiles(); ++i) {
        EXPECT_EQ(std::memcmp(summaries->tile(i), anew.tile(i), anew.bytes() / at(anew.tiles())), 0)
            << name_of(type) << ", tile " << i;
      }
    }
  }
}

// A page that its summary says nothing about must not be lost: numbers beyond f16, NaN and
// infinities at any place of a page.
TEST(page_scores, are_infinite_where_a_type_cannot_hold_the_summary) {
  random_source random(4);
  all_contexts contexts;
  attention_problem p(random, {1, 40, 1, 1, 5, 8});
  p.q.row(0, 0)[2] = 0.0f;
  p.q.row(0, 0)[3] = -1.0f;
  p.k.row(9, 0)[2] = 70000.0f;
  p.k.row(17, 0)[3] = 1e6f;
  p.k.row(30, 0)[0] = quiet_nan;
  p.k.row(36, 0)[2] = infinity;
  p.k.row(39, 0)[3] = -infinity;
  for (const summary_kind kind : summary_kinds) {
    for (const dtype type : summary_types) {
      for (const token_t page_size : {1, 2, 4}) {
        for (context& ctx : contexts) {
          const auto summaries = summaries_of(p.k.view(), page_size, type, kind);
          const score_tensor scores = page_scores(ctx, p.q.view(), summaries);
          for (index_t page = 0; page < 40 / page_size; ++page) {
            bool lost = false;
            for (index_t t = page * page_size; t < (page + 1) * page_size; ++t) {
              for (index_t d = 0; d < 5; ++d) lost = lost || !std::isfinite(p.k.row(t, 0)[d]);
              // A mean of several keys may fit where the largest does not.
              lost = lost || (type == dtype::f16 && t == 17) ||
                     (type == dtype::f16 && t == 9 &&
                      (kind == summary_kind::bounds || page_size == 1));
            }
            EXPECT_EQ(scores.values[at(page)] == infinity, lost)
                << kind_name(kind) << " in " << name_of(type) << ", pages of " << page_size
                << ", page " << page;
          }
        }
      }
    }
  }
}

// Also where summaries are rounded: outwards, so that sums over heads stay bounds of the sums.
TEST(page_scores, of_a_group_bound_the_sum_of_its_heads) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  constexpr index_t dim = 24;
  attention_problem p(random, {2, 200, 8, 2, dim, 8});
  for (const dtype type : summary_types) {
    const auto summaries = summaries_of(p.k.view(), 8, type);
    for (context& ctx : contexts) {
      const score_tensor scores = page_scores(ctx, p.q.view(), summaries, head_reduce::sum);
      for (index_t set = 0; set < 2; ++set) {
        for (index_t row = 0; row < 2; ++row) {
          for (index_t t = 0; t < 200; ++t) {
            double sum = 0;
            double magnitude = 0;
            for (index_t h = 4 * set; h < 4 * set + 4; ++h) {
              sum += exact(p.q.row(row, h), p.k.row(t, set), dim);
              for (index_t d = 0; d < dim; ++d) {
                magnitude += std::abs(double{p.q.row(row, h)[d]} * double{p.k.row(t, set)[d]});
              }
            }
            const double roundings = 2.0 * static_cast<double>(dim + 6) * 0x1p-24;
            ASSERT_GE(double{scores.row(set, row)[at(t / 8)]} + roundings * magnitude, sum)
                << name_of(type) << ", key " << t;
          }
        }
      }
    }
  }
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

// Pages of one key of which nothing is rounded.
TEST(page_scores, of_means_of_single_keys_are_their_scores) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  attention_problem p(random, {1, 130, 1, 1, 40, 8});
  const auto means = summaries_of(p.k.view(), 1, dtype::f32, summary_kind::mean);
  for (context& ctx : contexts) {
    if (!fuses(ctx)) continue;
    const score_tensor scores = page_scores(ctx, p.q.view(), means);
    for (index_t t = 0; t < 130; ++t) {
      ASSERT_EQ(scores.values[at(t)], chain(p.q.row(0, 0), p.k.row(t, 0), 40)) << "key " << t;
    }
  }
}

// What one query row makes of a page's keys, summed over d in any order; `roundings` of it, each of
// at most 2^-24 of the magnitudes.
estimate reference_score(summary_kind kind, const float* q, const owned_tensor& k, index_t kv_head,
                         index_t begin, index_t end, index_t dim, dtype type, double roundings) {
  const std::vector<estimate> mean = reference_mean(k, kv_head, begin, end, dim, type);
  estimate score{0, 0};
  double magnitude = 0;
  for (index_t d = 0; d < dim; ++d) {
    const double x{q[d]};
    double best = -std::numeric_limits<double>::infinity();
    double largest = 0;
    for (index_t t = begin; t < end; ++t) {
      best = std::max(best, x * double{k.row(t, kv_head)[d]});
      largest = std::max(largest, std::abs(double{k.row(t, kv_head)[d]}));
    }
    const estimate& m = mean[at(d)];
    const bool is_mean = kind == summary_kind::mean;
    score.value += is_mean ? x * m.value : best;
    score.error += is_mean ? std::abs(x) * m.error : 0;
    magnitude += std::abs(x) * (is_mean ? std::abs(m.value) + m.error : largest);
  }
  score.error += 1.01 * roundings * 0x1p-24 * magnitude;
  return score;
}

// Sums, means and maxima over heads and rows, by brute force over the keys. Bounds in f16 and int8
// are looser by an amount of which only the direction is known; they are tested above.
TEST(page_scores, reduce_heads_and_rows) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  constexpr index_t dim = 20;
  attention_problem p(random, {3, 333, 6, 2, dim, 8});
  const auto expect = [&](summary_kind kind, dtype type, head_reduce heads, row_reduce rows) {
    SCOPED_TRACE(kind_name(kind) + " in " + name_of(type));
    const auto summaries = summaries_of(p.k.view(), 5, type, kind);
    const index_t set_heads = heads == head_reduce::none ? 1 : 3;
    const index_t set_rows = rows == row_reduce::none ? 1 : 3;
    // Two products and the scale for each d, the sum over heads and rows, the share of a mean.
    const auto roundings = static_cast<double>(2 * dim + set_heads * set_rows + 3);
    std::vector<double> want, bound;
    for (index_t set = 0; set < 6 / set_heads; ++set) {
      for (index_t row = 0; row < 3 / set_rows; ++row) {
        for (index_t page = 0; page < 67; ++page) {
          estimate joined{heads == head_reduce::max ? -1e300 : 0, 0};
          for (index_t h = set * set_heads; h < (set + 1) * set_heads; ++h) {
            for (index_t r = row * set_rows; r < (row + 1) * set_rows; ++r) {
              const estimate one =
                  reference_score(kind, p.q.row(r, h), p.k, h / 3, page * 5,
                                  std::min<index_t>(333, page * 5 + 5), dim, type, roundings);
              joined = heads == head_reduce::max
                           ? estimate{std::max(joined.value, one.value),
                                      std::max(joined.error, one.error)}
                           : estimate{joined.value + one.value, joined.error + one.error};
            }
          }
          const double share = heads == head_reduce::mean ? 1.0 / 3 : 1.0;
          want.push_back(share * joined.value);
          bound.push_back(share * joined.error);
        }
      }
    }
    for (context& ctx : contexts) {
      const score_tensor scores = page_scores(ctx, p.q.view(), summaries, heads, rows);
      ASSERT_EQ(scores.sets, 6 / set_heads);
      ASSERT_EQ(scores.rows, 3 / set_rows);
      ASSERT_EQ(scores.cols, 67);
      EXPECT_TRUE(elements_within_bound("scores", scores.values, want, bound)) << name_of(ctx);
    }
  };
  for (const head_reduce heads :
       {head_reduce::none, head_reduce::sum, head_reduce::mean, head_reduce::max}) {
    for (const row_reduce rows : {row_reduce::none, row_reduce::sum}) {
      if (heads == head_reduce::max && rows == row_reduce::sum) continue;
      expect(summary_kind::bounds, dtype::f32, heads, rows);
      for (const dtype type : summary_types) expect(summary_kind::mean, type, heads, rows);
    }
  }
}

TEST(page_scores, heads_of_different_lengths_and_thread_counts) {
  random_source random(8);
  attention_problem p(random, {1, 3000, 4, 2, 16, 8});
  serial_executor serial;
  thread_pool pool(3);
  for (const summary_kind kind : summary_kinds) {
    SCOPED_TRACE(kind_name(kind));
    std::vector<page_summaries> summaries(2, page_summaries({16, 4, dtype::f16, kind}));
    stored_view k = p.k.view();
    summaries[0].update(k, 0);
    k.tokens = 41;
    summaries[1].update(k, 1);
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
  const auto means = summaries_of(p.k.view(), 4, dtype::f32, summary_kind::mean);
  EXPECT_NE(error_of([&] {
              page_scores(ctx, p.q.view(), std::vector<page_summaries>{good[0], means[1]});
            }).find("means"),
            std::string::npos);
  EXPECT_NE(error_of([&] { page_summaries({0, 4, dtype::f32}); }), "");
  EXPECT_NE(error_of([&] { page_summaries({4, 0, dtype::f32}); }), "");
  for (const summary_kind kind : summary_kinds) {
    EXPECT_NE(error_of<unsupported>([&] { page_summaries({4, 4, dtype::q8_0, kind}); }), "");
    EXPECT_NE(error_of<unsupported>([&] { page_summaries({4, 4, dtype::bf16, kind}); }), "");
  }
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
