// SPDX-License-Identifier: Apache-2.0
//
// What an eviction leaves of every type, in memory that is NaN wherever no key is.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <sattn/attention/attend.hpp>
#include <sattn/attention/plan.hpp>
#include <sattn/kv/paged_cache.hpp>
#include <sattn/pattern/token_lists.hpp>
#include <utility>
#include <vector>

#include "kv/cache_model.hpp"
#include "support/problem.hpp"

namespace {

using namespace sattn;         // NOLINT(google-build-using-namespace)
using namespace test_support;  // NOLINT(google-build-using-namespace)

// Fills all memory of a store with 0xff, NaN in every type or in its scales, but for the rows and
// scales that its only sequence has.
template <class Cache>
void poison_all_but(const Cache& cache) {
  const stored_view first = cache.view(0).k;  // begins where the store does
  auto* const memory = static_cast<std::byte*>(const_cast<void*>(first.data));
  const std::vector<std::byte> before(memory, memory + first.pages.pool * first.pages.stride);
  std::memset(memory, 0xff, before.size());
  const auto give_back = [&](const void* at_place, index_t bytes) {
    const index_t offset = static_cast<const std::byte*>(at_place) - memory;
    std::copy_n(before.begin() + offset, bytes, memory + offset);
  };
  for (index_t h = 0; h < cache.options().kv_heads; ++h) {
    const kv_view head = cache.view(h);
    for (const stored_view* view : {&head.k, &head.v}) {
      for (index_t t = 0; t < cache.tokens(h); ++t) {
        const index_t page = view->pages.table[at(t / view->pages.size)];
        const index_t slot = t % view->pages.size;
        give_back(static_cast<const std::byte*>(view->data) + page * view->pages.stride +
                      slot * view->token_stride,
                  row_bytes(view->type, view->dim));
        if (!has_row_scale(view->type)) continue;
        give_back(view->scales.data + page * view->scales.page_stride +
                      slot * view->scales.token_stride,
                  sizeof(float));
      }
    }
  }
}

// Every query, of a decoding step or of a prompt, against some keys of one head.
std::vector<std::vector<float>> attend_to(all_contexts& contexts, const attention_problem& p,
                                          const kv_view& head, index_t kv_head,
                                          const std::vector<token_t>* keys) {
  std::vector<std::vector<float>> results;
  const index_t tokens = head.k.tokens;
  const domain full{.causal = false};
  for (context& ctx : contexts) {
    for (const index_t rows : {1, 3, 40}) {
      const attention_shape shape{rows, tokens, 3, 1, 0};
      const auto plan_of = [&](const auto& pattern) {
        return rows == 1 ? plan_decode(ctx, shape, pattern, {.legal = full, .split_keys = 20})
                         : plan_prefill(ctx, shape, pattern, {.legal = full, .tile_rows = 16});
      };
      attention_plan plan;
      if (keys == nullptr) {
        plan = plan_of(dense{});
      } else {
        plan = plan_of(token_lists{static_cast<token_t>(rows), {0, std::ssize(*keys)}, *keys});
      }
      for (const std::size_t pack : {std::size_t{0}, std::size_t{1} << 40}) {
        std::vector<float>& out = results.emplace_back(at(rows * 3 * p.v_dim), quiet_nan);
        attend(ctx, plan, p.q.view().slice(0, rows).head_slice(3 * kv_head, 3 * kv_head + 3), head,
               {nhd(out.data(), rows, 3, p.v_dim)}, {.pack_bytes = pack});
      }
    }
  }
  return results;
}

template <class K, class V>
void expect_kept_keys_in_order() {
  const seed_trace trace;
  random_source random;
  all_contexts contexts;
  SCOPED_TRACE(::testing::Message() << name_of(dtype_of<K>) << " and " << name_of(dtype_of<V>));
  for (const token_t page_size : {1, 7, 16}) {
    attention_problem p(random, {40, 150, 6, 2, 64, 32});
    paged_kv_cache<K, V> cache({.kv_heads = 2, .head_dim = 64, .v_dim = 32, .page_size = page_size,
                                .capacity = 200});
    cache.append(p.k.view(), p.v.view());
    std::vector<std::vector<token_t>> keep(2);
    for (token_t t = 0; t < 150; ++t) {
      if (t < 20 || random.integer(0, 3) == 0) keep[0].push_back(t);
      if (t % 13 == 5 || t > 140) keep[1].push_back(t);
    }
    if (keep[0].size() % 16 == 0) keep[0].pop_back();  // pages have places left over
    std::vector<std::vector<std::vector<float>>> in_place;
    std::vector<std::pair<stored_bytes, stored_bytes>> rows;
    for (index_t h = 0; h < 2; ++h) {
      in_place.push_back(attend_to(contexts, p, cache.view(h), h, &keep[at(h)]));
      for (const token_t t : keep[at(h)]) {
        rows.emplace_back(read_row(cache.view(h).k, 0, t), read_row(cache.view(h).v, 0, t));
      }
    }
    cache.evict(keep);
    poison_all_but(cache);
    auto row = rows.begin();
    for (index_t h = 0; h < 2; ++h) {
      ASSERT_EQ(cache.tokens(h), std::ssize(keep[at(h)]));
      for (index_t t = 0; t < cache.tokens(h); ++t, ++row) {
        ASSERT_EQ(read_row(cache.view(h).k, 0, t), row->first) << "key " << t << " of head " << h;
        ASSERT_EQ(read_row(cache.view(h).v, 0, t), row->second) << "value " << t << " of " << h;
      }
      const auto got = attend_to(contexts, p, cache.view(h), h, nullptr);
      for (std::size_t i = 0; i < got.size(); ++i) {
        EXPECT_TRUE(bit_equal(got[i], in_place[at(h)][i])) << "head " << h << ", call " << i;
      }
    }
  }
}

TEST(evicted_keys, leave_the_bits_of_those_kept_and_nothing_else_is_read) {
  expect_kept_keys_in_order<float, float>();
  expect_kept_keys_in_order<f16, f16>();
  expect_kept_keys_in_order<bf16, bf16>();
  expect_kept_keys_in_order<std::int8_t, std::int8_t>();
  expect_kept_keys_in_order<q8_0, q8_0>();
  expect_kept_keys_in_order<std::int8_t, f16>();
  expect_kept_keys_in_order<float, std::int8_t>();
  expect_kept_keys_in_order<bf16, q8_0>();
}

}  // namespace
