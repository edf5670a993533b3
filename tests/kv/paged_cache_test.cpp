// SPDX-License-Identifier: Apache-2.0

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <sattn/attention/attend.hpp>
#include <sattn/attention/plan.hpp>
#include <sattn/estimate/page_scores.hpp>
#include <sattn/kv/paged_cache.hpp>
#include <sattn/pattern/token_lists.hpp>
#include <string>
#include <utility>
#include <vector>

#include "kv/cache_model.hpp"
#include "support/errors.hpp"
#include "support/problem.hpp"

namespace {

using namespace sattn;         // NOLINT(google-build-using-namespace)
using namespace test_support;  // NOLINT(google-build-using-namespace)

template <class K, class V>
void run_machine(const kv_cache_options& options, int steps) {
  const seed_trace trace;
  cache_machine<K, V> machine(options, test_seed());
  for (int i = 0; i < steps && !::testing::Test::HasFatalFailure(); ++i) {
    machine.step();
    if (i % 100 == 0) machine.check_all();
  }
  machine.drop_all();
  for (const char* name : {"append", "append without room", "truncate", "truncate refused", "fork",
                           "drop", "new", "evict", "evict without room"}) {
    EXPECT_TRUE(machine.counts().contains(name)) << name << " never happened";
  }
}

// At least 100,000 random operations in all, against the model.
TEST(paged_cache, does_what_the_model_does) {
  run_machine<f16, bf16>({.kv_heads = 2,
                          .head_dim = 3,
                          .v_dim = 5,
                          .page_size = 4,
                          .capacity = 90,
                          .summaries = dtype::f16,
                          .means = dtype::f32},
                         50'000);
}
TEST(paged_cache, does_what_the_model_does_with_scales) {
  run_machine<std::int8_t, std::int8_t>({.kv_heads = 3,
                                         .head_dim = 6,
                                         .page_size = 3,
                                         .capacity = 60,
                                         .summaries = dtype::i8,
                                         .means = dtype::i8},
                                        40'000);
}
TEST(paged_cache, does_what_the_model_does_in_single_tokens_and_blocks) {
  run_machine<float, q8_0>({.kv_heads = 1,
                            .head_dim = 1,
                            .v_dim = 32,
                            .page_size = 1,
                            .capacity = 130,
                            .summaries = dtype::f32,
                            .means = dtype::f16},
                           20'000);
}
TEST(paged_cache, does_what_the_model_does_with_one_kind_of_summaries) {
  kv_cache_options options{.kv_heads = 2, .head_dim = 2, .page_size = 2, .capacity = 70};
  options.means = dtype::f16;
  run_machine<float, float>(options, 5'000);
  options.summaries = std::exchange(options.means, std::nullopt);
  run_machine<float, float>(options, 5'000);
}

template <class K, class V>
void expect_same_as_contiguous(dtype summaries) {
  random_source random(3);
  attention_problem p(random, {1, 77, 6, 3, 64, 32});
  paged_kv_cache<K, V> cache({.kv_heads = 3, .head_dim = 64, .v_dim = 32, .page_size = 16,
                              .capacity = 100, .summaries = summaries});
  cache.append(p.k.view().slice(0, 50), p.v.view().slice(0, 50));
  for (index_t t = 50; t < 77; ++t) {
    cache.append(p.k.view().slice(t, t + 1), p.v.view().slice(t, t + 1));
  }
  for (index_t t = 0; t < 77; ++t) {
    for (index_t h = 0; h < 3; ++h) {
      const stored_bytes k = encode<K>(p.k.row(t, h), 64);
      const stored_bytes v = encode<V>(p.v.row(t, h), 32);
      load_row(dtype_of<K>, k.bytes.data(), k.scale, 64, p.k.row(t, h));
      load_row(dtype_of<V>, v.bytes.data(), v.scale, 32, p.v.row(t, h));
    }
  }
  all_contexts contexts;
  const attention_plan plan = plan_decode(contexts.any(), p.shape, dense{}, {.split_keys = 20});
  const reference::result want = expected(p, [](index_t, index_t, index_t) { return true; });
  for (context& ctx : contexts) {
    std::vector<float> out(6 * 32);
    attend(ctx, plan, p.q.view(), cache.view(), {nhd(out.data(), 1, 6, 32)});
    EXPECT_TRUE(within_bound(out, {}, want)) << name_of(ctx);
  }
}

TEST(paged_cache, is_attended_to_as_its_rows_would_be) {
  expect_same_as_contiguous<float, float>(dtype::f32);
  expect_same_as_contiguous<f16, f16>(dtype::f16);
  expect_same_as_contiguous<bf16, f16>(dtype::i8);
  expect_same_as_contiguous<q8_0, q8_0>(dtype::f16);
}

// What is left after eviction, by its view, against attention to the list of keys that stayed.
TEST(paged_cache, evicted_heads_attend_to_what_they_keep) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  attention_problem p(random, {1, 100, 4, 2, 32, 32});
  paged_kv_cache<float> cache({.kv_heads = 2, .head_dim = 32, .page_size = 8, .capacity = 200});
  cache.append(p.k.view(), p.v.view());
  const paged_kv_cache<float> parent = cache.fork();
  const index_t free = cache.free_pages();
  std::vector<std::vector<token_t>> keep(2);
  for (token_t t = 0; t < 100; ++t) {
    if (t % 7 < 3) keep[0].push_back(t);
    if (t < 9 || t > 90) keep[1].push_back(t);
  }
  cache.evict(keep);
  EXPECT_FALSE(cache.uniform());
  EXPECT_EQ(cache.tokens(), 100);
  EXPECT_EQ(cache.tokens(0), 44);
  EXPECT_EQ(cache.tokens(1), 18);
  // Six and two copies of shared pages: the first page of head 1 stays where it is.
  EXPECT_EQ(cache.free_pages(), free - 8);
  EXPECT_FALSE(error_of([&] { cache.view(); }).empty());

  const attention_plan all = plan_decode(contexts.any(), {1, 100, 2, 1, 99}, dense{});
  for (context& ctx : contexts) {
    for (index_t h = 0; h < 2; ++h) {
      SCOPED_TRACE(h);
      const index_t length = cache.tokens(h);
      const attention_plan plan =
          plan_decode(ctx, {1, length, 2, 1, static_cast<token_t>(length - 1)}, dense{});
      std::vector<float> out(64), parents(64);
      const auto q = p.q.view().head_slice(2 * h, 2 * h + 2);
      attend(ctx, plan, q, cache.view(h), {nhd(out.data(), 1, 2, 32)});
      attend(ctx, all, q, parent.view(h), {nhd(parents.data(), 1, 2, 32)});
      const auto want_of = [&](auto&& kept) {
        reference::result r = expected(p, kept);
        const auto first = r.out.begin() + h * 64, bound = r.out_bound.begin() + h * 64;
        r.out = {first, first + 64};
        r.out_bound = {bound, bound + 64};
        return r;
      };
      EXPECT_TRUE(within_bound(out, {}, want_of([&](index_t head, index_t, index_t key) {
        return std::binary_search(keep[at(head / 2)].begin(), keep[at(head / 2)].end(),
                                  static_cast<token_t>(key));
      })));
      // The same keys in the same order where they were: the same bits.
      const token_lists kept{1, {0, length}, keep[at(h)]};
      std::vector<float> in_place(64);
      attend(ctx, plan_decode(ctx, {1, 100, 2, 1, 99}, kept), q, parent.view(h),
             {nhd(in_place.data(), 1, 2, 32)});
      EXPECT_TRUE(bit_equal(in_place, out));
      EXPECT_TRUE(within_bound(parents, {},
                               want_of([](index_t, index_t, index_t) { return true; })));
    }
  }
}

// NaN in what was refused, in the page that is not full and in pages that are taken again.
TEST(paged_cache, what_was_truncated_is_not_read) {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  attention_problem p(random, {1, 45, 4, 2, 32, 32});
  owned_tensor poison(30, 2, 32);
  poison.fill(quiet_nan);
  kv_cache_options options{.kv_heads = 2, .head_dim = 32, .page_size = 16, .capacity = 80};
  options.summaries = dtype::f16;
  options.means = dtype::f32;
  paged_kv_cache<float> cache(options), clean(options);
  clean.append(p.k.view(), p.v.view());
  const auto rows = [&](index_t begin, index_t end) {
    cache.append(p.k.view().slice(begin, end), p.v.view().slice(begin, end));
  };
  rows(0, 20);
  cache.append(poison.view(), poison.view());
  cache.truncate(20);
  rows(20, 45);
  cache.append(poison.view().slice(0, 2), poison.view().slice(0, 2));
  cache.truncate(45);
  for (context& ctx : contexts) {
    const attention_plan plan = plan_decode(ctx, p.shape, dense{});
    std::vector<float> got(4 * 32), want(4 * 32);
    attend(ctx, plan, p.q.view(), cache.view(), {nhd(got.data(), 1, 4, 32)});
    attend(ctx, plan, p.q.view(), clean.view(), {nhd(want.data(), 1, 4, 32)});
    EXPECT_TRUE(bit_equal(got, want));
    EXPECT_TRUE(bit_equal(page_scores(ctx, p.q.view(), cache.summaries()).values,
                          page_scores(ctx, p.q.view(), clean.summaries()).values));
    EXPECT_TRUE(bit_equal(page_scores(ctx, p.q.view(), cache.means()).values,
                          page_scores(ctx, p.q.view(), clean.means()).values));
  }
}

TEST(paged_cache, says_what_does_not_fit) {
  using cache_type = paged_kv_cache<std::int8_t, q8_0>;
  const auto of = [](kv_cache_options o) {
    return error_of([&] { cache_type cache(o); });
  };
  EXPECT_EQ(of({.kv_heads = 2, .head_dim = 32, .capacity = 10}), "");
  EXPECT_NE(of({.kv_heads = 0, .head_dim = 32}), "");
  EXPECT_NE(of({.head_dim = 0}), "");
  EXPECT_NE(of({.head_dim = 32, .page_size = 0}), "");
  EXPECT_NE(of({.head_dim = 33}), "");                    // q8_0 comes in blocks
  EXPECT_NE(of({.head_dim = 33, .v_dim = 20}), "");
  EXPECT_EQ(of({.head_dim = 33, .v_dim = 32}), "");
  EXPECT_NE(of({.head_dim = 32, .capacity = -1}), "");
  EXPECT_NE(of({.kv_heads = 1 << 20, .head_dim = 32, .page_size = 1, .capacity = 1 << 20}), "");
  EXPECT_NE(error_of<unsupported>([&] {
              cache_type cache({.head_dim = 32, .summaries = dtype::bf16});
            }), "");
  EXPECT_NE(
      error_of<unsupported>([&] { cache_type cache({.head_dim = 32, .means = dtype::q8_0}); }), "");

  cache_type cache({.kv_heads = 2, .head_dim = 32, .page_size = 4, .capacity = 8});
  owned_tensor k(3, 2, 32), v(3, 2, 32), wide(3, 2, 64), more(4, 2, 32), heads(3, 1, 32);
  for (owned_tensor* x : {&k, &v, &wide, &more, &heads}) x->fill(1);
  EXPECT_NE(error_of([&] { cache.append(wide.view(), v.view()); }), "");
  EXPECT_NE(error_of([&] { cache.append(k.view(), wide.view()); }), "");
  EXPECT_NE(error_of([&] { cache.append(k.view(), more.view()); }), "");
  EXPECT_NE(error_of([&] { cache.append(heads.view(), heads.view()); }), "");
  k.row(2, 1)[31] = infinity;
  EXPECT_NE(error_of([&] { cache.append(k.view(), v.view()); }).find("token 2, head 1"),
            std::string::npos);
  k.row(2, 1)[31] = 1;
  v.row(1, 0)[0] = quiet_nan;
  EXPECT_NE(error_of([&] { cache.append(k.view(), v.view()); }), "");
  v.row(1, 0)[0] = 1e7f;  // a scale beyond f16
  EXPECT_NE(error_of([&] { cache.append(k.view(), v.view()); }), "");
  EXPECT_EQ(cache.tokens(), 0);
  EXPECT_EQ(cache.free_pages(), 4);
  v.row(1, 0)[0] = 1;
  cache.append(k.view(), v.view());
  EXPECT_NE(error_of([&] { cache.view(2); }), "");
  EXPECT_TRUE(cache.summaries().empty());
  EXPECT_TRUE(cache.means().empty());
  EXPECT_NE(error_of([&] { cache.truncate(4); }), "");
  EXPECT_NE(error_of([&] { cache.truncate(-1); }), "");
  const auto keep = [&](std::vector<std::vector<token_t>> lists) {
    return error_of([&] { cache.evict(lists); });
  };
  EXPECT_NE(keep({{0}}), "");
  EXPECT_NE(keep({{0}, {3}}), "");
  EXPECT_NE(keep({{0}, {1, 1}}), "");
  EXPECT_NE(keep({{-1}, {1}}), "");
  EXPECT_EQ(cache.tokens(1), 3);
  EXPECT_EQ(keep({{0}, {1, 2}}), "");
  EXPECT_NE(error_of([&] { cache.truncate(2); }).find("evict"), std::string::npos);
  EXPECT_NE(error_of<capacity_error>([&] {
              cache.append(more.view(), more.view());
              cache.append(more.view(), more.view());
            }).find("free"), std::string::npos);
}

// Half a step, and for q8_0 what its scale loses in f16.
TEST(store_row, is_off_by_half_a_step_at_most) {
  const seed_trace trace;
  random_source random;
  for (int round = 0; round < 500; ++round) {
    const double size = std::exp2(static_cast<double>(random.integer(-10, 11)));
    std::vector<float> x(64);
    for (float& e : x) e = static_cast<float>(size * random.normal());
    const auto decoded = [&]<class T>(T) {
      std::vector<float> y(64);
      const stored_bytes row = encode<T>(x.data(), 64);
      load_row(dtype_of<T>, row.bytes.data(), row.scale, 64, y.data());
      return y;
    };
    const auto top_of = [&](std::size_t begin, std::size_t end) {
      double top = 0;
      for (std::size_t i = begin; i < end; ++i) top = std::max(top, std::abs(double{x[i]}));
      return top;
    };
    const std::vector<float> a = decoded(std::int8_t{});
    const std::vector<float> b = decoded(q8_0{});
    for (std::size_t i = 0; i < 64; ++i) {
      const double step = top_of(0, 64) / 127;
      const double block_step = top_of(i / 32 * 32, i / 32 * 32 + 32) / 127;
      EXPECT_NEAR(a[i], x[i], step * (0.5 + 127 * 0x1p-22));
      // An f16 has 11 bits, or steps of 2^-24.
      EXPECT_NEAR(b[i], x[i], block_step * (0.5 + 127 * (0x1p-11 + 0x1p-22)) + 127 * 0x1p-25);
    }
  }
}

// Rows near the ends of what the types express.
TEST(store_row, rounds_to_the_nearest_that_its_type_has) {
  const auto round_trip = [](auto type, std::vector<float> x) {
    using T = decltype(type);
    x.resize(32);
    const stored_bytes row = encode<T>(x.data(), 32);
    load_row(dtype_of<T>, row.bytes.data(), row.scale, 32, x.data());
    return x;
  };
  EXPECT_EQ(round_trip(std::int8_t{}, {127, -127, 1, 0.4f, 0.6f})[4], 1.0f);
  EXPECT_EQ(round_trip(std::int8_t{}, {127, -127, 1, 0.4f, 0.6f})[3], 0.0f);
  EXPECT_EQ(round_trip(std::int8_t{}, {1e-44f, -1e-40f})[1], 0.0f);
  EXPECT_EQ(round_trip(std::int8_t{}, {})[0], 0.0f);
  const float top = 3.4e38f;
  EXPECT_FALSE(can_store_row<std::int8_t>(std::vector<float>(9, 3.401e38f).data(), 9));
  EXPECT_NEAR(round_trip(std::int8_t{}, {top, -top})[1] / top, -1.0f, 1e-6f);
  EXPECT_EQ(round_trip(q8_0{}, {127, -127, 3})[1], -127.0f);
  EXPECT_EQ(round_trip(q8_0{}, {})[5], 0.0f);
  EXPECT_NEAR(round_trip(q8_0{}, {8e6f})[0], 8e6f, 8e6f / 1024);
  EXPECT_FALSE(can_store_row<q8_0>(std::vector<float>(32, 127.0f * 65504.0f * 1.001f).data(), 32));
  const auto fits = [](auto type, float x) { return can_store_row<decltype(type)>(&x, 1); };
  constexpr float infinity = std::numeric_limits<float>::infinity();
  for (const float x : {quiet_nan, infinity, -infinity}) {
    EXPECT_TRUE(fits(0.0f, x) && fits(f16{}, x) && fits(bf16{}, x)) << x;
    EXPECT_FALSE(fits(std::int8_t{}, x) || fits(q8_0{}, x)) << x;
  }
  // The last number that rounds to a finite one, and the next.
  const auto ends_at = [&](auto type, float first, auto round) {
    const float last = std::nextafter(first, 0.0f);
    EXPECT_TRUE(fits(type, last) && fits(type, -last) && std::isfinite(to_float(round(last))));
    EXPECT_FALSE(fits(type, first) || fits(type, -first) || std::isfinite(to_float(round(first))));
  };
  ends_at(f16{}, 65520.0f, to_f16);
  ends_at(bf16{}, 0x1.ffp127f, to_bf16);
}

}  // namespace
