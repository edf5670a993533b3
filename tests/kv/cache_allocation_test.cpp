// SPDX-License-Identifier: Apache-2.0
//
// A cache for which memory runs out at every allocation that an operation makes, one after the
// other.

#include <gtest/gtest.h>

#include <functional>
#include <new>
#include <optional>
#include <sattn/kv/paged_cache.hpp>
#include <vector>

#include "kv/cache_model.hpp"
#include "support/alloc_counter.hpp"
#include "support/problem.hpp"

namespace {

using namespace sattn;         // NOLINT(google-build-using-namespace)
using namespace test_support;  // NOLINT(google-build-using-namespace)

using cache_type = paged_kv_cache<std::int8_t, f16>;

// Everything that can be seen of a cache.
struct cache_state {
  std::vector<stored_bytes> rows;
  std::vector<index_t> numbers;
  std::vector<std::byte> summaries;

  explicit cache_state(const cache_type& c) {
    numbers = {c.tokens(), c.free_pages(), c.uniform() ? 1 : 0};
    for (const std::size_t bytes : {c.bytes().capacity, c.bytes().used, c.bytes().held}) {
      numbers.push_back(static_cast<index_t>(bytes));
    }
    for (index_t h = 0; h < c.options().kv_heads; ++h) {
      numbers.push_back(c.tokens(h));
      for (index_t t = 0; t < c.tokens(h); ++t) {
        rows.push_back(read_row(c.view(h).k, 0, t));
        rows.push_back(read_row(c.view(h).v, 0, t));
      }
      add(c.summaries()[at(h)]);
      add(c.means()[at(h)]);
    }
  }
  void add(const page_summaries& s) {
    numbers.push_back(s.tokens());
    for (index_t i = 0; i < s.tiles(); ++i) {
      const auto* const first = static_cast<const std::byte*>(s.tile(i));
      summaries.insert(summaries.end(), first, first + s.bytes() / at(s.tiles()));
    }
  }
  bool operator==(const cache_state&) const = default;
};

// `call` fails at its first allocation, its second, ... until it has enough, each time on a cache
// as `make` leaves it; a failure leaves no trace.
void expect_strong_guarantee(const char* name, const std::function<void(cache_type&)>& prepare,
                             const std::function<void(cache_type&)>& call) {
  SCOPED_TRACE(name);
  bool succeeded = false;
  for (std::size_t n = 0; !succeeded && n < 1000; ++n) {
    cache_type cache({.kv_heads = 2,
                      .head_dim = 3,
                      .page_size = 2,
                      .capacity = 400,
                      .summaries = dtype::i8,
                      .means = dtype::f16});
    std::optional<cache_type> fork;
    prepare(cache);
    fork = cache.fork();
    const cache_state before(cache);
    try {
      const failing_allocation failing(n);
      call(cache);
      succeeded = true;
    } catch (const std::bad_alloc&) {
    }
    if (succeeded) {
      EXPECT_GT(n, 0u) << "nothing was allocated";
    } else {
      EXPECT_EQ(cache_state(cache), before) << "allocation " << n;
    }
    const cache_state forked(*fork);
    EXPECT_EQ(forked.rows, before.rows) << "allocation " << n;
    EXPECT_EQ(forked.summaries, before.summaries) << "allocation " << n;
    fork.reset();
    cache = cache.new_sequence();
    EXPECT_EQ(cache.bytes().used, 0u) << "allocation " << n;
  }
  EXPECT_TRUE(succeeded);
}

TEST(cache_allocation, a_failure_changes_nothing) {
  random_source random(9);
  owned_tensor k(300, 2, 3), v(300, 2, 3);
  k.fill_normal(random);
  v.fill_normal(random);
  const auto append = [&](index_t begin, index_t end) {
    return [&, begin, end](cache_type& c) {
      c.append(k.view().slice(begin, end), v.view().slice(begin, end));
    };
  };
  expect_strong_guarantee("append to nothing", append(0, 0), append(0, 7));
  expect_strong_guarantee("append to a shared page", append(0, 7), append(7, 8));
  expect_strong_guarantee("append tiles of summaries", append(0, 127), append(127, 300));
  expect_strong_guarantee("fork", append(0, 9), [](cache_type& c) { const auto copy = c.fork(); });
  expect_strong_guarantee("new sequence", append(0, 9),
                          [](cache_type& c) { const auto other = c.new_sequence(); });
  expect_strong_guarantee("truncate", append(0, 280), [](cache_type& c) { c.truncate(131); });
  const std::vector<std::vector<token_t>> keep = {{0, 1, 2, 5, 100, 299}, {7}};
  expect_strong_guarantee("evict", append(0, 300), [&](cache_type& c) { c.evict(keep); });
  const rotary_embedding embedding{.dims = 2, .base = 100};
  expect_strong_guarantee("evict and turn", append(0, 300),
                          [&](cache_type& c) { c.evict(keep, embedding); });
}

}  // namespace
